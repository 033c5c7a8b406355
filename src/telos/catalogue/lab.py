"""A laboratory for recipes: stages that are done once, survive a kill, and are measured on held-out prompts.

Recipes and the quickstart are ordinary programs over these few verbs: fine-tune, make preferences, learn a reward, align, assess. Each
stage writes into its own folder below the lab's; a stage that is finished is read, one that was interrupted is resumed bit for bit, so that
running the same program again continues it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import telos
from telos.algorithms import run as runs
from telos.algorithms.language.assess import Assessment, assess, checkpoint_steps, load_checkpoint
from telos.algorithms.language.preference_data import make_pairs
from telos.core.errors import UsageError
from telos.core.loop import Callback
from telos.core.run import Run, write_atomically
from telos.core.seeds import derive
from telos.environments.text.base import Item, Split, load_testbed
from telos.models.language import LanguageModel
from telos.objectives.reward_model import ModelReward, RewardModel


class Bar(Protocol):
    def update(self, done: int) -> None: ...

    def close(self) -> None: ...


class Watch(Protocol):
    """How the lab tells of its progress."""

    def callbacks(self, title: str) -> Sequence[Callback]:
        """Watchers of one training stage."""
        ...

    def bar(self, title: str, total: int) -> Bar:
        """A bar for other work of `total` parts."""
        ...


class Silent:
    """Tells nothing."""

    def callbacks(self, title: str) -> Sequence[Callback]:
        return ()

    def bar(self, title: str, total: int) -> Bar:
        return self

    def update(self, done: int) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Labelling:
    """How preferences are made: two sampled answers a prompt, labelled by the gold judge through Bradley–Terry with `label_temperature` on the gold
    difference, then flipped with probability `noise`."""

    pairs: int
    label_temperature: float = 0.05
    noise: float = 0.0


class Stages:
    """One seed's experiment in one folder."""

    def __init__(self, root: Path, seed: int, watch: Watch | None = None) -> None:
        self.root, self.seed = root, seed
        self.watch = watch or Silent()
        root.mkdir(parents=True, exist_ok=True)

    def folder(self, name: str) -> Path:
        return self.root / name

    def train(self, name: str, method: str, **options: Any) -> Run:
        """Trains `method` in the stage's folder; continues or returns what is there. The experiment's seed is the run's."""
        folder = self.folder(name)
        callbacks = self.watch.callbacks(name)
        if (folder / "run.json").is_file():
            return runs.resume(folder, callbacks=callbacks)
        return runs.train(method, {"seed": self.seed, "out": str(folder), **options}, callbacks=callbacks)

    def file(self, name: str, write: Callable[[], list[dict[str, Any]]]) -> Path:
        """A JSONL file of the experiment, written once, whole."""
        path = self.folder(name)
        if not path.exists():
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in write()))
        return path


class Lab(Stages):
    """One seed's experiment on one testbed of text, in one folder."""

    def __init__(self, root: Path, testbed: str, seed: int, watch: Watch | None = None) -> None:
        super().__init__(root, seed, watch)
        self.testbed = load_testbed(testbed)

    def pairs(self, name: str, model: str, labelling: Labelling, split: Split = "train") -> Path:
        """Preferences over answers sampled from `model`, as a file that any pairwise method reads."""

        def write() -> list[dict[str, Any]]:
            runs.prepare_threads()
            bar = self.watch.bar(name, labelling.pairs)
            try:
                rows, counts = make_pairs(
                    LanguageModel.load(model),
                    self.testbed,
                    labelling.pairs,
                    seed=derive(self.seed, name) >> 1,
                    split=split,
                    label_temperature=labelling.label_temperature,
                    noise=labelling.noise,
                    on_progress=bar.update,
                )
            finally:
                bar.close()
            write_atomically(self.folder(f"{name}.counts.json"), json.dumps(counts))
            return rows

        return self.file(f"{name}.jsonl", write)

    def items(self, n: int, split: Split = "test") -> list[Item]:
        return self.testbed.items(split, n, seed=derive(self.seed, "held out") % 2**31)

    def assess(
        self,
        name: str,
        model: str | Run,
        items: Sequence[Item],
        *,
        step: int | None = None,
        reference: str | None = None,
        reward: str | None = None,
        temperature: float = 1.0,
    ) -> Assessment:
        """Answers of a model (a folder, or a run at one of its checkpoints) on held-out items, kept in the lab.

        The same prompts and the same random numbers serve every model of a lab, so that differences are paired.
        """
        path = self.folder(f"assessments/{name}.json")
        if path.exists():
            return Assessment.open(path)
        runs.prepare_threads()
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(model, Run):
            policy = LanguageModel.load(str(model.path / "model"))
            if step is not None:
                load_checkpoint(policy, model, step)
        else:
            policy = LanguageModel.load(model)
        proxy = ModelReward(RewardModel.load(reward), policy_tokenizer=policy.tokenizer) if reward else None
        base = LanguageModel.load(reference) if reference else None
        found = assess(
            policy, self.testbed, items, seed=derive(self.seed, "assessment"), reference=base, reward=proxy, temperature=temperature
        )
        found.save(path)
        return found

    def trajectory(
        self, run: Run, items: Sequence[Item], *, reference: str, reward: str | None, start: Assessment
    ) -> list[tuple[int, Assessment]]:
        """Assessments of a run's checkpoints in order; step 0 is `start`, the reference itself."""
        steps = checkpoint_steps(run)
        if not steps:
            raise UsageError(f"{run.path} has no checkpoint to assess")
        found = [(0, start)]
        bar = self.watch.bar(f"{run.path.name}: held-out prompts", len(steps))
        try:
            for done, step in enumerate(steps, 1):
                found.append((step, self.assess(f"{run.path.name}-{step}", run, items, step=step, reference=reference, reward=reward)))
                bar.update(done)
        finally:
            bar.close()
        return found


@functools.cache
def _sources() -> str:
    """A hash of the sources as they were when this process first asked."""
    found = hashlib.sha256()
    for path in sorted(Path(telos.__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def commons(lab: Lab) -> Lab:
    """The lab of what several recipes make alike from the same seed, beside the recipes' own folders. It is theirs while the sources are the same."""
    return Lab(lab.root.parent.parent / "shared" / f"{lab.testbed.name}-{lab.seed}-{_sources()}", lab.testbed.name, lab.seed, lab.watch)


def named(name: str, **options: Any) -> str:
    """A stage's name with what it depends on, so that other settings make another stage."""
    return f"{name}-{hashlib.sha256(json.dumps(options, sort_keys=True, default=str).encode()).hexdigest()[:8]}"
