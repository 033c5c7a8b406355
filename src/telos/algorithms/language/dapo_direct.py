"""Direct Advantage Policy Optimization: the log-ratio of each reasoning step is fitted to the step's advantage, which a critic of its own training knows.

    A(s, a) = V(s, a) − V(s),   V the chance that π_ref succeeds from here on; after the last step the outcome, 1 or 0, stands for V
    L = ½ E[(log π(a|s) / π_ref(a|s) − A(s, a) / β)²]                           (Liu et al. 2024: policy stage, over steps a of the data)

s is the prompt with the steps so far, a the next step, whose log-probability is the sum of its tokens'. Where the data cover all steps, L is 0 at
π = π_ref exp(A/β) if that is a distribution; else the optimum shares the normaliser out: under answers that π_ref wrote, log π/π_ref + λ_s π/π_ref = A/β with
the λ_s that makes π sum to 1. E_{π_ref}[A] = 0, so log of the normaliser is of second order in A/β and is left out. At π_ref the gradient of L is that of
the policy gradient, −E[A ∇ log π] / β: pairs are not needed, and an answer that ends wrong still teaches its right steps.

Critic and policy are trained one after the other and so cannot chase each other: `telos train math-shepherd --labels soft` (completions from each step),
`telos train process-reward` (the paper's binary cross-entropy on their success rates), then this with `--process_reward value:FOLDER`.

Departures: the paper samples several next steps at each state for the policy stage; here the states and steps are those of the given answers. Steps are
cut by separators and by the mark of the answer. The scale β of advantages is to be chosen for the task.

Metrics: `rewards/chosen` and `rewards/rejected` are β log π/π_ref of steps with advantages above 0 and of the others; `rewards/accuracies` the share of steps
whose log-ratio has the sign of the advantage.
"""

from __future__ import annotations

from dataclasses import dataclass

from telos.algorithms.language._loop_values import AdvantagesConfig, ValuedLogps
from telos.core.config import require
from telos.core.method import Method
from telos.functional.process import progress
from telos.functional.reduction import Losses


@dataclass(frozen=True, kw_only=True)
class Config(AdvantagesConfig):
    """Options of Direct Advantage Policy Optimization."""

    beta: float = 0.1  # strength of the divergence from the reference, > 0: an advantage of β asks for one nat

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "> 0", "beta")


def loss(config: Config, view: ValuedLogps) -> Losses:
    assert view.ends is not None
    assert view.advantages is not None
    steps, advantages = view.ends, view.advantages
    ratio = progress(view.ratio.cumsum(1), steps)  # the sum over each step's tokens, at its last one
    good, rewards = advantages > 0, config.beta * ratio
    metrics = {
        "rewards/chosen": (rewards, steps & good),
        "rewards/rejected": (rewards, steps & ~good),
        "rewards/accuracies": (((ratio > 0) == good).float(), steps),
        "advantages/size": (advantages.abs(), steps),
    }
    return Losses(0.5 * (ratio - advantages / config.beta) ** 2, steps, metrics)


METHOD = Method(
    key="dapo-direct",
    title="DAPO (direct advantage)",
    family="language",
    loop="values",
    changes="regresses each step's log-ratio on its advantage under a critic that was trained apart",
    paper="Liu et al. 2024, Improving Multi-Step Reasoning Abilities of Large Language Models with Direct Advantage Policy Optimization, arXiv:2412.18279",
    config=Config,
    loss=loss,
    needs=frozenset({"reference", "steps", "step-advantages"}),
    system=19,
    aliases=("direct-advantage-policy-optimization", "direct-advantage"),
)
