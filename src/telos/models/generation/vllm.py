"""Adapter to vLLM, an extra for machines with a GPU: `pip install telos[vllm]`.

vLLM owns its copy of the weights. The model is written to a temporary folder, and written and reloaded again whenever its `weight_version`
has changed since, so answers never come from older weights than they claim. Log-probabilities are asked for as processed by the sampler
(after temperature, top-k and top-p).

What this adapter does not do: share memory with the trainer, sleep, run on several machines, or decode with an un-merged adapter. vLLM's kernels compute in the
model's precision, so its log-probabilities differ from the trainer's by more than rounding in float32. It needs a GPU, and its contract test runs only
where vLLM can be imported.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch

from telos.core.errors import Failure, UsageError
from telos.core.seeds import derive
from telos.models.generation import Generated, Sampling, check_prompts, pad_token, weight_version
from telos.models.language import LanguageModel


class VllmEngine:
    """See `Engine`. `options` go to `vllm.LLM` as they are (for example `gpu_memory_utilization`). Raises `UsageError` where vLLM is not installed."""

    def __init__(self, model: LanguageModel, **options: Any) -> None:
        try:
            import vllm  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UsageError(
                "the vllm engine needs vLLM, which is not installed: pip install telos[vllm], or choose the native engine"
            ) from None
        if model.is_encoder_decoder:
            raise UsageError(f"{model.source}: the vllm engine takes causal decoders only; choose the native engine for encoder–decoders")
        self.model = model
        self._vllm: Any = vllm
        self._options = options
        self._llm: Any = None
        self._version = -1
        self._folder = tempfile.TemporaryDirectory(prefix="telos-vllm-")

    def _write(self) -> None:
        """The weights as one plain model: adapters are merged in a copy, so that the trained ones stay untouched to the last bit."""
        plain: Any = copy.deepcopy(self.model.model).merge_and_unload() if self.model.has_adapter else self.model.base
        model = self.model
        precision = "bfloat16" if model.precision == "bfloat16" else "float32"
        LanguageModel(plain, model.tokenizer, model.source, precision, str(model.device)).save(Path(self._folder.name))

    def _synchronise(self) -> int:
        """Brings vLLM's weights to the model's version, and returns it."""
        version = weight_version(self.model)
        if version == self._version:
            return version
        self._write()
        if self._llm is None:
            self._llm = self._vllm.LLM(
                model=self._folder.name,
                dtype="bfloat16" if self.model.precision == "bfloat16" else "float32",
                max_model_len=self.model.context,
                logprobs_mode="processed_logprobs",
                max_logprobs=-1,
                # Blocks cached for older weights must not serve newer ones; each prompt is still computed once for its n answers.
                enable_prefix_caching=False,
                **self._options,
            )
        else:
            self._llm.collective_rpc("reload_weights")
        self._version = version
        return version

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1, seed: int = 0) -> Generated:
        """See `Engine.generate`. Raises `UsageError` for top-p without top-k, whose support vLLM reports only as the whole vocabulary."""
        if sampling.restricted and sampling.top_k == 0:
            raise UsageError(
                f"top_p = {sampling.top_p} with the vllm engine: give top_k too (for example 100), so that the allowed tokens can be recorded"
            )
        check_prompts(prompts, n, self.model.context, self.model.base.get_input_embeddings().weight.shape[0])
        version = self._synchronise()
        settings = [
            self._vllm.SamplingParams(
                n=n,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k or -1,
                min_tokens=sampling.min_new_tokens,
                max_tokens=min(sampling.max_new_tokens, self.model.context - len(prompt)),
                logprobs=sampling.top_k if sampling.restricted else 0,
                seed=derive(seed, "generation", index) % (1 << 31),
                detokenize=False,
            )
            for index, prompt in enumerate(prompts)
        ]
        outputs = self._llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
        return self._collect([answer for output in outputs for answer in sorted(output.outputs, key=lambda a: a.index)], sampling, version)

    def _collect(self, answers: list[Any], sampling: Sampling, version: int) -> Generated:
        pad = pad_token(self.model)
        width = max(len(answer.token_ids) for answer in answers)
        ids = torch.full((len(answers), width), pad, dtype=torch.int64)
        logprobs = torch.zeros(len(answers), width)
        kept: list[list[list[int]]] = []
        for row, answer in enumerate(answers):
            if not answer.token_ids:
                raise Failure(f"vLLM returned no token for answer {row} (finish reason {answer.finish_reason!r}); see its log above")
            ids[row, : len(answer.token_ids)] = torch.tensor(list(answer.token_ids))
            steps = list(zip(answer.token_ids, answer.logprobs, strict=True))
            logprobs[row, : len(steps)] = torch.tensor([step[token].logprob for token, step in steps])
            kept.append(
                [sorted((t for t in step if step[t].logprob > -torch.inf), key=lambda t, s=step: -s[t].logprob) for _, step in steps]
            )
        support = None
        if sampling.restricted:
            most = max(len(tokens) for row in kept for tokens in row)
            support = torch.full((len(answers), width, most), -1, dtype=torch.int64)
            support[:, :, 0] = pad
            for row, steps in enumerate(kept):
                for step, tokens in enumerate(steps):
                    support[row, step, : len(tokens)] = torch.tensor(tokens)
        device = self.model.device
        return Generated(
            ids.to(device),
            torch.tensor([len(answer.token_ids) for answer in answers], device=device),
            torch.tensor([answer.finish_reason == "stop" for answer in answers], device=device),
            logprobs.to(device),
            None if support is None else support.to(device),
            version,
        )
