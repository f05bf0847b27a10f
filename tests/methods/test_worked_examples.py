"""The worked examples of six tokens in the docstrings of the five most complex methods, computed by the methods."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from encoders import CLIP, hand_view, tensor
from observed import HandView
from torch import Tensor

from lmms_prune.methods import holov, mustdrop, sparsevlm, swiftvlm, visionzip
from lmms_prune.methods.base import Method
from lmms_prune.methods.holov import HoloV
from lmms_prune.methods.mustdrop import MustDrop
from lmms_prune.methods.sparsevlm import SparseVLM
from lmms_prune.methods.swiftvlm import SwiftVLM
from lmms_prune.methods.visionzip import VisionZip


def run(method: Method, view: HandView, budget: int) -> tuple[Tensor, Tensor]:
    """The kept states and raster indices of a view's only image."""
    keep = method.select(view, torch.tensor([budget]))
    hidden, index = method.rewrite(view, keep)
    return hidden[keep], index[keep]


def as_written(index: Tensor) -> str:
    """The kept tokens as the docstrings write them."""
    return f"Kept: {' '.join(f'v{i}' for i in index.tolist())}."


def attended(rows: Tensor, rest: Tensor) -> dict[str, Tensor]:
    """Keys and queries with which each text token (a row) attends to six visual tokens by `rows`, to the system by `rest`.

    The attention to itself and to the text before it is negligible.
    """
    text = len(rows)
    shares = torch.cat([rest[:, None], rows, torch.full((text, text), 1e-30)], dim=1)
    queries = torch.zeros(1, 1, 7 + text, text, dtype=torch.float64)
    for number in range(text):
        queries[0, 0, 7 + number, number] = 1.0
    return {"keys": shares.log().T[None], "queries": queries}


def mustdrop_view() -> HandView:
    rows = tensor([[0.02, 0.30, 0.01, 0.01, 0.20, 0.03], [0.02, 0.20, 0.10, 0.02, 0.08, 0.01]])
    class_attention = tensor([[0.1, 0.2, 0.1, 0.4, 0.1, 0.1]])
    encoder = SimpleNamespace(shape=SimpleNamespace(depth=1, class_tokens=1), saliency=lambda block: class_attention)
    hidden = torch.zeros(1, 9, 2, dtype=torch.float64)
    return HandView(hidden, 6, encoder=encoder, layer=3, **attended(rows, 1 - rows.sum(1)))


def test_mustdrop() -> None:
    view = mustdrop_view()
    attention_sum, attention_max = mustdrop._text_attention(view)
    torch.testing.assert_close(attention_sum, tensor([[0.04, 0.50, 0.11, 0.03, 0.28, 0.04]]))
    torch.testing.assert_close(attention_max, tensor([[0.02, 0.30, 0.10, 0.02, 0.20, 0.03]]))
    method = MustDrop(theta_g=0.1, theta_i=0.1)
    text = mustdrop.__doc__ or ""
    for budget, expected in ((6, [1, 2, 3, 4]), (3, [1, 3, 4])):
        _, index = run(method, view, budget)
        assert index.tolist() == expected
        assert as_written(index) in text


def test_swiftvlm() -> None:
    states = tensor([[1, 0], [0, 2], [3, 3], [0, 4], [-2, 0], [2, -6]])
    hidden = torch.zeros(1, 9, 2, dtype=torch.float64)
    hidden[0, 1:7] = states
    shares = tensor([4, 6, 1, 5, 2, 3, 1, 1, 1])
    view = HandView(hidden, 6, keys=shares.log()[None, :, None], queries=torch.ones(1, 1, 1, 1), layer=3)
    first_states, first = run(SwiftVLM(), view, 3)
    assert as_written(first) == "Kept: v0 v2 v3."
    assert first_states.tolist() == [[1, 0], [3, 3], [0, 0]]
    later = HandView(torch.zeros(1, 6, 2, dtype=torch.float64), 3, queries=torch.eye(2)[None, None, 1:], layer=10)
    later._state.hidden[0, 1:4] = tensor([[1, 1], [4, 3], [10, 20]])
    later.index, later.sizes, later.memory = torch.tensor([[0, 2, 3]]), [6], view.memory
    later._origin, later._columns = torch.tensor([[0, 1, 3, 4, 7, 8]]), torch.arange(1, 7)[None]
    later._parts.keys = lambda layer, hidden, rotary: hidden[:, None].float()
    later._unpruned_rotary = (torch.zeros(1, 9, 2), torch.zeros(1, 9, 2))
    candidates, exists, *_ = swiftvlm._restored(later, later.remembered(swiftvlm._Bypass))  # type: ignore[arg-type]
    assert exists.all()
    assert candidates[0].tolist() == [[1, 1], [10, 22], [4, 3], [10, 24], [8, 20], [12, 14]]
    second_states, second = run(SwiftVLM(), later, 2)
    assert as_written(second) == "Kept: v2 v3."
    assert second_states.tolist() == [[7, 12], [10, 24]]
    for index in (first, second):
        assert as_written(index) in (swiftvlm.__doc__ or "")


def test_sparsevlm() -> None:
    embedded = tensor([[7, 7], *[[1, 0]] * 6, [math.log(3), 5], [0, 9]])[None]
    shares = tensor([[2, 6, 1, 5, 3, 4, 2, 1, 1], [1, 1, 9, 1, 1, 1, 9, 1, 1]])
    queries = torch.zeros(1, 1, 9, 2, dtype=torch.float64)
    queries[0, 0, 7, 0] = queries[0, 0, 8, 1] = 1.0
    hidden = torch.arange(18, dtype=torch.float64).reshape(1, 9, 2) ** 2
    view = HandView(hidden, 6, keys=shares.log().T[None], queries=queries, embedded=embedded)
    assert sparsevlm._raters(view).tolist() == [[True, False]]
    torch.testing.assert_close(SparseVLM()._score(view), tensor([[6, 1, 5, 3, 4, 2]]) / 24)
    states, index = run(SparseVLM(), view, 3)
    assert as_written(index) == "Kept: v0 v2 v3."
    torch.testing.assert_close(states[2], (view.hidden[0, 3] + view.hidden[0, 4]) / (2 + 1e-6))
    _, exact = run(SparseVLM(native_count=False), view, 3)
    assert as_written(exact) == "Kept: v0 v2 v4."
    for kept in (index, exact):
        assert as_written(kept) in (sparsevlm.__doc__ or "")


def test_visionzip() -> None:
    angle = tensor([0, 45, 10, 90, 80, 60]).deg2rad()
    view = hand_view(
        CLIP,
        grids=[(2, 3)],
        hidden=torch.zeros(1, 6, 1).double(),
        saliency=tensor([[0.1, 0.9, 0.2, 0.1, 0.3, 0.2]]),
        keys=torch.stack([angle.cos(), angle.sin()], dim=-1)[None],
        features=tensor([[[1], [2], [4], [8], [16], [32]]]),
        class_output=tensor([[0.5]]),
    )
    states, index = run(VisionZip(contextual=32), view, 4)
    assert index.tolist() == [2, 1, 0, 3]
    # The hand-made projector doubles the features.
    assert (states[:, 0] / 2).tolist() == [0.5, 2, 5, 32]
    text = visionzip.__doc__ or ""
    assert f"Raster indices: {' '.join(map(str, index.tolist()))}." in text
    assert "Features before the projector: class token, 2, 5, 32." in text


def test_holov() -> None:
    tokens = torch.zeros(1, 6, 3, dtype=torch.float64)
    tokens[0, :3, 0] = 1.0
    tokens[0, 3:] = torch.eye(3)
    attention = tensor([[0.25, 0.12, 0.08, 0.20, 0.07, 0.05]])
    view = hand_view(CLIP, grids=[(1, 6)], saliency=attention, hidden=tokens)
    crops = holov._lay_out(view, [2])
    unit = crops.put(holov._unit(view.hidden))
    torch.testing.assert_close(
        holov._variance(unit, crops.members()), tensor([[[0.5] * 3, [0] * 3]]), atol=1e-5, rtol=0
    )
    weight = holov._weights(crops, crops.put(attention), unit)
    torch.testing.assert_close(weight, tensor([[0.605, 0.395]]), atol=5e-4, rtol=0)
    _, index = run(HoloV(crops=2), view, 3)
    assert index.tolist() == [0, 1, 3]
    assert as_written(index) in (holov.__doc__ or "")
