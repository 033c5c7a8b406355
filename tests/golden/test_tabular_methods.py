"""Methods for finite processes: bonuses by hand, MEX's objective against brute force, regret that grows ever more slowly, runs that continue bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from scipy.optimize import minimize

import telos
from telos.algorithms.online import mex_tabular, posterior_sampling, q_learning, ucb_vi
from telos.algorithms.online._loop_tabular import Played, Seen
from telos.algorithms.run import resume, train
from telos.core.errors import Failure, UsageError
from telos.environments.tabular import lock, random_mdp, river_swim

COMMON: dict[str, Any] = {"device": "cpu", "threads": 1, "checkpoint_every": 0, "eval_episodes": 2, "seed": 3}
RIVER: dict[str, Any] = {"env": "telos/RiverSwim-v0", "env_options": ["length=4", "horizon=8"]}
METHODS = ["q-learning", "ucb-vi", "posterior-sampling", "mex-tabular"]


def seen_of(moves: Any, rewards: Any, arrivals: Any, low: float = 0.0, high: float = 1.0) -> Seen:
    steps = len(arrivals)
    left = np.arange(steps, 0, -1.0)
    return Seen(np.array(moves, float), np.array(rewards, float), np.array(arrivals, float), low * left, high * left)


# -- Q-learning ------------------------------------------------------------------------------------------------------------------------------------


def test_q_learning_takes_jins_step_sizes_and_bonus() -> None:
    """H = 2, S = 2, A = 1: the first visit replaces the value (α_1 = 1), the second has α_2 = (H + 1) / (H + 2) = 3/4."""
    config = q_learning.Config(env="-", episodes=10, bonus_scale=0.1, failure=0.5, reward_range=(0.0, 2.0))
    seen = seen_of(np.zeros((2, 1, 3)), np.zeros((2, 1)), np.zeros((2, 2)), high=2.0)
    iota = math.log(2 * 1 * 20 / 0.5)
    b1, b2 = (0.1 * 2 * math.sqrt(8 * iota / t) for t in (1, 2))
    assert q_learning.bonus(config, seen, 2) == pytest.approx(b2)
    tables = q_learning.update(config, seen, Played(np.array([0, 1, 0]), np.array([0, 0]), np.array([0.5, 1.0])))
    # Step 0 looks ahead to the untouched value 2 of state 1 at step 1; the last step to nothing.
    assert tables["q"][0, 0, 0] == pytest.approx(0.5 + 2.0 + b1)
    assert tables["q"][1, 1, 0] == pytest.approx(1.0 + b1)
    again = Seen(seen.moves, seen.rewards, seen.arrivals, seen.low, seen.high, tables)
    after = q_learning.update(config, again, Played(np.array([0, 2]), np.array([0]), np.array([0.25])))
    assert after["q"][0, 0, 0] == pytest.approx(0.25 * (2.5 + b1) + 0.75 * (0.25 + b2)), "an episode that is over has nothing to come"
    assert tables["visits"].sum() == 2, "what was given is not written into"


def test_epsilon_greedy_mixes_the_best_action_with_a_uniform_one() -> None:
    config = q_learning.Config(env="-", exploration="epsilon", epsilon=0.2)
    q = np.zeros((1, 1, 4))
    q[0, 0, 2] = 1.0
    seen = seen_of(np.zeros((1, 4, 2)), np.zeros((1, 4)), np.zeros((1, 1)))
    seen = Seen(seen.moves, seen.rewards, seen.arrivals, seen.low, seen.high, {"q": q, "visits": q})
    planned = q_learning.plan(config, seen, np.random.default_rng(0))
    np.testing.assert_allclose(planned.policy[0, 0], [0.05, 0.05, 0.85, 0.05])


# -- UCBVI -----------------------------------------------------------------------------------------------------------------------------------------


def test_ucbvis_bonuses_are_those_of_the_paper() -> None:
    """H = 2, S = 2, A = 1, ten episodes; from state 0 three of four moves led to state 1, and the episode was over once."""
    moves = [[[0, 3, 1]], [[2, 0, 0]]]
    seen = seen_of(moves, [[2.0], [1.0]], [[4, 0], [0, 3]])
    following = np.array([0.25, 1.0, 0.0])
    log = math.log(5 * 2 * 1 * 20 / 0.05)
    config = ucb_vi.Config(env="-", episodes=10, bonus="hoeffding")
    np.testing.assert_allclose(ucb_vi.bonus(config, seen, 0, following)[:, 0], [7 * 2 * log / math.sqrt(4), 7 * 2 * log / math.sqrt(2)])
    config = ucb_vi.Config(env="-", episodes=10, bonus="bernstein")
    variance = 0.75 * 1.0**2 - 0.75**2
    unsure = 0.75 * min(100**2 * 2**3 * 2**2 * 1 * log**2 / 3, 2**2)
    by_hand = math.sqrt(8 * log * variance / 4) + 14 * 2 * log / (3 * 4) + math.sqrt(8 * unsure / 4)
    assert ucb_vi.bonus(config, seen, 0, following)[0, 0] == pytest.approx(by_hand)
    sure = math.sqrt(0.0) + 14 * 2 * log / (3 * 2) + 0.0
    assert ucb_vi.bonus(config, seen, 1, np.zeros(3))[1, 0] == pytest.approx(sure), "nothing follows the last step"


def test_ucbvi_plans_are_optimistic_fall_with_evidence_and_are_exact_in_the_end() -> None:
    process = random_mdp(4, 2, 3, horizon=5)
    exact = process.optimal()
    counts = 40
    moves = np.concatenate([process.transitions * counts, np.zeros((4, 2, 1))], -1)
    seen = seen_of(moves, process.rewards * counts, np.ones((5, 4)))
    optimistic = ucb_vi.plan(ucb_vi.Config(env="-", gamma=0.95, bonus_scale=0.01), seen, np.random.default_rng(0))
    bare = ucb_vi.plan(ucb_vi.Config(env="-", gamma=0.95, bonus_scale=0.0), seen, np.random.default_rng(0))
    assert (optimistic.values >= exact.action - 1e-12).all()
    np.testing.assert_allclose(bare.values, exact.action, atol=1e-12)
    later = Seen(seen.moves, seen.rewards, seen.arrivals, seen.low, seen.high, {"q": exact.action - 0.5})
    assert (ucb_vi.plan(ucb_vi.Config(env="-", gamma=0.95), later, np.random.default_rng(0)).values <= exact.action - 0.5).all()
    untried = seen_of(np.zeros((4, 2, 5)), np.zeros((4, 2)), np.zeros((5, 4)))
    assert (ucb_vi.plan(ucb_vi.Config(env="-"), untried, np.random.default_rng(0)).values == untried.high[:, None, None]).all()


# -- posterior sampling ----------------------------------------------------------------------------------------------------------------------------


def test_posterior_sampling_plans_in_the_process_when_it_has_seen_enough_of_it() -> None:
    process = random_mdp(4, 2, 5, horizon=4, discount=0.9)
    counts = 1e7
    moves = np.concatenate([process.transitions * counts, np.zeros((4, 2, 1))], -1)
    seen = seen_of(moves, process.rewards * counts, np.ones((4, 4)))
    draws = [posterior_sampling.plan(posterior_sampling.Config(env="-", gamma=0.9), seen, np.random.default_rng(i)).values for i in (0, 1)]
    np.testing.assert_allclose(draws[0], process.optimal().action, atol=5e-3)
    assert (draws[0] != draws[1]).any()


# -- MEX -------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.5], [0.01, 0.02, 0.0], [0.0, 0.0, 0.0], [1e-9, 5.0, 0.0], [40.0, 0.1, 0.0]])
def test_the_tilted_distribution_is_the_best_that_an_optimiser_finds(weights: list[float]) -> None:
    w, v = np.array(weights), np.array([0.3, 0.9, 1.4])

    def gained(p: np.ndarray) -> float:
        return float(p @ v + (w[w > 0] * np.log(np.maximum(p[w > 0], 1e-300))).sum())

    found = mex_tabular.tilt(w, v)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= 0).all()

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max())
        return e / e.sum()

    tries = [
        minimize(lambda x: -gained(softmax(x)), start, method="Nelder-Mead", options={"maxiter": 4000, "xatol": 1e-10, "fatol": 1e-14}).fun
        for start in (np.zeros(3), np.array([0.0, 0.0, 5.0]))
    ]
    assert gained(found) >= -min(tries) - 1e-9
    if not w.any():
        assert found.tolist() == [0, 0, 1]


def test_tilts_of_many_rows_are_those_of_each_alone() -> None:
    draws = np.random.default_rng(0)
    weights = draws.gamma(0.3, size=(4, 2, 5)) * (draws.random((4, 2, 5)) < 0.5)
    values = draws.random(5)
    many = mex_tabular.tilt(weights, values)
    alone = [[mex_tabular.tilt(weights[s, a], values) for a in range(2)] for s in range(4)]
    np.testing.assert_allclose(many, alone, atol=1e-12)


def best_by_force(seen: Seen, eta: float, grid: int = 81) -> float:
    """MEX's objective (up to the likelihood's own maximum) for 2 states, 2 actions and 2 steps, over all policies and a grid of models of the first step.

    An episode starts in state 0 and is never over. Only the first step's transitions matter: nothing follows the second.
    """
    reward = seen.mean_rewards(1.0)
    second = reward.max(-1)
    share = np.linspace(0, 1, grid)[1:-1]
    best = -math.inf
    for action in range(2):
        n = seen.moves[0, action]
        likely = np.where(n > 0, n / max(n.sum(), 1), 1)
        apart = sum(n[i] * (math.log(likely[i]) - np.log(p)) for i, p in enumerate((1 - share, share)) if n[i] > 0)
        value = reward[0, action] + (1 - share) * second[0] + share * second[1]
        best = max(best, float(np.max(value - eta / 2 * apart)))
        if n[0] == 0:
            best = max(best, float(reward[0, action] + second[1]))
    return best


@pytest.mark.parametrize("case", range(6))
def test_mex_reaches_the_objective_that_brute_force_finds_in_two_states(case: int) -> None:
    draws = np.random.default_rng(case)
    moves = np.zeros((2, 2, 3))
    moves[..., :2] = draws.integers(0, 6, (2, 2, 2))
    moves[0, :, 0] += 1
    counts = moves.sum(-1)
    seen = seen_of(moves, draws.random((2, 2)) * counts, [[5, 0], [3, 2]])
    for eta in (0.05, 0.3, 2.0):
        config = mex_tabular.Config(env="-", eta=eta)
        found = mex_tabular.maximise(config, seen).objective
        force = best_by_force(seen, eta, 4001)
        assert found == pytest.approx(force, abs=1e-4)


@pytest.mark.parametrize("case", range(4))
def test_mex_reaches_what_a_general_optimiser_finds_over_three_steps(case: int) -> None:
    """All 2^5 policies that matter, and free transitions for every step and state, by L-BFGS from several starts."""
    draws = np.random.default_rng(100 + case)
    moves = np.zeros((2, 2, 3))
    moves[..., :2] = draws.integers(1, 8, (2, 2, 2))
    seen = seen_of(moves, draws.random((2, 2)) * moves.sum(-1), [[5, 0], [3, 2], [1, 4]])
    reward, likely, n, eta = seen.mean_rewards(1.0), seen.frequencies, seen.moves, 0.15

    def objective(x: np.ndarray, actions: tuple[int, ...]) -> float:
        up = 1 / (1 + np.exp(-x))  # chance of state 1: step 0 from state 0, step 1 from states 0 and 1
        last = reward.max(-1)
        total, value = 0.0, []
        for i, state in ((1, 0), (2, 1)):
            a = actions[i]
            value.append(reward[state, a] + (1 - up[i]) * last[0] + up[i] * last[1])
        total = reward[0, actions[0]] + (1 - up[0]) * value[0] + up[0] * value[1]
        for i, state in ((0, 0), (1, 0), (2, 1)):
            a = actions[i]
            for j, p in enumerate((1 - up[i], up[i])):
                total -= eta / 3 * n[state, a, j] * (math.log(likely[state, a, j]) - math.log(p))
        return total

    force = max(
        -minimize(lambda x, chosen: -objective(x, chosen), start, args=(actions,), method="L-BFGS-B", bounds=[(-12, 12)] * 3).fun
        for actions in itertools.product(range(2), repeat=3)
        for start in (np.zeros(3), np.full(3, 2.0), np.full(3, -2.0))
    )
    found = mex_tabular.maximise(mex_tabular.Config(env="-", eta=eta, sweeps=50), seen).objective
    assert found == pytest.approx(force, abs=2e-5)


def test_sweeps_never_lower_mexs_objective_and_a_larger_weight_means_less_optimism() -> None:
    process = random_mdp(5, 3, 1, horizon=6, concentration=0.5)
    draws = np.random.default_rng(2)
    moves = np.zeros((5, 3, 6))
    for s, a in itertools.product(range(5), range(3)):
        moves[s, a, :5] = draws.multinomial(4, process.transitions[s, a])
    seen = seen_of(moves, process.rewards * moves.sum(-1), np.ones((6, 5)))
    config = mex_tabular.Config(env="-", eta=0.2)
    found = mex_tabular.sweep(config, seen, np.ones((6, 5)))
    rising = [found.objective]
    for _ in range(15):
        found = mex_tabular.sweep(config, seen, found.chance)
        rising.append(found.objective)
    assert min(np.diff(rising)) >= -1e-10
    assert rising[-1] > rising[0]
    plain = ucb_vi.plan(ucb_vi.Config(env="-", bonus_scale=0.0), seen, np.random.default_rng(0)).metrics["plan/value"]
    objectives = [mex_tabular.maximise(mex_tabular.Config(env="-", eta=eta), seen).objective for eta in (0.05, 0.5, 5.0, 1e6)]
    assert objectives == sorted(objectives, reverse=True)
    assert objectives[0] > plain + 0.05
    assert objectives[-1] == pytest.approx(plain, abs=1e-3), "with an infinite weight the most likely model is left"


# -- runs ------------------------------------------------------------------------------------------------------------------------------------------


def growth(regret: np.ndarray) -> float:
    """The exponent of cumulative regret over the run's last three quarters."""
    k = np.arange(1, len(regret) + 1)
    late = slice(len(k) // 4, None)
    return float(np.polyfit(np.log(k[late]), np.log(regret[late]), 1)[0])


def regret_of(method: str, out: Path, **options: Any) -> np.ndarray:
    run = telos.train(method, **RIVER, **{**COMMON, "episodes": 300, "batch_episodes": 2, "out": str(out), **options})
    return np.array([row["regret/cumulative"] for row in run.metrics()])


@pytest.mark.parametrize(
    ("method", "options"), [("ucb-vi", {"bonus_scale": 0.003}), ("mex-tabular", {"batch_episodes": 5}), ("posterior-sampling", {})]
)
def test_regret_on_river_swim_is_sublinear(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert growth(regret_of(method, tmp_path / "run", **options)) < 0.6


def test_without_exploration_regret_on_river_swim_is_linear(tmp_path: Path) -> None:
    assert growth(regret_of("q-learning", tmp_path / "run", exploration="epsilon", epsilon=0.05)) > 0.9


def test_regret_and_values_are_those_of_the_process(tmp_path: Path) -> None:
    """The cumulative regret is the sum of (optimum − value) over episodes; the last greedy policy's value is the process's own figure."""
    run = telos.train("ucb-vi", **RIVER, **COMMON, episodes=30, batch_episodes=3, bonus_scale=0.001, out=str(tmp_path / "run"))
    process = river_swim(4, horizon=8)
    optimum = float(process.start @ process.optimal().state[0])
    rows = run.metrics()
    np.testing.assert_allclose(
        [row["regret/cumulative"] for row in rows], np.cumsum([3 * (optimum - row["policy/value"]) for row in rows]), atol=1e-9
    )
    kept = load_file(run.path / "policy" / "by_step.safetensors")
    assert run.facts["exact"]["greedy"] == pytest.approx(process.performance(kept["policy"]))
    saved = telos.load(run.path)
    stationary = np.eye(2)[saved.predict(np.arange(4))[0]]
    assert run.facts["exact"]["stationary"] == pytest.approx(process.performance(stationary))
    weights = saved.body[0]
    assert weights.weight.shape == (2, 4)
    assert not weights.bias.any()


def test_a_state_that_ends_the_episode_is_told_from_the_end_of_the_horizon(tmp_path: Path) -> None:
    """In a lock every episode of three steps ends in the terminal state: nothing may be hoped for after it."""
    run = telos.train(
        "ucb-vi",
        env="telos/Lock-v0",
        env_options=["length=3", "actions=2", "seed=4"],
        episodes=150,
        bonus_scale=0.001,
        out=str(tmp_path / "run"),
        **COMMON,
    )
    process = lock(3, 2, 4)
    assert run.facts["exact"]["greedy"] == pytest.approx(float(process.start @ process.optimal().state[0]))


class StopAt:
    def __init__(self, step: int) -> None:
        self.step = step

    def started(self, *_: Any) -> None: ...

    def stepped(self, step: int, metrics: Any) -> None:
        if step == self.step:
            raise KeyboardInterrupt

    def ended(self, status: str) -> None: ...


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("own", [False, True])
def test_a_killed_run_continues_bit_for_bit(method: str, own: bool, tmp_path: Path, line: Callable[..., str]) -> None:
    """In an environment whose state is saved and in one whose episode is repeated."""
    where: dict[str, Any] = {"env": line(), "horizon": 6} if own else RIVER
    options = {**where, **COMMON, "episodes": 20, "batch_episodes": 2, "checkpoint_every": 2, "eval_every": 3}
    whole = telos.train(method, **options, out=str(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        train(method, {**options, "out": str(tmp_path / "cut")}, callbacks=[StopAt(5)])  # type: ignore[list-item]
    cut = resume(tmp_path / "cut")
    strip = [[{k: v for k, v in row.items() if not k.startswith("time/")} for row in run.metrics()] for run in (whole, cut)]
    assert strip[0] == strip[1]
    assert ("regret/cumulative" in strip[0][0]) is not own
    tables = [load_file(run.path / "policy" / "by_step.safetensors") for run in (whole, cut)]
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])
    assert whole.facts["evaluation"] == cut.facts["evaluation"]


LINE = '''
import gymnasium


class Line(gymnasium.Env):
    """Walk right from place 5 to place 8; choices are counted from 1."""

    def __init__(self, steps=6):
        self.observation_space = gymnasium.spaces.Discrete(4, start=5)
        self.action_space = gymnasium.spaces.Discrete(2, start=1)
        self.limit = steps

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = 5, 0
        return self.place, {}

    def step(self, action):
        assert action in (1, 2)
        self.steps += 1
        slip = self.np_random.random() < 0.2
        self.place = min(8, self.place + 1) if (action == 2) != slip else max(5, self.place - 1)
        return self.place, float(self.place == 8), self.place == 8, self.steps >= self.limit, {}
'''


@pytest.fixture
def line(tmp_path: Path) -> Callable[..., str]:
    def write() -> str:
        (tmp_path / "line.py").write_text(LINE)
        return f"{tmp_path / 'line.py'}:Line"

    return write


@pytest.mark.parametrize("method", ["ucb-vi", "mex-tabular"])
def test_an_environment_of_ones_own_with_spaces_that_start_anywhere_is_learned(
    method: str, tmp_path: Path, line: Callable[..., str]
) -> None:
    """The best policy walks right: three successes of chance 0.8 within six steps, about 0.93 with the way back counted."""
    options = {"ucb-vi": {"bonus_scale": 0.002}, "mex-tabular": {}}[method]
    run = telos.train(
        method,
        env=line(),
        horizon=6,
        episodes=200,
        batch_episodes=2,
        out=str(tmp_path / "run"),
        **{**COMMON, "eval_episodes": 100},
        **options,
    )
    assert "exact" not in run.facts
    assert run.facts["evaluation"]["evaluation/return"] > 0.8
    assert telos.load(run.path).predict(np.array([5, 6, 7]))[0].tolist() == [2, 2, 2]


def test_a_horizon_that_does_not_fit_and_spaces_that_are_not_finite_are_refused(tmp_path: Path, line: Callable[..., str]) -> None:
    where = {**COMMON, "out": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="does not say how long an episode may be: give --horizon"):
        telos.train("ucb-vi", env=line(), **where)
    with pytest.raises(UsageError, match="--horizon 7 is shorter than the episodes of telos/RiverSwim-v0, which may have 8 steps"):
        telos.train("ucb-vi", **RIVER, horizon=7, **where)
    with pytest.raises(UsageError, match="needs Discrete observations and actions"):
        telos.train("ucb-vi", env="CartPole-v1", **where)
    with pytest.raises(UsageError, match="--epsilon has no effect with --exploration ucb"):
        telos.train("q-learning", **RIVER, epsilon=0.3, **where)
    with pytest.raises(Failure, match="longer than the 4 steps that --horizon says"):
        telos.train("ucb-vi", env=line(), horizon=4, **{**COMMON, "out": str(tmp_path / "long")}, episodes=50)
