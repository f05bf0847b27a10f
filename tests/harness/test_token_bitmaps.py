"""The samples say which visual tokens survived each stage: those of the trace, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lmms_prune import prune
from lmms_prune.harness.prompts import question_text
from lmms_prune.models import FAMILIES
from lmms_prune.record.bitmaps import decode, encode

# Cutting, merging (a token stands where it was merged into), pooling (at the middle of its cell), and nothing left.
SCHEDULES = ("dart@2:0.44,random@5:0.07", "tome@2:0.5,fastv@4:0.2", "pool@3:0.3", "random@1:0.5,vtw@6", "none")
SIZES = (((140, 112),), (), ((112, 56), (168, 140)), ((56, 56),))


@given(st.integers(1, 9), st.integers(1, 40), st.randoms())
def test_a_bitmap_is_read_back(rows: int, columns: int, chance) -> None:
    mask = np.array([chance.random() < 0.3 for _ in range(rows * columns)]).reshape(rows, columns)
    assert (decode(encode(mask), (rows, columns)) == mask).all()


def test_the_encoding_is_the_documented_one() -> None:
    assert encode(np.array([[True, False, False], [False, False, True]])) == "hA=="  # 100001 and two zeros: 0x84
    assert len(encode(np.ones((24, 24), bool))) == 96


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family: what is tested here is its own doing."""
    return request.param


@pytest.mark.parametrize(("text", "message"), [("hA==", "1 bytes"), ("!", "not base64"), ("", "0 bytes")])
def test_what_is_no_bitmap_of_the_grid_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(text, (4, 4))


def _documents() -> list[dict]:
    def picture(number: int, size: tuple[int, int]) -> Image.Image:
        image = Image.new("RGB", size, "white")
        image.paste(("red", "green", "blue", "navy")[number], (8 * number, 8, 30 + 8 * number, 40))
        return image

    return [
        {"text": "how many shapes? " * (number + 1), "images": [picture(number, size) for size in sizes]}
        for number, sizes in enumerate(SIZES)
    ]


def _messages(doc: dict) -> list[dict]:
    content = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*content, {"type": "text", "text": doc["text"]}]}]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_token_bitmaps_are_those_of_each_rows_own_trace(schedule: str, harness, family: str) -> None:
    """A ragged batch with no, one and several images, beside every row by itself."""
    from lmms_eval.api.instance import Instance

    model, documents = harness.create(family, schedule=schedule, batch_size=8), _documents()
    model.task_dict["made"] = {"test": documents}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=(doc["text"], _messages, {"max_new_tokens": 2}, number, "made", "test"),
            idx=0,
            metadata={"task": "made", "doc_id": number, "repeats": 1},
        )
        for number, doc in enumerate(documents)
    ]
    answers = model.generate_until(requests)
    for number, (doc, answer) in enumerate(zip(documents, answers, strict=True)):
        said = answer.token_counts.to_dict()
        chat = _messages(doc)
        asked = [question_text(model.chat(chat))]
        inputs = model.inputs_of(chat)
        with (
            torch.no_grad(),
            prune(model.model, schedule, samples=[f"made/test/{number}"], questions=asked) as trace,
        ):
            model.model(**inputs)
        (row,) = trace.rows
        grids = [tuple(grid) for grid in said["visual_grids"]]
        # LLaVA-NeXT: two grids of an image, its base and its canvas; newline tokens are in none.
        boxes = said["grid_boxes"] or [[number] for number in range(len(grids))]
        sizes = [0] * len(row.images)
        for (image, *_), (rows, columns) in zip(boxes, grids, strict=True):
            sizes[image] += rows * columns
        assert sizes == row.images
        assert bool(said["grid_boxes"]) == bool(grids and family == "llava_next")
        if family.startswith("qwen") and len(grids) == 2:
            assert grids[0] != grids[1]
        assert len(said["token_bitmaps"]) == len(model.arguments.schedule.stages)
        for stage, texts in enumerate(said["token_bitmaps"]):
            masks = [decode(text, grid) for text, grid in zip(texts, grids, strict=True)]
            flat = [np.concatenate([m.ravel() for m, (i, *_) in zip(masks, boxes, strict=True) if i == image])
                    for image in range(len(row.images))]  # fmt: skip
            assert [np.flatnonzero(mask).tolist() for mask in flat] == row.indices(stage)
            newlines = sum(n for n, mask in zip(row.newlines, flat, strict=False) if mask.any())
            assert sum(int(mask.sum()) for mask in flat) + newlines == said["kept_visual_tokens"][stage]
