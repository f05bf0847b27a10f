"""The documents of lmms-eval's tasks with an evaluation's prompts, for use outside an evaluation."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from tenacity import RetryError

from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.record.results import CIRCLE


@dataclass(frozen=True)
class Draw:
    """Documents drawn at random from each task: `size` of them, decided by `seed` and the task's name.

    A smaller draw with the same seed is a part of the larger one. Questions that are scored together are drawn together.
    """

    size: int
    seed: int = 0

    @property
    def described(self) -> str:
        """Return the draw as the results record it."""
        return f"{self.size} with seed {self.seed}"

    def numbers(self, task: str, units: Sequence[Any]) -> list[int]:
        """Return the drawn documents' numbers, ascending.

        Args:
            task: the task's name.
            units: of each document, the unit that it is scored in.

        Raises:
            ArgumentError: the task has too few documents, or the size cuts a unit.
        """
        if self.size > len(units):
            raise ArgumentError(f"--sample: {self.size} documents cannot be drawn from {task}, which has {len(units)}.")
        members: dict[Any, list[int]] = {}
        for number, unit in enumerate(units):
            members.setdefault(unit, []).append(number)
        order = list(members.values())
        random.Random(f"{self.seed}/{task}").shuffle(order)
        drawn: list[int] = []
        for unit in order:
            if len(drawn) + len(unit) > self.size:
                break
            drawn += unit
        sizes = {len(unit) for unit in order}
        if not drawn or (len(sizes) == 1 and len(drawn) < self.size):
            raise ArgumentError(
                f"--sample: {self.size} documents cannot be drawn from {task}, which scores {max(sizes)} questions together; "
                f"use a multiple of {max(sizes)}."
            )
        return sorted(drawn)


@dataclass(frozen=True)
class Document:
    """One document of a task.

    Args:
        task, split, number: the document's task, split, and number in the split.
        fields: the dataset's row, images included.
        target: the task's target: a text, the number of a choice, or a list of texts.
        messages: the prompt as lmms-eval builds it.
        generation: the task's generation options.
    """

    task: str
    split: str
    number: int
    fields: Mapping[str, Any]
    target: Any
    messages: Any
    generation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[Any]:
        """Return the images, in the order of the prompt."""
        return [part["url"] for turn in self.messages for part in turn["content"] if part["type"] == "image"]

    @property
    def sample(self) -> str:
        """Return the sample id from which an evaluation seeds its random draws."""
        return f"{self.task}/{self.split}/{self.number}"


def documents(
    tasks: Sequence[str],
    model: str,
    limit: int | None = None,
    include: Path | Sequence[Path] | None = None,
    offset: int = 0,
    only: Mapping[str, Collection[int]] | None = None,
) -> Iterator[Document]:
    """Yield the documents of tasks and groups, task by task, in the order of an evaluation.

    Args:
        tasks: names, as for ``lmms-eval --tasks``.
        model: lmms-eval's name of the model, for prompts that depend on it.
        limit: number of documents per task; None for all.
        include: a folder of further task YAMLs, or several.
        offset: number of documents to skip first in each task.
        only: by task, the numbers of the documents to read; the others are not even loaded.

    Raises:
        ArgumentError: a task that does not exist, or whose data or code cannot be read.
    """
    for task in loaded_tasks(tasks, task_manager(tasks, model, include)):
        split, rows = evaluated_split(task), task.dataset[evaluated_split(task)]
        end = len(rows) if limit is None else min(len(rows), offset + limit)
        for number in range(offset, end):
            if only is not None and number not in only[task.config.task]:
                continue
            fields = rows[number]
            target, options = task.doc_to_target(fields), dict(task.config.generation_kwargs or {})
            yield Document(task.config.task, split, number, fields, target, task.doc_to_messages(fields), options)


def document_numbers(
    tasks: Sequence[str],
    model: str,
    limit: int | None = None,
    include: Path | Sequence[str] | None = None,
    draw: Draw | None = None,
) -> dict[str, list[int]]:
    """Return the numbers of the first, or the drawn, documents of each task, without loading any image.

    Args:
        tasks, model, limit: as for `documents`.
        include: a folder of further task YAMLs, or several.
        draw: documents to draw instead of the first.

    Raises:
        ArgumentError: as for `documents`, or a task from which so many cannot be drawn.
    """
    numbers = {}
    for task in loaded_tasks(tasks, task_manager(tasks, model, include)):
        rows, name = task.dataset[evaluated_split(task)], task.config.task
        if draw is not None:
            numbers[name] = draw.numbers(name, _units(name, rows))
        else:
            numbers[name] = list(range(len(rows) if limit is None else min(len(rows), limit)))
    return numbers


def metric_lists(tasks: Sequence[str], model: str, include: Path | None) -> dict[str, Any]:
    """Return each task's ``metric_list`` as its YAML says it, without loading data; None for a group or a task in Python.

    Raises:
        ArgumentError: a task that does not exist.
    """
    manager = task_manager(tasks, model, include)
    return {name: manager._get_config(name).get("metric_list") for name in tasks}


def scored_without_answer(task: str, model: str, include: Path, metric: str) -> Any:
    """Return what a task's code logs as a metric of its first document for an empty answer; the field "score" of a mapping.

    Raises:
        ArgumentError: as for `documents`.
    """
    for loaded in loaded_tasks([task], task_manager([task], model, include)):
        logged = loaded.process_results(loaded.dataset[evaluated_split(loaded)][0], [""])
        value = logged.get(metric) if isinstance(logged, Mapping) else None
        return value.get("score", value) if isinstance(value, Mapping) else value
    return None


def _units(task: str, rows: Any) -> list[Any]:
    """Return, for each document, what it is scored together with: MME's image, or a circular group of MMBench."""
    if task == "mme":
        return list(rows["question_id"])
    if task.startswith(("mmbench", "prune_mmbench")):
        return [int(index) % CIRCLE for index in rows["index"]]
    return list(range(len(rows)))


def evaluated_split(task: Any) -> str:
    """Return the split that an evaluation of the task reads."""
    return task.config.test_split if task.has_test_docs() else task.config.validation_split


def task_manager(tasks: Sequence[str], model: str, include: Path | Sequence[Path | str] | None) -> TaskManager:
    """Return lmms-eval's index of tasks, which has all of `tasks`; raises as `documents` does."""
    # It would log every YAML of its own that is not a task.
    logger.disable("lmms_eval")
    try:
        folders = [include] if isinstance(include, Path) else list(include or ())
        manager = TaskManager(verbosity="ERROR", include_path=list(map(str, folders)) or None, model_name=model)
    finally:
        logger.enable("lmms_eval")
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ArgumentError(
            f"--tasks: '{unknown[0]}' is neither a task nor a group of lmms-eval; --include-path names a folder of more."
        )
    return manager


def loaded_tasks(tasks: Sequence[str], manager: TaskManager) -> Iterator[Any]:
    """Yield lmms-eval's task objects with their data; raises as `documents` does."""
    try:
        loaded = get_task_dict(list(tasks), manager, "chat")
    except (OSError, RetryError) as error:
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        raise ArgumentError(
            f"the data of {', '.join(tasks)} cannot be read ({type(cause).__name__}: {cause}). Start the command where an "
            "evaluation finds them: in the same folder, with the same HF_HOME and login."
        ) from error
    except ImportError as error:
        raise ArgumentError(
            f"--tasks {','.join(tasks)}: lmms-eval's own code for it needs what is not installed here ({error})."
        ) from error
    yield from _flat(loaded)


def _flat(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the tasks of nested groups."""
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
