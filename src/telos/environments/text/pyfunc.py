'''`pyfunc`: small Python functions with unit tests, run in the sandbox.

    def multiples_of_3(numbers):
        """Return those of numbers that are divisible by 3, in their order.

        >>> multiples_of_3([4, 9, -3])
        [9, -3]
        """                                               <- the prompt ends here
        return [n for n in numbers if n % 3 == 0]         <- the answer: a line end and the body

A problem is a template with its parameters (3 above); the names of the arguments and the example vary from item to item. Splits go by
template and parameters, whatever the rest. The body ends before the first line that is not indented, so what a model writes after it (another
function, say) does not count, neither for nor against it.

The gold score is the share of eight hidden calls that return the expected value, of the same types all through. Only the arguments enter the
sandbox; results are compared outside, so a program cannot pass without working them out. The calls lie close to where the parameters matter
and are drawn until the answer to each other problem of the template (4 instead of 3) fails one.
'''

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from string import Template as Text
from typing import Any, get_args

from telos.core.errors import UsageError, did_you_mean
from telos.environments.text.base import Item, Split
from telos.objectives.sandbox import Limits, Sandbox

CALLS = 8  # hidden calls of an item
_MISTAKES = 0.3  # share of the corpus whose body is wrong; it keeps the base model imperfect
# Processor time decides; the clock, which runs faster on a busy machine, only ends programs that wait.
_LIMITS = Limits(seconds=20.0, cpu_seconds=1, memory_bytes=256 << 20, output_bytes=1 << 16)

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Template:
    """A family of problems. `$name` in the texts stands for a parameter or, for `$a` and `$b`, an argument's name.

    kinds: what the arguments are (`_KINDS`). choices: the values of each parameter. near: further numbers or letters close to which the
    arguments should lie, beside the parameters themselves.
    """

    name: str
    kinds: tuple[str, ...]
    summary: str
    body: str
    choices: dict[str, Sequence[Any]]
    near: tuple[Any, ...] = ()


_LETTERS = "aeioustrnlm"
_WORDS = (
    *("apple", "river", "stone", "table", "letter", "sun", "moon", "tree", "music", "silent", "orange", "train", "estate", "on", "a", "it"),
    *(
        "lantern",
        "mirror",
        "salt",
        "noon",
        "level",
        "summer",
        "tiny",
        "rust",
        "atlas",
        "union",
        "is",
        "me",
        "meal",
        "notes",
        "rail",
        "solo",
    ),
)

TEMPLATES = (
    # Lists of numbers
    Template("add_$k", ("ints",), "Return a list of $a, each increased by $k.", "return [n + $k for n in $a]", {"k": range(1, 21)}),
    Template("times_$k", ("ints",), "Return a list of $a, each multiplied by $k.", "return [n * $k for n in $a]", {"k": range(2, 21)}),
    Template(
        "multiples_of_$k",
        ("ints",),
        "Return those of $a that are divisible by $k, in their order.",
        "return [n for n in $a if n % $k == 0]",
        {"k": range(2, 16)},
    ),
    Template(
        "larger_than_$k",
        ("ints",),
        "Return those of $a that are larger than $k, in their order.",
        "return [n for n in $a if n > $k]",
        {"k": range(30)},
    ),
    Template("count_below_$k", ("ints",), "Return how many of $a are smaller than $k.", "return sum(n < $k for n in $a)", {"k": range(30)}),
    Template(
        "sum_of_multiples_of_$k",
        ("ints",),
        "Return the sum of those of $a that are divisible by $k.",
        "return sum(n for n in $a if n % $k == 0)",
        {"k": range(2, 16)},
    ),
    Template("every_$k", ("items",), "Return every element of $a whose index is a multiple of $k.", "return $a[::$k]", {"k": range(2, 8)}),
    Template(
        "first_$k", ("items",), "Return the first $k elements of $a, or all if there are fewer.", "return $a[:$k]", {"k": range(1, 9)}
    ),
    Template("without_first_$k", ("items",), "Return $a without its first $k elements.", "return $a[$k:]", {"k": range(1, 9)}),
    Template("without_last_$k", ("items",), "Return $a without its last $k elements.", "return $a[:-$k]", {"k": range(1, 9)}),
    Template(
        "rotate_$k",
        ("items",),
        "Return $a with its first element moved to the end, $k times over.",
        "if not $a:\n    return []\nstart = $k % len($a)\nreturn $a[start:] + $a[:start]",
        {"k": range(1, 9)},
    ),
    Template(
        "pieces_of_$k",
        ("items",),
        "Cut $a into lists of $k elements; the last one may be shorter.",
        "return [$a[i:i + $k] for i in range(0, len($a), $k)]",
        {"k": range(2, 8)},
    ),
    Template(
        "between_${low}_and_$high",
        ("ints",),
        "Return $a with everything below $low replaced by $low and everything above $high by $high.",
        "return [min(max(n, $low), $high) for n in $a]",
        {"low": (0, 2, 4, 5, 8), "high": (10, 12, 15, 20, 25, 30)},
    ),
    Template(
        "running_sum_from_$k",
        ("ints",),
        "Return the sums of $k and the first one, two, three and more of $a.",
        "total = $k\nsums = []\nfor n in $a:\n    total += n\n    sums.append(total)\nreturn sums",
        {"k": range(16)},
    ),
    Template(
        "differences_$k",
        ("ints",),
        "Return by how much each of $a is larger than the one $k places before it, where there is one.",
        "return [$a[i] - $a[i - $k] for i in range($k, len($a))]",
        {"k": range(1, 6)},
    ),
    Template(
        "first_above_$k",
        ("ints",),
        "Return the index of the first of $a that is larger than $k, or -1.",
        "for i, n in enumerate($a):\n    if n > $k:\n        return i\nreturn -1",
        {"k": range(30)},
    ),
    Template(
        "replace_${k}_by_$m",
        ("ints",),
        "Return $a with each $k replaced by $m.",
        "return [$m if n == $k else n for n in $a]",
        {"k": range(1, 10), "m": (0, 20, 50, 99)},
    ),
    Template(
        "pairs_with_sum_$k",
        ("items",),
        "Return how many pairs of different places in $a hold numbers with sum $k.",
        "count = 0\nfor i in range(len($a)):\n    for j in range(i):\n        count += $a[i] + $a[j] == $k\nreturn count",
        {"k": range(4, 16)},
    ),
    Template(
        "largest_$k",
        ("ints",),
        "Return the $k largest of $a, the largest first.",
        "return sorted($a, reverse=True)[:$k]",
        {"k": range(1, 9)},
    ),
    Template(
        "sum_of_powers_$k",
        ("ints",),
        "Return the sum of $a, each raised to the power $k.",
        "return sum(n ** $k for n in $a)",
        {"k": range(2, 8)},
    ),
    Template(
        "at_most_$k",
        ("items",),
        "Return $a without the elements that have occurred $k times before.",
        "kept = []\nfor x in $a:\n    if kept.count(x) < $k:\n        kept.append(x)\nreturn kept",
        {"k": range(1, 5)},
        near=(7,),
    ),
    Template(
        "dot_plus_$k",
        ("ints", "ints"),
        "Return $k plus the sum of the products of the numbers at the same place in $a and $b.",
        "return $k + sum(x * y for x, y in zip($a, $b))",
        {"k": range(1, 16)},
    ),
    Template(
        "in_both_above_$k",
        ("items", "items"),
        "Return the sorted numbers larger than $k that are both in $a and in $b.",
        "return sorted(n for n in set($a) & set($b) if n > $k)",
        {"k": range(9)},
    ),
    # Numbers
    Template(
        "digit_sum_times_$k",
        ("int",),
        "Return $k times the sum of the digits of $a.",
        "return $k * sum(int(digit) for digit in str($a))",
        {"k": range(1, 13)},
        near=(95, 190),
    ),
    Template(
        "in_base_$k",
        ("int",),
        "Return $a as text in base $k.",
        "digits = ''\nwhile $a >= $k:\n    digits = str($a % $k) + digits\n    $a //= $k\nreturn str($a) + digits",
        {"k": range(2, 10)},
    ),
    Template(
        "count_multiples_of_$k",
        ("int",),
        "Return how many numbers from 1 to $a are divisible by $k.",
        "return $a // $k",
        {"k": range(2, 16)},
    ),
    Template(
        "times_divisible_by_$k",
        ("positive",),
        "Return how many times $a can be divided by $k without remainder.",
        "count = 0\nwhile $a % $k == 0:\n    $a //= $k\n    count += 1\nreturn count",
        {"k": range(2, 8)},
        near=(4, 8, 9, 16, 25, 27, 36, 49),
    ),
    Template(
        "by_${k}_not_$m",
        ("int",),
        "Return whether $a is divisible by $k and not by $m.",
        "return $a % $k == 0 and $a % $m != 0",
        {"k": (2, 3, 4, 5), "m": (6, 7, 8, 9, 10)},
        near=(12, 18, 20, 24, 30, 40),
    ),
    Template(
        "${word}_at_$k",
        ("small",),
        "Return the numbers from 1 to $a as texts, with '$word' in place of those divisible by $k.",
        "return ['$word' if n % $k == 0 else str(n) for n in range(1, $a + 1)]",
        {"word": ("fizz", "buzz", "hop", "clap"), "k": range(2, 8)},
    ),
    Template(
        "polynomial_${p}_${q}_$r",
        ("int",),
        "Return $p times the square of $a, plus $q times $a, plus $r.",
        "return $p * $a ** 2 + $q * $a + $r",
        {"p": (1, 2, 3, 5), "q": (2, 4, 7), "r": (1, 6, 9)},
    ),
    Template(
        "sum_by_${k}_or_$m",
        ("int",),
        "Return the sum of the numbers below $a that are divisible by $k or by $m.",
        "return sum(n for n in range($a) if n % $k == 0 or n % $m == 0)",
        {"k": (2, 3, 4, 5), "m": (7, 11, 13)},
    ),
    Template(
        "clock_${m}_plus_$k",
        ("int",),
        "Return what a clock of $m hours that shows $a shows $k hours later, from 0 to one less than $m.",
        "return ($a + $k) % $m",
        {"m": (5, 7, 10, 12, 24), "k": (1, 2, 3, 4, 5, 6)},
    ),
    Template(
        "greatest_divisor_up_to_$k",
        ("positive",),
        "Return the greatest number up to $k by which $a is divisible.",
        "return max(n for n in range(1, $k + 1) if $a % n == 0)",
        {"k": range(3, 16)},
        near=(12, 60, 84, 24, 30),
    ),
    # Text
    Template("repeat_$k", ("text",), "Return $a written $k times in a row.", "return $a * $k", {"k": range(2, 10)}),
    Template("count_$c", ("text",), "Return how often the letter $c occurs in $a.", "return $a.count('$c')", {"c": _LETTERS}),
    Template("without_$c", ("text",), "Return $a without the letter $c.", "return $a.replace('$c', '')", {"c": _LETTERS}),
    Template(
        "${c}_to_$d",
        ("text",),
        "Return $a with each letter $c replaced by $d.",
        "return $a.replace('$c', '$d')",
        {"c": _LETTERS, "d": "xyz"},
    ),
    Template(
        "shift_$k",
        ("text",),
        "Return $a with each letter replaced by the one $k places later in the alphabet, which begins again after z.",
        "shifted = ''\nfor c in $a:\n    shifted += chr((ord(c) - 97 + $k) % 26 + 97) if c.isalpha() else c\nreturn shifted",
        {"k": range(1, 14)},
    ),
    Template(
        "words_longer_than_$k",
        ("text",),
        "Return the words of $a that have more than $k letters.",
        "return [word for word in $a.split() if len(word) > $k]",
        {"k": range(1, 7)},
    ),
    Template(
        "begin_with_$c",
        ("words",),
        "Return those of $a that begin with the letter $c.",
        "return [word for word in $a if word.startswith('$c')]",
        {"c": _LETTERS},
    ),
    Template(
        "end_with_$c",
        ("words",),
        "Return how many of $a end with the letter $c.",
        "return sum(word.endswith('$c') for word in $a)",
        {"c": _LETTERS},
    ),
    Template(
        "first_${k}_letters",
        ("text",),
        "Return $a with each word cut to its first $k letters.",
        "return ' '.join(word[:$k] for word in $a.split())",
        {"k": range(1, 7)},
    ),
    Template(
        "left_filled_$k",
        ("word",),
        "Return $a with as many $c in front as make it $k characters long.",
        "return $a.rjust($k, '$c')",
        {"k": (5, 6, 7, 8, 9), "c": "*-.0"},
    ),
    Template(
        "joined",
        ("words",),
        "Return $a as one text, with '$c' between them.",
        "return '$c'.join($a)",
        {"c": ("-", "/", ", ", " and ", "+", " | ", "::")},
    ),
    Template(
        "places_of_$c",
        ("text",),
        "Return the indices in $a at which the letter $c stands.",
        "return [i for i, letter in enumerate($a) if letter == '$c']",
        {"c": _LETTERS},
    ),
    Template(
        "cut_at_$k",
        ("text",),
        "Return $a if it has at most $k characters, otherwise its first $k characters and '...'.",
        "if len($a) <= $k:\n    return $a\nreturn $a[:$k] + '...'",
        {"k": range(3, 13)},
    ),
    Template(
        "in_brackets",
        ("text",),
        "Return $a with each word written between $left and $right.",
        "return ' '.join('$left' + word + '$right' for word in $a.split())",
        {"left": ("(", "[", "<", "*", "_"), "right": (")", "]", ">", "*", "_")},
    ),
    Template(
        "upper_every_$k",
        ("word",),
        "Return $a with every letter whose index is a multiple of $k in upper case.",
        "return ''.join(c.upper() if i % $k == 0 else c for i, c in enumerate($a))",
        {"k": range(2, 7)},
    ),
    # Dictionaries
    Template(
        "keys_above_$k",
        ("counts",),
        "Return the sorted keys of $a whose value is larger than $k.",
        "return sorted(key for key, value in $a.items() if value > $k)",
        {"k": range(20)},
    ),
    Template(
        "raise_by_$k",
        ("counts",),
        "Return a copy of $a with each value increased by $k.",
        "return {key: value + $k for key, value in $a.items()}",
        {"k": range(1, 16)},
    ),
    Template(
        "total_of_$c",
        ("counts",),
        "Return the sum of the values in $a whose key contains the letter $c.",
        "return sum(value for key, value in $a.items() if '$c' in key)",
        {"c": _LETTERS},
    ),
    Template(
        "at_least_$k",
        ("items",),
        "Return the sorted elements of $a that occur at least $k times, each once.",
        "return sorted(x for x in set($a) if $a.count(x) >= $k)",
        {"k": range(2, 5)},
        near=(7,),
    ),
    Template(
        "count_by_remainder_$k",
        ("ints",),
        "Return a dictionary from each remainder of $a by $k, as text, to how many have it.",
        "counts = {}\nfor n in $a:\n    key = str(n % $k)\n    counts[key] = counts.get(key, 0) + 1\nreturn counts",
        {"k": range(2, 10)},
    ),
    Template(
        "look_up_or_$k",
        ("counts", "words"),
        "Return the values in $a of the keys $b, with $k for those that are missing.",
        "return [$a.get(key, $k) for key in $b]",
        {"k": (0, 1, 5, 10, 50, 99)},
    ),
    Template(
        "lengths_up_to_$k",
        ("words",),
        "Return a dictionary from each of $a that has at most $k letters to its length.",
        "return {word: len(word) for word in $a if len(word) <= $k}",
        {"k": range(2, 8)},
    ),
    Template(
        "merge_times_$k",
        ("counts", "counts"),
        "Return a dictionary with the values of $a, plus $k times those of $b, by key.",
        "merged = dict($a)\nfor key, value in $b.items():\n    merged[key] = merged.get(key, 0) + $k * value\nreturn merged",
        {"k": range(1, 10)},
    ),
)


# Arguments -------------------------------------------------------------------------------------------------------------------------------


def _int(rng: random.Random, near: Sequence[Any]) -> int:
    numbers = [x for x in near if isinstance(x, int)]
    if numbers and rng.random() < 0.6:
        return rng.choice(numbers) * rng.choice((1, 1, 2)) + rng.choice((-1, 0, 0, 1))
    return rng.randint(-9, 40)


def _ints(rng: random.Random, near: Sequence[Any]) -> list[int]:
    return [_int(rng, near) for _ in range(rng.randint(3, 9))]


def _items(rng: random.Random, near: Sequence[Any]) -> list[int]:
    few = [rng.randint(0, 9) for _ in range(3)]
    return [rng.choice(few) if rng.random() < 0.7 else rng.randint(0, 9) for _ in range(rng.randint(6, 12))]


def _word(rng: random.Random, near: Sequence[Any]) -> str:
    letters = [x for x in near if isinstance(x, str) and len(x) == 1]
    fitting = [word for word in _WORDS if any(letter in word for letter in letters)]
    at_ends = [word for word in fitting if word[0] in letters or word[-1] in letters]
    return rng.choice(rng.choice([_WORDS, fitting or _WORDS, at_ends or _WORDS]))


def _words(rng: random.Random, near: Sequence[Any]) -> list[str]:
    return [_word(rng, near) for _ in range(rng.randint(3, 6))]


def _counts(rng: random.Random, near: Sequence[Any]) -> dict[str, int]:
    return {_word(rng, near): _int(rng, near) for _ in range(rng.randint(3, 6))}


# How an argument of each kind is drawn, the names that it may have, and its empty value.
_KINDS: dict[str, tuple[Callable[[random.Random, Sequence[Any]], Any], tuple[str, ...], Any]] = {
    "ints": (_ints, ("numbers", "values", "data", "nums"), []),
    "items": (_items, ("items", "elements", "row", "values"), []),
    "int": (lambda rng, near: abs(_int(rng, near)), ("number", "x", "value", "amount"), 0),
    "positive": (lambda rng, near: max(1, abs(_int(rng, near))) * rng.choice((1, 1, 2, 3)), ("number", "x", "value"), 1),
    "small": (lambda rng, near: rng.randint(2, 16), ("limit", "count", "last"), 0),
    "word": (_word, ("word", "name", "label"), ""),
    "words": (_words, ("words", "names", "labels"), []),
    "text": (lambda rng, near: " ".join(_words(rng, near)), ("text", "sentence", "line", "message"), ""),
    "counts": (_counts, ("counts", "prices", "scores", "stock"), {}),
}


# Problems --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A template with parameters."""

    template: Template
    parameters: tuple[tuple[str, Any], ...]

    def fill(self, text: str, names: Sequence[str] = ()) -> str:
        return Text(text).substitute(dict(self.parameters), **dict(zip("ab", names, strict=False)))

    @property
    def near(self) -> list[Any]:
        return [*(value for _, value in self.parameters), *self.template.near]

    def body(self, names: Sequence[str]) -> str:
        """The reference answer: a line end and the body, indented."""
        return "".join(f"\n    {line}" for line in self.fill(self.template.body, names).split("\n"))

    @functools.cached_property
    def solution(self) -> Callable[..., Any]:
        """The reference as a function; text of our own making."""
        names = ("a", "b")[: len(self.template.kinds)]
        space: dict[str, Any] = {}
        exec(f"def solution({', '.join(names)}):{self.body(names)}", space)
        return space["solution"]


_PROBLEMS = {
    template.name: [
        Problem(template, tuple(zip(template.choices, values, strict=True))) for values in itertools.product(*template.choices.values())
    ]
    for template in TEMPLATES
}


def split_of(problem: Problem) -> Split:
    """80 % train, 10 % validation, 10 % test, by template and parameters alone."""
    name = json.dumps([problem.template.name, problem.parameters])
    bucket = hashlib.sha256(name.encode()).digest()[0] * 10 // 256
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


@functools.cache
def problems(split: Split) -> tuple[tuple[Problem, ...], ...]:
    """The problems of a split by template, for those templates that have any there."""
    found = (tuple(problem for problem in _PROBLEMS[template.name] if split_of(problem) == split) for template in TEMPLATES)
    return tuple(group for group in found if group)


def _call(rng: random.Random, problem: Problem) -> list[Any]:
    return [_KINDS[kind][0](rng, problem.near) for kind in problem.template.kinds]


def _tell_apart(calls: list[list[Any]], problem: Problem) -> bool:
    """Whether the solution of every other problem of the template fails one of the calls."""
    expected = [problem.solution(*call) for call in calls]
    return not any(
        all(_same(other.solution(*call), value) for call, value in zip(calls, expected, strict=True))
        for other in _PROBLEMS[problem.template.name]
        if other.parameters != problem.parameters
    )


def _item(rng: random.Random, problem: Problem) -> Item:
    template = problem.template
    names: list[str] = []
    for kind in template.kinds:
        names.append(rng.choice([name for name in _KINDS[kind][1] if name not in names]))
    name = problem.fill(template.name)
    calls = [[_KINDS[kind][2] for kind in template.kinds]]
    for _ in range(50):
        calls = [calls[0], *(_call(rng, problem) for _ in range(CALLS - 1))]
        if _tell_apart(calls, problem):
            break
    example = _call(rng, problem)
    for _ in range(20):  # an example that is also a hidden call would give an eighth away
        if example not in calls:
            break
        example = _call(rng, problem)
    shown = f"{name}({', '.join(map(repr, example))})"
    summary = problem.fill(template.summary, names)
    prompt = f'def {name}({", ".join(names)}):\n    """{summary}\n\n    >>> {shown}\n    {problem.solution(*example)!r}\n    """'
    facts = {"name": name, "calls": calls, "expected": [problem.solution(*call) for call in calls]}
    return Item(prompt, problem.body(names), facts)


# The judge -------------------------------------------------------------------------------------------------------------------------------

# Reads {"code", "name", "calls"}. Writes a line "parsed" and then, for each call, what it returned or that it raised.
_RUNNER = """
import json as _json, os as _os, sys as _sys

def _plain(value):
    kind = type(value)
    if kind is list:
        return [_plain(part) for part in value]
    if kind is dict and all(type(key) is str for key in value):
        return {key: _plain(part) for key, part in value.items()}
    if value is None or kind in (bool, int, float, str):
        return value
    raise TypeError

def _run(given):
    stream = _os.dup(1)
    _os.dup2(_os.open(_os.devnull, _os.O_WRONLY), 1)

    def report(line):
        _os.write(stream, (_json.dumps(line) + "\\n").encode())

    code = compile(given["code"], "answer.py", "exec")
    report("parsed")
    space = {"__name__": "answer"}
    exec(code, space)
    function = space[given["name"]]
    for arguments in given["calls"]:
        try:
            value = function(*arguments)
        except BaseException:
            report({"raised": True})
            continue
        try:
            report({"value": _plain(value)})
        except BaseException:
            report({"other": True})

_run(_json.loads(_sys.stdin.read()))
"""


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox(_LIMITS)


def _same(one: Any, other: Any) -> bool:
    """Equal in value and in type, all through."""
    if type(one) is not type(other):
        return False
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other


def body_of(completion: str) -> str:
    """A completion up to its first line that is not indented; the first line continues the prompt's last."""
    first, *lines = completion.split("\n")
    body = itertools.takewhile(lambda line: not line.strip() or line[0] in " \t", lines)
    return "\n".join([first, *body])


@functools.lru_cache(maxsize=8192)
def _judge(code: str, name: str, calls: str, expected: str) -> tuple[bool, bool, float]:
    """Whether the code parses, whether every call returned, and the share of calls that returned what is expected."""
    outcome = _sandbox().run(_RUNNER, json.dumps({"code": code, "name": name, "calls": json.loads(calls)}))
    wanted = json.loads(expected)
    results: list[Any] = []
    for line in outcome.stdout.splitlines()[: 1 + len(wanted)]:
        try:
            results.append(json.loads(line))
        except (ValueError, RecursionError):  # the program found the way to our stream
            results.append(None)
    parsed, results = results[:1] == ["parsed"], [result if isinstance(result, dict) else {} for result in results[1:]]
    returned = len(results) == len(wanted) and all("value" in result or "other" in result for result in results)
    right = sum("value" in result and _same(result["value"], value) for result, value in zip(results, wanted, strict=False))
    return parsed, returned, right / len(wanted)


class PyFunc:
    """The `pyfunc` testbed; see the module's docstring."""

    name = "pyfunc"
    max_new_tokens = 80

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """`n` items, templates at random and then their parameters. Prompts differ from each other until there is (nearly) no new one. Raises
        `UsageError` for `n=None`, because examples can be drawn without end, and for an unknown split."""
        if split not in get_args(Split):
            raise UsageError(f"unknown split {split!r}{did_you_mean(split, get_args(Split))}; splits are {', '.join(get_args(Split))}")
        if n is None:
            raise UsageError("pyfunc makes problems without end; say how many items are wanted")
        if n < 0:
            raise UsageError(f"{n} items cannot be drawn; n must be 0 or more")
        rng = random.Random(f"pyfunc {split} {seed}")
        groups = problems(split)
        items: dict[str, Item] = {}
        repeated: list[Item] = []
        while len(items) + len(repeated) < n:
            for attempt in range(20):
                item = _item(rng, rng.choice(rng.choice(groups)))
                if item.prompt not in items:
                    items[item.prompt] = item
                    break
                if attempt == 19:
                    repeated.append(item)
        return [*items.values(), *repeated]

    def _judged(self, item: Item, completion: str) -> tuple[bool, bool, float]:
        facts = item.facts
        return _judge(item.prompt + body_of(completion), facts["name"], json.dumps(facts["calls"]), json.dumps(facts["expected"]))

    def gold(self, item: Item, completion: str) -> float:
        """The share of the hidden calls that return the expected value; 0.0 for what does not parse. Raises `Failure` only where this machine
        cannot run programs safely."""
        return self._judged(item, completion)[2]

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`parses`: it is Python; `runs`: every hidden call returns something, in time; `passes_all`: each returns the expected value. The gold
        score is a share of calls, and not made of these."""
        parsed, returned, share = self._judged(item, completion)
        return {"parses": float(parsed), "runs": float(returned), "passes_all": float(share == 1.0)}

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """`n` functions of the training split. In 30 % the body is that of another problem of the same template, so that a model of this text
        solves some problems and not most."""
        rng = random.Random(f"pyfunc corpus {seed}")
        groups = problems("train")
        for _ in range(n):
            group = rng.choice(groups)
            problem = rng.choice(group)
            item = _item(rng, problem)
            others = [other for other in group if other != problem]
            if others and rng.random() < _MISTAKES:
                names = item.prompt[item.prompt.index("(") + 1 : item.prompt.index(")")].split(", ")
                yield item.prompt + rng.choice(others).body(names)
            else:
                yield item.prompt + item.reference


TESTBED = PyFunc()
