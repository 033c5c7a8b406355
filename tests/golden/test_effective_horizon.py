"""Effective horizons of processes whose values can be written down by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from telos.core.errors import UsageError
from telos.environments.tabular import Tabular, lock, random_mdp
from telos.evaluation.effective_horizon import (
    deterministic_lookaheads,
    effective_horizon,
    gap,
    gorp_success,
    shallow_values,
    stochastic_lookaheads,
)


def process_of(moves: dict[tuple[int, int], tuple[int, float]], states: int, horizon: int) -> Tabular:
    """A deterministic process of two actions from state 0: (state, action) -> (next state, reward); all else leads to the last state, which is the end."""
    transitions, rewards = np.zeros((states, 2, states)), np.zeros((states, 2))
    transitions[:, :, -1] = 1
    for (state, action), (following, reward) in moves.items():
        transitions[state, action] = np.eye(states)[following]
        rewards[state, action] = reward
    return Tabular(transitions, rewards, np.eye(states)[0], np.arange(states) == states - 1, horizon)


# Action 0 leads to where 1 can be earned, action 1 to where 1/2 can.
FORK = process_of({(0, 0): (1, 0.0), (0, 1): (2, 0.0), (1, 0): (3, 1.0), (2, 0): (3, 0.5)}, 4, 2)
# 0.3 at once, or two right actions in a row for 1: random play gets 1/4 of it.
LURE = process_of({(0, 0): (3, 0.3), (0, 1): (1, 0.0), (1, 1): (2, 0.0), (2, 1): (3, 1.0)}, 4, 3)


def test_one_step_over_random_play_solves_the_fork() -> None:
    values = shallow_values(FORK, 1)
    assert values[0, 0] == pytest.approx([1 / 2, 1 / 4])
    assert gap(FORK, 1) == pytest.approx(1 / 4)  # of a span of 1
    assert shallow_values(FORK, 2)[0, 0] == pytest.approx([1, 1 / 2])
    found = stochastic_lookaheads(FORK)
    assert [one.k for one in found] == [1, 2]
    assert [one.samples for one in found] == pytest.approx([16, 4])
    assert [one.horizon for one in found] == pytest.approx([1 + 4, 2 + 2])  # log_2 16, log_2 4
    assert effective_horizon(found).k == 2


def test_a_lure_before_a_lock_needs_two_steps() -> None:
    assert shallow_values(LURE, 1)[0, 0] == pytest.approx([0.3, 0.25])
    assert shallow_values(LURE, 2)[0, 0] == pytest.approx([0.3, 0.5])
    assert gap(LURE, 1) == 0.0
    assert gap(LURE, 2) == pytest.approx(0.2)
    found = stochastic_lookaheads(LURE)
    assert found[0].horizon == math.inf
    assert found[1].horizon == pytest.approx(2 + math.log2(25))
    assert found[2].horizon == pytest.approx(3 + math.log2(0.7**-2))
    assert effective_horizon(found).k == 3


@pytest.mark.parametrize(("length", "actions", "lure"), [(2, 2, 0.0), (3, 3, 0.1), (4, 2, 0.3)])
def test_the_locks_horizon_is_its_length_however_stochastic(length: int, actions: int, lure: float) -> None:
    """Random play is worth (1 − lure) A^−h more than the lure h positions before the end, so that Δ_k = (1 − lure) A^−(length − k)."""
    process = lock(length, actions, seed=3, lure=lure)
    for one in stochastic_lookaheads(process):
        assert one.horizon == pytest.approx(one.k + 2 * (length - one.k) - 2 * math.log(1 - lure, actions))
    assert effective_horizon(stochastic_lookaheads(process)).k == length


def test_every_process_is_solvable_with_its_horizon_and_the_gap_is_that_of_the_optimum() -> None:
    for seed in range(4):
        process = random_mdp(4, 3, seed, horizon=3, discount=1.0)
        best = process.optimal()
        assert np.allclose(shallow_values(process, 3), best.action)
        ordered = np.sort(best.action, -1)
        # All states follow all others, so that every state is met at every step, whatever is done.
        worst = np.zeros((4, 4))
        for t in (2, 1, 0):
            worst[t] = (process.expected_rewards + process.transitions @ worst[t + 1]).min(-1)
        span = best.state[:3].max() - worst[:3].min()
        assert gap(process, 3) == pytest.approx((ordered[..., -1] - ordered[..., -2]).min() / span)


def test_where_nothing_can_be_got_wrong_the_horizon_is_one() -> None:
    same = process_of({(0, 0): (1, 1.0), (0, 1): (1, 1.0)}, 2, 1)
    assert effective_horizon(stochastic_lookaheads(same)).horizon == 1.0


def test_states_that_greedy_play_never_meets_do_not_count() -> None:
    """Behind the worse action lies a choice with a gap of 0.01."""
    moves = {(0, 0): (2, 1.0), (0, 1): (1, 0.0), (1, 0): (2, 0.02), (1, 1): (2, 0.01)}
    assert gap(process_of(moves, 3, 2), 2) == pytest.approx(0.98)


def test_gorp_finds_the_fork_with_the_probability_that_counting_gives() -> None:
    """One episode an action: returns 0 or 1 against 0 or 1/2, the first action where they are equal."""
    wins = [a >= b for a, b in itertools.product((0, 1), (0, 0.5))]
    assert gorp_success(FORK, 1, 1, trials=4000) == pytest.approx(np.mean(wins), abs=4 * math.sqrt(3 / 16 / 4000))
    assert effective_horizon(deterministic_lookaheads(FORK)) == effective_horizon(deterministic_lookaheads(FORK)[:1])
    assert deterministic_lookaheads(FORK)[0].horizon == 1.0  # m = 1


def test_gorps_fewest_episodes_are_those_of_the_binomial_law() -> None:
    """With lookahead 2 the way to the lock earns 1 in half of the episodes: GORP takes it when more than 0.3 m of m do."""
    found = deterministic_lookaheads(LURE, 2, trials=4000)
    assert found[0].samples == math.inf

    def chance(m: int) -> float:  # at the second step the lookahead reaches the end; only the first one is left to chance
        return sum(math.comb(m, j) for j in range(m + 1) if j > 0.3 * m) / 2**m

    fewest = next(m for m in range(1, 50) if chance(m) >= 0.5)
    for m in (1, 2, 3, 5):
        assert gorp_success(LURE, 2, m, trials=4000) == pytest.approx(chance(m), abs=0.04)
    assert found[1].samples in (fewest, fewest + 1)  # a chance of exactly 1/2 may be measured below it
    assert found[1].horizon == pytest.approx(2 + math.log2(found[1].samples))


def test_gorp_is_refused_where_actions_do_not_lead_to_one_state() -> None:
    with pytest.raises(UsageError, match="deterministic"):
        gorp_success(random_mdp(3, 2, horizon=2), 1, 1)
    with pytest.raises(UsageError, match="horizon"):
        gap(random_mdp(3, 2), 1)
