"""RLHF as inverse RL (S64): cloning, inverse RL and RLHF on one sequence task, their errors by the length of answers, and the paper's takeaways as figures.

Exact part. An answer is a sequence of tokens, and what matters of it so far is one of a few states. On the track, `GOOD` tokens of each state lead to
further states of the track and earn 1; any other token loses the track. Off it nothing is earned, and only the right token for each of `LOST` states, one
after the other, leads back. The expert stays on the track; so no demonstration shows how to come back. The error of a policy is the expected number of
tokens that earn nothing. All lengths have as many demonstrated tokens, so that the cloner is as good at each token, whatever the length.

- Cloning is maximum likelihood with `DOUBT` added to each count: a softmax gives no token up. Without it the cloner of so small a process would make hardly
  a mistake, because all it has seen leads to what it has seen.
- Inverse RL finds the reward under which the cloned policy, improved for it, visits what the expert visits. It sees the same demonstrations; beside them it
  needs the dynamics, which for texts are known, and its own episodes.
- RLHF finds the reward from preferences between answers of the cloned policy (Bradley–Terry on what they earn) and improves the cloned policy alike.

Rewards are tables of states and tokens, each at the mode of the same normal prior, and both policies are optima with divergence 1 from the cloned policy,
found with the dynamics: see `functional.inverse`. So what differs is where the reward comes from.

Other takeaways of the paper on the same task: what updates on the learner's own answers add to a reward that was learned once, against the cloner's; whether
a learned reward can stand for the judge in a choice among answers; how many answers a policy gradient needs where feedback comes once an answer; what more
tokens to choose from cost; what a weak leash costs. That PPO is stable where less conservative updates are not is measured by the recipe of `ppo-max`.

Text part. The same kind of track as text for `tinylm`, with letters as tokens and no way back: each letter must be one of those that may follow the letter
before it. `sft` clones short and long answers of the expert. `dpo` then finds the same kind of optimum as the exact part, near the clone for a Bradley–Terry
reward: from pairs of the clone's own answers (RLHF), or of an expert's and the clone's answer to the same prompt (inverse RL without updates, one round).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
from scipy.stats import spearmanr

from telos.algorithms import run as runs
from telos.algorithms.language._sampling import sample_texts
from telos.algorithms.language.best_of_n import expected_best
from telos.catalogue.claims import Budget, Claim, Fact
from telos.catalogue.lab import Lab, Labelling, Stages, Watch
from telos.core.seeds import derive, numpy_generator
from telos.environments.tabular import Tabular
from telos.environments.text.base import Item, Split
from telos.functional.inverse import bradley_terry_reward, maximum_entropy_reward, soft_optimum
from telos.models.generation import Sampling
from telos.models.language import LanguageModel

# Exact part
TRACK, LOST, TOKENS, GOOD = 16, 2, 16, 4  # states on and off the track, tokens, and those of them that stay on the track
LENGTHS = (4, 8, 16, 32)
DEMONSTRATED = 2048  # tokens of the expert, at each length
DOUBT = 0.1  # added to each count
PAIRS = 1000
CHOICES, GROUPS = 4, 500  # a choice is among so many answers, and is made so often
GRADIENTS = 4000  # answers from which a gradient's noise is estimated
MANY = 64  # tokens of the larger vocabulary
WEAK = 0.01  # of the divergence's weight

# Text part
LETTERS = "bdfhkmpr"
LETTERS_KEPT = 2  # of them may follow each
TEXT_LENGTHS = (6, 24)
SFT: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-3, "lr_schedule": "linear", "checkpoint_every": 0}
DPO: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 1e-4,
    "lr_schedule": "linear",
    "beta": 0.1,
    "checkpoint_every": 0,
    "eval_prompts": 0,
}
SMOKE: Mapping[str, Any] = {"instances": 1, "demonstrations": 32, "sft_steps": 2, "pairs": 16, "steps": 1, "held_out": 8}
FULL: Mapping[str, Any] = {"instances": 10, "demonstrations": 800, "sft_steps": 80, "pairs": 800, "steps": 100, "held_out": 512}


@dataclass(frozen=True, eq=False)
class Task:
    """The process at one length, and its expert [S, A]."""

    process: Tabular
    expert: np.ndarray

    @property
    def length(self) -> int:
        assert self.process.horizon is not None
        return self.process.horizon

    @cached_property
    def following(self) -> np.ndarray:
        """[S, A]: the next state."""
        return self.process.transitions.argmax(-1)

    def error(self, policy: np.ndarray) -> float:
        """Tokens of an answer, in expectation, that earn nothing."""
        return self.length - self.process.performance(policy)

    def improved(self, policy: np.ndarray, reward: np.ndarray, leash: float = 1.0) -> np.ndarray:
        return soft_optimum(reward, self.process.transitions, policy, self.length, leash).policy

    def answers(self, policy: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
        """[count, H, 2]: states and tokens of answers."""
        steps = np.broadcast_to(policy, (self.length, *self.expert.shape))
        state, found = draws.choice(len(self.expert), count, p=self.process.start), np.empty((count, self.length, 2), dtype=np.int64)
        for t in range(self.length):
            token = (draws.random(count)[:, None] >= steps[t, state].cumsum(-1)[:, :-1]).sum(-1)
            found[:, t] = np.stack([state, token], -1)
            state = self.following[state, token]
        return found

    def counts(self, answers: np.ndarray) -> np.ndarray:
        """[count, S, A]: how often each token was written in each state."""
        found = np.zeros((len(answers), *self.expert.shape))
        np.add.at(found, (np.arange(len(answers))[:, None], answers[..., 0], answers[..., 1]), 1.0)
        return found


def make_task(seed: int, length: int, tokens: int = TOKENS) -> Task:
    """The same process for every length."""
    draws, states = numpy_generator(seed, "track", tokens), TRACK + LOST
    following, rewards, expert = np.full((states, tokens), TRACK), np.zeros((states, tokens)), np.zeros((states, tokens))
    for state in range(TRACK):
        good = draws.choice(tokens, GOOD, replace=False)
        following[state, good], rewards[state, good] = draws.integers(TRACK, size=GOOD), 1.0
        expert[state, good] = draws.dirichlet(np.ones(GOOD))
    expert[TRACK:] = 1 / tokens  # it is never there
    for state in range(TRACK, states):
        following[state, draws.integers(tokens)] = state + 1 if state + 1 < states else draws.integers(TRACK)
    start = np.where(np.arange(states) < TRACK, 1 / TRACK, 0.0)
    return Task(Tabular(np.eye(states)[following], rewards, start, None, length), expert)


@dataclass(frozen=True, eq=False)
class Learned:
    """Policies and rewards that a task's demonstrations and preferences give."""

    cloned: np.ndarray  # [S, A]
    by_demonstrations: np.ndarray  # reward [S, A] of inverse RL
    by_comparison: np.ndarray  # the same, once, from the expert's answers and the cloned policy's
    by_preferences: np.ndarray  # of RLHF


def learn(task: Task, draws: np.random.Generator) -> Learned:
    count = DEMONSTRATED // task.length
    shown = task.counts(task.answers(task.expert, count, draws))
    seen = shown.sum(0) + DOUBT
    cloned = seen / seen.sum(-1, keepdims=True)
    process = task.process
    by_demonstrations = maximum_entropy_reward(shown.mean(0), process.transitions, process.start, cloned, task.length, ridge=1 / count)
    first, second = (task.counts(task.answers(cloned, PAIRS, draws)) for _ in range(2))
    gain = ((first - second) * process.rewards).sum((1, 2))
    sign = np.where(draws.random(PAIRS) < 1 / (1 + np.exp(-gain)), 1.0, -1.0)
    most = min(count, PAIRS)
    return Learned(
        cloned,
        by_demonstrations,
        bradley_terry_reward(shown[:most] - first[:most], 1 / most),
        bradley_terry_reward(sign[:, None, None] * (first - second), 1 / PAIRS),
    )


def gradient_noise(task: Task, policy: np.ndarray, draws: np.random.Generator) -> tuple[float, float]:
    """How many answers a policy gradient needs for its noise to be as large as itself, tr Cov(g) / ‖∇J‖², where each token is credited with what the whole
    answer earns, and with what is earned from it on. From both their mean is subtracted. ∇J, in the logits of `policy` [S, A], is exact."""
    value, found = task.process.evaluate(policy), task.answers(policy, GRADIENTS, draws)
    exact = (task.process.occupancy(policy) * (value.action - value.state[:-1, :, None])).sum(0)
    earned = task.process.rewards[found[..., 0], found[..., 1]]
    whole, onward = np.broadcast_to(earned.sum(1, keepdims=True), earned.shape), earned[:, ::-1].cumsum(1)[:, ::-1]
    noise = []
    for credit in (whole, onward):
        weight, rows = credit - credit.mean(0), np.arange(len(found))[:, None]
        gradient = np.zeros((len(found), *policy.shape))
        np.add.at(gradient, (rows, found[..., 0], found[..., 1]), weight)
        gradient -= gradient.sum(-1, keepdims=True) * policy
        noise.append(float(gradient.var(0).sum() / (exact**2).sum()))
    return noise[0], noise[1]


def takeaways(task: Task, learned: Learned, draws: np.random.Generator) -> dict[str, float]:
    """At one length: how well rewards choose among answers of the cloned policy, and what a policy gradient needs."""
    fresh = task.counts(task.answers(learned.cloned, CHOICES * GROUPS, draws)).reshape(GROUPS, CHOICES, *task.expert.shape)
    gold, found = (fresh * task.process.rewards).sum((2, 3)), {}
    best, mean = expected_best(gold, CHOICES).mean(), gold.mean()
    for name, reward in (("inverse RL", learned.by_demonstrations), ("RLHF", learned.by_preferences)):
        said = (fresh * reward).sum((2, 3))
        gain = float(expected_best(said, CHOICES, of=gold).mean() - mean)
        found[f"share of the judge's gain by choosing with the reward of {name}"] = gain / float(best - mean)
        found[f"rank correlation of the reward with the judge, {name}"] = correlation(said, gold)
    sparse, dense = gradient_noise(task, learned.cloned, draws)
    return found | {
        "answers a gradient needs, feedback at the end": sparse,
        "answers a gradient needs, feedback at each token": dense,
        "answers a gradient needs, feedback at the end over at each token": sparse / dense,
    }


def correlation(a: Any, b: Any) -> float:
    return float(cast(Any, spearmanr(np.ravel(a), np.ravel(b)))[0])


def exact(seed: int, instances: int) -> dict[str, float]:
    """Figures of the exact part, means over instances."""
    rows: list[dict[str, float]] = []
    for instance in range(instances):
        process, found = derive(seed, "instance", instance), {}
        for length in LENGTHS:
            task, draws = make_task(process, length), numpy_generator(seed, "learning", instance, length)
            learned = learn(task, draws)
            policies = {
                "cloning": learned.cloned,
                "inverse RL": task.improved(learned.cloned, learned.by_demonstrations),
                "inverse RL without updates": task.improved(learned.cloned, learned.by_comparison),
                "RLHF": task.improved(learned.cloned, learned.by_preferences),
                "RLHF on a weak leash": task.improved(learned.cloned, learned.by_preferences, WEAK),
                "the true reward": task.improved(learned.cloned, task.process.rewards),
            }
            found |= {f"error at {length}, {name}": task.error(policy) for name, policy in policies.items()}
            if length == LENGTHS[-1]:
                found |= takeaways(task, learned, draws)
        task = make_task(process, LENGTHS[-1], MANY)
        learned = learn(task, numpy_generator(seed, "learning", instance, "many"))
        policies = {"cloning": learned.cloned, "RLHF": task.improved(learned.cloned, learned.by_preferences)}
        rows.append(found | {f"error at {LENGTHS[-1]} with {MANY} tokens, {name}": task.error(policy) for name, policy in policies.items()})
    figures = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return figures | compared("", figures, LENGTHS)


def compared(where: str, figures: Mapping[str, float], lengths: Sequence[int]) -> dict[str, float]:
    """How errors grow, and what is left of cloning's at the greatest length."""
    names = ("cloning", "inverse RL", "RLHF")
    errors = {name: [max(figures[f"error at {length}{where}, {name}"], 1e-3) for length in lengths] for name in names}
    grown = {name: growth(values, lengths) for name, values in errors.items()}
    found = {f"growth of the error{where}, {name}": value for name, value in grown.items()}
    for name in names[1:]:
        found[f"growth of the error{where}, cloning over {name}"] = grown["cloning"] - grown[name]
        found[f"share of cloning's error at {lengths[-1]}{where}, {name}"] = errors[name][-1] / errors["cloning"][-1]
    return found


def growth(errors: Sequence[float], lengths: Sequence[int]) -> float:
    """The power of the length with which an error grows: the slope of its logarithm. 1 where mistakes do not lead to others, at most 2."""
    return float(np.polyfit(np.log(lengths), np.log(errors), 1)[0])


# Text part ---------------------------------------------------------------------------------------------------------------------------------------------


class Walk:
    """A testbed of one seed: "Walk 12 from d:" is answered by so many letters, each of which must be one of those that may follow the letter before it.

    The gold score is the share of the letters that were asked for, from the first to the last before a mistake. Prompts are few and the answers many, so that
    splits have the same prompts."""

    name = "walk"
    max_new_tokens = 32

    def __init__(self, seed: int) -> None:
        draws = numpy_generator(seed, "walk")
        self.following = {letter: sorted(draws.choice(list(LETTERS), LETTERS_KEPT, replace=False).tolist()) for letter in LETTERS}

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        draws, found = numpy_generator(seed, "items", split), []
        for i in range(n or 256):
            length, walk = TEXT_LENGTHS[i % len(TEXT_LENGTHS)], [str(draws.choice(list(LETTERS)))]
            while len(walk) <= length:
                walk.append(str(draws.choice(self.following[walk[-1]])))
            found.append(Item(f"Walk {length} from {walk[0]}:", " " + " ".join(walk[1:]), {"length": length, "letter": walk[0]}))
        return found

    def kept(self, item: Item, completion: str) -> int:
        """Letters before the first mistake, of those that were asked for."""
        before, count = item.facts["letter"], 0
        for letter in completion.split()[: item.facts["length"]]:
            if letter not in self.following[before]:
                break
            before, count = letter, count + 1
        return count

    def gold(self, item: Item, completion: str) -> float:
        return self.kept(item, completion) / item.facts["length"]

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        return {"kept": self.gold(item, completion), "length": float(len(completion.split()) == item.facts["length"])}

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        yield from (item.prompt + item.reference for item in self.items("train", n, seed))


class WalkLab(Lab):
    """A lab on the seed's own testbed."""

    testbed: Walk

    def __init__(self, root: Path, seed: int, watch: Watch | None = None) -> None:
        Stages.__init__(self, root, seed, watch)
        self.testbed = Walk(seed)


def text(lab: WalkLab, settings: Mapping[str, Any]) -> dict[str, float]:
    """Errors of the clone, of RLHF and of inverse RL at each length of text."""
    walk = lab.testbed
    shown = walk.items("train", settings["demonstrations"], derive(lab.seed, "demonstrations") % 2**31)
    data = lab.file("demonstrations.jsonl", lambda: [{"prompt": item.prompt, "completion": item.reference} for item in shown])
    clone = str(lab.train("sft", "sft", model="tinylm", data=str(data), steps=settings["sft_steps"], **SFT).path / "model")

    def beside() -> list[dict[str, Any]]:
        runs.prepare_threads()
        sampling, prompts = Sampling(max_new_tokens=walk.max_new_tokens), [item.prompt for item in shown]
        own = sample_texts(LanguageModel.load(clone), prompts, sampling, n=1, seed=derive(lab.seed, "own answers"))
        rows = [{"prompt": item.prompt, "chosen": item.reference, "rejected": answer} for item, (answer,) in zip(shown, own, strict=True)]
        return [row for row in rows if row["rejected"].strip() not in ("", row["chosen"].strip())]

    pairs = {"RLHF": lab.pairs("preferences", clone, Labelling(settings["pairs"])), "inverse RL": lab.file("beside.jsonl", beside)}
    policies: dict[str, Any] = {"cloning": clone}
    for name, file in pairs.items():
        policies[name] = lab.train(f"dpo on {file.stem}", "dpo", model=clone, data=str(file), steps=settings["steps"], **DPO)
    items = walk.items("test", settings["held_out"], derive(lab.seed, "held out") % 2**31)
    lengths, figures = np.array([item.facts["length"] for item in items]), {}
    for name, policy in policies.items():
        found = lab.assess(name, policy, items, reference=clone)
        lost = lengths * (1 - np.array(found.gold))
        figures |= {f"error at {length} on text, {name}": float(lost[lengths == length].mean()) for length in TEXT_LENGTHS}
        figures[f"divergence from the clone on text, {name}"] = float(np.mean(found.kl))
    return figures | compared(" on text", figures, TEXT_LENGTHS)


def experiment(root: Path, seed: int, settings: Mapping[str, Any], watch: Any = None) -> dict[str, float]:
    return exact(seed, settings["instances"]) | text(WalkLab(root, seed, watch), settings)


CLAIM = Claim(
    key="rlhf-as-irl",
    statement="the error of cloning compounds with the length of answers; with inverse RL from the same demonstrations and with RLHF it "
    "is smaller and grows less",
    baselines=("cloning (maximum likelihood; sft on text)",),
    facts=(
        Fact("the cloner's error grows with more than the power 1.5 of the length", "growth of the error, cloning", ">", 1.5),
        *(
            Fact(f"with {name} the power is lower by a half at least", f"growth of the error, cloning over {name}", ">", 0.5)
            for name in ("inverse RL", "RLHF")
        ),
        *(
            Fact(
                f"{name} leaves less than a quarter of the cloner's error at length {LENGTHS[-1]}",
                f"share of cloning's error at {LENGTHS[-1]}, {name}",
                "<",
                0.25,
            )
            for name in ("inverse RL", "RLHF")
        ),
        Fact(
            f"a choice among {CHOICES} answers by RLHF's reward has nine tenths of what the judge's own choice gains",
            "share of the judge's gain by choosing with the reward of RLHF",
            ">",
            0.9,
        ),
        Fact(
            f"feedback at the end of answers of {LENGTHS[-1]} tokens costs a policy gradient half as many answers again as feedback at each token",
            "answers a gradient needs, feedback at the end over at each token",
            ">",
            1.5,
        ),
        Fact(
            "on text the clone's error grows with more than the power 1.2 of the length", "growth of the error on text, cloning", ">", 1.2
        ),
        Fact(
            f"and RLHF leaves less than three quarters of it at length {TEXT_LENGTHS[-1]}",
            f"share of cloning's error at {TEXT_LENGTHS[-1]} on text, RLHF",
            "<",
            0.75,
        ),
    ),
    experiment=experiment,
    budgets={"smoke": Budget(1, SMOKE), "full": Budget(3, FULL)},
    notes="The paper is an argument; the task is ours. Inverse RL and RLHF plan with the known dynamics, which is what the argument is about, and their "
    "rewards are tables, so that they can be learned. On text there is no way back onto the track, so that RLHF can make mistakes rarer but not less costly: "
    "what is asked there is a smaller error, not a slower growth. Inverse RL on text is one round of comparisons with the clone, most of whose answers are as "
    "good as the expert's; its error is among the figures and decides nothing. A reward model of this size with PPO after it was tried on a tuning seed, and "
    "knew too little of single mistakes to make them rarer.",
)
