"""`grue-summaries`: a short function of Python's standard library is to be summed up in one line. After GRUE's CNN/DailyMail task.

The rows are those of `docstrings` (text that people wrote, on every machine), with its splits by module, as far as prompt and summary are
short enough for the bundled model. The gold score is ROUGE-L with the human's summary, as one of GRUE's rewards for summaries.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

from telos.environments.text import docstrings
from telos.environments.text.base import Item, Split
from telos.environments.text.grue._metrics import rouge_l
from telos.environments.text.grue._task import GrueTask, check_split

# Characters; 180 are at most about 90 tokens of the bundled model's, 80 at most about 40.
LONGEST_PROMPT, LONGEST_SUMMARY = 180, 80


@functools.cache
def _rows(split: Split) -> tuple[Item, ...]:
    return tuple(
        Item(item.prompt, item.reference, {"module": item.facts["module"], "references": [item.facts["summary"]]})
        for item in docstrings.TESTBED.items(split)
        if len(item.prompt) <= LONGEST_PROMPT and len(item.reference) <= LONGEST_SUMMARY
    )


class Summaries(GrueTask):
    """The testbed; see the module's docstring."""

    name = "grue-summaries"
    lexical = ("rouge1", "rouge2", "rougeL", "meteor")

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """The functions of a split in an order fixed by `seed`; fewer than `n` when the split has no more. `None` means all."""
        check_split(split, n)
        rows = list(_rows(split))
        random.Random(f"{self.name}/{split}/{seed}").shuffle(rows)
        return rows[:n]

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`rouge_l` and `chrf` with the human's summary, each in [0, 1]. Only the first enters the gold score."""
        (summary,) = item.facts["references"]
        return {"rouge_l": rouge_l(completion, summary), "chrf": docstrings.chrf(completion.strip(), summary)}

    def gold(self, item: Item, completion: str) -> float:
        """ROUGE-L, in [0, 1]."""
        return rouge_l(completion, item.facts["references"][0])

    def demonstrations(self, n: int, seed: int) -> Iterator[tuple[str, str]]:
        """Training functions with their summaries, round and round when `n` exceeds their number; none is flawed, being what people wrote."""
        check_split("train", n)
        rows = self.items("train", seed=seed)
        return ((rows[i % len(rows)].prompt, rows[i % len(rows)].reference) for i in range(n))


TESTBED = Summaries()
