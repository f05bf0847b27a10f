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
    arguments = f"pretrained={weights(LLAVA)},device=cpu,dtype=float32,{LLAVA.arguments}"
    model = ["--model", LLAVA.family.model_name, "--model_args", arguments]

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
    message = call("gate", *runs, "--max-drop", "chartqa=1", code=2)
    assert "--max-drop chartqa: unknown benchmark" in message
