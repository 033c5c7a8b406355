"""`grue-concepts`: a few words are to be made into one sentence that uses them all. After GRUE's CommonGen task (Lin et al. 2020).

    Words: hotel, read, novel, nurse.
    Sentence: The nurse read the novel in the hotel.

Who does it, the verb and the thing always are among the words; a place and an adjective often. The judge reads sentences in the active
voice: it looks for the doer before the verb, the verb before the thing, a preposition before the place and a noun behind the adjective.
"""

from __future__ import annotations

import random
from typing import Any

from telos.environments.text.base import Item
from telos.environments.text.grue._task import DrawnTask
from telos.environments.text.grue._words import PEOPLE, a, form, listed, words

# verb -> (third person, past, -ing)
_VERBS = {
    verb: listed(forms)
    for verb, forms in {
        "buy": "buys bought buying",
        "sell": "sells sold selling",
        "find": "finds found finding",
        "see": "sees saw seeing",
        "make": "makes made making",
        "eat": "eats ate eating",
        "clean": "cleans cleaned cleaning",
        "fix": "fixes fixed fixing",
        "open": "opens opened opening",
        "read": "reads read reading",
        "write": "writes wrote writing",
        "wash": "washes washed washing",
        "paint": "paints painted painting",
    }.items()
}
# (verbs, things that they are done to, places where it is done)
_SCENES = tuple(
    tuple(listed(part) for part in scene)
    for scene in (
        ("buy sell make eat see", "bread cheese soup cake pizza coffee", "hotel house cabin shop"),
        ("buy sell clean fix paint find", "chair bed desk lamp sofa bike", "house hotel shop street"),
        ("read write find buy open", "novel diary comic atlas cookbook biography", "hotel house cabin ferry"),
        ("buy wash find sell see", "coat jacket shirt dress helmet tent", "house shop cabin street"),
    )
)
_ADJECTIVES = ("old", "new", "small", "large", "red")
_DETERMINERS = frozenset(listed("a an the this that my your his her our their some one"))
_PREPOSITIONS = frozenset(listed("in at on near from to into inside outside by of behind before"))
_LONGEST = 18  # words of a sentence
_TEMPLATES = ("The {agent} {past} {thing}{place}.", "{Agent} {third} {thing}{place}.", "{Agent} is {ing} {thing}{place}.")


def _forms(role: str, word: str) -> frozenset[str]:
    """The shapes in which a word counts as used."""
    return frozenset((word, *_VERBS[word])) if role == "verb" else frozenset((word, word + "s", word + "es"))


class Concepts(DrawnTask):
    """The testbed; see the module's docstring."""

    name = "grue-concepts"
    lexical = ("bleu", "rougeL", "meteor")

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`coverage`: share of the words used, in any form; `sentence`: share of what a sentence is (`form`), times the share of its nouns
        with a determiner at most two words before; `sense`: share of the words that stand where they make sense. Each in [0, 1]."""
        text = completion.strip()
        row, roles = words(text), item.facts["roles"]
        at = {role: [i for i, word in enumerate(row) if word in _forms(role, wanted)] for role, wanted in roles.items()}
        if not row:
            return {"coverage": 0.0, "sentence": 0.0, "sense": 0.0}
        nouns = [i for role in ("agent", "thing", "place") for i in at.get(role, ())]
        determined = sum(not _DETERMINERS.isdisjoint(row[max(0, i - 2) : i]) for i in nouns) / len(nouns) if nouns else 0.0
        one = not any(mark in text[:-1] for mark in ".!?\n")
        return {
            "coverage": sum(map(bool, at.values())) / len(at),
            "sentence": form(text, _LONGEST) * determined * one,
            "sense": _sense(row, at),
        }

    def gold(self, item: Item, completion: str) -> float:
        """coverage × (sentence + sense) / 2, in [0, 1]."""
        parts = self.attributes(item, completion)
        return parts["coverage"] * (parts["sentence"] + parts["sense"]) / 2

    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        verbs, things, places = rng.choice(_SCENES)
        roles = {"agent": rng.choice(PEOPLE), "verb": rng.choice(verbs), "thing": rng.choice(things)}
        if rng.random() < 0.7:
            roles["place"] = rng.choice(places)
        if rng.random() < 0.4:
            roles["adjective"] = rng.choice(_ADJECTIVES)
        listed = list(roles.values())
        rng.shuffle(listed)
        references = [template.format(**_fields(rng, roles)) for template in rng.sample(_TEMPLATES, len(_TEMPLATES))]
        facts = {"roles": roles, "references": references}
        return "/".join(sorted(listed)), Item(f"Words: {', '.join(listed)}.\nSentence:", " " + references[0], facts)

    def _flawed(self, rng: random.Random, item: Item) -> str:
        """A word left out, the doer and the thing exchanged, or the bare words."""
        roles, way = dict(item.facts["roles"]), rng.random()
        if way < 0.15:
            return " " + " ".join(roles.values())
        if way < 0.45:
            roles["agent"], roles["thing"] = roles["thing"], roles["agent"]
        else:
            gone = rng.choice([role for role in roles if role != "verb"])
            if gone in ("agent", "thing"):
                roles[gone] = "man" if gone == "agent" else "box"
            else:
                del roles[gone]
        return " " + rng.choice(_TEMPLATES).format(**_fields(rng, roles))


def _fields(rng: random.Random, roles: dict[str, Any]) -> dict[str, str]:
    third, past, ing = _VERBS[roles["verb"]]
    noun = f"{roles['adjective']} {roles['thing']}" if "adjective" in roles else roles["thing"]
    agent = roles["agent"]
    return {
        "agent": agent,
        "Agent": a(agent).capitalize(),
        "third": third,
        "past": past,
        "ing": ing,
        "thing": f"the {noun}" if rng.random() < 0.6 else a(noun),
        "place": f" in the {roles['place']}" if "place" in roles else "",
    }


def _sense(row: list[str], at: dict[str, list[int]]) -> float:
    """Share of the relations between the words that hold; one whose words are missing does not."""
    agent, verb, thing = (at[role][0] if at[role] else None for role in ("agent", "verb", "thing"))
    holds = [agent is not None and verb is not None and agent < verb, verb is not None and thing is not None and verb < thing]
    if "place" in at:
        holds.append(any(not _PREPOSITIONS.isdisjoint(row[max(0, i - 3) : i]) for i in at["place"]))
    if "adjective" in at:
        holds.append(any(i + 1 in at[role] for i in at["adjective"] for role in ("agent", "thing", "place") if role in at))
    return sum(holds) / len(holds)


TESTBED = Concepts()
