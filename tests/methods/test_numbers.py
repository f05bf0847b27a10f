"""What is not a number chooses nothing: a sample with a NaN or an infinity in what a stage reads is named."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from observed import Tiny
from test_contract import KEEPING, by_keeping_name, rows_in_turn, stage
from torch import Tensor, nn

from lmms_prune.errors import PruningError
from lmms_prune.methods import MethodSpec
from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView

NAMES = ["a", "b", "c"]
WRONG = [float("nan"), float("inf"), float("-inf")]


def three_rows(tiny: Tiny) -> tuple[list, dict[str, Tensor]]:
    """One image, two images, one image."""
    rng = random.Random(4)
    rows = [tiny.row(rng, images=n, words=4) for n in (1, 2, 1)]
    return rows, tiny.batch(rows)


@contextmanager
def spoilt(module: nn.Module, spoil: Callable[[Tensor], None]) -> Iterator[None]:
    """What `module` returns with `spoil` done to it, before any hook that comes later sees it."""

    def hook(module: nn.Module, args: tuple, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        states = states.clone()
        spoil(states)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def embedding_of(tiny: Tiny, inputs: dict[str, Tensor], row: int, value: float) -> Callable[[Any, tuple, dict], tuple]:
    """A pre-hook of the decoder that spoils one visual token of `row`."""
    column = (inputs["input_ids"][row] == tiny.model().config.image_token_id).nonzero()[5].item()

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        embeddings = kwargs["inputs_embeds"].clone()
        if embeddings.shape[1] > 1:  # a guide answers step by step
            embeddings[row, column, 3] = value
        return args, {**kwargs, "inputs_embeds": embeddings}

    return hook


@by_keeping_name
def test_a_non_finite_embedding_is_reported(tiny: Tiny, spec: MethodSpec) -> None:
    rows, inputs = three_rows(tiny)
    value = WRONG[KEEPING.index(spec) % len(WRONG)]
    hook = embedding_of(tiny, inputs, 1, value)
    handle = tiny.model().model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    message = rf"^sample b: in stage 1 \('{spec.name}@.*'\) the hidden states that enter it are not all finite"
    try:
        with pytest.raises(PruningError, match=message):
            tiny.run(inputs, stage(spec, 0), samples=NAMES, questions=rows_in_turn(rows))
    finally:
        handle.remove()


@by_keeping_name
def test_a_non_finite_encoder_feature_is_reported(tiny: Tiny, spec: MethodSpec) -> None:
    """From the first block on it spreads over its image; what reads no encoder finds it in the hidden states."""
    rows, inputs = three_rows(tiny)
    value = WRONG[KEEPING.index(spec) % len(WRONG)]

    def spoil(states: Tensor) -> None:
        if tiny.family == "llava":
            states[3:, 7, 2] = value  # a method may encode some images by themselves, too
        else:
            states[-1, 2] = value

    encoder = tiny.model().model
    block = encoder.visual.blocks[0] if tiny.family == "qwen2_5_vl" else encoder.vision_tower.encoder.layers[0]
    reads = {"encoder", "guide"} & set(spec.reads)
    what = "(encoder features that it reads|hidden states that enter it)" if reads else "hidden states that enter it"
    with (
        pytest.raises(PruningError, match=rf"^sample c: in stage 1 \('{spec.name}@.*'\) the {what} are not all finite"),
        spoilt(block, spoil),
    ):
        tiny.run(inputs, stage(spec, 0), samples=NAMES, questions=rows_in_turn(rows))


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "hiprune", "vispruner", "todre"])
def test_the_encoder_is_reported_before_its_consequences(tiny: Tiny, name: str) -> None:
    [spec] = [spec for spec in KEEPING if spec.name == name]
    rows, inputs = three_rows(tiny)
    encoder = tiny.model().model
    block = encoder.visual.blocks[0] if tiny.family == "qwen2_5_vl" else encoder.vision_tower.encoder.layers[0]
    with (
        pytest.raises(
            PruningError, match=r"^sample .*: in stage 1 .* the encoder features that it reads are not all finite"
        ),
        spoilt(block, lambda states: states.view(-1)[0].fill_(float("nan"))),
    ):
        tiny.run(inputs, stage(spec, 0), samples=NAMES, questions=rows_in_turn(rows))


class Broken(ScoreMethod):
    """Scores of which one, in the second image of row b, is no number; and so is the padding's."""

    paper = "https://arxiv.org"
    value = float("nan")

    def score(self, view: TokenView) -> Tensor:
        score = torch.where(view.valid, view.index.double(), self.value)
        score[view.images.index(("b", 1)), 3] = self.value
        return score


@pytest.mark.parametrize("value", WRONG)
def test_a_non_finite_score_is_reported(
    tiny: Tiny, register: Callable[..., None], monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    register(Broken)
    monkeypatch.setattr(Broken, "value", value)
    _, inputs = three_rows(tiny)
    message = r"^sample b: in stage 2 \('broken@3:0.2'\) the scores of broken are not all finite"
    with pytest.raises(PruningError, match=message):
        tiny.run(inputs, "random@1:0.9,broken@3:0.2", samples=NAMES)


@pytest.mark.parametrize("schedule", ["broken@1:1", "random@1:0.5,broken@3:0.5", "vtw@1"])
def test_where_nothing_is_chosen_nothing_is_refused(tiny: Tiny, register: Callable[..., None], schedule: str) -> None:
    """An image that keeps all its tokens, or none, is as it would be without pruning."""
    register(Broken)
    _, inputs = three_rows(tiny)
    if schedule == "vtw@1":
        handle = tiny.model().model.language_model.register_forward_pre_hook(
            embedding_of(tiny, inputs, 1, float("nan")), with_kwargs=True
        )
        try:
            trace, _ = tiny.run(inputs, schedule)
        finally:
            handle.remove()
    else:
        trace, _ = tiny.run(inputs, schedule)
    assert len(trace.rows) == 3


def test_an_image_that_keeps_all_is_not_checked_next_to_a_pruned_one(all_tiny: dict[str, Tiny]) -> None:
    """As when it is alone."""
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(2)
    rows = [([tiny.image(rng, (4, 4))], "is it red"), ([tiny.image(rng, (6, 6))], "is it blue")]
    inputs = tiny.batch(rows)
    hook = embedding_of(tiny, inputs, 0, float("nan"))
    handle = tiny.model().model.language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        trace, _ = tiny.run(inputs, "random@0:20t")
    finally:
        handle.remove()
    assert [row.kept for row in trace.rows] == [[[16]], [[20]]]
