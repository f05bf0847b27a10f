"""`evaluate` and `show` as functions: what they refuse before anything runs, and how a failed evaluation is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmms_prune import Schedule, ScheduleError, evaluate, show
from lmms_prune.demo.benchmarks import mirror_in
from lmms_prune.demo.models import MODELS, weights
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.record.information import InformationError
from lmms_prune.sweep.jobs import SweepError

FORM = Path(__file__).parents[2] / "docs" / "form.png"


MODEL = str(weights(MODELS[0]))
ARGUMENTS = {"dtype": "float32", "image_aspect": "pad", "batch_size": 8}


def test_wrong_arguments_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="Did you mean 'fastv'"):
        evaluate(["none", "fastvv@2:0.25"], "gqa", tmp_path)
    with pytest.raises(ValueError, match="limit=0 must be a whole number of at least 1"):
        evaluate("none", "gqa", tmp_path, limit=0)
    with pytest.raises(ValueError, match=r"schedules=\[\] must be at least one schedule"):
        evaluate([], "gqa", tmp_path)
    for nothing in ("", [], ["gqa", ""]):
        with pytest.raises(ValueError, match=r"tasks=.* must be names of tasks, at least one"):
            evaluate("none", nothing, tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SweepError, match="layer 40 in stage 1 is beyond the model, whose layers are 0 to 11"):
        evaluate("dart@40:0.5", "gqa", tmp_path, model=MODEL, model_args=ARGUMENTS)
    with pytest.raises(ArgumentError, match="pretrained=/nowhere"):
        evaluate("none", "gqa", tmp_path, model="/nowhere")
    with pytest.raises(ArgumentError, match="pretrained=…: the command has the option --model for it"):
        evaluate("none", "gqa", tmp_path, model_args='{"pretrained": "/nowhere"}')
    with pytest.raises(ArgumentError, match="this is no JSON"):
        evaluate("none", "gqa", tmp_path, model_args='{"pretrained": ')


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images=\[\] must be image files or opened images, at least one"):
        show([], "?", "dart@1:0.5")
    with pytest.raises(ValueError, match="new_tokens=0 must be a whole number of at least 1"):
        show(FORM, "?", "dart@1:0.5", new_tokens=0)
    with pytest.raises(ValueError, match=r"out='x\.txt' must be a file whose name ends with \.png, \.svg or \.pdf"):
        show(FORM, "?", "dart@1:0.5", out="x.txt")
    with pytest.raises(ArgumentError, match="unknown argument 'dtyp'"):
        show(FORM, "?", "dart@1:0.5", model=MODEL, model_args={"dtyp": "float32"})
    with pytest.raises(InformationError, match=r"none\.png cannot be read as an image: No such file"):
        show(tmp_path / "none.png", "?", "dart@1:0.5")
    with pytest.raises(InformationError, match="information needs a right answer"):
        show(FORM, "?", f"information@2:0.5;of={tmp_path}")
    with pytest.raises(ArgumentError, match="--wrapper nosuch is unknown"):
        show(FORM, "?", "dart@1:0.5", wrapper="nosuch")
    with pytest.raises(ArgumentError, match="write --wrapper llava_pruned"):
        show(FORM, "?", "dart@1:0.5", model="llava_pruned")


@pytest.mark.slow
def test_a_failed_evaluation_gives_the_reason_from_its_log_and_others_their_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    schedule, data = Schedule("dart@1:0.44"), tmp_path / "data"
    data.mkdir()
    with pytest.raises(InformationError, match=r"the evaluation of dart@01-0\.44, nosuchtask failed: ") as caught:
        evaluate(schedule, "nosuchtask", tmp_path / "results", model=MODEL, model_args=ARGUMENTS)
    assert "Tasks not found: nosuchtask" in str(caught.value)
    log = Path(str(caught.value).rpartition("log: ")[2])
    assert "Tasks not found: nosuchtask" in log.read_text(encoding="utf-8")
    monkeypatch.chdir(mirror_in(data, 24))
    outcomes: list[str] = []
    rows = evaluate(
        ["none", schedule], "gqa", tmp_path / "results", model=MODEL, model_args=ARGUMENTS, limit=4,
        report=lambda outcome: outcomes.append(outcome.state),
    )  # fmt: skip
    assert outcomes == ["done", "done"]
    assert list(rows.schedule) == ["none", "dart@1:0.44"]
    assert list(rows.baseline)[1] == "none"
    only = evaluate(
        schedule, ["gqa"], tmp_path / "results", model=MODEL, model_args=ARGUMENTS, limit=4,
        report=lambda outcome: outcomes.append(outcome.state),
    )  # fmt: skip
    assert outcomes[2:] == ["skipped"]
    assert only.gqa.tolist() == rows.gqa.tolist()[1:]
    assert only.rel.tolist() == rows.rel.tolist()[1:]


@pytest.mark.slow
def test_show_answers_twice_and_draws(tmp_path: Path) -> None:
    question, words = "What is the city mentioned in the document?", "dtype=float32,image_aspect=pad"
    shown = show(FORM, question, "dart@1:0.44", model=MODEL, model_args=words, out=tmp_path / "x.png")
    assert (shown.unpruned, shown.answer) == ("RELI", "RELI")
    assert [int(mask.sum()) for mask in shown.kept[0]] == [60]
    assert (tmp_path / "x.png").stat().st_size > 1000
    solved = show(FORM, question, "dart@1:?,budget=0.5", model=MODEL, model_args=words)
    assert str(solved.schedule) == "dart@1:0.4409"
    assert [int(mask.sum()) for mask in solved.kept[0]] == [60]
    with pytest.raises(ScheduleError, match=r"the '\?' of stage 1 needs a budget"):
        show(FORM, question, "dart@1:?", model=MODEL, model_args=words)
