"""RLGF: RL with Guided Feedback. A second model, the guide, writes parts of the answers, before or after the policy's own tokens.

With t drawn uniformly from the places of an answer (Chang et al. 2023, Algorithms 1 to 5), `scheme` says who writes what:

    ppo++        the guide rolls in for t tokens in the share `guide_share` of the prompts, the policy rolls out: PPO from states that a good writer visits
    aggrevated   the policy rolls in and chooses token t, the guide rolls out: the token learns from the reward that the guide gets from there (AggreVaTeD)
    lols         as aggrevated, but in the share 1 − `guide_share` of the prompts the policy itself rolls out (LOLS)
    d2lols       aggrevated for the first `switch_step` iterations, then ppo++ (D²LOLS)

The policy learns from its own tokens alone: from all that it wrote in ppo++, from token t in the others, whose advantage is the answer's reward less the
critic's value of the state before it. The guide may be of another shape, of the same vocabulary. Departures: the guide takes over at a place drawn once for all
answers to a prompt; advantages, critic and loss are those of `ppo-max`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from telos.algorithms.language import ppo_max
from telos.core.config import require
from telos.core.errors import UsageError
from telos.core.method import Method
from telos.core.seeds import numpy_generator
from telos.data.batches import Prompts, Rollouts

Draw = Callable[..., tuple[Rollouts, list[str]]]


@dataclass(frozen=True, kw_only=True)
class Config(ppo_max.Config):
    """Options of RLGF."""

    guide: str = ""  # folder or hub id of the guide
    scheme: Literal["ppo++", "aggrevated", "lols", "d2lols"] = "ppo++"  # who writes what
    guide_share: float = 0.2  # share of the prompts in which the guide rolls in (ppo++; paper: 0.2) or rolls out (lols; paper: 0.8)
    switch_step: int = 20  # iterations of aggrevated before ppo++, of d2lols

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, ">= 0 and <= 1", "guide_share")
        require(self, ">= 0", "switch_step")
        for name, schemes in (("guide_share", ("ppo++", "lols", "d2lols")), ("switch_step", ("d2lols",))):
            if self.scheme not in schemes and getattr(self, name) != Config.__dataclass_fields__[name].default:
                raise UsageError(f"--{name} has no effect with --scheme {self.scheme}")


def sample(config: Config, draw: Draw, prompts: Prompts, index: int) -> tuple[Rollouts, list[str]]:
    generator = numpy_generator(config.seed, "guidance", index)
    places = generator.integers(0, config.max_completion_length, len(prompts)).tolist()
    guided = (generator.random(len(prompts)) < config.guide_share).tolist()
    scheme = config.scheme
    if scheme == "d2lols":
        scheme = "aggrevated" if index < config.switch_step else "ppo++"
    if scheme == "ppo++":
        return _rolled_in(draw, prompts, [place if yes else 0 for place, yes in zip(places, guided, strict=True)])
    return _rolled_out(draw, prompts, places, guided if scheme == "lols" else [True] * len(places))


def _rolled_in(draw: Draw, prompts: Prompts, places: list[int]) -> tuple[Rollouts, list[str]]:
    """The guide writes the first tokens, as many as `places` say but never the end; the policy goes on."""
    led, _ = draw("guide", prompts, n=1)
    lengths = (led.completion_length - led.ended.long()).tolist()
    begun = [ids[: min(place, length)] for ids, place, length in zip(led.completion_ids.tolist(), places, lengths, strict=True)]
    return draw("policy", prompts, begun)


def _rolled_out(draw: Draw, prompts: Prompts, places: list[int], guided: list[bool]) -> tuple[Rollouts, list[str]]:
    """The policy writes up to its token at `places` (or its last), then the guide goes on where it is `guided`, else the policy's own answer stands. That one
    token is the policy's action."""
    own, texts = draw("policy", prompts)
    n = len(own) // len(prompts)
    count = own.completion_length.tolist()
    last = [min(places[i // n], count[i] - 1) for i in range(len(own))]
    whole = [last[i] + 1 >= count[i] for i in range(len(own))]  # the token ends the answer, or is its last: nobody goes on
    begun = [ids[: place + 1] for ids, place in zip(own.completion_ids.tolist(), last, strict=True)]
    repeated = prompts[torch.arange(len(prompts)).repeat_interleave(n)]
    led, led_texts = draw("guide", repeated, begun, n=1)
    width = max(own.completion_ids.shape[1], led.completion_ids.shape[1])
    takes = torch.tensor([guided[i // n] and not whole[i] for i in range(len(own))], device=own.row.device)
    action = torch.tensor(last, device=own.row.device)

    def merged(name: str) -> torch.Tensor:
        first, second = (torch.nn.functional.pad(getattr(part, name), (0, width - getattr(part, name).shape[1])) for part in (own, led))
        return torch.where(takes[:, None], second, first)

    found = own.clone()
    found.completion_ids = merged("completion_ids")
    found.completion_length = torch.where(takes, led.completion_length, own.completion_length)
    found.logprobs = torch.nn.functional.pad(own.logprobs, (0, width - own.logprobs.shape[1]))
    found.action_mask = torch.arange(width, device=action.device) == action[:, None]
    found.ended = torch.where(takes, led.ended, own.ended)
    if own.support is not None:
        found.support = torch.nn.functional.pad(own.support, (0, 0, 0, width - own.support.shape[1]), value=-1)
        found.support[:, :, 0] = torch.where(found.action_mask, found.support[:, :, 0], found.completion_ids)
    return found, [led_text if take else text for take, led_text, text in zip(takes.tolist(), led_texts, texts, strict=True)]


METHOD = Method(
    key="rlgf",
    title="RL with Guided Feedback",
    family="language",
    loop="rollouts",
    changes="PPO with a guide that writes the beginnings or the ends of the answers",
    paper="Chang et al. 2023, Learning to Generate Better Than Your LLM, arXiv:2306.11816",
    config=Config,
    loss=ppo_max.loss,
    estimate=ppo_max.estimate,
    critic_loss=ppo_max.critic_loss,
    sample=sample,
    needs=frozenset({"reference", "reward", "critic", "guide"}),
    system=13,
    aliases=("ppo++", "aggrevated", "lols", "d2lols"),
)
