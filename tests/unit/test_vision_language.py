"""Vision–language models: what a picture is to the decoder must not depend on who computes it, how it is batched, or where the row came from."""

from __future__ import annotations

import base64
import copy
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from data_fixtures import CHATML, write_jsonl
from support import changed, make_model, numbers, program_of, snapshot
from telos.algorithms.language import _rows
from telos.algorithms.language._loop_rollouts import layout
from telos.algorithms.language._sampling import Writer
from telos.algorithms.run import resume, train
from telos.core.errors import UsageError
from telos.core.run import Run
from telos.data.formats import read_examples
from telos.data.images import FIRST, Images, decode, encode_png, source_of
from telos.data.readers import read_rows
from telos.data.tokenize import Limits, tokenize
from telos.models.generation import Sampling, make_engine
from telos.models.generation.lean import reason_against
from telos.models.generation.native import Mixture, NativeEngine
from telos.models.language import LanguageModel, Lora
from telos.models.packing import Answers
from telos.models.vision_language import VisionLanguageModel, new_policy, pretrain_encoder

SIDE, PATCH = 12, 6  # pixels: an image is four tokens
WORDS = ["What is it?", "<image>Is it good?", "The sky\n<image> is", "Is <image> blue?", "a", "hello hello <image>good"]


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of LLaVA's architecture on disk, made as users make theirs."""
    root = tmp_path_factory.mktemp("vision")
    model = new_policy(0, image_size=SIDE, patch_size=PATCH, language=make_model(root / "language", chat=True))
    with torch.no_grad():  # so that pictures count
        for parameter in model.base.model.multi_modal_projector.parameters():
            parameter.mul_(20.0)
    model.save(root / "model")
    return root / "model"


@pytest.fixture
def model(folder: Path) -> VisionLanguageModel:
    found = LanguageModel.load(str(folder), device="cpu")
    assert isinstance(found, VisionLanguageModel)
    return found


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Prompts with pictures as files; the last two rows have the same one."""
    for i in range(len(WORDS) - 1):
        (tmp_path / f"{i}.png").write_bytes(encode_png(picture(i)))
    return [{"prompt": text, "image": str(tmp_path / f"{min(i, len(WORDS) - 2)}.png")} for i, text in enumerate(WORDS)]


def table_of(model: LanguageModel, rows: list[dict[str, Any]]) -> Any:
    return tokenize(read_examples(read_rows(rows), ("prompt-only",)), model.tokenizer, Limits(max_prompt_length=60))


def sampled(model: VisionLanguageModel, rows: list[dict[str, Any]], n: int = 3, **sampling: Any) -> Any:
    rollouts, _ = Writer(model).write(
        table_of(model, rows).batch(range(len(rows))), sampling=Sampling(max_new_tokens=6, **sampling), n=n, seed=3
    )
    return rollouts


def by_transformers(model: VisionLanguageModel, folder: Path, rows: list[dict[str, Any]], rollouts: Any) -> dict[int, torch.Tensor]:
    """The log-probabilities of each answer's tokens from transformers' own processor and forward, one sequence at a time; without answers that hold the
    placeholder, which transformers takes for a missing picture."""
    theirs, processor = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval(),
        AutoProcessor.from_pretrained(folder),
    )
    theirs.load_state_dict(model.base.state_dict())
    out = {}
    for i, row in enumerate(rollouts.row.tolist()):
        if (rollouts.completion_ids[i] == model.images.token_id).any():
            continue
        text, image = rows[row]["prompt"], decode(Path(rows[row]["image"]).read_bytes())
        given = processor(text=text if "<image>" in text else f"<image>{text}", images=image, add_special_tokens=False, return_tensors="pt")
        answer = rollouts.completion_ids[i, : rollouts.completion_length[i]]
        ids = torch.cat([given["input_ids"][0], answer])[None]
        with torch.no_grad():
            logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given["pixel_values"]).logits[0]
        start = given["input_ids"].shape[1]
        out[i] = logits[start - 1 : -1].log_softmax(-1).gather(1, answer[:, None])[:, 0]
    return out


# Log-probabilities ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False])
def test_log_probabilities_are_those_of_transformers_own_forward(
    model: VisionLanguageModel, folder: Path, rows: list[dict[str, Any]], packed: bool
) -> None:
    rollouts = sampled(model, rows, n=2)
    with torch.no_grad():
        ours = model.logprobs(layout(rollouts), packed=packed).logprobs
    theirs = by_transformers(model, folder, rows, rollouts)
    assert len(theirs) > 0.7 * len(ours)
    for i, expected in theirs.items():
        torch.testing.assert_close(ours[i, : len(expected)], expected, atol=2e-5, rtol=1e-4)


def test_another_picture_makes_another_answer(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    rollouts = sampled(model, rows, n=1)
    other = rollouts.clone()
    length = model.images.length
    seen = other.prompt_ids >= FIRST
    other.prompt_ids[seen] = FIRST + (other.prompt_ids[seen] - FIRST + length) % (len(model.images) * length)
    with torch.no_grad():
        gap = (model.logprobs(layout(other)).logprobs - model.logprobs(layout(rollouts)).logprobs).abs()
    assert float(gap[rollouts.action_mask].mean()) > 0.05


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_p": 0.7}, {"top_k": 5}])
def test_sampled_log_probabilities_are_the_recomputed_ones(
    model: VisionLanguageModel, rows: list[dict[str, Any]], sampling: dict[str, float]
) -> None:
    rollouts = sampled(model, rows, **sampling)
    with torch.no_grad():
        again = model.logprobs(layout(rollouts), temperature=sampling.get("temperature", 1.0), support=rollouts.support).logprobs
    torch.testing.assert_close(again, rollouts.logprobs, atol=3e-5, rtol=1e-4)


def test_the_lean_and_the_generic_path_draw_the_same_and_greedy_answers_are_transformers_own(
    model: VisionLanguageModel, folder: Path, rows: list[dict[str, Any]]
) -> None:
    prompts = [row.tolist() for row in table_of(model, rows).columns["prompt_ids"]]
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    with model.reader(prompts) as (reader, read):
        assert reason_against(reader, 60) is None
        lean, generic = (NativeEngine(reader, path=path).generate(read, sampling) for path in ("lean", "generic"))  # type: ignore[arg-type]
    assert torch.equal(lean.ids, generic.ids)
    assert torch.equal(lean.ids, make_engine(model).generate(prompts, sampling).ids)
    processor = AutoProcessor.from_pretrained(folder)
    for i, row in enumerate(rows[:3]):
        text = row["prompt"] if "<image>" in row["prompt"] else f"<image>{row['prompt']}"
        image = decode(Path(row["image"]).read_bytes())
        given = processor(text=text, images=image, add_special_tokens=False, return_tensors="pt")
        given.pop("token_type_ids", None)
        with torch.no_grad():
            theirs = model.base.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert lean.ids[i, : lean.length[i]].tolist() == theirs[: lean.length[i]].tolist()


def test_sampling_leaves_the_model_as_it_was(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    before, embedding = snapshot(model), model.base.get_input_embeddings()
    sampled(model, rows)
    assert model.base.get_input_embeddings() is embedding
    assert changed(before, snapshot(model)) == set()


def test_a_placeholder_that_the_policy_writes_is_a_word_and_no_picture(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    prompts = table_of(model, rows[:2]).batch([0, 1])
    token = model.images.token_id
    answer, length = torch.tensor([[7, token, 9], [token, token, 1]]), torch.tensor([3, 3])
    with torch.no_grad():
        found = model.logprobs(Answers.repeat(prompts.prompt_ids, prompts.prompt_length, (answer, length))).logprobs
        table = model.base.get_input_embeddings().weight
        embedded = torch.cat([model.embed(prompts.prompt_ids[0, : prompts.prompt_length[0]]), table[answer[0]]])[None]
        logits = model.base(inputs_embeds=embedded).logits[0, -4:-1]
    torch.testing.assert_close(found[0], logits.log_softmax(-1).gather(1, answer[0][:, None])[:, 0], atol=2e-5, rtol=1e-4)


# Batches and gradients -----------------------------------------------------------------------------------------------------------------------


def gradients(model: VisionLanguageModel, parts: list[Any], packed: bool | None) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    for part in parts:
        (model.logprobs(layout(part), packed=packed).logprobs * part.action_mask).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_packing_and_wider_padding_change_no_gradient(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    rollouts = sampled(model, rows)
    wider = rollouts.clone()
    wider.prompt_ids = torch.nn.functional.pad(wider.prompt_ids, (0, 5))
    whole = gradients(model, [rollouts], True)
    assert any("projector" in name and bool(value.abs().max() > 0) for name, value in whole.items())
    assert not any("vision_tower" in name for name in whole)
    largest = max(float(value.abs().max()) for value in whole.values())
    for parts, packed in (
        ([rollouts[:4], rollouts[4:11], rollouts[11:]], True),
        ([rollouts], False),
        ([wider], True),
        ([wider[i : i + 1] for i in range(18)], False),
    ):
        other = gradients(model, parts, packed)
        assert other.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(other[name], value, atol=1e-5 * largest, rtol=1e-3)


def test_a_picture_that_several_prompts_show_has_one_number_and_is_encoded_once(
    model: VisionLanguageModel, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    original = VisionLanguageModel._encoded
    monkeypatch.setattr(VisionLanguageModel, "_encoded", lambda self, pixels: (counts.append(len(pixels)), original(self, pixels))[1])
    rollouts = sampled(model, rows)
    model.logprobs(layout(rollouts))
    assert len(model.images) == len(rows) - 1
    assert counts == [len(rows) - 1] * 2


def test_copies_know_the_pictures_and_other_models_do_not(model: VisionLanguageModel, folder: Path, rows: list[dict[str, Any]]) -> None:
    rollouts = sampled(model, rows)
    with torch.no_grad():
        mine, copied = model.logprobs(layout(rollouts)).logprobs, model.frozen_copy().logprobs(layout(rollouts)).logprobs
    assert torch.equal(mine, copied)
    assert copy.deepcopy(model.tokenizer).images is model.images  # type: ignore[attr-defined]
    stranger = LanguageModel.load(str(folder), device="cpu")
    with pytest.raises(UsageError, match="was shown to another model"):
        stranger.logprobs(layout(rollouts))


# Folders -------------------------------------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_model_and_another_seed_another_eye(tmp_path: Path) -> None:
    language = make_model(tmp_path / "language")
    one, two, other = (new_policy(seed, image_size=SIDE, patch_size=PATCH, language=language) for seed in (0, 0, 1))
    assert changed(snapshot(one), snapshot(two)) == set()
    assert {name.split(".")[2] for name in changed(snapshot(one), snapshot(other))} == {"vision_tower", "multi_modal_projector"}
    plain = LanguageModel.load(str(language), device="cpu")
    old = plain.base.get_input_embeddings().weight
    assert torch.equal(one.base.get_input_embeddings().weight[: len(old)], old)


def test_a_saved_folder_is_opened_and_used_by_transformers_alone(
    model: VisionLanguageModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    model.save(tmp_path / "saved")
    script = """
import json, sys, torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from PIL import Image
folder, image, text = sys.argv[1:]
model, processor = LlavaForConditionalGeneration.from_pretrained(folder), LlavaProcessor.from_pretrained(folder)
given = processor(text=text, images=Image.open(image), add_special_tokens=False, return_tensors="pt")
with torch.no_grad():
    logits = model(input_ids=given["input_ids"], pixel_values=given["pixel_values"]).logits
print(json.dumps(["telos" in sys.modules, logits[0, -1].tolist()]))
"""
    row = rows[1]
    ran = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved"), row["image"], row["prompt"]], capture_output=True, text=True, check=True
    )
    ours, logits = json.loads(ran.stdout.splitlines()[-1])
    assert not ours
    prompt = torch.from_numpy(table_of(model, [row]).columns["prompt_ids"][0]).long()
    with torch.no_grad():
        mine = model.base(inputs_embeds=model.embed(prompt)[None]).logits[0, -1]
    torch.testing.assert_close(torch.tensor(logits), mine, atol=2e-5, rtol=1e-4)


def test_an_adapter_on_such_a_model_is_saved_and_opened(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    model = LanguageModel.load(str(folder), lora=Lora(rank=2, alpha=4.0), device="cpu")
    assert isinstance(model, VisionLanguageModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    rollouts = sampled(model, rows)
    model.save(tmp_path / "adapter")
    again = LanguageModel.load(str(tmp_path / "adapter"), device="cpu")
    table_of(again, rows)
    with torch.no_grad():
        expected, found = (one.logprobs(layout(rollouts)).logprobs for one in (model, again))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(rollouts.logprobs, expected, atol=3e-5, rtol=1e-4)


# Training ------------------------------------------------------------------------------------------------------------------------------------

JUDGE = """
def judge(prompts, completions, image, **columns):
    assert all(name.endswith(".png") for name in image)
    return [text.count(" ") - 0.5 * text.count("e") + 0.01 * len(text) for text in completions]
"""


def options(folder: Path, data: Path, **changes: Any) -> dict[str, Any]:
    common = {"model": str(folder), "data": str(data), "device": "cpu", "threads": 1, "steps": 3, "batch_size": 3, "learning_rate": 1e-2}
    return common | changes


@pytest.fixture
def data(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """A file of prompts whose images are named from its own folder."""
    (tmp_path / "judge.py").write_text(JUDGE, encoding="utf-8")
    return write_jsonl(tmp_path / "prompts.jsonl", [row | {"image": Path(row["image"]).name} for row in rows])


def test_the_first_ratio_is_one_in_a_grpo_step_on_a_file_of_prompts_with_images(folder: Path, data: Path, tmp_path: Path) -> None:
    given = options(
        folder, data, reward=[f"{tmp_path / 'judge.py'}:judge"], samples_per_prompt=4, minibatch_size=12, max_completion_length=6
    )
    program = program_of("grpo", given, tmp_path / "run")
    gaps: list[float] = []
    check = program._check_first_ratio

    def watch(new: torch.Tensor, old: torch.Tensor, mask: torch.Tensor) -> None:
        gaps.append(float((new.detach() - old)[mask].abs().max()))
        check(new, old, mask)

    program._check_first_ratio = watch
    before = snapshot(program.model)
    metrics = program.step(0)
    assert len(gaps) == 1
    assert gaps[0] < 1e-4
    assert abs(metrics["kl"]) < 1e-4  # the reference sees the same pictures
    assert {name.split(".")[2] for name in changed(before, snapshot(program.model)) if name.startswith("model.model.")} == {
        "multi_modal_projector",
        "language_model",
    }  # the encoder stays as it is


class Killed(BaseException):
    pass


class KilledAfter:
    def __init__(self, step: int) -> None:
        self.step = step

    def started(self, *_: Any) -> None: ...

    def stepped(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            raise Killed

    def ended(self, status: str) -> None: ...


def test_training_goes_on_bit_for_bit_and_its_folder_sees(folder: Path, data: Path, tmp_path: Path) -> None:
    given = options(
        folder, data, reward=[f"{tmp_path / 'judge.py'}:judge"], samples_per_prompt=2, minibatch_size=6, max_completion_length=6
    )
    whole = train("grpo", given | {"out": str(tmp_path / "whole"), "checkpoint_every": 1})
    with pytest.raises(Killed):
        train("grpo", given | {"out": str(tmp_path / "part"), "checkpoint_every": 1}, callbacks=[KilledAfter(2)])
    resumed = resume(tmp_path / "part")
    assert numbers(resumed) == numbers(whole)
    first, second = (LanguageModel.load(str(run.path / "model"), device="cpu") for run in (resumed, whole))
    assert isinstance(first, VisionLanguageModel)
    assert changed(snapshot(first), snapshot(second)) == set()


def test_supervised_training_takes_images_and_learns_only_the_answer(folder: Path, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "sft.jsonl", [row | {"completion": " good"} for row in rows])
    program = program_of("sft", options(folder, file, batch_size=6, steps=20), tmp_path / "run")
    batch = program.table.batch(range(6))
    assert not bool(batch.loss_mask[batch.ids >= FIRST].any())
    assert batch.loss_mask.sum(1).tolist() == [len(program.model.tokenizer(" good")["input_ids"]) + 1] * 6
    losses = [program.step(i)["loss"] for i in range(20)]
    assert losses[-1] < 0.3 * losses[0]


def test_the_bundled_scenes_train_such_a_model_by_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_TESTBED_ROWS", 8)
    given = {"reward": ["gold:scenes"], "samples_per_prompt": 2, "minibatch_size": 4, "max_completion_length": 4, "batch_size": 2}
    given |= {"model": str(folder), "data": "scenes", "device": "cpu", "threads": 1, "steps": 1}
    run = train("grpo", given | {"out": str(tmp_path / "run")})
    assert run.metrics()[0]["reward"] == 0.0


def test_pretraining_the_encoder_lowers_its_loss_and_leaves_the_decoder(tmp_path: Path) -> None:
    model = new_policy(0, language=make_model(tmp_path / "language"))
    before = snapshot(model)
    losses = pretrain_encoder(model, 40, 0, batch=8)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert {name.split(".")[2] for name in changed(before, snapshot(model))} == {"vision_tower", "multi_modal_projector"}


# Rows ----------------------------------------------------------------------------------------------------------------------------------------


def test_all_forms_of_an_image_are_the_same_picture(tmp_path: Path) -> None:
    pixels = picture(5)
    file = encode_png(pixels)
    path = tmp_path / "one.png"
    path.write_bytes(file)
    uri = "data:image/png;base64," + base64.b64encode(file).decode()
    images = Images("<image>", 5, 4)
    forms = [file, str(path), path, uri, {"bytes": file, "path": None}, {"bytes": None, "path": str(path)}, pixels, pixels.tolist()]
    assert {images.add(form) for form in forms} == {0}
    assert np.array_equal(images.pixels(0), pixels)
    assert np.array_equal(decode(source_of(np.full((3, 4), 7, np.uint8))), np.full((3, 4, 3), 7))  # type: ignore[arg-type]


def test_prompts_hold_their_images_tokens_where_the_placeholders_were(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    table = table_of(model, rows)
    words, length = model.tokenizer, model.images.length
    for i, (row, ids) in enumerate(zip(rows, table.columns["prompt_ids"], strict=True)):
        text = row["prompt"] if "<image>" in row["prompt"] else f"<image>{row['prompt']}"
        before, after = text.split("<image>")
        number = min(i, len(rows) - 2)
        wanted = words(before)["input_ids"] + [FIRST + number * length + j for j in range(length)] + words(after)["input_ids"]
        assert ids.tolist() == wanted
    assert table.prompts == [row["prompt"] for row in rows]


def test_conversations_and_several_images_are_taken(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    model.tokenizer.chat_template = CHATML
    pictures = [row["image"] for row in rows]
    given = [
        {"prompt": [{"role": "user", "content": "What is it?"}], "image": pictures[0]},
        {"prompt": [{"role": "user", "content": "Is <image> like <image>?"}], "images": [pictures[1], pictures[0]]},
    ]
    table = table_of(model, given)
    length = model.images.length
    shown = [[int(t - FIRST) // length for t in ids if t >= FIRST] for ids in table.columns["prompt_ids"]]
    assert shown == [[0] * length, [1] * length + [0] * length]
    assert table.prompts == [row["prompt"] for row in given]


def test_another_picture_under_the_same_path_is_another_table(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    first = _rows.fingerprint(table_of(model, rows))
    assert _rows.fingerprint(table_of(model, rows)) == first
    Path(rows[0]["image"]).write_bytes(encode_png(picture(99)))
    model.tokenizer.images = model._no_images()  # type: ignore[attr-defined]
    assert _rows.fingerprint(table_of(model, rows)) != first


def refused(model: LanguageModel, rows: list[dict[str, Any]], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        table_of(model, rows)


def test_rows_whose_images_cannot_be_used_are_refused_by_name(
    model: VisionLanguageModel, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    good = rows[:1]
    refused(model, [*good, {"prompt": "a", "image": "nowhere.png"}], r"row 2: there is no image file nowhere\.png")
    refused(model, [*good, {"prompt": "a", "image": str(tmp_path / "broken.png")}], r"row 2: the image cannot be read")
    refused(model, [*good, {"prompt": "a", "image": "data:image/png;base64,@@"}], r"row 2: .*broken base64")
    refused(model, [*good, {"prompt": "a", "image": 3}], r"row 2: an image is int, wanted a path")
    refused(model, [*good, {"prompt": "a"}], r"row 2: the row has no image, and the model is one that looks at images")
    refused(model, [{"prompt": "a"}], r"row 1: the row has no image")
    refused(model, [good[0] | {"prompt": "<image> and <image>"}], r"row 1: 'prompt' has 2 placeholders <image> for 1 images")
    refused(model, [good[0] | {"prompt": "a" * 80}], r"row 1: \d of the 4 tokens of its images are left .* Raise --max_prompt_length")


def test_bad_images_are_dropped_and_counted_where_that_is_asked(model: VisionLanguageModel, rows: list[dict[str, Any]]) -> None:
    examples = read_examples(read_rows([*rows, {"prompt": "a", "image": "nowhere.png"}]), ("prompt-only",), on_bad_row="drop")
    table = tokenize(examples, model.tokenizer)
    assert (len(table), table.counts.dropped) == (len(rows), {"no-image": 1})


def test_a_model_without_vision_refuses_images_and_names_the_row(tmp_path: Path, rows: list[dict[str, Any]], data: Path) -> None:
    plain = LanguageModel.load(str(make_model(tmp_path / "plain")), device="cpu")
    refused(plain, [{"prompt": "a"}, rows[0]], r"row 2: the row has a column 'image', but the model reads text alone")
    given = options(tmp_path / "plain", data, reward=[f"{tmp_path / 'judge.py'}:judge"])
    with pytest.raises(UsageError, match=r"prompts\.jsonl:1: .* reads text alone"):
        program_of("grpo", given, tmp_path / "run")


def test_other_engines_and_a_folder_without_a_processor_are_refused(model: VisionLanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--engine vllm is not fitted for images"):
        make_engine(model, "vllm")
    with pytest.raises(UsageError, match="two models write together"):
        NativeEngine(model, partner=Mixture(model, 0.5))
    model.save(tmp_path / "saved")
    (tmp_path / "saved" / "processor_config.json").unlink()
    with pytest.raises(UsageError, match="no image processor could be loaded"):
        LanguageModel.load(str(tmp_path / "saved"), device="cpu")


def test_a_run_keeps_the_hash_of_its_pictures(folder: Path, data: Path, tmp_path: Path) -> None:
    run = train(
        "sft",
        options(
            folder, write_jsonl(tmp_path / "s.jsonl", [{"prompt": "a", "completion": " b", "image": "0.png"}] * 3), out=str(tmp_path / "r")
        ),
    )
    assert len(Run.open(run.path).facts["rows data"]["sha256"]) == 64
