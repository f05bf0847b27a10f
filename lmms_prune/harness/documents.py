"""The documents of lmms-eval's tasks with an evaluation's prompts, for use outside an evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from tenacity import RetryError

from lmms_prune.harness.arguments import ArgumentError


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
    include: Path | None = None,
    offset: int = 0,
    only: Mapping[str, Collection[int]] | None = None,
) -> Iterator[Document]:
    """Yield the documents of tasks and groups, task by task, in the order of an evaluation.

    Args:
        tasks: names, as for ``lmms-eval --tasks``.
        model: lmms-eval's name of the model, for prompts that depend on it.
        limit: number of documents per task; None for all.
        include: a folder of further task YAMLs.
        offset: number of documents to skip first in each task.
        only: by task, the numbers of the documents to read; the others are not even loaded.

    Raises:
        ArgumentError: a task that does not exist, or whose data or code cannot be read.
    """
    # It would log every YAML of its own that is not a task.
    logger.disable("lmms_eval")
    try:
        folder = None if include is None else str(include)
        manager = TaskManager(verbosity="ERROR", include_path=folder, model_name=model)
    finally:
        logger.enable("lmms_eval")
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ArgumentError(
            f"--tasks: '{unknown[0]}' is neither a task nor a group of lmms-eval; --include_path names a folder of more."
        )
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
    for task in _flat(loaded):
        split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        rows = task.dataset[split]
        end = len(rows) if limit is None else min(len(rows), offset + limit)
        for number in range(offset, end):
            if only is not None and number not in only[task.config.task]:
                continue
            fields = rows[number]
            target, options = task.doc_to_target(fields), dict(task.config.generation_kwargs or {})
            yield Document(task.config.task, split, number, fields, target, task.doc_to_messages(fields), options)


def _flat(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    """Yield the tasks of nested groups."""
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
