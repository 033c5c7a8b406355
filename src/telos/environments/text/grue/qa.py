"""`grue-qa`: a short passage and a question; the answer is to be written. After GRUE's NarrativeQA task.

    Facts: The nurse has a red lamp. The farmer is in the hotel. The student wants a tent.
    Who wants a tent?
    Answer: the student

Three or four people, about each of whom one thing is said; no two facts share a person, a thing or a place. The gold score is the token F1
of SQuAD, which punishes answers that name everything.
"""

from __future__ import annotations

import random

from telos.environments.text.base import Item
from telos.environments.text.grue._metrics import answer_words, token_f1
from telos.environments.text.grue._task import DrawnTask
from telos.environments.text.grue._words import PEOPLE, a

_THINGS = ("lamp", "coat", "drum", "tent", "kite", "chair", "phone", "robot", "cake", "spade", "kettle", "novel")
_PLACES = ("hotel", "house", "cabin", "ferry", "garden", "shop")
_ADJECTIVES = ("old", "new", "small", "large", "red", "blue")
# relation -> (fact, [(question, answer)]); p: person, n: the other side as a phrase with its article or preposition
_RELATIONS = {
    "has": ("The {p} has {n}.", (("Who has {n}?", "the {p}"), ("What does the {p} have?", "{n}"))),
    "wants": ("The {p} wants {n}.", (("Who wants {n}?", "the {p}"), ("What does the {p} want?", "{n}"))),
    "is": ("The {p} is {n}.", (("Who is {n}?", "the {p}"), ("Where is the {p}?", "{n}"))),
}


class QA(DrawnTask):
    """The testbed; see the module's docstring."""

    name = "grue-qa"
    flaws = 0.2
    max_new_tokens = 16
    lexical = ("rougeL", "meteor")

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`f1` and `exact` (0 or 1) against the reference, after SQuAD's normalisation. Only `f1` is the gold score."""
        (answer,) = item.facts["references"]
        return {"exact": float(answer_words(completion) == answer_words(answer)), "f1": token_f1(completion, answer)}

    def gold(self, item: Item, completion: str) -> float:
        """Token F1, in [0, 1]."""
        return token_f1(completion, item.facts["references"][0])

    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        count = rng.choice((3, 4))
        people, things, places = (rng.sample(pool, count) for pool in (PEOPLE, _THINGS, _PLACES))
        told = []
        for person, thing, place in zip(people, things, places):
            relation = rng.choice(tuple(_RELATIONS))
            noun = f"{rng.choice(_ADJECTIVES)} {thing}" if rng.random() < 0.4 else thing
            told.append((relation, {"p": person, "n": f"in the {place}" if relation == "is" else a(noun)}))
        passage = [_RELATIONS[relation][0].format(**fields) for relation, fields in told]
        relation, fields = rng.choice(told)
        question, answer = (text.format(**fields) for text in rng.choice(_RELATIONS[relation][1]))
        others = [text for _, row in told for text in (f"the {row['p']}", row["n"]) if text != answer]
        item = Item(f"Facts: {' '.join(passage)}\n{question}\nAnswer:", " " + answer, {"references": [answer], "others": others})
        return "/".join(sorted(passage)), item

    def _flawed(self, rng: random.Random, item: Item) -> str:
        """Something else that the passage speaks of."""
        return " " + rng.choice(item.facts["others"])


TESTBED = QA()
