"""What the view recomputes of the decoder's attention equals the library's eager attention, for any queries."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from observed import Tiny, observe
from torch import Tensor

import lmms_prune.methods.view
from lmms_prune.compat.transformers import cache_of
from lmms_prune.methods.view import Tokens, TokenView


def rows_of(tiny: Tiny, seed: int) -> list:
    rng = random.Random(seed)
    return [tiny.row(rng, images=n, words=w) for n, w in ((1, 2), (2, 30), (0, 4), (1, 9))]


@pytest.mark.parametrize("layer", [1, 2, 4, 7])
@pytest.mark.parametrize("ahead", [False, True])
def test_rows_of_text_and_image_equal_eager(
    tiny: Tiny, capture_view: Callable[..., TokenView], layer: int, ahead: bool
) -> None:
    """In float32, of a padded batch with several images under SDPA: within 1e-5, grouped heads included.

    The library's eager attention is given the very states of the SDPA run: with random weights, whole runs with the two
    kernels drift apart by more than that.
    """
    inputs = tiny.batch(rows_of(tiny, layer), torch.float32)
    view = capture_view(tiny, inputs, layer, dtype=torch.float32)
    at = view._state if ahead else view._before
    assert at is not None
    module = tiny.model(torch.float32, "eager").model.language_model.layers[at.layer]
    real = inputs["attention_mask"].bool()
    allowed = real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -1e30)
    with torch.no_grad():
        normed = module.input_layernorm(at.hidden)
        eager = module.self_attn(normed, position_embeddings=at.rotary, attention_mask=mask)[1]
    sharp = 0.0
    for queries in (view.text, view.visual, view.last):
        attention = view.attention(queries, ahead=ahead)
        assert attention.isfinite().all()
        for image, row in enumerate(view.rows.tolist()):
            requested = queries.slots[image, queries.valid[image]]
            columns = view.visual.slots[image, : view.counts[image]]
            want = eager[row][:, requested][:, :, columns]
            got = attention[image][:, queries.valid[image]][:, :, : len(columns)]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
            sharp = max(sharp, float(want.max()))
    assert sharp > 0.05, "attention is sharp enough for 1e-5 to mean something"


def test_chunks_cover_all_queries(
    tiny: Tiny, capture_view: Callable[..., TokenView], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = capture_view(tiny, tiny.batch(rows_of(tiny, 1)), 2)
    whole = view.attention(view.visual)
    monkeypatch.setattr(
        lmms_prune.methods.view, "MOST", 7 * whole.shape[0] * whole.shape[1] * view._state.hidden.shape[1]
    )
    pieces = list(view.attention_chunks(view.visual))
    assert len(pieces) == -(-whole.shape[2] // 7)
    torch.testing.assert_close(torch.cat([attention for _, attention in pieces], dim=2), whole)


def test_keys_come_from_the_cache_where_there_is_one(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """Stored by the layer itself or computed again: the same keys, and so the same rows."""
    inputs = tiny.batch(rows_of(tiny, 2))
    cached = capture_view(tiny, {**inputs, "use_cache": True}, 3)
    assert cached._before is not None
    assert cached._before.keys is not None
    fresh = capture_view(tiny, {**inputs, "use_cache": False}, 3)
    assert fresh._before is not None
    assert fresh._before.keys is None
    torch.testing.assert_close(cached.keys(cached.visual), fresh.keys(fresh.visual))
    torch.testing.assert_close(cached.attention(cached.last), fresh.attention(fresh.last))


def test_embeddings_are_those_before_the_decoder(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """Of all original tokens, also after a stage has cut most of them; text keeps its own."""
    inputs = tiny.batch(rows_of(tiny, 3))
    seen = observe(tiny, inputs)
    view = capture_view(tiny, inputs, 4, before="random@1:0.5,")
    assert view.counts != view.sizes
    for image, span in enumerate(seen.spans):
        rows = seen.hidden[0][span.row, span.pad :]
        torch.testing.assert_close(view.visual_embeddings[image, : view.sizes[image]], rows[span.visual])
        torch.testing.assert_close(view.text_embeddings[image, view.text.valid[image]], rows[span.text])


def test_a_later_stage_reads_what_its_own_layer_is_given(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """The states that come to that layer and the keys of the one before, not those of the stage before it."""
    layer, came = 4, {}

    def note(module: object, args: tuple, kwargs: dict) -> None:
        came["hidden"] = args[0].clone()
        came["keys"] = cache_of(kwargs).layers[layer - 1].keys.clone()

    handle = tiny.model().model.language_model.layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    try:
        view = capture_view(tiny, tiny.batch(rows_of(tiny, 6)), layer, before="random@1:0.5,")
    finally:
        handle.remove()
    assert view.counts != view.sizes
    assert came["hidden"].shape[1] < view._origin.max(), "the stage before has cut"
    slots, rows = view.visual.slots, view.rows[:, None]
    assert torch.equal(view.hidden[view.valid], came["hidden"][rows, slots][view.valid])
    keys = came["keys"].transpose(1, 2).flatten(2)
    assert torch.equal(view.keys(view.visual)[view.valid], keys[rows, slots][view.valid])


def test_candidates_replace_the_tokens_present(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    """Offered what stands there already, the look-ahead row is the same; a subset is normalised over itself."""
    inputs = tiny.batch(rows_of(tiny, 4))
    view = capture_view(tiny, inputs, 3, before="random@1:0.5,")
    whole = view.attention(view.last, ahead=True)[:, :, 0]
    valid = view.valid[:, None].expand_as(whole)
    same = view.attention_to(view.hidden, view.index, view.valid)
    torch.testing.assert_close(same[valid], whole[valid])
    few = view.valid & (torch.arange(view.valid.shape[1]) % 2 == 0)
    some: Tensor = view.attention_to(view.hidden, view.index, few)
    gone = torch.where(view.valid & ~few, 1.0, 0.0)
    expected = whole / (1 - (whole * gone[:, None]).sum(-1, keepdim=True))
    marked = few[:, None].expand_as(whole)
    torch.testing.assert_close(some[marked], expected[marked])


def test_padding_queries_are_finite(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    view = capture_view(tiny, tiny.batch(rows_of(tiny, 5)), 2)
    padding = Tokens(torch.zeros_like(view.text.slots), torch.zeros_like(view.text.valid))
    assert view.attention(padding).isfinite().all()
