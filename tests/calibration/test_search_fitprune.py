"""FitPrune's search against eager attention maps, masks and plain loops, and against its published tables."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest
import torch
from built import UNLIKE
from masked import Rows, Searched, columns, masked
from torch import Tensor

from lmms_prune import prune
from lmms_prune.calibration.cost import LayerCost, saving
from lmms_prune.calibration.data import SearchError
from lmms_prune.calibration.fitprune import average_schedule, capture, delete, fit, search_fitprune, unpruned_totals
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule.presets import _FITPRUNE

LAYERS = 4
EVERY = (*UNLIKE, "qwen3_vl")  # the search runs the layers one by one, and must add what Qwen3-VL's decoder adds
SEVEN_B = LayerCost(width=4096, queries=4096, keys=4096, mlp_width=11008)

# -- an independent implementation ---------------------------------------------------------------------------------


def slow_measures(rows: Rows, present: list[int], text: list[int]) -> tuple[dict[int, float], dict[int, float]]:
    cross, within = {}, {}
    for v in present:
        cross[v] = sum(max(head[q][v] for head in rows) for q in text) / len(text)
        within[v] = sum(max(head[u][v] for head in rows) for u in present) / len(present)
    return cross, within


def slow_prefix(measure: dict[int, float], least: float) -> set[int]:
    order = sorted(measure, key=lambda v: (measure[v], -v))
    longest = 0
    for size in range(1, len(order) + 1):
        if sum(measure[v] for v in order[size:]) >= least:
            longest = size
    return set(order[: max(longest - 1, 0)])


def slow_saving(searched: Searched, size: int, deletions: list[int]) -> float:
    config = searched.model.config.text_config
    d, m, heads, kv = (config.hidden_size, config.intermediate_size, config.num_attention_heads,
                       config.num_key_value_heads)  # fmt: skip
    head = d // heads

    def attention(n: int) -> int:
        return n * d * heads * head * 2 + n * d * kv * head * 2 + n * n * heads * head * 2

    spent, n = 0, size
    for count in deletions:
        spent += attention(n)
        n -= count
        spent += 3 * n * d * m
    return 1 - spent / (LAYERS * (attention(size) + 3 * size * d * m))


def slow_totals(searched: Searched, prompt: dict[str, Tensor]) -> list[tuple[float, float]]:
    visual, text = columns(searched, prompt)
    totals = []

    def see(layer: int, rows: Rows) -> None:
        cross, within = slow_measures(rows, visual, text)
        totals.append((sum(cross.values()), sum(within.values())))

    with masked(searched, lambda layer: set(), see) as model:
        model(**prompt)
    return totals


def slow_deletions(
    searched: Searched, prompt: dict[str, Tensor], totals: list[tuple[float, float]], alpha: float, reduction: float
) -> list[int]:
    visual, text = columns(searched, prompt)
    gone: set[int] = set()
    lost = [0] * LAYERS

    def see(layer: int, rows: Rows) -> None:
        if slow_saving(searched, len(visual), lost) >= reduction:
            return
        present = [v for v in visual if v not in gone]
        cross, within = slow_measures(rows, present, text)
        of_text, of_image = (total - alpha * total for total in totals[layer])
        goes = slow_prefix(cross, of_text) & slow_prefix(within, of_image)
        lost[layer] = len(goes)
        gone.update(goes)

    with masked(searched, lambda layer: set(gone), see) as model:
        model(**prompt)
    return lost


def slow_search(
    searched: Searched, prompts: list[dict[str, Tensor]], reduction: float
) -> tuple[float, list[list[int]]]:
    totals = [slow_totals(searched, prompt) for prompt in prompts]
    sizes = [len(columns(searched, prompt)[0]) for prompt in prompts]

    def run(alpha: float) -> list[list[int]]:
        return [slow_deletions(searched, p, t, alpha, reduction) for p, t in zip(prompts, totals, strict=True)]

    def enough(lost: list[list[int]]) -> bool:
        return sum(slow_saving(searched, n, x) for n, x in zip(sizes, lost, strict=True)) / len(lost) >= reduction

    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(run(middle)) else (middle, high)
    return high, run(high)


# -- the same, fast ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("remains", "kept"),
    [
        (1.01, {0, 1, 2, 3}),  # even the sum of all is too small
        (0.95, {0, 1, 2, 3}),  # without token 2 there are 0.9
        (0.85, {0, 1, 2, 3}),  # only token 2 could be deleted; one more is kept
        (0.65, {0, 1, 3}),  # 2 and 0 could: 0.7 remains
        (0.45, {0, 1, 3}),
        (0.35, {1, 3}),  # 2, 0 and 1 could: 0.4 remains
        (0.0, {3}),  # all could
    ],
)
def test_fit_by_hand(remains: float, kept: set[int]) -> None:
    measure = torch.tensor([0.2, 0.3, 0.1, 0.4], dtype=torch.float64)
    assert set(fit(measure, remains).nonzero().flatten().tolist()) == kept
    values = dict(enumerate(measure.tolist()))
    assert set(values) - slow_prefix(values, remains) == kept


def test_of_equal_tokens_the_last_are_deleted() -> None:
    assert fit(torch.tensor([0.25, 0.25, 0.25, 0.25]), 0.45).tolist() == [True, True, True, False]


def test_saving_by_hand() -> None:
    # Two layers of d = q = 2, k = 1, m = 5. Ten tokens: attention 2·10·2·3 + 2·100·2 = 520, MLP 3·10·2·5 = 300.
    # Four are deleted in layer 0: its MLP is 180; layer 1: 2·6·2·3 + 2·36·2 = 216 and 180. 1 - 1096/1640.
    cost = LayerCost(width=2, queries=2, keys=1, mlp_width=5)
    assert saving(cost, 10, [4, 0]) == pytest.approx(1 - 1096 / 1640)
    assert saving(cost, 10, [0, 0]) == 0


@pytest.mark.parametrize("percent", _FITPRUNE)
def test_published_deletions_save_their_nominal_share(percent: int) -> None:
    """Rounding down makes them save less: by half a percent if many tokens are deleted, by up to five if few are."""
    published = dict(map(int, entry.split(":")) for entry in _FITPRUNE[percent].split())
    saved = 100 * saving(SEVEN_B, 576, [published.get(layer, 0) for layer in range(32)])
    assert percent - (0.7 if percent >= 50 else 5) < saved < percent


def test_the_cost_counts_grouped_heads(searched: Searched) -> None:
    cost = LayerCost.of(ModelParts.of(searched.model))
    assert cost == LayerCost(64, 64, 64 if searched.name == "llava" else 32, 128)


@pytest.mark.parametrize("searched", EVERY, indirect=True)
def test_totals_equal_slow(searched: Searched) -> None:
    parts = ModelParts.of(searched.model)
    for prompt in searched.prompts[:3]:
        with torch.no_grad():
            got = unpruned_totals(parts, capture(parts, prompt))
        _, text = columns(searched, prompt)
        for (cross, within), (slow_cross, slow_within) in zip(got, slow_totals(searched, prompt), strict=True):
            assert cross / len(text) == pytest.approx(slow_cross, rel=1e-6)
            assert within == pytest.approx(slow_within, rel=1e-6)


SOME = [(family, alpha) for family in UNLIKE for alpha in (0.05, 0.13, 0.31, 0.6, 1.0)] + [("qwen3_vl", 0.31)]


@pytest.mark.parametrize(("searched", "alpha"), SOME, indirect=["searched"])
def test_deletions_equal_slow(searched: Searched, alpha: float) -> None:
    parts = ModelParts.of(searched.model)
    cost, several = LayerCost.of(parts), 0
    for prompt in searched.prompts:
        with torch.no_grad():
            captured = capture(parts, prompt)
            totals = unpruned_totals(parts, captured)
            for reduction in (0.4, 0.99):
                got = delete(parts, captured, totals, alpha, reduction, cost)
                assert got == slow_deletions(searched, prompt, slow_totals(searched, prompt), alpha, reduction)
                several += sum(count > 0 for count in got) > 1
    assert several > 1, "recursion was not tried"


@pytest.mark.parametrize("reduction", [0.25, 0.6])
def test_search_equals_slow(searched: Searched, reduction: float) -> None:
    prompts = searched.prompts[:3]
    alpha, lost = slow_search(searched, prompts, reduction)
    result = search_fitprune(searched.model, prompts, reduction=reduction)
    assert result.alpha == alpha
    sizes = [len(columns(searched, prompt)[0]) for prompt in prompts]
    shares = [
        sum(Fraction(counts[layer], n) for counts, n in zip(lost, sizes, strict=True)) / 3 for layer in range(LAYERS)
    ]
    unit = 64 if searched.name == "llava" else 10_000
    want = [floor(share * unit) for share in shares]
    assert result.deletions == (want if unit == 64 else [count / unit for count in want])
    savings = [slow_saving(searched, n, counts) for n, counts in zip(sizes, lost, strict=True)]
    assert result.reduction == pytest.approx(sum(savings) / 3)


def test_average_of_counts_and_of_shares() -> None:
    # Layer 0: (3 + 4)/2 = 3.5, layer 1: (2 + 0)/2 = 1, layer 2: 0.5, layer 3 (the last) 2.
    schedule, deletions = average_schedule([[3, 2, 0, 2], [4, 0, 1, 2]], [16, 16], 16)
    assert (str(schedule), deletions) == ("fitprune@1:13t,fitprune@2:12t", [3, 1, 0, 2])
    # (3/9 + 4/16)/2 = 0.29166…, (2/9 + 0)/2 = 0.1111…, (0 + 1/16)/2 = 0.03125.
    schedule, deletions = average_schedule([[3, 2, 0, 2], [4, 0, 1, 2]], [9, 16], None)
    assert str(schedule) == "fitprune@1:0.7084,fitprune@2:0.5973,fitprune@3:0.5661"
    assert deletions == [0.2916, 0.1111, 0.0312, 0.1736]
    assert average_schedule([[0, 0], [1, 0]], [16, 16], 16)[1] == [0, 0]


@pytest.mark.slow
def test_more_reduction_needs_more_alpha_and_runs_as_planned(searched: Searched) -> None:
    result = [search_fitprune(searched.model, searched.prompts, reduction=share) for share in (0.2, 0.4, 0.6, 0.75)]
    assert all(before.alpha < after.alpha for before, after in pairwise(result))
    cost = LayerCost.of(ModelParts.of(searched.model))
    for one, asked in zip(result, (0.2, 0.4, 0.6, 0.75), strict=True):
        assert asked <= one.reduction < asked + 0.08
        kept = []
        for prompt in searched.prompts:
            with torch.no_grad(), prune(searched.model, one.schedule) as trace:
                searched.model(**prompt)
            [row] = trace.rows
            kept.append(sum(map(cost.layer, row.visual)) / (LAYERS * cost.layer(row.visual_tokens)))
        real = 1 - sum(kept) / len(kept)
        assert real == pytest.approx(one.schedule_reduction)
        # Of four layers, the one whose MLP still runs weighs much.
        assert asked - 0.15 < real < one.reduction


def test_an_impossible_reduction_is_refused(searched: Searched) -> None:
    with pytest.raises(SearchError, match=r"--reduction 95: of this model at most 8\d\.\d % can be saved"):
        search_fitprune(searched.model, searched.prompts[:1], reduction=0.95)
    for reduction in (0.0, 1.0, 1.2, -0.1):
        with pytest.raises(SearchError, match="must lie between 0 and 100 percent"):
            search_fitprune(searched.model, searched.prompts, reduction=reduction)
