"""The self-supervised preference-degree loss (Li et al. 2024), which any pairwise method can add: how much key content does an answer lack?

Key phrases are found and ranked as by RAKE (Rose et al. 2010): a candidate is a run of words between stop words, punctuation and line ends; a word's score
is the mean length of the candidates it occurs in (in words, counted by occurrence), a phrase's the sum over its words. Version d of an answer,
d ∈ {0 … K − 1}, lacks the best ⌊d n/K⌋ of its n phrases, wherever they occur; so the versions are nested, 0 is the answer itself, and something is left
in the last one. A degree that takes no more away than the one below it has no version: its label could not be told from the text.

At each step one of the versions of each answer is drawn, every degree that has one being as likely; its class is read by a linear head from the
hidden state that predicts its last token, the end token where the answer was not cut. That costs a second forward pass, over two answers a pair. The
stop words, the rounding and the drawing are our choices; the paper uses a RAKE package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from telos.core.seeds import torch_generator
from telos.data.batches import Pairs
from telos.data.formats import Counts, Examples
from telos.data.tokenize import Limits, Table, tokenize
from telos.functional.reduction import Losses
from telos.models.language import LanguageModel
from telos.models.packing import Answers

SIDES = ("chosen", "rejected")
_STOP = """
a about above after again against all also although am among an and another any are as at be because been before being below between both but by can
cannot could did do does doing done down during each either else ever every few for from further get gets got had has have having he her here hers
herself him himself his how however i if in into is it its itself just least less let like many may me might more most much must my myself neither
no nor not now of off often on once one only onto or other others otherwise ought our ours ourselves out over own per perhaps quite rather really
said same say says shall she should since so some such than that the their theirs them themselves then there therefore these they this those though
through thus to together too toward towards under unless until up upon us use used uses using very via was we well were what when where whether which
while who whom whose why will with within without would yes yet you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_STOP.split())
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]|\n")


@dataclass
class Phrase:
    """A key phrase: its words in lower case, its score, and the places (start, end) where it stands."""

    words: tuple[str, ...]
    score: float = 0.0
    places: list[tuple[int, int]] = field(default_factory=list)


def key_phrases(text: str) -> list[Phrase]:
    """The key phrases of a text, the most important first; of equals, the one that comes first."""
    phrases: dict[tuple[str, ...], Phrase] = {}
    run: list[re.Match[str]] = []
    for token in (*_TOKEN.finditer(text), None):
        if token is not None and _has_content(token.group().lower()):
            run.append(token)
        elif run:
            words = tuple(match.group().lower() for match in run)
            phrases.setdefault(words, Phrase(words)).places.append((run[0].start(), run[-1].end()))
            run = []
    occurrences: dict[str, int] = {}
    degrees: dict[str, int] = {}
    for phrase in phrases.values():
        for word in phrase.words:
            occurrences[word] = occurrences.get(word, 0) + len(phrase.places)
            degrees[word] = degrees.get(word, 0) + len(phrase.places) * len(phrase.words)
    for phrase in phrases.values():
        phrase.score = sum(degrees[word] / occurrences[word] for word in phrase.words)
    return sorted(phrases.values(), key=lambda phrase: -phrase.score)


def _has_content(token: str) -> bool:
    """Whether a token is a word that is no stop word; contractions (don't, we'll) are stop words, a possessive is what its noun is."""
    word, _, ending = token.replace("’", "'").partition("'")
    return (word[:1].isalnum() or word[:1] == "_") and word not in STOP_WORDS and ending in ("", "s")


def degraded(text: str, degree: int, levels: int) -> str:
    """The text without its best ⌊degree · n/levels⌋ key phrases and the blanks before them; nothing else in it changes."""
    ranked = key_phrases(text)
    places = sorted(place for phrase in ranked[: degree * len(ranked) // levels] for place in phrase.places)
    kept, at = [], 0
    for start, end in places:
        kept.append(text[at:start].rstrip(" \t"))
        at = end
    return "".join(kept) + text[at:]


def versions(answer: Any, levels: int) -> list[Any]:
    """Of an answer (text or messages), what is left of it at each degree; None where no more is gone than at the degree below."""

    def version(degree: int) -> Any:
        if isinstance(answer, str):
            return degraded(answer, degree, levels)
        return [m | {"content": degraded(m["content"], degree, levels)} if m["role"] == "assistant" else m for m in answer]

    found = [answer, *(version(degree) for degree in range(1, levels))]
    return [found[0], *(now if now != before else None for before, now in pairwise(found))]


def with_versions(table: Table, texts: list[dict[str, list[Any]]], tokenizer: Any, limits: Limits) -> Table:
    """The table of pairs with the versions of both answers of each row: `version_ids` one after another, all of the chosen answer first, and
    `version_ends`, 2 K of them, where a version that is not there ends where it begins."""
    given = [[text for side in SIDES for text in row[side] if text is not None] for row in texts]
    records = [
        {"prompt": prompt, "completions": answers, "quality": [float(-i) for i in range(len(answers))]}
        for prompt, answers in zip(table.prompts, given, strict=True)
    ]
    examples = Examples(
        "ranked", bool(table.prompts) and not isinstance(table.prompts[0], str), records, {}, table.places, Counts("versions")
    )
    encoded = tokenize(examples, tokenizer, replace(limits, overlong="truncate")).columns["completion_ids"]
    ids, ends = [], []
    for prompt, row, answers in zip(table.columns["prompt_ids"], texts, encoded, strict=True):
        found = iter(answers)
        room = None if limits.max_length is None else limits.max_length - len(prompt)  # the prompt may be longer here than beside them
        slots = [np.empty(0, np.int32) if text is None else next(found)[:room] for side in SIDES for text in row[side]]
        ids.append(np.concatenate(slots))
        ends.append(np.cumsum([len(slot) for slot in slots]))
    return table.with_columns(version_ids=ids, version_ends=ends)


def draw(batch: Pairs, seed: int, *labels: str | int) -> Pairs:
    """The batch with a degree for each answer, drawn from those that have a version; the same draw for the same seed and labels."""
    assert batch.version_ends is not None
    lengths = batch.version_ends.diff(dim=1, prepend=torch.zeros_like(batch.version_ends[:, :1]))
    present = (lengths > 0).double().view(2 * len(batch), -1).cpu()
    degree = torch.multinomial(present, 1, generator=torch_generator(seed, "degree", *labels))
    return batch.replace(degree=degree.view(-1, 2).to(batch.row.device))


def drawn_versions(batch: Pairs) -> Answers:
    """The version of each answer that was drawn, two a row on their prompt."""
    assert batch.degree is not None
    assert batch.version_ids is not None
    assert batch.version_ends is not None
    slot = batch.degree + torch.tensor([0, batch.version_ends.shape[1] // 2], device=batch.degree.device)
    end = batch.version_ends.gather(1, slot)
    start = batch.version_ends.gather(1, (slot - 1).clamp(min=0)) * (slot > 0)
    length = end - start
    place = start[:, :, None] + torch.arange(int(length.max()), device=start.device)
    ids = batch.version_ids.gather(1, place.clamp(max=batch.version_ids.shape[1] - 1).flatten(1)).view(place.shape)
    ids = ids * (place < end[:, :, None])
    return Answers.repeat(batch.prompt_ids, batch.prompt_length, *((ids[:, side], length[:, side]) for side in range(2)))


def add_head(model: LanguageModel, levels: int, seed: int) -> None:
    """Gives the model a linear classifier of degrees, trained with it and not saved with it; its start depends on the seed alone."""
    head: nn.Linear = torch.nn.utils.skip_init(nn.Linear, model.hidden_size, levels)  # type: ignore[assignment]
    with torch.no_grad():
        head.weight.normal_(0.0, model.hidden_size**-0.5, generator=torch_generator(seed, "degree head"))
        head.bias.zero_()
    model.add_module("degree", head.to(model.device))


def losses(model: LanguageModel, batch: Pairs, weight: float) -> Losses:
    """The weighted cross-entropy of the drawn versions' degrees, the mean over both answers of each pair, [B]."""
    assert batch.degree is not None
    answers, degree = drawn_versions(batch), batch.degree.flatten()
    states = model.states(answers)
    last = states[torch.arange(len(states), device=states.device), answers.length - 1]
    logits = model.get_submodule("degree")(last)
    entropy = cross_entropy(logits, degree, reduction="none").view(-1, 2).mean(1)
    accuracy = (logits.argmax(1) == degree).float().view(-1, 2).mean(1)
    return Losses(weight * entropy, metrics={"degree/loss": entropy, "degree/accuracy": accuracy})
