"""The documents of lmms-eval's tasks, with prompts as in an evaluation, for what looks at them outside of one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager, get_task_dict

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
    def sample(self) -> str:
        """The id under which an evaluation of ours seeds its random draws."""
        return f"{self.task}/{self.split}/{self.number}"


def documents(
    tasks: Sequence[str], model: str, limit: int | None = None, include: Path | None = None, offset: int = 0
) -> Iterator[Document]:
    """The documents of some tasks and groups, task by task, in the order of an evaluation.

    Args:
        tasks: names, as for ``lmms-eval --tasks``.
        model: lmms-eval's name of the model, for prompts that depend on it.
        limit: only so many of each task, the first ones.
        include: a folder of further task YAMLs.
        offset: how many of each task are left out before these.

    Raises:
        ArgumentError: a task that does not exist.
    """
    manager = TaskManager(verbosity="ERROR", include_path=None if include is None else str(include), model_name=model)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise ArgumentError(
            f"--tasks: '{unknown[0]}' is neither a task nor a group of lmms-eval; --include_path names a folder of more."
        )
    for task in _flat(get_task_dict(list(tasks), manager, "chat")):
        split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        rows = task.dataset[split]
        end = len(rows) if limit is None else min(len(rows), offset + limit)
        for number in range(offset, end):
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
