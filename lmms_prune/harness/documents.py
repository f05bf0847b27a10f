"""The documents of lmms-eval's tasks, with prompts as in an evaluation, for what looks at them outside of one."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
        task, split, number: where it stands.
        fields: what the dataset says of it, images included.
        target: what the task calls its target: a text, a choice's number or a list of texts.
        messages: its prompt as the harness builds it.
    """

    task: str
    split: str
    number: int
    fields: Mapping[str, Any]
    target: Any
    messages: Any

    @property
    def images(self) -> list[Any]:
        """Its images, in the order of the prompt."""
        return [part["url"] for turn in self.messages for part in turn["content"] if part["type"] == "image"]

    @property
    def sample(self) -> str:
        """The id under which an evaluation of ours seeds its random draws."""
        return f"{self.task}/{self.split}/{self.number}"


def documents(
    tasks: Sequence[str],
    model: str,
    limit: int | None = None,
    include: Path | None = None,
    offset: int = 0,
    only: Mapping[str, Collection[int]] | None = None,
) -> Iterator[Document]:
    """The documents of some tasks and groups, task by task, in the order of an evaluation.

    Args:
        tasks: names, as for ``lmms-eval --tasks``.
        model: lmms-eval's name of the model, for prompts that depend on it.
        limit: only so many of each task, the first ones.
        include: a folder of further task YAMLs.
        offset: how many of each task are left out before these.
        only: by task, the numbers of the documents that are wanted; the others are not even read.

    Raises:
        ArgumentError: a task that does not exist, or whose data or code cannot be read.
    """
    # It names every file of its own that is no task.
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
        made = get_task_dict(list(tasks), manager, "chat")
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
    for task in _flat(made):
        split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        rows = task.dataset[split]
        end = len(rows) if limit is None else min(len(rows), offset + limit)
        for number in range(offset, end):
            if only is not None and number not in only[task.config.task]:
                continue
            fields = rows[number]
            target = task.doc_to_target(fields)
            yield Document(task.config.task, split, number, fields, target, task.doc_to_messages(fields))


def _flat(tasks: Mapping[Any, Any]) -> Iterator[Any]:
    """The tasks of nested groups."""
    for task in tasks.values():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield task[1] if isinstance(task, tuple) else task
