"""Scores answers again with the scorer of their lmms-eval task: by what samples files record, or by the task's data."""

from __future__ import annotations

import json
from ast import literal_eval
from collections.abc import Callable, Mapping, Sequence
from inspect import unwrap
from pathlib import Path
from typing import Any, NoReturn

from datasets import Image
from lmms_eval.api.task import ConfigurableTask, TaskConfig

from lmms_prune.harness.documents import evaluated_split, loaded_tasks, task_manager
from lmms_prune.harness.tasks import task_configs


class UnscorableError(ValueError):
    """An answer that cannot be scored again; the message says why."""


class _Undownloaded(ConfigurableTask):
    """A task without its data, of which only the scorer is used."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = TaskConfig(**config)
        self.OUTPUT_TYPE = self.config.output_type
        self._prepare_metric_and_aggregation()
        self.features: list[str] = []
        self.multiple_input = self.multiple_target = 0


class _Recorded(dict):
    """The fields of a document that are recorded; a scorer that reads another one cannot be used."""

    def __missing__(self, name: str) -> NoReturn:
        raise UnscorableError(f"its scorer reads '{name}', which samples files do not have; --data reads the benchmark")

    def get(self, name: Any, default: Any = None) -> Any:
        return self[name]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or self.__missing__(str(name))


# lmms-eval repeats a scorer that fails, with seconds in between; a missing field is no less missing then.
_process = unwrap(ConfigurableTask.process_results)


def _mme(logged: Mapping[str, Any]) -> dict[str, Any]:
    entry = next(value for name, value in logged.items() if name.startswith("mme_"))
    return {"answer": logged["target"], "category": entry["category"], "question_id": entry["question_id"]}


def _pope(logged: Mapping[str, Any]) -> dict[str, Any]:
    return {"answer": logged["target"], "question_id": logged["pope_accuracy"]["question_id"]}


def _mmbench(logged: Mapping[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in logged["gpt_eval_score"].items() if name != "prediction"}
    return {**fields, "answer": logged["target"]}


def _ocrbench(logged: Mapping[str, Any]) -> dict[str, Any]:
    kind = logged["ocrbench_accuracy"]["question_type"]
    # The one data set whose answers are compared with the case and without spaces; its questions have a type of their own.
    formulas = kind == "Handwritten Mathematical Expression Recognition"
    return {"answer": _target(logged), "dataset": "HME100k" if formulas else "", "question_type": kind}


def _scienceqa(logged: Mapping[str, Any]) -> dict[str, Any]:
    letter = ord(str(logged["target"])) - ord("A")
    return {"answer": letter, "choices": [""] * (letter + 1)}


RECORDED: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "mme_process_results": _mme,
    "pope_process_results": _pope,
    "pope_by_first_sentence": _pope,
    "mmbench_process_results": _mmbench,
    "ocrbench_process_results": _ocrbench,
    "sqa_process_results": _scienceqa,
    "equal_after_normalisation": lambda logged: {"answer": logged["target"]},
}
"""The fields of a document that a task's scorer reads, from what its samples file has; by the name of the scorer."""


def _target(logged: Mapping[str, Any]) -> Any:
    """Return a target, which samples files have as text; lists are read back."""
    text = str(logged["target"])
    if text.startswith("[") and text.endswith("]"):
        try:
            return literal_eval(text)
        except (SyntaxError, ValueError):
            pass
    return text


_JUDGES = ("openai", "anthropic", "API_KEY", "API_URL", "requests.post", "httpx", "llm_judge", "get_server")


def _may_ask_a_judge(process: Callable[..., Any]) -> bool:
    """Tell whether the file of a scorer names a service; one whose source cannot be read may ask anything."""
    try:
        # lmms-eval loads a task's functions without registering their module, so only the code knows its file.
        source = Path(unwrap(process).__code__.co_filename).read_text(encoding="utf-8")
    except (AttributeError, OSError, UnicodeDecodeError):
        return True
    return any(word in source for word in _JUDGES)


class TaskScorer:
    """The scorer of one task.

    Args:
        config: the task's configuration, from its YAML file.
        data: the task with its data, by which documents are verified too; None to score by what samples files record.
    """

    def __init__(self, config: Mapping[str, Any], data: Any = None) -> None:
        if config.get("output_type") != "generate_until" or config.get("class"):
            raise UnscorableError("its scorer is not one of generated answers")
        self._task = data or _Undownloaded(dict(config))
        self._data = data
        self._rows = None if data is None else _without_images(data)
        process = config.get("process_results")
        if process and getattr(process, "__name__", "") not in RECORDED and _may_ask_a_judge(process):
            raise UnscorableError("its scorer may ask a judge over the network, so it is not called")
        self._rebuild = RECORDED.get(getattr(process, "__name__", "")) if process else self._plain
        self.decisive = data is not None or self._rebuild is not None
        """Whether another score than the recorded one contradicts it: nothing about the document had to be guessed."""

    def document(self, logged: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the document of a sample, as far as its scorer needs it.

        Raises:
            UnscorableError: the samples file does not have what the scorer reads.
        """
        if self._rows is not None:
            number = int(logged["doc_id"])
            if number >= len(self._rows):
                raise UnscorableError(f"the benchmark has {len(self._rows)} documents")
            return dict(self._rows[number])
        try:
            return _Recorded((self._rebuild or self._guessed)(logged))
        except (LookupError, StopIteration, TypeError) as error:
            raise UnscorableError(
                f"its samples lack what its scorer reads ({type(error).__name__}: {error})"
            ) from error

    def metrics(self, document: Mapping[str, Any], answer: str) -> dict[str, Any]:
        """Return the metrics of an answer, as a samples file has them.

        Raises:
            UnscorableError: the scorer reads what is not recorded, or fails.
        """
        if self._rows is None:
            self._task.features = list(document)
            self._task.multiple_target = max((len(v) for v in document.values() if isinstance(v, list)), default=0)
        try:
            metrics = _process(self._task, document, [answer])
        except UnscorableError:
            raise
        except Exception as error:  # a task's own code, given another document than it expects
            raise UnscorableError(f"its scorer fails ({type(error).__name__}: {error})") from error
        return json.loads(json.dumps(metrics, default=str))

    def recorded_as(self, document: Mapping[str, Any]) -> dict[str, str]:
        """Return target and question of a document of the data, under their names in samples files."""
        if self._data is None:
            return {}
        question = self._data.doc_to_text(document)
        shown = {"target": str(self._data.doc_to_target(document))}
        return {**shown, "input": question} if isinstance(question, str) else shown

    def _plain(self, logged: Mapping[str, Any]) -> dict[str, Any]:
        """Return the document of a task that is scored by metrics alone, which read only the target."""
        name = self._task.config.doc_to_target
        if not isinstance(name, str) or "{" in name or self._task.config.doc_to_choice is not None:
            raise UnscorableError("its target is computed from the document; --data reads the benchmark")
        return {name: _target(logged)}

    def _guessed(self, logged: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the samples of any other task have: the target, and what their metrics repeat of the document."""
        fields: dict[str, Any] = {}
        for value in logged.values():
            if isinstance(value, Mapping):
                fields |= {name: part for name, part in value.items() if name not in ("score", "prediction")}
        name = self._task.config.doc_to_target
        # A task whose YAML names a field that the data lack records the name instead of a target.
        if isinstance(name, str) and "{" not in name and logged["target"] != name:
            fields[name] = _target(logged)
        return fields


def _without_images(task: Any) -> Any:
    rows = task.dataset[evaluated_split(task)]
    return rows.remove_columns([name for name, feature in rows.features.items() if isinstance(feature, Image)])


def scorers(
    tasks: Sequence[str], model: str, include: Path | None = None, data: bool = False
) -> dict[str, TaskScorer | UnscorableError]:
    """Return the scorer of each task, or the reason why there is none.

    Args:
        tasks: names of tasks.
        model: lmms-eval's name of the model, for prompts that depend on it.
        include: a folder of further task YAMLs, beside this package's own.
        data: whether to read the tasks' data.

    Raises:
        ArgumentError: the data cannot be read.
    """
    folders = [folder for folder in (task_configs(), include) if folder is not None]
    manager = task_manager([], model, folders)
    by_task: dict[str, TaskScorer | UnscorableError] = {}
    for name in tasks:
        if name not in manager.all_tasks:
            by_task[name] = UnscorableError("no such task of lmms-eval here; --include-path names a folder of more")
            continue
        task = next(loaded_tasks([name], manager)) if data else None
        try:
            by_task[name] = TaskScorer(manager._get_config(name), task)
        except UnscorableError as error:
            by_task[name] = error
    return by_task
