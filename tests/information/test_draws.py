"""Documents drawn at random: which they are, and that an evaluation and a measurement see the same ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forking import Forking
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.demo.run import MODELS, weights
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.documents import Draw, document_numbers
from lmms_prune.information.options import DocumentChoice

LLAVA, QWEN = MODELS


def model_options(model: Any) -> list[str]:
    return ["--model", str(weights(model)), "--model-args", f"device=cpu,dtype=float32,{model.arguments}"]


def test_a_draw_is_decided_by_its_seed_and_the_task() -> None:
    units = list(range(500))
    drawn = Draw(40, 1).numbers("pope", units)
    assert drawn == sorted(set(drawn)) == Draw(40, 1).numbers("pope", units)
    assert len(drawn) == 40
    assert drawn != Draw(40, 2).numbers("pope", units)
    assert drawn != Draw(40, 1).numbers("gqa", units)
    assert max(drawn) > 400 > 100 > min(drawn)
    assert set(Draw(10, 1).numbers("pope", units)) < set(drawn)
    assert Draw(500).numbers("pope", units) == units


def test_questions_that_are_scored_together_are_drawn_together() -> None:
    pairs = [f"image {number // 2}" for number in range(60)]
    drawn = Draw(20).numbers("mme", pairs)
    assert {number ^ 1 for number in drawn} == set(drawn)
    with pytest.raises(
        ArgumentError, match=r"7 documents cannot be drawn from mme, .* 2 questions together; use a multiple"
    ):
        Draw(7).numbers("mme", pairs)
    uneven = [0, 0, 0, 1, 2, 2, 3, 3, 3, 3]
    drawn = Draw(6).numbers("mmbench_en_dev_static", uneven)
    assert 0 < len(drawn) <= 6
    assert all(uneven.count(uneven[n]) == sum(uneven[m] == uneven[n] for m in drawn) for n in drawn)


def test_more_than_a_task_has_is_refused() -> None:
    with pytest.raises(ArgumentError, match="9 documents cannot be drawn from pope, which has 8"):
        Draw(9).numbers("pope", range(8))


@pytest.fixture
def here(data: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process finds the local benchmarks, and keeps what it reads of them away from the user's cache."""
    monkeypatch.chdir(data)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(Path(environment["HF_HOME"]) / "datasets"))


@pytest.mark.usefixtures("here")
def test_numbers_of_the_local_benchmarks() -> None:
    tasks = ["mme", "pope", "mmbench_cn_dev_static"]
    choice = DocumentChoice(tasks, draw=Draw(4))
    numbers = choice.numbers("llava_pruned")
    assert set(numbers) == set(tasks)
    assert {number ^ 1 for number in numbers["mme"]} == set(numbers["mme"])
    documents = choice.documents("llava_pruned")
    assert [(one.task, one.number) for one in documents] == [(task, n) for task in tasks for n in numbers[task]]
    assert document_numbers(["pope"], "llava_pruned", limit=3) == {"pope": [0, 1, 2]}
    assert set(choice.smaller(2).numbers("llava_pruned")["pope"]) < set(numbers["pope"])


@pytest.mark.slow
def test_scores_and_information_are_of_the_drawn_documents(data: Path, forking: Forking, tmp_path: Path) -> None:
    """MME's pairs stay whole, the numbers are recorded, and the leaderboard keeps draws apart."""
    command = ["horizon", *model_options(QWEN), "--tasks", "mme", "--sample", "4", "--sample-seed", "1", "--json"]
    command += ["--information-limit", "2", "--methods", "dart;order=reference,random", "--keeps", "8t"]
    command += ["--out", str(tmp_path), "--launch", forking.launch]
    done = forking.run("lmms-prune", *command, cwd=data)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert (printed["sample"], printed["sample_seed"]) == (4, 1)
    [task] = printed["tasks"]
    assert (task["units"], task["measured"]) == (2, 2)
    recorded = json.loads((tmp_path / "documents.json").read_text())
    numbers = recorded["documents"]["mme"]
    assert (recorded["sample"], recorded["sample_seed"], len(numbers)) == (4, 1, 4)
    results = sorted(tmp_path.rglob("*_results.json"))
    assert len(results) == 1 + 12 + 11 + 12  # DART cannot act at layer 0
    for path in results:
        content = json.loads(path.read_text())
        assert content["config"]["resolved_cli_args"]["documents"] == numbers
        assert content["config"]["resolved_cli_args"]["sample"] == "4 with seed 1"
        assert content["n-samples"]["mme"]["effective"] == 4
        samples = path.with_name(path.name.replace("_results.json", "_samples_mme.jsonl")).read_text().splitlines()
        assert [json.loads(line)["doc_id"] for line in samples] == numbers
    measured = {int(path.stem) for path in tmp_path.rglob("*.parquet")}
    assert len(measured) == 2
    assert measured < set(numbers)
    methods = (tmp_path / "methods-mme.csv").read_text()
    assert methods.count("dart;order=reference,") == 11
    assert ",8t," in methods
    assert (tmp_path / "horizons.png").stat().st_size > 5000
    done = forking.run("lmms-prune", "leaderboard", str(tmp_path / "runs" / "none"), "--format", "json", cwd=data)
    [row] = json.loads(done.stdout)["models"][0]["budgets"][0]["rows"]
    assert row["runs"][0]["settings"]["sample"] == "4 with seed 1"
    assert "documents drawn at random" in row["runs"][0]["files"][0]["command"]


@pytest.mark.slow
def test_parts_and_several_processes_give_what_one_gives(data: Path, forking: Forking, tmp_path: Path) -> None:
    def call(out: str, *options: str, command: str = "information") -> dict[str, Any]:
        words = [command, *model_options(LLAVA), "--tasks", "pope", "--limit", "5", "--out", str(tmp_path / out)]
        done = forking.run("lmms-prune", *words, "--block", "6", "--json", *options, cwd=data)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    some = ("--layers", "3,8", "--pictures", "0")
    whole = call("whole", *some)
    assert call("parts", *some, "--shard", "1/2") == {
        "out": str(tmp_path / "parts"),
        "shard": "1/2",
        "samples": 3,
        "of": 5,
    }
    assert len(list((tmp_path / "parts").rglob("*.parquet"))) == 3
    assert call("parts", *some, "--shard", "2/2")["samples"] == 2
    assert call("parts", *some)["layers"] == whole["layers"]
    assert call("processes", *some, "--launch", "torchrun --standalone --nproc_per_node 2")["layers"] == whole["layers"]
    launched = ("--launch", forking.launch)
    first = call("horizon", "--shard", "1/2", *launched, command="horizon")
    assert (first["shard"], first["schedules"], first["samples"]) == ("1/2", 7, 3)
    assert len(list((tmp_path / "horizon").rglob("*_results.json"))) == 7
    call("horizon", "--shard", "2/2", *launched, command="horizon")
    files = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "horizon").rglob("*") if path.suffix in (".parquet",)
    }
    files |= {path: path.stat().st_mtime_ns for path in (tmp_path / "horizon").rglob("*_results.json")}
    assert len(files) == 13 + 5
    call("horizon", *launched, command="horizon")
    assert {path: path.stat().st_mtime_ns for path in files} == files
    scores = call("scores", "--scores-only", *launched, command="horizon")
    assert scores["tasks"][0]["by_information"] is None
    assert not list((tmp_path / "scores").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "4", "--limit", "4"], "--sample 4 and --limit 4: the first draws documents at random"),
        (["--sample-seed", "4"], "--sample-seed 4: nothing is drawn; give --sample too"),
        (["--keeps", "0t"], "write ratios above 0 and up to 1, or numbers of tokens"),
        (["--keeps", "0.1,t"], "write ratios above 0 and up to 1, or numbers of tokens"),
        (["--methods", "dart;order=randomly"], "--methods dart;order=randomly: "),
        (["--methods", "dart;ordre=stable"], "Did you mean 'order'"),
        (["--methods", "dart@2:0.5"], "write the method without layer and keep"),
        (["--methods", "information;of=x"], "leave ;of=x out"),
        (["--scores-only", "--methods", "information"], "--scores-only measures none"),
        (["--scores-only", "--information-limit", "3"], "there is nothing to limit"),
        (["--scores-only", "--information", "elsewhere"], "--information elsewhere and --scores-only"),
        (["--information-limit", "3", "--limit", "2"], "only 2 documents of each task are evaluated"),
        (["--information-limit", "2", "--methods", "information"], "needs the information of every evaluated document"),
        (["--shard", "3/2"], "--shard 3/2: write the part and the number of parts"),
        (["--scores-only", "--wrapper", "llava"], "--wrapper llava is unknown"),
        (["--sample", "9"], "9 documents cannot be drawn from pope, which has 8"),
    ],
)
@pytest.mark.usefixtures("here")
def test_impossible_requests_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    model = [] if "--wrapper" in options else model_options(LLAVA)
    done = CliRunner().invoke(app, ["horizon", *model, "--tasks", "pope", "--out", str(tmp_path / "x"), *options])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sample", "4", "--limit", "4"], "--sample 4 and --limit 4: the first draws documents at random"),
        (["--sample-seed", "4"], "--sample-seed 4: nothing is drawn; give --sample too"),
        (["--sample", "5"], "--sample 5: as many others are needed to verify on."),
        (["--sample", "9"], "9 documents cannot be drawn from pope, which has 8"),
        (["--limit", "5"], "pope has 8 documents, 10 are needed: half to choose on and half to verify. Use --limit 4"),
    ],
)
@pytest.mark.usefixtures("here")
def test_calibrate_refuses_what_leaves_nothing_to_verify_on(options: list[str], message: str, tmp_path: Path) -> None:
    words = ["calibrate", *model_options(LLAVA), "--tasks", "pope", "--budget", "0.5", "--out", str(tmp_path / "x")]
    done = CliRunner().invoke(app, [*words, *options])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("here")
def test_a_launcher_that_does_not_exist_is_named(tmp_path: Path) -> None:
    words = [
        "information",
        *model_options(LLAVA),
        "--tasks",
        "pope",
        "--out",
        str(tmp_path),
        "--launch",
        "nolauncher 3",
    ]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "--launch nolauncher 3: nolauncher: No such file" in done.stderr
