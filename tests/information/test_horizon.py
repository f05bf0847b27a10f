"""The horizon as a number, and the schedules that follow from it, on schedules-up scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import typer

from lmms_prune.calibration.propose import candidates, loss
from lmms_prune.harness.arguments import ArgumentError, ModelArguments
from lmms_prune.harness.calibrations import calibration_file, keep_calibration
from lmms_prune.information.horizon import find_horizon, score_horizons, vanishes
from lmms_prune.information.layer_sweep import Evaluation, acts_at, single_stage, slug
from lmms_prune.information.options import method_names, refuse_unscored
from lmms_prune.information.plots import draw_horizon, draw_horizons
from lmms_prune.leaderboard.samples import Samples, Stamp
from lmms_prune.models import MODEL_NAMES
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import PromptSizes, Schedule

DEPTH = 6


def scored(right: list[int], signature: str = "same") -> Samples:
    """A task of as many documents, each right (1) or wrong (0)."""
    num = np.array(right, dtype=float)
    count = len(right)
    return Samples(
        signature=signature,
        num=100 * num,
        den=np.ones(count),
        stratum=np.zeros(count, dtype=int),
        right=num > 0,
        documents=np.arange(count),
        unit=np.arange(count),
        answers=np.arange(count),
        offsets=np.arange(count),
        score=float(100 * num.mean()),
        logged=count,
        empty=0,
        accounting=None,
        extras={},
        stamp=Stamp(0, 0, 0, 0),
    )


def information(means: list[float], count: int = 8) -> pd.DataFrame:
    """The same mean information in every document, layer by layer."""
    lines = [
        {"task": "pope", "sample": f"pope/test/{n}", "layer": layer, "mean": mean, "divergence": mean / 10}
        for n in range(count)
        for layer, mean in enumerate(means)
    ]
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    ("wrong", "means", "expected"),
    [
        # Documents that removal at each layer turns wrong; mean information; layer, by score, by information.
        ([4, 3, 2, 0, 0, 0], [0.5, 0.4, 0.2, 0.1, 0.0, 0.0], (4, 3, 4)),
        (
            [4, 0, 2, 0, 0, 0],
            [0.5, 0.0, 0.0, 0.0, 0.0, 0.0],
            (3, 3, 1),
        ),  # a loss at a deeper layer moves the horizon below it
        ([0] * 6, [0.0] * 6, (0, 0, 0)),
        ([1] * 6, [0.0] * 6, (6, 6, 0)),  # even the last layer is needed
        ([0] * 6, [0.0, 0.0, 0.0, 0.0, 0.0, -0.02], (6, 0, 6)),
    ],
)
def test_the_horizon_needs_both_conditions(
    wrong: list[int], means: list[float], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    removed = {layer: scored([0] * n + [1] * (8 - n)) for layer, n in enumerate(wrong)}
    horizon = find_horizon("pope", information(means), scored([1] * 8), removed)
    assert (horizon.layer, horizon.by_accuracy, horizon.by_information) == expected
    assert horizon.low <= horizon.layer <= horizon.high
    assert horizon.layers.score.tolist() == [100 - 12.5 * n for n in wrong]
    assert horizon.layers["mean"].tolist() == pytest.approx(means)
    assert horizon.by_divergence == next((n for n, mean in enumerate(means) if mean / 10 <= 0.003), DEPTH)
    for path in draw_horizon(horizon, "schedules up", tmp_path / "horizon"):
        assert path.stat().st_size > 5000


def test_the_interval_comes_from_resampled_documents() -> None:
    """One document of eight is lost until layer 3: a resample has none of it with probability (7/8)⁸, about a third."""
    removed = {layer: scored([int(layer >= 3)] + [1] * 7) for layer in range(DEPTH)}
    horizon = find_horizon("pope", information([0.0] * DEPTH), scored([1] * 8), removed)
    assert (horizon.low, horizon.layer, horizon.high) == (0, 3, 3)
    assert find_horizon("pope", information([0.0] * DEPTH), scored([1] * 8), removed, epsilon=0.2).layer == 0
    certain = {layer: scored([int(layer >= 3)] * 8) for layer in range(DEPTH)}
    horizon = find_horizon("pope", information([0.0] * DEPTH), scored([1] * 8), certain)
    assert (horizon.low, horizon.layer, horizon.high) == (3, 3, 3)


def test_scores_and_information_must_be_of_the_same_documents() -> None:
    removed = {layer: scored([1] * 8) for layer in range(DEPTH)}
    with pytest.raises(InformationError, match="not of the same documents"):
        find_horizon("pope", information([0.0] * DEPTH, 7), scored([1] * 8), removed)
    with pytest.raises(InformationError, match="not of the same documents"):
        find_horizon("pope", information([0.0] * DEPTH), scored([1] * 8, "others"), removed)


def test_information_vanishes_where_no_task_has_any() -> None:
    lines = [("a", 0, 0.3), ("a", 1, 0.0), ("a", 2, 0.0), ("b", 0, 0.3), ("b", 1, -0.02), ("b", 2, 0.001)]
    assert vanishes(pd.DataFrame(lines, columns=["task", "layer", "mean"])) == 2
    assert vanishes(pd.DataFrame(lines[:3], columns=["task", "layer", "mean"])) == 1


@pytest.mark.parametrize(
    ("budget", "tokens", "limit"), [("0.5", None, 0.5), ("192t", 576, 192), ("0.3", 576, 0.3 * 576)]
)
def test_candidates_meet_the_budget(budget: str, tokens: int | None, limit: float) -> None:
    schedules = candidates(["dart", "divprune"], [16, 24], budget, PromptSizes(32, tokens))
    assert len(schedules) == len(set(schedules)) > 10
    for text in schedules:
        schedule = Schedule.parse(text)
        schedule.check(32, [tokens] if tokens else None)
        assert schedule.avg_visual_tokens(32, [tokens or 10_000]) <= limit * (10_000 if tokens is None else 1)
        assert schedule.stages[-1].layer in (16, 24)
        assert schedule.stages[-1].method in ("random", "vtw")
    assert {Schedule.parse(text).stages[0].method for text in schedules} == {"dart", "divprune"}
    # Without a horizon there is only one stage.
    assert all(
        len(Schedule.parse(text).stages) == 1 for text in candidates(["dart"], [32], budget, PromptSizes(32, tokens))
    )


def test_a_budget_too_large_for_hybrids_is_spent_before_the_horizon() -> None:
    """From layer 3 of 12 on at most 15 % are left, hence at most 36 % on average: 40 % leave all until there, or one method alone."""
    schedules = [Schedule.parse(text) for text in candidates(["dart"], [3], "0.4", PromptSizes(12, 144))]
    assert [[stage.method for stage in schedule.stages] for schedule in schedules] == [["random"], ["dart"]]
    assert schedules[0].stages[0].layer == 3
    for schedule in schedules:
        assert 0.36 * 144 < schedule.avg_visual_tokens(12, [144]) <= 0.4 * 144  # DART counts in eights


def test_a_task_without_a_metric_is_refused() -> None:
    """A task that is known by name is not, whatever metrics its YAML lists."""
    refuse_unscored(["pope", "chartqa"], "llava_pruned", None)
    with pytest.raises(InformationError, match="the YAML of 'mathvista' names no metric"):
        refuse_unscored(["pope", "mathvista"], "llava_pruned", None)


def test_a_task_that_does_not_exist_is_named() -> None:
    with pytest.raises(ArgumentError, match="'popee' is neither a task nor a group"):
        refuse_unscored(["popee"], "llava_pruned", None)
    refuse_unscored(["pope", "ocrvqa_test"], "llava_pruned", None)


def test_a_budget_that_no_candidate_meets_is_refused() -> None:
    with pytest.raises(InformationError, match="--budget 2t: no candidate meets it"):
        candidates(["dart"], [16], "2t", PromptSizes(32, 576))


def test_loss_is_the_mean_over_tasks_of_what_is_lost() -> None:
    """Half of one task and nothing of the other: 25 %. A task on which nothing is right does not count."""
    unpruned = {"pope": scored([1] * 40), "gqa": scored([1, 0] * 20), "mme": scored([0] * 40)}
    pruned = {"pope": scored([1, 0] * 20), "gqa": scored([1, 0] * 20), "mme": scored([0] * 40)}
    measured = loss(unpruned, pruned, 500, 0)
    assert measured.value == pytest.approx(25)
    assert 10 < measured.low < 25 < measured.high < 40
    assert loss(unpruned, unpruned, 500, 0).value == 0
    with pytest.raises(InformationError, match="scores nothing on any"):
        loss({"mme": scored([0] * 4)}, {"mme": scored([0] * 4)}, 100, 0)


def test_the_options_of_an_evaluation() -> None:
    schedules = Evaluation("llava_pruned", "pretrained=x", ["pope", "gqa"], 8, 16).settings(
        "dart@2:?,random@9:0.1,budget=0.5"
    )
    assert schedules == {
        "model": "llava_pruned",
        "model_args": "pretrained=x,schedule=dart@2:?,random@9:0.1,budget=0.5",
        "tasks": "pope,gqa",
        "limit": 8,
        "offset": 16,
    }
    assert Evaluation("m", "", ["pope"]).settings("none")["model_args"] == "schedule=none"
    assert slug("dart@2:0.44,random@20:0.07") == "dart@02-0.44-random@20-0.07"
    assert sorted(["vtw@10", "vtw@2"], key=slug) == ["vtw@2", "vtw@10"]


def test_auto_is_the_calibrated_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def read(model_args: object, model: str = "llava_pruned") -> ModelArguments:
        return ModelArguments.read(model_args, None, MODEL_NAMES[model])

    with pytest.raises(ArgumentError, match=r"calibrate --model org/model --tasks .* --budget 192t"):
        read("pretrained=org/model,schedule=auto,budget=192t")
    with pytest.raises(ArgumentError, match=r"calibrate --model org/model --model-args peft=org/lora --tasks"):
        read("pretrained=org/model,peft=org/lora,schedule=auto,budget=192t", "qwen2_5_vl_pruned")
    with pytest.raises(ArgumentError, match="schedule=auto needs a budget"):
        read("schedule=auto")
    with pytest.raises(ArgumentError, match=r"not yet calibrated at budget flops=40%"):
        read({"schedule": "auto", "budget": "flops=40%"})
    path = calibration_file("org/model", "192t")
    keep_calibration(path, {"schedule": "dart@2:0.4,random@20:0.05"})
    arguments = read("pretrained=org/model,schedule=auto,budget=192t")
    assert str(arguments.schedule) == "dart@2:0.4,random@20:0.05"
    assert arguments.budget is None
    assert arguments.settings()["schedule"] == "dart@2:0.4,random@20:0.05"
    with pytest.raises(ArgumentError, match="not yet calibrated at budget 64t"):
        read({"pretrained": "org/model", "schedule": "auto", "budget": "64t"})
    # A local checkpoint goes by its whole path, so that two folders of one name do not share a calibration.
    folders = [tmp_path / name / "model" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    assert len({calibration_file(str(folder), "0.5") for folder in folders}) == 2


def test_without_information_the_scores_alone_decide(tmp_path: Path) -> None:
    removed = {layer: scored([0] * n + [1] * (8 - n)) for layer, n in enumerate([4, 3, 2, 0, 0, 0])}
    horizon = find_horizon("pope", None, scored([1] * 8), removed)
    assert (horizon.layer, horizon.by_accuracy, horizon.by_information, horizon.by_divergence) == (3, 3, None, None)
    assert horizon.measured == 0
    assert list(horizon.layers.columns) == ["layer", "score", "full", "score_low", "score_high"]
    for path in draw_horizon(horizon, "schedules up", tmp_path / "horizon"):
        assert path.stat().st_size > 5000


def test_horizons_by_scores_on_each_resample_are_those_of_the_horizon() -> None:
    """The layer, and the ends of its interval, of 100 documents of which a few lose their answer at a deeper layer."""
    removed = {layer: scored([0] * wrong + [1] * (100 - wrong)) for layer, wrong in enumerate((60, 40, 3, 1, 0, 0))}
    horizon = find_horizon("pope", None, scored([1] * 100), removed)
    layer, draws = score_horizons(scored([1] * 100), removed)
    assert layer == horizon.layer == 3
    assert tuple(np.percentile(draws, [2.5, 97.5], method="nearest")) == (horizon.low, horizon.high)
    assert len(set(draws.tolist())) > 1


def test_information_of_some_documents_is_resampled_by_itself() -> None:
    """Three of eight documents are measured; the horizon needs both conditions all the same."""
    removed = {layer: scored([0] * n + [1] * (8 - n)) for layer, n in enumerate([4, 3, 2, 0, 0, 0])}
    some = information([0.5, 0.4, 0.2, 0.1, 0.0, 0.0], 3)
    with pytest.raises(InformationError, match="not of the same documents"):
        find_horizon("pope", some, scored([1] * 8), removed)
    horizon = find_horizon("pope", some, scored([1] * 8), removed, partial=True)
    assert (horizon.layer, horizon.by_accuracy, horizon.by_information) == (4, 3, 4)
    assert (horizon.units, horizon.measured) == (8, 3)
    assert horizon.layers["mean"].tolist() == pytest.approx([0.5, 0.4, 0.2, 0.1, 0.0, 0.0])
    # Documents that differ in information give an interval; one of three has none at layer 3.
    mixed = some.assign(mean=some["mean"].where((some["sample"] != "pope/test/0") | (some.layer != 3), 0.0))
    horizon = find_horizon("pope", mixed.assign(mean=mixed["mean"] / 7), scored([1] * 8), removed, partial=True)
    assert horizon.low <= horizon.layer <= horizon.high
    with pytest.raises(InformationError, match="not of the same documents"):
        find_horizon("pope", information([0.0] * DEPTH, 9), scored([1] * 8), removed, partial=True)


def test_all_tasks_of_a_model_are_one_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task has a curve in percent of its unpruned score, and its horizon in the curve's colour."""
    panels = []
    monkeypatch.setattr("lmms_prune.information.plots.save", lambda figure, path: panels.extend(figure.axes) or [])
    horizons = []
    for number, task in enumerate(("pope", "gqa")):
        removed = {layer: scored([0] * (layer < 3 + number) + [1] * 7) for layer in range(DEPTH)}
        removed = {layer: scored([int(layer >= 3 + number)] * 8) for layer in removed}
        horizons.append(find_horizon(task, None, scored([1] * 8), removed))
    nothing = find_horizon("mme", None, scored([0] * 8), {layer: scored([0] * 8) for layer in range(DEPTH)})
    draw_horizons([*horizons, nothing], "a model", tmp_path / "horizons")
    [panel] = panels
    curves = {line.get_label(): line for line in panel.lines if len(line.get_xdata()) == DEPTH}
    assert list(curves) == ["POPE: 3", "GQA: 4"]
    assert curves["GQA: 4"].get_ydata().tolist() == [0, 0, 0, 0, 100, 100]
    verticals = {line.get_color(): line.get_xdata()[0] for line in panel.lines if line.get_linestyle() == "--"}
    assert verticals == {curves["POPE: 3"].get_color(): 3, curves["GQA: 4"].get_color(): 4}


def test_stages_and_files_of_methods_with_options() -> None:
    assert single_stage("dart;order=reference", 2, 0.25) == "dart@2:0.25;order=reference"
    assert single_stage("random", 0, "60t") == "random@0:60t"
    assert acts_at("fastv;x=1", 1)
    assert not acts_at("fastv", 0)
    assert slug("dart@2:60t;order=reference") == "dart@02-60t-order-reference"
    # Paths that only differ in signs which no file name has are two files.
    names = {slug(f"sgl@3:0.1;guide={path}") for path in ("/a/b", "/a-b", "/a.b/")}
    assert len(names) == 3
    assert all("/" not in name for name in names)
    files = ("a/b.py", "a-b.py", "a b.py", "a_b.py", "a/b.py:B", "a.b:B")
    names = {slug(f"{file}@3:0.1,random@9:60t") for file in files}
    assert len(names) == len(files)
    assert all(name.endswith("@03-0.1-random@09-60t") and "/" not in name for name in names)


def test_methods_of_ones_own_are_tried_like_others(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import dataclass\n"
        "from lmms_prune.methods.base import ScoreMethod\n"
        "@dataclass(frozen=True)\n"
        "class Mine(ScoreMethod):\n"
        "    reads = ('attention',)\n"
        "    highest_layer = 5\n"
        "    power: float = 2.0\n"
        "    def score(self, view): return view.attention(view.last).mean((1, 2))\n",
        encoding="utf-8",
    )
    texts = [f"{file}", f"{file}:Mine;power=3"]
    assert method_names(f"dart,{','.join(texts)}", options=True, own=True) == ["dart", *texts]
    assert [layer for layer in range(8) if acts_at(texts[1], layer)] == [1, 2, 3, 4, 5]
    assert single_stage(texts[1], 2, "60t") == f"{file}:Mine@2:60t;power=3"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{}/absent.py", "there is no such file"),
        ("{}/raises.py", "raises when it is imported: ZeroDivisionError: division by zero (line 1)"),
        ("{}/raises.py@2", "write the method without layer and keep"),
        ("dart:0.5", "write the method without layer and keep"),
        ("nowhere.at.all:Class", "No module named 'nowhere'. Is it installed?"),
        ("nowhere", "there is no such method"),
    ],
)
def test_a_method_of_ones_own_that_cannot_be_tried_is_refused(
    written: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raises.py").write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(typer.Exit):
        method_names(written.format(tmp_path), own=True)
    assert message in " ".join(capsys.readouterr().err.split())
