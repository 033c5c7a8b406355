"""What the README promises a user: own pairs, an own reward in ten lines, and a trained folder that opens without Telos."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import telos

ROOT = Path(__file__).parent.parent.parent
PAIRS = str(ROOT / "examples" / "own_pairs.jsonl")
ALONE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
out = model.generate(**tokenizer("Review request: a kettle.", return_tensors="pt"), max_new_tokens=4, do_sample=False)
print(json.dumps({"telos": any(name.startswith("telos") for name in sys.modules), "tokens": out.shape[1]}))
"""


@pytest.mark.parametrize("method", ["dpo", "simpo"])
def test_own_pairs_train_and_the_folder_opens_with_transformers_alone(method: str, tmp_path: Path) -> None:
    run = telos.train(method, model="tinylm", data=PAIRS, batch_size=4, steps=2, out=str(tmp_path / method), threads=1)
    done = subprocess.run([sys.executable, "-c", ALONE, str(run.path / "model")], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["telos"] is False
    assert told["tokens"] > 4


def test_grpo_learns_from_the_ten_line_reward(tmp_path: Path) -> None:
    reward = f"{ROOT / 'examples' / 'ten_line_reward.py'}:brief_and_on_topic"
    sizes = {"batch_size": 4, "samples_per_prompt": 4, "minibatch_size": 16, "max_completion_length": 24, "learning_rate": 1e-4}
    run = telos.train("grpo", model="tinylm", data="docstrings", reward=reward, steps=2, out=str(tmp_path / "run"), **sizes)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[-1]["groups/reward_std"] > 0
    assert abs(rows[0]["kl"]) < 1e-5 < 1e-3 < abs(rows[1]["kl"])  # an estimate from a few answers may be negative


def test_ppo_learns_from_the_ten_line_reward_and_counts_what_it_leaves_out(tmp_path: Path) -> None:
    reward = f"{ROOT / 'examples' / 'ten_line_reward.py'}:brief_and_on_topic"
    options = {"batch_size": 4, "minibatch_size": 4, "epochs": 1, "max_completion_length": 12, "critic_init": "policy", "threads": 1}
    run = telos.train("ppo-max", model="tinylm", data="docstrings", reward=reward, steps=2, out=str(tmp_path / "ppo"), **options)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["reward"] <= 2 for row in rows)
    assert all("rewards/not_applicable" in row for row in rows)


def test_a_trained_run_is_loaded_by_its_path(tmp_path: Path) -> None:
    run = telos.train("reward-model", model="tinylm", data=PAIRS, batch_size=4, steps=1, out=str(tmp_path / "rm"), threads=1)
    assert type(telos.load(run.path)).__name__ == "RewardModel"


def test_the_bundled_model_stays_small() -> None:
    folder = ROOT / "src" / "telos" / "assets" / "tinylm"
    assert (folder / "model.safetensors").stat().st_size <= 12 * 2**20
    record = json.loads((folder / "training.json").read_text())
    assert {"steps", "seed", "tokens_by_source", "loss_held_out_nats"} <= record.keys()


def test_ppo_learns_in_the_ten_line_environment_and_its_policy_acts_on_raw_observations(tmp_path: Path) -> None:
    env = f"{ROOT / 'examples' / 'own_environment.py'}:Hover"
    sizes = {"num_envs": 8, "rollout_steps": 128, "epochs": 5, "minibatch_size": 256, "learning_rate": 3e-3, "total_steps": 30_000}
    run = telos.train("ppo", env=env, out=str(tmp_path / "run"), **sizes)
    rows = run.metrics()
    assert rows[0]["episode/return"] < -30
    assert run.facts["evaluation"]["evaluation/return"] > -15
    policy = telos.load(run.path)
    up, _ = policy.predict(np.array([-1.0, 0.0], np.float32))
    down, _ = policy.predict(np.array([1.0, 0.0], np.float32))
    assert up[0] > 0 > down[0]
