"""Pre-trains the bundled `tinylm`: a 4.2 M-parameter Llama with its own byte-level BPE tokenizer, in Hugging Face format.

    python -m telos.models.tinylm --out src/telos/assets/tinylm --steps 1300

The text is what every machine with Python has: the standard library's own code and help topics (modules of the `docstrings` test and
validation splits left out), and the generators of the bundled testbeds. Hidden matrices are trained by Muon, the embedding and the norms
by AdamW, in bf16 autocast; weights ship in bf16. `training.json` beside the weights records data, steps, settings, loss and versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from telos.environments.text.base import load_testbed
from telos.environments.text.docstrings import library_files, split_of

VOCABULARY = 4096
CONTEXT = 256  # tokens of one training window
ROWS = 16  # windows a step
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
# Plain turns; `generation` marks what the assistant wrote, so that loss masks are exact.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}<|assistant|>{% generation %}{{ message['content'] }}<|end|>"
    "{% endgeneration %}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def documents(seed: int) -> dict[str, list[str]]:
    """The pre-training text by source, before shuffling."""
    library = [
        (module, path.read_text(encoding="utf-8", errors="ignore")) for module, path in library_files() if split_of(module) == "train"
    ]
    code = [
        text for module, text in library if len(text) < 200_000 and text.isascii() and not module.startswith(("encodings/", "pydoc_data/"))
    ]
    topics = [text for module, text in library if module == "pydoc_data/topics.py"]
    out = {"library code": code, "help topics": [_topic_text(text) for text in topics]}
    for name, n in (("docstrings", 9000), ("review", 45_000), ("arith", 70_000)):
        out[name] = list(load_testbed(name).corpus(n, seed))
    rng = random.Random(seed)
    chat = []
    for name in ("docstrings", "review"):
        for item in load_testbed(name).items("train", 1500, seed=seed + 1):
            chat.append(f"<|user|>{item.prompt}<|end|><|assistant|>{item.reference.strip()}")
    rng.shuffle(chat)
    return {**out, "chat": chat}


def _topic_text(source: str) -> str:
    import ast

    tree = ast.parse(source)
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n\n".join(value for value in values if len(value) > 200)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits are single tokens, so that arithmetic is not a matter of how numbers were merged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def new_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def pretrain(out: Path, steps: int, seed: int, learning_rate: float = 0.02, threads: int = 2) -> None:
    torch.set_num_threads(threads)
    sources = documents(seed)
    rng = random.Random(seed)
    sample = [text for texts in sources.values() for text in rng.sample(texts, min(len(texts), 6000))]
    tokenizer = train_tokenizer(sample)
    stream: list[np.ndarray] = []
    sizes: dict[str, int] = {}
    for name, texts in sources.items():
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        rows = [np.asarray([*ids, 1], dtype=np.int16) for ids in encoded]
        # Long files are cut into pieces, so that shuffling mixes the sources evenly.
        rows = [row[i : i + 2048] for row in rows for i in range(0, len(row), 2048)]
        sizes[name] = sum(map(len, rows))
        stream += rows
    print("tokens:", sizes, flush=True)
    order = np.random.default_rng(seed).permutation(len(stream))
    data = torch.from_numpy(np.concatenate([stream[i] for i in order]).astype(np.int64))
    windows = data[: (len(data) - 1) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    held_out, windows = windows[:ROWS], windows[ROWS:]
    print(f"windows: {len(windows)}; {steps * ROWS / len(windows):.2f} epochs", flush=True)

    model = new_model(seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim < 2 or "embed" in name]
    optimisers = [
        torch.optim.Muon(matrices, lr=learning_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    base = [group["lr"] for optimiser in optimisers for group in optimiser.param_groups]
    started, losses = time.time(), []
    shuffled = torch.from_numpy(np.random.default_rng(seed + 1).permutation(len(windows)))
    for step in range(steps):
        # Warm up over 50 steps, stay, then fall to zero over the last 40 %.
        scale = min(1.0, (step + 1) / 50, (steps - step) / (0.4 * steps))
        for group, rate in zip((g for o in optimisers for g in o.param_groups), base, strict=True):
            group["lr"] = rate * scale
        index = shuffled[torch.arange(step * ROWS, (step + 1) * ROWS) % len(windows)]
        batch = windows[index]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if step % 25 == 0 or step == steps - 1:
            print(f"step {step} loss {np.mean(losses[-25:]):.3f} {(time.time() - started) / (step + 1):.2f} s/step", flush=True)
    with torch.inference_mode():
        held_out_loss = model(input_ids=held_out, labels=held_out).loss.item()
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)
    record = {
        "tokens_by_source": sizes,
        "steps": steps,
        "tokens_trained": steps * ROWS * CONTEXT,
        "seed": seed,
        "loss_last_100_steps_nats": round(float(np.mean(losses[-100:])), 4),
        "loss_held_out_nats": round(held_out_loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "muon_learning_rate": learning_rate,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, tokenizer and training.json")
    parser.add_argument("--steps", type=int, default=1300, help=f"optimiser steps of {ROWS} windows of {CONTEXT} tokens")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    pretrain(options.out, options.steps, options.seed)


if __name__ == "__main__":
    main()
