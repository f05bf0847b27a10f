"""Samples a second: what is run, and what is made of the times; the processes themselves are too slow for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmms_prune.bench import throughput
from lmms_prune.bench.models import BenchError
from lmms_prune.cli import app


def measured(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], samples: int = 4, documents: int = 100
) -> list[throughput.Throughput]:
    """With processes that take 10 seconds to start and `seconds` for each sample, by lmms-eval's model."""

    def run(options: list[str], include: Path, folder: Path | None) -> tuple[float, int]:
        model, limit = options[options.index("--model") + 1], int(options[options.index("--limit") + 1])
        answered = min(limit, documents)
        return 10 + answered * seconds[model], answered

    monkeypatch.setattr(throughput, "_run", run)
    arguments = (
        "llava_pruned",
        "pretrained=x,dtype=float32",
        ["none", "vtw@3"],
        "16",
        "pope",
        samples,
        2,
        "cpu",
        Path(),
    )
    return throughput.measure_throughput(*arguments, lambda line: None)


def test_the_start_of_a_process_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, {"llava_hf": 0.5, "llava_pruned": 0.125})
    assert [(one.name, one.batch_size) for one in found] == [
        ("llava_hf", "1"),
        ("llava_pruned, none", "16"),
        ("llava_pruned, vtw@3", "16"),
    ]
    assert [one.per_second for one in found] == pytest.approx([2, 8, 8])
    assert [one.seconds for one in found] == pytest.approx([4, 1, 1])


def test_too_few_samples_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BenchError, match="--limit 4: too few documents to time llava_hf"):
        measured(monkeypatch, {"llava_hf": 0.0, "llava_pruned": 0.1})


def test_a_task_of_fewer_documents_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is asked for they would seem faster than they are."""
    with pytest.raises(BenchError, match=r"pope has 11 documents, .*; use --limit 3 or less"):
        measured(monkeypatch, {"llava_hf": 0.5, "llava_pruned": 0.1}, documents=11)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model-args", "dtype=float32"], "give --model FOLDER, or --demo"),
        (["--model", "x", "--demo"], "give --model FOLDER, or --demo"),
        (["--demo", "--model-args", "dtype=float32"], "the demo's model has its own; leave it out"),
        (["--demo", "--tasks", "pope,mme"], "--tasks pope,mme: one task is timed; name one"),
        (["--model", "x"], "pretrained=x is no checkpoint"),
        (["--demo", "--wrapper", "clip"], "--wrapper clip is unknown. Known: llava_next_pruned, llava_pruned"),
        (
            ["--demo", "--wrapper", "qwen2_vl_pruned"],
            "the demo has a checkpoint of llava_pruned or qwen2_5_vl_pruned only",
        ),
        (["--demo", "--schedule", "fastvv@2:0.5"], "Did you mean 'fastv'?"),
        (["--demo", "--schedule", "none", "--schedule", "dart@12:0.3"], "whose layers are 0 to 11"),
        (["--demo", "--schedule", "dart@1:20t,random@3:0.9"], "keeps 130 of the 20 tokens"),
        (["--demo", "--batch-size", "0"], "--batch-size 0: write a number of at least 1, or auto"),
    ],
)
def test_what_cannot_be_timed_is_said(options: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any evaluation has run."""

    def never(*_: object) -> None:
        raise AssertionError("an evaluation was started")

    monkeypatch.setattr(throughput, "_run", never)
    result = CliRunner().invoke(app, ["bench-throughput", *options])
    assert result.exit_code == 2
    assert said in result.stderr
