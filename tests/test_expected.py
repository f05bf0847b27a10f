"""Arguments of public functions with a wrong type or a value that is not allowed are refused by name.

The tests' own type checks would be first, so that a process without them makes the calls: a forked one, in which the package
was imported as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forking import Forking
from tiny import load, noise

from lmms_prune import Schedule, ScheduleError, Stage, evaluate, leaderboard, prune, show
from lmms_prune.schedule import PromptSizes

HALF = Decimal("0.5")
UNKNOWN = Schedule.parse("random@2:?")

PRUNE: list[tuple[dict[str, Any], str]] = [
    ({"seed": 1.5}, "seed=1.5 must be a whole number."),
    ({"seed": "a"}, "seed='a' must be a whole number."),
    ({"seed": "１２"}, "seed='１２' must be a whole number."),
    ({"seed": None}, "seed=None must be a whole number."),
    ({"seed": True}, "seed=True must be a whole number."),
    ({"positions": None}, "positions=None must be a text."),
    ({"samples": "a"}, "samples='a' must be a list of texts, or None."),
    ({"samples": [1]}, "samples=[1] must be a list of texts, or None."),
    ({"samples": 3}, "samples=3 must be a list of texts, or None."),
    ({"questions": "is it?"}, "questions='is it?' must be a list of texts, or None."),
    ({"questions": [None]}, "questions=[None] must be a list of texts, or None."),
    ({"count_selection": "no"}, "count_selection='no' must be True or False."),
    ({"count_selection": 1}, "count_selection=1 must be True or False."),
]
TYPES: list[tuple[Callable[[], object], str]] = [
    (lambda: PromptSizes("32"), "layers='32' must be a whole number of at least 1"),
    (lambda: PromptSizes(32.0, 576), "layers=32.0 must be a whole number"),
    (lambda: PromptSizes(32, "576"), "visual_tokens='576' must be a whole number of at least 1, or None"),
    (lambda: PromptSizes(32, True), "visual_tokens=True must be"),
    (lambda: Schedule().check(None), "layers=None must be"),
    (lambda: Schedule().check(32, 576), "images=576 must be a list of whole numbers of at least 0"),
    (lambda: Schedule().check(32, ["576"]), "images=['576'] must be"),
    (lambda: Schedule().plan(576), "images=576 must be"),
    (lambda: Schedule().plan("576"), "images='576' must be"),
    (lambda: Schedule().layer_counts(2.5, [576]), "layers=2.5 must be"),
    (lambda: Schedule().avg_visual_tokens(True, [576]), "layers=True must be"),
    (lambda: Schedule([Stage("random", 2, HALF)]), "must be a tuple of Stage objects"),
    (lambda: Schedule(("random@2:0.5",)), "must be a tuple of Stage objects"),
    (lambda: Stage(3, 2, HALF), "method=3 must be a text"),
    (lambda: Stage("random", "2", HALF), "layer='2' must be a whole number of at least 0"),
    (lambda: Stage("random", 2.0, HALF), "layer=2.0 must be"),
    (lambda: Stage("random", False, HALF), "layer=False must be"),
    (lambda: Stage("random", 2, "0.5"), "keep='0.5' must be a ratio as a Decimal"),
    (lambda: Stage("random", 2, True), "keep=True must be"),
    (lambda: Stage("dart", 2, HALF, {"order": "stable"}), "must be a tuple of (name, value) pairs"),
    (lambda: Stage("dart", 2, HALF, (("order",),)), "must be a tuple of (name, value) pairs"),
    (lambda: leaderboard(None), "paths=[None] must be a path or a list of paths"),
    (lambda: leaderboard(b"r"), "paths=[114] must be a path or a list of paths"),
    (lambda: leaderboard("r", baseline=3), "baseline=3 must be a path, or None"),
    (lambda: leaderboard("r", count=["gqa"]), "count=['gqa'] must be a text, or None"),
    (lambda: evaluate("none", 3, "out"), "tasks=[3] must be names of tasks, at least one"),
    (lambda: evaluate("none", "gqa", None), "out=None must be a path"),
    (lambda: evaluate("none", "gqa", "out", model_args=["a"]), "model_args=['a'] must be a text or a mapping"),
    (lambda: evaluate("none", "gqa", "out", limit="3"), "limit='3' must be a whole number of at least 1, or None"),
    (lambda: show(None, "?", "none"), "images=[None] must be image files or opened images, at least one"),
    (lambda: show(["a.png", 3], "?", "none"), "images=['a.png', 3] must be image files or opened images"),
    (lambda: show("a.png", 3, "none"), "question=3 must be a text"),
    (lambda: show("a.png", "?", "none", new_tokens="3"), "new_tokens='3' must be a whole number of at least 1"),
    (lambda: show("a.png", "?", "none", model_args=3), "model_args=3 must be a text or a mapping"),
]
VALUES: list[tuple[Callable[[], object], str]] = [
    (lambda: Schedule().check(0), "layers=0 must be a whole number of at least 1"),
    (lambda: PromptSizes(32, 0), "visual_tokens=0 must be a whole number of at least 1"),
    (lambda: Schedule().plan([-1]), "images=[-1] must be a list of whole numbers of at least 0"),
    (lambda: Stage("random", -1, HALF), "layer=-1 must be a whole number of at least 0"),
]
BUDGETS = [None, True, [192], float("nan"), "１９２t", "1_92t"]
SEEDS = [3, np.int64(3)]


def outcome(call: Callable[[], object]) -> tuple[str, str]:
    """What a call raises, and its message."""
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def main(folder: str) -> None:
    """Make all calls on the model in `folder` and print what came of them."""
    family = load("llava", Path(folder), torch.float32, "sdpa")
    inputs = family.inputs(["is it?"], [[noise(1)]])

    def enter(schedule: str, arguments: dict[str, Any]) -> None:
        with prune(family.model, schedule, **arguments):
            pass

    def kept(seed: Any) -> list[list[int]]:
        with prune(family.model, "random@2:0.5", seed=seed, samples=("a",), questions=["is it?"]) as trace:
            family.model(**inputs)
        return trace.rows[0].indices(0)

    results = {
        "prune": [[outcome(lambda: enter(text, given)) for given, _ in PRUNE] for text in ("none", "random@2:0.5")],  # noqa: B023
        "types": [outcome(call) for call, _ in TYPES],
        "values": [outcome(call) for call, _ in VALUES],
        "budgets": [outcome(lambda: UNKNOWN.solve(budget, PromptSizes(8, 576))) for budget in BUDGETS],  # noqa: B023
        "fraction": str(UNKNOWN.solve(Fraction(1, 2), PromptSizes(8, 576))),  # type: ignore[arg-type]
        "kept": [kept(seed) for seed in SEEDS],
    }
    print(json.dumps(results))


@pytest.fixture(scope="module")
def results(folders: dict[str, Path], forking: Forking) -> dict[str, Any]:
    command, environment = [*forking.prefix, __file__, str(folders["llava"])], forking.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_arguments_of_prune(results: dict[str, Any]) -> None:
    for outcomes in results["prune"]:
        assert outcomes == [["TypeError", message] for _, message in PRUNE]


def test_arguments_of_schedules(results: dict[str, Any]) -> None:
    assert [error for error, _ in results["types"]] == ["TypeError"] * len(TYPES)
    assert [error for error, _ in results["values"]] == ["ValueError"] * len(VALUES)
    for (_, text), (_, message) in zip(results["types"] + results["values"], TYPES + VALUES, strict=True):
        assert message in text


def test_values_that_are_no_budget(results: dict[str, Any]) -> None:
    for error, text in results["budgets"]:
        assert error == "ScheduleError"
        assert "is neither tokens" in text
    assert results["fraction"] == str(UNKNOWN.solve("0.5", PromptSizes(8, 576)))


def test_integers_of_any_type_are_accepted(results: dict[str, Any]) -> None:
    assert results["kept"][0] == results["kept"][1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((("ordre", "stable"),), "dart has no option 'ordre'. Did you mean 'order'"),
        ((("order", "random"),), "option order=random: allowed are stable and reference"),
        ((("native_count", "false"),), "native_count='false' is not what its text says"),
        ((("native_count", 0),), "option native_count=0: allowed are true and false"),
    ],
)
def test_a_stage_takes_options_that_a_text_can_express(options: tuple, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Stage("dart", 2, HALF, options)


@pytest.mark.parametrize("text", [None, 3, True, ["dart@2:0.5", 3], b"dart@2:0.5"])
def test_values_that_are_no_schedule(text: object) -> None:
    with pytest.raises(ScheduleError, match="neither a text nor a list of stages"):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "text", ["dart@２:0.5", "dart@2:０.5", "random@2:５t", "folder@2:0.5,vflowopt@5:0.3;alpha=０.5", "swiftvlm@1_0:0.5"]
)
def test_digits_of_other_scripts_are_refused(text: str) -> None:
    with pytest.raises(ScheduleError):
        Schedule.parse(text)
    Schedule.parse(text.translate(str.maketrans("０２５", "025")).replace("_", ""))


if __name__ == "__main__":
    main(sys.argv[1])
