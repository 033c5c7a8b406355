"""Training on preference pairs, 16 a step: prompts of 16 to 48 tokens, answers of 8 to 64 with the end token.

Both sides train from public entry points on the same rows in the same order, in float32, with fused AdamW at a constant rate and clipping
at norm 1.
"""

from __future__ import annotations

import random
from importlib import import_module
from pathlib import Path
from typing import Any

from cases._shared import Products, our_facts, read_rows, save_model, text, versions, write_rows

ROWS = 16  # pairs in a step
UNIT, UNITS_A_STEP = "pairs", ROWS
STEPS, WARMUP = 8, 4
SETTINGS: dict[str, Any] = {
    "pairs_a_step": ROWS,
    "prompt_tokens": [16, 48],
    "answer_tokens": [8, 64],
    "seed": 0,
    "learning_rate": 1e-4,
    "model": "Llama, 4.2 M parameters (tinylm's shape, random weights), float32",
}


def prepare(settings: dict[str, Any], gate: Any) -> None:
    """Two models and the rows of one epoch, for us as they come and for a peer that keeps the file's order as we shuffle them.

    The reference is another model than the policy, so that the first loss is not log 2 whatever is computed.
    """
    from telos.core.seeds import derive
    from telos.data.cursor import epoch_order

    folder, generator = Path(settings["folder"]), random.Random(settings["seed"])
    save_model(folder / "policy", seed=1)
    save_model(folder / "reference", seed=2)
    rows = []
    for _ in range(ROWS * settings["total_steps"]):
        prompt, chosen, rejected = (generator.randint(*settings[name]) for name in ("prompt_tokens", "answer_tokens", "answer_tokens"))
        # The end token, which both sides append, is one of an answer's tokens.
        rows.append(
            {
                "prompt": text(generator, prompt),
                "chosen": " " + text(generator, chosen - 1),
                "rejected": " " + text(generator, rejected - 1),
            }
        )
    write_rows(folder / "rows.jsonl", rows)
    write_rows(folder / "ordered.jsonl", [rows[i] for i in epoch_order(len(rows), derive(settings["seed"], "rows"), 0)])


def ours(method: str, settings: dict[str, Any], gate: Any, options: dict[str, Any]) -> None:
    """`telos.train` (its door for callbacks), with a callback at the end of each step."""
    from telos.algorithms.run import train

    import_module("telos.algorithms.language._loop_pairs")  # before memory is counted, as the peer's libraries are

    class Watch:
        def started(self, run: Any, program: Any, first: int, total: int) -> None: ...

        def stepped(self, step: int, metrics: dict[str, float]) -> None:
            gate.step(metrics["loss"])

        def ended(self, status: str) -> None: ...

    folder, never = Path(settings["folder"]), settings["total_steps"] + 1
    chosen = {
        "model": str(folder / "policy"),
        "data": str(folder / "rows.jsonl"),
        "batch_size": ROWS,
        "learning_rate": settings["learning_rate"],
        "lr_schedule": "constant",
        "precision": "float32",
        "device": "cpu",
        "threads": settings["threads"],
        "seed": settings["seed"],
        "steps": never,
        "checkpoint_every": 0,
        "log_every": never,
        **options,
    }
    gate.facts |= our_facts(_without_folder(chosen, folder))
    gate.begin()
    train(method, {**chosen, "out": str(folder / "run")}, callbacks=[Watch()])


def training_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What is fastest on a CPU: float32, nothing recomputed, no loader processes, no logging, no saving; sdpa attention is set with the model.

    TRL 1.16 has switched its padding-free batches off, and Liger's kernels need a GPU. The reference's log-probabilities are computed within
    the step on both sides. Batches grouped by length would be other batches than ours.
    """
    return {
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "max_steps": settings["total_steps"] + 1,
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "max_length": 1024,
    }


def peer_train(
    settings: dict[str, Any], gate: Any, trainer_class: Any, arguments: Any, chosen: dict[str, Any], with_reference: bool
) -> None:
    """`Trainer.train()`, with a callback at the end of each step."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    packages = versions("trl", "torch", "transformers", "accelerate", "datasets")
    gate.facts |= {"versions": packages, "settings": {"trainer": trainer_class.__name__, "attn_implementation": "sdpa", **chosen}}
    gate.begin()

    def load(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32, attn_implementation="sdpa")

    class Timed(trainer_class):
        def training_step(self, *given: Any, **named: Any) -> Any:
            self.newest_loss = super().training_step(*given, **named)
            return self.newest_loss

    class Watch(TrainerCallback):
        def on_step_end(self, *given: Any, **named: Any) -> None:
            gate.step(float(trainer.newest_loss))

    trainer = Timed(
        model=load("policy"),
        **({"ref_model": load("reference")} if with_reference else {}),
        args=arguments(output_dir=str(folder / "peer-run"), **chosen),
        train_dataset=Dataset.from_list(read_rows(folder / "ordered.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
        callbacks=[Watch()],
    )
    trainer.train()


def limit(settings: dict[str, Any], gate: Any, with_reference: bool) -> None:
    """The weights' products with the real tokens of the same batches, each prompt once: policy forward and backward, reference forward."""
    import torch
    from transformers import AutoConfig

    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    lengths = [
        [len(row[name].split()) + (name != "prompt") for name in ("prompt", "chosen", "rejected")]
        for row in read_rows(folder / "ordered.jsonl")
    ]
    batches = [lengths[i : i + ROWS] for i in range(0, len(lengths), ROWS)]
    sizes = [(sum(map(sum, batch)), sum(chosen + rejected for _, chosen, rejected in batch)) for batch in batches]
    products = Products(AutoConfig.from_pretrained(folder / "policy"), max(tokens for tokens, _ in sizes))
    gate.begin()
    with torch.inference_mode():
        while True:
            for tokens, predicted in sizes:
                products.forward(tokens, predicted)
                products.backward(tokens, predicted)
                if with_reference:
                    products.forward(tokens, predicted)
                gate.step()


def compare(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, Any]:
    """The losses of the warm-up's steps: the first is of the same weights on both sides, the later ones follow their own updates."""
    pairs = list(zip(ours["values"], peer["values"], strict=True))
    return {
        "loss_difference": abs(pairs[0][0] - pairs[0][1]),
        "later_loss_difference": max(abs(a - b) for a, b in pairs),
        "losses": {"ours": ours["values"], "peer": peer["values"]},
    }


def _without_folder(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {name: str(value).replace(f"{folder}/", "") if isinstance(value, str) else value for name, value in options.items()}
