"""Offline data of control from files of every kind, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path

import gymnasium
import h5py
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

import telos
from telos.core.errors import DataError, UsageError
from telos.data.minari_folders import write_minari
from telos.data.step_readers import holds_steps, read_run, read_steps
from telos.data.steps import Steps, joined

# Two episodes: the first of 3 steps is cut, the second of 2 terminates. State 10 e + t at time t of episode e.
SEEN = np.array([0, 1, 2, 10, 11.0], np.float32)[:, None]
LED = np.array([1, 2, 3, 11, 12.0], np.float32)[:, None]
ACTIONS = np.linspace(-1, 1, 10, dtype=np.float32).reshape(5, 2)
REWARDS = np.array([1, 2, 3, 4, 5], np.float32)


def hdf5(path: Path, **arrays) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file[name.replace("__", "/")] = value
    return path


def d4rl(path: Path, leave_out: tuple[str, ...] = (), **more) -> Path:
    arrays = {
        "observations": SEEN,
        "actions": ACTIONS,
        "rewards": REWARDS,
        "next_observations": LED,
        "terminals": np.array([0, 0, 0, 0, 1], bool),
        "timeouts": np.array([0, 0, 1, 0, 0], bool),
    }
    return hdf5(path, **{name: value for name, value in (arrays | more).items() if name not in leave_out})


def assert_the_two_episodes(steps: Steps) -> None:
    np.testing.assert_array_equal(steps.observation, SEEN)
    np.testing.assert_array_equal(steps.next_observation, LED)
    np.testing.assert_array_equal(steps.action, ACTIONS)
    assert steps.reward.tolist() == REWARDS.tolist()
    assert steps.terminated.tolist() == [False, False, False, False, True]
    assert steps.ended.tolist() == [False, False, True, False, True]


# -- D4RL -------------------------------------------------------------------------------------------------------------------------------------------


def test_d4rl_with_everything_is_read_as_it_stands(tmp_path: Path):
    steps = read_steps(d4rl(tmp_path / "hopper.hdf5", rewards=REWARDS[:, None]))
    assert_the_two_episodes(steps)
    assert steps.counts == {}
    assert steps.source == "hopper.hdf5"


def test_the_kind_is_seen_in_the_content_and_not_in_the_name(tmp_path: Path):
    assert_the_two_episodes(read_steps(d4rl(tmp_path / "data.npz")))
    np.savez(tmp_path / "x.npz", observations=SEEN, actions=ACTIONS, terminals=[0, 0, 1, 0, 1])
    (tmp_path / "x.npz").rename(tmp_path / "data.hdf5")
    assert read_steps(tmp_path / "data.hdf5").provenance["format"].startswith("OGBench")


def test_without_next_observations_a_cut_step_goes_and_a_terminal_one_stays(tmp_path: Path):
    steps = read_steps(d4rl(tmp_path / "a.hdf5", leave_out=("next_observations",)))
    assert steps.reward.tolist() == [1, 2, 4, 5]
    assert isinstance(steps.next_observation, np.ndarray)
    assert steps.next_observation[:, 0].tolist() == [1, 2, 11, 11]
    assert steps.ended.tolist() == [False, True, False, True]
    assert steps.terminated.tolist() == [False, False, False, True]
    assert {name.split(",")[-1].strip(): count for name, count in steps.counts.items()}["left out"] == 1
    assert len(steps.counts) == 2


def test_without_next_observations_the_end_of_the_file_is_a_cut(tmp_path: Path):
    steps = read_steps(d4rl(tmp_path / "a.hdf5", leave_out=("next_observations",), terminals=np.zeros(5, bool)))
    assert steps.reward.tolist() == [1, 2, 4]
    assert steps.ended.tolist() == [False, True, True]
    assert not steps.terminated.any()
    assert steps.counts["episodes that the end of the file cuts"] == 1


def test_a_file_that_marks_no_ends_is_refused_and_says_what_is_missing(tmp_path: Path):
    with pytest.raises(
        DataError, match=r"a\.hdf5: terminals and timeouts: are both missing.*holds actions, next_observations, observations, rewards"
    ):
        read_steps(d4rl(tmp_path / "a.hdf5", leave_out=("terminals", "timeouts")))
    with pytest.raises(DataError, match=r"b\.hdf5: rewards: is missing"):
        read_steps(d4rl(tmp_path / "b.hdf5", leave_out=("rewards",)))


def test_without_timeouts_cuts_are_where_the_next_row_goes_on_from_elsewhere(tmp_path: Path):
    steps = read_steps(d4rl(tmp_path / "a.hdf5", leave_out=("timeouts",)))
    assert_the_two_episodes(steps)
    assert [count for name, count in steps.counts.items() if "cuts found" in name] == [1]


def test_without_timeouts_and_next_observations_cuts_need_a_horizon(tmp_path: Path):
    path = d4rl(tmp_path / "a.hdf5", leave_out=("timeouts", "next_observations"), terminals=np.zeros(5, bool))
    with pytest.raises(DataError, match=r"a\.hdf5: timeouts: is missing, next_observations too"):
        read_steps(path)
    steps = read_steps(path, horizon=3)
    assert steps.reward.tolist() == [1, 2, 4]
    # Where the last step is terminal, terminals may be all there is.
    whole = d4rl(tmp_path / "b.hdf5", leave_out=("timeouts", "next_observations"), terminals=np.array([0, 0, 1, 0, 1], bool))
    assert read_steps(whole).lengths.tolist() == [3, 2]


def test_infos_are_not_read_and_counted(tmp_path: Path):
    """As in antmaze and kitchen: infos/goal beside the steps."""
    steps = read_steps(d4rl(tmp_path / "antmaze.hdf5", infos__goal=np.zeros((5, 2)), infos__qpos=np.zeros((5, 3)), metadata__algorithm=3))
    assert_the_two_episodes(steps)
    assert steps.counts == {"arrays that are not read (infos/goal, infos/qpos, metadata/algorithm)": 3}


def test_a_terminal_step_inside_a_trajectory_ends_the_episode(tmp_path: Path):
    """Antmaze marks the goal as terminal and goes on."""
    steps = read_steps(d4rl(tmp_path / "antmaze.hdf5", terminals=np.array([0, 1, 1, 0, 1], bool)))
    assert steps.ended.tolist() == [False, True, True, False, True]
    assert steps.terminated.tolist() == [False, True, True, False, True]
    assert steps.counts == {"steps that are both terminal and cut, read as terminal": 1}


def test_a_bad_number_is_named_by_file_key_episode_and_step(tmp_path: Path):
    bad = SEEN.copy()
    bad[4, 0] = np.nan
    with pytest.raises(DataError, match=r"^a\.hdf5: observations, episode 1, step 1, entry \[0\]: is nan"):
        read_steps(d4rl(tmp_path / "a.hdf5", observations=bad))
    with pytest.raises(DataError, match=r"a\.hdf5: actions: has 4 rows, and observations has 5"):
        read_steps(d4rl(tmp_path / "a.hdf5", actions=ACTIONS[:4]))
    with pytest.raises(DataError, match=r"a\.hdf5: rewards: has the shape \(4,\)"):
        read_steps(d4rl(tmp_path / "a.hdf5", rewards=REWARDS[:4]))


def test_an_environment_gives_the_spaces_and_refuses_data_of_another_shape(tmp_path: Path):
    arrays = {"observations": np.zeros((5, 3), np.float32), "next_observations": np.zeros((5, 3), np.float32), "actions": ACTIONS[:, :1]}
    steps = read_steps(d4rl(tmp_path / "a.hdf5", **arrays), env="Pendulum-v1")
    assert steps.action_space == gymnasium.make("Pendulum-v1").action_space
    assert steps.env == "Pendulum-v1"
    with pytest.raises(DataError, match=r"b\.hdf5: observations: has the shape \(1,\) a step"):
        read_steps(d4rl(tmp_path / "b.hdf5"), env="Pendulum-v1")


# -- OGBench ----------------------------------------------------------------------------------------------------------------------------------------

# As published: each trajectory has a further row for its last observation, with an action that was never taken.
OG_SEEN = np.array([0, 1, 2, 3, 10, 11, 12.0], np.float32)[:, None]
OG_ACTIONS = np.concatenate([ACTIONS[:3], [[9, 9]], ACTIONS[3:], [[9, 9]]])
OG_FINAL = np.array([0, 0, 0, 1, 0, 0, 1.0])


def npz(path: Path, **arrays) -> Path:
    np.savez(path, **arrays)
    return path


def test_ogbench_as_published(tmp_path: Path):
    path = npz(tmp_path / "og.npz", observations=OG_SEEN, actions=OG_ACTIONS, terminals=OG_FINAL, qpos=np.zeros((7, 2)))
    steps = read_steps(path)
    np.testing.assert_array_equal(steps.observation, SEEN)
    np.testing.assert_array_equal(steps.next_observation, LED)
    np.testing.assert_array_equal(steps.action, ACTIONS)
    assert steps.ended.tolist() == [False, False, True, False, True]
    assert not steps.terminated.any(), "the end of a trajectory is not the end of the task"
    assert steps.reward.tolist() == [0] * 5
    assert steps.counts == {"arrays that are not read (qpos)": 1, "steps without a reward in the file (0 stands there)": 5}


def test_all_layouts_of_ogbench_hold_the_same_steps(tmp_path: Path):
    rewards, masks = np.array([-1, -1, -1, 7, -1, 0, 7.0]), np.array([1, 1, 1, 1, 1, 0, 1.0])
    kept = OG_FINAL == 0
    published = npz(tmp_path / "p.npz", observations=OG_SEEN, actions=OG_ACTIONS, terminals=OG_FINAL, rewards=rewards, masks=masks)
    early = np.maximum(OG_FINAL, np.append(OG_FINAL[1:], 1))
    compact = npz(
        tmp_path / "c.npz",
        observations=OG_SEEN,
        actions=OG_ACTIONS,
        terminals=early,
        valids=1 - OG_FINAL,
        rewards=rewards,
        masks=masks,
    )
    regular = npz(
        tmp_path / "r.npz",
        observations=SEEN,
        next_observations=LED,
        actions=ACTIONS,
        terminals=[0, 0, 1, 0, 1],
        rewards=rewards[kept],
        masks=masks[kept],
    )
    for path in (published, compact, regular):
        steps = read_steps(path)
        np.testing.assert_array_equal(steps.observation, SEEN)
        np.testing.assert_array_equal(steps.next_observation, LED)
        np.testing.assert_array_equal(steps.action, ACTIONS)
        assert steps.reward.tolist() == [-1, -1, -1, -1, 0]
        assert steps.terminated.tolist() == [False, False, False, False, True]
        assert steps.ended.tolist() == [False, False, True, False, True]
        assert not any(steps.counts.values())


def test_a_mask_inside_a_trajectory_ends_the_episode_and_is_counted(tmp_path: Path):
    masks = np.array([1, 0, 1, 1, 1, 1, 1.0])
    steps = read_steps(
        npz(tmp_path / "a.npz", observations=OG_SEEN, actions=OG_ACTIONS, terminals=OG_FINAL, rewards=np.zeros(7), masks=masks)
    )
    assert steps.terminated.tolist() == [False, True, False, False, False]
    assert steps.ended.tolist() == [False, True, True, False, True]
    assert steps.counts == {"steps whose mask ends the episode inside a trajectory": 1}


def test_ogbench_files_that_lack_something_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"a\.npz: terminals: is missing; the file holds actions, observations"):
        read_steps(npz(tmp_path / "a.npz", observations=OG_SEEN, actions=OG_ACTIONS))
    with pytest.raises(DataError, match=r"b\.npz: terminals: marks no end"):
        read_steps(npz(tmp_path / "b.npz", observations=OG_SEEN, actions=OG_ACTIONS, terminals=np.zeros(7)))
    with pytest.raises(DataError, match=r"c\.npz: observations: cannot be read.*never opened"):
        read_steps(npz(tmp_path / "c.npz", observations=np.array([{}, None], dtype=object), actions=OG_ACTIONS, terminals=OG_FINAL))


# -- Minari -----------------------------------------------------------------------------------------------------------------------------------------


def drawn(space: gymnasium.Space, observation_space: gymnasium.Space, lengths=(3, 1, 4)) -> Steps:
    """Episodes of random observations and actions, the last of which terminates."""
    space.seed(1)
    observation_space.seed(2)
    parts = []
    for number, length in enumerate(lengths):
        seen = [observation_space.sample() for _ in range(length + 1)]
        if isinstance(observation_space, Dict):
            arrays = {key: np.stack([one[key] for one in seen]) for key in observation_space.spaces}
            before, after = ({key: value[rows] for key, value in arrays.items()} for rows in (slice(0, -1), slice(1, None)))
        else:
            before, after = np.stack(seen)[:-1], np.stack(seen)[1:]
        terminated, ended = np.zeros(length, bool), np.zeros(length, bool)
        ended[-1], terminated[-1] = True, number == len(lengths) - 1
        actions = np.stack([space.sample() for _ in range(length)])
        spaces = {"observation_space": observation_space, "action_space": space}
        parts.append(Steps.of(before, actions, np.arange(length) + number, after, terminated, ended, source=f"part {number}", **spaces))
    return joined(parts, "drawn")


SPACES = [
    (Box(-2, 2, (3,), np.float32), Box(-np.inf, np.inf, (2,), np.float64)),
    (Discrete(4, start=1), Dict({"where": Box(-1, 1, (2,), np.float64), "what": Discrete(3)})),
    (MultiDiscrete([2, 3]), MultiBinary(3)),
    (Discrete(2), Box(0, 255, (40, 36, 3), np.uint8)),
]


def assert_same(one: Steps, other: Steps) -> None:
    for name in ("observation", "action", "reward", "next_observation", "terminated", "ended"):
        a, b = getattr(one, name), getattr(other, name)
        for key in a if isinstance(a, dict) else [None]:
            left, right = (a, b) if key is None else (a[key], b[key])
            np.testing.assert_array_equal(left, right)
            assert left.dtype == right.dtype, name
    assert one.observation_space == other.observation_space
    assert one.action_space == other.action_space


@pytest.mark.parametrize(("action_space", "observation_space"), SPACES)
def test_what_is_written_is_read_back(tmp_path: Path, action_space: gymnasium.Space, observation_space: gymnasium.Space):
    steps = drawn(action_space, observation_space)
    folder = write_minari(
        tmp_path / "made-v3", steps, "Own-v0", {"run": "runs/x", "seed": 3, "commit": "abc", "command": "telos data make"}
    )
    found = read_steps(folder)
    assert_same(found, steps)
    assert found.env == "Own-v0"
    assert found.source == str(folder)
    assert (found.provenance["dataset_id"], found.provenance["format"]) == ("made-v3", "Minari")
    assert (found.provenance["seed"], found.provenance["command"]) == (3, "telos data make")
    assert found.counts == {}
    for place in (folder / "data", folder / "data" / "main_data.hdf5"):
        assert_same(read_steps(place), steps)


@pytest.mark.parametrize(("action_space", "observation_space"), SPACES)
def test_minari_opens_what_is_written(tmp_path: Path, action_space: gymnasium.Space, observation_space: gymnasium.Space):
    minari = pytest.importorskip("minari")
    steps = drawn(action_space, observation_space)
    write_minari(tmp_path / "made-v3", steps)
    dataset = minari.MinariDataset(tmp_path / "made-v3" / "data")
    assert (dataset.total_episodes, dataset.total_steps, dataset.spec.dataset_id) == (3, 8, "made-v3")
    assert dataset.action_space == action_space
    assert dataset.observation_space == observation_space
    for episode, rows in zip(dataset.iterate_episodes(), steps.episodes, strict=True):
        np.testing.assert_array_equal(episode.rewards, steps.reward[rows])
        np.testing.assert_array_equal(episode.terminations, steps.terminated[rows])
        np.testing.assert_array_equal(episode.truncations, steps.ended[rows] & ~steps.terminated[rows])
        np.testing.assert_array_equal(episode.actions, steps.action[rows])
        for key in steps.observation if isinstance(steps.observation, dict) else [None]:
            whole = episode.observations if key is None else episode.observations[key]
            before, after = (value if key is None else value[key] for value in (steps.observation, steps.next_observation))
            np.testing.assert_array_equal(whole[:-1], before[rows])
            np.testing.assert_array_equal(whole[1:], after[rows])


def test_minari_finds_it_by_its_id_and_makes_the_environment_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    space = gymnasium.make("CartPole-v1").observation_space
    steps = drawn(Discrete(2), Box(-1, 1, (4,), np.float32))
    write_minari(tmp_path / "cartpole" / "random-v0", steps, "CartPole-v1", {"ref_min_score": 20.0, "ref_max_score": 500.0})
    dataset = minari.load_dataset("cartpole/random-v0")
    assert dataset.recover_environment().observation_space == space
    assert minari.get_normalized_score(dataset, np.array([260.0])) == pytest.approx(0.5)
    assert "cartpole/random-v0" in minari.list_local_datasets()
    found = read_steps("cartpole/random-v0")
    assert_same(found, steps)
    assert found.provenance["ref_max_score"] == 500
    with pytest.raises(
        UsageError, match=r"no data set of this id under .* \(did you mean 'cartpole/random-v0'\?\).*minari download cartpole/rondom-v0"
    ):
        read_steps("cartpole/rondom-v0")


def test_what_minari_writes_is_read(tmp_path: Path):
    """Written by minari's own storage, pictures as JPEG."""
    minari = pytest.importorskip("minari")
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    place = tmp_path / "other-v0" / "data"
    place.mkdir(parents=True)
    pictures = Dict({"eye": Box(0, 255, (32, 32, 3), np.uint8), "self": Box(-1, 1, (2,), np.float32)})
    storage = MinariStorage.new(place, pictures, Discrete(3))
    grey = np.repeat(np.array([10, 200, 60], np.uint8), 32 * 32 * 3).reshape(3, 32, 32, 3)
    inner = np.arange(6, dtype=np.float32).reshape(3, 2) / 10
    flags = ([False, False], [False, True])
    storage.update_episodes(
        [EpisodeBuffer(None, None, None, {"eye": list(grey), "self": inner}, [0, 2], [1.0, 2.0], *flags, {"x": [1, 2, 3]})]
    )
    storage.update_metadata({"dataset_id": "other-v0", "minari_version": minari.__version__})
    steps = read_steps(tmp_path / "other-v0")
    assert isinstance(steps.observation, dict)
    assert isinstance(steps.next_observation, dict)
    np.testing.assert_allclose(steps.observation["eye"].astype(int), grey[:2], atol=2)
    np.testing.assert_allclose(steps.next_observation["self"], inner[1:])
    assert (steps.action.tolist(), steps.reward.tolist(), steps.ended.tolist()) == ([0, 2], [1, 2], [False, True])
    assert not steps.terminated.any()
    assert steps.counts == {"episodes whose infos are not read": 1}


def episodes_file(folder: Path, *episodes: dict, **metadata) -> Path:
    (folder / "data").mkdir(parents=True)
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for number, episode in enumerate(episodes):
            group = file.create_group(f"episode_{number}")
            for name, value in episode.items():
                group[name] = value
    if metadata:
        (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    return folder


def episode(length: int, **other) -> dict:
    found = {
        "observations": np.zeros((length + 1, 2)),
        "actions": np.zeros((length, 1)),
        "rewards": np.ones(length),
        "terminations": np.zeros(length, bool),
        "truncations": np.zeros(length, bool),
    }
    return {name: value for name, value in (found | other).items() if value is not None}


def test_episodes_come_in_the_order_of_their_numbers(tmp_path: Path):
    folder = episodes_file(tmp_path / "a", *[episode(1, rewards=np.array([float(i)])) for i in range(12)])
    steps = read_steps(folder)
    assert steps.reward.tolist() == list(range(12))
    assert steps.counts == {"episodes without a mark of their end, read as cut": 12}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (episode(3, observations=np.zeros((3, 2))), r"episode_1/observations: has 3 rows; 3 rewards need 4 \(one more than steps"),
        (episode(3, actions=np.zeros((2, 1))), "episode_1/actions: has 2 rows; 3 rewards need 3"),
        (episode(3, terminations=None), "episode_1/terminations: is missing; the episode holds"),
        (episode(3, rewards=np.array([0, np.nan, 0])), "episode_1/rewards, step 1: is nan"),
        (episode(3, observations=np.full((4, 2), np.inf)), r"episode_1/observations, step 0, entry \[0\]: is inf"),
    ],
)
def test_a_damaged_episode_is_named(tmp_path: Path, bad: dict, message: str):
    with pytest.raises(DataError, match=message):
        read_steps(episodes_file(tmp_path / "a", episode(2), bad))


def test_an_end_inside_an_episode_divides_it_and_empty_ones_are_counted(tmp_path: Path):
    inside = episode(4, terminations=np.array([0, 1, 0, 1], bool), truncations=np.array([0, 0, 0, 1], bool))
    steps = read_steps(episodes_file(tmp_path / "a", inside, episode(0)))
    assert steps.lengths.tolist() == [2, 2]
    assert steps.terminated.tolist() == [False, True, False, True]
    assert steps.counts == {
        "steps that are both terminal and cut, read as terminal": 1,
        "episodes divided at a mark of an end inside them": 1,
        "episodes without a step, left out": 1,
    }


def test_metadata_that_do_not_fit_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match=r"says 5 episodes, and main_data\.hdf5 holds 1"):
        read_steps(episodes_file(tmp_path / "a", episode(2), total_episodes=5))
    with pytest.raises(DataError, match="observation_space: is no space that is read: Text"):
        read_steps(episodes_file(tmp_path / "b", episode(2), observation_space='{"type": "Text"}', action_space="{}"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "metadata.json").write_text('{"data_format": "arrow"}')
    with pytest.raises(DataError, match="stored as arrow"):
        read_steps(tmp_path / "c")


def test_nothing_is_written_over_and_what_cannot_be_held_is_refused(tmp_path: Path):
    steps = drawn(*SPACES[0])
    write_minari(tmp_path / "a", steps)
    with pytest.raises(UsageError, match="exists already"):
        write_minari(tmp_path / "a", steps)
    broken = read_steps(d4rl(tmp_path / "x.hdf5", timeouts=np.zeros(5, bool)))
    with pytest.raises(DataError, match="next_observation, episode 0, step 2: is not the observation of the next step"):
        write_minari(tmp_path / "b", broken)
    with pytest.raises(UsageError, match="provenance must be plain values"):
        write_minari(tmp_path / "b", steps, provenance={"run": object()})
    assert not list((tmp_path / "b").iterdir())


# -- runs, and what is no data ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "env", "more"),
    [
        ("sac", "Pendulum-v1", {"num_envs": 2}),
        ("dqn", "CartPole-v1", {"replay_on_disk": False}),
        ("dqn", "CartPole-v1", {"replay_size": 100, "checkpoint_every": 1}),
    ],
)
def test_a_run_gives_back_what_it_has_seen_in_the_environments_units(tmp_path: Path, key: str, env: str, more: dict):
    """Every transition that is read is one that the environment makes: its own physics says so."""
    options = {
        "total_steps": 250,
        "iteration_steps": 50,
        "start_steps": 240,
        "random_steps": 240,
        "eval_episodes": 1,
        "out": str(tmp_path / "r"),
    }
    if key == "sac":
        options["hidden"] = (8,)
    run = telos.train(key, env=env, **options, **more)
    steps = read_steps(run.path)
    assert steps.env == env
    assert steps.observation_space == gymnasium.make(env).observation_space
    forgotten = more.get("replay_size")
    left = sum(count for name, count in steps.counts.items() if "left out" in name)
    assert len(steps) + left == 250 if not forgotten else 100 <= len(steps) + left <= 250
    assert bool(left) == bool(forgotten)
    assert isinstance(steps.observation, np.ndarray)
    assert isinstance(steps.next_observation, np.ndarray)
    inner = ~steps.ended[:-1]
    np.testing.assert_array_equal(steps.next_observation[:-1][inner], steps.observation[1:][inner])
    physics = gymnasium.make(env).unwrapped
    physics.reset(seed=0)
    for row in (0, len(steps) // 2, len(steps) - 1):
        seen = steps.observation[row].astype(np.float64)
        physics.state = np.array([np.arctan2(seen[1], seen[0]), seen[2]]) if env == "Pendulum-v1" else seen  # type: ignore[attr-defined]
        led = physics.step(steps.action[row])[0]
        np.testing.assert_allclose(led, steps.next_observation[row], atol=1e-5)
    if not forgotten:
        assert len(read_run(run.path, upto=120)) == 120


def test_a_run_without_a_replay_is_refused(tmp_path: Path):
    run = telos.train(
        "ppo", env="CartPole-v1", total_steps=16, num_envs=1, rollout_steps=16, epochs=1, eval_episodes=1, out=str(tmp_path / "r")
    )
    with pytest.raises(UsageError, match="keeps no replay"):
        read_steps(run.path)
    (tmp_path / "r" / "policy" / "policy.json").unlink()
    with pytest.raises(UsageError, match="telos resume"):
        read_steps(run.path)


def test_data_of_control_are_told_from_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "all"))
    write_minari(tmp_path / "all" / "own" / "x-v0", drawn(*SPACES[0]))
    np.savez(tmp_path / "b.npz", observations=SEEN)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a"}')
    (tmp_path / "folder").mkdir()
    for source in (d4rl(tmp_path / "a.dat"), tmp_path / "b.npz", tmp_path / "all/own/x-v0", tmp_path / "all/own/x-v0/data", "own/x-v0"):
        assert holds_steps(source), source
    for source in (tmp_path / "pairs.jsonl", tmp_path / "folder", tmp_path / "none", "own/y-v0", "org/dataset", "review"):
        assert not holds_steps(source), source


def test_what_is_no_data_is_refused(tmp_path: Path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut.hdf5").write_bytes(d4rl(tmp_path / "whole.hdf5").read_bytes()[:900])
    buffer = io.BytesIO()
    np.savez(buffer, observations=SEEN)
    (tmp_path / "cut.npz").write_bytes(buffer.getvalue()[:60])
    for name, message in {
        "text": "neither HDF5 nor npz",
        "empty": "is empty",
        "folder": "neither main_data.hdf5 nor a run",
        "cut.hdf5": "damaged or cut off",
        "cut.npz": "damaged or cut off",
        "nothing": "no such file or folder; data of control are",
    }.items():
        with pytest.raises(UsageError, match=message):
            read_steps(tmp_path / name)
    with pytest.raises(UsageError, match="horizon has no effect"):
        read_steps(npz(tmp_path / "o.npz", observations=OG_SEEN, actions=OG_ACTIONS, terminals=OG_FINAL), horizon=3)
