"""This package's tasks and groups: what they change of lmms-eval's own, and that they run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.utils import load_yaml_config

from lmms_prune.demo.models import MODELS, weights
from lmms_prune.harness.tasks import (
    known_tasks,
    mmbench_by_rules,
    own_groups,
    own_tasks,
    pope_by_first_sentence,
    single_tasks,
    task_configs,
)

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
    "prune_mmbench_cn": ("mmbench/mmbench_cn_dev.yaml", {"doc_to_text", "metric_list"}),
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
            *("mmbench_en_dev_static", "prune_mmbench_cn", "gqa"),
        ),
        "prune_qwen": (
            *("mme", "scienceqa_img", "textvqa_val", "mmbench_en_dev_static"),
            *("infovqa_val", "docvqa_val", "ocrbench"),
        ),
    }
    assert set(own_tasks()) == {*VARIANTS, "mmbench_cn_dev_static", "ocrvqa_test"}
    assert {"prune_llava", "ocrbench", "prune_pope"} <= known_tasks()
    assert (task_configs() / "prune_llava.yaml").is_file()


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
        assert not any("nan" in text for text in prompts["prune_mmbench_cn"])
        assert not list(run.folder.rglob("*cn*.xlsx"))
        assert "nan" in json.dumps(run.samples["prune_mmbench_cn"])  # the data have such hints
