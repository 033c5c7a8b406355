"""The bandit testbed: a contextual softmax policy over a finite set of responses, where every alignment method's optimum is known exactly.

A context stands for a prompt and a response for a whole answer of one token. Preferences come from a gold reward through Bradley-Terry, or
from a general matrix that no reward expresses. `telos.functional.equilibria` gives the optima and equilibria; `fit` minimises any loss over
the tabular policy, with the expectation over pairs taken exactly (`exact_pairs`) or by sampling (`sample_pairs`). Everything is float64 on
the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from telos.core.errors import Failure, UsageError
from telos.core.seeds import numpy_generator, torch_generator
from telos.functional.pairwise import AnswerLogps, PairLogps

Coverage = Literal["full", "partial"]
Preference = Literal["bradley-terry", "intransitive"]


class BanditPairs(NamedTuple):
    """Labelled pairs: `chosen` was preferred to `rejected` in `context` (all int64 [N]). `weight` float64 [N] sums to one."""

    context: Tensor
    chosen: Tensor
    rejected: Tensor
    weight: Tensor


class BanditLogps(NamedTuple):
    """What a pairwise loss takes, each float64 [N]; only the policy's two carry gradient."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor


@dataclass(frozen=True, eq=False)
class Bandit:
    """C equally likely contexts with A responses each. Raises `ValueError` for wrong shapes and `UsageError` for wrong values."""

    reference: Tensor  # [C, A] probabilities of the reference policy
    behaviour: Tensor  # [C, A] probabilities of the policy from which offline pairs are drawn; where it is 0, the data say nothing
    preference: Tensor  # [C, A, A]: P[c, a, b] is the probability that a is preferred to b; P + Pᵀ = 1
    reward: Tensor | None = None  # [C, A] gold reward; None where only the preference is defined

    def __post_init__(self) -> None:
        shape = self.reference.shape
        if len(shape) != 2 or self.behaviour.shape != shape or self.preference.shape != (*shape, shape[-1]):
            raise ValueError(
                "expected reference and behaviour [C, A] and preference [C, A, A]; got "
                f"{tuple(shape)}, {tuple(self.behaviour.shape)} and {tuple(self.preference.shape)}"
            )
        if self.reward is not None and self.reward.shape != shape:
            raise ValueError(f"expected a reward {tuple(shape)}; got {tuple(self.reward.shape)}")
        for name in ("reference", "behaviour", "preference", "reward"):
            values = getattr(self, name)
            if values is not None and (values.dtype != torch.float64 or not bool(values.isfinite().all())):
                raise UsageError(f"the bandit's {name} must be finite float64 numbers")
        for name in ("reference", "behaviour"):
            _check_policy(getattr(self, name), shape, name)
        p = self.preference
        if bool((p < 0).any()) or not torch.allclose(p + p.transpose(1, 2), torch.ones_like(p), rtol=0, atol=1e-9):
            raise UsageError("preference[c, a, b] is the probability that a is preferred to b: P[c, a, b] + P[c, b, a] must be 1")

    @classmethod
    def from_reward(cls, reward: Tensor, reference: Tensor, behaviour: Tensor | None = None) -> Bandit:
        """Bradley-Terry preferences P(a ≻ b) = σ(r(a) − r(b)). `behaviour` is the reference policy unless given."""
        preference = torch.sigmoid(reward[..., :, None] - reward[..., None, :])
        return cls(reference, reference if behaviour is None else behaviour, preference, reward)

    @property
    def contexts(self) -> int:
        return self.reference.shape[0]

    @property
    def responses(self) -> int:
        return self.reference.shape[1]

    @property
    def covered(self) -> Tensor:
        """Bool [C, A]: the responses that the behaviour policy can draw."""
        return self.behaviour > 0

    def exact_pairs(self, policy: Tensor | None = None) -> BanditPairs:
        """Every ordered pair (chosen a, rejected b) with its probability 2 μ(a) μ(b) P[a, b] / C, where μ is `policy` [C, A].

        That is the law of a labelled pair whose two responses are drawn independently from μ (default: the behaviour policy), so a sum with
        these weights is an expectation without sampling noise. Pairs of equal responses are among them: they carry no preference, and a
        loss of margins has no gradient on them. Pairs of probability zero are left out.
        """
        mu = self.behaviour if policy is None else policy.detach()
        _check_policy(mu, self.reference.shape, "policy")
        # The factor 2: (a, b) is drawn in either order. A pair of equal responses comes in one order only, but under either label of ½.
        table = 2 * mu[:, :, None] * mu[:, None, :] * self.preference / self.contexts
        context, chosen, rejected = (table > 0).nonzero(as_tuple=True)
        weight = table[context, chosen, rejected]
        return BanditPairs(context, chosen, rejected, weight / weight.sum())

    def sample_pairs(self, n: int, seed: int, policy: Tensor | None = None) -> BanditPairs:
        """`n` independent labelled pairs of weight 1/n each, drawn from the law that `exact_pairs` states. Equal seeds give equal pairs."""
        if n < 1:
            raise UsageError(f"{n} pairs were asked for; ask for at least 1")
        law = self.exact_pairs(policy)
        drawn = torch.multinomial(law.weight, n, replacement=True, generator=torch_generator(seed, "bandit", "pairs"))
        weight = torch.full((n,), 1 / n, dtype=torch.float64)
        return BanditPairs(law.context[drawn], law.chosen[drawn], law.rejected[drawn], weight)

    def pair_logps(self, log_probs: Tensor, pairs: BanditPairs) -> BanditLogps:
        """Log-probabilities of the pairs' responses under a policy's `log_probs` [C, A] and under the reference; each [N]."""
        if log_probs.shape != self.reference.shape:
            raise ValueError(f"expected log-probabilities {tuple(self.reference.shape)}; got {tuple(log_probs.shape)}")
        ref = self.reference.log()
        chosen, rejected = (pairs.context, pairs.chosen), (pairs.context, pairs.rejected)
        return BanditLogps(log_probs[chosen], log_probs[rejected], ref[chosen], ref[rejected])

    def pair_batch(self, log_probs: Tensor, pairs: BanditPairs) -> PairLogps:
        """`pair_logps` in the form that language methods take: answers of one token. `margin` is the gap in gold reward, or 0."""
        logps = self.pair_logps(log_probs, pairs)
        chosen, rejected, ref_chosen, ref_rejected = (AnswerLogps(x[:, None], torch.ones_like(x[:, None], dtype=torch.bool)) for x in logps)
        margin = torch.zeros_like(logps.ref_chosen)
        if self.reward is not None:
            margin = self.reward[pairs.context, pairs.chosen] - self.reward[pairs.context, pairs.rejected]
        return PairLogps(chosen, rejected, ref_chosen, ref_rejected, margin)


def random_bandit(
    contexts: int,
    responses: int,
    seed: int,
    coverage: Coverage = "full",
    preference: Preference = "bradley-terry",
) -> Bandit:
    """A bandit with a full-support random reference (softmax of standard normals).

    `coverage` "full": the behaviour policy is the reference. "partial": it is the reference limited to half of the responses (rounded up,
    at least two), chosen at random in each context, so that the reference can say what the data never show.
    `preference` "bradley-terry": standard normal gold rewards. "intransitive": σ of normal skew-symmetric scores, drawn until no response
    is preferred to all others, so that no reward and no single response is an answer; needs at least three responses.
    """
    least = 3 if preference == "intransitive" else 2
    if contexts < 1 or responses < least:
        raise UsageError(f"a {preference} bandit needs at least 1 context and {least} responses; got {contexts} and {responses}")
    if coverage not in ("full", "partial") or preference not in ("bradley-terry", "intransitive"):
        raise UsageError(
            f"unknown coverage {coverage!r} or preference {preference!r}; known: full, partial and bradley-terry, intransitive"
        )
    shape = (contexts, responses)
    # One stream for each part: the reward does not change with the coverage.
    reference = torch.softmax(torch.from_numpy(numpy_generator(seed, "bandit", "reference").normal(size=shape)), -1)
    behaviour = reference
    if coverage == "partial":
        ranks = numpy_generator(seed, "bandit", "coverage").random(shape).argsort(-1).argsort(-1)
        behaviour = reference * torch.from_numpy(ranks < max(2, (responses + 1) // 2))
        behaviour = behaviour / behaviour.sum(-1, keepdim=True)
    if preference == "bradley-terry":
        return Bandit.from_reward(torch.from_numpy(numpy_generator(seed, "bandit", "reward").normal(size=shape)), reference, behaviour)
    generator = numpy_generator(seed, "bandit", "preference")
    scores = [_intransitive_scores(responses, generator) for _ in range(contexts)]
    return Bandit(reference, behaviour, torch.sigmoid(torch.from_numpy(np.stack(scores))))


def _intransitive_scores(responses: int, generator: np.random.Generator) -> Any:
    """Skew-symmetric [A, A] with no row that is positive off the diagonal. Three responses pass one time in four, more of them oftener."""
    while True:
        upper = np.triu(generator.normal(size=(responses, responses)), 1)
        scores = upper - upper.T
        if not ((scores > 0).sum(1) == responses - 1).any():
            return scores


def rock_paper_scissors(
    contexts: int = 1,
    advantages: Sequence[float] = (0.3, 0.3, 0.3),
    reference: Sequence[float] = (0.5, 0.3, 0.2),
) -> Bandit:
    """Rock, paper, scissors (in this order), the same in every context. `advantages` (a, b, c), each in (0, ½]: paper beats rock with
    probability ½ + a, rock scissors with ½ + b, scissors paper with ½ + c. The only Nash equilibrium is proportional to (c, b, a).
    """
    if contexts < 1 or len(advantages) != 3 or not all(0 < x <= 0.5 for x in advantages):
        raise UsageError(f"rock-paper-scissors needs a context and three advantages in (0, 0.5]; got {contexts} and {tuple(advantages)}")
    a, b, c = advantages
    half = torch.full((3, 3), 0.5, dtype=torch.float64)
    game = half + torch.tensor([[0, -a, b], [a, 0, -c], [-b, c, 0]], dtype=torch.float64)
    policy = torch.tensor(list(reference), dtype=torch.float64).expand(contexts, -1)
    return Bandit(policy, policy, game.expand(contexts, -1, -1))


def total_variation(p: Any, q: Any) -> Tensor:
    """½ Σ |p − q| of probabilities [..., A] (tensors or arrays), in [0, 1]; float64 [...]."""
    left, right = torch.as_tensor(p, dtype=torch.float64), torch.as_tensor(q, dtype=torch.float64)
    if left.shape != right.shape:
        raise ValueError(f"shapes differ: {tuple(left.shape)} and {tuple(right.shape)}")
    return (left - right).abs().sum(-1) / 2


class TabularPolicy(nn.Module):
    """A softmax policy with one logit per context and response, started at `start` [C, A] (probabilities, usually the reference).

    A response to which `start` gives 0 keeps probability 0.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        _check_policy(start, start.shape, "start")
        self.logits = nn.Parameter(torch.where(start > 0, start, 1.0).log().double())
        self.support: Tensor
        self.register_buffer("support", start > 0)

    def log_probs(self) -> Tensor:
        """Normalised log-probabilities [C, A]; −inf outside the support."""
        return torch.log_softmax(self.logits.masked_fill(~self.support, -torch.inf), -1)

    @torch.no_grad()
    def probs(self) -> Tensor:
        """Probabilities [C, A], without gradient."""
        return self.log_probs().exp()


class Fit(NamedTuple):
    """How a fit ended: the last loss and the largest absolute entry of its gradient, which is near 0 at an optimum."""

    loss: float
    gradient: float


def fit(
    policy: TabularPolicy,
    loss_fn: Callable[[Tensor], Tensor],
    steps: int,
    learning_rate: float = 1.0,
    optimiser: Literal["lbfgs", "adam"] = "lbfgs",
) -> Fit:
    """Minimises `loss_fn(log_probs [C, A]) -> scalar` over the policy's logits, in place.

    "lbfgs" (line search; learning rate 1) is for losses that return the same number for the same policy, such as those on `exact_pairs`; it
    ends early at a gradient of 1e-12. "adam" (learning rate about 0.05) is for losses that draw new samples at each call. Raises `Failure`
    at the first loss that is not finite, with the policy left where it happened.
    """
    if steps < 1 or not learning_rate > 0:
        raise UsageError(f"steps and learning_rate must be positive; got {steps} and {learning_rate}")
    if optimiser not in ("lbfgs", "adam"):
        raise UsageError(f"unknown optimiser {optimiser!r}; known: lbfgs, adam")
    parameters = [policy.logits]

    def evaluate() -> Tensor:
        policy.logits.grad = None
        loss = loss_fn(policy.log_probs())
        if loss.ndim != 0:
            raise ValueError(f"loss_fn must return a scalar; got shape {tuple(loss.shape)}")
        if not bool(torch.isfinite(loss)):
            raise Failure(f"the loss became {loss.item()}: the policy is outside the loss's domain, or the loss has no minimum")
        loss.backward()
        return loss

    if optimiser == "lbfgs":
        search = torch.optim.LBFGS(
            parameters,
            lr=learning_rate,
            max_iter=steps,
            max_eval=20 * steps,
            history_size=20,
            tolerance_grad=1e-12,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        search.step(evaluate)  # type: ignore[arg-type]
    else:
        adam = torch.optim.Adam(parameters, lr=learning_rate)
        for _ in range(steps):
            evaluate()
            adam.step()
    loss = evaluate()
    gradient = policy.logits.grad
    return Fit(loss.item(), 0.0 if gradient is None else gradient.abs().max().item())


def _check_policy(policy: Tensor, shape: torch.Size, name: str) -> None:
    if policy.shape != shape or policy.ndim != 2:
        raise ValueError(f"{name} must be [C, A] like the bandit, {tuple(shape)}; got {tuple(policy.shape)}")
    if bool((policy < 0).any()) or not torch.allclose(policy.sum(-1), torch.ones((), dtype=policy.dtype), rtol=0, atol=1e-6):
        raise UsageError(f"{name} must hold probabilities that sum to 1 in each context (probabilities, not logarithms)")
