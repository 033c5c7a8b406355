"""Derivatives that are written out against automatic differentiation, and the steps taken by them against those of torch's optimiser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete, MultiDiscrete
from torch import nn

from telos.algorithms import run as runs
from telos.algorithms.online import _loop_on_policy
from telos.algorithms.online._array_learner import ArrayLearner
from telos.core import discovery
from telos.functional.closed_form import Actions, CategoricalActions, GaussianActions, MultiCategoricalActions, StepArrays
from telos.functional.distributions import Categorical, Gaussian, MultiCategorical
from telos.functional.reduction import Denominators, total
from telos.functional.segments import StepView
from telos.models.backprop import Backprop
from telos.models.networks import perceptron
from telos.models.policies import Policy, Shape

ROWS = 41
ONLINE = [card.key for card in discovery.cards() if card.family == "online" and card.loop == "on-policy"]
METHODS = [key for key in ONLINE if discovery.load(key).slopes is not None]
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ppo": [
        {},
        {"entropy_coef": 0.03, "value_coef": 0.7},
        {"clip_range_vf": 0.3, "clip_range": 0.1},
        {"normalize_advantage": "none"},
    ],
    "a2c": [{}, {"entropy_coef": 0.02, "value_coef": 0.25}],
}


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


class Given:
    """A distribution whose entropy is a leaf."""

    def __init__(self, entropy: torch.Tensor) -> None:
        self._entropy = entropy

    def entropy(self) -> torch.Tensor:
        return self._entropy


@pytest.mark.parametrize(("key", "options"), [(key, options) for key in METHODS for options in VARIANTS[key]])
def test_slopes_are_the_derivatives_of_the_methods_loss(key: str, options: dict[str, Any]) -> None:
    method = discovery.load(key)
    config = method.config(env="CartPole-v1", **options)
    arrays = {name: drawn(ROWS, seed=i) * 0.4 for i, name in enumerate(StepArrays._fields)}
    arrays["old_logprob"] = arrays["logprob"] + 0.3 * drawn(ROWS, seed=20)
    leaves = {name: torch.from_numpy(arrays[name]).requires_grad_() for name in ("logprob", "entropy", "value")}
    told: dict[str, Any] = {name: torch.from_numpy(arrays[name]) for name in ("old_logprob", "old_value", "advantage", "returns")}
    distribution: Any = Given(leaves["entropy"])
    view = StepView(distribution, leaves["logprob"], leaves["value"], torch.zeros(ROWS), distribution, **told)
    assert method.loss is not None
    assert method.slopes is not None
    losses = method.loss(config, view)
    loss = total(losses, Denominators(ROWS, ROWS))
    expected = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    found = method.slopes(config, StepArrays(**arrays))
    for slope, gradient in zip((found.logprob, found.entropy, found.value), expected, strict=True):
        np.testing.assert_allclose(np.broadcast_to(slope, ROWS) / ROWS, gradient.numpy(), rtol=2e-5, atol=1e-7)
    assert float(found.loss.mean()) == pytest.approx(float(loss.detach()), rel=1e-5)
    metrics = {name: value for term in (losses, *losses.extra) for name, value in term.metrics.items()}
    assert metrics.keys() == found.metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(found.metrics[name], value.detach().numpy(), rtol=2e-5, atol=2e-6, err_msg=name)


def distributions() -> list[tuple[Actions, Any, np.ndarray, np.ndarray, torch.Tensor | None]]:
    """(ours, torch's of outputs and log-deviation, outputs, actions, log-deviation)"""
    chance = np.random.default_rng(3)
    log_std = torch.tensor([-0.4, 0.3, 0.1], requires_grad=True)
    sizes = (2, 4)
    return [
        (CategoricalActions(5), lambda out, _: Categorical(out), 30 * drawn(ROWS, 5), chance.integers(0, 5, ROWS), None),
        (
            MultiCategoricalActions(sizes),
            lambda out, _: MultiCategorical(out, sizes),
            drawn(ROWS, 6),
            chance.integers(0, sizes, (ROWS, 2)),
            None,
        ),
        (GaussianActions(log_std.detach().numpy()), Gaussian, drawn(ROWS, 3), drawn(ROWS, 3, seed=4), log_std),
    ]


@pytest.mark.parametrize("case", range(3))
def test_log_probabilities_entropies_and_their_slopes_are_those_of_torch(case: int) -> None:
    ours, theirs, outputs, action, log_std = distributions()[case]
    out = torch.from_numpy(outputs).requires_grad_()
    distribution = theirs(out, log_std)
    logprob, entropy = distribution.log_prob(torch.from_numpy(action)), distribution.entropy()
    found, found_entropy, saved = ours.score(outputs, ours.coded(action))
    np.testing.assert_allclose(found, logprob.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found_entropy, entropy.detach().numpy(), rtol=1e-5, atol=1e-5)
    slope, of_entropy = drawn(ROWS, seed=7), drawn(ROWS, seed=8)
    whole = (torch.from_numpy(slope) * logprob + torch.from_numpy(of_entropy) * entropy).sum()
    leaves = [out] if log_std is None else [out, log_std]
    expected = torch.autograd.grad(whole, leaves)
    gradient, of_log_std = ours.slope(saved, slope, of_entropy)
    np.testing.assert_allclose(gradient, expected[0].numpy(), rtol=1e-4, atol=1e-5)
    assert (of_log_std is None) == (log_std is None)
    if of_log_std is not None:
        np.testing.assert_allclose(of_log_std, expected[1].numpy(), rtol=1e-4, atol=1e-4)
    logprob = theirs(out, log_std).log_prob(torch.from_numpy(action))
    (alone,) = torch.autograd.grad((torch.from_numpy(slope) * logprob).sum(), out)
    np.testing.assert_allclose(ours.slope(saved, slope, 0.0)[0], alone.numpy(), rtol=1e-4, atol=1e-5)


def test_draws_have_the_probabilities_of_the_outputs() -> None:
    logits = np.array([[0.0, 1.0, -1.0, 0.5]], dtype=np.float32)
    ours, n = CategoricalActions(4), 40_000
    actions = ours.draw(logits, ours.noise((n, 4), np.random.default_rng(0)))
    expected = np.exp(logits[0]) / np.exp(logits[0]).sum()
    seen = np.bincount(actions, minlength=4) / n
    assert np.abs(seen - expected).max() < 4 * np.sqrt(0.25 / n)
    gaussian = GaussianActions(np.log(np.array([0.5, 2.0], dtype=np.float32)))
    values = gaussian.draw(np.array([[1.0, -1.0]], dtype=np.float32), gaussian.noise((n, 2), np.random.default_rng(1)))
    np.testing.assert_allclose(values.mean(0), [1.0, -1.0], atol=0.05)
    np.testing.assert_allclose(values.std(0), [0.5, 2.0], rtol=0.02)


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu"])
def test_gradients_of_perceptrons_are_those_of_autograd(activation: Any) -> None:
    torch.manual_seed(0)
    network = perceptron((5, 16, 7, 3), activation)
    into = {p: np.zeros(p.shape, dtype=np.float32) for p in network.parameters()}
    ours = Backprop(network, into.__getitem__)
    x, slope = drawn(ROWS, 5), drawn(ROWS, 3)
    out = network(torch.from_numpy(x))
    np.testing.assert_allclose(ours.forward(x), out.detach().numpy(), atol=1e-5)
    expected = torch.autograd.grad(out, list(network.parameters()), torch.from_numpy(slope))
    ours.backward(slope.copy())
    for p, gradient in zip(network.parameters(), expected, strict=True):
        np.testing.assert_allclose(into[p], gradient.numpy(), rtol=1e-4, atol=1e-5)


def test_networks_without_written_gradients_are_left_to_torch() -> None:
    assert not Backprop.supports(perceptron((3, 4, 2), "gelu"))
    assert not Backprop.supports(perceptron((3, 4, 2), "tanh", layer_norm=True))
    with pytest.raises(ValueError, match="no gradients are written out"):
        Backprop(perceptron((3, 4, 2), "gelu"), lambda p: np.zeros(p.shape, dtype=np.float32))


WHOLE: dict[str, dict[str, Any]] = {
    "ppo on CartPole": {"method": "ppo", "env": "CartPole-v1", "entropy_coef": 0.01, "weight_decay": 0.01},
    "ppo on Pendulum": {
        "method": "ppo",
        "env": "Pendulum-v1",
        "normalize_observations": True,
        "normalize_rewards": True,
        "activation": "relu",
    },
    "a2c on Pendulum": {"method": "a2c", "env": "Pendulum-v1", "entropy_coef": 0.01, "rollout_steps": 32, "minibatch_size": 0},
}


@pytest.mark.parametrize("case", WHOLE)
def test_a_run_is_the_same_with_gradients_by_torch(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"num_envs": 2, "rollout_steps": 32, "minibatch_size": 16, "total_steps": 128, "eval_episodes": 1, "checkpoint_every": 0}
    options |= {name: value for name, value in WHOLE[case].items() if name != "method"}
    seen = []
    for which in ("arrays", "torch"):
        if which == "torch":
            monkeypatch.setattr(ArrayLearner, "fits", staticmethod(lambda *_: False))
        run = runs.train(WHOLE[case]["method"], {**options, "out": str(tmp_path / which)})
        seen.append((Policy.load(run.path / "policy").state_dict(), list(run.metrics())))
    (ours, our_metrics), (theirs, their_metrics) = seen
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    for one, other in zip(our_metrics, their_metrics, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "grad_norm", "entropy", "loss/critic", "learning_rate", "optimiser_steps"):
            if name in one:
                assert one[name] == pytest.approx(other[name], rel=2e-3, abs=1e-5), name


def test_arrays_are_used_where_they_fit_and_nowhere_else() -> None:
    ppo, cpu = discovery.load("ppo"), torch.device("cpu")

    def model(activation: Any, space: Any) -> Any:
        policy = Policy(space, Discrete(2), Shape(hidden=(8,), activation=activation))
        return _loop_on_policy.ActorCritic(policy, (8,), activation)

    numbers, pictures = Box(-1, 1, (3,)), Box(0, 255, (36, 36, 1), np.uint8)
    config = ppo.config(env="CartPole-v1")
    assert ArrayLearner.fits(ppo, model("tanh", numbers), config, cpu)
    assert not ArrayLearner.fits(ppo, model("gelu", numbers), config, cpu)
    assert not ArrayLearner.fits(ppo, model("relu", pictures), config, cpu)
    assert not ArrayLearner.fits(ppo, model("tanh", numbers), ppo.config(env="CartPole-v1", optimiser="adan"), cpu)
    assert not ArrayLearner.fits(ppo, model("tanh", numbers), config, torch.device("meta"))
    assert not ArrayLearner.fits(discovery.load("trpo"), model("tanh", numbers), discovery.load("trpo").config(env="CartPole-v1"), cpu)


def test_choices_of_several_kinds_are_one_policy() -> None:
    policy = Policy(Box(-1, 1, (3,)), MultiDiscrete([2, 3]), Shape(hidden=(8,)))
    model = _loop_on_policy.ActorCritic(policy, (8,), "tanh")
    ppo = discovery.load("ppo")
    learner = ArrayLearner(ppo, model, ppo.config(env="CartPole-v1"), 10)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    n = 12
    rows = {name: drawn(n) for name in ("old_logprob", "old_value", "advantage", "returns")}
    rows |= {"observation": drawn(n, 3), "coded": policy.actions().coded(np.random.default_rng(0).integers(0, (2, 3), (n, 2)))}
    learner.descend(rows, 4, {})
    moved = (nn.utils.parameters_to_vector(model.parameters()).detach() - before).abs()
    assert 0 < float(moved.max()) < 3.1 * ppo.config(env="CartPole-v1").learning_rate  # three steps of Adam, each at most its rate
