"""Images with equal tokens: no method's choice depends on rounding, and so on the rest of the batch."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from observed import HandView, Tiny, chosen
from PIL import Image
from test_contract import KEEPING, OPTIONS, some_layers, stage
from torch import Tensor

from lmms_prune.certificate.contract import Tried
from lmms_prune.methods import MethodSpec
from lmms_prune.methods.base import Method
from lmms_prune.methods.dart import DART
from lmms_prune.methods.divprune import DivPrune
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.view import LayerInput, Tokens, TokenView
from lmms_prune.models.encoder import EncoderRun

KINDS = ("flat", "checkered", "repeated", "rank-deficient", "few directions")


def alike(kind: str, like: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens of the shape of `like` (N, D): all the same; two, or three, in turn; sums of two vectors; signed units."""
    count, width = like.shape

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "flat":
        tokens = noise(1, width).expand(count, -1)
    elif kind in ("checkered", "repeated"):
        different = 2 if kind == "checkered" else 3
        tokens = noise(different, width)[torch.arange(count) % different]
    elif kind == "rank-deficient":
        factors = torch.randint(-2, 3, (count, 2), generator=generator).double() + torch.tensor([3.0, 0.0])
        tokens = factors @ noise(2, width)
    else:
        tokens = (
            torch.eye(width, dtype=torch.float64)[torch.arange(count) % 4]
            * torch.tensor([2.0, -1.0])[torch.arange(count) // 4 % 2, None]
        )
    return tokens.to(like)


def spoken_for(view: TokenView, kind: str) -> TokenView:
    """The view of a batch of one-image rows with such features wherever a method may compare tokens.

    What enters the encoder's blocks stays: there tokens are told apart by their positions, in a flat image too.
    """
    generator = torch.Generator().manual_seed(5)

    def visual(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        for row, (slots, valid) in enumerate(zip(view.visual.slots, view.visual.valid, strict=True)):
            hidden[row, slots[valid]] = alike(kind, hidden[row, slots[valid]], generator)
        return hidden

    def patches(states: Tensor) -> Tensor:
        if states.dim() == 3:  # LLaVA: a class token first
            return torch.stack([torch.cat([x[:1], alike(kind, x[1:], generator)]) for x in states])
        tokens = [rows * columns for rows, columns in view._grid_list]
        parts = states.split([n * (len(states) // sum(tokens)) for n in tokens])
        return torch.cat([alike(kind, part, generator) for part in parts])

    run = view._encoder_run
    assert run is not None
    run = dataclasses.replace(
        run,
        outputs={block: patches(states) for block, states in run.outputs.items()},
        features=None if run.features is None else patches(run.features),
    )
    state = dataclasses.replace(view._state, hidden=visual(view._state.hidden))
    before = view._before and dataclasses.replace(view._before, hidden=visual(view._before.hidden), keys=None)
    return dataclasses.replace(
        view, _state=state, _before=before, _embedded=visual(view._embedded), _encoder_run=run, memory=Memory()
    )


def alone(view: TokenView, row: int) -> TokenView:
    """One row of a batch of one-image rows, the very same numbers."""
    pick = slice(row, row + 1)
    count = view.counts[row]

    def layer(at: LayerInput | None) -> LayerInput | None:
        return at and dataclasses.replace(at, hidden=at.hidden[pick], rotary=rotary(at.rotary))

    def rotary(tables: tuple[Tensor, Tensor] | None) -> Any:
        return tables and tuple(x[..., pick, :, :] if x.shape[-3] > 1 else x for x in tables)

    return dataclasses.replace(
        view,
        rows=torch.zeros(1, dtype=torch.long),
        visual=Tokens(view.visual.slots[pick, :count], view.visual.valid[pick, :count]),
        text=Tokens(view.text.slots[pick], view.text.valid[pick]),
        index=view.index[pick, :count],
        counts=view.counts[pick],
        sizes=view.sizes[pick],
        _owning_rows=[0],
        seeds=view.seeds[pick],
        images=view.images[pick],
        _state=layer(view._state),
        _before=layer(view._before),
        _embedded=view._embedded[pick],
        _unpruned_rotary=rotary(view._unpruned_rotary),
        _position_ids=None if view._position_ids is None else view._position_ids[..., pick, :],
        _present=view._present[pick],
        _origin=view._origin[pick],
        _columns=view._columns[pick, : view.sizes[row]],
        _grid_list=view._grid_list[pick],
        _questions=view._questions and view._questions[pick],
        requested=view.requested and view.requested[pick],
        _encoder_run=run_alone(view, row),
        memory=Memory(),
    )


def run_alone(view: TokenView, row: int) -> EncoderRun:
    run, tokens = view._encoder_run, [rows * columns for rows, columns in view._grid_list]
    assert run is not None
    first, last = sum(tokens[:row]), sum(tokens[: row + 1])

    def own(states: Tensor) -> Tensor:
        if run.grids is None:
            return states[row : row + 1]
        merged = len(states) // sum(tokens)
        return states[first * merged : last * merged]

    def block(states: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        if run.grids is None:
            return own(states), kwargs
        bounds = kwargs["cu_seqlens"]
        bounds = bounds[(bounds >= 4 * first) & (bounds <= 4 * last)] - 4 * first
        tables = tuple(own(table) for table in kwargs["position_embeddings"])
        return own(states), {**kwargs, "cu_seqlens": bounds, "position_embeddings": tables}

    return dataclasses.replace(
        run,
        pixels=own(run.pixels),
        grids=run.grids and run.grids[row : row + 1] if run.grids is None else run.grids[row : row + 1],
        inputs={number: block(*entry) for number, entry in run.inputs.items()},
        outputs={number: own(states) for number, states in run.outputs.items()},
        features=None if run.features is None else own(run.features),
    )


@pytest.fixture(scope="module")
def views() -> dict:
    return {}


@pytest.fixture
def view_of_three(tiny: Tiny, views: dict, capture_view: Callable[..., TokenView]) -> Callable[..., TokenView]:
    """A captured view of three one-image rows at a layer, in a dtype."""

    def of(layer: int, dtype: torch.dtype) -> TokenView:
        key = (tiny.family, layer, dtype)
        if key not in views:
            rng = random.Random(8)
            sizes = [(6, 6), (8, 8), (5, 7)]
            rows = [([tiny.image(rng, size)], "is there a red circle") for size in sizes]
            inputs = tiny.batch(rows, dtype)
            views[key] = capture_view(tiny, inputs, layer, dtype=dtype, questions=[q for _, q in rows])
        return views[key]

    return of


# A guide's answer is that of the batch in which the view was captured.
@pytest.mark.parametrize("spec", [s for s in KEEPING if "guide" not in s.reads], ids=lambda spec: spec.name)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_among_equal_tokens_the_batch_does_not_matter(
    tiny: Tiny, view_of_three: Callable[..., TokenView], spec: MethodSpec, kind: str, dtype: torch.dtype
) -> None:
    options = OPTIONS.get(spec.name, {})
    method = spec.build(options)
    for layer in some_layers(spec)[:2]:
        batch = spoken_for(view_of_three(layer, dtype), kind)
        budget = [Tried(spec, options).planned(3 * count // 7, count) for count in batch.counts]
        keep = method.select(batch, torch.tensor(budget))
        for row in range(3):
            single = method.select(alone(batch, row), torch.tensor(budget[row : row + 1]))
            assert keep[row].nonzero().flatten().tolist() == single[0].nonzero().flatten().tolist(), (
                f"layer {layer}, row {row}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", [DART(native_count=False), DivPrune()], ids=["dart", "divprune"])
def test_of_equal_tokens_the_first_are_kept(method: Method, rows: int, dtype: torch.dtype) -> None:
    """A hundred equal tokens of each image, of which fifty are kept: the first fifty."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(rows, 108, 512, generator=generator).to(dtype)
    hidden[:, 1:101] = hidden[:, 1:2]
    view = HandView(hidden, 100, keys=hidden)
    assert chosen(method.select(view, torch.tensor([50] * rows))) == [set(range(50))] * rows


@pytest.mark.parametrize("kind", ["flat", "tiled", "striped"])
@pytest.mark.parametrize("spec", [s for s in KEEPING if "guide" not in s.reads], ids=lambda spec: spec.name)
def test_real_images_that_are_flat_keep_the_same_tokens_in_any_batch(tiny: Tiny, spec: MethodSpec, kind: str) -> None:
    """Through the whole model, in float32."""
    rng = random.Random(1)
    rows, columns = (4, 4) if tiny.family == "llava" else (6, 8)
    pixels = {
        "flat": np.full((28 * rows, 28 * columns, 3), 127),
        "tiled": np.tile(np.random.default_rng(0).integers(0, 256, (28, 28, 3)), (rows, columns, 1)),
        "striped": np.repeat(np.arange(rows) % 2 * 255, 28)[:, None, None] * np.ones((1, 28 * columns, 3)),
    }[kind]
    flat = Image.fromarray(pixels.astype(np.uint8))
    several = [(["is it"], [tiny.image(rng)]), (["is it red"], [flat]), (["is it blue or green"], [tiny.image(rng)])]
    prompts = [(images, question) for [question], images in several]
    kept_by = []
    for chosen_rows in (prompts[1:2], prompts, prompts[1:]):
        inputs = tiny.batch(chosen_rows, torch.float32)
        if tiny.family == "llava":
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        names, questions = [question for _, question in chosen_rows], [question for _, question in chosen_rows]
        trace, _ = tiny.run(inputs, stage(spec, 0), dtype=torch.float32, samples=names, questions=questions)
        kept_by += [row.indices(0) for row in trace.rows if row.sample == "is it red"]
    assert kept_by[0] == kept_by[1] == kept_by[2]
