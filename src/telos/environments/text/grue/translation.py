"""`grue-translation`: a sentence is to be put from English into a rule-based language, or back. After GRUE's IWSLT 2017 task.

    English: Yesterday the old nurse did not see a lamp.
    Nova: Runa la bimo kemo mo sebon ne rilor.

Nova is made up, regular and learnt from examples alone. Its order is time, subject, object, verb. Adjectives follow their noun; `la` and
`mo` are the articles "the" and "a". A noun takes -li in the plural and then -n as an object; a verb takes -r in the past and -m in the
future, and `ne` stands before a verb that is denied. Every sentence has one translation in either direction; the gold score is chrF with it.
"""

from __future__ import annotations

import random
from typing import Any

from telos.environments.text.base import Item
from telos.environments.text.docstrings import chrf
from telos.environments.text.grue._metrics import token_f1
from telos.environments.text.grue._task import DrawnTask
from telos.environments.text.grue._words import a


def _lexicon(pairs: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in pairs.split())


_PEOPLE = _lexicon("nurse=bimo farmer=dofa doctor=faba teacher=gero student=kelo driver=lapo")
_THINGS = _lexicon("lamp=sebo coat=tage drum=vero tent=zeta kite=bula chair=defu phone=folu robot=geto")
_ADJECTIVES = _lexicon("old=kemo new=pola small=ribu red=fini")
_VERBS = _lexicon("see=rilo find=sova buy=tebo paint=loga")
_PAST = {"see": "saw", "find": "found", "buy": "bought", "paint": "painted"}
_TIMES = {"past": ("yesterday", "runa"), "present": ("today", "zuri"), "future": ("tomorrow", "bevi")}
_ENDINGS = {"past": "r", "present": "", "future": "m"}

Meaning = dict[str, Any]  # subject and object: [noun, adjective or None, definite, plural]; verb, tense, denied, timed


def english(meaning: Meaning) -> str:
    """The meaning in English."""
    verb, tense, denied, plural = meaning["verb"], meaning["tense"], meaning["denied"], meaning["subject"][3]
    if tense == "future":
        said = f"will {'not ' if denied else ''}{verb}"
    elif denied:
        said = f"{'did' if tense == 'past' else 'do' if plural else 'does'} not {verb}"
    else:
        said = _PAST[verb] if tense == "past" else verb if plural else verb + "s"
    parts = [_TIMES[tense][0]] if meaning["timed"] else []
    return _sentence([*parts, _english_noun(*meaning["subject"]), said, _english_noun(*meaning["object"])])


def nova(meaning: Meaning) -> str:
    """The meaning in Nova."""
    tense = meaning["tense"]
    parts = [_TIMES[tense][1]] if meaning["timed"] else []
    parts += [_nova_noun(_PEOPLE, *meaning["subject"], ending=""), _nova_noun(_THINGS, *meaning["object"], ending="n")]
    return _sentence([*parts, *(["ne"] if meaning["denied"] else []), _VERBS[meaning["verb"]] + _ENDINGS[tense]])


def _sentence(parts: list[str]) -> str:
    text = " ".join(parts)
    return text[0].upper() + text[1:] + "."


def _english_noun(noun: str, adjective: str | None, definite: bool, plural: bool) -> str:
    phrase = (f"{adjective} " if adjective else "") + noun + ("s" if plural else "")
    return f"the {phrase}" if definite else f"some {phrase}" if plural else a(phrase)


def _nova_noun(lexicon: dict[str, str], noun: str, adjective: str | None, definite: bool, plural: bool, ending: str) -> str:
    phrase = lexicon[noun] + ("li" if plural else "") + ending
    return f"{'la' if definite else 'mo'} {phrase}" + (f" {_ADJECTIVES[adjective]}" if adjective else "")


class Translation(DrawnTask):
    """The testbed; see the module's docstring."""

    name = "grue-translation"
    flaws = 0.2
    lexical = ("bleu", "chrf")

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`chrf`, the gold score; `words`: F of the words shared with the reference in any order; `exact`: 1 for the very translation."""
        (reference,) = item.facts["references"]
        text = completion.strip()
        return {"chrf": chrf(text, reference), "words": token_f1(text, reference), "exact": float(text == reference)}

    def gold(self, item: Item, completion: str) -> float:
        """chrF, in [0, 1]."""
        return chrf(completion.strip(), item.facts["references"][0])

    def _draw(self, rng: random.Random) -> tuple[str, Item]:
        def noun(lexicon: dict[str, str]) -> list[Any]:
            adjective = rng.choice(tuple(_ADJECTIVES)) if rng.random() < 0.4 else None
            return [rng.choice(tuple(lexicon)), adjective, rng.random() < 0.5, rng.random() < 0.3]

        meaning: Meaning = {
            "subject": noun(_PEOPLE),
            "object": noun(_THINGS),
            "verb": rng.choice(tuple(_VERBS)),
            "tense": rng.choice(tuple(_TIMES)),
            "denied": rng.random() < 0.25,
            "timed": rng.random() < 0.4,
        }
        into = rng.choice(("Nova", "English"))
        source, target = (english(meaning), nova(meaning)) if into == "Nova" else (nova(meaning), english(meaning))
        start = "English" if into == "Nova" else "Nova"
        item = Item(f"{start}: {source}\n{into}:", " " + target, {"meaning": meaning, "into": into, "references": [target]})
        return english(meaning), item

    def _flawed(self, rng: random.Random, item: Item) -> str:
        """The translation of something near: one or two of the words, the tense or the denial are others."""
        meaning: Meaning = dict(item.facts["meaning"])
        for part in rng.sample(("subject", "object", "verb", "tense", "denied"), 2):
            if part in ("subject", "object"):
                lexicon = _PEOPLE if part == "subject" else _THINGS
                meaning[part] = [rng.choice(tuple(lexicon)), *meaning[part][1:]]
            elif part == "denied":
                meaning[part] = not meaning[part]
            else:
                meaning[part] = rng.choice(tuple(_VERBS if part == "verb" else _TIMES))
        return " " + (nova(meaning) if item.facts["into"] == "Nova" else english(meaning))


TESTBED = Translation()
