"""Verifiable rewards: functions that look at an answer and know whether it is right, in the signature of TRL's reward functions.

    telos train grpo --reward telos.objectives.verifiers:answer_match ...

| name | column | reward |
|---|---|---|
| `exact_match` | `answer` | 1 for the expected text, up to case, white space and punctuation at its ends; else 0 |
| `answer_match` | `answer` | 1 when the final answer is the expected number or expression; else 0 |
| `format_tags` | | 1 for `<think>...</think><answer>...</answer>` and nothing else; else 0 |
| `format_pattern` | `pattern` | 1 when the whole answer matches the row's regular expression; else 0 |
| `arithmetic_steps` | `facts` | share of steps that are right, of the bundled `arith` problems |
| `unit_tests`, `all_unit_tests` | `tests` | share of Python's asserts that hold, in the sandbox; 1 when all do, else 0 |
| `program_output` | `cases` | share of inputs for which a program prints the expected output, in the sandbox |
| `box_iou` | `box` | intersection over union of boxes in an image |
| `length_cosine` | `answer` | right answers lose, wrong ones gain with length, along a cosine |
| `length_linear` | | 0, and falling to -1 over the last tokens before the longest length |
| `repetition` | | 0 without repeated phrases, towards -1 the more there are |

The last three, `format_tags` and `format_pattern` are made by functions of this file (`cosine_length`, `linear_length`, `ngram_repetition`,
`tags_in_order`, `whole_match`); call those in a file of your own for other settings.

A row whose column is None has no such reward (None); a column that cannot be understood is a `UsageError` that names the row. Completions
are texts or the turns of a conversation.
"""

from __future__ import annotations

import ast
import functools
import itertools
import json
import math
import re
import secrets
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from telos.core.errors import UsageError
from telos.environments.text import arith
from telos.environments.text.base import Item
from telos.functional.boxes import Box, iou
from telos.objectives.reward_worker import plain_text
from telos.objectives.sandbox import Limits, Sandbox

Rewards = list[float | None]
Reward = Callable[..., Rewards]

# Processor time decides; the clock, which runs faster on a busy machine, only ends programs that wait.
_PROGRAM_LIMITS = Limits(seconds=20.0, cpu_seconds=2)


def _malformed(row: int, column: str, problem: str) -> UsageError:
    return UsageError(f"row {row} of the batch: column {column!r} {problem}")


def by_row(completions: Sequence[Any], column: Sequence[Any], score: Callable[[int, str, Any], float]) -> Rewards:
    """`score(row, text, value)` for each row whose value is not None."""
    rows = enumerate(zip(completions, column, strict=True))
    return [None if value is None else score(i, plain_text(completion), value) for i, (completion, value) in rows]


# Answers ---------------------------------------------------------------------------------------------------------------------------------


def _accepted(row: int, value: Any) -> list[str]:
    """The expected answers as texts: one, or a list of which any will do."""
    values = value if isinstance(value, list) else [value]
    for one in values:
        if isinstance(one, bool) or not isinstance(one, (str, int, float)) or (isinstance(one, float) and not math.isfinite(one)):
            raise _malformed(row, "answer", f"must be a text, a number, or a list of them, not {one!r}")
    if not values:
        raise _malformed(row, "answer", "is an empty list; write null where there is no expected answer")
    return [str(one) for one in values]


def normalised(text: str) -> str:
    """A text with its white space single, its case folded, its compatibility characters (full-width digits, ligatures) plain, and without
    quotation marks and sentence punctuation at its ends."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    quotes = " \"'`“”‘’«»"
    return text.lstrip(quotes).rstrip(quotes + ".,;:!?")


def tagged(text: str) -> str:
    """What stands in the last `<answer>` tags, or the whole text where there are none."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0] if "<answer>" in text else text


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> Rewards:
    """1.0 when the completion, or what stands in its last `<answer>` tags, is an expected answer up to `normalised`; else 0.0."""

    def score(row: int, text: str, value: Any) -> float:
        return float(normalised(tagged(text)) in map(normalised, _accepted(row, value)))

    return by_row(completions, answer, score)


_MARKER = re.compile(r"\\boxed\b|\\fbox\b|####|<answer>|\banswer\s*(?::|\bis\b:?|=)", re.IGNORECASE)
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![0-9A-Za-z]))?"
# A sign counts where nothing stands before it from which it could subtract.
_NUMBER = re.compile(rf"(?:(?<![\w)}}\]])[-+])?\$?(?<![\w.]){_DECIMAL}(?:\s*/\s*{_DIGITS}(?!\.?[0-9]|\s*/))?")
_FRACTION = re.compile(r"(?:(?<![\w.])([0-9]+)\s*)?\\[dtc]?frac\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))\s*(?:\{\s*(-?[0-9]+)\s*\}|([0-9]))")
_LONGEST_NUMBER = 200  # characters; longer ones are no answers, and exact arithmetic on them takes long
_PLAIN = str.maketrans({"−": "-", "–": "-", "\u00a0": "", "\u202f": "", "\u2009": "", "⁄": "/"})


def _after(text: str, end: int, marker: str) -> str:
    """The answer that a marker announces: what is in the braces or tags, or the rest of the line."""
    if marker.startswith("\\"):
        depth, start = 0, text.find("{", end)
        if start < 0 or text[end:start].strip():
            return text[end:].partition("\n")[0].split("$")[0]
        for i in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[i], 0)
            if depth == 0:
                return text[start + 1 : i]
        return text[start + 1 :]
    if marker == "<answer>":
        return text[end:].partition("</answer>")[0]
    return re.sub(r"^[\s*_]+", "", text[end:]).partition("\n")[0].partition("<")[0]


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer: after the last of `\boxed{...}`, `#### ...`, `<answer>...</answer>`, `Answer: ...` and "the answer is ...";
    None when it has none of them."""
    found = list(_MARKER.finditer(text))
    return _after(text, found[-1].end(), found[-1].group().lower()).strip() if found else None


def _slashed(match: re.Match[str]) -> str:
    r"""`\frac{3}{4}` as 3/4, `1\frac{3}{4}` as 7/4."""
    whole, above, below = int(match[1] or 0), int(match[2] or match[3]), int(match[4] or match[5])
    value = whole + Fraction(above, below) if below else None
    return "" if value is None else f"{value.numerator}/{value.denominator}"


def _plain_numbers(text: str) -> str:
    """A text whose numbers are written in the one way that `_NUMBER` reads."""
    text = re.sub(r"\\[,;! ]", "", text.translate(_PLAIN).replace("{,}", ","))
    return _FRACTION.sub(lambda match: match.group() if len(match.group()) > _LONGEST_NUMBER else _slashed(match), text)


def numbers_in(text: str) -> list[Fraction]:
    r"""The numbers of a text in order, exactly: integers, decimals, powers of ten (`1.5e3`), thousands with commas, fractions (`3/4`,
    `\frac{3}{4}`). Signs of currency and per cent are passed over: 50% is 50."""
    found = []
    for match in _NUMBER.finditer(_plain_numbers(text)):
        above, _, below = re.sub(r"[,$\s+]", "", match.group()).partition("/")
        if len(above) + len(below) <= _LONGEST_NUMBER and (not below or int(below)):
            found.append(Fraction(above) / int(below or 1))
    return found


def number_of(answer: str) -> Fraction | None:
    """The number that an answer gives: the first one after its last `=`."""
    found = numbers_in(answer.rpartition("=")[2])
    return found[0] if found else None


def _expression(text: str) -> str:
    r"""An answer that is no number, without what does not change its meaning: spaces, `$`, `\left`, `\text{}`, the kinds of `\frac`."""
    text = re.sub(r"\\(?:left|right|displaystyle|,|;|!|quad)|[$\s]", "", text.translate(_PLAIN))
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{([^{}]*)\}", r"\1", text)
    return normalised(re.sub(r"\\[dtc]frac", r"\\frac", text))


def answer_is(text: str, expected: str) -> bool:
    """Whether a text's final answer is the expected one: the same number where that is one number, else the same expression.

    The final answer is what `final_answer` finds; in a text without any marker it is the last number, or the whole text.
    """
    marked = final_answer(text)
    wanted = final_answer(expected) or expected
    numbers = numbers_in(wanted)
    # Is the expected answer a number, and not an expression with numbers in it?
    if len(numbers) == 1 and not re.search(r"[A-Za-z^(\[{]", _NUMBER.sub("", _plain_numbers(wanted))):
        found = numbers_in(text)[-1:] if marked is None else [number_of(marked)]
        return found == numbers
    return _expression(text if marked is None else marked) == _expression(wanted)


def answer_match(completions: Sequence[Any], answer: Sequence[Any], **_: Any) -> Rewards:
    """1.0 when the final answer is an expected one (`answer_is`), else 0.0. Nothing is evaluated."""
    return by_row(completions, answer, lambda row, text, value: float(any(answer_is(text, one) for one in _accepted(row, value))))


# Form ------------------------------------------------------------------------------------------------------------------------------------


def whole_match(pattern: str) -> Reward:
    """The reward that is 1.0 when a whole completion matches `pattern` (`.` also matches line ends), else 0.0."""
    compiled = re.compile(pattern, re.DOTALL)

    def format_match(completions: Sequence[Any], **_: Any) -> Rewards:
        return [float(compiled.fullmatch(plain_text(completion)) is not None) for completion in completions]

    return format_match


def tags_in_order(*tags: str) -> Reward:
    """The reward that is 1.0 for a completion of these tags in this order, each once and with something in it, and nothing between them."""
    any_tag = f"</?(?:{'|'.join(map(re.escape, tags))})>"
    each = [rf"<{tag}>(?!\s*</{tag}>)(?:(?!{any_tag}).)*</{tag}>" for tag in map(re.escape, tags)]
    return whole_match(r"\s*" + r"\s*".join(each) + r"\s*")


format_tags = tags_in_order("think", "answer")


def format_pattern(completions: Sequence[Any], pattern: Sequence[Any], **_: Any) -> Rewards:
    """1.0 when the whole completion matches the row's regular expression, else 0.0."""

    def score(row: int, text: str, value: Any) -> float:
        try:
            return float(re.fullmatch(value, text, re.DOTALL) is not None)
        except (TypeError, re.error) as error:
            raise _malformed(row, "pattern", f"is no regular expression: {error}") from None

    return by_row(completions, pattern, score)


def arithmetic_steps(completions: Sequence[Any], facts: Sequence[Any], **_: Any) -> Rewards:
    """The share of steps that are right, up to the first mistake, as the `arith` testbed's checker sees it; 0.0 without steps.

    `facts` is what `telos data make arith` writes: kind, operands, target, and the expression where there is one.
    """

    def score(row: int, text: str, value: Any) -> float:
        try:
            known = json.loads(value) if isinstance(value, str) else dict(value)
            operands, target, kind = [int(number) for number in known["operands"]], int(known["target"]), known["kind"]
            if kind not in ("expression", "countdown"):
                raise ValueError(f"unknown kind {kind!r}")
            item = Item("", "", {**known, "operands": operands, "target": target, "expression": str(known.get("expression", "0"))})
            verdicts = arith.check_steps(item, text)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise _malformed(row, "facts", f"is none of an arith problem: {problem}") from None
        return sum(verdict.right for verdict in verdicts) / len(verdicts) if verdicts else 0.0

    return by_row(completions, facts, score)


# Programs --------------------------------------------------------------------------------------------------------------------------------

_FENCED = re.compile(r"```[ \t]*(?:python|python3|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)

# Reads {"token", "code", "tests"} from its input. A line "TOKEN index" is written for each test that holds, as it does.
_TESTER = """
import json as _json, os as _os, sys as _sys, types as _types

def _run(given):
    stream = _os.dup(1)
    nothing = _os.open(_os.devnull, _os.O_WRONLY)
    _os.dup2(nothing, 1)
    token = given.pop("token")
    # Not __main__: what an answer does when it is run as a script is no part of what is tested.
    module = _sys.modules["answer"] = _types.ModuleType("answer")
    space = module.__dict__
    exec(compile(given["code"], "answer.py", "exec"), space)
    for index, (test, counts) in enumerate(given["tests"]):
        try:
            exec(compile(test, "test.py", "exec"), space)
        except BaseException:
            continue
        if counts:
            _os.write(stream, f"{token} {index}\\n".encode())

_run(_json.loads(_sys.stdin.read()))
"""


@functools.cache
def _sandbox() -> Sandbox:
    return Sandbox(_PROGRAM_LIMITS)


def code_of(text: str) -> str:
    """The program in an answer: its last fenced block of Python, or all of it when there is none."""
    found = _FENCED.findall(text)
    return found[-1] if found else text


def _asserts(statement: ast.stmt) -> bool:
    """Whether a statement asserts something when it is run; the asserts of a function wait for its call."""
    return not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and any(
        isinstance(part, ast.Assert) for part in ast.walk(statement)
    )


def _calls(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)


def _tests_of(row: int, value: Any) -> list[tuple[str, bool]]:
    """Pieces of test code to run one after another, each with whether it counts as a test: those that assert, else those that call (`check(f)`)."""
    single = isinstance(value, str)
    if not single and not (isinstance(value, list) and all(isinstance(test, str) for test in value)):
        raise _malformed(row, "tests", f"must be Python code, or a list of it, not {value!r:.60}")
    try:
        parsed = [ast.parse(test) for test in ([value] if single else value)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _malformed(row, "tests", f"is no Python code: {error}") from None
    pieces = [[statement] for statement in parsed[0].body] if single else [tree.body for tree in parsed]
    for counts in (_asserts, _calls):
        found = [any(map(counts, piece)) for piece in pieces]
        if any(found):
            return [(ast.unparse(ast.Module(piece, [])), test) for piece, test in zip(pieces, found)]
    if pieces:
        raise _malformed(row, "tests", "tests nothing: it has neither an assert nor a call at its top level")
    return []


def _passed(completions: Sequence[Any], tests: Sequence[Any]) -> list[tuple[int, int] | None]:
    """How many tests hold and how many there are, by row."""
    pieces = [None if value is None else _tests_of(i, value) for i, value in enumerate(tests)]
    rows = [i for i, found in enumerate(pieces) if found]
    tokens = [secrets.token_hex(16) for _ in rows]
    given = [{"token": token, "code": code_of(plain_text(completions[i])), "tests": pieces[i]} for i, token in zip(rows, tokens)]
    outcomes = _sandbox().run_many([_TESTER] * len(rows), [json.dumps(one) for one in given]) if rows else []
    counts: list[tuple[int, int] | None] = [None] * len(pieces)
    for i, token, outcome in zip(rows, tokens, outcomes, strict=True):
        countable = {index for index, (_, counts_as_test) in enumerate(pieces[i] or []) if counts_as_test}
        words = (line.split() for line in outcome.stdout.splitlines())
        held = {int(line[1]) for line in words if len(line) == 2 and line[0] == token and line[1].isdecimal()}
        counts[i] = (len(held & countable), len(countable))
    return counts


def unit_tests(completions: Sequence[Any], tests: Sequence[Any], **_: Any) -> Rewards:
    """The share of the tests that hold when the answer's program has run, in the sandbox; 0.0 for a program that fails.

    `tests` is Python code, each of whose top-level statements with an assert is a test (without any, each call), or a list of such pieces (as
    MBPP's `test_list`), each of them one test; the rest prepares. They run in the program's own process, in order, for 2 seconds of processor time, so a
    program that sets out to deceive them can: an object that equals everything will. Where that matters use `program_output`, whose
    expected outputs never enter the sandbox.
    """
    if len(tests) != len(completions):
        raise UsageError(f"column 'tests' has {len(tests)} rows for {len(completions)} completions")
    return [None if count is None else count[0] / count[1] for count in _passed(completions, tests)]


def all_unit_tests(completions: Sequence[Any], tests: Sequence[Any], **columns: Any) -> Rewards:
    """1.0 when all tests of `unit_tests` hold, else 0.0."""
    return [None if share is None else float(share == 1.0) for share in unit_tests(completions, tests, **columns)]


def program_output(completions: Sequence[Any], cases: Sequence[Any], **_: Any) -> Rewards:
    """The share of cases for which the answer's program ends without error and prints what is expected, in the sandbox.

    `cases` is a list of {"input": text, "output": text}. White space at the ends of lines and of the whole does not count.
    """
    rows: list[tuple[int, str, str, str]] = []
    for i, (completion, value) in enumerate(zip(completions, cases, strict=True)):
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(case, dict) for case in value):
            raise _malformed(i, "cases", f"must be a list of {{'input', 'output'}}, not {value!r:.60}")
        for case in value:
            if not isinstance(case.get("input"), str) or not isinstance(case.get("output"), str):
                raise _malformed(i, "cases", f"must have texts 'input' and 'output', not {case!r:.60}")
            rows.append((i, code_of(plain_text(completion)), case["input"], case["output"]))
    outcomes = _sandbox().run_many([row[1] for row in rows], [row[2] for row in rows]) if rows else []
    right: dict[int, list[bool]] = {}
    for row, outcome in zip(rows, outcomes, strict=True):
        right.setdefault(row[0], []).append(outcome.ok and _lines(outcome.stdout) == _lines(row[3]))
    return [sum(right[i]) / len(right[i]) if i in right else None for i in range(len(completions))]


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


# Boxes -----------------------------------------------------------------------------------------------------------------------------------

_FLOAT = r"\s*(-?[0-9]+(?:\.[0-9]+)?)\s*"
_BOX = re.compile(rf"[\[(]{_FLOAT},{_FLOAT},{_FLOAT},{_FLOAT}[\])]")


def box_iou(completions: Sequence[Any], box: Sequence[Any], **_: Any) -> Rewards:
    """Intersection over union of the box in the answer (`[left, top, right, bottom]`, in `<answer>` tags where there are any) with the expected one.

    With several expected boxes (a list of lists) or several given: the sum over the best pairing, divided by the larger number of boxes, so that
    missing and superfluous ones both cost.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    def score(row: int, text: str, value: Any) -> float:
        expected = boxes_of(row, value)
        given: list[Box] = [tuple(map(float, found)) for found in _BOX.findall(tagged(text))[:100]]  # type: ignore[misc]
        if not given:
            return 0.0
        table = np.array([[iou(one, other) for other in expected] for one in given])
        return float(table[linear_sum_assignment(table, maximize=True)].sum() / max(len(given), len(expected)))

    return by_row(completions, box, score)


def boxes_of(row: int, value: Any) -> list[Box]:
    value = value.tolist() if hasattr(value, "tolist") else value
    boxes = value if isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple)) else [value]
    for box in boxes:
        numbers = isinstance(box, (list, tuple)) and len(box) == 4 and all(isinstance(x, (int, float)) for x in box)
        if not numbers or not (box[0] < box[2] and box[1] < box[3]):
            raise _malformed(
                row, "box", f"must be [left, top, right, bottom] with left < right and top < bottom, or a list of such, not {value!r:.80}"
            )
    return [(float(box[0]), float(box[1]), float(box[2]), float(box[3])) for box in boxes]


# Length and repetition -------------------------------------------------------------------------------------------------------------------


def cosine_length(
    max_tokens: int = 1024,
    correct: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeded: float = -1.0,
) -> Reward:
    """The cosine reward of Yeo et al. 2025, "Demystifying Long Chain-of-Thought Reasoning in LLMs".

    `correct` and `wrong` are the rewards of a right and of a wrong answer of no tokens and of `max_tokens` tokens, with half a cosine between
    them: long + (short - long) (1 + cos(pi L / max_tokens)) / 2 after L tokens. `exceeded` is that of an answer which reaches `max_tokens`,
    right or wrong. The numbers were chosen here, to keep the reward within [-1, 1]. Whether an answer is right is `answer_match`'s word.
    """
    if max_tokens < 1:
        raise UsageError(f"a cosine reward needs max_tokens of at least 1, not {max_tokens}")

    def cosine(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], answer: Sequence[Any], **_: Any) -> Rewards:
        rewards: Rewards = []
        for right, ids in zip(answer_match(completions, answer), completion_ids, strict=True):
            if right is None or len(ids) >= max_tokens:
                rewards.append(None if right is None else exceeded)
                continue
            short, long = correct if right else wrong
            rewards.append(long + (short - long) * (1 + math.cos(math.pi * len(ids) / max_tokens)) / 2)
        return rewards

    return cosine


def linear_length(max_tokens: int = 1024, buffer: int = 256) -> Reward:
    """The soft punishment of overlong answers of DAPO (Yu et al. 2025, eq. 13): 0 up to `max_tokens - buffer` tokens, then falling linearly to -1
    at `max_tokens`, and -1 beyond. The paper has 20,480 and 4,096."""
    if not 0 < buffer <= max_tokens:
        raise UsageError(f"a linear length reward needs 0 < buffer <= max_tokens, not {buffer} and {max_tokens}")

    def linear(completion_ids: Sequence[Sequence[int]], **_: Any) -> Rewards:
        return [-min(1.0, max(0.0, (len(ids) - max_tokens + buffer) / buffer)) for ids in completion_ids]

    return linear


def ngram_repetition(n: int = 3, worst: float = -1.0) -> Reward:
    """The reward that is `worst` times the share of a completion's n-grams of words that have occurred before: 0 for one without repetition or
    shorter than n words. Case and white space do not count."""
    if n < 1 or worst > 0:
        raise UsageError(f"a repetition reward needs n of at least 1 and worst of at most 0, not {n} and {worst}")

    def repeated(completions: Sequence[Any], **_: Any) -> Rewards:
        rewards: Rewards = []
        for completion in completions:
            words = plain_text(completion).lower().split()
            grams = list(zip(*(itertools.islice(words, i, None) for i in range(n)), strict=False))
            rewards.append(worst * (1 - len(set(grams)) / len(grams)) if grams else 0.0)
        return rewards

    return repeated


length_cosine = cosine_length()
length_linear = linear_length()
repetition = ngram_repetition()
