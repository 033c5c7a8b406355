"""Reinforcement learning in environments that answer at once: on-policy and off-policy methods of control."""
