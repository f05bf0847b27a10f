"""This package's own lmms-eval tasks and groups: their YAML files and scoring functions.

lmms-eval 0.7.3 cannot discover the tasks of an installed package: the folder must always be named, by ``--include_path``
or by ``include_path:`` in a ``--config`` file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lmms_prune.record.yamls import read_yaml


def task_configs() -> Path:
    """Return the folder of this package's task YAMLs: inside an installed wheel, or next to the package in a checkout."""
    package = Path(__file__).parents[1]
    inside = package / "task_configs"
    return inside if inside.is_dir() else package.parent / "task_configs"


def own_tasks() -> dict[str, Path]:
    """Return this package's tasks: YAML files by name."""
    return {config["task"]: path for path, config in _configs() if isinstance(config["task"], str)}


def own_groups() -> dict[str, tuple[str, ...]]:
    """Return this package's groups: task names by group name."""
    return {config["group"]: tuple(config["task"]) for _, config in _configs() if isinstance(config["task"], list)}


def single_tasks(tasks: str) -> list[str]:
    """Return the tasks of ``--tasks`` in order and without repeats; this package's groups are replaced by their members."""
    groups = own_groups()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in groups.get(name, (name,))))


def known_tasks() -> set[str]:
    """Return all tasks and groups that this package's YAMLs name, including lmms-eval's."""
    groups = own_groups()
    return {*groups, *own_tasks(), *(task for tasks in groups.values() for task in tasks)}


def mmbench_by_rules(results: Sequence[Mapping[str, Any]]) -> float:
    """Return MMBench's accuracy in percent, by lmms-eval's rules without its judge; writes no file."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    accuracy, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return 100 * float(accuracy)


def pope_by_first_sentence(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Score POPE with lmms-eval, after reading ``results[0]`` as "yes" or "no" by POPE's own evaluation rule."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    words = results[0].split(".")[0].replace(",", "").split()
    return pope_process_results(doc, ["no" if {"No", "no", "not"} & set(words) else "yes"])


def one_row_per_question(dataset: Any) -> Any:
    """Return OCR-VQA's rows, which have lists of questions and answers, as one row for each question."""
    from datasets import Features, Image, Value

    encoded = dataset.cast_column("image", Image(decode=False))  # images are copied as they are, not decoded
    columns = Features({"image": Image(decode=False), "question": Value("string"), "answer": Value("string")})

    def spread(rows: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        pairs = [
            (image, question, answer)
            for image, questions, answers in zip(rows["image"], rows["questions"], rows["answers"], strict=True)
            for question, answer in zip(questions, answers, strict=True)
        ]
        return {name: [pair[place] for pair in pairs] for place, name in enumerate(columns)}

    names = encoded.column_names
    single = encoded.map(spread, batched=True, batch_size=100, remove_columns=names, features=columns)
    return single.cast_column("image", Image())


def equal_after_normalisation(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether an answer is the right one, after VQA's own normalisation of both."""
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    normalised = EvalAIAnswerProcessor()
    return {"exact_match": float(normalised(results[0]) == normalised(doc["answer"]))}


@cache
def _configs() -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(task_configs().glob("*.yaml"))
    return [(path, read_yaml(path.read_text(encoding="utf-8"), functions=True)) for path in paths]
