"""The paper's Table 3 beside what runs cost, in every output of the leaderboard."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.published import published_costs
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

MODEL = "llava-hf/llava-1.5-7b-hf"
DART = str(Schedule.parse("dart-192-measured"))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """An unpruned run and a row of Table 3 by the paper's protocol, and a row that the table does not have."""
    settings = {"positions": "compact", "prompt": "vicuna", "image_aspect": "pad"}
    settings |= {"system_prompt": "None", "chat_template": "None"}
    scores = {"prune_textvqa_ocr": [1.0, 0.0, 1.0, 1.0]}
    for name, schedule in (("none", "none"), ("dart", DART), ("divprune", PRESETS["divprune-64"])):
        folder = tmp_path / "results" / name
        write_run(folder, scores, schedule, tokens=33, model=MODEL, settings=settings)
    return tmp_path / "results"


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """What ``bench --tasks … --json`` prints, of the row alone."""
    row = {"schedule": DART, "cuda_ms": 81.23, "latency_ms": 250.44}
    file = tmp_path / "table3.json"
    content = {"model": "llava-1.5-7b, float16", "clock": "elapsed time on a GPU", "paper": [row]}
    file.write_text(f"a line before it\n{json.dumps(content)}\n", encoding="utf-8")
    return file


def leaderboard(*arguments: Any) -> str:
    done = CliRunner().invoke(app, ["leaderboard", *map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


def page_model(text: str) -> dict[str, Any]:
    script = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert script is not None
    return json.loads(script[1])["models"][0]


def test_csv_has_measured_and_printed_figures(results: Path, bench: Path) -> None:
    text = leaderboard(results, "--bench", bench, "--format", "csv")
    rows = {row["schedule"].split(" (")[0]: row for row in csv.DictReader(io.StringIO(text))}
    dart = rows[DART]
    printed = next(row for row in published_costs() if row.label == "DART 192")
    assert dart["table3_row"] == "DART 192"
    assert (float(dart["table3_tokens"]), float(dart["table3_tokens_published"])) == (33, 192)
    assert float(dart["table3_tflops_published"]) == printed.tflops
    assert float(dart["table3_mib"]) == pytest.approx(0.33)
    assert (float(dart["table3_cuda_ms"]), float(dart["table3_cuda_ms_published"])) == (81.23, printed.cuda_ms)
    assert (float(dart["table3_latency_ms"]), float(dart["table3_latency_ms_published"])) == (250.44, 218.2)
    assert (float(dart["table3_acc"]), float(dart["table3_acc_published"])) == (75.0, printed.acc)
    assert rows["none"]["table3_row"] == "unpruned"
    assert rows["none"]["table3_cuda_ms"] == ""  # it was not timed
    assert rows[PRESETS["divprune-64"]]["table3_row"] == ""


def test_latex_has_a_second_tabular(results: Path, bench: Path) -> None:
    text = leaderboard(results, "--bench", bench, "--format", "latex")
    assert text.count(r"\begin{tabular}") == 2
    (line,) = [line for line in text.splitlines() if "DART 192" in line]
    cells = [cell.strip(" \\") for cell in line.split("&")]
    assert cells[2:4] == ["33", "192"]
    assert cells[8:] == ["81.2", "75.0", "250.4", "218.2", "75.0", "57.0"]
    assert "% Ours: CUDA ms is" in text
    assert "table3.json, llava-1.5-7b, float16, elapsed time on a GPU." in text


@pytest.mark.parametrize("form", ["table", "markdown", "html"])
def test_times_stand_in_every_other_format(form: str, results: Path, bench: Path) -> None:
    text = leaderboard(results, "--bench", bench, "--format", form)
    assert "81.2" in text
    assert "81.2" not in leaderboard(results, "--format", form)


def test_the_page_has_the_table_and_not_the_files_folder(results: Path, bench: Path) -> None:
    table = page_model(leaderboard(results, "--bench", bench, "--format", "html"))["paper_costs"]
    assert table["columns"][-2:] == ["TextVQA", "printed"]
    (dart,) = [line for line in table["lines"] if line[1] == "DART 192"]
    assert dart[-2:] == ["75.0", "57.0"]
    assert any("table3.json" in note for note in table["notes"])
    assert not any(str(bench.parent) in note for note in table["notes"])
    # By the paper's protocol nothing else is to be said.
    assert not any("not comparable" in note for note in table["notes"])


def test_an_accuracy_of_another_protocol_is_named(tmp_path: Path) -> None:
    for name, schedule in (("none", "none"), ("dart", "dart@2:172t")):
        write_run(tmp_path / name, {"textvqa_val": [1.0, 0.0]}, schedule, tokens=33, model=MODEL)
    table = page_model(leaderboard(tmp_path, "--format", "html"))["paper_costs"]
    (note,) = [note for note in table["notes"] if note.startswith("dart@2:172t: its TextVQA is not comparable")]
    for reason in ("task textvqa_val, not prune_textvqa_ocr", "prompt hf, not vicuna", "order=reference"):
        assert reason in note


def test_the_printed_table_is_in_every_format() -> None:
    for form in ("table", "markdown", "latex", "html"):
        assert "162.2" in leaderboard("--published", "--format", form), form
    rows = list(csv.DictReader(io.StringIO(leaderboard("--published", "--format", "csv"))))
    printed = {row["table3_row"]: row["table3_latency_ms_published"] for row in rows if row["table3_row"]}
    assert printed == {row.label: str(row.latency_ms) for row in published_costs()}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "this is not the output of"),
        ("[]", "this is not the output of"),
        ('{"model": "m", "clock": "c", "runs": []}', r"\(KeyError: 'paper'\)"),
        ('{"model": "m", "clock": "c", "paper": []}', "none of its schedules is a row of the paper's Table 3"),
        (
            '{"model": "m", "clock": "c", "paper": [{"schedule": "none", "cuda_ms": -1, "latency_ms": 2}]}',
            "-1 is no time in milliseconds",
        ),
    ],
)
def test_a_file_without_times_is_refused(content: str, message: str, results: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text(content, encoding="utf-8")
    done = CliRunner().invoke(app, ["leaderboard", str(results), "--bench", str(file)])
    assert done.exit_code == 2
    assert "--bench" in done.stderr
    assert re.search(message, done.stderr), done.stderr


def test_a_missing_file_is_refused_and_times_need_results(results: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["leaderboard", str(results), "--bench", str(tmp_path / "none.json")])
    assert (done.exit_code, "No such file" in done.stderr) == (2, True)
    done = CliRunner().invoke(app, ["leaderboard", "--published", "--bench", str(tmp_path / "none.json")])
    assert (done.exit_code, "or --published alone" in done.stderr) == (2, True)
