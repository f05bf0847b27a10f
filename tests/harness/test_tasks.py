"""This package's tasks and groups: what they change of lmms-eval's own, and that they run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.utils import load_yaml_config

from lmms_prune.demo.models import MODELS, weights
from lmms_prune.harness.tasks import (
    HUB_LOGIN,
    UNSCORED,
    known_tasks,
    mmbench_as_llava,
    mmbench_by_rules,
    own_groups,
    own_tasks,
    pope_by_first_sentence,
    single_tasks,
    split_pairs,
    task_configs,
)
from lmms_prune.leaderboard.benchmarks import TASKS

# Ours, lmms-eval's, and the keys in which they differ.
VARIANTS = {
    "prune_textvqa_ocr": (
        "textvqa/textvqa_val.yaml",
        {"generation_kwargs", "metric_list", "lmms_eval_specific_kwargs"},
    ),
    "prune_pope": (
        "pope/pope.yaml",
        {"dataset_kwargs", "process_results", "lmms_eval_specific_kwargs", "metadata"},
    ),
    "prune_mmbench_en": (
        "mmbench/mmbench_en_dev_static.yaml",
        {"dataset_kwargs", "doc_to_text", "metric_list"},
    ),
    "prune_mmbench_cn": (
        "mmbench/mmbench_cn_dev.yaml",
        # The images and the recorded results are the same: only the module differs that the functions are in.
        {
            *("dataset_kwargs", "doc_to_text", "metric_list", "generation_kwargs", "lmms_eval_specific_kwargs"),
            *("doc_to_visual", "process_results"),
        },
    ),
}


def resolved(path: Path) -> dict[str, Any]:
    """A task's YAML as the harness reads it, functions by their modules and names."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [named(inner) for inner in value]
        # A module beside a YAML is known by its last name only.
        return f"{value.__module__.rpartition('.')[2]}.{value.__name__}" if callable(value) else value

    return named(load_yaml_config(str(path)))


@pytest.mark.parametrize("task", VARIANTS)
def test_a_variant_differs_from_the_harness_in_what_its_comment_says(task: str) -> None:
    import lmms_eval.tasks

    own = resolved(own_tasks()[task])
    name, differing = VARIANTS[task]
    stock = resolved(Path(lmms_eval.tasks.__file__).parent / name)
    changed = {key for key in {*own, *stock} if own.get(key) != stock.get(key)} - {"task", "tag"}
    assert changed == differing
    # Prompts and data are the same, but for what the comment says.
    if task == "prune_textvqa_ocr":
        default = stock["lmms_eval_specific_kwargs"]["default"]
        assert own["lmms_eval_specific_kwargs"] == {"default": {**default, "ocr": True}}
        extra = {"max_new_tokens": 128, "temperature": 0, "do_sample": False}
        assert own["generation_kwargs"] == {**stock["generation_kwargs"], **extra}
        assert own["metric_list"] == stock["metric_list"][:1]
    if task == "prune_pope":
        assert own["lmms_eval_specific_kwargs"] == {"default": stock["lmms_eval_specific_kwargs"]["default"]}
    text = own_tasks()[task].read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert "Differs from" in text


def test_groups_are_the_papers_benchmarks() -> None:
    assert own_groups() == {
        "prune_llava": (
            *("mme", "scienceqa_img", "prune_pope", "prune_textvqa_ocr"),
            *("prune_mmbench_en", "prune_mmbench_cn", "gqa"),
        ),
        "prune_qwen": (
            *("mme", "scienceqa_img", "textvqa_val", "mmbench_en_dev_static"),
            *("infovqa_val", "docvqa_val", "ocrbench"),
        ),
    }
    assert set(own_tasks()) == {*VARIANTS, "mmbench_cn_dev_static", "ocrvqa_test"}
    assert {"prune_llava", "ocrbench", "prune_pope"} <= known_tasks()
    assert (task_configs() / "prune_llava.yaml").is_file()


def test_tasks_that_need_a_login_are_those_whose_files_say_so() -> None:
    import lmms_eval.tasks

    installed = {}
    for folder in ("mme", "scienceqa", "pope", "textvqa", "mmbench", "gqa", "infovqa", "docvqa", "ocrbench"):
        for path in sorted((Path(lmms_eval.tasks.__file__).parent / folder).glob("*.yaml")):
            if "task:" in path.read_text(encoding="utf-8"):
                read = load_yaml_config(str(path))
                installed[read["task"] if isinstance(read["task"], str) else path.stem] = read
    own = {name: load_yaml_config(str(path)) for name, path in own_tasks().items()}
    scored = {*own, *TASKS, *HUB_LOGIN}
    needing = {
        name: read["dataset_path"]
        for name, read in {**installed, **own}.items()
        if name in scored and (read.get("dataset_kwargs") or {}).get("token")
    }
    assert needing == HUB_LOGIN
    assert not [name for name in needing if name.startswith("prune_")]


def test_groups_with_a_test_split_and_their_test_tasks_are_unscored() -> None:
    """What is offered in their place is a task of the table of benchmarks."""
    for name, instead in UNSCORED.items():
        assert name not in TASKS
        words = re.findall(r"[\w]+_[\w]+", instead)
        assert words
        assert all(word in TASKS for word in words), name


@pytest.mark.parametrize(
    ("limit", "offset", "tasks", "cut"),
    [
        (None, None, ["mme"], ""),
        (4, 0, ["mme"], ""),
        (-1, 0, ["mme"], ""),
        (0.3, 0, ["mme"], ""),  # a share of documents that are not yet counted
        (5, 0, ["pope"], ""),
        (5.0, 0, ["mme", "pope"], "limit 5 cuts one of MME's pairs of questions, which its scorer refuses; use an even number, such as 6."),
        (4, 3, ["mme"], "offset 3 cuts one of MME's pairs"),
        ("5", True, ["mme"], ""),
    ],
)  # fmt: skip
def test_pairs_of_questions_are_not_cut(limit: Any, offset: Any, tasks: list[str], cut: str) -> None:
    assert split_pairs(limit, offset, tasks).startswith(cut)
    assert bool(split_pairs(limit, offset, tasks)) == bool(cut)


def test_groups_are_taken_apart() -> None:
    assert single_tasks("gqa, prune_qwen,mme,other") == ["gqa", *own_groups()["prune_qwen"], "other"]


@pytest.mark.parametrize(
    ("answer", "read"),
    [
        ("Yes", "yes"),
        ("yes", "yes"),
        ("No", "no"),
        ("No, there is no dog.", "no"),
        ("There is not a dog", "no"),
        ("Yes. No, wait", "yes"),  # the first sentence decides
        ("NO", "yes"),  # as POPE's own evaluation reads it
        ("A dog", "yes"),
        ("nothing", "yes"),  # words, not letters
        ("", "yes"),
    ],
)
def test_pope_reads_an_answer_as_its_own_evaluation_does(answer: str, read: str) -> None:
    made = pope_by_first_sentence({"question_id": 1, "answer": "yes"}, [answer])
    assert made["pope_f1_score"]["prediction"] == read
    assert made["pope_accuracy"]["score"] == float(read == "yes")


def test_pope_counts_answers_that_the_harness_leaves_out() -> None:
    """Half of the answers are neither yes nor no: the harness's F1 is 1, ours is not."""
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_process_results

    rows = [({"question_id": i, "answer": truth}, answer) for i, (truth, answer) in enumerate(
        [("yes", "yes"), ("no", "no"), ("yes", "blue"), ("no", "blue")]
    )]  # fmt: skip
    stock = [pope_process_results(doc, [answer])["pope_f1_score"] for doc, answer in rows]
    ours = [pope_by_first_sentence(doc, [answer])["pope_f1_score"] for doc, answer in rows]
    assert pope_aggregate_f1_score(stock) == 1.0
    assert pope_aggregate_f1_score(ours) == pytest.approx(2 * 2 / (2 * 2 + 1))


# What LLaVA-1.5's evaluation (llava/eval/model_vqa_mmbench.py) puts after the image and its line break.
MMBENCH_ROW = {"question": "What is it?", "A": "a cat", "B": "a dog", "C": "nan", "D": "nan", "hint": "nan"}
MMBENCH_PROMPTS = [
    ({}, "What is it?\nA. a cat\nB. a dog"),
    ({"hint": "It barks."}, "It barks.\nWhat is it?\nA. a cat\nB. a dog"),
    ({"hint": None, "C": float("nan")}, "What is it?\nA. a cat\nB. a dog"),
    ({"hint": "None", "C": "a hen", "D": "a cow"}, "What is it?\nA. a cat\nB. a dog\nC. a hen\nD. a cow"),
    ({"D": "a cow"}, "What is it?\nA. a cat\nB. a dog"),  # the first missing option ends the list
    ({"C": "a hen", "D": "a cow", "E": "a pig"}, "What is it?\nA. a cat\nB. a dog\nC. a hen\nD. a cow"),
]


@pytest.mark.parametrize(("task", "instruction"), [
    ("prune_mmbench_en", "Answer with the option's letter from the given choices directly."),
    ("prune_mmbench_cn", "请直接回答选项字母。"),
])  # fmt: skip
@pytest.mark.parametrize(("changed", "asked"), MMBENCH_PROMPTS)
def test_mmbench_is_worded_as_in_llavas_evaluation(task: str, instruction: str, changed: dict, asked: str) -> None:
    options = load_yaml_config(str(own_tasks()[task]))["lmms_eval_specific_kwargs"]["default"]
    assert mmbench_as_llava({**MMBENCH_ROW, **changed}, options) == f"{asked}\n{instruction}"


def test_mmbench_counts_circles_by_rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question counts if all of its rotations are right; no answer waits for a judge, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    row = {"question": "?", "hint": "nan", "source": "s", "split": "dev", "category": "c", "L2-category": "l"}
    options = {"A": "one", "B": "two", "C": "three", "D": "four"}

    def asked(index: int, answer: str, prediction: str) -> dict[str, Any]:
        return {**row, **options, "index": index, "answer": answer, "prediction": prediction}

    rows = [asked(0, "A", "A"), asked(1_000_000, "B", "B."), asked(1, "A", "A"), asked(1_000_001, "C", "no idea")]
    assert mmbench_by_rules(rows) == 50.0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "model", "arguments"),
    [
        ("prune_llava", MODELS[0], "positions=compact,prompt=vicuna,image_aspect=pad"),
        ("prune_qwen", MODELS[1], "min_pixels=3136,max_pixels=200704"),
    ],
    ids=["prune_llava", "prune_qwen"],
)
def test_a_group_runs_and_is_scored(group, model, arguments, harness) -> None:
    """The real command, with the group's name and this package's folder, on the demo's data."""
    given = f"pretrained={weights(model)},schedule=dart@1:0.44,batch_size=4,{arguments}"
    options = (
        "--model",
        model.family.model_name,
        "--model_args",
        given,
        "--tasks",
        group,
        "--include_path",
        task_configs(),
    )
    run = harness.fork(*map(str, options))
    tasks = own_groups()[group]
    assert set(run.samples) == set(tasks), run.stderr[-3000:]
    for task in tasks:
        assert len(run.samples[task]) == 4
        metrics = run.metrics[task]
        numbers = [value for name, value in metrics.items() if "stderr" not in name and isinstance(value, float)]
        assert numbers, (task, metrics)
    prompts = {task: [row["input"] for row in rows] for task, rows in run.samples.items()}
    if group == "prune_llava":
        assert all("\nReference OCR token: " in text for text in prompts["prune_textvqa_ocr"])
        for task in ("prune_mmbench_en", "prune_mmbench_cn"):
            assert not any("nan" in text or "There are several options" in text for text in prompts[task])
        assert all("\n请直接回答选项字母。" in text for text in prompts["prune_mmbench_cn"])
        assert not list(run.folder.rglob("*mmbench*.xlsx"))
        assert "nan" in json.dumps(run.samples["prune_mmbench_cn"])  # the data have such hints
