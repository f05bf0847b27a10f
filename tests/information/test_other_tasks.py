"""Tasks that are none of the ten benchmarks, through the commands: OCR-VQA, whose score is the mean of one metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forking import Forking

from lmms_prune.demo.run import MODELS, weights
from lmms_prune.harness.tasks import equal_after_normalisation, one_row_per_question

LLAVA, _ = MODELS
TASK = "ocrvqa_test"


@pytest.mark.parametrize(
    ("answer", "given", "score"),
    [
        ("The Art of Cooking", "art of cooking.", 1.0),
        ("two", "2", 1.0),
        ("No", "no", 1.0),
        ("Cooking", "cooking books", 0.0),
        ("Cooking", "", 0.0),
    ],
)
def test_an_answer_must_be_equal_after_normalisation(answer: str, given: str, score: float) -> None:
    assert equal_after_normalisation({"answer": answer}, [given]) == {"exact_match": score}


def test_each_question_is_a_row(data: Path) -> None:
    from datasets import load_dataset

    [file] = (data / "howard-hou" / "OCR-VQA").rglob("test-*.parquet")
    pairs = load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(data.parent / "spread"))
    single = one_row_per_question(pairs)
    assert single.column_names == ["image", "question", "answer"]
    assert len(single) == 2 * len(pairs) == 8
    for number, row in enumerate(single):
        whole = pairs[number // 2]
        assert (row["question"], row["answer"]) == (whole["questions"][number % 2], whole["answers"][number % 2])
        assert row["image"].tobytes() == whole["image"].tobytes()


@pytest.mark.slow
def test_the_commands_take_it(data: Path, forking: Forking, tmp_path: Path) -> None:
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    model = ["--model", weights(LLAVA), "--model-args", arguments]

    def call(*words: Any, code: int = 0) -> str:
        done = forking.run("lmms-prune", *words, cwd=data)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stdout + done.stderr

    out = tmp_path / "horizon"
    words = ["horizon", *model, "--tasks", f"pope,{TASK}", "--sample", "4", "--information-limit", "2", "--block", "6"]
    printed = json.loads(call(*words, "--out", out, "--launch", forking.launch, "--json").splitlines()[-1])
    assert [(task["task"], task["units"], task["measured"]) for task in printed["tasks"]] == [
        ("pope", 4, 2),
        (TASK, 4, 2),
    ]
    runs = [str(out / "runs" / name) for name in ("none", "vtw@00")]
    board = json.loads(call("leaderboard", *runs, "--format", "json"))
    [table] = board["models"]
    assert table["tasks"] == ["pope", TASK]
    assert board["ignored"] == []
    rows = {row["label"]: row for budget in table["budgets"] for row in budget["rows"]}
    for name, row in rows.items():
        [results] = (out / "runs" / ("none" if name == "none" else "vtw@00") / TASK).rglob("*_results.json")
        score = json.loads(results.read_text())["results"][TASK]["exact_match,none"]
        assert row["cells"][TASK]["score"] == pytest.approx(100 * score)
        assert not row["faults"]
    assert rows["vtw@0"]["cells"][TASK]["comparison"]["units"] == 4
    assert TASK in call("leaderboard", *runs, "--benchmarks", TASK, "--format", "markdown")
    call("leaderboard", *runs, "--out", tmp_path / "page.html", "--format", "html")
    lost = rows["none"]["cells"][TASK]["score"] - rows["vtw@0"]["cells"][TASK]["score"]
    verdict = call("gate", *runs, "--schedule", "vtw@0", "--max-drop", f"{TASK}=1", code=1 if lost > 1 else 0)
    assert TASK in verdict
    message = call("gate", *runs, "--max-drop", "no_such_task=1", code=2)
    assert "--max-drop no_such_task: unknown benchmark" in message


@pytest.mark.slow
def test_calibrate_takes_it_on_drawn_documents(data: Path, forking: Forking, tmp_path: Path) -> None:
    """The documents that verify are others than those that choose, and both are recorded in every file."""
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    command = ["calibrate", "--model", weights(LLAVA), "--model-args", arguments, "--tasks", TASK]
    command += ["--budget", "0.5", "--methods", "dart", "--compare", "random@1:?", "--block", "6"]
    command += ["--sample", "3", "--sample-seed", "1", "--out", str(tmp_path), "--launch", forking.launch, "--json"]
    done = forking.run("lmms-prune", *command, cwd=data)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert (printed["sample"], printed["sample_seed"], printed["tasks"]) == (3, 1, [TASK])
    assert "limit" not in printed
    recorded = json.loads((tmp_path / "documents.json").read_text())
    chosen, verified = recorded["chosen"][TASK], recorded["verified"][TASK]
    assert (recorded["size"], recorded["seed"], len(chosen), len(verified)) == (3, 1, 3, 3)
    assert not {*chosen} & {*verified}
    assert {int(path.stem) for path in tmp_path.rglob("*.parquet")} == {*chosen}
    for half, numbers, drawn in (
        ("chosen", chosen, "3 with seed 1"),
        ("verified", verified, "3 others of 6 with seed 1"),
    ):
        files = sorted((tmp_path / half).rglob("*_results.json"))
        assert len(files) >= 3
        for path in files:
            content = json.loads(path.read_text())
            assert content["config"]["resolved_cli_args"]["sample"] == drawn
            samples = path.with_name(path.name.replace("_results.json", f"_samples_{TASK}.jsonl")).read_text()
            assert [json.loads(line)["doc_id"] for line in samples.splitlines()] == numbers


@pytest.mark.slow
def test_a_guide_is_taken_by_horizon_and_information(data: Path, forking: Forking, tmp_path: Path) -> None:
    """SGL with a second checkpoint as its guide, alone at every layer and for the information that it keeps."""
    guide = f"sgl;guide={weights(LLAVA)};new_tokens=2"
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    common = ["--model", weights(LLAVA), "--model-args", arguments, "--tasks", TASK, "--limit", "1"]
    common += ["--methods", guide, "--keeps", "30t", "--block", "6", "--json"]
    out = tmp_path / "horizon"
    alone = ["--scores-only", "--out", str(out), "--launch", forking.launch]
    done = forking.run("lmms-prune", "horizon", *common, *alone, cwd=data)
    assert done.returncode == 0, done.stderr
    lines = (out / f"methods-{TASK}.csv").read_text().splitlines()[1:]
    assert [line.split(",")[:3] for line in lines] == [[guide, str(layer), "30t"] for layer in range(12)]
    [results] = (out / "runs").glob(f"sgl@05*/{TASK}/**/*_results.json")
    [run] = json.loads(results.read_text())["config"]["batch_sizes"]
    assert run["schedule"] == f"sgl@5:30t;guide={weights(LLAVA)};new_tokens=2"
    out = tmp_path / "information"
    done = forking.run("lmms-prune", "information", *common, "--layers", "0,6", "--out", str(out), cwd=data)
    assert done.returncode == 0, done.stderr
    kept = (out / "kept.csv").read_text().splitlines()[1:]
    assert sum(guide in line for line in kept) == 2  # layers
