"""VTW's search against logits of a model whose visual tokens are masked."""

from __future__ import annotations

import math

import pytest
from masked import Searched, columns, masked
from torch import Tensor

from lmms_prune.calibration.data import SearchError
from lmms_prune.calibration.vtw import search_vtw


def slow_probabilities(searched: Searched, prompt: dict[str, Tensor], layer: int) -> list[float]:
    visual = set(columns(searched, prompt)[0])
    with masked(searched, lambda i: visual if i >= layer else set(), None) as model:
        logits = model(**prompt).logits[0, -1].tolist()
    weights = [math.exp(logit) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def slow_divergence(searched: Searched, prompt: dict[str, Tensor], layer: int) -> float:
    unpruned, pruned = (slow_probabilities(searched, prompt, at) for at in (99, layer))
    return sum(p * (math.log(p) - math.log(q)) for p, q in zip(pruned, unpruned, strict=True))


def test_divergences_equal_slow(searched: Searched) -> None:
    prompts = searched.prompts[:3]
    lines: list[str] = []
    result = search_vtw(searched.model, prompts, eta=0.0, lowest=0, report=lines.append)
    want = {layer: sum(slow_divergence(searched, prompt, layer) for prompt in prompts) / 3 for layer in range(4)}
    assert result.divergences == pytest.approx(want, rel=1e-4)  # the eager softmax is in float32
    assert result.schedule is None
    assert lines[1] == f"layer 1: divergence {want[1]:.3g}"


def test_the_first_layer_below_eta_is_found(searched: Searched) -> None:
    result = search_vtw(searched.model, searched.prompts[:2], eta=0.0, lowest=0).divergences
    for eta in (*result.values(), 1e9):
        first = next(layer for layer in range(4) if result[layer] <= eta)
        assert str(search_vtw(searched.model, searched.prompts[:2], eta=eta, lowest=0).schedule) == f"vtw@{first}"
    deeper = search_vtw(searched.model, searched.prompts[:2], eta=1e9, lowest=2)
    assert str(deeper.schedule) == "vtw@2"
    assert deeper.divergences == {layer: result[layer] for layer in (2, 3)}


def test_bad_arguments(searched: Searched) -> None:
    with pytest.raises(SearchError, match=r"--lowest 5 is beyond the model, whose layers are 0 to 3\."):
        search_vtw(searched.model, searched.prompts)
    for eta in (-1.0, math.nan):
        with pytest.raises(SearchError, match=r"--eta .* must not be negative"):
            search_vtw(searched.model, searched.prompts, eta=eta, lowest=1)
