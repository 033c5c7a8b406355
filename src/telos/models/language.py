"""Language models as Telos uses them: any Hugging Face causal or encoder–decoder model, full or LoRA, behind one small interface.

`LanguageModel.logprobs` gives the log-probabilities of answers token by token. For decoders whose attention goes through the library's attention
interface it packs the batch (see `packing`); for the rest (sliding windows shorter than the batch, recurrent layers, encoder–decoders) it pads on the right.
Logits are formed only for answer tokens, in slices (see `functional.sequence`).
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from telos.core.errors import UsageError
from telos.functional.sequence import linear_logprobs
from telos.models import packing
from telos.models.packing import Answers

TINYLM = Path(__file__).parent.parent / "assets" / "tinylm"
VISION = ("llava",)  # architectures that look at images, see `vision_language`
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al. 2021) by PEFT."""

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ()  # module names; empty = every linear layer but the output


@dataclass(frozen=True)
class AnswerScores:
    """What a model says of answers: `logprobs` [N, La] (0 where padded), and on request `entropy` [N, La] in nats."""

    logprobs: Tensor
    entropy: Tensor | None = None


def resolve(source: str) -> str:
    """The folder or hub id behind a model's name; `tinylm` is the bundled one."""
    return str(TINYLM) if source == "tinylm" else source


def load_tokenizer(source: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token. Raises `UsageError` when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(source))
    except Exception as error:  # the library raises a dozen kinds of exception here
        raise UsageError(f"no tokenizer could be loaded from {source!r} ({_first_line(error)}); name one with --tokenizer FOLDER") from None
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"the tokenizer of {source!r} has no end-of-sequence token, so no answer could ever end; set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # safe: masks come from lengths, never from ids
    if chat_template is not None:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat_template {chat_template}: cannot be read: {error}") from None
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def load_pretrained(auto_class: Any, source: str, **arguments: Any) -> Any:
    """`auto_class.from_pretrained` with the packed attention where the model takes it, and one clear error."""
    path = resolve(source)
    for attention in (packing.ATTENTION, None):
        try:
            extra = {} if attention is None else {"attn_implementation": attention}
            return auto_class.from_pretrained(path, dtype=torch.float32, trust_remote_code=False, **extra, **arguments)
        except ValueError as error:
            # Models without the attention interface refuse the name; anything else is the user's business.
            if attention is None or "attn" not in str(error).lower():
                raise UsageError(f"--model {source}: {_first_line(error)}") from None
        except Exception as error:
            remedy = "give a Hugging Face folder (config.json and safetensors), a hub id that is reachable, or 'tinylm'"
            raise UsageError(f"--model {source}: cannot be loaded ({_first_line(error)}); {remedy}") from None
    raise AssertionError


def _auto_class(source: str) -> Any:
    """What opens the model in a folder or on the hub. Raises `UsageError` when its configuration cannot be read."""
    try:
        config = AutoConfig.from_pretrained(resolve(source), trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"--model {source}: {_first_line(error)}") from None
    if config.model_type in VISION:
        return AutoModelForImageTextToText
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def choose_device(device: str) -> torch.device:
    """`auto` is the GPU when there is one. Raises `UsageError` for cuda without one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no GPU is visible to torch; use --device cpu")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


def _rescales(config: Any) -> bool:
    """Whether the decoder's states are divided by √d before the output layer: T5's first version and some of its relatives."""
    said = getattr(config, "scale_decoder_outputs", None)  # where it is missing, as it was everywhere once, tied embeddings say so
    kind = getattr(config, "model_type", "")
    return bool(said) if said is not None else kind in ("t5", "longt5", "umt5", "switch_transformers") and bool(config.tie_word_embeddings)


class LanguageModel(nn.Module):
    """A model with its tokenizer. `parameters()` that require a gradient are the ones trained."""

    sees = False  # whether prompts hold images

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, source: str, precision: Precision = "auto", device: str = "cpu"
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.source = source
        self.device = choose_device(device)
        if precision == "auto":
            precision = "bfloat16" if self.device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
        self.precision: Precision = precision
        self._packs: bool | None = None
        self.has_new_adapter = False  # an adapter that changes nothing yet: without it the model is what was loaded
        embedding = model.get_input_embeddings()
        if tokenizer is not None and getattr(embedding, "padding_idx", None) == tokenizer.eos_token_id:
            embedding.padding_idx = None  # where pad is the end token, its embedding would get no gradient
        self.to(self.device)
        self.eval()  # dropout off: the first on-policy ratio must be 1, and a run must be repeatable

    @classmethod
    def load(
        cls,
        source: str,
        *,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        lora: Lora | None = None,
        precision: Precision = "auto",
        device: str = "auto",
    ) -> LanguageModel:
        """Loads a folder, a hub id or `tinylm`; a PEFT adapter's folder loads its base with the adapter trainable."""
        words = load_tokenizer(tokenizer or source, chat_template)
        path = Path(resolve(source))
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            from peft import PeftModel

            if lora is not None:
                raise UsageError(
                    f"--lora_rank: {source} is an adapter already, and it is what will be trained; leave the option out, or merge it first"
                )

            base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
            model = PeftModel.from_pretrained(load_pretrained(_auto_class(base), base), str(path), is_trainable=True)
        else:
            model = load_pretrained(_auto_class(source), source)
        kind = cls
        if model.config.model_type in VISION:
            from telos.models.vision_language import VisionLanguageModel as kind
        if lora is not None:
            model = add_lora(model, lora)
        found = kind(model, words, source, precision, device)
        found.has_new_adapter = lora is not None
        return found

    # -- structure ------------------------------------------------------------------------------------------------------------------------

    @property
    def base(self) -> Any:
        """The Hugging Face model under a PEFT wrapper, or the model itself."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.is_encoder_decoder)

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "disable_adapter")

    @property
    def hidden_size(self) -> int:
        return int(getattr(self.config, "hidden_size", None) or self.config.d_model)

    @property
    def context(self) -> int:
        """The longest sequence the model takes, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", 0) or min(getattr(self.tokenizer, "model_max_length", 1 << 20), 1 << 20))

    @property
    def packs(self) -> bool:
        """Whether batches can be packed: a decoder with full attention in every layer that hands the layout down to its attention. Tried once."""
        if self._packs is None:
            self._packs = self._can_pack()
        return self._packs

    def _can_pack(self) -> bool:
        config = self.config
        layers = set(getattr(config, "layer_types", None) or ["full_attention"])
        windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
        if self.is_encoder_decoder or config._attn_implementation != packing.ATTENTION or layers != {"full_attention"} or windowed:
            return False
        # An architecture may take the attention's name and still not pass the layout on (or place tokens by itself): numbers decide.
        ids = torch.arange(1, 13, device=self.device).view(2, 6) % min(self.config.vocab_size, 97)
        length = torch.tensor([3, 2], device=self.device)
        answers = Answers.repeat(ids[:, :3], length, (ids[:, 2:5], length), (ids[:, 1:5], length + 1))
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            # In bfloat16 rounding alone would look like another layout.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                packed, padded = self._packed_states(answers)[0], self._padded_states(answers)[0]
        except (TypeError, RuntimeError, ValueError, IndexError):
            return False
        finally:
            for module, mode in modes:
                module.training = mode
        return bool((packed - padded).abs().max() <= 1e-3 * padded.abs().max())

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    def frozen_copy(self) -> LanguageModel:
        """An independent copy without gradients, for a reference."""
        clone = LanguageModel(copy.deepcopy(self.model), self.tokenizer, self.source, self.precision, str(self.device))
        clone.requires_grad_(False)
        return clone

    @contextlib.contextmanager
    def adapter_off(self) -> Iterator[None]:
        """The model as it was before its adapter: a reference that costs no memory."""
        with self.model.disable_adapter():
            yield

    def compute(self) -> contextlib.AbstractContextManager[Any]:
        """The precision of the arithmetic: weights stay in float32, products run in bfloat16 when asked."""
        if self.precision == "bfloat16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    # -- log-probabilities ----------------------------------------------------------------------------------------------------------------

    def logprobs(
        self,
        answers: Answers,
        *,
        temperature: Tensor | float = 1.0,
        support: Tensor | None = None,
        want_entropy: bool = False,
        packed: bool | None = None,
    ) -> AnswerScores:
        """log π(answer token | what stands before it), [N, La] float32.

        `temperature`, a number or [N], and `support` [N, La, k] (see `linear_logprobs`) are those the answers were sampled with. `packed` forces
        or forbids the packed layout; None chooses it where the model allows.
        """
        with self.compute():
            hidden, target, cell, shape = self._states(answers, packed)
            weight, bias, divisor = self._output()
            row = torch.div(cell, shape[1], rounding_mode="floor")
            spread = temperature[row] if isinstance(temperature, Tensor) else float(temperature)
            limits = None if support is None else support.reshape(-1, support.shape[-1])[cell]
            values, entropy = self._token_logprobs(hidden, weight, bias, divisor, target, spread, limits, want_entropy)

        def unpack(x: Tensor) -> Tensor:
            out = x.new_zeros(shape[0] * shape[1], *x.shape[1:])
            return out.index_put((cell,), x).view(*shape, *x.shape[1:])

        return AnswerScores(unpack(values), unpack(entropy) if entropy is not None else None)

    def states(self, answers: Answers, *, packed: bool | None = None) -> Tensor:
        """[N, La, d] float32: the last hidden state from which each answer token is predicted; 0 where padded."""
        with self.compute():
            hidden, _, cell, shape = self._states(answers, packed)
        out = hidden.new_zeros(shape[0] * shape[1], hidden.shape[1], dtype=torch.float32)
        return out.index_put((cell,), hidden.float()).view(*shape, -1)

    def _states(self, answers: Answers, packed: bool | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """(states, target tokens, their cells in the padded answers, (N, La))."""
        if self.packs if packed is None else packed:
            return self._packed_states(answers)
        return self._seq2seq_states(answers) if self.is_encoder_decoder else self._padded_states(answers)

    def _token_logprobs(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        divisor: float,
        target: Tensor,
        temperature: Tensor | float,
        support: Tensor | None,
        want_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        if self.precision == "bfloat16":
            hidden, weight = hidden.to(torch.bfloat16), weight.to(torch.bfloat16)
            bias = None if bias is None else bias.to(torch.bfloat16)
        return linear_logprobs(
            hidden, weight, target, bias=bias, temperature=temperature * divisor, support=support, want_entropy=want_entropy
        )

    def _output(self) -> tuple[Tensor, Tensor | None, float]:
        """(weight, bias, what logits are divided by) of the output layer. Raises `UsageError` where it is not a plain projection."""
        config, head = self.config, self.base.get_output_embeddings()
        if getattr(config, "final_logit_softcapping", None) or not isinstance(head, nn.Linear):
            raise UsageError(
                f"{self.source}: its output layer is not a plain linear projection (logit soft-capping or an adapter on it), which is not supported"
            )
        divisor = float(getattr(config, "logits_scaling", None) or 1.0) / float(getattr(config, "logit_scale", None) or 1.0)
        if self.is_encoder_decoder and _rescales(config):
            divisor *= float(config.d_model) ** 0.5
        return head.weight, head.bias, divisor

    def decoder(self) -> Any:
        """The stack below the output layer."""
        return self.base.get_decoder()

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        """What the decoder takes for tokens."""
        return {"input_ids": ids}

    def _packed_states(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        tree = packing.pack(answers)
        return self.packed_hidden(tree)[tree.predict], tree.target, tree.cell, tree.shape

    def packed_hidden(self, tree: packing.Tree) -> Tensor:
        """[T, d], the last hidden state of every token of a packed batch."""
        # A 4-dimensional mask is handed through as it is; the attention over trees needs none.
        nothing = torch.empty(1, 1, 1, 1, device=tree.ids.device)
        given = self.inputs(tree.ids[None])
        out = self.decoder()(**given, position_ids=tree.position[None], attention_mask=nothing, use_cache=False, tree=tree)
        return out.last_hidden_state[0]

    def _padded_states(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        ids, mask, own = _rows(answers)
        out = self.decoder()(**self.inputs(ids), attention_mask=mask.long(), use_cache=False)
        row, column = answers.mask.nonzero(as_tuple=True)
        hidden = out.last_hidden_state[row, own[row] + column - 1]
        return hidden, answers.ids[row, column], row * answers.ids.shape[1] + column, tuple(answers.ids.shape)  # type: ignore[return-value]

    def _seq2seq_states(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        positions = torch.arange(answers.prompt_ids.shape[1], device=self.device)
        mask = (positions < answers.prompt_length[:, None]).long()
        encoded = self.base.get_encoder()(input_ids=answers.prompt_ids * mask, attention_mask=mask).last_hidden_state
        start = torch.full_like(answers.ids[:, :1], self.config.decoder_start_token_id)
        shifted = torch.cat([start, answers.ids[:, :-1]], 1)
        out = self.base.get_decoder()(
            input_ids=shifted,
            attention_mask=answers.mask.long(),
            encoder_hidden_states=encoded[answers.owner],
            encoder_attention_mask=mask[answers.owner],
            use_cache=False,
        )
        row, column = answers.mask.nonzero(as_tuple=True)
        return out.last_hidden_state[row, column], answers.ids[row, column], row * answers.ids.shape[1] + column, tuple(answers.ids.shape)  # type: ignore[return-value]

    # -- writing --------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes a folder that `transformers` (and PEFT, for an adapter) opens by itself."""
        model = self.model
        attention = self.config._attn_implementation
        self.config._attn_implementation = "sdpa" if attention == packing.ATTENTION else attention
        try:
            model.save_pretrained(folder, safe_serialization=True)
            self.tokenizer.save_pretrained(folder)
        finally:
            self.config._attn_implementation = attention


def _rows(answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [N, L], mask [N, L], prompt length of each row): prompt and answer joined without a gap, padded on the right."""
    own = answers.prompt_length[answers.owner]
    width = int((own + answers.length).max())
    column = torch.arange(width, device=answers.ids.device)[None]
    mask = column < (own + answers.length)[:, None]
    from_prompt = answers.prompt_ids[answers.owner].gather(1, column.clamp(max=answers.prompt_ids.shape[1] - 1).expand(len(own), -1))
    from_answer = answers.ids.gather(1, (column - own[:, None]).clamp(0, answers.ids.shape[1] - 1))
    return torch.where(mask, torch.where(column < own[:, None], from_prompt, from_answer), 0), mask, own


def add_lora(model: Any, lora: Lora) -> Any:
    """Wraps a model with fresh adapters; only they are trained."""
    from peft import LoraConfig, get_peft_model

    kind = (
        "SEQ_2_SEQ_LM"
        if model.config.is_encoder_decoder
        else "SEQ_CLS"
        if "ForSequenceClassification" in type(model).__name__
        else "CAUSAL_LM"
    )
    targets = list(lora.targets) or "all-linear"
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides it by the rank: any number will do
                lora_dropout=lora.dropout,
                target_modules=targets,
                task_type=kind,
            ),
        )
    except ValueError as error:
        raise UsageError(f"--lora_targets {','.join(lora.targets)}: {_first_line(error)}") from None
