"""Vision–language models of LLaVA's architecture (Liu et al. 2023): an image encoder, a projector, and a decoder that reads the projected patches as tokens.

Images stand in prompts as runs of ids above the vocabulary (`data.images`). Here these ids are embedded: pictures are looked up and go through the folder's own
image processor, the encoder and the projector, once for each image of a batch, and the gradient goes back the same way. Above the embedding
everything is the decoder's business, so packing and the lean decoding path serve such models, too. The encoder stays as it is, as in LLaVA's own training:
projector and decoder learn.

    python -m telos.models.vision_language --out FOLDER --seed 0

makes a small one from `tinylm` whose encoder has seen rendered scenes: `new_policy` and `pretrain_encoder` say how. It knows no answers yet;
`telos train sft --model FOLDER --data scenes` teaches it some.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedTokenizerBase

from telos.core.errors import UsageError
from telos.core.seeds import derive, torch_generator
from telos.data.images import FIRST, Images
from telos.models.generation import Generated, Sampling, weight_version
from telos.models.language import TINYLM, LanguageModel, Precision, load_pretrained, load_tokenizer, resolve
from telos.models.packing import ATTENTION, Answers

_KEPT_BYTES = 1 << 30  # of processed pictures that are kept ready


class VisionLanguageModel(LanguageModel):
    """A `LanguageModel` whose prompts may hold the ids of images. `images` are those it was shown; they belong to its tokenizer, and so to its copies."""

    sees = True

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        precision: Precision = "auto",
        device: str = "cpu",
        processor: Any = None,
    ) -> None:
        super().__init__(model, tokenizer, source, precision, device)
        self.processor = _load_processor(source) if processor is None else processor
        self.base.model.vision_tower.requires_grad_(False)
        self._ready: OrderedDict[int, np.ndarray] = OrderedDict()
        if not hasattr(tokenizer, "images"):
            tokenizer.images = self._no_images()  # type: ignore[attr-defined]

    @property
    def config(self) -> Any:
        """Of the decoder."""
        return self.base.config.get_text_config(decoder=True)

    @property
    def images(self) -> Images:
        return self.tokenizer.images  # type: ignore[attr-defined]

    def _no_images(self) -> Images:
        token_id = int(self.base.config.image_token_id)
        token = self.tokenizer.convert_ids_to_tokens(token_id) if token_id < len(self.tokenizer) else None  # type: ignore[arg-type]
        if not isinstance(token, str):
            raise UsageError(f"{self.source}: its configuration names the image token {token_id}, which its tokenizer does not have")
        with torch.no_grad():
            blank = torch.from_numpy(self._processed(np.zeros((64, 64, 3), np.uint8)))[None].to(self.device)
            return Images(token, token_id, self._encoded(blank).shape[1])

    def frozen_copy(self) -> VisionLanguageModel:
        clone = VisionLanguageModel(
            copy.deepcopy(self.model), self.tokenizer, self.source, self.precision, str(self.device), processor=self.processor
        )
        clone.requires_grad_(False)
        return clone

    # -- images -----------------------------------------------------------------------------------------------------------------------------------

    def _processed(self, pixels: np.ndarray) -> np.ndarray:
        """[3, H, W] float32, as the encoder takes a picture [h, w, 3] of uint8."""
        found = self.processor.image_processor(images=[pixels], return_tensors="np")["pixel_values"]
        return np.asarray(found[0], dtype=np.float32)

    def pixel_values(self, numbers: Sequence[int]) -> Tensor:
        """[K, 3, H, W] float32 of images by number. Raises `UsageError` for an image that this model was not shown."""
        for number in numbers:
            if number in self._ready:
                self._ready.move_to_end(number)
                continue
            if number >= len(self.images):
                raise UsageError(f"{self.source}: image {number} of a prompt was shown to another model; open both with one tokenizer")
            self._ready[number] = self._processed(self.images.pixels(number))
        found = torch.from_numpy(np.stack([self._ready[number] for number in numbers]))
        while len(self._ready) * self._ready[numbers[0]].nbytes > _KEPT_BYTES and len(self._ready) > 1:
            self._ready.popitem(last=False)
        return found.to(self.device)

    def _encoded(self, pixels: Tensor) -> Tensor:
        """[K, length, d]: pictures [K, 3, H, W] as the decoder reads them."""
        found = self.base.get_image_features(pixel_values=pixels)
        parts = getattr(found, "pooler_output", found)  # a tensor, or a list of images, before transformers 5
        return torch.stack(list(parts))

    def embed(self, ids: Tensor) -> Tensor:
        """[…, d] of token ids […], those of images among them."""
        embedding = self.base.get_input_embeddings()
        seen = ids >= FIRST
        out = embedding(ids.masked_fill(seen, 0))
        if not bool(seen.any()):
            return out
        length = self.images.length
        where = ids[seen] - FIRST
        numbers, slot = torch.unique(where // length, return_inverse=True)
        features = self._encoded(self.pixel_values(numbers.tolist()))
        return out.masked_scatter(seen[..., None], features[slot, where % length].to(out.dtype))

    def inputs(self, ids: Tensor) -> dict[str, Tensor]:
        return {"inputs_embeds": self.embed(ids)}

    def _states(self, answers: Answers, packed: bool | None) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Where whole sequences stand for answers, an image's tokens are among the targets; nothing predicts them, and they count as the placeholder."""
        hidden, target, cell, shape = super()._states(answers, packed)
        return hidden, target.masked_fill(target >= FIRST, self.images.token_id), cell, shape

    @contextlib.contextmanager
    def reader(self, prompts: list[list[int]]) -> Iterator[tuple[LanguageModel, list[list[int]]]]:
        """The decoder as a language model by itself whose embedding also holds the patches of the prompts' images, and the prompts in its ids.

        Within the context the decoder's embedding is replaced; nothing may be trained there.
        """
        stack, length = self.decoder(), self.images.length
        embedding = stack.get_input_embeddings()
        size = embedding.weight.shape[0]
        numbers = sorted({(token - FIRST) // length for prompt in prompts for token in prompt if token >= FIRST})
        start = {number: size + i * length for i, number in enumerate(numbers)}
        with torch.no_grad(), self.compute():
            parts = [self._encoded(self.pixel_values(numbers[i : i + 64])) for i in range(0, len(numbers), 64)]
        rows = torch.cat([embedding.weight.detach(), *(part.flatten(0, 1).to(embedding.weight.dtype) for part in parts)])
        with torch.device("meta"):
            shell: Any = AutoModelForCausalLM.from_config(copy.deepcopy(self.config))
        setattr(shell, shell.base_model_prefix, stack)
        shell.set_output_embeddings(self.base.get_output_embeddings())
        shell.generation_config = self.base.generation_config
        stack.set_input_embeddings(nn.Embedding.from_pretrained(rows))
        try:
            view = LanguageModel(shell, self.tokenizer, self.source, self.precision, str(self.device))
            view._packs = self.packs
            yield (
                view,
                [[t if t < FIRST else start[(t - FIRST) // length] + (t - FIRST) % length for t in prompt] for prompt in prompts],
            )
        finally:
            stack.set_input_embeddings(embedding)

    def save(self, folder: Path) -> None:
        """Also writes the processor, so that `transformers` opens the folder by itself, pictures included."""
        super().save(folder)
        self.processor.tokenizer = self.tokenizer
        self.processor.save_pretrained(folder)


def _load_processor(source: str) -> Any:
    try:
        processor: Any = AutoProcessor.from_pretrained(resolve(source))
        assert processor.image_processor is not None
    except Exception as error:  # the library raises a dozen kinds of exception here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UsageError(
            f"--model {source}: no image processor could be loaded ({reason}); its folder needs a processor_config.json"
        ) from None
    return processor


class VisionEngine:
    """Answers to prompts with images, by the bundled engine; see `generation.Engine`."""

    def __init__(self, model: LanguageModel, name: str = "native") -> None:
        assert isinstance(model, VisionLanguageModel)
        if name != "native":
            raise UsageError(f"--engine {name} is not fitted for images here; use --engine native")
        self.model = model

    def generate(self, prompts: list[list[int]], sampling: Sampling, n: int = 1, seed: int = 0) -> Generated:
        from telos.models.generation.native import NativeEngine

        version = weight_version(self.model)
        with self.model.reader(prompts) as (reader, read):
            return replace(NativeEngine(reader).generate(read, sampling, n, seed), weight_version=version)


# A small one ---------------------------------------------------------------------------------------------------------------------------------

IMAGE_TOKEN = "<image>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def new_policy(seed: int, *, image_size: int = 50, patch_size: int = 10, language: Path = TINYLM) -> VisionLanguageModel:
    """A `LlavaForConditionalGeneration` with the weights of a language model (default `tinylm`) and a small encoder and projector that have seen nothing.

    Pictures are squeezed to `image_size` pixels a side and cut into patches of `patch_size`, which become one token each. The tokenizer gets `<image>`, and
    `<think>`, `</think>`, `<answer>`, `</answer>` as tokens of their own, whose embeddings begin as the mean of those of the pieces that they were before.
    """
    from transformers import (
        AddedToken,
        CLIPImageProcessorPil,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipVisionConfig,
    )

    if image_size % patch_size:
        raise UsageError(f"patches of {patch_size} pixels do not tile a picture of {image_size}")
    words: Any = load_tokenizer(str(language))
    pieces = {tag: words(tag, add_special_tokens=False)["input_ids"] for tag in (IMAGE_TOKEN, *TAGS)}
    words.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    words.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    text: Any = load_pretrained(AutoModelForCausalLM, str(language))
    text.resize_token_embeddings(len(words), mean_resizing=False)
    with torch.no_grad():
        for layer in (text.get_input_embeddings(), text.get_output_embeddings()):
            for tag, ids in pieces.items():
                layer.weight[words.convert_tokens_to_ids(tag)] = layer.weight[torch.tensor(ids)].mean(0)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(image_size=image_size, patch_size=patch_size, vision_use_head=False, **_SMALL),
        text_config=text.config,
        image_token_index=words.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_select_strategy="full",  # no class token
        vision_feature_layer=-1,
        tie_word_embeddings=text.config.tie_word_embeddings,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlavaForConditionalGeneration(config).float()
        # Places as sums of a row's and a column's vector, as large as the patches: from the usual small ones an encoder needs many times as long to learn which
        # patches are neighbours.
        side, width = image_size // patch_size, _SMALL["hidden_size"]
        rows, columns = torch.randn(2, side, width) / 2
        model.model.vision_tower.embeddings.position_embedding.weight.data = (rows[:, None] + columns).reshape(side * side, width)
    model.set_attn_implementation(ATTENTION)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    model.tie_weights()
    model.generation_config = text.generation_config
    half = [0.5, 0.5, 0.5]
    size = {"height": image_size, "width": image_size}
    pictures = CLIPImageProcessorPil(size=size, do_center_crop=False, resample=2, image_mean=half, image_std=half)
    processor = LlavaProcessor(
        pictures,
        words,
        patch_size=patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=0,
    )
    return VisionLanguageModel(model, words, str(language), "float32", "cpu", processor=processor)


def pretrain_encoder(model: VisionLanguageModel, steps: int, seed: int, *, batch: int = 32, learning_rate: float = 3e-3) -> list[float]:
    """Teaches encoder and projector what is where in rendered `scenes` of the training split; the decoder is left as it is. Returns the loss of each step.

    As encoders are pretrained on captions before a language model looks through them, but patch by patch: a patch is projected near the decoder's own words
    for what covers its centre, the colour, the kind, and the four sides of its box as digits (cross-entropy of each against the other words that could stand
    there). So that left and top are told apart, the digits' vectors are shifted at random, for each side otherwise.
    """
    from telos.environments.text import scenes

    tower, projector = model.base.model.vision_tower, model.base.model.multi_modal_projector
    embedding: Tensor = model.base.get_input_embeddings().weight.detach()
    side = round(model.images.length**0.5)
    colours, kinds = list(scenes.COLOURS), list(scenes.KINDS)

    def words(texts: list[str]) -> Tensor:
        ids = [model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        return torch.stack([embedding[torch.tensor(tokens)].mean(0) for tokens in ids])  # type: ignore[arg-type]

    digits = words([str(i) for i in range(scenes.CELLS + 1)])
    shifts = torch.randn(4, *digits.shape, generator=torch_generator(seed, "sides")) * embedding.std() / 2
    named = [words([*(f" {word}" for word in colours), " nothing"]), words([*kinds, " nothing"]), *(digits + shifts)]
    tower.requires_grad_(True)
    optimiser = torch.optim.AdamW([*tower.parameters(), *projector.parameters()], lr=learning_rate, fused=True)
    losses: list[float] = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 20) * (1 - step / steps)
        items = scenes.TESTBED.items("train", batch, derive(seed, "encoder", step))
        pixels = torch.from_numpy(np.stack([model._processed(scenes.render(item.facts)) for item in items]))
        targets = torch.from_numpy(np.stack([_patches(item.facts["shapes"], side, colours, kinds, scenes.CELLS) for item in items]))
        patches = model._encoded(pixels)
        covered = targets[..., 0] < len(colours)
        loss = torch.zeros(())
        for i, vectors in enumerate(named):
            where = covered if i > 1 else torch.ones_like(covered)  # nothing has no sides
            loss = loss + F.cross_entropy(patches[where] @ vectors.T, targets[..., i][where]) / (4 if i > 1 else 1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    tower.requires_grad_(False)
    return losses


def _patches(shapes: Sequence[Any], side: int, colours: list[str], kinds: list[str], cells: int) -> np.ndarray:
    """[side², 6] int64: the numbers of colour and kind of the shape that covers each patch's centre (the last where there is none), and its box."""
    out = np.zeros((side, side, 6), dtype=np.int64)
    out[..., 0], out[..., 1] = len(colours), len(kinds)
    centre = (np.arange(side) + 0.5) * cells / side
    for kind, colour, (left, top, right, bottom) in shapes:
        across, down = (centre >= left) & (centre < right), (centre >= top) & (centre < bottom)
        out[np.ix_(down, across)] = [colours.index(colour), kinds.index(kind), left, top, right, bottom]
    return out.reshape(-1, 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and its processor")
    parser.add_argument("--seed", type=int, default=0, help="of the encoder's and the projector's weights, and of the scenes")
    parser.add_argument("--steps", type=int, default=500, help="of the encoder's pretraining, 32 scenes each; 0 leaves it blind")
    options = parser.parse_args()
    policy = new_policy(options.seed)
    pretrain_encoder(policy, options.steps, options.seed)
    policy.save(options.out)


if __name__ == "__main__":
    main()
