"""`grue-sentiment`: the beginning of a review, good or bad, is to be continued in a positive way. After GRUE's IMDB task.

    Review: I bought this kettle last week. The lid is loose.
     But the handle is firm, and the motor is quiet. I would buy it again.

A lexicon stands where GRUE has a sentiment classifier. An opinion is a word said of an aspect (as `review` reads it) or a general word such
as "love" or "awful" in a clause without an aspect; "not" turns it round. Two positive opinions and no negative one are enough. Positive
words alone earn nothing: the text must be made of sentences, and it should speak of this product without taking back what was said.
"""

from __future__ import annotations

import random
import re

from telos.environments.text.base import Item
from telos.environments.text.grue._task import DrawnTask
from telos.environments.text.grue._words import ASPECTS, PLURAL, PRODUCTS, a, listed, well_formed, words
from telos.environments.text.review import claims

_OPENINGS = (
    "I bought this {p} last week.",
    "We have had the {p} for a month.",
    "This {p} came today.",
    "My sister gave me this {p}.",
    "I tried the {p} for a few hours.",
)
_OPINIONS = ("The {a} {v} {w}.", "I think the {a} {v} {w}.", "I found the {a} {w}.", "It has {n}.")
_PAIRS = ("The {a} {v} {w}, and the {b} {u} {x}.", "I think the {a} {v} {w}, and it has {m}.", "It has {n}, and the {b} {u} {x}.")
_GOOD_CLOSINGS = ("I would buy it again.", "I love it.", "We recommend it.", "It is a great {p}.", "I am happy with it.")
_BAD_CLOSINGS = ("I would not buy it again.", "I hate it.", "We do not recommend it.", "It is an awful {p}.", "I am not happy with it.")
_GOOD = frozenset(
    listed("again amazing enjoy excellent fine glad good great happy like love loved nice perfect recommend superb wonderful")
)
_BAD = frozenset(listed("annoying awful bad disappointed disappointing dreadful hate horrible poor regret rubbish sad terrible useless"))
_NEGATION = frozenset(listed("not never no hardly don't isn't wouldn't"))
_CLAUSE = re.compile(r"[.!?,;:\n]|\b(?:and|but|because)\b")


def opinions(text: str) -> list[bool]:
    """What is said well (True) and badly (False), in no order."""
    found = [good for said in claims(text).values() for good in said]
    for clause in _CLAUSE.split(text.lower()):
        row = words(clause)
        if not any(word in ASPECTS for word in row):
            found += [
                (word in _GOOD) != bool(_NEGATION & set(row[max(0, i - 3) : i])) for i, word in enumerate(row) if word in _GOOD | _BAD
            ]
    return found


class Sentiment(DrawnTask):
    """The testbed; see the module's docstring."""

    name = "grue-sentiment"

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`positive`: share of positive opinions, halved when there is only one, 0 without any; `well_formed`: sentences without repetition
        (as in `review`); `on_topic`: share of the aspects named that this product has, halved when another product is named, 0 when an
        opinion of the prompt is taken back. Each in [0, 1]."""
        text, found = completion.strip(), opinions(completion)
        if not words(text):
            return {"positive": 0.0, "well_formed": 0.0, "on_topic": 0.0}
        product, (aspect, _, good) = item.facts["product"], item.facts["opinion"]
        said = claims(text)
        fitting = sum(name in PRODUCTS[product] for name in said) / len(said) if said else 0.0
        others = bool((set(words(text)) & set(PRODUCTS)) - {product})
        return {
            "positive": sum(found) / len(found) * min(1.0, len(found) / 2) if found else 0.0,
            "well_formed": well_formed(text, words(text)),
            "on_topic": 0.0 if (not good) in said.get(aspect, ()) else fitting * (0.5 if others else 1.0),
        }

    def gold(self, item: Item, completion: str) -> float:
        """positive × well_formed × (1 + on_topic) / 2, in [0, 1]."""
        parts = self.attributes(item, completion)
        return parts["positive"] * parts["well_formed"] * (1 + parts["on_topic"]) / 2

    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        product = rng.choice(tuple(PRODUCTS))
        aspect, good = rng.choice(PRODUCTS[product]), rng.random() < 0.5
        word = rng.choice(ASPECTS[aspect][0 if good else 1])
        said = rng.choice(_OPINIONS).format(**_fields("avwn", aspect, word))
        prompt = f"Review: {rng.choice(_OPENINGS).format(p=product)} {said}"
        references = [_continuation(rng, product, aspect, good, True).strip() for _ in range(2)]
        facts = {"product": product, "opinion": [aspect, word, good], "references": references}
        return f"{product}/{aspect}/{word}", Item(prompt, " " + references[0], facts)

    def _flawed(self, rng: random.Random, item: Item) -> str:
        aspect, _, good = item.facts["opinion"]
        return _continuation(rng, item.facts["product"], aspect, good, False)


def _fields(names: str, aspect: str, word: str) -> dict[str, str]:
    """The fields of a template: aspect, its verb, the word, and both as a noun phrase, under the names given in this order."""
    plural = aspect in PLURAL
    return dict(zip(names, (aspect, "are" if plural else "is", word, f"{word} {aspect}" if plural else a(f"{word} {aspect}"))))


def _continuation(rng: random.Random, product: str, but_not: str, was_good: bool, good: bool) -> str:
    first, second = rng.sample([aspect for aspect in PRODUCTS[product] if aspect != but_not], 2)
    side = 0 if good else 1
    fields = _fields("avwn", first, rng.choice(ASPECTS[first][side])) | _fields("buxm", second, rng.choice(ASPECTS[second][side]))
    sentence = rng.choice(_PAIRS).format(**fields)
    if good != was_good:
        sentence = "But " + (sentence if sentence.startswith("I ") else sentence[0].lower() + sentence[1:])
    closing = rng.choice(_GOOD_CLOSINGS if good else _BAD_CLOSINGS).format(p=product)
    return f" {sentence} {closing}"


TESTBED = Sentiment()
