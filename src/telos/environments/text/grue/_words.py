"""Words that several tasks use: those of `review`, which the bundled model knows."""

from __future__ import annotations

import itertools
import re

from telos.environments.text import review

ASPECTS = review._ASPECTS  # aspect -> (words that praise it, words that fault it)
PRODUCTS = dict(review._COMMON)  # product -> its aspects
PEOPLE = tuple(review._READERS)
PLURAL = review._PLURAL
a = review._a
listed = review._words  # the words of a text as a tuple
well_formed = review._well_formed

_WORD = re.compile(r"\w+(?:'\w+)?")


def words(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return _WORD.findall(text.lower())


def form(text: str, longest: int) -> float:
    """Share of what one plain sentence is: begins with a capital, ends in a mark, has 3 to `longest` words, and no word twice running."""
    found = words(text)
    if not found:
        return 0.0
    doubled = any(left == right for left, right in itertools.pairwise(found))
    return (text[0].isupper() + (text[-1] in ".!?") + (3 <= len(found) <= longest) + (not doubled)) / 4
