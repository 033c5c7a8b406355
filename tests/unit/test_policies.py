"""Policies read every space, act within bounds, keep their normaliser, and come back from their folder as they were."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Text, Tuple

from telos.core.errors import UsageError
from telos.functional.distributions import Categorical, Gaussian, MultiCategorical, TanhGaussian
from telos.models.critics import ActionValues, Normalised, StateValues
from telos.models.networks import Fast, Normaliser, ensemble, perceptron
from telos.models.observations import Reader
from telos.models.policies import Policy, Shape, describe_space, read_space

PLAIN = Box(-5.0, 5.0, (3,), np.float32)
OBSERVATIONS: dict[str, gymnasium.Space] = {
    "numbers": PLAIN,
    "numbers of 64 bits in a square": Box(-np.inf, np.inf, (2, 3), np.float64),
    "choice": Discrete(4),
    "choice from 2": Discrete(4, start=2),
    "choice from -1": Discrete(3, start=-1),
    "choices": MultiDiscrete([2, 3]),
    "choices from 1 and -2": MultiDiscrete([2, 3], start=[1, -2]),
    "switches": MultiBinary(4),
    "switches in a square": MultiBinary([2, 3]),
    "dictionary": Dict({"z": Box(-1, 1, (2,), np.float32), "a": Discrete(3, start=1), "m": MultiBinary(2)}),
    "picture": Box(0, 255, (40, 40, 3), np.uint8),
    "small grey picture": Box(0, 255, (16, 20), np.uint8),
}
ACTIONS: dict[str, tuple[gymnasium.Space, str]] = {
    "numbers": (Box(-2.0, 1.0, (2,), np.float32), "stochastic"),
    "numbers in a square": (Box(np.array([[0.1, -3.0]]), np.array([[0.7, 9.0]]), dtype=np.float64), "stochastic"),
    "squashed": (Box(np.array([0.1, -3.0], np.float32), np.array([0.7, 9.0], np.float32)), "squashed"),
    "deterministic": (Box(np.array([0.1, -3.0], np.float32), np.array([0.7, 9.0], np.float32)), "deterministic"),
    "choice": (Discrete(3), "stochastic"),
    "choice from 2": (Discrete(3, start=2), "stochastic"),
    "values of a choice from -1": (Discrete(3, start=-1), "values"),
    "choices": (MultiDiscrete([2, 4]), "stochastic"),
    "choices from 1 and -2": (MultiDiscrete([2, 4], start=[1, -2]), "stochastic"),
}


def shape_of(kind: str, **changes: Any) -> Shape:
    return Shape(kind, (8, 6), **changes)  # type: ignore[arg-type]


def several(space: gymnasium.Space, count: int = 5, seed: int = 0) -> Any:
    """A batch of observations as an environment gives them."""
    space.seed(seed)
    found = [space.sample() for _ in range(count)]
    if isinstance(space, Dict):
        return {key: np.stack([one[key] for one in found]) for key in space.spaces}
    return np.stack(found)


def row(batch: Any, i: int) -> Any:
    return {key: value[i] for key, value in batch.items()} if isinstance(batch, dict) else batch[i]


def tensors(policy: Policy, batch: Any) -> torch.Tensor:
    return torch.from_numpy(policy.reader(batch))


# -- observations -----------------------------------------------------------------------------------------------------------------------------------


def test_numbers_are_flattened_and_choices_become_one_hot() -> None:
    assert Reader(OBSERVATIONS["choice from 2"])(np.array([2, 5, 3])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]]
    assert Reader(OBSERVATIONS["choices"])(np.array([[1, 0], [0, 2]])).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    assert Reader(MultiBinary(3))(np.array([[1, 0, 1]], np.int8)).tolist() == [[1, 0, 1]]
    square = Reader(OBSERVATIONS["numbers of 64 bits in a square"])(np.arange(12.0).reshape(2, 2, 3))
    assert square.tolist() == [list(range(6)), list(range(6, 12))]
    assert square.dtype == np.float32


def test_choices_that_start_elsewhere_become_one_hot_from_there() -> None:
    space = MultiDiscrete([2, 3], start=[1, -2])
    assert Reader(space)(np.array([[2, -2], [1, 0]])).tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]


def test_a_dictionary_is_joined_in_the_order_of_its_keys() -> None:
    reader = Reader(OBSERVATIONS["dictionary"])
    read = reader({"z": np.array([[0.25, -0.5]], np.float32), "m": np.array([[1, 0]], np.int8), "a": np.array([3])})
    assert read.tolist() == [[0, 0, 1, 1, 0, 0.25, -0.5]]
    assert {key: read[0, part].tolist() for key, part in reader.slices.items()} == {"a": [0, 0, 1], "m": [1, 0], "z": [0.25, -0.5]}


def test_pictures_keep_their_bytes_and_put_channels_first() -> None:
    reader = Reader(OBSERVATIONS["picture"])
    pictures = several(OBSERVATIONS["picture"], 2)
    read = reader(pictures)
    assert read.dtype == np.uint8
    assert read.shape == (2, 3, 40, 40)
    assert np.array_equal(read[1, 2], pictures[1, :, :, 2])
    assert Reader(OBSERVATIONS["small grey picture"])(several(OBSERVATIONS["small grey picture"], 2)).shape == (2, 1, 16, 20)


@pytest.mark.parametrize(
    "space",
    [Dict({"picture": Box(0, 255, (20, 20, 3), np.uint8), "speed": Box(-1, 1, (1,))}), Tuple([Discrete(2), Discrete(2)]), Text(5)],
    ids=["picture beside numbers", "tuple", "text"],
)
def test_what_cannot_be_read_is_refused(space: gymnasium.Space) -> None:
    with pytest.raises(UsageError, match=r"cannot be read|picture beside"):
        Policy(space, Discrete(2), shape_of("stochastic"))


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_one_observation_and_a_batch_give_the_same_actions(name: str) -> None:
    space = OBSERVATIONS[name]
    torch.manual_seed(0)
    policy = Policy(space, Discrete(3), shape_of("stochastic", orthogonal=False))
    batch = several(space)
    actions, state = policy.predict(batch, state="kept")
    assert state == "kept"
    assert actions.shape == (5,)
    singles = [policy.predict(row(batch, i))[0] for i in range(5)]
    assert [int(one) for one in singles] == actions.tolist()
    with torch.no_grad():
        assert policy.distribution(tensors(policy, batch)).mode().tolist() == actions.tolist()


# -- actions ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ACTIONS)
def test_every_action_lies_in_the_environments_space(name: str) -> None:
    space, kind = ACTIONS[name]
    torch.manual_seed(1)
    policy = Policy(PLAIN, space, shape_of(kind, orthogonal=False, log_std_init=1.0))
    batch = several(PLAIN, 200)
    drawn = [policy.predict(batch)[0], policy.to_environment(policy.random(200, np.random.default_rng(0)))]
    if kind in ("stochastic", "squashed"):
        drawn.append(policy.predict(batch, deterministic=False, seed=3)[0])
    for actions in drawn:
        assert actions.shape == (200, *space.shape)  # type: ignore[misc]
        assert all(space.contains(one if isinstance(space, (Box, MultiDiscrete)) else np.int64(one)) for one in actions)
    one, _ = policy.predict(batch[0])
    assert space.contains(np.int64(one) if isinstance(space, Discrete) else one)


@pytest.mark.parametrize("name", ACTIONS)
def test_what_is_brought_to_the_environment_comes_back(name: str) -> None:
    space, kind = ACTIONS[name]
    policy = Policy(PLAIN, space, shape_of(kind))
    own = policy.random(50, np.random.default_rng(0))
    back = policy.from_environment(policy.to_environment(own))
    assert back.shape == own.shape
    np.testing.assert_allclose(back, own, atol=1e-5)
    given = several(space, 50)
    np.testing.assert_allclose(policy.to_environment(policy.from_environment(given)), given, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["squashed", "deterministic"])
def test_actions_in_minus_one_to_one_are_scaled_to_the_bounds(kind: str) -> None:
    space = Box(np.array([0.0, -4.0], np.float32), np.array([2.0, 4.0], np.float32))
    policy = Policy(PLAIN, space, shape_of(kind))
    assert policy.to_environment(np.array([[-1, -1], [1, 1], [0, 0.5]], np.float32)).tolist() == [[0, -4], [2, 4], [1, 2]]
    assert policy.from_environment(np.array([[0.5, 3.0]])).tolist() == [[-0.5, 0.75]]


def test_other_actions_are_clipped_to_the_bounds_and_not_scaled() -> None:
    policy = Policy(PLAIN, Box(np.array([0.0, -4.0], np.float32), np.array([2.0, 4.0], np.float32)), shape_of("stochastic"))
    assert policy.to_environment(np.array([[-1, -1], [3, 9.0]], np.float32)).tolist() == [[0, -1], [2, 4]]
    assert policy.from_environment(np.array([[0.5, 3.0]])).tolist() == [[0.5, 3.0]]


@pytest.mark.parametrize("kind", ["squashed", "deterministic", "stochastic"])
def test_rounding_leads_no_action_out_of_its_bounds(kind: str) -> None:
    """The largest and smallest actions of 300 boxes with bounds of any size."""
    draws = np.random.default_rng(0)
    low = (draws.normal(size=300) * 10.0 ** draws.integers(-3, 4, 300)).astype(np.float32)
    high = (low + draws.random(300) * 10.0 ** draws.integers(-2, 4, 300) + 1e-3).astype(np.float32)
    policy = Policy(PLAIN, Box(low, high), shape_of(kind))
    edge = np.full((1, 300), 1.0 if kind != "stochastic" else 1e9, np.float32)
    for action in (edge, -edge):
        acted = policy.to_environment(action)[0]
        outside = np.flatnonzero((acted < low) | (acted > high))
        assert not len(outside), (len(outside), low[outside[0]], high[outside[0]], acted[outside[0]])


def test_actions_without_bounds_stay_numbers_or_are_refused() -> None:
    """Data may name such a space; half its numbers must not turn into NaN in silence."""
    space = Box(-np.inf, np.inf, (2,), np.float32)
    try:
        policy = Policy(PLAIN, space, shape_of("stochastic"))
    except UsageError:
        return
    assert np.isfinite(policy.predict(several(PLAIN))[0]).all()


def test_choices_begin_where_the_space_says() -> None:
    policy = Policy(PLAIN, Discrete(3, start=5), shape_of("values"))
    assert policy.to_environment(np.array([0, 2])).tolist() == [5, 7]
    assert policy.from_environment(np.array([5, 7])).tolist() == [0, 2]
    several_choices = Policy(PLAIN, MultiDiscrete([2, 4], start=[1, -2]), shape_of("stochastic"))
    assert several_choices.to_environment(np.array([[0, 0], [1, 3]])).tolist() == [[1, -2], [2, 1]]
    assert several_choices.from_environment(np.array([[1, -2], [2, 1]])).tolist() == [[0, 0], [1, 3]]


def test_random_actions_are_uniform_over_the_bounds() -> None:
    space = Box(np.array([0.0, -4.0], np.float32), np.array([2.0, 4.0], np.float32))
    for kind in ("stochastic", "squashed"):
        policy = Policy(PLAIN, space, shape_of(kind))
        acted = policy.to_environment(policy.random(20_000, np.random.default_rng(0)))
        np.testing.assert_allclose(acted.mean(0), [1, 0], atol=0.06)
        np.testing.assert_allclose(acted.var(0), [4 / 12, 64 / 12], rtol=0.03)
    choices = Policy(PLAIN, Discrete(4, start=3), shape_of("stochastic"))
    counts = np.bincount(choices.to_environment(choices.random(20_000, np.random.default_rng(0))), minlength=7)
    assert counts[:3].sum() == 0
    assert (abs(counts[3:] - 5000) < 5 * math.sqrt(5000)).all()


@pytest.mark.parametrize(
    ("space", "kind", "message"),
    [
        (Discrete(2), "squashed", "continuous spaces"),
        (MultiDiscrete([2, 2]), "deterministic", "continuous spaces"),
        (PLAIN, "values", "discrete spaces"),
        (MultiDiscrete([2, 2]), "values", "discrete spaces"),
        (MultiBinary(3), "stochastic", "MultiBinary"),
        (Tuple([Discrete(2)]), "stochastic", "Tuple"),
        (MultiDiscrete(np.full((2, 2), 2)), "stochastic", "MultiDiscrete"),
    ],
)
def test_actions_that_do_not_fit_the_kind_are_refused(space: gymnasium.Space, kind: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Policy(PLAIN, space, shape_of(kind)).distribution(torch.zeros(1, 3))


def test_each_kind_acts_by_its_distribution() -> None:
    box, read = Box(-1.0, 1.0, (2,), np.float32), torch.zeros(4, 3)
    found = Policy(PLAIN, box, shape_of("stochastic", log_std_init=-1.5)).distribution(read)
    assert isinstance(found, Gaussian)
    assert found.log_std.tolist() == [-1.5, -1.5]
    assert isinstance(Policy(PLAIN, Discrete(2), shape_of("stochastic")).distribution(read), Categorical)
    several_choices = Policy(PLAIN, MultiDiscrete([2, 4]), shape_of("stochastic")).distribution(read)
    assert isinstance(several_choices, MultiCategorical)
    assert several_choices.sizes == (2, 4)
    squashed = Policy(PLAIN, box, shape_of("squashed", orthogonal=False))
    deviating = squashed.distribution(read * 0 + torch.randn(4, 3, generator=torch.Generator().manual_seed(0)) * 100)
    assert isinstance(deviating, TanhGaussian)
    assert ((deviating.log_std >= -5) & (deviating.log_std <= 2)).all()
    out = torch.tensor([[0.3, -0.7, 0.5, -40.0]])
    bounded = squashed.distribution_of(out)
    assert isinstance(bounded, TanhGaussian)
    torch.testing.assert_close(bounded.mean, out[:, :2])
    torch.testing.assert_close(bounded.log_std, torch.tensor([[-1.5 + 3.5 * math.tanh(0.5), -5.0]]))
    for kind, space in (("deterministic", box), ("values", Discrete(2))):
        with pytest.raises(UsageError, match="no distribution"):
            Policy(PLAIN, space, shape_of(kind)).distribution(read)


def test_the_most_probable_action_is_taken_and_others_are_drawn_with_their_probabilities() -> None:
    policy = Policy(PLAIN, Discrete(3), Shape(hidden=()))
    with torch.no_grad():
        policy.body[0].weight.zero_()  # type: ignore[union-attr]
        policy.body[0].bias.copy_(torch.log(torch.tensor([0.2, 0.7, 0.1])))  # type: ignore[union-attr,arg-type]
    observations = np.zeros((30_000, 3), np.float32)
    assert set(policy.predict(observations)[0].tolist()) == {1}
    counts = np.bincount(policy.predict(observations, deterministic=False, seed=0)[0])
    np.testing.assert_allclose(counts / 30_000, [0.2, 0.7, 0.1], atol=0.012)


def test_dueling_values_are_the_states_and_what_an_action_has_above_the_mean() -> None:
    policy = Policy(PLAIN, Discrete(3), Shape("values", (), dueling=True))
    with torch.no_grad():
        policy.body[0].weight.zero_()  # type: ignore[union-attr]
        policy.body[0].bias.copy_(torch.tensor([10.0, 1.0, 2.0, 6.0]))  # type: ignore[union-attr,arg-type]
    assert policy(torch.zeros(1, 3)).tolist() == [[8.0, 9.0, 13.0]]
    assert policy.predict(np.zeros(3, np.float32))[0] == 2


# -- networks ---------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["tanh", "relu", "silu", "gelu"])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_numpy_evaluates_networks_as_torch_does(activation: Any, normalise: bool, layer_norm: bool) -> None:
    torch.manual_seed(2)
    policy = Policy(PLAIN, PLAIN, Shape("squashed", (32, 16), activation, normalise=normalise, layer_norm=layer_norm, orthogonal=False))
    read = several(PLAIN, 20)
    if policy.normaliser is not None:
        policy.normaliser.update(read * 3 + 1)
    assert (policy.fast is not None) == (activation != "gelu" and not layer_norm)
    with torch.no_grad():
        np.testing.assert_allclose(policy.outputs(read), policy(torch.from_numpy(read)).numpy(), rtol=1e-4, atol=1e-5)


def test_numpy_bears_inputs_of_any_size() -> None:
    """A saturated unit is no reason for a warning."""
    x = np.array([[-1e4, -100.0, 0.0, 100.0, 1e4]], np.float32)
    for activation in (torch.nn.SiLU(), torch.nn.Tanh(), torch.nn.ReLU()):
        fast = Fast.of(torch.nn.Sequential(activation))
        assert fast is not None
        with np.errstate(over="raise", invalid="raise"):
            np.testing.assert_allclose(fast(x), activation(torch.from_numpy(x)).numpy(), atol=1e-6)


def test_numpy_sees_every_change_of_the_weights() -> None:
    torch.manual_seed(3)
    policy = Policy(PLAIN, Discrete(3), shape_of("stochastic", orthogonal=False))
    read = several(PLAIN, 4)
    before = policy.outputs(read)
    optimiser = torch.optim.AdamW(policy.parameters(), lr=0.1, fused=True)
    policy(torch.from_numpy(read)).sum().backward()
    optimiser.step()
    with torch.no_grad():
        now = policy(torch.from_numpy(read)).numpy()
    assert abs(now - before).max() > 0.1
    np.testing.assert_allclose(policy.outputs(read), now, atol=1e-5)


def test_a_copy_of_a_policy_that_has_acted_follows_its_own_weights() -> None:
    """Slow copies, opponents and snapshots are made of policies in use."""
    policy = Policy(PLAIN, Discrete(3), shape_of("stochastic", orthogonal=False))
    read = several(PLAIN, 4)
    policy.outputs(read)
    other = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
        np.testing.assert_allclose(other.outputs(read), other(torch.from_numpy(read)).numpy(), rtol=1e-5, atol=1e-5)


def test_a_policy_brought_to_another_precision_is_not_evaluated_on_its_old_weights() -> None:
    policy = Policy(PLAIN, Discrete(3), shape_of("stochastic", orthogonal=False))
    read = several(PLAIN, 4)
    policy.outputs(read)
    policy.to(torch.float64)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
        np.testing.assert_allclose(policy.outputs(read.astype(np.float64)), policy(torch.from_numpy(read).double()).numpy(), atol=1e-4)


def test_convolutions_have_no_numpy_form() -> None:
    assert Policy(OBSERVATIONS["picture"], Discrete(2), shape_of("stochastic")).fast is None
    assert Fast.of(torch.nn.Linear(2, 2)) is None


def test_initial_weights_are_orthogonal_with_a_small_last_layer() -> None:
    policy = Policy(PLAIN, Discrete(4), Shape(hidden=(16, 16)))
    linear = [layer for layer in policy.body if isinstance(layer, torch.nn.Linear)]
    for layer, gain in zip(linear, (math.sqrt(2), math.sqrt(2), 0.01)):
        weight = layer.weight.detach()
        product = weight.T @ weight if weight.shape[0] >= weight.shape[1] else weight @ weight.T
        torch.testing.assert_close(product, gain**2 * torch.eye(len(product)), atol=1e-5, rtol=0)
        assert (layer.bias == 0).all()


@pytest.mark.parametrize("layer_norm", [False, True])
def test_members_of_an_ensemble_are_perceptrons_that_share_nothing(layer_norm: bool) -> None:
    """Three members have three times as many numbers as one perceptron, those of normalised layers too."""
    torch.manual_seed(4)
    network, single = ensemble(3, (4, 5, 2), layer_norm=layer_norm), perceptron((4, 5, 2), "relu", layer_norm=layer_norm)
    assert sum(p.numel() for p in network.parameters()) == 3 * sum(p.numel() for p in single.parameters())
    x = torch.randn(7, 4)
    assert network(x).shape == (3, 7, 2)


def test_an_ensembles_members_are_what_their_weights_say() -> None:
    torch.manual_seed(5)
    network = ensemble(2, (3, 4, 1))
    first, second = (layer for layer in network if hasattr(layer, "weight"))
    x = torch.randn(6, 3)
    for i in range(2):
        hidden = (x @ first.weight[i] + first.bias[i]).relu()  # type: ignore[index,operator]
        torch.testing.assert_close(network(x)[i], hidden @ second.weight[i] + second.bias[i])  # type: ignore[index,operator]
    assert not torch.equal(network(x)[0], network(x)[1])
    bound = 1 / math.sqrt(3)
    assert first.weight.abs().max() <= bound  # type: ignore[union-attr,operator]
    assert first.weight.std() > 0.3 * bound  # type: ignore[union-attr,operator]


def test_critics_read_observation_and_action() -> None:
    reader = Reader(PLAIN)
    values = ActionValues(reader, 2, (8,), members=3)
    observation, action = torch.randn(5, 3), torch.randn(5, 2)
    assert values(observation, action).shape == (3, 5)
    torch.testing.assert_close(values(observation, action), values.body(torch.cat([observation, action], 1))[..., 0])
    assert StateValues(reader, (8,))(observation).shape == (5,)
    pictures = torch.zeros(2, 3, 40, 40, dtype=torch.uint8)
    assert ActionValues(Reader(OBSERVATIONS["picture"]), 2, (8,))(pictures, action[:2]).shape == (2, 2)


# -- normalisation ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[100], [1] * 100, [37, 1, 62], [99, 1]])
def test_statistics_in_parts_are_those_of_the_whole(sizes: list[int]) -> None:
    values = np.random.default_rng(0).normal(3, [1, 10, 0.01], (100, 3))
    normaliser = Normaliser(3)
    for part in np.split(values, np.cumsum(sizes)[:-1]):
        normaliser.update(part)
    np.testing.assert_allclose(normaliser.mean, values.mean(0), rtol=1e-12)
    np.testing.assert_allclose(normaliser.deviation, values.std(0), rtol=1e-10)
    assert float(normaliser.count) == 100


def test_statistics_survive_means_far_from_zero() -> None:
    values = 1e6 + np.random.default_rng(0).normal(size=(1000, 1)) * 1e-2
    normaliser = Normaliser(1)
    for part in np.split(values, 50):
        normaliser.update(part)
    np.testing.assert_allclose(normaliser.deviation, values.std(0), rtol=1e-6)


def test_normalised_values_by_hand() -> None:
    normaliser = Normaliser(3)
    assert normaliser(torch.tensor([[3.0, -20.0, 0.5]])).tolist() == [[3.0, -10.0, 0.5]]  # nothing seen: as it is, bounded
    normaliser.update(np.array([[1.0, 10.0, 4.0], [3.0, 30.0, 4.0]]))  # means 2, 20, 4; deviations 1, 10, none
    assert normaliser(torch.tensor([[4.0, 5.0, 5.0], [900.0, -900.0, 4.0]])).tolist() == [[2.0, -1.5, 1.0], [10.0, -10.0, 0.0]]
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32) * 100
    np.testing.assert_allclose(normaliser.of_array(x), normaliser(torch.from_numpy(x)).numpy(), atol=1e-6)
    assert normaliser.of_array(x).dtype == np.float32


def test_the_normaliser_is_no_parameter_and_moves_only_when_updated() -> None:
    policy = Policy(PLAIN, Discrete(2), shape_of("stochastic", normalise=True))
    assert policy.normaliser is not None
    assert not any("normaliser" in name for name, _ in policy.named_parameters())
    policy.predict(several(PLAIN))
    assert float(policy.normaliser.count) == 0


def test_a_critic_in_the_policys_units_follows_its_normaliser() -> None:
    normaliser = Normaliser(3)
    critic = StateValues(Reader(PLAIN), (4,))
    wrapped = Normalised(critic, normaliser)
    x = torch.randn(5, 3)
    normaliser.update(several(PLAIN, 50) * 4)
    torch.testing.assert_close(wrapped(x), critic(normaliser(x)))
    assert {id(p) for p in wrapped.parameters()} == {id(p) for p in critic.parameters()}


def test_a_slow_copy_of_a_critic_in_the_policys_units_reads_in_the_same_units() -> None:
    """Otherwise targets see other numbers than the networks that they are targets of."""
    normaliser = Normaliser(3)
    wrapped = Normalised(StateValues(Reader(PLAIN), (4,)), normaliser)
    slow = copy.deepcopy(wrapped)
    normaliser.update(several(PLAIN, 50) * 4 + 3)
    x = torch.randn(5, 3)
    torch.testing.assert_close(slow(x), wrapped(x))


# -- on disk ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_spaces_of_observations_come_back(name: str) -> None:
    assert read_space(json.loads(json.dumps(describe_space(OBSERVATIONS[name])))) == OBSERVATIONS[name]


@pytest.mark.parametrize("name", ACTIONS)
def test_spaces_of_actions_come_back(name: str) -> None:
    space = ACTIONS[name][0]
    found = read_space(json.loads(json.dumps(describe_space(space))))
    assert found == space
    assert found.dtype == space.dtype


@pytest.mark.parametrize("name", ACTIONS)
def test_a_saved_policy_acts_as_before_on_raw_observations(name: str, tmp_path: Path) -> None:
    space, kind = ACTIONS[name]
    torch.manual_seed(6)
    policy = Policy(PLAIN, space, shape_of(kind, orthogonal=False, normalise=True, activation="silu"))
    assert policy.normaliser is not None
    policy.normaliser.update(several(PLAIN, 30) * 7 + 2)
    batch = several(PLAIN, 20)
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy")
    assert loaded.shape == policy.shape
    assert loaded.normaliser is not None
    assert torch.equal(loaded.normaliser.mean, policy.normaliser.mean)
    assert float(loaded.normaliser.count) == 30
    assert np.array_equal(loaded.predict(batch)[0], policy.predict(batch)[0])
    if kind in ("stochastic", "squashed"):
        one, two = (p.predict(batch, deterministic=False, seed=4)[0] for p in (policy, loaded))
        assert np.array_equal(one, two)
    assert not any(p.requires_grad for p in loaded.parameters())
    assert sorted(p.name for p in (tmp_path / "policy").iterdir()) == ["policy.json", "policy.safetensors"]


@pytest.mark.parametrize("name", ["dictionary", "picture", "switches"])
def test_a_saved_policy_reads_every_kind_of_observation(name: str, tmp_path: Path) -> None:
    policy = Policy(OBSERVATIONS[name], Discrete(3, start=1), shape_of("values", dueling=True, orthogonal=False))
    policy.save(tmp_path)
    batch = several(OBSERVATIONS[name])
    assert np.array_equal(Policy.load(tmp_path).predict(batch)[0], policy.predict(batch)[0])


def damaged(folder: Path, how: str) -> None:
    weights, described = folder / "policy.safetensors", folder / "policy.json"
    told = json.loads(described.read_text())
    if how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif how == "no description":
        described.unlink()
    elif how == "broken description":
        described.write_text(described.read_text()[:-30])
    elif how == "a list":
        described.write_text("[]")
    elif how == "a shape that is a list":
        described.write_text(json.dumps(told | {"shape": ["stochastic"]}))
    elif how == "other sizes":
        described.write_text(json.dumps(told | {"shape": told["shape"] | {"hidden": [8, 7]}}))
    elif how == "unknown option":
        described.write_text(json.dumps(told | {"shape": told["shape"] | {"depth": 3}}))
    elif how == "unknown kind":
        described.write_text(json.dumps(told | {"shape": told["shape"] | {"kind": "quantum"}}))
    elif how == "unknown space":
        described.write_text(json.dumps(told | {"action_space": {"kind": "Tuple"}}))
    elif how == "later format":
        described.write_text(json.dumps(told | {"format": 99}))


@pytest.mark.parametrize(
    "how",
    [
        *("no weights", "cut weights", "no description", "broken description", "a list", "a shape that is a list", "other sizes"),
        *("unknown option", "unknown kind", "unknown space", "later format"),
    ],
)
def test_a_damaged_folder_is_refused(how: str, tmp_path: Path) -> None:
    Policy(PLAIN, Discrete(3), shape_of("stochastic")).save(tmp_path)
    damaged(tmp_path, how)
    with pytest.raises(UsageError, match="holds no whole policy"):
        Policy.load(tmp_path)


def test_every_option_of_the_shape_is_saved(tmp_path: Path) -> None:
    shape = Shape("values", (4,), "relu", orthogonal=False, layer_norm=True, normalise=True, log_std_init=-1.0, dueling=True)
    defaults = Shape()
    assert all(getattr(shape, f.name) != getattr(defaults, f.name) for f in dataclasses.fields(Shape))
    Policy(PLAIN, Discrete(3), shape).save(tmp_path)
    assert Policy.load(tmp_path).shape == shape
