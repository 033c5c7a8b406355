"""Policy gradients on sampled answers: advantages by hand, equivalences between methods, and convergence to exact optima on bandits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from telos.algorithms.language import (
    _policy_gradient,
    clip_cov,
    dapo,
    dr_grpo,
    f_dpg,
    grpo,
    grpo_lambda,
    p3o,
    pf_ppo,
    reinforce,
    reinforce_plus_plus,
    remax,
    rloo,
    rto,
)
from telos.core.errors import UsageError
from telos.environments.bandit import Bandit, TabularPolicy, random_bandit, total_variation
from telos.functional.advantages import group_deviation, group_mean, group_relative, leave_one_out, to_go
from telos.functional.equilibria import kl_optimum
from telos.functional.policy import Estimates, PolicyView, Scored
from telos.functional.reduction import Denominators, total

GROUP = torch.tensor([7, 7, 7, 2, 2, 5, 2])
VALID = torch.tensor([True, True, True, True, False, True, True])
SCORES = torch.tensor([1.0, 0.0, 4.0, 2.0, 9.0, 3.0, -1.0])


def scored_of(scores: Tensor, group: Tensor, lengths: list[int] | None = None, seed: int = 0, **parts: Any) -> Scored:
    """Answers of random tokens with given scores; those of length 0 have no valid reward."""
    n = len(scores)
    lengths = lengths or [3] * n
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]
    old, reference = (-torch.rand(mask.shape, generator=generator) * 3 for _ in range(2))
    return Scored(mask, old, reference, None, scores, mask.any(1), group, **parts)


def view_of(scored: Scored, estimates: Estimates, logprobs: Tensor) -> PolicyView:
    entropy = torch.ones_like(logprobs)
    return PolicyView(
        logprobs, entropy, scored.logprobs, scored.reference, estimates.advantages, scored.mask, scored.group, estimates.extra
    )


def gradient(method: Any, config: Any, scored: Scored, shift: float = 0.0) -> Tensor:
    """d loss / d log-probabilities [N, T], at log-probabilities that have moved by `shift` since sampling."""
    logprobs = (scored.logprobs + shift * torch.linspace(-1, 1, scored.mask.numel()).view_as(scored.logprobs)).requires_grad_()
    losses = method.loss(config, view_of(scored, method.estimate(config, scored, {}), logprobs))
    total(losses, Denominators(int(scored.valid.sum()), int(scored.mask.sum()))).backward()
    assert logprobs.grad is not None
    return logprobs.grad


# Advantages ------------------------------------------------------------------------------------------------------------------------------------


def test_group_statistics_are_those_of_the_valid_answers_of_each_group() -> None:
    mean, deviation = group_mean(SCORES, GROUP, VALID), group_deviation(SCORES, GROUP, VALID)
    for i, group in enumerate(GROUP.tolist()):
        own = [float(s) for s, g, v in zip(SCORES, GROUP.tolist(), VALID.tolist(), strict=True) if g == group and v]
        assert float(mean[i]) == pytest.approx(np.mean(own))
        assert float(deviation[i]) == pytest.approx(np.std(own, ddof=1) if len(own) > 1 else 0.0)


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    found = leave_one_out(SCORES, GROUP, VALID)
    wanted = [1.0 - 2.0, 0.0 - 2.5, 4.0 - 0.5, 2.0 + 1.0, 0.0, 0.0, -1.0 - 2.0]  # row 4 is not valid, row 5 stands alone
    torch.testing.assert_close(found, torch.tensor(wanted))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_relative_advantages_by_hand(scale: Any) -> None:
    found = group_relative(SCORES, GROUP, VALID, scale, epsilon=0.0)
    first, second = np.array([1.0, 0.0, 4.0]), np.array([2.0, -1.0])
    everyone = np.concatenate([first, second, [3.0]])
    by = {"group": (first.std(ddof=1), second.std(ddof=1)), "batch": (everyone.std(ddof=1),) * 2, "none": (1.0, 1.0)}[scale]
    wanted = np.zeros(7)
    wanted[[0, 1, 2]] = (first - first.mean()) / by[0]
    wanted[[3, 6]] = (second - second.mean()) / by[1]
    np.testing.assert_allclose(found.numpy(), wanted, atol=1e-6)


def test_a_group_of_equal_scores_has_no_advantage() -> None:
    found = group_relative(torch.full((4,), 0.3), torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool))
    assert found.abs().max() < 1e-6


def test_what_is_still_to_come_is_the_sum_of_rewards_from_there_on() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert to_go(rewards, mask).tolist() == [[7.0, 6.0, 4.0, 0.0]]


def test_process_rewards_are_normalised_over_all_steps_of_a_group_and_summed_from_each_token_on() -> None:
    steps = torch.tensor([[True, False, True], [False, True, False]])
    dense = torch.tensor([[1.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    scored = scored_of(torch.zeros(2), torch.zeros(2, dtype=torch.long), dense=dense, steps=steps)
    config = grpo.Config(kl_coef=0.0, samples_per_prompt=2)
    found = grpo.METHOD.estimate(config, scored, {}).advantages  # type: ignore[misc]
    deviation = np.std([1.0, 3.0, 5.0], ddof=1) + 1e-4
    a, b, c = ((x - 3.0) / deviation for x in (1.0, 3.0, 5.0))
    torch.testing.assert_close(found, torch.tensor([[a + b, b, b], [c, c, 0.0]], dtype=torch.float32))


# The surrogate -----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", ["token", "answer", "constant"])
def test_tokens_are_averaged_as_asked(mean: Any) -> None:
    config = grpo.Config(loss_mean=mean, max_completion_length=10)
    values, mask = torch.randn(4, 5), torch.arange(5)[None, :] < torch.tensor([5, 1, 3, 0])[:, None]
    losses = _policy_gradient.reduced(config, values, mask)
    found = float(total(losses, Denominators(3, 9)))
    rows = [values[i, :n].tolist() for i, n in enumerate([5, 1, 3])]
    wanted = {
        "token": sum(map(sum, rows)) / 9,
        "answer": sum(sum(row) / len(row) for row in rows) / 3,
        "constant": sum(map(sum, rows)) / 10 / 3,
    }[mean]
    assert found == pytest.approx(wanted, rel=1e-5)


def test_the_upper_clip_can_be_higher_than_the_lower_one() -> None:
    config = dapo.Config(clip_range=0.2, clip_range_high=0.5)
    ratio = torch.tensor([[0.7, 0.9, 1.3, 1.6]])
    for advantage, alive in ((1.0, [True, True, True, False]), (-1.0, [False, True, True, True])):
        logprobs = ratio.log().requires_grad_()
        zeros = torch.zeros_like(ratio)
        view = PolicyView(logprobs, zeros, zeros, None, torch.full_like(ratio, advantage), torch.ones_like(ratio, dtype=torch.bool))
        _policy_gradient.loss(config, view).values.sum().backward()
        assert logprobs.grad is not None
        assert (logprobs.grad != 0).tolist() == [alive]


def test_the_sequence_ratio_is_the_geometric_mean_and_every_token_keeps_its_own_gradient() -> None:
    config = grpo.Config(ratio="sequence", kl_coef=0.0)
    old = torch.zeros(2, 3)
    new = torch.tensor([[0.1, -0.3, 0.5], [0.2, 0.4, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    view = PolicyView(new, old, old, None, torch.tensor([[1.0] * 3, [-2.0] * 3]), mask)
    found = _policy_gradient.log_ratios(config, view)
    torch.testing.assert_close(found[mask], torch.tensor([0.1, 0.1, 0.1, 0.3, 0.3]))
    _policy_gradient.loss(config, view).values.sum().backward()
    assert new.grad is not None
    # answer mean of −ρ A, with dρ/d(log π_t) = ρ
    torch.testing.assert_close(new.grad[0], torch.full((3,), -math.exp(0.1) / 3))
    torch.testing.assert_close(new.grad[1], torch.tensor([1.0, 1.0, 0.0]) * 2 * math.exp(0.3) / 2)


# Equivalences -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_on_fresh_answers_p3o_is_rloo(clip: Any) -> None:
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    scored = scored_of(torch.tensor([1.0, -0.5, 2.0, 0.3, 0.1, 4.0]), group, [3, 2, 3, 1, 3, 2])
    ours = gradient(p3o, p3o.Config(samples_per_prompt=3, clip=clip, kl_coef=0.2), scored)
    theirs = gradient(rloo, rloo.Config(samples_per_prompt=3, kl_coef=0.2, loss_mean="constant", max_completion_length=1), scored)
    torch.testing.assert_close(ours, theirs)
    assert ours.abs().max() > 0.1


@pytest.mark.parametrize("clip", ["separate", "joint"])
def test_p3o_is_the_same_bit_for_bit_when_a_prompts_rewards_are_shifted(clip: Any) -> None:
    group = torch.tensor([0, 0, 1, 1])
    scores = torch.tensor([1.0, -0.5, 2.25, 0.75])
    config = p3o.Config(clip=clip)
    plain = gradient(p3o, config, scored_of(scores, group), shift=0.3)
    moved = gradient(p3o, config, scored_of(scores + torch.tensor([64.0, 64.0, -8.0, -8.0]), group), shift=0.3)
    assert torch.equal(plain, moved)
    assert plain.abs().max() > 0
    ppo_like = gradient(reinforce, reinforce.Config(baseline="none"), scored_of(scores + 64.0, group), shift=0.3)
    assert not torch.equal(ppo_like, gradient(reinforce, reinforce.Config(baseline="none"), scored_of(scores, group), shift=0.3))


def test_p3o_gives_no_gradient_beyond_its_bounds() -> None:
    scored = scored_of(torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long), [1, 1])
    estimates = p3o.estimate(p3o.Config(kl_coef=0.0), scored, {})
    for clip, moves, alive in (
        ("joint", (0.15, -0.15), (False, False)),  # their ratio has left the range by e^0.3
        ("joint", (-0.15, 0.15), (True, True)),  # the other way, to which the rewards do not push
        ("separate", (0.3, -0.1), (False, True)),
    ):
        logprobs = (scored.logprobs + torch.tensor([[moves[0]], [moves[1]]])).requires_grad_()
        p3o.loss(p3o.Config(clip=clip), view_of(scored, estimates, logprobs)).values.sum().backward()  # type: ignore[arg-type]
        assert logprobs.grad is not None
        assert tuple((logprobs.grad[:, 0] != 0).tolist()) == alive


def test_dr_grpo_is_rloo_times_the_share_of_the_others() -> None:
    scored = scored_of(torch.tensor([1.0, -0.5, 2.0, 0.0]), torch.zeros(4, dtype=torch.long), [3, 2, 3, 1])
    options: dict[str, Any] = {"samples_per_prompt": 4, "kl_coef": 0.0, "loss_mean": "constant"}
    ours, theirs = gradient(dr_grpo, dr_grpo.Config(**options), scored), gradient(rloo, rloo.Config(**options), scored)
    torch.testing.assert_close(ours, theirs * 3 / 4)


def test_f_dpg_in_reverse_kl_is_rloo_on_the_regularised_reward() -> None:
    scored = scored_of(torch.tensor([0.1, -0.2, 0.3, 0.0, 0.2, 0.4]), torch.tensor([0, 0, 0, 1, 1, 1]), [3, 2, 3, 1, 3, 2])
    config = f_dpg.Config(samples_per_prompt=3, divergence="reverse-kl", beta=0.5, ratio_bound=100.0)
    ours = f_dpg.estimate(config, scored, {}).advantages
    theirs = rloo.estimate(rloo.Config(samples_per_prompt=3, kl_coef=0.5), scored, {}).advantages / 0.5
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_f_dpg_in_forward_kl_is_dpg() -> None:
    scored = scored_of(torch.tensor([0.1, -0.2, 0.3]), torch.zeros(3, dtype=torch.long))
    config = f_dpg.Config(samples_per_prompt=3, divergence="forward-kl", beta=0.5, ratio_bound=100.0)
    assert scored.reference is not None
    weight = (scored.scores / 0.5 - (scored.logprobs - scored.reference).sum(1)).exp()  # P/π
    reward = weight / weight.mean()
    wanted = leave_one_out(reward, scored.group, scored.valid)
    torch.testing.assert_close(f_dpg.estimate(config, scored, {}).advantages[:, 0], wanted, rtol=1e-4, atol=1e-5)


# Exact optima ---------------------------------------------------------------------------------------------------------------------------------------


def descend(method: Any, config: Any, bandit: Bandit, answers: int = 256, steps: int = 250) -> Tensor:
    """Policies [C, A] that a method reaches from sampled answers of one token."""
    assert bandit.reward is not None
    policy = TabularPolicy(bandit.reference)
    optimiser = torch.optim.Adam(policy.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    generator = torch.Generator().manual_seed(3)
    contexts = bandit.reference.shape[0]
    rows = torch.arange(contexts).repeat_interleave(answers)
    state: Any = {}
    for _ in range(steps):
        law = policy.probs().detach()
        drawn = torch.multinomial(law, answers, replacement=True, generator=generator).flatten()
        old, reference = law.log()[rows, drawn][:, None], bandit.reference.log()[rows, drawn][:, None]
        greedy = bandit.reward[torch.arange(contexts), law.argmax(1)][rows]
        scored = Scored(
            torch.ones_like(old, dtype=torch.bool), old, reference, None, bandit.reward[rows, drawn], rows >= 0, rows, greedy=greedy
        )
        estimates = method.estimate(config, scored, state)
        state = estimates.state
        logprobs = policy.log_probs()[rows, drawn][:, None]
        losses = method.loss(config, view_of(scored, estimates, logprobs))
        optimiser.zero_grad()
        total(losses, Denominators(len(rows), len(rows))).backward()
        optimiser.step()
        schedule.step()
    return policy.probs().detach()


@pytest.mark.parametrize(
    ("method", "config"),
    [
        (reinforce, reinforce.Config(kl_coef=0.5)),
        (rloo, rloo.Config(kl_coef=0.5)),
        (remax, remax.Config(kl_coef=0.5)),
        (reinforce_plus_plus, reinforce_plus_plus.Config(kl_coef=0.5)),
        (dr_grpo, dr_grpo.Config(kl_coef=0.5, kl_as="reward")),
        (dr_grpo, dr_grpo.Config(kl_coef=0.5, kl_as="k2")),
        (p3o, p3o.Config(kl_coef=0.5)),
        (f_dpg, f_dpg.Config(beta=0.5, divergence="reverse-kl")),
        (f_dpg, f_dpg.Config(beta=0.5, divergence="forward-kl")),
        (f_dpg, f_dpg.Config(beta=0.5, divergence="jensen-shannon")),
    ],
    ids=["reinforce", "rloo", "remax", "reinforce++", "dr-grpo reward", "dr-grpo k2", "p3o", "f-dpg reverse", "f-dpg forward", "f-dpg js"],
)
def test_sampled_policy_gradients_reach_the_regularised_optimum(method: Any, config: Any) -> None:
    bandit = random_bandit(2, 4, 5)
    answers = 32 if method is p3o else 256
    optimum = torch.as_tensor(kl_optimum(bandit.reward, bandit.reference, 0.5))
    found = descend(method, config, bandit, answers)
    assert float(total_variation(bandit.reference, optimum).max()) > 0.2
    assert float(total_variation(found, optimum).max()) < 0.06


def test_f_dpg_meets_a_moment_and_a_pointwise_constraint() -> None:
    bandit = random_bandit(1, 5, 2)
    assert bandit.reward is not None
    wanted = float(bandit.reward.sort(1).values[0, -2])
    allowed = bandit.reward >= wanted
    target = (bandit.reference * allowed) / (bandit.reference * allowed).sum()
    config = f_dpg.Config(target="constraint", threshold=wanted, divergence="forward-kl")
    assert float(total_variation(descend(f_dpg, config, bandit), target).max()) < 0.08
    mean = float((bandit.reference * bandit.reward).sum()) + 0.3
    found = descend(f_dpg, f_dpg.Config(target="moment", moment=mean, divergence="jensen-shannon"), bandit)
    assert float((found * bandit.reward).sum()) == pytest.approx(mean, abs=0.08)
    tilt = (found / bandit.reference).log()  # affine in the reward: the maximum-entropy way to meet the moment
    slope = np.polyfit(bandit.reward[0].numpy(), tilt[0].numpy(), 1, w=found[0].sqrt().numpy())
    assert np.abs(np.polyval(slope, bandit.reward[0].numpy()) - tilt[0].numpy()).max() < 0.5
    assert slope[0] > 0.1


# What single methods add ----------------------------------------------------------------------------------------------------------------------------


def test_dapo_passes_over_groups_without_a_difference_and_punishes_length_softly() -> None:
    scored = scored_of(torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1]), [10, 8, 9, 4])
    config = dapo.Config(max_completion_length=10, overlong_buffer=4, overlong_penalty=2.0)
    assert dapo.select(config, scored, np.random.default_rng(0)).tolist() == [2, 3]
    assert dapo.overlong(config, scored).tolist() == pytest.approx([-2.0, -1.0, -1.5, 0.0])
    with pytest.raises(UsageError, match="overlong_buffer"):
        dapo.Config(max_completion_length=10, overlong_buffer=10)


def test_grpo_lambda_penalises_length_only_where_most_answers_are_right() -> None:
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    scored = scored_of(scores, group, [2, 4, 6, 8, 3, 5, 5, 5])
    found, penalised = grpo_lambda.rewards(grpo_lambda.Config(penalised_share=0.5, length_penalty=0.4), scored)
    sigmoid = [1 / (1 + math.exp(-z)) for z in (-1.0, 0.0, 1.0)]  # lengths 2, 4, 6: mean 4, deviation 2
    assert found.tolist() == pytest.approx([1 - 0.4 * s for s in sigmoid] + [0.0, 1.0, 0.0, 0.0, 0.0])
    assert penalised.tolist() == [True] * 4 + [False] * 4
    none, _ = grpo_lambda.rewards(grpo_lambda.Config(penalised_share=0.0), scored)
    assert torch.equal(none, scores)


def test_covariances_add_up_to_the_covariance() -> None:
    scored = scored_of(torch.randn(6), torch.tensor([0, 0, 0, 1, 1, 1]), [3, 1, 2, 3, 3, 2])
    advantages = torch.randn(scored.mask.shape)
    found = clip_cov.covariances(scored.logprobs, advantages, scored.mask)
    x, y = scored.logprobs[scored.mask].numpy(), advantages[scored.mask].numpy()
    assert float(found[scored.mask].mean()) == pytest.approx(np.cov(x, y, ddof=0)[0, 1], rel=1e-4)
    assert (found[~scored.mask] == 0).all()


@pytest.mark.parametrize("control", ["clip", "kl"])
def test_tokens_of_high_covariance_are_held_back(control: Any) -> None:
    scored = scored_of(torch.tensor([1.0, 0.0, 0.0, 5.0]), torch.zeros(4, dtype=torch.long), [6] * 4)
    config = clip_cov.Config(control=control, selected_share=0.1, cov_low=0.1, cov_high=50.0, kl_coef=0.0, samples_per_prompt=4)
    estimates = clip_cov.estimate(config, scored, {})
    held = estimates.extra["held"]
    covariance = clip_cov.covariances(scored.logprobs, estimates.advantages, scored.mask)
    assert int(held.sum()) == 2
    if control == "kl":
        assert set(held.flatten().nonzero().flatten().tolist()) == set(covariance.flatten().topk(2).indices.tolist())
    assert float(covariance[held].min()) >= 0.1
    logprobs = (scored.logprobs + 0.01).requires_grad_()
    clip_cov.loss(config, view_of(scored, estimates, logprobs)).values.sum().backward()
    plain = (scored.logprobs + 0.01).requires_grad_()
    grpo.loss(grpo.Config(kl_coef=0.0), view_of(scored, estimates, plain)).values.sum().backward()
    assert logprobs.grad is not None
    assert plain.grad is not None
    assert torch.equal(logprobs.grad[~held], plain.grad[~held])
    if control == "clip":
        assert (logprobs.grad[held] == 0).all()
    else:
        torch.testing.assert_close(
            logprobs.grad[held] - plain.grad[held], torch.full((2,), 1 / 6)
        )  # d|log ratio| over the answer's six tokens


def test_filtration_keeps_the_answers_of_its_strategy() -> None:
    rewards, generator = np.array([0.3, 2.0, -1.0, 0.9, 0.1]), np.random.default_rng(0)
    assert pf_ppo.kept(rewards, 2, "best", generator).tolist() == [1, 3]
    assert pf_ppo.kept(rewards, 2, "best-worst", generator).tolist() == [1, 2]
    assert pf_ppo.kept(rewards, 3, "best-worst", generator).tolist() == [1, 2, 3]
    drawn = {tuple(pf_ppo.kept(rewards, 2, "best-random", generator).tolist()) for _ in range(50)}
    assert all(1 in pair for pair in drawn)
    assert len(drawn) == 4
    scored = scored_of(torch.from_numpy(rewards).float().repeat(2), torch.tensor([4] * 5 + [1] * 5))
    assert pf_ppo.select(pf_ppo.Config(), scored, generator).tolist() == [1, 2, 6, 7]


def test_filtration_raises_r2_where_rewards_are_least_reliable_in_the_middle() -> None:
    generator = np.random.default_rng(1)
    truths = generator.uniform(-1, 1, (4000, 5))
    noise = generator.normal(size=truths.shape) * np.where(np.abs(truths) < 0.6, 2.0, 0.05)
    rewards = np.where(np.abs(truths) < 0.6, 0.2 * noise, truths + noise)
    everything = pf_ppo.filter_r2(rewards, truths, 5, "best", generator)
    assert pf_ppo.filter_r2(rewards, truths, 2, "best-worst", generator) > everything + 0.01


def test_rto_pays_every_token_what_the_aligned_policy_thinks_of_it() -> None:
    scored = scored_of(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), [3, 2])
    assert scored.reference is not None
    teacher = scored.reference + torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 100.0]])
    scored = dataclasses.replace(scored, teacher=teacher, values=torch.zeros(2, 3))
    config = rto.Config(teacher="x", token_coef=0.5, preset="vanilla", gae_lambda=1.0, kl_coef=0.05)
    found = rto.estimate(config, scored, {})
    wanted = torch.tensor([[4.5, 4.0, 3.0], [6.0, 4.5, 0.0]])  # Σ of 0.5 times the log-ratios to come, and the score
    torch.testing.assert_close(found.advantages, wanted)


def test_remax_takes_off_the_greedy_answers_score_from_every_token() -> None:
    scored = scored_of(torch.tensor([1.0, 2.0]), torch.tensor([0, 1]), [3, 2], greedy=torch.tensor([0.5, 3.0]))
    found = remax.estimate(remax.Config(kl_coef=0.0), scored, {})
    assert found.advantages.tolist() == [[0.5, 0.5, 0.5], [-1.0, -1.0, 0.0]]


def test_reinforce_compares_with_past_returns_only() -> None:
    step: Callable[..., Estimates] = reinforce.estimate
    config = reinforce.Config(kl_coef=0.0, baseline_share=0.5)
    first = step(config, scored_of(torch.tensor([1.0, 3.0]), torch.tensor([0, 1])), {})
    assert first.advantages[:, 0].tolist() == [-1.0, 1.0]
    second = step(config, scored_of(torch.tensor([6.0, 6.0]), torch.tensor([0, 1])), first.state)
    assert second.advantages[:, 0].tolist() == [4.0, 4.0]
    third = step(config, scored_of(torch.tensor([6.0, 6.0]), torch.tensor([0, 1])), second.state)
    assert third.advantages[:, 0].tolist() == [2.0, 2.0]
