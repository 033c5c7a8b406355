"""Aligning language models: supervised fine-tuning, reward models, pairwise losses, on-policy reinforcement learning, sampling."""
