"""This package's own lmms-eval tasks and groups: their YAML files and scoring functions.

lmms-eval 0.7.3 cannot discover the tasks of an installed package: the folder must always be named, by ``--include_path``
or by ``include_path:`` in a ``--config`` file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from lmms_prune.record.yamls import read_yaml

UNSCORED = {
    **dict.fromkeys(("textvqa", "textvqa_test"), "textvqa_val or prune_textvqa_ocr"),
    **dict.fromkeys(("docvqa", "docvqa_test"), "docvqa_val"),
    **dict.fromkeys(("infovqa", "infovqa_test"), "infovqa_val"),
    "mmbench": "mmbench_en_dev_static (or prune_mmbench_en) and prune_mmbench_cn",
    **dict.fromkeys(("mmbench_en", "mmbench_en_test"), "mmbench_en_dev_static or prune_mmbench_en"),
    **dict.fromkeys(("mmbench_cn", "mmbench_cn_test"), "prune_mmbench_cn"),
}
"""lmms-eval's test splits, whose answers only a server knows, and groups with one -> tasks that can be scored locally."""
HUB_LOGIN = {
    "mme": "lmms-lab-encoder/MME",
    **dict.fromkeys(("scienceqa", "scienceqa_img"), "lmms-lab-encoder/ScienceQA"),
    **dict.fromkeys(("pope", "pope_adv", "pope_pop", "pope_random"), "lmms-lab-encoder/POPE"),
    **dict.fromkeys(("mmbench_en_dev", "mmbench_en_dev_static", "mmbench_cn_dev"), "lmms-lab-encoder/MMBench"),
    "mmbench_cn_dev_static": "lmms-lab-encoder/MMBench",
    "gqa": "lmms-lab-encoder/GQA",
    **dict.fromkeys(("infovqa_val", "infovqa_test", "docvqa_val", "docvqa_test"), "lmms-lab-encoder/DocVQA"),
    "ocrbench": "echo840/OCRBench",
}
"""Tasks of the benchmarks that say `token: True` -> their data. A test holds this against the installed files."""
PAIRED = "mme"
"""The task that asks twice about each image, in documents that follow each other; its scorer refuses half a pair."""


def split_pairs(limit: Any, offset: Any, tasks: Sequence[str]) -> str:
    """Return how ``limit`` or ``offset`` would cut a pair of questions; "" if they cut none."""
    for name, value in (("limit", limit), ("offset", offset)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if PAIRED in tasks and is_number and value > 0 and value % 2 == 1:
            return (
                f"{name} {value:g} cuts one of MME's pairs of questions, which its scorer refuses; use an even number, such as "
                f"{value + 1:g}."
            )
    return ""


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


def mmbench_as_llava(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """Return MMBench's question as LLaVA-1.5's own evaluation words it: hint, question, options, instruction."""
    lines = [str(doc["question"])] if _absent(doc["hint"]) else [str(doc["hint"]), str(doc["question"])]
    # The first missing option ends the list, and there is no E, as in LLaVA's script.
    lines += [f"{letter}. {doc[letter]}" for letter in takewhile(lambda letter: not _absent(doc[letter]), "ABCD")]
    return "\n".join(lines) + (lmms_eval_specific_kwargs or {}).get("post_prompt", "")


def _absent(value: Any) -> bool:
    """Tell whether the data have no such hint or option; they write this as nothing, as not a number, or as a word."""
    return value is None or value != value or str(value).lower() in ("nan", "none")


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
