"""Process Advantage Verifiers: a step is worth the progress it makes, the change of the chance that a prover will succeed.

    A^μ(s_t, a_t) = Q^μ(s_t, a_t) − Q^μ(s_{t−1}, a_{t−1}),   Q^μ = P(μ succeeds | prompt and steps so far)              (Setlur et al. 2024, section 3)
    μ = best of K of π:   Q^μ = 1 − (1 − Q^π)^K

The prover μ completes the policy's prefixes; it should be unlike the policy, yet not so strong that it succeeds from anywhere nor so weak that it never
does: in both cases advantages vanish. Best-of-K of the policy itself (`--prover_best_of`) moves between these. The labels are Q^μ; `process-reward` fits them
and `value:FOLDER` reads their differences as rewards, to be added to the policy's own outcome reward in training, or to its values in search.

Departures: the paper completes from sampled steps of several policies' answers; here all steps of the policy's own answers are labelled, and Q^μ of best-of-K
is the estimate without bias from the same completions (`functional.process.success_of_best`), not a function of the success rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from telos.algorithms.language._loop_steps import ProverConfig
from telos.algorithms.language.step_labels import Successes
from telos.core.method import Method


@dataclass(frozen=True, kw_only=True)
class Config(ProverConfig):
    """Options of process advantage verifiers' labels."""

    prover_best_of: int = 4  # K: success is that of the best of K completions, 1 … completions (paper: 4)


def estimate(config: Config, successes: Successes) -> Tensor:
    """Q^μ of the prompt and after each step, [S + 1]."""
    return successes.values(config.prover_best_of)


METHOD = Method(
    key="pav",
    title="Process Advantage Verifiers",
    family="language",
    loop="steps",
    changes="labels steps by a prover's chance of success, whose differences are the progress that steps make",
    paper="Setlur et al. 2024, Rewarding Progress: Scaling Automated Process Verifiers for LLM Reasoning, arXiv:2410.08146",
    config=Config,
    estimate=estimate,
    needs=frozenset({"reward"}),
    system=152,
    aliases=("process-advantage-verifier", "rewarding-progress"),
)
