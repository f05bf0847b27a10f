"""This package's own lmms-eval tasks and groups: where their YAMLs are, and what one of them scores with.

lmms-eval 0.7.3 has no way for an installed package to offer tasks: the folder is always named, by ``--include_path`` or by
``include_path:`` in a ``--config`` file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lmms_prune.record.yamls import read_yaml


def task_configs() -> Path:
    """The folder of this package's task YAMLs: inside an installed wheel, or beside a checkout's package."""
    package = Path(__file__).parents[1]
    inside = package / "task_configs"
    return inside if inside.is_dir() else package.parent / "task_configs"


def own_tasks() -> dict[str, Path]:
    """This package's tasks: their names, and their YAMLs."""
    return {read["task"]: path for path, read in _configs() if isinstance(read["task"], str)}


def own_groups() -> dict[str, tuple[str, ...]]:
    """This package's groups: their names, and their tasks."""
    return {read["group"]: tuple(read["task"]) for _, read in _configs() if isinstance(read["task"], list)}


def single_tasks(tasks: str) -> list[str]:
    """The tasks of ``--tasks``, this package's groups replaced by their members, each once, in order."""
    groups = own_groups()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    return list(dict.fromkeys(task for name in names for task in groups.get(name, (name,))))


def known_tasks() -> set[str]:
    """All tasks and groups that this package's YAMLs name, lmms-eval's among them."""
    groups = own_groups()
    return {*groups, *own_tasks(), *(task for tasks in groups.values() for task in tasks)}


def mmbench_by_rules(results: Sequence[Mapping[str, Any]]) -> float:
    """MMBench's accuracy in percent, by lmms-eval's rules and without its judge; writes no file."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    accuracy, _, _ = mmbench_evaluator.eval_result(results, eval_method="static")
    return 100 * float(accuracy)


def pope_by_first_sentence(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What lmms-eval's POPE makes of the answer that POPE's own evaluation reads in ``results[0]``, "yes" or "no"."""
    from lmms_eval.tasks.pope.utils import pope_process_results

    words = results[0].split(".")[0].replace(",", "").split()
    return pope_process_results(doc, ["no" if {"No", "no", "not"} & set(words) else "yes"])


@cache
def _configs() -> list[tuple[Path, dict[str, Any]]]:
    paths = sorted(task_configs().glob("*.yaml"))
    return [(path, read_yaml(path.read_text(encoding="utf-8"), functions=True)) for path in paths]
