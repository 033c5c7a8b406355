"""Returns and advantages over sequences with gaps.

Rollouts of language models have tokens that the policy did not produce (tool output, user turns, padding). Time passes only at *actions*: the next
state of an action is the state of the next action, however many foreign tokens stand between. Ignoring this discounts (or bootstraps from) text
that nobody chose, the usual multi-turn bug.
"""

from __future__ import annotations

import torch
from torch import Tensor


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1} over true entries; [B, T] float; 0 at masked entries. Rewards at masked entries must be 0.

    `rewards` of foreign tokens are refused because they would belong to no action.
    """
    _check(rewards, mask)
    returns = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        active = mask[:, t]
        running = torch.where(active, rewards[:, t] + gamma * running, running)
        returns[:, t] = torch.where(active, running, torch.zeros_like(running))
    return returns


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float, bootstrap: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over actions only.

    rewards, values [B, T]; mask [B, T] true at actions; bootstrap [B] is V(s) after the last action (0 when the episode terminated, the critic's value when
    it was truncated). Returns (advantages, returns = advantages + values), both [B, T], 0 at masked entries. No gradient flows.
    """
    _check(rewards, mask)
    if values.shape != rewards.shape:
        raise ValueError(f"values {tuple(values.shape)} do not fit rewards {tuple(rewards.shape)}")
    values = values.detach()
    advantages = torch.zeros_like(rewards)
    running = rewards.new_zeros(rewards.shape[0])
    next_value = torch.zeros_like(running) if bootstrap is None else bootstrap.to(rewards.dtype)
    for t in range(rewards.shape[1] - 1, -1, -1):
        active = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(active, delta + gamma * gae_lambda * running, running)
        next_value = torch.where(active, values[:, t], next_value)
        advantages[:, t] = torch.where(active, running, torch.zeros_like(running))
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


def at_last_action(scores: Tensor, mask: Tensor) -> Tensor:
    """Puts a score per sequence [B] on its last action: [B, T], 0 elsewhere. Sequences without an action get nothing."""
    if scores.shape != mask.shape[:1]:
        raise ValueError(f"scores {tuple(scores.shape)} do not fit mask {tuple(mask.shape)}")
    positions = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, positions, -1).amax(1)
    return torch.where((positions == last[:, None]) & mask, scores[:, None].to(torch.float32), torch.zeros(()))


def _check(rewards: Tensor, mask: Tensor) -> None:
    if rewards.ndim != 2 or mask.shape != rewards.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"expected rewards [B, T] and a boolean mask of the same shape; got {tuple(rewards.shape)}, {tuple(mask.shape)} {mask.dtype}"
        )
    if bool((rewards.masked_fill(mask, 0) != 0).any()):
        raise ValueError("a reward stands on a token that the policy did not produce; put it on the action before")


def gae_of_segments(
    rewards: Tensor, values: Tensor, next_values: Tensor, ended: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16) over T steps of N environments, time first, episodes one after the other.

    rewards, values [T, N]: V of the state before the step; next_values [T, N]: V of the state that the step led to, 0 where it terminated the episode and
    V of the last observation where it only cut it; ended [T, N] bool: the next row begins another episode. Returns (advantages, advantages + values).
    """
    delta = rewards + gamma * next_values - values
    carry = (gamma * gae_lambda) * (~ended).to(delta)
    running = torch.zeros_like(delta[0])
    found = []
    for one, keeps in zip(delta.flip(0).unbind(0), carry.flip(0).unbind(0)):
        running = torch.addcmul(one, keeps, running)
        found.append(running)
    advantages = torch.stack(found[::-1])
    return advantages, advantages + values
