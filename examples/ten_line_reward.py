"""A reward in ten lines: short answers that name something of the prompt. Called as TRL calls reward functions."""

import re


def brief_and_on_topic(prompts, completions, **columns):
    rewards = []
    for prompt, completion in zip(prompts, completions):
        words = re.findall(r"[a-z]+", completion.lower())
        topic = set(re.findall(r"[a-z]{4,}", prompt.lower()))
        on_topic = len(topic & set(words)) / max(1, len(set(words)))  # the share of words that come from the prompt
        brief = 1.0 if 3 <= len(words) <= 12 else 0.0
        rewards.append(on_topic + brief if words else None)  # None: no reward for this answer, it is left out and counted
    return rewards
