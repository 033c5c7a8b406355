"""Reinforcement learning and imitation from data alone: no environment answers while they learn."""
