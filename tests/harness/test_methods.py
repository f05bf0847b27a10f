"""Every method through lmms-eval, on the embedded data, for both families; and schedules that mix them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from itertools import zip_longest
from math import ceil

import pytest

from lmms_prune import Schedule, Stage
from lmms_prune.methods import METHODS, MethodSpec

TASKS = ("ocrbench",)
KEEPS = {0: "0.6", 3: "0.3", 6: "0.1"}
"""By the layers of the three stages."""


def packed() -> list[str]:
    """Schedules of three stages in which each method that can run stands once.

    What a method does by itself the contract's tests prove; here all of them go through the harness, and mix.
    """
    ready = [spec for spec in METHODS.values() if spec.ready and spec.highest_layer != 0]
    first = [spec for spec in METHODS.values() if spec.ready and spec.highest_layer == 0]
    # One that cannot act at layer 0 stands later, and one after which nothing is left stands last.
    ready.sort(key=lambda spec: (spec.drops_all, spec.lowest_layer))
    alone = [spec for spec in first if spec.drops_all]
    order = [*(spec for spec in first if not spec.drops_all), *ready]
    count = ceil(len(order) / len(KEEPS))
    columns = [order[start : start + count] for start in range(0, len(order), count)]
    rows = [
        [staged(spec, layer, keep) for spec, (layer, keep) in zip(row, KEEPS.items(), strict=False) if spec is not None]
        for row in zip_longest(*columns)
    ]
    return [str(Schedule(tuple(stages))) for stages in [*rows, *([staged(spec, 0, "0")] for spec in alone)]]


def staged(spec: MethodSpec, layer: int, keep: str) -> Stage:
    """The method's own example at another layer, with another keep."""
    [example] = Schedule.parse(spec.example).stages
    return replace(example, layer=layer, keep=example.keep if spec.drops_all else Decimal(keep))


def check(run, schedule: str) -> None:
    parsed = Schedule.parse(schedule)
    rows = [row for task in TASKS for row in run.accounting[task]]
    assert len(rows) == 4 * len(TASKS)
    for row in rows:
        planned = [sum(images) for images in parsed.plan([row["visual_tokens"]])]
        kept = row["kept_visual_tokens"]
        assert len(kept) == len(planned)
        if not parsed.at_most:
            assert kept == planned
        assert all(now <= most for now, most in zip(kept, planned, strict=True))
        assert (kept[0] > 0) == (planned[0] > 0)
        assert row["avg_visual_tokens"] < row["visual_tokens"]
    for task in TASKS:
        assert all(isinstance(sample["filtered_resps"][0], str) for sample in run.samples[task])
        assert run.results["results"][task]


@pytest.mark.parametrize("number", range(len(packed())))
def test_every_method_runs_and_mixes(harness, family: str, number: int) -> None:
    schedule = packed()[number]
    check(harness.pruned(family, TASKS, schedule=schedule, batch_size=3), schedule)


def test_every_method_is_among_them() -> None:
    stages = [stage.method for schedule in packed() for stage in Schedule.parse(schedule).stages]
    assert sorted(stages) == sorted(spec.name for spec in METHODS.values() if spec.ready)


@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if s.keep == "optional" and s.ready])
def test_a_method_decides_by_itself(harness, family: str, name: str) -> None:
    """Without a keep the method's own rule counts; a later stage goes on from what is really left."""
    spec = METHODS[name]
    [stage] = Schedule.parse(spec.example).stages
    layer = max(1, min(stage.layer, 3)) if spec.highest_layer is None else spec.highest_layer
    options = "".join(f";{key}={value}" for key, value in stage.options)
    schedule = f"{name}@{layer}{options},random@6:0.1"
    run = harness.pruned(family, TASKS, schedule=schedule, batch_size=4)
    for row in [row for task in TASKS for row in run.accounting[task]]:
        own, later = row["kept_visual_tokens"]
        assert later == min(own, round(Decimal("0.1") * row["visual_tokens"]))


def test_the_question_reaches_the_method(harness, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Word for word what the task asks, without the template and without the image's placeholder."""
    from lmms_prune.methods.random import Random

    seen: list[str] = []
    original = Random.score

    def score(self, view):
        seen.extend(view.question())
        return original(self, view)

    monkeypatch.setattr(Random, "score", score)
    run = harness.pruned(family, ("pope",), schedule="random@1:0.5", batch_size=4)
    said = [arguments[0] for sample in run.samples["pope"] for arguments in [list(sample["arguments"])]]
    assert sorted(seen) == sorted(said)
