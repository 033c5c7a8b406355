"""Batches of steps in an environment."""

from __future__ import annotations

from tensordict import TensorClass
from torch import Tensor


class Transitions(TensorClass):
    """Steps as learners see them. observation, next_observation [B, …] as networks read them; action [B] or [B, D] in the policy's own units; reward [B]
    float32, summed over the steps that lie between the two observations; discount [B] float32: what the value of `next_observation` is multiplied by, γ to
    the number of steps between, 0 where the episode terminated; weight [B] float32 of each row in the loss; index [B] int64: where it lies in the data.
    """

    observation: Tensor
    action: Tensor
    reward: Tensor
    next_observation: Tensor
    discount: Tensor
    weight: Tensor
    index: Tensor
