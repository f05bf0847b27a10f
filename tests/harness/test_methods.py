"""Every method through lmms-eval, on the embedded data, for both families; and schedules that mix them."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal

import pytest

from lmms_prune import Schedule
from lmms_prune.methods import METHODS, MethodSpec

LAYERS = 8
TASKS = ("ocrbench",)
MIXED = (
    "fastervlm@0:0.5,fastv@3:0.25,random@5:0.05",
    "visionzip@0:0.8,sparsevlm@2:0.5,dart@4:0.3,vtw@6",
    "downsample@0:0.6,pool@2:0.3,pdrop@4:0.2,keeplast@6:0.05",
)


def schedule_of(spec: MethodSpec) -> str:
    """The method as its only stage, at the layer of its example as far as the model is deep, keeping 30 %."""
    [stage] = Schedule.parse(spec.example).stages
    keep = stage.keep if spec.drops_all else Decimal("0.3")
    return str(replace(stage, layer=min(stage.layer, LAYERS - 2), keep=keep))


def check(run, schedule: str) -> None:
    parsed = Schedule.parse(schedule)
    rows = [row for task in TASKS for row in run.ledger[task]]
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


@pytest.mark.slow
@pytest.mark.parametrize("spec", [s for s in METHODS.values() if s.ready], ids=lambda spec: spec.name)
def test_a_method_runs(harness, family: str, spec: MethodSpec) -> None:
    if family not in spec.families:
        pytest.skip(f"{spec.name} is not for {family}")
    schedule = schedule_of(spec)
    check(harness.pruned(family, TASKS, schedule=schedule, batch_size=4), schedule)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", MIXED)
def test_methods_mix(harness, family: str, schedule: str) -> None:
    check(harness.pruned(family, TASKS, schedule=schedule, batch_size=3), schedule)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in METHODS.items() if s.keep == "optional" and s.ready])
def test_a_method_decides_by_itself(harness, family: str, name: str) -> None:
    """Without a keep the method's own rule counts; a later stage goes on from what is really left."""
    if family not in METHODS[name].families:
        pytest.skip(f"{name} is not for {family}")
    [stage] = Schedule.parse(METHODS[name].example).stages
    schedule = f"{name}@{max(1, min(stage.layer, 3))},random@6:0.1"
    run = harness.pruned(family, TASKS, schedule=schedule, batch_size=4)
    for row in [row for task in TASKS for row in run.ledger[task]]:
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
