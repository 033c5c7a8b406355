"""Deep MEX: the critics' objective, where it lies above TD3's, and that it is TD3 without its bonus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.spaces import Box
from safetensors.torch import load_file
from torch import Tensor, nn

import telos
from telos.algorithms.actor_critic import Agent
from telos.algorithms.online import mex, td3
from telos.data.transitions import Transitions
from telos.models.policies import Policy, Shape

ACTIONS = (-0.5, 0.0, 0.5)


class Table(nn.Module):
    """A value of each of three actions, for two critics; the nearest action is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2, 3, dtype=torch.float64))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        near = (action - torch.tensor(ACTIONS, dtype=action.dtype)).abs().argmin(1)
        return self.values[:, near]


def bandit() -> tuple[Agent, Transitions]:
    """One state; actions tried 5, 3 and 2 times for rewards 1, 0 and 2; the policy takes the last one."""
    policy = Policy(Box(-1, 1, (1,), np.float32), Box(-1, 1, (1,), np.float32), Shape("deterministic", (), orthogonal=False))
    layer: Any = policy.body[0]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(float(np.arctanh(0.5)))
    agent = Agent(policy, {"critic": Table()}, targets=("policy", "critic"))
    counts, n = (5, 3, 2), 10
    action = torch.tensor(np.repeat(ACTIONS, counts), dtype=torch.float32)[:, None]
    reward = torch.tensor(np.repeat([1.0, 0.0, 2.0], counts))
    zeros = torch.zeros(n, 1)
    batch = Transitions(
        observation=zeros,
        action=action,
        reward=reward,
        next_observation=zeros,
        discount=torch.zeros(n),
        weight=torch.ones(n),
        index=torch.arange(n),
        batch_size=[n],
    )
    return agent, batch


def test_a_contrast_takes_away_what_the_taken_actions_are_worth() -> None:
    """Then the minimum is r(a) + η′ (1[a = a*] / ρ(a) − 1) / 2: what the policy would do is lifted, what was done is lowered alike."""
    agent, batch = bandit()
    lifted = torch.tensor([1.0 - 0.15, 0.0 - 0.15, 2.0 + 0.3 / (2 * 0.2) - 0.15])
    agent["critic"].values.data.copy_(lifted.expand(2, 3))
    found = mex.critic_loss(mex.Config(env="-", value_bonus=0.3), agent, batch, torch.Generator())
    (gradient,) = torch.autograd.grad(found.values.mean(), [agent["critic"].values])
    assert gradient.abs().max() < 1e-6


def test_hope_lifts_the_policys_action_by_the_bonus_over_twice_its_frequency() -> None:
    """The minimum of Σ_a ρ(a) (Q(a) − r(a))² − η′ Q(a*) is r(a) + 1[a = a*] η′ / (2 ρ(a)): the seldom tried are hoped for most."""
    agent, batch = bandit()
    config = mex.Config(env="-", value_bonus=0.3, contrast=False)
    critic = agent["critic"]
    with torch.no_grad():
        critic.values.copy_(torch.tensor([1.0, 0.0, 2.0 + 0.3 / (2 * 0.2)]).expand(2, 3))
    found = mex.critic_loss(config, agent, batch, torch.Generator())
    (gradient,) = torch.autograd.grad(found.values.mean(), [critic.values])
    assert gradient.abs().max() < 1e-6
    assert torch.allclose(found.metrics["critic/hope"], torch.full((10,), 2.75, dtype=torch.float64))  # type: ignore[arg-type]


def test_the_loss_is_td3s_less_the_weighted_values_and_moves_no_policy() -> None:
    agent, batch = bandit()
    agent["critic"].values.data.copy_(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.7]]))
    config = mex.Config(env="-", value_bonus=0.3, contrast=False)
    plain = td3.critic_loss(config, agent, batch, torch.Generator().manual_seed(0)).values
    found = mex.critic_loss(config, agent, batch, torch.Generator().manual_seed(0)).values
    assert torch.allclose(plain - found, torch.full((10,), 0.3 * (0.3 + 0.7), dtype=torch.float64))
    assert torch.autograd.grad(found.sum(), list(agent.policy.parameters()), allow_unused=True) == (None, None)


def test_without_its_bonus_mex_is_td3_bit_for_bit(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "env": "Pendulum-v1",
        "total_steps": 120,
        "iteration_steps": 60,
        "start_steps": 40,
        "random_steps": 40,
        "batch_size": 8,
        "hidden": [8],
        "seed": 3,
        "device": "cpu",
        "threads": 1,
        "checkpoint_every": 0,
        "eval_episodes": 1,
        "replay_on_disk": False,
    }
    weights = [
        load_file(telos.train(key, **options, **more, out=str(tmp_path / name)).path / "policy" / "policy.safetensors")
        for name, key, more in (("td3", "td3", {}), ("mex0", "mex", {"value_bonus": 0.0}), ("mex", "mex", {"value_bonus": 0.5}))
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
