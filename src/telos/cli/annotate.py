"""`telos annotate`: answers in the terminal the questions that a run with `--judge human:FOLDER` asks."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from telos.cli.text import shown_path
from telos.core.errors import UsageError

_KEYS = {"1": 1, "2": 2, "0": 0}
_ASK = "1 or 2: the better answer, 0: neither is better, q: stop > "


def annotate(arguments: Namespace) -> int:
    from telos.objectives.judges import HumanQueue

    queue = HumanQueue(arguments.folder)
    if not queue.questions.is_file():
        raise UsageError(
            f"{arguments.folder} has no questions.jsonl; a run with --judge human:{arguments.folder} writes it as soon as it has two answers to compare"
        )
    answered, stopped = 0, False
    # Whoever runs may ask more while the first are answered.
    while not stopped and (waiting := queue.waiting()):
        for place, question in enumerate(waiting):
            show(question, len(waiting) - place)
            preferred = read_key()
            if preferred is None:
                stopped = True
                break
            queue.answer(question["id"], preferred)
            answered += 1
    left = len(queue.waiting())
    print(f"{answered} answered, {left} left in {shown_path(arguments.folder)}")
    return 0


def show(question: dict[str, Any], left: int) -> None:
    heading = f"{left} left"
    print(f"\n── {heading} {'─' * 60}\n{prompt_text(question['prompt'])}")
    for number, name in ((1, "first"), (2, "second")):
        print(f"\n[{number}] {question[name].strip() or '(empty)'}")
    print()


def prompt_text(prompt: Any) -> str:
    """A prompt as a reader sees it: text as it is, messages with their role before each."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message.get('content', '')}" for message in prompt)


def read_key() -> int | None:
    """1, 2 or 0; None to stop (q, or the end of the input)."""
    while True:
        try:
            key = input(_ASK).strip().lower()
        except EOFError:
            print()
            return None
        if key == "q":
            return None
        if key in _KEYS:
            return _KEYS[key]
        print(f"{key!r} is none of 1, 2, 0 and q")
