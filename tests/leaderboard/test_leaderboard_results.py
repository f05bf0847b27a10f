"""Result folders: what is merged, what is told apart, and what is named as unusable."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from written import write_run

from lmms_prune.leaderboard.benchmarks import named
from lmms_prune.leaderboard.results import read_results

HALF = [1.0, 0.0, 1.0, 0.0]


def test_one_run(tmp_path: Path) -> None:
    path = write_run(tmp_path, {"gqa": HALF, "mme": HALF}, "dart@2:0.44,random@3:0.07", tokens=30, seed=4)
    results = read_results([tmp_path])
    (record,) = results.records
    assert not results.problems
    assert (record.model, record.schedule) == ("/models/tiny-llava", "dart@2:0.44,random@3:0.07")
    assert (record.settings["seed"], record.settings["prompt"]) == ("4", "hf")
    assert list(record.tasks) == ["mme", "gqa"]
    gqa = record.tasks["gqa"]
    assert (gqa.score, gqa.answered, gqa.documents, gqa.source.path) == (50, 4, 4, path)
    assert gqa.samples is not None
    assert gqa.samples.is_file()
    assert gqa.accounting is not None
    assert gqa.accounting.costs()["kv_mib"] == pytest.approx(0.3)
    assert record.facts("attention") == {"sdpa"}
    command = shlex.split(gqa.source.command)
    assert command[:3] == ["lmms-eval", "--model", "llava_pruned"]
    assert command[command.index("--model_args") + 1].endswith("schedule=dart@2:0.44,random@3:0.07,seed=4")


def test_one_task_a_process_is_one_record(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": HALF}, date="20260101_000000")
    write_run(tmp_path / "b", {"pope": HALF}, date="20260101_000001")
    (record,) = read_results([tmp_path]).records
    assert list(record.tasks) == ["pope", "gqa"]
    assert len(record.sources) == 2


def test_a_run_that_was_repeated_with_the_same_numbers_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": HALF}, date="20260101_000000")
    newer = write_run(tmp_path / "b", {"gqa": HALF}, date="20260101_000001")
    results = read_results([tmp_path, tmp_path / "a"])
    (record,) = results.records
    assert record.tasks["gqa"].source.path == newer
    assert not results.problems


def test_a_run_with_samples_comes_before_a_newer_one_without(tmp_path: Path) -> None:
    """A clock may go back, and a full disk may leave results without samples: the repeated run is then the older one."""
    whole = write_run(tmp_path / "a", {"gqa": HALF}, date="20260101_000000")
    bare = write_run(tmp_path / "b", {"gqa": HALF}, date="20270101_000000")
    next(bare.parent.glob("*_samples_*")).unlink()
    (record,) = read_results([tmp_path]).records
    assert record.tasks["gqa"].source.path == whole
    (record,) = read_results([tmp_path / "b"]).records
    assert record.tasks["gqa"].source.path == bare


def test_the_same_settings_with_other_numbers_are_named_with_both_paths(tmp_path: Path) -> None:
    one = write_run(tmp_path / "a", {"gqa": HALF, "pope": HALF}, date="20260101_000000")
    other = write_run(tmp_path / "b", {"gqa": [1.0, 1, 1, 0]}, date="20260101_000001")
    results = read_results([tmp_path])
    (record,) = results.records
    assert list(record.tasks) == ["pope"]
    (problem,) = results.problems
    assert problem.path == str(one)
    assert str(other) in problem.message
    assert "50.0 and 75.0" in problem.message


@pytest.mark.parametrize("change", [{"settings": {"positions": "compact"}}, {"limit": 4}, {"seed": 1}, {"ours": False}])
def test_other_settings_are_another_record(tmp_path: Path, change: dict) -> None:
    write_run(tmp_path / "a", {"gqa": HALF})
    write_run(tmp_path / "b", {"gqa": [1.0] * 4}, **change)
    results = read_results([tmp_path])
    assert len(results.records) == 2
    assert not results.problems


def test_a_stock_run_is_read_without_a_schedule(tmp_path: Path) -> None:
    write_run(tmp_path, {"gqa": HALF}, ours=False)
    (record,) = read_results([tmp_path]).records
    assert (record.ours, record.schedule, record.wrapper, record.model) == (
        False,
        None,
        "llava_hf",
        "/models/tiny-llava",
    )


def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    write_run(tmp_path / "good", {"gqa": HALF})
    write_run(tmp_path / "also", {"gqa": HALF}, "vtw@2")
    cut = write_run(tmp_path / "cut", {"gqa": HALF}, "blind@0")
    cut.write_text(cut.read_text()[:100])
    odd = write_run(tmp_path / "odd", {"gqa": HALF}, "stride@0:0.5")
    said = json.loads(odd.read_text())
    odd.write_text(json.dumps({**said, "n-samples": {}}))
    strange = write_run(tmp_path / "strange", {"gqa": HALF}, "stride@0:0.4")
    strange.write_text(strange.read_text().replace('"pretrained":', '"checkpoint":'))
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "log.txt").write_text("out of memory")
    # The harness's own details of MMBench end like its results.
    (tmp_path / "good" / "submissions").mkdir()
    (tmp_path / "good" / "submissions" / "mmbench_en_dev_static_results.json").write_text('{"overall_acc": 0.5}')
    results = read_results([tmp_path, tmp_path / "nowhere", tmp_path / "failed"])
    assert len(results.records) == 2
    said = {problem.path: problem.message for problem in results.problems}
    assert set(said) == {str(cut), str(odd), str(strange), str(tmp_path / "failed"), str(tmp_path / "nowhere")}
    assert "cut short" in said[str(cut)]
    assert "n-samples" in said[str(odd)] or "gqa" in said[str(odd)]
    assert "its settings are {'checkpoint': " in said[str(strange)]
    assert "no results" in said[str(tmp_path / "failed")]
    assert "no such file" in said[str(tmp_path / "nowhere")]


def test_what_a_sweep_has_not_finished_is_left_out(tmp_path: Path) -> None:
    """Also where the results themselves stand below a folder whose name begins with a dot."""
    results = tmp_path / ".cache" / "results"
    path = write_run(results / "a", {"gqa": HALF}, date="20260101_000000")
    write_run(results / ".partial" / "a@gqa", {"gqa": [0.0] * 4}, date="20260101_000001")
    found = read_results([results])
    assert [source.path for record in found.records for source in record.sources] == [path]
    assert not found.problems


def test_a_task_without_a_score_is_named_with_the_reason(tmp_path: Path) -> None:
    path = write_run(tmp_path, {"gqa": HALF})
    said = json.loads(path.read_text())
    said["results"]["own"] = {"alias": "own", "accuracy,none": 0.5}
    said["results"]["prune_llava"] = {"alias": "prune_llava", " ": " "}
    said["group_subtasks"] = {"prune_llava": ["gqa"], "gqa": [], "own": []}
    path.write_text(json.dumps(said))
    results = read_results([path])
    assert results.ignored == {"own": "its YAML names no metric (metric_list)"}
    assert list(results.records[0].tasks) == ["gqa"]


def as_task(path: Path, name: str, metrics: dict[str, tuple[str, float]]) -> None:
    """Add a task that is none of the benchmarks to a results file: by metric, its aggregation and its value."""
    said = json.loads(path.read_text())
    entries = [{"metric": m, "aggregation": how, "higher_is_better": True} for m, (how, _) in metrics.items()]
    said["results"][name] = {"alias": name, **{f"{m},none": value for m, (_, value) in metrics.items()}}
    said["configs"][name] = {"task": name, "metric_list": entries}
    said["n-samples"][name] = {"effective": 4, "original": 4}
    path.write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({"exact_match": ("mean", 0.25)}, 25.0),
        ({"exact_match": ("mean", 0.25), "submission": ("<function f at 0x7f>", 0.0)}, 25.0),
        ({"exact_match": ("mean", 0.25), "anls": ("mean", 0.5)}, 25.0),
        ({"f1": ("<function f1 at 0x7f>", 0.5), "anls": ("mean", 0.75)}, 75.0),
        ({"f1": ("<function f1 at 0x7f>", 0.5)}, 50.0),
        ({"score": ("mean", 63.0)}, 63.0),
        ({"score": ("mean", -0.5)}, -0.5),
        ({"score": ("mean", True)}, None),
        ({"score": ("mean", None)}, None),
        ({"score": ("mean", float("nan"))}, None),
    ],
)
def test_any_task_with_a_number_is_a_column(
    tmp_path: Path, metrics: dict[str, tuple[str, float]], score: float | None
) -> None:
    path = write_run(tmp_path, {"gqa": HALF})
    name = f"a_task_of_{'_and_'.join(metrics)}_{score}"
    as_task(path, name, metrics)
    results = read_results([path])
    assert not results.problems
    if score is None:
        assert list(results.ignored) == [name]
        assert "no score that is a number (score is " in results.ignored[name]
        assert name not in results.records[0].tasks
        return
    assert not results.ignored
    assert results.records[0].tasks[name].score == score
    assert list(results.records[0].tasks) == ["gqa", name]  # after the ten benchmarks
    assert named(name.upper()) == (name,)


def test_drawn_documents_are_a_setting_and_their_number_is_none(tmp_path: Path) -> None:
    """The tasks of one draw make one row, also where a draw has fewer documents of one; two draws make two rows."""
    draws = {"a": ("gqa", 4, "4 with seed 0"), "b": ("pope", 2, "4 with seed 0"), "c": ("gqa", 4, "4 with seed 1")}
    for folder, (task, limit, sample) in draws.items():
        path = write_run(tmp_path / folder, {task: HALF})
        said = json.loads(path.read_text())
        said["config"]["limit"] = limit
        said["config"]["resolved_cli_args"] = {"sample": sample, "documents": list(range(limit))}
        path.write_text(json.dumps(said))
    records = read_results([tmp_path]).records
    assert sorted((record.settings["sample"], *record.tasks) for record in records) == [
        ("4 with seed 0", "pope", "gqa"),
        ("4 with seed 1", "gqa"),
    ]
    assert all("limit" not in record.settings for record in records)
    assert "# on documents drawn at random" in records[0].sources[0].command
