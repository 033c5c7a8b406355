"""What a method is: a value that names its paper, its loop, its options and its own functions.

Each file `algorithms/<family>/<name>.py` ends in one `METHOD = Method(...)`. The loop named by `loop` (the file `_loop_<loop>.py` of the
same family) calls the functions in the roles below; a method file holds only what its paper adds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Method:
    key: str  # unique, kebab-case; the name on the command line
    title: str  # the name in the paper
    family: str  # the folder under algorithms/
    loop: str  # the shape of training: the file _loop_<loop>.py of the family, '-' written as '_'
    changes: str  # one sentence: what it changes against its neighbours
    paper: str  # authors, year, title, arXiv number
    config: type  # frozen dataclass of options, a subclass of the loop's options
    loss: Callable[..., Any] | None = None  # per-token or per-example loss; its arguments are documented in the loop
    slopes: Callable[..., Any] | None = None  # on-policy control: derivatives of `loss` in log-probability, entropy and value, for arrays
    estimate: Callable[..., Any] | None = None  # loops that act: advantages and targets, or values, from rollouts
    critic_loss: Callable[..., Any] | None = None  # loops with a critic: its loss
    select: Callable[..., Any] | None = None  # sampling and on-policy loops: which of the drawn answers are kept
    sample: Callable[..., Any] | None = (
        None  # how answers are written (default: by the policy, from the prompt), or which actions are tried
    )
    build: Callable[..., Any] | None = None  # control: the networks
    updates: Callable[..., Any] | None = None  # control from stored steps: which losses move which networks, in which order
    explore: Callable[..., Any] | None = None  # off-policy and streaming control: the action taken while learning
    update: Callable[..., Any] | None = None  # one improvement: on-policy from a segment, streaming from a step, tabular from an episode
    plan: Callable[..., Any] | None = None  # tabular loops: the policy of the next episodes, from what has been seen
    propose: Callable[..., Any] | None = None  # policy-gradient loop: at which parameters episodes are played, and what is estimated there
    arrange: Callable[..., Any] | None = None  # iterative loops: which of the judged answers are learned from, and how
    writers: Callable[..., Any] | None = None  # iterative loops: how many answers each source writes; default: all by the policy
    advance: Callable[..., Any] | None = None  # iterative and policy-gradient loops: the weights with which the next iteration begins
    prepare: Callable[..., Any] | None = None  # what is made of the checked rows before they are encoded
    needs: frozenset[str] = frozenset()  # what the loop provides beside the policy; each loop says what it offers
    system: int | None = None  # its number among the catalogue's systems
    aliases: tuple[str, ...] = ()  # other names under which users look for it
