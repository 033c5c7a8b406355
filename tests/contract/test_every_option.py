"""An option that is accepted and changes nothing is an error. Here each option of each method is given another value, and something must come out differently:
a number, a weight, the plan, or a refusal that names the option.

The other value is made up from the default, so that options of new methods are tested without a word here; `VALUES` has those for which that would say nothing,
and `BESIDE` what an option needs beside it to matter.
"""

from __future__ import annotations

import hashlib
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

from data_fixtures import CHATML, tiny_tokenizer, write_jsonl
from support import PROMPTS, STEP_ENDS, World, another, make_reward, program_of
from telos.core import discovery
from telos.core.config import Option, options_of
from telos.core.errors import TelosError
from telos.core.method import Method

METHODS = [card.key for card in discovery.cards() if card.file is not None and card.family == "language"]

# What must change no number: where it runs and what is written when. Their effects have tests of their own (`test_core_loop`, `test_contract`, `models`).
SILENT = {
    *("out", "backend", "threads", "device", "checkpoint_every", "keep_checkpoints", "log_every", "engine"),
    *("micro_batch_size", "gradient_checkpointing"),
}

# Refused by default under what stands beside them, and allowed by the other value.
REFUSED_BEFORE = {"on_bad_row", "reward_on_error", "judge"}

BASE: dict[str, Any] = {"steps": 2, "lr_schedule": "linear", "max_completion_length": 4}

# Refused by the other value, for some methods by the option's name.
REFUSED_AFTER = {
    "value_filter": "--priority draws in proportion to advantages",
    "reward_timeout": "timeout of 0.02 s",
    "reference": "--reference has no effect on",
    "reference_share": "--reference_share has no effect",
    "reference_cache": "--reference_cache",
    "reward": "--reward has no effect on",
    "reward_scale": "--reward_scale has no effect",
    "samples_from": "--samples_from",
    "judge": "weighs several rewards",
    "mixture": "has no effect",
    "data_reward_augmented": "--data_reward_augmented",
    "overlong": "no usable row is left",
    "kl_as": "--kl_as has no effect",
    "lora_dropout": "--lora_dropout must be 0",
}

VALUES: dict[str, Any] = {
    "average_share": 0.9,
    "answer_mark": "i",
    "max_step_tokens": 1,
    "max_steps": 1,
    "process_beta": 0.5,
    "process_clip": 0.5,
    "prover_best_of": 2,
    "step_separator": ";",
    "step_separators": ["t", "n"],
    "success_above": 3.0,
    "adam_beta2": 0.5,
    "adam_epsilon": 0.1,
    "adan_betas": [0.5, 0.5, 0.5],
    "adan_restart": 1e-6,
    "batch_size": 5,
    "clip_range": 0.01,
    "clip_range_vf": 0.001,
    "clip_reward": 0.3,
    "drop_control": 0.5,
    "max_weight": 0.1,
    "reward_floor": 50.0,
    "threshold": 0.3,
    "eval_every": 1,
    "eval_prompts": 3,
    "kl_target": 5.0,
    "lora_targets": ["q_proj"],
    "max_completion_length": 2,
    "max_grad_norm": 0.01,
    "max_prompt_length": 3,
    "precision": "bfloat16",
    "reward_scale": 0.01,
    "reward_timeout": 0.02,
    "samples_length": 1,
    "temperature": 0.5,
    "top_k": 5,
    "top_p": 0.9,
    "cov_high": 1.5,
    "cov_low": 0.0,
    "guide_share": 0.9,
    "hint": "hello {prompt}",
    "mask_every": 1,
    "overlong_buffer": 3,
    "ratio_bound": 0.1,
    "reward_weights": [2.0, 0.5],
    "sampling_rounds": 1,
    "selected_share": 0.5,
    "switch_step": 1,
    "warmup_steps": 2,
}


class Places:
    """Files for options that name one, and what goes beside an option."""

    def __init__(self, world: World, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.world = world
        data = world.data
        (folder / "short.jinja").write_text(CHATML.replace("<|im_start|>", ""), encoding="utf-8")
        with_bos = folder / "with-bos"
        tiny_tokenizer(adds_bos=True).save_pretrained(with_bos)
        (folder / "slow.py").write_text(
            "import time\ndef slow(completions, **_):\n    time.sleep(0.3)\n    return [1.0] * len(completions)\n"
        )
        (folder / "nan.py").write_text(
            "def nan(completions, **_):\n    return [float(i) if i else float('nan') for i in range(len(completions))]\n"
        )
        (folder / "ties.py").write_text(
            "def ties(completions, **_):\n    return [float(len(text) % 2) for text in completions]\n", encoding="utf-8"
        )
        (folder / "judge.py").write_text(
            "def judge(completions, opponents, **_):\n    return [len(a) / (len(a) + len(b) + 1e-9) for a, b in zip(completions, opponents)]\n"
        )
        self.slow, self.nan, self.ties = f"{folder / 'slow.py'}:slow", f"{folder / 'nan.py'}:nan", f"{folder / 'ties.py'}:ties"
        self.messages = {
            "supervised": data["messages"],
            "pairs": data["preference-messages"],
            "reward-model": data["preference-messages"],
            "rollouts": str(write_jsonl(folder / "prompts.jsonl", [{"prompt": [{"role": "user", "content": text}]} for text in PROMPTS])),
        }
        self.messages |= dict.fromkeys(("sampling", "iterative", "steps", "search"), self.messages["rollouts"])
        steps = [
            {"prompt": [{"role": "user", "content": text}], "completions": ["one", "two"], "labels": [1, i % 2]}
            for i, text in enumerate(PROMPTS)
        ]
        self.messages["process"] = str(write_jsonl(folder / "steps.jsonl", steps))
        texts = [{"text": f"{text}. Yes! It is\nnot so."} for text in PROMPTS]
        self.segmented = str(write_jsonl(folder / "segmented.jsonl", texts))
        self.messages |= dict.fromkeys(("unpaired", "ranked", "values"), data["preference-messages"])
        self.bad = {}
        self.other = {}
        for loop in self.messages:
            good = Path(world.options(loop)["data"]).read_text(encoding="utf-8")
            lines = good.splitlines()
            (folder / f"bad-{loop}.jsonl").write_text('{"prompt": 3}\n' + good, encoding="utf-8")
            (folder / f"other-{loop}.jsonl").write_text("\n".join(lines[3:]) + "\n", encoding="utf-8")
            self.bad[loop], self.other[loop] = str(folder / f"bad-{loop}.jsonl"), str(folder / f"other-{loop}.jsonl")
        self.named: dict[str, Any] = {
            "model": world.other_model,
            "reference": world.other_model,
            "prover": world.other_model,
            "process_reward": f"value:{world.reward_model}",
            "reference_cache": str(folder / "cache"),
            "judge": f"{folder / 'judge.py'}:judge",
            "tokenizer": str(with_bos),
            "chat_template": str(folder / "short.jinja"),
            "reward": make_reward(folder),
            "pretrain_data": data["prompt-completion"],
        }

    def value(self, method: Method, option: Option, kind: Any) -> Any:
        """Another value than the one that the runs here have."""
        name, loop = option.name, "supervised" if "answers" in method.needs else method.loop
        default = BASE.get(name, self.world.options(method).get(name, option.default))
        if name == "reward" and default:  # the reward model here, another function there
            other = self.world.reward_model if default != self.world.reward_model else self.named["reward"]
            if "objectives" in method.needs:
                return [other, self.world.brevity]
            return [other] if loop == "iterative" else other
        special = {  # what this method alone has otherwise
            ("p3o", "samples_per_prompt"): 4,
            ("p3o", "minibatch_size"): 2,
            ("salsa", "reference"): f"soup:{self.world.model},{self.world.model}",
            ("f-dpg", "threshold"): -100.0,
            ("expert-iteration", "threshold"): 0.025,
            ("star", "threshold"): 0.025,
            ("dapo-direct", "process_reward"): f"value:{self.world.other_value_model}",
            ("dapo-direct", "success_above"): 45.0,
            ("rlgf", "answer_mark"): "e",
            **dict.fromkeys(((key, "answer_mark") for key in ("dapo-direct", "oreo", "dr-po")), "t"),
        }
        if (method.key, name) in special:
            return special[method.key, name]
        if name in ("teacher", "guide"):
            return self.world.model
        if name in self.named or name in ("data", "eval_data"):
            return self.other[loop] if name.endswith("data") and name != "pretrain_data" else self.named[name]
        if name in VALUES:
            return VALUES[name]
        return another(name, kind, default)

    def beside(self, method: Method, name: str) -> dict[str, Any]:
        """What makes an option matter."""
        loop = "supervised" if "answers" in method.needs else method.loop
        pretrain = {"pretrain_data": self.world.data["language-modeling"], "pretrain_coef": 0.1}
        function = {"critic_init": "policy"} if method.loop == "rollouts" else {}
        found: dict[str, dict[str, Any]] = {
            "chat_template": {"model": self.world.chat_model, "data": self.messages["pairs" if "answers" in method.needs else loop]},
            "eval_every": {"eval_data": self.other[loop]},
            "lora_alpha": {"lora_rank": 2},
            "lora_dropout": {"lora_rank": 2},
            "lora_targets": {"lora_rank": 2},
            "on_bad_row": {"data": self.bad[loop]},
            "overlong": {"max_prompt_length": 8},
            "pretrain_coef": pretrain,
            "pretrain_data": pretrain,
            "reward": function,
            "reward_on_error": {"reward": self.nan, **function},
            "reward_timeout": {"reward": self.slow, **function},
        }
        if method.key == "phf":  # options that other objectives than the default one read
            objective = {"unlikelihood_coef": "unlikelihood", "beta": "rwr", "policy_coef": "awr", "max_weight": "awr"}
            found |= {option: {"objective": value} for option, value in objective.items()}
            found["segments"] = {"data": self.segmented}
        if method.key == "a-lol":
            found["kl_coef"] = {"variant": "kl"}
        if method.key == "clip-cov":
            found |= {"cov_low": {"selected_share": 1.0}, "cov_high": {"selected_share": 1.0}}
            found["cov_kl_coef"] = {"control": "kl", "selected_share": 0.5}
        if method.key == "f-dpg":
            found |= {"threshold": {"target": "constraint"}, "moment": {"target": "moment"}}
        if method.key == "dapo":
            found |= {"overlong_penalty": {"overlong_buffer": 2}, "sampling_rounds": {"reward": self.ties}}
        if method.key == "star":  # so that hinted answers are learned from where the others are not right
            found["hint"] = {"threshold": 0.025, "samples_per_prompt": 1, "hinted_samples": 4}
        if method.key == "oreo":
            found |= {option: {"variant": "step"} for option in ("step_separators", "answer_mark")}
        if method.key == "reinforce":
            found["baseline_share"] = {"steps": 3}
        if method.key == "rlgf":
            found |= {"switch_step": {"scheme": "d2lols"}, "guide": {"guide_share": 0.9}}
        if name.startswith("adan_"):
            return {"optimiser": "adan"}
        if name == "reward_weights":
            return {"reward": [self.world.reward_model, self.world.reward], **function}
        if loop in ("unpaired", "ranked", "values"):  # so that enough rows are short enough
            found["overlong"] = {"max_prompt_length": 8, "max_completion_length": 10}
        rewards = {"reward_timeout": self.slow, "reward_on_error": self.nan}
        if name in rewards and loop == "pairs":
            return {"data_reward_augmented": True, "data": self.world.data["preference"], "reward": rewards[name]}
        if loop == "values" and name in ("reward", *rewards):  # answers without scores
            return {"data": self.world.data["preference"], **({"reward": rewards[name]} if name in rewards else {})}
        if name in rewards and loop == "iterative":
            return {"reward": [rewards[name], *([self.world.brevity] if "objectives" in method.needs else [])]}
        if loop == "search" and name in ("choose", "answer_mark"):
            return {"choose": "vote", "answer_mark": "e", "score": "sum"} if name == "answer_mark" else {"answer_mark": "e", "score": "sum"}
        if name == "process_beta":
            return {"process_reward": f"implicit:{self.world.other_model}"}
        if method.loop == "rollouts" and (name.startswith("process_") or name in ("step_separators", "answer_mark")):
            longer = {"max_completion_length": 24} if name == "answer_mark" else {}  # so that some answer has the mark
            return {"process_reward": self.world.reward_model, "step_separators": STEP_ENDS, "answer_mark": "", **longer}
        if name == "loss_degree_levels":
            return {"loss_degree": 0.3}
        if name == "alpha":
            return {"divergence": "alpha"}
        if name == "chat_template" and loop == "pairs" and ("scores" in method.needs or method.key == "reward-augmented"):
            return {"model": self.world.chat_model, "data": self.messages[loop], "reward": self.named["reward"]}
        if name == "judge":
            return {"reward": []}
        if name == "average_share":
            return {"opponent": "average"}
        return found.get(name, {})


def signature(method: Method, options: dict[str, Any], folder: Path) -> Any:
    """All that comes out of a short run, or the refusal."""
    try:
        program = program_of(method.key, options, folder)
        numbers = [program.step(index) for index in range(program.config.steps)]
    except TelosError as error:
        return "refused", str(error).replace(str(folder), "")
    state = program.state()
    weights = hashlib.sha256()
    for role in ("learner", "critic"):
        for tensor in state.get(role, {}).get("weights", {}).values():
            weights.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    written = [
        path.read_text(encoding="utf-8")
        for name in ("samples.jsonl", "stepwise.jsonl", "rewards.jsonl")
        if (path := folder / name).exists()
    ]
    reward = getattr(program, "reward", None)
    if reward is not None:
        reward.close()
    return numbers, weights.hexdigest(), program.plan(), written


@pytest.mark.filterwarnings("ignore::telos.core.errors.TelosWarning")
@pytest.mark.parametrize("key", METHODS)
def test_every_option_changes_what_comes_out(key: str, world: World, tmp_path: Path) -> None:
    method = discovery.load(key)
    places = Places(world, tmp_path / "places")
    hints = typing.get_type_hints(method.config)
    known: dict[str, Any] = {}

    def outcome(**changes: Any) -> Any:
        name = repr(sorted(changes.items()))
        if name not in known:
            options = world.options(method, **(BASE | changes))
            options = {option: value for option, value in options.items() if option in hints}
            known[name] = signature(method, options, tmp_path / f"{len(known)}")
        return known[name]

    ignored, refused = [], {}
    for option in options_of(method.config):
        name = option.name
        if name in SILENT:
            continue
        beside = places.beside(method, name)
        before = outcome(**beside)
        after = outcome(**{**beside, name: places.value(method, option, hints[name])})
        assert before[0] != "refused" or name in REFUSED_BEFORE, before[1]
        if before == after:
            ignored.append(name)
        if after[0] == "refused" and REFUSED_AFTER.get(name, "\0") not in after[1]:
            refused[name] = after[1]
    assert ignored == []
    assert refused == {}


def test_threads_are_set(world: World, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            program_of("sft", world.options("supervised", threads=threads), tmp_path / f"{threads}")
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
