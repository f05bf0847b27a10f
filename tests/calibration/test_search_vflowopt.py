"""VFlowOpt's search: every draw meets the budget, the objective is the documented cosine, and the best draw is returned."""

from __future__ import annotations

import random
import sys
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from masked import Searched
from torch import Tensor

from lmms_prune import Schedule, prune
from lmms_prune.calibration.data import SearchError
from lmms_prune.calibration.vflowopt import FoundOptions, Space, search_vflowopt


def last_state(searched: Searched, prompt: dict[str, Tensor], schedule: str) -> list[float]:
    """The last token's input to the final norm."""
    seen: list[Tensor] = []
    norm = searched.model.model.language_model.norm
    handle = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad(), prune(searched.model, schedule):
        searched.model(**prompt)
    handle.remove()
    return seen[-1][0, -1].tolist()


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / (sum(x * x for x in a) * sum(y * y for y in b)) ** 0.5


def search(searched: Searched, **options: Any) -> FoundOptions:
    options = {"budget": 0.3, "layers": [1, 2], "trials": 9, "random_trials": 6, **options}
    return search_vflowopt(searched.model, searched.prompts[:2], **options)


def test_a_draw_by_hand() -> None:
    # 100 tokens, 10 layers, budget 0.3: 300 tokens in all. Layer 0 (4 layers long) keeps 300/10 = 30 to 300/4 = 75.
    space = Space((0, 4, 8), 10, Fraction("0.3"), 100, 10)
    low = "vflowopt@0:30t;m=2.5;t=7.0,vflowopt@4:30t;t=7.0,vflowopt@8:30t;t=7.0"
    assert str(space.schedule(7.0, 2.5, [0.0, 0.0])) == low
    # 30 + 45/3 = 45: 120 remain for 6 layers, so layer 4 keeps 20 to 30; the middle is 25, which leaves 20/2.
    schedule = space.schedule(7.0, 2.5, [1 / 3, 0.5])
    assert str(schedule) == "vflowopt@0:45t;m=2.5;t=7.0,vflowopt@4:25t;t=7.0,vflowopt@8:10t;t=7.0"
    # The first layer takes everything: nothing remains.
    assert [stage.keep for stage in space.schedule(7.0, 2.5, [1.0, 1.0]).stages] == [75, 0, 0]


def test_every_draw_meets_the_budget() -> None:
    rng = random.Random(0)
    for _ in range(300):
        depth = rng.randint(2, 40)
        layers = (0, *sorted(rng.sample(range(1, depth), rng.randint(1, min(4, depth - 1)))))
        fixed = rng.choice([None, 4, 64, 576])
        budget = Fraction(rng.randint(1, 99), 100)
        places = [rng.choice([0.0, 1.0, rng.random()]) for _ in layers[1:]]
        schedule = Space(layers, depth, budget, fixed, 8).schedule(1.0, 2.0, places)
        unit = fixed or 10_000
        average = schedule.avg_visual_tokens(depth, [unit])
        assert budget * unit - 1 < average <= budget * unit
        keeps = [stage.keep for stage in schedule.stages]
        assert all(before >= after for before, after in pairwise(keeps))  # type: ignore[operator]
        assert all(isinstance(keep, int) == (fixed is not None) for keep in keeps)
        assert Schedule.parse(str(schedule)) == schedule


def test_similarity_is_the_mean_cosine_of_the_last_states(searched: Searched) -> None:
    results = search(searched)
    cosines = [
        cosine(last_state(searched, prompt, "none"), last_state(searched, prompt, str(results.schedule)))
        for prompt in searched.prompts[:2]
    ]
    assert results.similarity == pytest.approx(sum(cosines) / 2, rel=1e-6)
    assert [stage.layer for stage in results.schedule.stages] == [0, 1, 2]
    options = [dict(stage.options) for stage in results.schedule.stages]
    assert [set(stage) for stage in options] == [{"t", "m"}, {"t"}, {"t"}]
    assert len({stage["t"] for stage in options}) == 1


def test_it_reports_each_better_schedule_and_returns_the_best(searched: Searched) -> None:
    lines: list[str] = []
    results = search(searched, report=lines.append)
    cosines = [float(line.split("cosine ")[1].split()[0]) for line in lines]
    assert cosines == sorted(cosines)
    assert lines[0].startswith("trial 0: ")
    assert lines[-1].endswith(f" {results.similarity:.6f} of {results.schedule}")
    started = [value for line, value in zip(lines, cosines, strict=True) if int(line.split()[1].strip(":")) < 6]
    assert started[-1] == pytest.approx(results.start, abs=1e-6)


def test_a_seed_decides_everything(searched: Searched) -> None:
    first, same, other = (search(searched, seed=seed, trials=8) for seed in (1, 1, 2))
    assert first == same
    assert first.schedule != other.schedule


@pytest.mark.slow
def test_it_improves_on_its_random_start(searched: Searched) -> None:
    results = [search(searched, trials=18, seed=seed) for seed in (0, 1)]
    assert all(result.similarity >= result.start for result in results)
    assert sum(result.similarity for result in results) > sum(result.start for result in results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "a"}, "--budget a is not a ratio"),
        ({"budget": "192t"}, "--budget 192t is not a ratio of the visual tokens; write e.g. 0.25"),
        ({"budget": "1/0"}, "is not a ratio"),
        ({"budget": 0.0}, "--budget 0.0 must lie between 0 and 1"),
        ({"budget": 1.5}, "--budget 1.5 must lie between 0 and 1"),
        ({"layers": [9, 18]}, "--layers 9,18 must increase and lie between 1 and 3, the model's last"),
        ({"layers": [2, 1]}, "--layers 2,1 must increase"),
        ({"layers": [1, 1]}, "--layers 1,1 must increase"),
        ({"layers": [0, 1]}, "--layers 0,1 must increase and lie between 1"),
        ({"layers": []}, r"--layers \(none\) must increase"),
        ({"trials": 0}, "--trials 0 must be at least 1"),
    ],
)
def test_bad_arguments(searched: Searched, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        search(searched, **options)


def test_without_optuna(searched: Searched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SearchError, match=r"pip install 'lmms-prune\[calibrate\]'"):
        search(searched)
