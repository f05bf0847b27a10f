"""Odd documents and broken data: each is answered as it is, or ends the run with its name; never a wrong number."""

from __future__ import annotations

import io
import os
import shutil

import pytest
from PIL import Image, ImageFile
from test_generation import LONG, _answer, _doc, _picture, _plain, _requests

from lmms_prune.harness.arguments import ArgumentError

SCHEDULE = "dart@2:0.44,random@5:0.07"
SHORT = {"max_new_tokens": 2}
# Down to the least that Qwen's own reader of images gives, four visual tokens.
SIZES = {"llava": {}, "qwen2_5_vl": {"min_pixels": 28 * 28}}


def _shown(image: Image.Image) -> dict:
    return {"text": "What is it?", "images": [image]}


# The document, with the visual tokens that LLaVA (64 an image) and Qwen2.5-VL (one for 28 x 28 pixels) have of it.
ANSWERED = {
    "1 pixel": (_shown(_picture("red", (1, 1))), 64, 4),
    "a line of pixels": (_shown(_picture("red", (1, 150))), 64, 5),
    "20,000 pixels wide": (_shown(_picture("red", (20_000, 150))), 64, 1620),
    "grey": (_shown(_picture("red").convert("L")), 64, 20),
    "transparent": (_shown(_picture("red").convert("RGBA")), 64, 20),
    "of a palette": (_shown(_picture("red").convert("P")), 64, 20),
    "8 images": (_doc("Which?", *["red", "blue"] * 4), 512, 160),
    "no image": (_doc("Two plus two?"), 0, 0),
    "an empty question": (_doc("", "red"), 64, 20),
    "nothing": (_doc(""), 0, 0),
    "other alphabets": (_doc("是 \U0001f600 \u0000 é", "red"), 64, 20),
}


def _unpadded(results) -> list[tuple]:
    """Answers and token accounting, without what a method computes on the padding of a batch."""
    return [
        (text, {name: one for name, one in counts.items() if name != "selection_flops"})
        for text, counts in _plain(results)
    ]


def test_odd_documents_are_answered_as_they_are(harness, family):
    """Alone and with all the others in one batch, with the accounting of what they hold."""
    docs = [doc for doc, _, _ in ANSWERED.values()]
    together = harness.create(family, schedule=SCHEDULE, batch_size=len(docs), **SIZES[family])
    alone = harness.create(family, schedule=SCHEDULE, **SIZES[family])
    answers = _unpadded(_answer(together, docs, SHORT))
    requests = _requests(alone, docs, SHORT)
    for (name, expected), (text, counts), request in zip(ANSWERED.items(), answers, requests, strict=True):
        assert counts["visual_tokens"] == expected[1 if family == "llava" else 2], name
        assert counts["input_tokens"] == counts["text_tokens"] + counts["visual_tokens"], name
        assert [(text, counts)] == _unpadded(alone.generate_until([request])), name
    assert together.batch_sizes["run"]["beyond_positions"] == 0


@pytest.mark.parametrize(("schedule", "kept"), [("divprune@1:0.5", [0]), ("divprune@1:1t,random@5:0.6", [1, 1])])
def test_of_one_visual_token_all_or_nothing_is_kept(schedule, kept, harness):
    """The wrapper never gives less than four to Qwen; who calls the library may."""
    from lmms_prune import prune

    model = harness.create("qwen2_5_vl", **SIZES["qwen2_5_vl"])
    text = model._prompts([[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]])
    inputs = model.processor(text=text, images=[_picture("red", (28, 28))], return_tensors="pt")
    with prune(model.model, schedule) as trace:
        model.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert [[sum(images) for images in row.kept] for row in trace.rows] == [kept]
    assert trace.rows[0].visual_tokens == 1


def _cut_jpeg() -> Image.Image:
    stream = io.BytesIO()
    _picture("red", (400, 400)).save(stream, "jpeg")
    return Image.open(io.BytesIO(stream.getvalue()[:-400]))


def _damaged_png() -> Image.Image:
    """One byte of its pixels is another, so that a checksum is wrong."""
    stream = io.BytesIO()
    _picture("red", (400, 400)).save(stream, "png")
    whole = bytearray(stream.getvalue())
    whole[whole.index(b"IDAT") + 40] ^= 255
    return Image.open(io.BytesIO(bytes(whole)))


REFUSED = {
    "no pixels": ({"text": "?", "images": [Image.new("RGB", (0, 5))]}, "an image of 0 x 5 pixels"),
    "half a character": (_doc("a \ud83d b", "red"), "TypeError|utf-8|surrogates"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("journal", [False, True])
def test_what_cannot_be_answered_is_named(name, journal, harness, family, tmp_path):
    from lmms_prune.harness.pruned import SampleError

    doc, said = REFUSED[name]
    docs = [_doc("Is there a circle?", "red"), doc]
    kept = {"journal": str(tmp_path)} if journal else {}
    with pytest.raises(SampleError, match=rf"^task 'made', document 1: .*({said})"):
        _answer(harness.create(family, schedule=SCHEDULE, batch_size=2, **kept), docs, SHORT)


@pytest.mark.parametrize("tolerant", [True, False])
@pytest.mark.parametrize(("broken", "why"), [(_cut_jpeg, "truncated"), (_damaged_png, "broken PNG|broken data stream")])
def test_an_image_that_is_cut_short_is_counted_or_refused(broken, why, tolerant, harness, monkeypatch):
    """lmms-eval lets Pillow fill it with grey, for every model; the results say how often."""
    from lmms_prune.harness.pruned import SampleError

    said = []
    monkeypatch.setattr("lmms_prune.harness.pruned.logger.warning", lambda text, *args: said.append(text.format(*args)))
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    model = harness.create("llava", schedule=SCHEDULE)
    docs = [_doc("Is there a circle?", "red"), _shown(broken())]
    if not tolerant:
        with pytest.raises(SampleError, match=rf"^task 'made', document 1: .*({why})"):
            _answer(model, docs, SHORT)
        return
    assert len(_answer(model, docs, SHORT)) == 2
    assert model.batch_sizes["run"]["cut_images"] == 1
    assert ["task 'made', document 1" in text and "cut short" in text for text in said] == [True]
    assert ImageFile.LOAD_TRUNCATED_IMAGES
    _answer(model, docs[:1], SHORT)
    assert model.batch_sizes["run"]["cut_images"] == 0


def test_a_strip_that_qwen_does_not_take_is_named(harness):
    from lmms_prune.harness.pruned import SampleError

    with pytest.raises(SampleError, match=r"^task 'made', document 0: .*aspect ratio must be smaller than 200"):
        _answer(harness.create("qwen2_5_vl"), [_shown(_picture("red", (20_000, 10)))], SHORT)


def test_a_question_longer_than_the_models_positions_is_counted(harness, monkeypatch):
    """lmms-eval's own wrappers answer it; so do these, but the results say so."""
    said = []
    monkeypatch.setattr("lmms_prune.harness.pruned.logger.warning", lambda text, *args: said.append(text.format(*args)))
    model = harness.create("llava", schedule=SCHEDULE)
    most = model.model.config.text_config.max_position_embeddings
    docs = [_doc("Is there a circle?", "red"), _doc("Tell me more. " * (most // 8), "red")]
    short, long = _plain(_answer(model, docs, SHORT))
    assert long[1]["input_tokens"] > most > short[1]["input_tokens"]
    assert long[1]["kept_visual_tokens"] == short[1]["kept_visual_tokens"]
    assert model.batch_sizes["run"]["beyond_positions"] == 1
    assert ["1 samples are longer" in text and "task 'made', document 1" in text for text in said] == [True]


def test_an_answer_longer_than_the_limit_is_cut_there(harness, family):
    model = harness.create(family, schedule=SCHEDULE)
    docs = [_doc("Is there a circle?", "red")]
    [(whole, _)], [(cut, counts)] = (
        _plain(_answer(model, docs, {**LONG, **given})) for given in ({}, {"max_new_tokens": 3, "min_new_tokens": 3})
    )
    assert counts["output_tokens"] == 3
    assert whole.startswith(cut)
    assert whole != cut


def test_a_head_beside_the_model_may_be_left_over(harness, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(harness.checkpoints["llava"], tmp_path / "made")
    weights = load_file(tmp_path / "made" / "model.safetensors")
    save_file(
        {**weights, "value_head.weight": torch.zeros(2)}, tmp_path / "made" / "model.safetensors", {"format": "pt"}
    )
    docs = [_doc("Is there a circle?", "red")]
    models = (
        harness.create("llava", {"pretrained": str(path)}) for path in (tmp_path / "made", harness.checkpoints["llava"])
    )
    left, right = (_plain(_answer(model, docs, SHORT)) for model in models)
    assert left == right


@pytest.mark.slow
def test_a_truncated_parquet_of_a_task_ends_the_run(harness):
    folder, file = harness.copied_mirror("lmms-lab-encoder/POPE", "*.parquet")
    os.truncate(file, file.stat().st_size // 2)
    line = ("--model", "llava_pruned", "--model_args", harness.text("llava", schedule=SCHEDULE), "--tasks", "pope")
    run = harness.fork(*line, cwd=folder)
    assert run.results is None
    assert run.samples == {}
    assert file.name in run.stdout + run.stderr


def test_a_run_in_which_no_image_was_pruned_is_an_error(harness, family):
    """A count above every image's tokens: known before loading in LLaVA, in Qwen2.5-VL once all have been seen."""
    model = harness.create(family, schedule="dart@2:640t")
    with pytest.raises(
        ArgumentError, match=r"schedule=dart@2:640t pruned nothing: in all 2 samples .* was kept \(\d+ on"
    ):
        _answer(model, [_doc("Is there a circle?", "red"), _doc("Is there a square?", "blue")], SHORT)


def test_stages_without_an_effect_are_told_before_loading(harness, monkeypatch):
    said = []
    monkeypatch.setattr("lmms_prune.harness.pruned.logger.warning", lambda text, *args: said.append(text.format(*args)))
    harness.create("llava", schedule="random@2:640t,random@5:0.1")
    assert said == ["stage 'random@2:640t' prunes nothing from an image: all 64 visual tokens are kept."]


def test_samples_that_lost_no_token_are_counted(harness):
    """An image smaller than a count is no error; the run says how many there were."""
    model = harness.create("qwen2_5_vl", schedule="random@2:30t", min_pixels=3136, max_pixels=200704)
    docs = [_shown(_picture("red", (56, 56))), _shown(_picture("red", (224, 224)))]
    small, large = _plain(_answer(model, docs, SHORT))
    assert (small[1]["visual_tokens"], large[1]["visual_tokens"]) == (4, 64)
    assert model.batch_sizes["run"]["unpruned_samples"] == 1


@pytest.mark.parametrize("schedule", ["none", "random@1:1.0"])
def test_a_control_that_keeps_all_is_no_error(schedule, harness, family):
    model = harness.create(family, schedule=schedule)
    assert len(_answer(model, [_doc("Is there a circle?", "red")], SHORT)) == 1
