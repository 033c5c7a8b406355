"""`arith`: arithmetic and countdown problems with worked steps, an exact verifier and an exact step checker.

    Compute 17 + 5 * 3.                          Use 3, 5, 7 to make 26.
    Steps: 5 * 3 = 15; 17 + 15 = 32. Answer: 32  Steps: 3 * 7 = 21; 21 + 5 = 26. Answer: 26

What is right. The first "Answer:" counts; it must be followed by the right number in plain decimal form (no leading zero, no sign `+`)
and then by nothing but white space, so text that runs on, or a second answer, is wrong. An expression needs no more than that. Countdown
(the game of the television programme; as an RL testbed: Pan et al. 2025, TinyZero) needs a derivation too: every step is true integer
arithmetic, uses numbers that are still there, each given number is used exactly once, and the last step makes the target. Any such
derivation is accepted; negative intermediate results are allowed and division must be exact.

What a right step is (`StepVerdict.right`) follows the labels of Lightman et al. 2023, "Let's Verify Step by Step": right up to the first
mistake. A step is a mistake when it is malformed, false, uses a number that is not there, or puts the target out of reach; all steps after
it are off the track, because no continuation can make the derivation sound again.

Levels 1 to 3 are for training; 4 and 5 (more numbers, larger numbers, division) are for generalisation and never occur in the corpus.
Splits go by the set of numbers in a problem, whatever the kind, order, signs or level.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from telos.core.errors import UsageError, did_you_mean
from telos.environments.text.base import Item, Split

Kind = Literal["expression", "countdown"]


@dataclass(frozen=True)
class Level:
    """What makes a problem hard: how many operations an expression has, how many numbers a countdown has, the largest given number, the
    largest result on the way, the operators, and how often an expression has parentheses (a probability)."""

    operations: int
    numbers: int
    largest: int
    limit: int
    operators: str
    parentheses: float


LEVELS = {
    1: Level(operations=1, numbers=2, largest=50, limit=99, operators="+-*", parentheses=0.0),
    2: Level(operations=2, numbers=3, largest=20, limit=99, operators="+-*", parentheses=0.0),
    3: Level(operations=3, numbers=3, largest=30, limit=199, operators="+-*", parentheses=0.5),
    4: Level(operations=4, numbers=4, largest=50, limit=499, operators="+-*/", parentheses=0.8),
    5: Level(operations=5, numbers=5, largest=99, limit=999, operators="+-*/", parentheses=1.0),
}
TRAIN_LEVELS = (1, 2, 3)
HELD_OUT_LEVELS = (4, 5)

# Shares of the corpus: documents with a mistake, and expressions answered without steps. They keep the base model imperfect.
_MISTAKES = 0.35
_WITHOUT_STEPS = 0.1

# Plain decimal form; 12 digits bound the work that a hostile completion can ask for.
_NUMBER = r"(0|-?[1-9][0-9]{0,11})"
_STEP = re.compile(rf"{_NUMBER}\s*([-+*/])\s*{_NUMBER}\s*=\s*{_NUMBER}")
_ANSWER = re.compile(rf"\s*{_NUMBER}\s*")
_PIECE = re.compile(r"[^;.\n]+")
_FORMAT = re.compile(r" {s}(; {s})*\. Answer: {n}\s*".format(s=r"-?[0-9]+ [-+*/] -?[0-9]+ = -?[0-9]+", n=r"-?[0-9]+"))

Tree: TypeAlias = "int | tuple[str, Tree, Tree]"
# A leaf, or ("+" or "*", ((sign, part), ...)): a sum whose sign -1 means "subtracted", or a product whose sign -1 means "divided by".
Group: TypeAlias = "int | tuple[str, tuple[tuple[int, Group], ...]]"
Step: TypeAlias = tuple[int, str, int, int]


class Span(NamedTuple):
    """A piece of a completion: `completion[start:end] == text`."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class StepVerdict:
    """One step of a completion and what is true of it. `completion[start:end] == text`.

    `arithmetic`: it reads `a op b = c` and that is true of integers. `available`: `a` and `b` are both there, given or made by an earlier
    step and not used since. `reachable`: it and all steps before it are sound and the target can still be reached: in a countdown, by some
    way of using all that is left exactly once; in an expression, the step is part of working it out.
    """

    text: str
    start: int
    end: int
    arithmetic: bool
    available: bool
    reachable: bool

    @property
    def right(self) -> bool:
        return self.arithmetic and self.available and self.reachable


def _apply(operator: str, a: int, b: int) -> int | None:
    """`a operator b` as an integer; None for a division that leaves a remainder or divides by zero."""
    if operator == "+":
        return a + b
    if operator == "-":
        return a - b
    if operator == "*":
        return a * b
    return a // b if b and a % b == 0 else None


def split_steps(completion: str) -> list[Span]:
    """The steps of a completion: what stands before the first "Answer:", cut at `;`, `.` and line ends, white space stripped."""
    end = completion.find("Answer:")
    spans = []
    for match in _PIECE.finditer(completion, 0, len(completion) if end < 0 else end):
        text = match.group().strip()
        if text:
            start = match.start() + match.group().index(text)
            spans.append(Span(text, start, start + len(text)))
    return spans


def answer_of(completion: str) -> int | None:
    """The number after the first "Answer:"; None when there is none, or anything but white space follows it."""
    _, found, rest = completion.partition("Answer:")
    match = _ANSWER.fullmatch(rest) if found else None
    return int(match.group(1)) if match else None


def verify(item: Item, completion: str) -> bool:
    """Whether the problem is solved; the rules stand in the module's docstring. Never raises, whatever the completion."""
    target = item.facts["target"]
    if answer_of(completion) != target:
        return False
    if item.facts["kind"] == "expression":
        return True
    left = list(item.facts["operands"])
    for span in split_steps(completion):
        step = _read_step(span.text)
        if step is None or _apply(step[1], step[0], step[2]) != step[3] or not _take(left, step):
            return False
    return left == [target]


def check_steps(item: Item, completion: str) -> list[StepVerdict]:
    """A verdict on each step, in order; empty for a completion without steps. Never raises, whatever the completion.

    `arithmetic` and `available` judge a step by itself: after a false step its stated result counts as there. `reachable` never recovers.
    """
    left = list(item.facts["operands"])
    target = item.facts["target"]
    # Two places may fit one step, (2 + 3) * 4 + 2 + 3 for one, so all ways to read the work so far are kept.
    readings: set[Group] = {_grouped(_parse(item.facts["expression"]))} if item.facts["kind"] == "expression" else set()
    sound = True
    verdicts = []
    for span in split_steps(completion):
        step = _read_step(span.text)
        if step is None:
            sound = False
            verdicts.append(StepVerdict(*span, arithmetic=False, available=False, reachable=False))
            continue
        arithmetic = _apply(step[1], step[0], step[2]) == step[3]
        available = _take(left, step)
        sound = sound and arithmetic and available
        if sound and item.facts["kind"] == "expression":
            readings = {after for before in readings for after in _reductions(before, step)}
            sound = bool(readings)
        elif sound:
            sound = can_reach(tuple(sorted(left)), target)
        verdicts.append(StepVerdict(*span, arithmetic=arithmetic, available=available, reachable=sound))
    return verdicts


def _read_step(text: str) -> Step | None:
    match = _STEP.fullmatch(text)
    return (int(match[1]), match[2], int(match[3]), int(match[4])) if match else None


def _take(left: list[int], step: Step) -> bool:
    """Replaces a step's operands in `left` by its stated result; whether both were there."""
    there = True
    for number in (step[0], step[2]):
        if number in left:
            left.remove(number)
        else:
            there = False
    left.append(step[3])
    return there


@functools.lru_cache(maxsize=4096)
def _values(numbers: tuple[int, ...]) -> frozenset[int]:
    """All integers that can be made from sorted `numbers`, each used exactly once."""
    if len(numbers) == 1:
        return frozenset(numbers)
    out = set()
    for some, others in _halves(numbers):
        for a, b in itertools.product(_values(some), _values(others)):
            out.update((a + b, a - b, b - a, a * b))
            if b and a % b == 0:
                out.add(a // b)
            if a and b % a == 0:
                out.add(b // a)
    return frozenset(out)


@functools.lru_cache(maxsize=4096)
def _halves(numbers: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """All ways to cut a sorted multiset into two non-empty parts, the smaller first."""
    out = set()
    for size in range(1, len(numbers) // 2 + 1):
        for chosen in itertools.combinations(range(len(numbers)), size):
            out.add((tuple(numbers[i] for i in chosen), tuple(x for i, x in enumerate(numbers) if i not in chosen)))
    return tuple(sorted(out))


@functools.lru_cache(maxsize=65536)
def can_reach(numbers: tuple[int, ...], target: int) -> bool:
    """Whether `target` can be made from `numbers` (sorted), each used exactly once, with exact integer + - * /.

    Exhaustive: the last operation joins the values of two parts; for each value of the smaller part, the other part must give one of at
    most six values. Five numbers take about a millisecond, six and more are slow.
    """
    if len(numbers) == 1:
        return numbers[0] == target
    for some, others in _halves(numbers):
        for a in _values(some):
            if a == 0 and target == 0:
                return True
            wanted = {target - a, a - target, target + a}
            if a:
                wanted.add(target * a)
                if target % a == 0:
                    wanted.add(target // a)
                if target and a % target == 0:
                    wanted.add(a // target)
            # Values of four numbers are many thousands; asking for each wanted one is cheaper than making them all.
            if any(can_reach(others, b) for b in wanted) if len(others) > 3 else not wanted.isdisjoint(_values(others)):
                return True
    return False


def _parse(expression: str) -> Tree:
    """The expression's tree, left-associative with the usual precedence."""
    tokens = re.findall(r"[0-9]+|[-+*/()]", expression)
    tokens.append("")
    position = 0

    def binary(operators: str) -> Tree:
        nonlocal position
        tree = binary("*/") if operators == "+-" else primary()
        while tokens[position] and tokens[position] in operators:
            operator = tokens[position]
            position += 1
            tree = (operator, tree, binary("*/") if operators == "+-" else primary())
        return tree

    def primary() -> Tree:
        nonlocal position
        token = tokens[position]
        position += 1
        if token != "(":
            return int(token)
        tree = binary("+-")
        position += 1
        return tree

    return binary("+-")


def _grouped(tree: Tree) -> Group:
    """Sums within sums and products within products made one, so that terms and factors may be taken in any order."""
    if isinstance(tree, int):
        return tree
    operator, left, right = tree
    kind, sign = ("+" if operator in "+-" else "*"), (1 if operator in "+*" else -1)
    parts: list[tuple[int, Group]] = []
    for outer, part in ((1, _grouped(left)), (sign, _grouped(right))):
        if isinstance(part, tuple) and part[0] == kind:
            parts += [(outer * inner, x) for inner, x in part[1]]
        else:
            parts.append((outer, part))
    return kind, tuple(parts)


def _reductions(group: Group, step: Step) -> Iterator[Group]:
    """What is left of an expression after a true step, for each place where the step fits."""
    if isinstance(group, int):
        return
    a, operator, b, c = step
    kind, parts = group
    if kind == ("+" if operator in "+-" else "*"):
        for (i, (sign, x)), (j, (other, y)) in itertools.permutations(enumerate(parts), 2):
            # a - b fits +a -b, and -a +b as -(a - b); a + b fits terms of one sign. Products likewise.
            if x == a and y == b and (sign == other) == (operator in "+*"):
                rest = tuple(part for k, part in enumerate(parts) if k not in (i, j))
                if rest:
                    yield kind, (*rest, (sign, c))
                elif sign > 0:
                    yield c
                elif kind == "+":
                    yield -c
                elif abs(c) == 1:
                    yield c
    for i, (sign, x) in enumerate(parts):
        for after in _reductions(x, step):
            yield kind, (*parts[:i], (sign, after), *parts[i + 1 :])


def _split_of(operands: list[int]) -> Split:
    """80 % train, 10 % validation, 10 % test, by the numbers alone: problems that differ only in order or operators stay together."""
    bucket = hashlib.sha256(",".join(map(str, sorted(operands))).encode()).digest()[0] * 10 // 256
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def _fits(level: Level, operator: str, a: int, b: int, c: int | None) -> bool:
    """Whether a step is one that this level's references may contain. One factor is a single digit, as in mental arithmetic."""
    return c is not None and 0 <= c <= level.limit and (operator != "*" or min(a, b) <= 9)


def _work_out(tree: Tree, level: Level, steps: list[Step], slip_at: int = -1, slip: int = 0) -> int | None:
    """The value of a tree, its steps appended to `steps`; None when a step does not fit the level. `slip` is added to the result of step
    `slip_at` and carried on."""
    if isinstance(tree, int):
        return tree
    operator, left, right = tree
    a = _work_out(left, level, steps, slip_at, slip)
    b = None if a is None else _work_out(right, level, steps, slip_at, slip)
    if a is None or b is None:
        return None
    c = _apply(operator, a, b)
    if c is None or not _fits(level, operator, a, b, c):
        return None
    if len(steps) == slip_at:
        c += slip
    steps.append((a, operator, b, c))
    return c if c >= 0 else None


def _combine(rng: random.Random, numbers: list[int], level: Level) -> list[Step] | None:
    """Steps that join all numbers in a random way; None when it led to nothing."""
    left, steps = list(numbers), []
    for _ in range(8 * len(numbers)):
        if len(left) == 1:
            return steps
        i, j = rng.sample(range(len(left)), 2)
        operator = rng.choice(level.operators)
        a, b = left[i], left[j]
        if a < b and operator in "-/":
            a, b = b, a
        c = _apply(operator, a, b)
        # Zero and multiplication by one make countdown steps that do nothing.
        if c and _fits(level, operator, a, b, c) and not (operator in "*/" and min(a, b) == 1):
            steps.append((a, operator, b, c))
            left = [x for k, x in enumerate(left) if k not in (i, j)]
            left.append(c)
    return None


def _expression_text(rng: random.Random, operands: list[int], level: Level) -> str:
    tokens = [str(operands[0])]
    for number in operands[1:]:
        tokens += [rng.choice(level.operators), str(number)]
    if rng.random() < level.parentheses:
        first = rng.randrange(len(operands) - 1)
        last = min(first + rng.choice((1, 1, 2)), len(operands) - 1)
        if last - first < len(operands) - 1:
            tokens[2 * first] = "(" + tokens[2 * first]
            tokens[2 * last] += ")"
    return " ".join(tokens)


def _write(steps: list[Step], answer: int) -> str:
    return " " + "; ".join(f"{a} {operator} {b} = {c}" for a, operator, b, c in steps) + f". Answer: {answer}"


def _problem(rng: random.Random, number: int, split: Split) -> Item:
    """One problem of level `number` whose numbers belong to `split`."""
    level = LEVELS[number]
    kind: Kind = "expression" if rng.random() < 0.5 else "countdown"
    count = level.operations + 1 if kind == "expression" else level.numbers
    while True:
        operands = [rng.randint(1, 9 if rng.random() < 0.5 else level.largest) for _ in range(count)]
        if _split_of(operands) != split:
            continue
        facts: dict[str, Any] = {"kind": kind, "level": number, "operands": operands}
        for _ in range(8):
            if kind == "expression":
                text = _expression_text(rng, operands, level)
                steps: list[Step] | None = []
                if _work_out(_parse(text), level, steps) is None:
                    continue
                prompt, facts["expression"] = f"Compute {text}.\nSteps:", text
            else:
                steps = _combine(rng, operands, level)
                if steps is None:
                    continue
                prompt = f"Use {', '.join(map(str, operands))} to make {steps[-1][3]}.\nSteps:"
            target = steps[-1][3]
            return Item(prompt, _write(steps, target), {**facts, "target": target})


def _near(rng: random.Random, value: int) -> int:
    """A slip: a number near `value`, not negative and not `value`."""
    return value + rng.choice([slip for slip in (-10, -2, -1, 1, 2, 10) if value + slip >= 0])


def _mistaken(rng: random.Random, item: Item) -> str:
    """A completion with a wrong step or a wrong answer, of the kinds that learners make."""
    target, level = item.facts["target"], LEVELS[item.facts["level"]]
    way = rng.random()
    if item.facts["kind"] == "expression" and way < 0.75:
        # A slip in one step, carried on.
        steps: list[Step] = []
        at, slip = rng.randrange(len(item.facts["operands"]) - 1), rng.choice((-10, -2, -1, 1, 2, 10))
        value = _work_out(_parse(item.facts["expression"]), level, steps, at, slip)
        if value is not None:
            return _write(steps, value)
    elif item.facts["kind"] == "countdown" and way < 0.9:
        # True steps that miss the target: given up with what came out, or bent in the last step so that it looks reached.
        other = _combine(rng, item.facts["operands"], level)
        if other and other[-1][3] != target:
            if way < 0.45:
                return _write(other, other[-1][3])
            return _write([*other[:-1], (*other[-1][:3], target)], target)
    return item.reference.rpartition(" ")[0] + f" {_near(rng, target)}"


class Arith:
    """The `arith` testbed; see the module's docstring."""

    name = "arith"
    max_new_tokens = 96  # digits are single tokens

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        """`n` problems of levels 1 to 3, levels and kinds in random order. Problems differ from each other until a level has (nearly) no
        new one to give; then they repeat. Raises `UsageError` for `n=None`, because the problems have no end, and for an unknown split."""
        if n is None:
            raise UsageError("arith makes problems without end; say how many items are wanted")
        return self._draw(TRAIN_LEVELS, n, seed, split)

    def level_items(self, level: int, n: int, seed: int = 0, split: Split = "test") -> list[Item]:
        """As `items`, all of one level from 1 to 5."""
        if level not in LEVELS:
            raise UsageError(f"arith has no level {level}; levels are {', '.join(map(str, LEVELS))}")
        return self._draw((level,), n, seed, split)

    def _draw(self, levels: tuple[int, ...], n: int, seed: int, split: Split) -> list[Item]:
        if split not in get_args(Split):
            raise UsageError(f"unknown split {split!r}{did_you_mean(split, get_args(Split))}; splits are {', '.join(get_args(Split))}")
        if n < 0:
            raise UsageError(f"{n} items cannot be drawn; n must be 0 or more")
        rng = random.Random(f"arith {split} {levels} {seed}")
        items: dict[str, Item] = {}
        repeated: list[Item] = []
        while len(items) + len(repeated) < n:
            level = rng.choice(levels)
            item = _problem(rng, level, split)
            for _ in range(20):
                if item.prompt not in items:
                    break
                item = _problem(rng, level, split)
            if item.prompt in items:
                repeated.append(item)
            else:
                items[item.prompt] = item
        return [*items.values(), *repeated]

    def verify(self, item: Item, completion: str) -> bool:
        return verify(item, completion)

    def check_steps(self, item: Item, completion: str) -> list[StepVerdict]:
        return check_steps(item, completion)

    def split_steps(self, completion: str) -> list[Span]:
        return split_steps(completion)

    def gold(self, item: Item, completion: str) -> float:
        """1.0 when verified, otherwise 0.0; no credit for form or for a part of the way."""
        return float(verify(item, completion))

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        """`correct` is the gold score; `format` is 1 for steps and answer in exactly the form of the references (right or wrong);
        `steps_right` is the share of steps that are right, 0 without steps. Only `correct` enters the gold score."""
        verdicts = check_steps(item, completion)
        return {
            "correct": self.gold(item, completion),
            "format": float(_FORMAT.fullmatch(completion) is not None),
            "steps_right": sum(verdict.right for verdict in verdicts) / len(verdicts) if verdicts else 0.0,
        }

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """`n` documents of levels 1 to 3 of the training split. 35 % hold a wrong step or a wrong answer, and one expression in ten is
        answered without steps, so that a model of this text solves some problems and not most."""
        rng = random.Random(f"arith corpus {seed}")
        for _ in range(n):
            item = _problem(rng, rng.choice(TRAIN_LEVELS), "train")
            mistaken = rng.random() < _MISTAKES
            if item.facts["kind"] == "expression" and rng.random() < _WITHOUT_STEPS:
                target = item.facts["target"]
                yield f"{item.prompt} Answer: {_near(rng, target) if mistaken else target}"
            else:
                yield item.prompt + (_mistaken(rng, item) if mistaken else item.reference)


TESTBED = Arith()
