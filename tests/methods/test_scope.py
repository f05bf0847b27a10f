"""SCOPE against a hand-computed case and a slow reference in plain Python, and its kernel against its reference."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
import slow
import torch
from encoders import CLIP, QWEN, deeper, half_even, hand_view, is_llava, tensor
from observed import HandView, Observed, Tiny, angles, assert_agree, chosen, image_count, kept
from torch import Tensor

from lmms_prune.methods import scope
from lmms_prune.methods.scope import SCOPE
from lmms_prune.methods.shared.greedy import plain, products, searches
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals


def reference(
    features: Sequence[Sequence[float]], saliency: Sequence[float], count: int, alpha: float = 1.0
) -> tuple[list[int], float]:
    """SCOPE of one image (https://arxiv.org/abs/2510.24214), in the order of the picks; and the smallest gap of two scores."""
    units = [slow.unit(x) for x in features]
    # Rounded, so that equal tokens tie.
    cosine = [[round(slow.dot(a, b), 8) for b in units] for a in units]
    covered, picks, margin = [0.0] * len(units), [], math.inf
    for _ in range(count):
        scores = {}
        for j in range(len(units)):
            if j not in picks:
                gain = math.fsum(max(0.0, cosine[i][j] - covered[i]) for i in range(len(units)))
                scores[j] = gain * saliency[j] ** alpha
        order = slow.best_first(scores)
        if len(order) > 1 and scores[order[0]] != scores[order[1]]:
            margin = min(margin, scores[order[0]] - scores[order[1]])
        picks.append(order[0])
        covered = [max(c, cosine[i][order[0]]) for i, c in enumerate(covered)]
    return picks, margin


def view_of(features: Tensor, saliency: Sequence[float], shape=CLIP) -> HandView:
    return hand_view(shape, grids=[(1, features.shape[1])], features=features, saliency=tensor([saliency]))


def picked(view: HandView, count: int, alpha: float = 1.0) -> set[int]:
    [found] = chosen(SCOPE(alpha=alpha).select(view, torch.tensor([count])))
    return found


@pytest.mark.parametrize("shape", [CLIP, QWEN])
def test_the_worked_example(shape) -> None:
    features = angles(0, 0, 60, 60, 90, 180, length=[1.0, 3.0, 0.5, 2.0, 1.0, 7.0])
    saliency = [0.1, 0.2, 0.1, 0.15, 0.1, 0.1]
    view = view_of(features, saliency, shape)
    text = scope.__doc__ or ""
    assert reference(features[0].tolist(), saliency, 3)[0] == [1, 3, 5]
    assert f"Kept: {' '.join(f'v{i}' for i in sorted(picked(view, 3)))}." in text
    assert [picked(view, n) for n in range(3)] == [set(), {1}, {1, 3}]
    assert picked(view, 6) == set(range(6))
    # By coverage alone v2 is first: the gains of v2 and v3 are equal.
    assert picked(view, 1, alpha=0.0) == {2}


def test_properties() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 40, 6, generator=generator).double()
    saliency = torch.rand(40, generator=generator).double()
    found = picked(view_of(features, saliency.tolist()), 12)
    assert len(found) == 12
    # Scaling a token, or all saliencies, changes nothing; a uniform saliency is alpha = 0.
    scaled = features * torch.rand(1, 40, 1, generator=generator).double().add(0.5)
    assert picked(view_of(scaled, (saliency * 0.3).tolist()), 12) == found
    assert picked(view_of(features, [0.3] * 40), 12) == picked(view_of(features, saliency.tolist()), 12, alpha=0.0)
    # Two equal tokens: the second adds nothing, so it is the last to be kept.
    twice = features.clone()
    twice[0, 7] = twice[0, 3]
    for count in range(1, 40):
        assert picked(view_of(twice, [0.5] * 40), count) & {3, 7} != {3, 7}


def test_equal_and_empty_tokens() -> None:
    """Of equal features the most salient is first, then, as nothing is left to cover, the lowest; so zero vectors."""
    assert picked(view_of(torch.ones(1, 5, 3).double(), [0.1, 0.2, 0.3, 0.4, 0.1]), 3) == {3, 0, 1}
    features = torch.zeros(1, 5, 3).double()
    assert picked(view_of(features, [0.5] * 5), 2) == {0, 1}
    features[0, 3] = 1.0
    assert picked(view_of(features, [0.5] * 5), 1) == {3}


def test_blocks_that_are_recorded() -> None:
    assert SCOPE().signals(CLIP) == Signals(attention=frozenset({22}), features=True)
    assert SCOPE().signals(QWEN) == Signals(attention=frozenset({31}), features=True)


# -- the search --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1024, 7])
def test_cosines_need_not_be_stored(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """For a large image they are computed anew; the search by all pairs at once is the reference."""
    generator = torch.Generator().manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(3, 40, 4, generator=generator).double(), dim=-1)
    unit[:, -1] = unit[:, 0]
    weight, limit = torch.rand(3, 40, generator=generator).double(), torch.tensor([0, 9, 30])
    valid = torch.arange(40) < torch.tensor([[40], [20], [39]])
    stored = searches.covering(unit, weight, valid, limit)
    monkeypatch.setattr(products, "MOST_STORED", 39)
    monkeypatch.setattr(plain, "BLOCK", block)
    assert torch.equal(searches.covering(unit, weight, valid, limit), stored)
    assert stored.sum(1).tolist() == limit.tolist()


def test_images_in_groups_and_products_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all pairs of all images take too many bytes, some images at a time."""
    generator = torch.Generator().manual_seed(1)
    unit = torch.nn.functional.normalize(torch.randn(5, 30, 4, generator=generator).double(), dim=-1)
    weight, valid = torch.rand(5, 30, generator=generator).double(), torch.ones(5, 30, dtype=torch.bool)
    limit = torch.tensor([3, 0, 30, 7, 11])
    whole = searches.covering(unit, weight, valid, limit)
    monkeypatch.setattr(plain, "MOST_BYTES", 2 * 4 * 30**2)
    monkeypatch.setattr(products, "BLOCK", 7)
    assert torch.equal(searches.covering(unit, weight, valid, limit), whole)
    assert whole.sum(1).tolist() == limit.tolist()
    assert searches.covering(unit[:0], weight[:0], valid[:0], limit[:0]).shape == (0, 30)


# -- whole runs --------------------------------------------------------------------------------------------------------


def wanted(
    tiny: Tiny, view: TokenView, ratio: float, alpha: float, present: Sequence[set[int]] | None = None
) -> list[tuple[set[int], float]]:
    encoder, block = view.encoder, view.encoder.shape.selected
    saliency = encoder.class_attention(block).mean(1) if is_llava(tiny) else encoder.received(block)
    features, saliency, results = encoder.features().tolist(), saliency.tolist(), []
    for i, size in enumerate(view.sizes):
        here = sorted(present[i]) if present else list(range(size))
        picks, margin = reference(
            [features[i][j] for j in here],
            [saliency[i][j] for j in here],
            half_even(ratio * size),
            alpha,
        )
        results.append(({here[j] for j in picks}, margin))
    return results


def test_equals_slow_reference(tiny: Tiny, batches: list[Observed], encoder_view: Callable[..., TokenView]) -> None:
    ratios, alphas = (0.33, 0.22, 0.11, 0.5, 0.75, 0.4, 0.6, 0.2), (1.0, 1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 1.0)
    got, want = [], []
    for number, (seen, ratio, alpha) in enumerate(zip(batches, ratios, alphas, strict=True)):
        trace, _ = tiny.run(seen.inputs, f"scope@{number % 3}:{ratio};alpha={alpha}")
        got += kept(trace)
        want += wanted(tiny, encoder_view(tiny, seen), ratio, alpha)
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_after_an_earlier_stage(tiny: Tiny, capture_view: Callable[..., TokenView]) -> None:
    rng = random.Random(4)
    inputs = tiny.batch([tiny.row(rng) for _ in range(10)])
    present, found, view = deeper(tiny, inputs, capture_view, "scope@3:0.4")
    assert_agree(found, wanted(tiny, view, 0.4, 1.0, present))
