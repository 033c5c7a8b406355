"""Hindsight: goals that were reached later in the same episode, and what the environment says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import telos
from support import numbers, program_of, written_weights
from telos.algorithms.run import resume, train
from telos.core.errors import UsageError
from telos.core.loop import Interrupted
from telos.data.hindsight import Hindsight
from telos.data.replay import Replay
from telos.environments.maze import REACHED
from telos.environments.registry import make_environments

GAMMA, COPIES = 0.9, 2
SLICES = {"achieved_goal": slice(0, 2), "desired_goal": slice(2, 4), "observation": slice(4, 5)}


class Near:
    """Within half a metre is 1, and the end."""

    name = "Near"

    def judge_goals(self, achieved: np.ndarray, desired: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        near = np.square(achieved - desired).sum(-1) < 0.25
        return near.astype(np.float64), near


def filled(steps: int, rows: int = 400, capacity: int = 300) -> tuple[Replay, Hindsight, dict[tuple[int, int], tuple[int, int]]]:
    """Random episodes side by side, with hindsight of all steps; and for each place the first and the last row of its episode."""
    draws = np.random.default_rng(0)
    replay = Replay(capacity * COPIES, COPIES, ((5,), np.float32), ((1,), np.float32), slack=(rows - capacity) * COPIES)
    hindsight = Hindsight(replay, Near(), SLICES, 1.0)
    spans: dict[tuple[int, int], tuple[int, int]] = {}
    begun = [0] * COPIES
    for row in range(steps):
        ended = draws.random(COPIES) < 0.1
        seen, following = draws.normal(size=(2, COPIES, 5)).astype(np.float32)
        action, reward = np.zeros((COPIES, 1), np.float32), np.full(COPIES, -7.0)
        replay.add(observation=seen, next_observation=following, action=action, reward=reward, terminated=ended, ended=ended)
        hindsight.note(ended)
        for copy in range(COPIES):
            for place in range(begun[copy], row + 1):
                spans[place, copy] = (begun[copy], row)
            begun[copy] = row + 1 if ended[copy] else begun[copy]
    return replay, hindsight, spans


def test_goals_are_achieved_later_in_the_same_episode_and_rewards_are_theirs() -> None:
    replay, hindsight, spans = filled(350)
    places = replay.draw(4000, np.random.default_rng(1))
    batch = replay.take(places, gamma=GAMMA)
    found = hindsight.relabel(places, batch, GAMMA, np.random.default_rng(2))
    seen_last = 0
    for i, place in enumerate(places):
        row, copy = divmod(int(place), COPIES)
        last = spans[row, copy][1]
        goal = found.observation[i, 2:4].numpy()
        later = replay.next_observation[np.arange(row, last + 1) % replay.rows, copy][:, :2]
        at = np.flatnonzero((later == goal).all(1))
        assert len(at) == 1
        seen_last += at[0] == last - row
        assert np.array_equal(found.next_observation[i, 2:4].numpy(), goal)
        near = np.square(found.next_observation[i, :2].numpy() - goal).sum() < 0.25
        assert found.reward[i] == float(near)
        assert float(found.discount[i]) == pytest.approx(0.0 if near else GAMMA)
    assert 0 < seen_last < len(places)
    # What is no goal stays, and so does the replay.
    for name in ("observation", "next_observation"):
        assert torch.equal(getattr(found, name)[:, [0, 1, 4]], getattr(batch, name)[:, [0, 1, 4]])
    assert torch.equal(replay.take(places, gamma=GAMMA).observation, batch.observation)


def test_future_steps_are_drawn_alike() -> None:
    replay, hindsight, spans = filled(60)
    row = max((span[1] - r, r) for (r, copy), span in spans.items() if copy == 0)[1]
    last = spans[row, 0][1]
    places = np.full(20_000, row * COPIES)
    found = hindsight.relabel(places, replay.take(places, gamma=GAMMA), GAMMA, np.random.default_rng(3))
    later = replay.next_observation[row : last + 1, 0, :2]
    counts = np.array([(found.observation[:, 2:4].numpy() == goal).all(1).sum() for goal in later])
    expected = len(places) / len(later)
    assert len(later) > 3
    assert ((counts - expected) ** 2 / expected).sum() < 3 * len(later)


def test_a_share_of_the_steps_keeps_its_goal() -> None:
    replay, hindsight, _ = filled(200)
    hindsight.share = 0.8
    places = replay.draw(5000, np.random.default_rng(1))
    batch = replay.take(places, gamma=GAMMA)
    found = hindsight.relabel(places, batch, GAMMA, np.random.default_rng(2))
    kept = (found.observation == batch.observation).all(1)
    assert float(kept.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(found.reward[kept], batch.reward[kept])
    assert torch.equal(found.discount[kept], batch.discount[kept])


def test_episodes_are_found_again_after_a_replay_was_loaded() -> None:
    replay, hindsight, _ = filled(1000)  # the ring has been overwritten twice
    places = replay.draw(500, np.random.default_rng(1))
    batch = replay.take(places, gamma=GAMMA)
    before = hindsight.relabel(places, batch, GAMMA, np.random.default_rng(2))
    again = Hindsight(replay, Near(), SLICES, 1.0)
    again.rebuild()
    after = again.relabel(places, batch, GAMMA, np.random.default_rng(2))
    assert torch.equal(before.observation, after.observation)
    assert torch.equal(before.reward, after.reward)


OPTIONS: dict[str, Any] = {
    "env": "telos/PointMazeU-v0",
    "env_options": ["continuing_task=false", "max_episode_steps=20"],
    "hindsight": 0.8,
    "num_envs": 2,
    "total_steps": 240,
    "iteration_steps": 40,
    "start_steps": 20,
    "random_steps": 20,
    "batch_size": 16,
    "train_every": 8,
    "replay_size": 100,
    "hidden": [16],
    "eval_episodes": 1,
    "threads": 1,
}


def test_a_run_with_hindsight_continues_bit_for_bit(tmp_path: Path) -> None:
    class Stop:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: Any) -> None:
            if step == 3:
                raise KeyboardInterrupt

        def ended(self, status: str) -> None: ...

    for on_disk in (True, False):
        options = OPTIONS | {"replay_on_disk": on_disk, "checkpoint_every": 1}
        whole = train("ddpg", options | {"out": str(tmp_path / f"whole-{on_disk}")})
        stopped = tmp_path / f"stopped-{on_disk}"
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            train("ddpg", options | {"out": str(stopped)}, callbacks=[Stop()])
        resumed = resume(stopped)
        assert numbers(resumed) == numbers(whole)
        final, expected = (written_weights(run.path / "policy") for run in (resumed, whole))
        assert final.keys() == expected.keys()
        assert all(torch.equal(final[name], expected[name]) for name in expected)


def test_mazes_judge_goals_as_their_steps_do() -> None:
    maze = make_environments("telos/PointMazeU-v0", 3, options={"continuing_task": False})
    achieved, desired = np.zeros((2, 2)), np.array([[0.0, REACHED * 0.99], [0.0, REACHED * 1.01]])
    judged = maze.judge_goals(achieved, desired)
    assert judged is not None
    assert judged[0].tolist() == [1.0, 0.0]
    assert judged[1].tolist() == [True, False]
    going = make_environments("telos/PointMazeU-v0", 1).judge_goals(achieved, desired)
    assert going is not None
    assert going[1].tolist() == [False, False]


def test_what_cannot_be_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--hindsight needs goals: .* CartPole-v1 has none"):
        program_of("dqn", {"env": "CartPole-v1", "hindsight": 0.8}, tmp_path / "a")
    with pytest.raises(UsageError, match="--hindsight gives single steps another goal"):
        program_of("sac", OPTIONS | {"n_step": 3}, tmp_path / "b")


FLIP = '''
import gymnasium
import numpy as np

BITS = 8


class Flip(gymnasium.Env):
    """Flip bits until they are those that are asked for; a reward of 0 for that, else -1 (Andrychowicz et al. 2017, section 3.1)."""

    observation_space = gymnasium.spaces.Dict(
        {key: gymnasium.spaces.Box(0, 1, (BITS,), np.float32) for key in ("achieved_goal", "desired_goal", "observation")}
    )
    action_space = gymnasium.spaces.Discrete(BITS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.bits, self.goal = self.np_random.integers(0, 2, (2, BITS)).astype(np.float32)
        self.steps = 0
        return self._look(), {}

    def _look(self):
        return {"achieved_goal": self.bits.copy(), "desired_goal": self.goal, "observation": self.bits.copy()}

    def compute_reward(self, achieved_goal, desired_goal, info):
        return (achieved_goal == desired_goal).all(-1) - 1.0

    def compute_terminated(self, achieved_goal, desired_goal, info):
        return (achieved_goal == desired_goal).all(-1)

    def step(self, action):
        self.bits[action] = 1 - self.bits[action]
        self.steps += 1
        done = bool(self.compute_terminated(self.bits, self.goal, {}))
        return self._look(), float(self.compute_reward(self.bits, self.goal, {})), done, self.steps >= BITS, {"is_success": done}
'''


@pytest.mark.long
def test_bits_are_flipped_with_hindsight_and_not_without(tmp_path: Path) -> None:
    (tmp_path / "flip.py").write_text(FLIP)
    options = {"env": f"{tmp_path / 'flip.py'}:Flip", "total_steps": 16_000, "start_steps": 500, "train_every": 4, "gamma": 0.98}
    options |= {"learning_rate": 1e-3, "hidden": [128], "eval_episodes": 100, "epsilon_steps": 8000, "replay_on_disk": False}
    solved = {}
    for share in (0.0, 0.8):
        run = telos.train("dqn", **options, hindsight=share, out=str(tmp_path / f"{share}"))
        solved[share] = run.facts["evaluation"]["evaluation/is_success"]
    assert solved[0.8] > 0.8
    assert solved[0.0] < 0.3
