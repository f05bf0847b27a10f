"""What lmms-eval's command could not save ends it: the folder is tried before weights are loaded, files are read back."""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from faulty_tasks import write_task
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

from lmms_prune.harness import saving
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.saving import SavingError, read_back, refuse_unwritable

# lmms-eval leaves its results file to be closed by itself, and what is in the buffer then to fail unheard.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
STAMP = "20260101_000000"
RESULTS = {"config": {"model": "llava_pruned"}, "results": {"pope": {}}, "filler": "x" * 20000}


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def made(folder: Path | None) -> Any:
    """A tracker as lmms-eval's command makes it, which reads back what it saves."""
    tracker = EvaluationTracker(output_path=None if folder is None else str(folder))
    tracker.general_config_tracker.model_name_sanitized = "tiny"
    refuse_unwritable(tracker)
    read_back(tracker)
    return tracker


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"doc_id": i, "doc": {}, "target": "yes", "arguments": [["a"]], "resps": [["yes"]], "filtered_resps": ["yes"]}
        | {"doc_hash": str(i)}
        for i in range(count)
    ]


def save(tracker: Any, count: int = 3) -> None:
    tracker.save_results_aggregated(results=dict(RESULTS), samples={"pope": rows(count)}, datetime_str=STAMP)
    tracker.save_results_samples(task_name="pope", samples=rows(count))


def test_what_is_saved_whole_is_left_as_it_is(tmp_path: Path) -> None:
    save(made(tmp_path))
    names = [f"{STAMP}_results.json", f"{STAMP}_samples_pope.jsonl"]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == names
    save(made(None))  # without --output_path nothing is saved


@pytest.mark.parametrize("size", [0, 4096])
@pytest.mark.parametrize("length", [20000, 5000])
def test_results_that_do_not_fit_are_named_and_removed(
    tmp_path: Path, size: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RESULTS, "filler", "x" * length)
    tracker = made(tmp_path)
    with little_room(size), pytest.raises(SavingError) as caught:
        save(tracker)
    path = tmp_path / "tiny" / f"{STAMP}_results.json"
    why = r"(File too large|it is cut short, as on a full disk)"
    assert re.match(
        rf"{path} was not saved completely: {why}\. Fix the cause, then run the same command again", str(caught.value)
    )
    assert list((tmp_path / "tiny").iterdir()) == []


def test_samples_that_do_not_fit_are_named_and_removed(tmp_path: Path) -> None:
    with little_room(len(RESULTS["filler"]) + 3000), pytest.raises(SavingError, match=r"_samples_pope\.jsonl was not"):
        save(made(tmp_path), 400)
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [f"{STAMP}_results.json"]


def test_two_runs_of_one_second_do_not_mix(tmp_path: Path) -> None:
    """lmms-eval appends to a samples file that is there: nobody could tell whose answers these are."""
    save(made(tmp_path))
    with pytest.raises(
        SavingError, match=r"_samples_pope\.jsonl was not saved completely: it holds 6 samples, not the 3 of"
    ):
        save(made(tmp_path))
    assert len((tmp_path / "tiny" / f"{STAMP}_samples_pope.jsonl").read_text("utf-8").splitlines()) == 6


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=rf"--output_path {tmp_path}/file/out cannot be written to in .*Not a dir"):
        made(tmp_path / "file" / "out")

    def read_only(**_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(saving.tempfile, "TemporaryFile", read_only)
    for folder, where in ((tmp_path, ""), (tmp_path / "a" / "b", f" in {tmp_path}")):
        message = f"--output_path {folder} cannot be written to{where}: Read-only file system; name another folder."
        with pytest.raises(ArgumentError, match=re.escape(message)):
            made(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


LITTLE_ROOM = """
import resource
def scores(doc, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    return {"exact_match": 1.0}
"""


@pytest.mark.slow
def test_the_command_ends_with_the_files_name(harness, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "little_room", LITTLE_ROOM)
    line = ("--model", "llava_pruned", "--model_args", harness.text("llava", schedule="none"), "--tasks", "little_room")
    run = harness.fork(*line, "--include_path", str(tmp_path / "tasks"))
    assert run.returncode == 2
    assert re.search(
        r"\nlmms-prune: error: \S+_results\.json was not saved completely: (File too large|it is cut short)", run.stderr
    )
    assert run.results is None
    assert not list(run.folder.rglob("*_results.json"))
