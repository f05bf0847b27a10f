"""generate_until on hand-made requests: where answers end, what is refused, and what a failing sample does."""

from __future__ import annotations

from functools import wraps

import pytest
import torch
from PIL import Image

SCHEDULE = "dart@2:0.44,random@5:0.07"
LONG = {"max_new_tokens": 10, "min_new_tokens": 10}


def _messages(doc):
    content = [{"type": doc.get("media", "image"), "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


def _picture(colour: str, size: tuple[int, int] = (140, 112)) -> Image.Image:
    image = Image.new("RGB", size, "white")
    image.paste(colour, (20, 30, 70, 80))
    return image


def _doc(text: str, *colours: str) -> dict:
    return {"text": text, "images": [_picture(colour) for colour in colours]}


def _requests(model, docs, options=None):
    from lmms_eval.api.instance import Instance

    model.task_dict["made"] = {"test": docs}
    return [
        Instance(
            request_type="generate_until",
            arguments=(doc["text"], _messages, dict(options or {}), number, "made", "test"),
            idx=0,
            metadata={"task": "made", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(docs)
    ]


def _answer(model, docs, options=None):
    return model.generate_until(_requests(model, docs, options))


def _plain(results) -> list[tuple]:
    return [(result.text, result.token_counts.to_dict()) for result in results]


@pytest.fixture
def given(monkeypatch):
    """The options of every generate()."""
    from transformers import GenerationMixin

    original, seen = GenerationMixin.generate, []

    @wraps(GenerationMixin.generate)
    def spy(self, **kwargs):
        seen.append(kwargs)
        return original(self, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return seen


DOCS = [_doc("Is there a circle?", "red"), _doc("Which colour has the square in this picture?", "blue")]


@pytest.mark.parametrize("as_list", [True, False])
def test_until_ends_an_answer(as_list, harness, family):
    model = harness.create(family, schedule=SCHEDULE)
    full = _answer(model, DOCS[:1], LONG)[0]
    stop = full.text[len(full.text) // 2 :][:2]
    place = full.text.index(stop)
    assert place > 0
    ended = _answer(model, DOCS[:1], {**LONG, "until": [stop] if as_list else stop})[0]
    assert ended.text == full.text[:place]
    assert ended.token_counts.output_tokens < full.token_counts.output_tokens == 10


def test_the_first_of_several_stops_counts(harness):
    model = harness.create("llava")
    full = _answer(model, DOCS[:1], LONG)[0].text
    late, early = full[-2:], full[3:5]
    ended = _answer(model, DOCS[:1], {**LONG, "until": [late, early]})[0].text
    assert ended == full[: min(full.index(late), full.index(early))]


def test_the_harness_filler_stop_is_not_applied(harness, given):
    model = harness.create("llava")
    full, filled = (_answer(model, DOCS, {**LONG, **until})[0].text for until in ({}, {"until": ["\n\n"]}))
    assert filled == full
    assert all("stop_strings" not in options for options in given)


@pytest.mark.parametrize(("options", "length"), [({}, 128), ({"max_new_tokens": 7}, 7)])
def test_length(options, length, harness, family, given):
    _answer(harness.create(family), DOCS[:1], options)
    assert [options["max_new_tokens"] for options in given] == [length]
    assert not given[0]["do_sample"]


def test_control_characters_are_removed(harness, family, monkeypatch):
    model = harness.create(family)
    monkeypatch.setattr(model.processor.tokenizer, "decode", lambda *args, **kwargs: "a\x00b\x0b\x1fc\n\t是\x08")
    assert _answer(model, DOCS[:1])[0].text == "abc\n\t是"


def test_sampling_follows_torchs_seed(harness, family, given):
    model = harness.create(family, schedule=SCHEDULE)

    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return [result.text for result in _answer(model, DOCS, {**LONG, "temperature": 3.0, "top_p": 0.95})]

    first, again, other = sample(0), sample(0), sample(1)
    assert first == again != other
    assert given[0]["do_sample"]
    assert (given[0]["temperature"], given[0]["top_p"]) == (3.0, 0.95)


def test_answers_come_in_the_order_of_the_requests(harness):
    model = harness.create("llava", batch_size=2)
    docs = [_doc("Say " + "word " * length, "red") for length in (1, 5, 3, 4, 2)]
    together = _plain(_answer(model, docs))
    alone = [_plain(_answer(model, [doc]))[0] for doc in docs]
    assert together == alone
    assert len({counts["input_tokens"] for _, counts in together}) == 5


@pytest.mark.parametrize("schedule", ["none", SCHEDULE, "divprune@0:30t,vtw@6"])
def test_rows_with_no_one_and_several_images_share_a_batch(schedule, harness, family):
    docs = [
        _doc("Is there a circle?", "red"),
        _doc("Two plus two?"),
        _doc("Which of both is larger?", "blue", "green"),
        _doc("Say no.", "black"),
        _doc("Name a colour, please, any."),
    ]
    mixed = harness.create(family, schedule=schedule, batch_size=8)
    single = harness.create(family, schedule=schedule)
    # The random draws are seeded by the document's place in its task, so each request keeps its own.
    requests = _requests(single, docs, LONG)
    alone = [_plain(single.generate_until([request]))[0] for request in requests]
    together = _plain(_answer(mixed, docs, LONG))
    assert together == alone
    visual = [counts["visual_tokens"] for _, counts in together]
    assert visual == [visual[0] * images for images in (1, 0, 2, 1, 0)]
    assert visual[0] > 0
    if schedule == SCHEDULE:
        assert together[2][1]["kept_visual_tokens"] == [2 * n for n in together[0][1]["kept_visual_tokens"]]
    assert all(counts["avg_visual_tokens"] == 0 for _, counts in (together[1], together[4]))


def test_a_ratio_holds_for_each_of_several_images(harness, family):
    model = harness.create(family, schedule="divprune@0:0.2")
    one, two = (_answer(model, [_doc("Compare.", *colours)], LONG)[0] for colours in (("red",), ("red", "blue")))
    [kept_one], [kept_two] = one.token_counts.kept_visual_tokens, two.token_counts.kept_visual_tokens
    assert kept_two == 2 * kept_one
    assert two.token_counts.visual_tokens == 2 * one.token_counts.visual_tokens


def test_requests_with_different_options_do_not_share_a_batch(harness, given):
    model = harness.create("llava", batch_size=8)
    requests = _requests(model, DOCS, LONG)
    requests += _requests(model, DOCS, {**LONG, "max_new_tokens": 11})
    results = model.generate_until(requests)
    assert sorted(options["max_new_tokens"] for options in given) == [10, 11]
    assert [result.token_counts.output_tokens >= 10 for result in results] == [True] * 4


def test_a_failing_sample_is_named(harness, family):
    from lmms_prune.harness.pruned import SampleError

    model = harness.create(family, schedule=SCHEDULE)
    docs = [*DOCS, {"text": "Broken?", "images": [object()]}]
    with pytest.raises(SampleError, match="task 'made', document 2"):
        _answer(model, docs)
    # Nothing of the failure stays in the model.
    assert len(_answer(model, DOCS)) == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_one_failing_sample_of_a_batch_is_named(batch_size, harness, family):
    """The processors raise StopIteration when a question holds an image placeholder of its own."""
    from lmms_prune.harness.pruned import SampleError

    model = harness.create(family, schedule=SCHEDULE, batch_size=batch_size)
    placeholder = {"llava": "<image>", "qwen2_5_vl": "<|image_pad|>"}[family]
    docs = [*DOCS, _doc(f"What is {placeholder}?", "red")]
    with pytest.raises(SampleError, match=r"^task 'made', document 2: \w+"):
        _answer(model, docs)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("beams", [1, 2])
def test_an_unpruned_run_may_have_beams_and_no_cache(beams, use_cache, harness, family):
    model = harness.create(family, use_cache=use_cache, batch_size=2)
    docs = [*DOCS, {"text": "No picture here?", "images": []}]
    results = _answer(model, docs, {**LONG, "num_beams": beams})
    counts = [result.token_counts for result in results]
    assert [count.avg_visual_tokens for count in counts] == [count.visual_tokens for count in counts]
    assert counts[0].visual_tokens > 0
    assert counts[2].visual_tokens == 0


@pytest.mark.parametrize(
    ("options", "sampled"),
    [
        ({}, False),
        ({"temperature": 0}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"do_sample": True}, True),
        ({"do_sample": True, "top_p": 0.9}, True),
        ({"temperature": "0.0"}, False),
        ({"temperature": 0.7, "do_sample": "False"}, False),
        ({"do_sample": None}, False),
    ],
    ids=str,
)
def test_when_answers_are_sampled(options, sampled, harness, given):
    _answer(harness.create("llava"), DOCS[:1], {**options, "max_new_tokens": 2})
    assert given[0]["do_sample"] is sampled


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0}, "contradicts temperature=0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be a whole number of at least 1"),
        ({"max_new_tokens": "abc"}, "max_new_tokens=abc must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 must be a whole number"),
        ({"temperature": -1}, "temperature=-1 must be a number of at least 0"),
        ({"temperature": "hot"}, "temperature=hot must be a number"),
        ({"max_new_tokens": float("inf")}, "max_new_tokens=inf must be a whole number"),
        ({"do_sample": "maybe"}, "do_sample=maybe must be true or false"),
        ({"until": 5}, "until=5 must be a text or a list of texts"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_generated(options, message, harness, given):
    from lmms_prune.harness.arguments import ArgumentError

    model = harness.create("llava")
    with pytest.raises(ArgumentError, match=message):
        model.generate_until([*_requests(model, DOCS), *_requests(model, DOCS, options)])
    assert not given


def test_an_error_inside_the_model_is_not_an_empty_answer(harness, monkeypatch):
    from transformers import GenerationMixin

    from lmms_prune.harness.pruned import SampleError

    @wraps(GenerationMixin.generate)
    def fail(self, **kwargs):
        raise RuntimeError("out of memory, say")

    model = harness.create("llava", schedule=SCHEDULE, batch_size=2)
    monkeypatch.setattr(GenerationMixin, "generate", fail)
    with pytest.raises(SampleError, match=r"document 0.*document 1|document 1.*document 0") as error:
        _answer(model, DOCS)
    assert "out of memory, say" in str(error.value)


@pytest.mark.parametrize("media", ["video", "audio"])
def test_other_media_are_refused(media, harness, family):
    from lmms_prune.harness.pruned import SampleError

    model = harness.create(family)
    with pytest.raises(SampleError, match=f"document 0.*{media}.*only images and text"):
        _answer(model, [{"text": "What happens?", "images": ["clip.mp4"], "media": media}])


def test_likelihoods_are_refused(harness):
    model = harness.create("llava")
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.generate_until_multi_round([])


@pytest.mark.slow
def test_a_process_with_a_corrupt_image_writes_no_results(harness, tmp_path):
    import datasets

    folder, file = harness.copied_mirror("lmms-lab-encoder/textvqa", "validation-*.parquet")
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache")).cast_column(
        "image", datasets.Image(decode=False)
    )

    def corrupt(row, number):
        return {"image": {"bytes": b"no image", "path": None}} if number == 2 else {"image": row["image"]}

    rows = rows.map(corrupt, with_indices=True, features=rows.features)
    rows.cast_column("image", datasets.Image()).to_parquet(file)
    text = harness.text("llava", schedule=SCHEDULE)
    run = harness.fork("--model", "llava_pruned", "--model_args", text, "--tasks", "textvqa_val", cwd=folder)
    assert run.results is None
    assert run.samples == {}
    assert "task 'textvqa_val', document 2" in run.stdout + run.stderr
