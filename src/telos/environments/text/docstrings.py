"""`docstrings`: real human text on every machine. Prompt = a function of Python's own standard library, answer = its docstring's summary.

The functions are read with `ast` from the standard library of the running interpreter (about 5,400 with a summary of 3 to 20 words in
Python 3.11); nothing is imported or executed. Splits go by module, so that no file's style leaks from training into the test.

The gold judge knows what the learner does not: the human's own summary. `gold` is a fixed mixture of
similarity to it (chrF, Popović 2015: character n-grams up to 6, beta = 2) and of what PEP 257 asks of a summary line.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from telos.environments.text.base import Item, Split

# Third-party, generated or test code, and modules whose docstrings are fixtures or machine-made.
_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "ensurepip", "lib2to3", "turtledemo"}
_MAX_CODE_CHARACTERS = 320
_WEIGHTS = {"similar": 0.4, "on_topic": 0.25, "well_formed": 0.15, "brief": 0.1, "imperative": 0.1}
# The verbs that open a summary line in the standard library's own style (PEP 257: a phrase ending in a period, in the imperative).
_VERBS = frozenset(
    [
        "accept",
        "add",
        "append",
        "apply",
        "assert",
        "build",
        "call",
        "cause",
        "change",
        "check",
        "clean",
        "clear",
        "close",
        "collect",
        "compare",
        "compute",
        "configure",
        "construct",
        "convert",
        "copy",
        "count",
        "create",
        "decode",
        "define",
        "delete",
        "describe",
        "determine",
        "disable",
        "discard",
        "dispatch",
        "display",
        "do",
        "emit",
        "empty",
        "enable",
        "encode",
        "encrypt",
        "end",
        "ensure",
        "evaluate",
        "execute",
        "exit",
        "expand",
        "extend",
        "extract",
        "fail",
        "fetch",
        "fill",
        "find",
        "flush",
        "force",
        "format",
        "generate",
        "get",
        "give",
        "handle",
        "ignore",
        "implement",
        "import",
        "increment",
        "indicate",
        "initialize",
        "insert",
        "install",
        "invoke",
        "issue",
        "iterate",
        "join",
        "list",
        "load",
        "locate",
        "log",
        "look",
        "make",
        "map",
        "match",
        "merge",
        "modify",
        "move",
        "normalize",
        "notify",
        "obtain",
        "open",
        "output",
        "override",
        "parse",
        "pass",
        "perform",
        "pop",
        "prepare",
        "prevent",
        "print",
        "process",
        "produce",
        "provide",
        "push",
        "put",
        "raise",
        "read",
        "receive",
        "record",
        "recursively",
        "register",
        "reject",
        "release",
        "remove",
        "rename",
        "replace",
        "report",
        "represent",
        "request",
        "reset",
        "resolve",
        "restore",
        "retrieve",
        "return",
        "reverse",
        "run",
        "save",
        "search",
        "see",
        "select",
        "send",
        "serialize",
        "set",
        "setup",
        "show",
        "shut",
        "skip",
        "sort",
        "split",
        "start",
        "stop",
        "store",
        "strip",
        "switch",
        "take",
        "terminate",
        "test",
        "transform",
        "translate",
        "transmit",
        "traverse",
        "try",
        "turn",
        "unescape",
        "unregister",
        "update",
        "use",
        "validate",
        "verify",
        "wait",
        "walk",
        "wrap",
        "write",
        "yield",
    ]
)


def _functions_of(source: str) -> Iterator[tuple[str, str]]:
    """(code without its docstring, summary line) of each function in a file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        documentation = ast.get_docstring(node)
        if not documentation:
            continue
        summary = " ".join(documentation.split("\n\n")[0].split())
        if not 3 <= len(summary.split()) <= 20 or not summary.isascii() or not summary.isprintable():
            continue
        first = node.body[0]
        indent = node.col_offset
        body = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno or first.lineno : node.end_lineno]]
        code = "\n".join(line[indent:].rstrip() for line in body if line.strip())
        if code.isascii():
            yield code[:_MAX_CODE_CHARACTERS].rstrip(), summary


def split_of(module: str) -> Split:
    """The split of a module (path relative to the library, such as 'json/decoder.py'): 80 % train, 10 % validation, 10 % test."""
    bucket = int(hashlib.sha256(module.encode()).hexdigest(), 16) % 10
    return "test" if bucket == 0 else "validation" if bucket == 1 else "train"


def library_files() -> list[tuple[str, Path]]:
    """(module path, file) of the standard library's own source files, in a fixed order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [(path.relative_to(root), path) for path in root.rglob("*.py")]
    return sorted((relative.as_posix(), path) for relative, path in files if not _SKIPPED_FOLDERS & set(relative.parts[:-1]))


@functools.cache
def _all_items() -> dict[str, tuple[Item, ...]]:
    items: dict[str, list[Item]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for module, path in library_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        for code, summary in _functions_of(source):
            prompt = f"{code}\n# Summary:"
            if prompt not in seen:
                seen.add(prompt)
                items[split_of(module)].append(Item(prompt, " " + summary, {"summary": summary, "module": module, "code": code}))
    return {split: tuple(rows) for split, rows in items.items()}


def chrf(hypothesis: str, reference: str, order: int = 6, beta: float = 2.0) -> float:
    """chrF in [0, 1]: F-score over character n-grams of length 1 to `order`, white space removed (Popović 2015)."""
    a, b = hypothesis.replace(" ", ""), reference.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, order + 1):
        ours, theirs = Counter(a[i : i + n] for i in range(len(a) - n + 1)), Counter(b[i : i + n] for i in range(len(b) - n + 1))
        if not ours or not theirs:
            continue
        matched = sum((ours & theirs).values())
        precisions.append(matched / sum(ours.values()))
        recalls.append(matched / sum(theirs.values()))
    if not precisions:
        return 0.0
    precision, recall = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return 0.0 if precision + recall == 0 else (1 + beta**2) * precision * recall / (beta**2 * precision + recall)


def _stems(text: str) -> set[str]:
    """Lower-case word beginnings (at most five letters) of prose or identifiers: 'getHeaders' and 'get_header' share both stems."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)
    return {word.lower()[:5] for word in words if len(word) > 1}


def _longest_repetition(words: list[str]) -> int:
    """How often the most frequent word pair occurs; 1 in text without repetition."""
    return max(Counter(itertools.pairwise(words)).values(), default=1)


class Docstrings:
    """The `docstrings` testbed; see the module's docstring."""

    name = "docstrings"
    max_new_tokens = 44

    def items(self, split: Split, n: int | None = None, seed: int = 0) -> list[Item]:
        rows = list(_all_items()[split])
        random.Random(seed).shuffle(rows)
        return rows if n is None else rows[:n]

    def attributes(self, item: Item, completion: str) -> dict[str, float]:
        text = completion.strip()
        if not text:
            return dict.fromkeys(_WEIGHTS, 0.0)
        words = text.split()
        name = re.search(r"def (\w+)", item.prompt)
        wanted = _stems(name.group(1)) if name else set()
        repetition = _longest_repetition([word.lower().strip(".,") for word in words])
        form = (text[0].isupper() + text.endswith(".") + (text.count("(") == text.count(")")) + ("\n" not in text)) / 4
        return {
            "similar": chrf(text, item.facts["summary"]),
            "on_topic": len(wanted & _stems(text)) / len(wanted) if wanted else 0.0,
            "well_formed": form / repetition,
            "brief": min(1.0, len(words) / 3) * min(1.0, 20 / len(words)),
            "imperative": float(re.sub(r"\W", "", words[0]).lower() in _VERBS),
        }

    def gold(self, item: Item, completion: str) -> float:
        parts = self.attributes(item, completion)
        return sum(weight * parts[name] for name, weight in _WEIGHTS.items())

    def corpus(self, n: int, seed: int) -> Iterator[str]:
        """Training functions with their summaries, round and round when `n` exceeds their number."""
        rows = self.items("train", seed=seed)
        for i in range(n):
            row = rows[i % len(rows)]
            yield row.prompt + row.reference


TESTBED = Docstrings()
