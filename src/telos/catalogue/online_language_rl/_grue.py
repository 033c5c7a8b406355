"""What recipes on the GRUE tasks share: a start fine-tuned on a task's demonstrations, PPO's settings, and a reward for answers that are right as a whole.

Nothing here is slow to import, because a reward function runs in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from telos.core.seeds import derive
from telos.environments.text.base import Item, load_testbed
from telos.environments.text.grue._task import GrueTask

if TYPE_CHECKING:
    from telos.catalogue.lab import Lab

SFT: dict[str, Any] = {"batch_size": 16, "learning_rate": 1e-3, "lr_schedule": "linear", "checkpoint_every": 0}
PPO: dict[str, Any] = {
    "critic_init": "policy",
    "batch_size": 64,
    "minibatch_size": 32,
    "epochs": 2,
    "learning_rate": 2e-4,
    "critic_learning_rate": 2e-4,
    "critic_warmup": 2,
    "max_completion_length": 24,
    "checkpoint_every": 0,
}
DEMONSTRATIONS = 3000  # documents of a task from which is learned; not all of their answers are good
SOLVED = f"{__name__}:solved"
ENOUGH = 0.9  # gold score of an answer that counts as right


def fine_tuned(lab: Lab, steps: int, name: str = "sft") -> str:
    """The folder of `tinylm` after so many steps on the task's demonstrations. Shorter runs see the first of the same rows' order."""

    def rows() -> list[dict[str, Any]]:
        shown = cast(GrueTask, lab.testbed).demonstrations(DEMONSTRATIONS, derive(lab.seed, "demonstrations") % 2**31)
        return [{"prompt": prompt, "completion": answer} for prompt, answer in shown]

    data = lab.file("demonstrations.jsonl", rows)
    return str(lab.train(name, "sft", model="tinylm", data=str(data), steps=steps, **SFT).path / "model")


def solved(prompts: Sequence[str], completions: Sequence[str], facts: Sequence[str], testbed: Sequence[str], **_: Any) -> list[float]:
    """1 for answers of at least `ENOUGH` gold, 0 for all others."""
    rows = zip(prompts, completions, facts, testbed, strict=True)
    return [float(load_testbed(name).gold(Item(prompt, "", json.loads(told)), text) >= ENOUGH) for prompt, text, told, name in rows]
