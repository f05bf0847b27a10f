"""The page as a file: what it holds, what it leaves out, and how large it may become."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import HOSTILE, board, give_images, rewrite, write_small
from PIL import Image
from qwen_vl_utils.vision_process import to_rgb
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.page import changes
from lmms_prune.leaderboard.page.data import commands
from lmms_prune.leaderboard.page.pictures import Pictured, PicturesError, Wanted, pictures, seen
from lmms_prune.leaderboard.page.render import html
from lmms_prune.record.bitmaps import decode, encode

TASKS = (
    *("mme", "scienceqa_img", "pope", "textvqa_val", "mmbench_en_dev_static", "mmbench_cn_dev_static"),
    *("gqa", "infovqa_val", "docvqa_val", "ocrbench"),
)


def held(page: str) -> dict[str, Any]:
    """The page's data."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_nothing_is_fetched_and_nothing_is_html(tmp_path: Path) -> None:
    write_small(tmp_path)
    page = html(board(tmp_path))
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("<img") == 0
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    assert all(f"{part} 'none'" in page for part in ("default-src", "base-uri", "form-action"))
    asked = [one["question"] for one in held(page)["changes"]["documents"]]
    # Half of a surrogate pair cannot be written into any file.
    assert {f"question {text}".replace("\ud83d", "?") for text in HOSTILE} <= set(asked)


def test_a_change_has_question_answers_reference_and_kept_tokens(tmp_path: Path) -> None:
    write_small(tmp_path)
    said = held(html(board(tmp_path)))
    model = said["models"][1]
    assert (model["title"], [task["name"] for task in model["tasks"]]) == ("tiny-llava", ["MME", "GQA"])
    hybrid = [row["schedule"] for row in model["rows"]].index("dart@2:0.44,random@3:0.07")
    row = model["rows"][hybrid]
    assert row["stages"] == ["dart@2:0.44", "random@3:0.07"]
    assert row["flips"] == {"mme": [2, 0], "gqa": [2, 0]}
    cards = [one for one in said["changes"]["cards"] if (one["model"], one["row"]) == (1, hybrid)]
    found = {(said["changes"]["documents"][one["document"]]["task"], one["worse"]) for one in cards}
    assert found == {("mme", True), ("gqa", True)}
    card = next(one for one in cards if said["changes"]["documents"][one["document"]]["id"] == 0)
    assert (decode(card["bitmaps"][0][0], tuple(card["grids"][0])) == (np.arange(100).reshape(10, 10) < 33)).all()
    assert not said["changes"]["pictured"]


def test_what_is_left_out_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "MOST", 3)
    write_run(tmp_path / "a", {"gqa": [1.0] * 30 + [0.0] * 30})
    for name, schedule, lost in (("b", "dart@2:0.3", 20), ("c", "fastv@2:0.3", 5)):
        write_run(
            tmp_path / name, {"gqa": [0.0] * lost + [1.0] * (30 - lost) + [1.0] * 2 + [0.0] * 28}, schedule, tokens=30
        )
    said = held(html(board(tmp_path)))
    assert [row["flips"] for row in said["models"][0]["rows"]] == [{}, {"gqa": [5, 2]}, {"gqa": [20, 2]}]
    ids = [
        (one["row"], one["worse"], said["changes"]["documents"][one["document"]]["id"])
        for one in said["changes"]["cards"]
    ]
    # The documents on which both rows changed, before those of one.
    assert sorted(ids) == sorted(
        (row, worse, i) for row in (1, 2) for worse, i in [(True, 0), (True, 1), (True, 2), (False, 30), (False, 31)]
    )
    monkeypatch.setattr(changes, "ROOM", 500)
    some = held(html(board(tmp_path)))["changes"]["cards"]
    assert 0 < len(some) < len(ids)


def test_texts_are_cut(tmp_path: Path) -> None:
    for name, value, schedule in (("a", 1.0, "none"), ("b", 0.0, "dart@2:0.3")):
        write_run(tmp_path / name, {"gqa": [value, 1.0]}, schedule, tokens=30)
        (samples,) = (tmp_path / name).rglob("*.jsonl")
        rewrite(samples, {0: "x" * 5000})
    (document,) = held(html(board(tmp_path)))["changes"]["documents"]
    assert all(
        len(document[name]) == changes.LONGEST and document[name].endswith("…")
        for name in ("question", "reference", "before")
    )


@pytest.mark.slow
def test_a_page_of_forty_rows_and_ten_benchmarks_is_below_6_mb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts, thirty stages, five seeds, and images that do not compress."""
    chance = np.random.default_rng(0)
    stages = ",".join(f"fastv@{layer}:{1 - layer / 40}" for layer in range(1, 31))
    schedules = ["none", *(f"dart@2:0.{number}" for number in range(10, 47)), stages, *["random@2:0.5"] * 5]
    places = [[encode(chance.random((24, 24)) < 0.5)] for _ in range(30)]
    texts = {i: "what is it? " * 60 + str(i) for i in range(12)}
    for number, schedule in enumerate(schedules):
        values = {task: (chance.random(12) < 0.5).astype(float).tolist() for task in TASKS}
        seed = number if schedule.startswith("random") else 0
        write_run(tmp_path / str(number), values, schedule, tokens=50, seed=seed)
        for samples in (tmp_path / str(number)).rglob("*_samples_*.jsonl"):
            lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
            for said in lines:
                said["input"] = texts[said["doc_id"]]
                if schedule != "none":
                    said["token_counts"][0] |= {
                        "visual_grids": [[24, 24]],
                        "token_bitmaps": places[: schedule.count("@")],
                    }
            samples.write_text("".join(json.dumps(said) + "\n" for said in lines), encoding="utf-8")
    give_images(monkeypatch)
    made = board(tmp_path)
    (model,) = made.models
    assert (len(model.rows), len(model.tasks)) == (40, 10)
    page = html(made, images=True)
    said = held(page)
    assert 2_000_000 < len(page.encode()) < 6_000_000
    row = next(row for row in said["models"][0]["rows"] if len(row["seeds"]) == 5)
    assert len(row["commands"]) == 5
    # Some images found no room; every row and benchmark with a change is there with one.
    missing = [one for one in said["changes"]["documents"] if None in one["images"]]
    assert 0 < len(missing) < len(said["changes"]["documents"])
    there = {(one["row"], said["changes"]["documents"][one["document"]]["task"]) for one in said["changes"]["cards"]}
    turned = [row["flips"] for row in said["models"][0]["rows"]]
    assert there == {(i, task) for i, flips in enumerate(turned) for task, many in flips.items() if any(many)}
    assert len(there) > 300
    assert len(said["changes"]["cards"]) < sum(sum(many) for flips in turned for many in flips.values())


def test_runs_of_single_tasks_become_one_command() -> None:
    line = "lmms-eval --model llava_pruned --model_args 'schedule=dart@2:?,seed={seed}' --tasks {task} --output_path /r/x/{task} --log_samples"
    made = commands(line.format(task=task, seed=seed) for seed in (0, 1) for task in ("gqa", "pope"))
    assert made == [
        f"lmms-eval --model llava_pruned --model_args 'schedule=dart@2:?,seed={seed}' --log_samples --tasks gqa,pope --output_path /r/x"
        for seed in (0, 1)
    ]
    assert commands(["lmms-eval --tasks a --limit 4"]) == ["lmms-eval --limit 4 --tasks a"]


@pytest.mark.parametrize(("view", "size"), [("crop", (40, 40)), ("pad", (100, 100)), ("whole", (100, 40))])
def test_images_are_those_that_the_model_sees(view: str, size: tuple[int, int]) -> None:
    image = Image.new("RGB", (100, 40), "red")
    image.paste("blue", (40, 0, 60, 40))
    made = seen(image, view)
    assert made.size == size
    assert made.getpixel((size[0] // 2, size[1] // 2)) == (0, 0, 255)
    assert made.getpixel((0, size[1] // 2)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "PA", "P", "CMYK", "I;16", "L", "1"])
def test_transparent_pixels_are_white_where_they_are_for_the_model(mode: str) -> None:
    image = Image.new("RGBA", (6, 4), (200, 10, 30, 255))
    image.paste((0, 0, 255, 60), (0, 0, 3, 2))
    image = image.quantize(4) if mode in ("P", "PA") else image.convert("I" if mode == "I;16" else mode)
    image = image.convert(mode)
    assert seen(image, "whole").tobytes() == to_rgb(image).tobytes()
    opaque = seen(image, "opaque").tobytes()
    assert opaque == image.convert("RGB").tobytes()
    assert (opaque != to_rgb(image).tobytes()) == (mode == "RGBA")


def call(*args: object):
    return CliRunner().invoke(app, [str(one) for one in args])


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    write_small(tmp_path / "results")
    done = call(
        "leaderboard", tmp_path / "results", "--format", "html", "--out", tmp_path / "page.html", "--resamples", 200
    )
    assert (done.exit_code, done.stdout) == (0, "")
    assert len(held((tmp_path / "page.html").read_text(encoding="utf-8"))["models"]) == 2
    done = call("leaderboard", "--published", "--format", "html")
    assert done.exit_code == 0
    assert len(held(done.stdout)["models"]) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--images"], "--images belongs to the page: --format html, not table."),
        (["--format", "html", "--out", "/no/such/folder/page.html"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_options_are_refused(args: list[str], message: str, tmp_path: Path) -> None:
    done = call("leaderboard", tmp_path, *args)
    assert done.exit_code == 2
    assert message in done.stderr


@pytest.mark.slow
def test_only_the_documents_that_were_evaluated_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_prune.harness import documents

    message = {"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (90, 60), "red")}]}
    document = documents.Document("textvqa_val", "validation", 3, {"answers": ["a", "b", "b"]}, "answer", [message])
    monkeypatch.setattr(documents, "documents", lambda *args, **more: iter([document]))
    wanted = Wanted("llava_pruned", "crop", "textvqa_val", 3, "answer")
    (url,), found = pictures([wanted, wanted])
    assert url.startswith("data:image/webp;base64,")
    assert found == {wanted: Pictured((0,), "b, a")}
    for other in (replace(wanted, target="yes"), replace(wanted, doc_id=4)):
        monkeypatch.setattr(
            documents, "documents", lambda *args, only, **more: (d for d in [document] if 3 in only["textvqa_val"])
        )
        with pytest.raises(PicturesError, match=f"document {other.doc_id} of 'textvqa_val' is not the one"):
            pictures([other])


OWN_TASK = """task: own_scans
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/own.jsonl
test_split: test
output_type: generate_until
doc_to_visual: !function own_functions.visual
doc_to_text: question
doc_to_target: answer
process_results: !function own_functions.score
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@pytest.mark.slow
def test_images_of_a_task_of_ones_own_are_read_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    (tmp_path / "own.jsonl").write_text('{"question": "Which?", "answer": "red"}\n', encoding="utf-8")
    (tmp_path / "own.yaml").write_text(OWN_TASK.format(folder=tmp_path), encoding="utf-8")
    functions = f"""from PIL import Image

def visual(doc):
    return [Image.open({str(tmp_path / "a.png")!r})]

def score(doc, results):
    return {{"exact_match": float(results[0] == doc["answer"])}}
"""
    (tmp_path / "own_functions.py").write_text(functions, encoding="utf-8")
    wanted = Wanted("llava_pruned", "whole", "own_scans", 0, "red")
    with pytest.raises(PicturesError, match="'own_scans' is neither a task nor a group of lmms-eval; --include-path"):
        pictures([wanted])
    (url,), found = pictures([wanted], tmp_path)
    assert url.startswith("data:image/webp;base64,")
    assert found == {wanted: Pictured((0,), None)}
