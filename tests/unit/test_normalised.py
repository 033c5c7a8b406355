"""Scores between a random and an expert policy."""

from __future__ import annotations

import numpy as np
import pytest

from telos.core.errors import UsageError
from telos.evaluation.normalised import REFERENCES, Reference, normalised, reference, reference_of


@pytest.mark.parametrize("name", REFERENCES)
def test_the_random_policy_scores_0_and_the_expert_100(name: str):
    of = REFERENCES[name]
    assert normalised(name, of.random) == pytest.approx(0, abs=1e-12)
    assert normalised(name, of.expert) == pytest.approx(100)


def test_published_scores_are_met():
    """Mean returns of D4RL's data sets of version 2, and the scores that papers give for them."""
    assert normalised("hopper-medium-v2", 1422.06) == pytest.approx(44.3, abs=0.05)
    assert normalised("halfcheetah-medium-v2", 4770.33) == pytest.approx(40.7, abs=0.05)
    np.testing.assert_allclose(normalised("kitchen-mixed-v0", [2.0, 4.0]), [50, 100])


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ("hopper", "hopper"),
        ("Hopper-v5", "hopper"),
        ("hopper_medium_replay-v2", "hopper"),
        ("walker2d-medium-expert-v0", "walker2d"),
        ("Walker2d-v4", "walker2d"),
        ("D4RL/hopper/medium-v2", "hopper"),
        ("D4RL/pen/human-v2", "pen"),
        ("AdroitHandDoor-v1", "door"),
        ("antmaze-large-diverse-v2", "antmaze-large"),
        ("maze2d-medium-v1", "maze2d-medium"),
        ("maze2d-medium-dense-v1", "maze2d-medium-dense"),
        ("kitchen-complete-v0", "kitchen"),
        ("ant-full-replay-v2", "ant"),
    ],
)
def test_environments_and_data_sets_lead_to_their_reference(given: str, key: str):
    assert reference(given) is REFERENCES[key]


@pytest.mark.parametrize("given", ["CartPole-v1", "hoper-medium-v2", "", "antmaze", "PointMaze_UMaze-v3", "hopper-medium-v2-x"])
def test_unknown_environments_are_refused_with_the_known_ones(given: str):
    with pytest.raises(UsageError, match=f"no reference returns for '{given}'.*halfcheetah, hopper"):
        normalised(given, 1.0)


def test_a_near_name_is_suggested():
    with pytest.raises(UsageError, match="did you mean 'hopper'"):
        normalised("hoppr", 1.0)


def test_a_data_sets_own_reference_comes_first():
    assert reference_of("Hopper-v5", {"ref_min_score": 1.0, "ref_max_score": 3.0}) == Reference(1, 3)
    assert reference_of("Hopper-v5", {}) is REFERENCES["hopper"]
    assert reference_of("CartPole-v1", {}) is None
    assert reference_of(None, {}) is None
    with pytest.raises(UsageError, match="must be above"):
        Reference(2.0, 2.0)
