"""Batches: their order, the preparing ahead, and the size that is found by itself."""

from __future__ import annotations

import threading
from functools import wraps

import pytest
import torch
from test_generation import LONG, _answer, _doc, _plain

SCHEDULE = "dart@2:0.44,random@5:0.07"
DOCS = [_doc("Say " + "word " * length, "red", *["blue"] * (length % 2)) for length in (1, 5, 3, 4, 2, 6, 2)]


def sizes(rows: int, fixed: bool = False):
    from lmms_prune.harness.memory import BatchSize

    return BatchSize(rows, fixed)


def test_groups_come_batch_by_batch():
    from lmms_prune.harness.batching import PreparedBatches

    seen = list(PreparedBatches([[3, 1, 2], [], [0, 4]], sizes(2), lambda places: [10 * place for place in places]))
    assert seen == [([3, 1], [30, 10]), ([2], [20]), ([0, 4], [0, 40])]


def test_the_next_batch_is_prepared_in_another_thread_meanwhile():
    from lmms_prune.harness.batching import PreparedBatches

    begun = {place: threading.Event() for place in range(3)}

    def prepare(places):
        begun[places[0]].set()
        return threading.current_thread().name

    for places, thread in PreparedBatches([[0, 1, 2]], sizes(1), prepare):
        assert thread.startswith("prepare")
        if places[0] < 2:
            # While this one is in hand, the next must begin by itself.
            assert begun[places[0] + 1].wait(timeout=30)


def test_what_is_put_back_comes_next_and_nothing_is_lost():
    from lmms_prune.harness.batching import PreparedBatches

    size, seen = sizes(4), []
    batches = PreparedBatches([[*range(10)]], size, list)
    for places, _ in batches:
        if len(places) > 2:
            size.halve(len(places))
            batches.put_back(places)
            continue
        seen.append(places)
    assert [place for places in seen for place in places] == [*range(10)]
    assert max(map(len, seen)) == 2


def test_an_error_is_raised_where_its_batch_is_due():
    from lmms_prune.harness.batching import PreparedBatches

    def prepare(places):
        if 2 in places:
            raise ValueError("two")
        return places

    seen = []
    with pytest.raises(ValueError, match="two"):
        seen += [places for places, _ in iter(PreparedBatches([[0], [1], [2], [3]], sizes(1), prepare))]
    batches = iter(PreparedBatches([[0], [1], [2], [3]], sizes(1), prepare))
    assert [next(batches)[0], next(batches)[0]] == [[0], [1]]


@pytest.mark.parametrize(
    ("rows", "before", "peak", "expected"),
    [
        (4, 10, 20, 8),  # little of it: at most twice as many
        (4, 10, 60, 5),  # 12.5 a row: 70 / 12.5
        (4, 10, 90, 3),
        (4, 10, 10, 4),  # nothing is known
        (1, 70, 100, 1),
    ],
)
def test_the_size_follows_the_memory(rows, before, peak, expected):
    size = sizes(rows)
    size.grow(rows, [(before, peak, 100)])
    assert size.rows == expected
    fixed = sizes(rows, fixed=True)
    fixed.grow(rows, [(before, peak, 100)])
    assert fixed.rows == rows


def test_the_fullest_of_several_devices_decides():
    """Of 100 bytes 80 may be filled: 10 rows more fit into the first, 5 into the second; the third was not used."""
    size = sizes(8)
    size.grow(8, [(0, 64, 100), (60, 92, 100), (40, 40, 100)])
    assert size.rows == 5


def test_the_size_never_grows_again_over_what_did_not_fit():
    size = sizes(8)
    size.halve(8)
    size.grow(4, [(0, 1, 1000)])
    assert size.rows == 4


@pytest.fixture
def small_memory(monkeypatch):
    """generate() fails with more than two rows, as on a GPU that is too small."""
    from transformers import GenerationMixin

    original, seen = GenerationMixin.generate, []

    @wraps(GenerationMixin.generate)
    def scarce(self, **kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", scarce)
    return seen


@pytest.mark.parametrize("schedule", ["none", SCHEDULE])
def test_batch_size_auto_goes_on_with_half(schedule, harness, family, small_memory):
    """After out-of-memory the same samples come in smaller batches: all answers, each as it is alone."""
    auto = harness.create(family, schedule=schedule, batch_size="auto")
    answered = _plain(_answer(auto, DOCS, LONG))
    assert small_memory[:2] == [7, 3]
    assert sum(rows for rows in small_memory if rows <= 2) == len(DOCS)
    assert auto.batch_sizes["run"]["largest_batch"] in (1, 2)
    single = harness.create(family, schedule=schedule, batch_size=1)
    assert answered == _plain(_answer(single, DOCS, LONG))


def test_a_given_batch_size_that_does_not_fit_ends_the_run(harness, small_memory):
    from lmms_prune.harness.pruned import SampleError

    model = harness.create("llava", schedule=SCHEDULE, batch_size=4)
    with pytest.raises(SampleError, match=r"document 5; .*OutOfMemoryError"):
        _answer(model, DOCS, LONG)


def test_one_row_that_does_not_fit_ends_the_run(harness, monkeypatch):
    from transformers import GenerationMixin

    from lmms_prune.harness.pruned import SampleError

    @wraps(GenerationMixin.generate)
    def never(self, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GenerationMixin, "generate", never)
    model = harness.create("llava", batch_size="auto")
    with pytest.raises(SampleError, match="task 'made', document 5: OutOfMemoryError"):
        _answer(model, DOCS, LONG)


def test_only_the_last_position_gets_logits(harness, family):
    """Of the prompt, the output matrix sees one position a row, pruned or not."""
    for schedule in ("none", SCHEDULE):
        model = harness.create(family, schedule=schedule, batch_size=3)
        seen = []
        handle = model.model.lm_head.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].shape[:2])
        )
        _answer(model, DOCS[:3], {"max_new_tokens": 3, "min_new_tokens": 3})
        handle.remove()
        assert seen == [(3, 1)] * 3
