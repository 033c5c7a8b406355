"""GRPO against TRL's GRPOTrainer: 8 prompts of 16 to 48 tokens, 8 answers of 48 tokens to each, KL from a reference, one optimiser step an iteration.

A step is an iteration: sampling, the reward (the same cheap function), the reference's pass, the policy's forward and backward pass, AdamW. An
end token is one of 4096 under random weights, so that nearly all answers have 48 tokens on both sides.
"""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

from cases import _pairs
from cases._shared import Products, our_facts, read_rows, save_model, text, versions, write_rows
from cases.generation import product

PEER, UNIT = "trl", "answers"
PROMPTS, ANSWERS, TOKENS, BETA = 8, 8, 48, 0.04
UNITS_A_STEP = PROMPTS * ANSWERS
STEPS, WARMUP = 3, 2
SETTINGS: dict[str, Any] = {
    "prompts_a_step": PROMPTS,
    "answers_a_prompt": ANSWERS,
    "prompt_tokens": [16, 48],
    "answer_tokens": TOKENS,
    "kl_coef": BETA,
    "seed": 0,
    "learning_rate": 1e-5,
    "model": "Llama, 4.2 M parameters (tinylm's shape, random weights), float32",
}
REWARD = "def words(completions, **columns):\n    return [float(len(set(text.split())) % 7) for text in completions]\n"


def prepare(settings: dict[str, Any], gate: Any) -> None:
    folder, generator = Path(settings["folder"]), random.Random(settings["seed"])
    save_model(folder / "policy", seed=1)
    lengths = [generator.randint(*settings["prompt_tokens"]) for _ in range(PROMPTS * settings["total_steps"])]
    write_rows(folder / "prompts.jsonl", [{"prompt": text(generator, length)} for length in lengths])
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")


def ours(settings: dict[str, Any], gate: Any) -> None:
    """`telos.train` (its door for callbacks), the reward in its own process as for every user."""
    from telos.algorithms.run import train

    import_module("telos.algorithms.language._loop_rollouts")  # before memory is counted, as the peer's libraries are

    class Watch:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: dict[str, float]) -> None:
            gate.step(metrics["completions/mean_length"])

        def ended(self, status: str) -> None: ...

    folder, never = Path(settings["folder"]), settings["total_steps"] + 1
    chosen = {
        "model": str(folder / "policy"),
        "data": str(folder / "prompts.jsonl"),
        "reward": f"{folder / 'reward.py'}:words",
        "batch_size": PROMPTS,
        "samples_per_prompt": ANSWERS,
        "minibatch_size": PROMPTS * ANSWERS,
        "max_completion_length": TOKENS,
        "kl_coef": BETA,
        "learning_rate": settings["learning_rate"],
        "precision": "float32",
        "device": "cpu",
        "threads": settings["threads"],
        "seed": settings["seed"],
        "steps": never,
        "checkpoint_every": 0,
        "log_every": never,
    }
    gate.facts |= our_facts({name: str(value).replace(f"{folder}/", "") for name, value in chosen.items()})
    gate.begin()
    train("grpo", {**chosen, "out": str(folder / "run")}, callbacks=[Watch()])


def peer(settings: dict[str, Any], gate: Any) -> None:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    scope: dict[str, Any] = {}
    exec(REWARD, scope)
    chosen = {
        **{
            name: value
            for name, value in _pairs.training_arguments(settings).items()
            if name not in ("train_sampling_strategy", "max_length")
        },
        "per_device_train_batch_size": PROMPTS * ANSWERS,
        "learning_rate": settings["learning_rate"],
        "num_generations": ANSWERS,
        "max_completion_length": TOKENS,
        "beta": BETA,
        "temperature": 1.0,
        "loss_type": "grpo",
        "num_iterations": 1,
        "shuffle_dataset": False,
    }
    gate.facts |= {
        "versions": versions("trl", "torch", "transformers", "accelerate"),
        "settings": {"attn_implementation": "sdpa", **chosen},
    }
    gate.begin()

    class Watch(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            gate.step(float(TOKENS))

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float32, attn_implementation="sdpa"),
        reward_funcs=scope["words"],
        args=GRPOConfig(output_dir=str(folder / "peer-run"), **chosen),
        train_dataset=Dataset.from_list(read_rows(folder / "prompts.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[Watch()],
    )
    trainer.train()


def limit(settings: dict[str, Any], gate: Any) -> None:
    """The weights' products: each prompt once, 47 decoding steps of 64 rows, then reference forward, policy forward and backward over prompts and answers."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    config = AutoConfig.from_pretrained(folder / "policy")
    lengths = [len(row["prompt"].split()) for row in read_rows(folder / "prompts.jsonl")]
    batches = [sum(lengths[i : i + PROMPTS]) for i in range(0, len(lengths), PROMPTS)]
    rows, predicted = PROMPTS * ANSWERS, PROMPTS * ANSWERS * TOKENS
    products = Products(config, max(batches) + predicted)
    width, middle = config.hidden_size, config.intermediate_size
    shapes = [(width, 3 * width), (width, width), (width, 2 * middle), (middle, width)] * config.num_hidden_layers
    gate.begin()
    with torch.inference_mode():
        weights = [torch.randn(outputs, inputs) for inputs, outputs in shapes]
        decode = [product(weight, rows) for weight in [*weights, torch.randn(config.vocab_size, width)]]
        while True:
            for prompt_tokens in batches:
                products.forward(prompt_tokens, PROMPTS)
                for call in decode * (TOKENS - 1):
                    call()
                for _ in range(2):
                    products.forward(prompt_tokens + predicted, predicted)
                products.backward(prompt_tokens + predicted, predicted)
                gate.step()


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """How long our answers were on average; the peer's are cut at the same length."""
    return {"our_mean_answer_tokens": sum(ours["values"]) / max(1, len(ours["values"]))}
