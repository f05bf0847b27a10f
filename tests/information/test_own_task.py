"""A user's own task from its YAML and 24 images to leaderboard, gate, horizon and calibrate, by the commands."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from forking import Forking
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.demo import content, questions
from lmms_prune.demo.pictures import draw
from lmms_prune.demo.run import MODELS, weights

LLAVA, _ = MODELS
TASK = """task: own_scenes
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/own.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function own_functions.image
doc_to_text: !function own_functions.text
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 4
process_results: !function own_functions.scores
metric_list:
  - metric: found
    aggregation: {aggregation}
    higher_is_better: true
"""
FUNCTIONS = """
import os
from PIL import Image

def image(doc):
    return [Image.open(os.path.join(os.path.dirname(__file__), doc["image"])).convert("RGB")]

def text(doc):
    return doc["question"] + "\\nAnswer the question using a single word or phrase."

def scores(doc, results):
    return {"found": LOGGED}

def everything(results):
    return 0.5
"""


def write_own(
    folder: Path, aggregation: str = "mean", logged: str = "float(doc['answer'] in results[0].lower())"
) -> Path:
    """Write 24 images with questions, their JSONL file, and the task that reads it."""
    (folder / "images").mkdir(parents=True)
    rng, lines = random.Random(24), []
    for number in range(24):
        scene = content.scene(rng, "test")
        asked = questions.about(rng, scene, "test")
        draw(rng, scene).image.save(folder / "images" / f"{number}.png")
        lines.append({"image": f"images/{number}.png", "question": asked.question, "answer": asked.answer.lower()})
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "own_scenes.yaml").write_text(TASK.format(folder=folder, aggregation=aggregation))
    (folder / "own_functions.py").write_text(FUNCTIONS.replace("LOGGED", logged))
    return folder


@pytest.mark.slow
def test_a_jsonl_task_goes_from_its_yaml_to_leaderboard_gate_horizon_and_calibrate(
    forking: Forking, tmp_path: Path
) -> None:
    own = write_own(tmp_path / "own")
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    model = ["--model", weights(LLAVA), "--model-args", arguments]

    def call(*words: Any, code: int = 0) -> str:
        done = forking.run("lmms-prune", *words, cwd=tmp_path)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + (done.stderr if code else "")

    out = tmp_path / "horizon"
    words = [
        "horizon",
        *model,
        "--tasks",
        "own_scenes",
        "--include-path",
        own,
        "--information-limit",
        "2",
        "--block",
        "6",
    ]
    printed = json.loads(call(*words, "--out", out, "--launch", forking.launch, "--json").splitlines()[-1])
    [horizon] = printed["tasks"]
    assert (horizon["task"], horizon["units"]) == ("own_scenes", 24)
    assert 0 < horizon["layer"] <= 12
    runs = [str(out / "runs" / name) for name in ("none", "vtw@00")]
    board = json.loads(call("leaderboard", *runs, "--format", "json", "--count", "own_scenes"))
    [table] = board["models"]
    rows = {row["label"]: row for budget in table["budgets"] for row in budget["rows"]}
    full, removed = (rows[name]["cells"]["own_scenes"] for name in ("none", "vtw@0"))
    assert full["score"] > 50 > removed["score"]
    assert removed["comparison"]["units"] == 24
    assert removed["comparison"]["verdict"] == "worse than unpruned"
    assert rows["vtw@0"]["rel"] == pytest.approx(100 * removed["score"] / full["score"])
    page = call("leaderboard", *runs, "--format", "html")
    assert "own_scenes" in page
    gate = ["gate", *runs, "--include-path", own, "--schedule", "vtw@0"]
    verdict = call(*gate, "--max-drop", "own_scenes=2", "--significant", code=1)
    assert "own_scenes, drop" in verdict
    call(*gate, "--min-rel", "2", "--count", "own_scenes", code=0 if removed["score"] else 1)
    out = tmp_path / "calibration"
    words = [
        "calibrate",
        *model,
        "--tasks",
        "own_scenes",
        "--include-path",
        own,
        "--budget",
        "0.5",
        "--methods",
        "dart",
    ]
    words += ["--limit", "8", "--block", "6", "--out", out, "--launch", forking.launch, "--json"]
    proposal = json.loads(call(*words).splitlines()[-1])
    assert proposal["tasks"] == ["own_scenes"]
    assert proposal["verified"]["low"] <= proposal["verified"]["value"] <= proposal["verified"]["high"]


@pytest.mark.slow
def test_a_task_without_a_score_of_each_document_is_refused_before_anything_runs(
    forking: Forking, tmp_path: Path
) -> None:
    own = write_own(tmp_path / "own", "!function own_functions.everything", "results[0]")
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    words = ["horizon", "--model", weights(LLAVA), "--model-args", arguments, "--tasks", "own_scenes"]
    done = forking.run("lmms-prune", *words, "--include-path", own, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "'own_scenes' has no score of each document" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def write_samples(folder: Path, answers: bool) -> Path:
    """Twelve samples of the JSONL file, as `calibrate --data` takes them."""
    own = write_own(folder)
    lines = [json.loads(line) for line in (own / "own.jsonl").read_text().splitlines()[:12]]
    for line in lines:
        line["question"] += "\nAnswer the question using a single word or phrase."
        answer = line.pop("answer")
        if answers:
            line["answers"] = [answer, "another"]
    path = own / "Own data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("answers", [True, False])
def test_calibrate_takes_own_data_with_answers_or_without(forking: Forking, tmp_path: Path, answers: bool) -> None:
    data, out = write_samples(tmp_path / "own", answers), tmp_path / "calibration"
    arguments = f"device=cpu,dtype=float32,{LLAVA.arguments}"
    words = ["calibrate", "--model", weights(LLAVA), "--model-args", arguments, "--data", data]
    words += ["--budget", "ttft@h100=97%", "--methods", "dart", "--block", "6", "--out", out]
    done = forking.run("lmms-prune", *words, "--launch", forking.launch, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    proposal = json.loads(done.stdout.splitlines()[-1])
    assert proposal["tasks"] == ["own_data_own_data"]
    assert (proposal["data"], proposal["limit"]) == ("Own data.jsonl", 6)
    assert proposal["scored_by"] == ("answers" if answers else "agreement with the unpruned model")
    assert "?" not in proposal["schedule"]
    [none] = (out / "verified" / "runs" / "none").rglob("*_results.json")
    score = json.loads(none.read_text())["results"]["own_data_own_data"]["exact_match,none"]
    assert score > 0.5 if answers else score == 1.0
    # The written configuration runs by itself: it names the folder of the task.
    config = yaml.safe_load(Path(proposal["yaml"]).read_text())
    assert Path(config["include_path"], "own_data_own_data.yaml").is_file()


@pytest.mark.parametrize(
    ("change", "words", "reason"),
    [
        (lambda lines: lines[2].pop("answers"), (), "line 3: has no 'answers', though other samples have"),
        (lambda lines: lines[2].update(answers=[]), (), "line 3: 'answers' is []"),
        (lambda lines: lines[2].update(answers=["a", ""]), (), "none of them empty"),
        (lambda lines: lines[2].update(answer="a"), (), "'answers' and 'answer' are both given"),
        (lambda lines: lines[2].update(image="no.png"), (), "no.png does not exist"),
        (lambda lines: lines.clear(), (), "holds no sample"),
        (lambda lines: lines.__delitem__(slice(3, None)), (), "holds 3 samples, 4 are needed"),
        (
            lambda lines: None,
            ("--limit", "7"),
            "14 are needed: half to choose on and half to verify. Use --limit 6 or less.",
        ),
        (lambda lines: None, ("--tasks", "pope"), "give --tasks, the benchmarks to choose on, or --data"),
        (lambda lines: None, ("--sample", "4"), "--sample 4: it belongs to --tasks"),
    ],
)
def test_bad_own_data_is_refused_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, words: tuple[str, ...], reason: str
) -> None:
    def load(*args: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("lmms_prune.calibration.hybrid.load_unpruned", load)
    data = write_samples(tmp_path / "own", True)
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    change(lines)
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = CliRunner().invoke(
        app, ["calibrate", "--data", str(data), "--budget", "0.5", *words], env={"COLUMNS": "400"}
    )
    assert done.exit_code == 2
    assert reason in " ".join(done.output.split())


def test_neither_tasks_nor_data_is_refused() -> None:
    done = CliRunner().invoke(app, ["calibrate", "--budget", "0.5"], env={"COLUMNS": "400"})
    assert done.exit_code == 2
    assert "give --tasks, the benchmarks to choose on, or --data" in " ".join(done.output.split())
