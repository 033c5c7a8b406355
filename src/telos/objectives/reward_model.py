"""Reward models: a language model with a head that scores an answer by one number, in Hugging Face's sequence-classification format.

The score is the head's product with the last hidden state at the answer's last token (Stiennon et al. 2020); a fresh head is drawn from
N(0, 1 / (d + 1)) as there, d the hidden size. `transformers` computes the same number from a padded row by reading the state at the last
token that is not the pad token. With a pad token that is also the end token it would read the wrong place, so a fresh reward model gets a
pad token of its own: one that the tokenizer reserves, else a new one with an embedding of zeros. A folder that was trained by others with
pad = end keeps what it was trained with and is read where `transformers` reads it, before the end token.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from telos.core.errors import UsageError
from telos.data.batches import join, mask, pad_1d
from telos.data.chat import Ids, encode_answers, encode_prompts, encode_texts, render, require_template, starts_with
from telos.data.formats import BadRow
from telos.data.tokenize import opening_tokens, with_opening
from telos.models import packing
from telos.models.language import LanguageModel, Lora, Precision, _first_line, add_lora, load_pretrained, load_tokenizer, resolve
from telos.models.packing import Answers
from telos.objectives.reward_worker import Outcome, Problem, number
from telos.objectives.rewards import Columns, OnError, Scores, Text, settle

_SPARE = re.compile(r"pad|reserved|unused", re.IGNORECASE)  # special tokens by whose name nothing else is meant
_NEW_PAD = "<|pad|>"
_REMEDY = "a reward model that is trained needs a causal language model"
_OURS = "telos_reward_model"  # in config.json: answers end at their end token, whatever the chat template writes after it


class RewardModel(nn.Module):
    """A sequence-classification model with one label, and its tokenizer. `model` is the Hugging Face model (or its PEFT wrapper)."""

    def __init__(self, body: LanguageModel) -> None:
        super().__init__()
        self.body = body

    @classmethod
    def load(
        cls,
        source: str,
        *,
        fresh: bool = False,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        lora: Lora | None = None,
        precision: Precision = "auto",
        device: str = "auto",
        head_seed: int = 0,
        option: str = "--model",
    ) -> RewardModel:
        """Loads a folder or hub id (or `tinylm`). A folder with a one-label head keeps it; with `fresh`, a causal language model gets a new
        head drawn with `head_seed`. A PEFT adapter's folder is merged into its base. `lora` adds new adapters; they and the head are then
        what is trained. Raises `UsageError` naming `option` for anything else.
        """
        path = Path(resolve(source))
        if path.is_dir() and not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UsageError(f"{option} {source}: this folder holds no model (it has neither config.json nor adapter_config.json)")
        with _names(option):
            words = load_tokenizer(tokenizer or source, chat_template)
            model, trained = _load_classifier(source, fresh, option)
        if not trained:
            head = _head(model)
            generator = torch.Generator().manual_seed(head_seed)
            with torch.no_grad():
                head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.weight.shape[1] + 1))
        _settle_padding(model, words, trained)
        if lora is not None:
            if not hasattr(model, "score"):
                raise UsageError(f"{option} {source}: adapters are supported on decoders only, not on a {type(model).__name__}")
            model = add_lora(model, lora)
        return cls(LanguageModel(model, words, source, precision, device))

    # -- structure ------------------------------------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.body.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.body.tokenizer

    @property
    def source(self) -> str:
        return self.body.source

    @property
    def device(self) -> torch.device:
        return self.body.device

    @property
    def precision(self) -> str:
        return self.body.precision

    @property
    def config(self) -> Any:
        return self.body.config

    @property
    def context(self) -> int:
        """The longest sequence (prompt and answer) the model takes, in tokens."""
        return min(self.body.context, int(getattr(self.tokenizer, "model_max_length", 1 << 30)))

    @property
    def reads_last_token(self) -> bool:
        """Whether this is a decoder whose head reads the last token; else (encoders) only `scores_of_texts` can be asked."""
        return hasattr(self.body.base, "score") and not self.body.is_encoder_decoder

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.named_parameters() if p.requires_grad]

    # -- scores ---------------------------------------------------------------------------------------------------------------------------

    def scores(self, answers: Answers, *, packed: bool | None = None) -> Tensor:
        """The score of each answer, [N] float32. `packed` forces or forbids the packed layout; None chooses it where the model allows.

        Raises `UsageError` for a model that is no decoder.
        """
        if not self.reads_last_token:
            raise UsageError(f"{self.source}: a {type(self.body.base).__name__} does not read an answer's last token; {_REMEDY}")
        column = _read_column(answers, self.config.get_text_config().pad_token_id)
        row = torch.arange(len(column), device=column.device)
        with self.body.compute():
            if self.body.packs if packed is None else packed:
                tree = packing.pack(answers)
                state = self.body.packed_hidden(tree)[tree.row_index[row, column]]
            else:
                rows = join(answers.prompt_ids[answers.owner], answers.prompt_length[answers.owner], answers.ids, answers.length)
                attended = mask(rows.length, rows.ids.shape[1]).long()
                state = self.body.decoder()(input_ids=rows.ids, attention_mask=attended, use_cache=False).last_hidden_state[row, column]
        # One product per answer costs nothing in float32, and differences of scores are small beside the scores.
        with torch.autocast(self.device.type, enabled=False):
            return self.body.base.score(state.float())[:, 0]

    def values(self, answers: Answers) -> Tensor:
        """The head on the state from which each answer token is predicted, [N, La] float32, 0 where padded: a critic's values."""
        states = self.body.states(answers)
        with torch.autocast(self.device.type, enabled=False):
            return self.body.base.score(states)[..., 0].masked_fill(~answers.mask, 0.0)

    def scores_of_texts(self, prompts: list[str], answers: list[str]) -> Tensor:
        """The scores [N] of texts as the model's own tokenizer pairs them: for encoders, whose heads read special tokens. No truncation."""
        inputs = self.tokenizer(prompts, answers, padding=True, truncation=False, return_tensors="pt").to(self.device)
        with self.body.compute():
            return self.model(**inputs).logits[:, 0].float()

    # -- writing --------------------------------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Writes a folder that `AutoModelForSequenceClassification` opens by itself and scores alike; adapters are merged into it."""
        body = self.body
        if body.has_adapter:
            merged = copy.deepcopy(self.model).merge_and_unload()
            body = LanguageModel(merged, self.tokenizer, self.source, body.precision, str(self.device))  # type: ignore[arg-type]
        setattr(body.config, _OURS, True)
        body.save(folder)


# Loading ---------------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _names(option: str) -> Iterator[None]:
    """Lets errors of the shared loaders name the option that the user wrote."""
    try:
        yield
    except UsageError as error:
        if option == "--model":
            raise
        remedy = "put the tokenizer's files beside the weights"
        raise UsageError(str(error).replace("--model", option).replace("name one with --tokenizer FOLDER", remedy)) from None


def _load_classifier(source: str, fresh: bool, option: str) -> tuple[Any, bool]:
    """(model with one label, whether its head was trained)."""
    path = Path(resolve(source))
    adapter = path / "adapter_config.json"
    is_adapter = adapter.is_file() and not (path / "config.json").is_file()
    base = str(json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]) if is_adapter else source
    try:
        config = AutoConfig.from_pretrained(resolve(base), trust_remote_code=False)
    except Exception as error:  # the library raises a dozen kinds of exception here
        raise UsageError(f"{option} {source}: {_first_line(error)}") from None
    classifier = any("SequenceClassification" in name for name in config.architectures or ())
    if classifier and config.num_labels != 1:
        raise UsageError(f"{option} {source}: this classifier has {config.num_labels} labels; a reward model has one")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that the head is new is said below, where it matters
    try:
        model, found = load_pretrained(AutoModelForSequenceClassification, base, num_labels=1, output_loading_info=True)
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted(found["missing_keys"])
    headless = any(name.startswith(("score.", "classifier.")) for name in missing)
    if others := [name for name in missing if not name.startswith("score.") and (classifier or hasattr(model, "score"))]:
        raise UsageError(f"{option} {source}: the weights lack {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}")
    if is_adapter:
        model, brings_head = _merge_adapter(model, path, option)
        headless = headless and not brings_head
    if not headless:
        return model, True
    if not fresh:
        raise UsageError(
            f"{option} {source}: this {(config.architectures or ['model'])[0]} has no trained one-label head, so it cannot score answers; "
            f"train one from it with `telos train reward-model --model {source} --data pairs.jsonl`"
        )
    if not hasattr(model, "score"):
        raise UsageError(f"{option} {source}: a {type(model).__name__} does not read an answer's last token; {_REMEDY}")
    return model, False


def _merge_adapter(model: Any, path: Path, option: str) -> tuple[Any, bool]:
    """(the model with the adapter of `path` merged into its weights, whether the adapter brought a head)."""
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(path))
        has_head = str(config.task_type).endswith("SEQ_CLS")
        if not has_head:
            config.task_type = None  # an adapter of a causal model fits the same decoder under another head
        return PeftModel.from_pretrained(model, str(path), config=config).merge_and_unload(), has_head  # type: ignore[operator]
    except Exception as error:  # sizes that do not fit, missing files, damaged files
        raise UsageError(f"{option} {path}: the adapter cannot be put on its base ({_first_line(error)})") from None


def _head(model: Any) -> nn.Linear:
    return model.score


def _settle_padding(model: Any, tokenizer: PreTrainedTokenizerBase, trained: bool) -> None:
    """Makes tokenizer and configuration agree on a pad token under which `transformers` reads the token that was meant."""
    text = model.config.get_text_config()
    tokenizer.padding_side = "right"  # absolute positions would be wrong on the left
    known = text.pad_token_id
    if trained and known is not None:
        token = tokenizer.convert_ids_to_tokens(known)
        if isinstance(token, str):
            tokenizer.pad_token = token
        return
    if not hasattr(model, "score"):
        return
    pad = _spare_token(model, tokenizer)
    if pad is None:
        tokenizer.add_special_tokens({"pad_token": _NEW_PAD})
        pad = int(tokenizer.convert_tokens_to_ids(_NEW_PAD))  # type: ignore[arg-type]
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    embedding = model.get_input_embeddings()
    rows = embedding.num_embeddings
    if pad >= rows:
        model.resize_token_embeddings(pad + 1, mean_resizing=False)
        embedding = model.get_input_embeddings()
        with torch.no_grad():
            embedding.weight[rows:] = 0.0
    # An embedding takes no gradient for its padding index; that must not be the end token.
    embedding.padding_idx = pad
    for config in (text, model.config):
        config.pad_token_id = pad


def _spare_token(model: Any, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A token that ends no answer and stands in none, or None."""
    configs = (model.config.get_text_config(), getattr(model, "generation_config", None), tokenizer)
    ends = {end for config in configs for end in _ids(getattr(config, "eos_token_id", None))}
    (pad,) = _ids(tokenizer.pad_token_id)
    if pad not in ends:
        return pad
    taken = {*ends, *_ids(tokenizer.bos_token_id), *_ids(tokenizer.unk_token_id)}
    rows = model.get_input_embeddings().num_embeddings
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < rows}
    return min((i for i, content in special.items() if _SPARE.search(content) and i not in taken), default=None)


def _ids(value: Any) -> list[int]:
    """Token ids that a configuration gives as None, a number or a list."""
    return [] if value is None else [int(i) for i in np.atleast_1d(value)]


def _read_column(answers: Answers, pad: int | None) -> Tensor:
    """[N] int64: the place in prompt + answer whose state is scored: the last that is not `pad`, as in `transformers`; 0 if none."""
    own = answers.prompt_length[answers.owner]
    if pad is None:
        return own + answers.length - 1

    def last(ids: Tensor, length: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)
        return torch.where(mask(length, ids.shape[1]) & (ids != pad), place, -1).amax(1)

    in_answer = last(answers.ids, answers.length)
    in_prompt = last(answers.prompt_ids, answers.prompt_length).clamp(min=0)[answers.owner]
    return torch.where(in_answer >= 0, own + in_answer, in_prompt)


# As a source of rewards ------------------------------------------------------------------------------------------------------------------


def same_ids(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token of `policy` has the same id in `reward` (which may have more tokens, such as a pad token of its own)."""
    return policy.get_vocab().items() <= reward.get_vocab().items()


class ModelReward:
    """A reward model as a source of rewards.

    Where its tokenizer gives the policy's tokens the same ids, the sampled `completion_ids` are scored as they are, after the data's column
    `prompt_ids` if there is one, else after the encoded prompt. Otherwise the texts are encoded by the reward model's own tokenizer, with
    its end token where the policy ended (without a `policy_tokenizer`, always). Conversations (lists of turns) are rendered by its own chat
    template. A row longer than its context is an error, never cut.
    """

    def __init__(
        self,
        model: RewardModel,
        *,
        name: str | None = None,
        batch_size: int = 32,
        policy_tokenizer: PreTrainedTokenizerBase | None = None,
        on_error: OnError = "stop",
    ) -> None:
        """`batch_size`: answers in one pass."""
        if batch_size < 1:
            raise UsageError(f"the reward model's batch size must be at least 1, not {batch_size}")
        path = Path(model.source)
        self.name = name or (path.parent.name if path.name == "model" and path.parent.name else path.name)
        self.model, self.batch_size = model, batch_size
        self.on_error: OnError = on_error
        self._policy_tokenizer = policy_tokenizer
        self.uses_ids = policy_tokenizer is not None and model.reads_last_token and same_ids(policy_tokenizer, model.tokenizer)

    def score(self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns) -> Scores:
        """See `RewardSource.score`. The model's gradients are off."""
        with torch.no_grad():
            if not self.model.reads_last_token:
                outcomes = self._scores_of_texts(prompts, completions)
            else:
                outcomes = self._scores_of_ids(self._encode(prompts, completions, completion_ids, columns))
        return settle(self.name, outcomes, completions, self.on_error)

    def close(self) -> None:
        pass

    def _scores_of_texts(self, prompts: list[Any], completions: list[Any]) -> list[Outcome]:
        if any(not isinstance(text, str) for text in (*prompts, *completions)):
            raise UsageError(f"reward {self.name!r}: an encoder has no chat template; give prompts and completions as texts")
        tokens = self.model.tokenizer(prompts, completions, truncation=False, verbose=False)["input_ids"] if prompts else []
        found: list[Outcome] = [self._too_long(len(ids)) for ids in tokens]  # type: ignore[arg-type]
        for rows in self._batches([i for i, outcome in enumerate(found) if outcome is None]):
            values = self.model.scores_of_texts([prompts[i] for i in rows], [completions[i] for i in rows])
            for i, value in zip(rows, values.tolist(), strict=True):
                found[i] = number(value)
        return found

    def _scores_of_ids(self, encoded: Sequence[tuple[Ids, Ids] | Problem]) -> list[Outcome]:
        found: list[Outcome] = [row if isinstance(row, Problem) else self._too_long(len(row[0]) + len(row[1])) for row in encoded]
        for rows in self._batches([i for i, outcome in enumerate(found) if outcome is None]):
            values = self.model.scores(self._answers([encoded[i] for i in rows]))  # type: ignore[misc]
            for i, value in zip(rows, values.tolist(), strict=True):
                found[i] = number(value)
        return found

    def _batches(self, rows: list[int]) -> Iterator[list[int]]:
        for start in range(0, len(rows), self.batch_size):
            yield rows[start : start + self.batch_size]

    def _too_long(self, length: int) -> Problem | None:
        if length <= self.model.context:
            return None
        return Problem(f"was given {length} tokens, more than its context of {self.model.context}: shorten prompts or completions")

    def _answers(self, rows: Sequence[tuple[Ids, Ids]]) -> Answers:
        """Rows as a batch; a prompt that follows itself (a group of samples) is laid out once."""
        prompts: list[Ids] = []
        owner = []
        for prompt, _ in rows:
            if not prompts or not np.array_equal(prompts[-1], prompt):
                prompts.append(prompt)
            owner.append(len(prompts) - 1)
        prompt_ids, prompt_length = pad_1d(prompts)
        ids, length = pad_1d([answer for _, answer in rows])
        tensors = (prompt_ids, prompt_length, ids, length, torch.tensor(owner))
        return Answers(*(tensor.to(self.model.device) for tensor in tensors))

    # -- from texts to ids ----------------------------------------------------------------------------------------------------------------

    def _encode(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], columns: Columns
    ) -> list[tuple[Ids, Ids] | Problem]:
        """(prompt ids, answer ids) of each row, both at least one token."""
        conversational = any(not isinstance(prompt, str) for prompt in prompts)
        if self.uses_ids:
            answers = [np.asarray(ids, dtype=np.int32) for ids in completion_ids]
            given = columns.get("prompt_ids")
            found = [np.asarray(ids, dtype=np.int32) for ids in given] if given else self._prompts(prompts, conversational)
            rows = list(zip(found, answers, strict=True))
        elif conversational:
            rows = [self._conversation(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        else:
            rows = list(zip(self._prompts(prompts, False), self._ended(completions, completion_ids), strict=True))
        return [_checked(row) for row in rows]

    def _prompts(self, prompts: list[Any], conversational: bool) -> Sequence[Ids | BadRow]:
        tokenizer = self.model.tokenizer
        if conversational:
            require_template(tokenizer)
            return encode_prompts(tokenizer, prompts, [None] * len(prompts))
        opening = opening_tokens(tokenizer)
        spare = np.asarray([tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id], dtype=np.int32)
        encoded = (with_opening(ids, opening) for ids in encode_texts(tokenizer, prompts))
        return [ids if len(ids) else spare for ids in encoded]

    def _ended(self, completions: list[str], completion_ids: list[list[int]]) -> list[Ids]:
        """Texts as ids, with an end token where the policy ended."""
        policy = self._policy_tokenizer
        end = self.model.tokenizer.eos_token_id

        def with_end(ids: Ids) -> Ids:
            return ids if len(ids) and ids[-1] == end else np.append(ids, np.int32(end))  # type: ignore[arg-type]

        ended = [policy is None or list(ids[-1:]) == [policy.eos_token_id] for ids in completion_ids]
        encoded = encode_texts(self.model.tokenizer, completions)
        return [with_end(ids) if closed else ids for ids, closed in zip(encoded, ended, strict=True)]

    def _conversation(self, prompt: list[dict[str, Any]], completion: Text) -> tuple[Ids | BadRow, Ids | BadRow]:
        tokenizer = self.model.tokenizer
        require_template(tokenizer)
        turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        if getattr(self.model.config, _OURS, False):
            (found,) = encode_answers(tokenizer, [prompt], [[turns]], [None])
            return (found, found) if isinstance(found, BadRow) else (found.prompt, found.answers[0])
        # Models of others are trained on the whole of what their template writes.
        try:
            (whole,) = encode_texts(tokenizer, [render(tokenizer, [*prompt, *turns])])
            (opening,) = encode_texts(tokenizer, [render(tokenizer, prompt, answer_next=True)])
        except BadRow as bad:
            return bad, bad
        cut = len(opening) if starts_with(whole, opening) and 0 < len(opening) < len(whole) else len(whole) - 1
        return whole[:cut], whole[cut:]


def _checked(row: tuple[Ids | BadRow, Ids | BadRow]) -> tuple[Ids, Ids] | Problem:
    prompt, answer = row
    for part in row:
        if isinstance(part, BadRow):
            return Problem(f"cannot encode its input: {part}")
    assert not isinstance(prompt, BadRow)
    assert not isinstance(answer, BadRow)
    if not len(prompt) or not len(answer):
        return Problem(f"was given an empty {'answer' if len(prompt) else 'prompt'} (no token)")
    return prompt, answer
