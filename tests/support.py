"""What the foundation's tests share: tiny random models on disk, data of every shape, and how each loop is run small.

A model here has two layers of width 32 and a byte-level tokenizer of 320 tokens; it takes a fraction of a second to make and knows nothing. Everything a test
compares is computed from it twice in different ways, so that it need not know anything.
"""

from __future__ import annotations

import copy
import json
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, T5Config, T5ForConditionalGeneration

from data_fixtures import CHATML, assistant, tiny_tokenizer, user, write_jsonl
from telos.algorithms.run import build, prepare
from telos.core import config as configs
from telos.core import discovery
from telos.core.config import options_of
from telos.core.method import Method
from telos.core.run import Run

PROMPTS = [
    "The sky is",
    "What colour is the grass?",
    "hello",
    "good or bad: the answer",
    "The sky is blue. The grass is green. What colour is the sky?",
    "a",
    "user assistant system",
    "What is good?",
    "The grass",
    "bad answer, good answer,",
    "hello hello",
    "Is it blue?",
]
GOOD = [" blue.", " green, of course", " good", " it is good", " blue", " b", " hello there", " good answers"]
STEP_ENDS = [" ", ".", "e", "a", "o"]  # so frequent that a random model's answers have several steps
BAD = [" bad", " no", " a bad answer is bad", " x", " grass", " sky sky sky", " !", " the"]


# Models --------------------------------------------------------------------------------------------------------------------------------


def tiny_config(**changes: Any) -> LlamaConfig:
    words = tiny_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 96,
        "tie_word_embeddings": False,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        # Far from zero, so that probabilities differ visibly between tokens.
        "initializer_range": 0.3,
    }
    return LlamaConfig(**(settings | changes))


def make_model(
    folder: Path, seed: int = 0, *, padding_side: str = "right", pad_is_eos: bool = False, chat: bool = False, **changes: Any
) -> Path:
    """A folder with a random two-layer Llama and its tokenizer, as `save_pretrained` writes it. About one token in six that it samples is the end token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**changes))
    with torch.no_grad():  # a direction that all states share is read by the end token's row
        model.model.embed_tokens.weight += torch.randn(model.config.hidden_size)
        states = model.model(input_ids=torch.arange(64)[:, None]).last_hidden_state[:, 0]
        mean = states.mean(0)
        wanted = model.lm_head(states).logsumexp(1).mean() - math.log(5)
        model.lm_head.weight[model.config.eos_token_id] = mean * wanted / mean.square().sum()
    model.save_pretrained(folder)
    tiny_tokenizer(padding_side=padding_side, pad_is_eos=pad_is_eos, chat=CHATML if chat else None).save_pretrained(folder)
    return folder


def make_encoder_decoder(folder: Path, seed: int = 0) -> Path:
    """A folder with a random two-layer T5 on the same tokenizer."""
    words = tiny_tokenizer()
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        tie_word_embeddings=False,
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)
    with torch.no_grad():  # as it is initialised it writes nearly the same answer every time
        model.lm_head.weight *= 0.3
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def make_reward_model(folder: Path, seed: int = 1) -> Path:
    """A folder with a random one-label classifier on the same tokenizer."""
    torch.manual_seed(seed)
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_value_model(folder: Path, seed: int = 2) -> Path:
    """A folder with a random one-label classifier that passes for one that was trained on chances of success, at prompts too."""
    make_reward_model(folder, seed)
    config = read_json(folder / "config.json") | {"telos_values_prompts": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# Data ----------------------------------------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> dict[str, str]:
    """One small file of each format; the path by the format's name."""
    folder.mkdir(parents=True, exist_ok=True)
    n = range(len(PROMPTS))
    rows: dict[str, list[dict[str, Any]]] = {
        "language-modeling": [{"text": PROMPTS[i] + GOOD[i % len(GOOD)]} for i in n],
        "prompt-only": [{"prompt": PROMPTS[i], "answer": GOOD[i % len(GOOD)]} for i in n],
        "prompt-completion": [{"prompt": PROMPTS[i], "completion": GOOD[i % len(GOOD)]} for i in n],
        "preference": [{"prompt": PROMPTS[i], "chosen": GOOD[i % len(GOOD)], "rejected": BAD[i % len(BAD)]} for i in n],
        "preference-margin": [
            {
                "prompt": PROMPTS[i],
                "chosen": GOOD[i % len(GOOD)],
                "rejected": BAD[i % len(BAD)],
                "margin": 0.25 * i,
                "chosen_score": 1.0 + 0.1 * i,
                "rejected_score": 0.5 - 0.2 * i,
            }
            for i in n
        ],
        "unpaired": [
            {"prompt": PROMPTS[i], "completion": (GOOD if i % 2 else BAD)[i % len(GOOD)], "label": bool(i % 2), "score": 40.0 + i}
            for i in n
        ],
        "ranked": [
            {
                "prompt": PROMPTS[i],
                "completions": [GOOD[i % 8], BAD[i % 8], GOOD[(i + 1) % 8]][: 2 + i % 2],
                "scores": [2, 0.5, i][: 2 + i % 2],
            }
            for i in n
        ],
        "stepwise": [
            {
                "prompt": PROMPTS[i],
                "completions": ["a", "b", "c"],
                "labels": [True, (i % 4) / 4, i % 2],
                "prompt_label": 0.5,
                "step_separator": "",
            }
            for i in n
        ],
        "messages": [{"messages": [user(PROMPTS[i]), assistant(GOOD[i % len(GOOD)].strip())]} for i in n],
        "preference-messages": [
            {
                "prompt": [user(PROMPTS[i])],
                "chosen": [assistant(GOOD[i % len(GOOD)].strip())],
                "rejected": [assistant(BAD[i % len(BAD)].strip())],
            }
            for i in n
        ],
    }
    return {name: str(write_jsonl(folder / f"{name}.jsonl", found)) for name, found in rows.items()}


REWARD_FILE = '''
def letters(prompts, completions, **columns):
    """Fewer letters e and more spaces are better; never twice the same by chance alone."""
    return [text.count(" ") - 0.5 * text.count("e") + 0.01 * len(text) for text in completions]


def brevity(completions, **columns):
    return [-float(len(text)) for text in completions]
'''


def make_reward(folder: Path, name: str = "letters") -> str:
    """`letters`, or `brevity`, in a file of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "reward.py").write_text(REWARD_FILE, encoding="utf-8")
    return f"{folder / 'reward.py'}:{name}"


# Runs ----------------------------------------------------------------------------------------------------------------------------------


ENVIRONMENT_FILE = '''
import gymnasium
import numpy as np


class Reach(gymnasium.Env):
    """Walk on a line until the place 1 is reached; an episode is cut after six steps. With `finite` seven cells of the line are what is seen."""

    def __init__(self, continuous=False, finite=False, bad="", render_mode=None):
        self.observation_space = gymnasium.spaces.Discrete(7) if finite else gymnasium.spaces.Box(-10.0, 10.0, (2,), np.float32)
        self.finite, self.models = finite, np.random.default_rng(0).dirichlet(np.full(7, 0.5), (2, 7, 3)) if finite else None
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32) if continuous else gymnasium.spaces.Discrete(3)
        self.continuous, self.bad, self.steps = continuous, bad, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(-0.5, 0.5)), 0
        return self._look(), {}

    def _look(self):
        if self.finite:
            return int(np.clip(round(self.place / 0.4) + 3, 0, 6))
        return np.array([self.place, self.steps / 6], np.float32)

    def step(self, action):
        self.steps += 1
        self.place += float(np.asarray(action).reshape(-1)[0]) * 0.6 if self.continuous else 0.4 * (int(action) - 1)
        self.place += float(self.np_random.normal()) * 0.05
        reward = float("nan") if self.bad == "reward" and self.steps == 3 else -abs(self.place - 1)
        look = self._look()
        if self.bad == "observation" and self.steps == 2:
            look = look * float("nan")
        if self.bad == "raises" and self.steps == 4:
            raise RuntimeError("the motor is hot")
        return look, reward, bool(self.place > 1), self.steps >= 6, {"is_success": self.place > 1}
'''
DISCRETE = {"dqn", "gorp", "hnpg", "hy-q", "sqirl", "stream-q"}  # methods that need discrete actions


def make_teacher(root: Path, env: str, continuous: bool) -> str:
    """A finished run in the tiny environment, whose policy has learned next to nothing."""
    from telos.algorithms.run import train

    options = {"env": env, "env_options": [f"continuous={str(continuous).lower()}"], "num_envs": 1, "hidden": [4], "device": "cpu"}
    lengths = {"total_steps": 8, "rollout_steps": 8, "minibatch_size": 8, "epochs": 1, "eval_episodes": 1, "checkpoint_every": 0}
    return str(train("ppo", {**options, **lengths, "out": str(root / f"teacher-{continuous}")}).path)


def make_steps(folder: Path, env: str, continuous: bool, episodes: int = 12) -> str:
    """A file in D4RL's layout of random episodes in the tiny environment."""
    import h5py
    import numpy as np

    from telos.environments.base import Driver
    from telos.environments.registry import make_environments

    environments = make_environments(env, 1, options={"continuous": continuous})
    driver = Driver(environments, 5)
    draws = np.random.default_rng(3)
    rows: dict[str, list[Any]] = {name: [] for name in ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")}
    while driver.number[0] < episodes:
        action = draws.uniform(-1, 1, (1, 1)).astype(np.float32) if continuous else draws.integers(0, 3, 1)
        before = driver.observation
        outcome, _ = driver.step(action)
        found = (before, outcome.observation, action, outcome.reward, outcome.terminated, outcome.truncated)
        for name, value in zip(rows, found, strict=True):
            rows[name].append(value[0])
    path = folder / f"steps-{'continuous' if continuous else 'discrete'}.hdf5"
    with h5py.File(path, "w") as file:
        for name, values in rows.items():
            file[name] = np.stack(values)
    return str(path)


class World:
    """The tiny files that runs need, by name."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = str(make_model(root / "model"))
        self.other_model = str(make_model(root / "other-model", seed=7))
        self.encoder_decoder = str(make_encoder_decoder(root / "encoder-decoder"))
        self.chat_model = str(make_model(root / "chat-model", chat=True))
        (root / "tiny_env.py").write_text(ENVIRONMENT_FILE, encoding="utf-8")
        (root / "few").mkdir()
        env = f"{root / 'tiny_env.py'}:Reach"
        self.few_steps = {kind: make_steps(root / "few", env, kind, episodes=5) for kind in (True, False)}
        self.steps = {kind: make_steps(root, env, kind) for kind in (True, False)}
        self.teachers = {kind: make_teacher(root, env, kind) for kind in (True, False)}
        self.reward_model = str(make_reward_model(root / "reward-model"))
        self.value_model = str(make_value_model(root / "value-model"))
        self.other_value_model = str(make_value_model(root / "other-value-model", seed=9))
        self.reward, self.brevity = make_reward(root), make_reward(root, "brevity")
        self.data = make_data(root / "data")

    def control_options(self, method: Method, **changes: Any) -> dict[str, Any]:
        """The same for a method of control, in an environment whose episodes are terminated and cut alike."""
        common: dict[str, Any] = {
            "env": f"{self.root / 'tiny_env.py'}:Reach",
            "env_options": [f"continuous={'false' if method.key in DISCRETE else 'true'}"],
            "num_envs": 2,
            "hidden": [16, 16],
            "device": "cpu",
            "checkpoint_every": 0,
            "eval_episodes": 3,
            "learning_rate": 1e-2,
        }
        by_loop: dict[str, dict[str, Any]] = {
            "on-policy": {"total_steps": 72, "rollout_steps": 12, "minibatch_size": 8, "epochs": 2},
            "off-policy": {
                "total_steps": 72,
                "iteration_steps": 24,
                "start_steps": 12,
                "random_steps": 8,
                "batch_size": 8,
                "train_every": 4,
                "replay_size": 40,
            },
        }
        by_loop["offline"] = {"updates": 12, "iteration_updates": 4, "batch_size": 8, "data": self.steps[method.key not in DISCRETE]}
        by_loop["policy-gradient"] = {"total_episodes": 12, "batch_episodes": 4, "step_size": 0.1}
        by_loop["greedy-random"] = {"horizon": 3, "episodes": 6, "lookahead": 2}
        by_loop["streaming"] = {"total_steps": 72, "iteration_steps": 24, "normalize_observations": False, "normalize_rewards": False}
        by_loop["tabular"] = {"episodes": 12, "batch_episodes": 3, "horizon": 6, "env_options": ["finite=true"]}
        of_method: dict[str, dict[str, Any]] = {
            "a2c": {"minibatch_size": 0, "epochs": 1},
            "dqn": {"target_every": 2},
            "hnpg": {"data": self.steps[False], "rounds": 2, "round_steps": 3, "batch_size": 8},
            "hy-q": {"data": self.steps[False], "target_every": 2},
            "sqirl": {"regression_steps": 4, "batch_size": 4},
            "stream-q": {"epsilon_steps": 60},
            "ucb-vi": {"bonus_scale": 1e-3},  # so that the bonus is not above all that is possible
        }
        found = common | by_loop[method.loop] | of_method.get(method.key, {})
        known = {option.name for option in options_of(method.config)}
        for name in ("num_envs", "hidden", "learning_rate"):
            if name not in known:
                del found[name]
        if "reward_range" in known:
            found["reward_range"] = [-3.0, 0.0]
        return found | changes

    def options(self, method: Method | str, **changes: Any) -> dict[str, Any]:
        """Options of a small run of a method, or of any simple one on the loop of this name: a step takes milliseconds."""
        if not isinstance(method, str) and method.family != "language":
            return self.control_options(method, **changes)
        loop, needs = (method, frozenset()) if isinstance(method, str) else (method.loop, method.needs)
        common: dict[str, Any] = {"model": self.model, "device": "cpu", "threads": 1, "steps": 3, "batch_size": 4, "checkpoint_every": 0}
        training = {"learning_rate": 1e-2}
        by_loop: dict[str, dict[str, Any]] = {
            "supervised": {"data": self.data["prompt-completion"], **training},
            "pairs": {"data": self.data["preference-margin"], **training},
            "unpaired": {"data": self.data["unpaired"], **training},
            "ranked": {"data": self.data["ranked"], **training},
            "values": {
                "data": self.data["unpaired"],
                **({"critic_learning_rate": 1e-2} if "critic" in needs else {}),
                **({"process_reward": f"value:{self.value_model}", "step_separators": STEP_ENDS} if "step-advantages" in needs else {}),
                **training,
            },
            "iterative": {
                "data": self.data["prompt-only"],
                "reward": [self.reward],
                "samples_per_prompt": 3,
                "minibatch_size": 2,
                "max_completion_length": 6,
                **training,
            },
            "reward-model": {"data": self.data["preference-margin"], **training},
            "rollouts": {
                "data": self.data["prompt-only"],
                "reward": self.reward_model,
                "samples_per_prompt": 2,
                "minibatch_size": 4,
                "max_completion_length": 6,
                **({"critic_learning_rate": 1e-2} if isinstance(method, str) or "critic" in needs else {}),
                **({"teacher": self.other_model} if "teacher" in needs else {}),
                **({"guide": self.other_model} if "guide" in needs else {}),
                **({"data": self.data["prompt-completion"]} if "answers" in needs else {}),
                **training,
            },
            "process": {"data": self.data["stepwise"], **training},
            "steps": {
                "data": self.data["prompt-only"],
                "reward": self.reward_model,
                "n": 2,
                "completions": 4,
                "step_separators": STEP_ENDS,
                "max_completion_length": 6,
            },
            "search": {
                "data": self.data["prompt-only"],
                "process_reward": self.reward_model,
                "beams": 2,
                "expansions": 3,
                "step_separators": STEP_ENDS,
                "max_completion_length": 6,
            },
            "sampling": {"data": self.data["prompt-only"], "reward": self.reward_model, "n": 3, "max_completion_length": 6},
        }
        if not isinstance(method, str) and method.key == "rso":  # enough candidates that some of those accepted differ
            by_loop["iterative"] |= {"samples_per_prompt": 8, "accepted": 4}
        if not isinstance(method, str) and method.key in ("expert-iteration", "star"):  # so that a random model has right answers
            by_loop["iterative"] |= {"threshold": -1.0, "examples_per_prompt": 1}
        if not isinstance(method, str) and method.key == "grpo-lambda":  # so that about half of a random model's answers are right
            by_loop["rollouts"]["correct_above"] = 0.0
        if not isinstance(method, str) and method.key == "salsa":
            by_loop["rollouts"]["reference"] = f"soup:{self.model},{self.other_model}"
        if not isinstance(method, str) and method.key == "pf-ppo":
            by_loop["rollouts"] |= {"samples_per_prompt": 3, "minibatch_size": 3}
        if "objectives" in needs:
            by_loop["iterative"]["reward"] = [self.reward, self.brevity]
        scored = {"reward": self.reward} if "advantages" in needs or (loop == "supervised" and "scores" in needs) else {}
        return common | by_loop[loop] | scored | changes


def config_of(key: str, options: Mapping[str, Any]) -> Any:
    return configs.from_mapping(discovery.load(key).config, options)


def program_of(key: str, options: Mapping[str, Any], out: Path) -> Any:
    """The program that `train` would drive, with its seeds set, not yet run."""
    config = config_of(key, dict(options) | {"out": str(out)})
    run = Run.create(discovery.load(key).key, config)
    prepare(config)
    return build(discovery.load(key), config, run)


def another(name: str, kind: Any, default: Any) -> Any:
    """A value of an option that is not its default, made up from the type."""
    if typing.get_origin(kind) is Literal:
        return next(value for value in typing.get_args(kind) if value != default)
    if isinstance(default, bool):
        return not default
    if isinstance(default, int):
        return default + 1
    if isinstance(default, float):
        return default * 0.5 if default else 0.3
    raise AssertionError(f"give {name} another value in VALUES")


def snapshot(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors whose bits differ."""
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def written_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of all safetensors files below a folder, by file and name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.relative_to(folder)}:{name}": tensor for name, tensor in load_file(path).items()}
    return found


def numbers(run: Run) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without wall-clock times, which are no result."""
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in run.metrics()]


def outcome(run: Run) -> dict[str, Any]:
    """All that a run is for, in a form that can be compared bit for bit: numbers, weights, samples."""
    samples = next(
        (run.path / name for name in ("samples.jsonl", "stepwise.jsonl") if (run.path / name).exists()), run.path / "samples.jsonl"
    )
    weights = {name: tensor for name, tensor in written_weights(run.path).items() if not name.startswith("checkpoints")}
    return {
        "metrics": numbers(run),
        "weights": {name: tensor.tolist() for name, tensor in weights.items()},
        "samples": samples.read_text(encoding="utf-8") if samples.exists() else "",
    }


def last_state(run: Run) -> Any:
    """The program's state and the random states in the run's last checkpoint, flattened to comparable values."""
    from telos.core import checkpoint

    step, state, faults = checkpoint.load(run.checkpoints)
    assert not faults
    return step, plain(state)


def plain(tree: Any) -> Any:
    """Nested state with tensors and arrays as (dtype, shape, values), so that `==` compares bits (NaN aside)."""
    if isinstance(tree, Tensor):
        return (str(tree.dtype), tuple(tree.shape), tree.tolist())
    if hasattr(tree, "tolist"):
        return (str(tree.dtype), tuple(tree.shape), tree.tolist())
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(plain(value) for value in tree)
    return copy.copy(tree)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
