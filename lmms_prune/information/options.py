"""CLI options shared by the information commands, with validation and conversion."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmms_prune.errors import OptionError, ScheduleError, did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.methods.reference import entry_points, is_reference
from lmms_prune.record.files import write
from lmms_prune.schedule import Schedule
from lmms_prune.sweep.draws import Sample as Sample
from lmms_prune.sweep.draws import SampleSeed as SampleSeed
from lmms_prune.sweep.draws import draw_of as draw_of
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.harness.documents import Document, Draw
    from lmms_prune.harness.pruned import PrunedModel
    from lmms_prune.information.answers import Label
    from lmms_prune.record.information import Store
    from lmms_prune.schedule import PromptSizes

Tasks = Annotated[str, typer.Option(help="Tasks and groups of lmms-eval, separated by commas.")]
Keeps = Annotated[
    str,
    typer.Option(help="What the methods keep, separated by commas: ratios (0.1,0.25) or numbers of tokens (60t,148t)."),
]
Shard = Annotated[
    str | None, typer.Option(help="Measure only one part of the work: 3/8. Without it, all is collected and drawn.")
]

LabelOption = Annotated[
    str,
    typer.Option(
        "--label",
        help="The token that stands for the right answer: probable (the spelling that the unpruned model finds most probable) or "
        "release (the first token of the answer as written, as in the paper's code).",
    ),
]

# Names of settings in the store -> keys of the wrapper's `made_from`.
_CHECKPOINT = {"commit": "checkpoint", "files": "files"}


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Args:
        wrapper: the model as lmms-eval uses it.
        depth: number of decoder layers.
        visual_tokens: visual tokens of an image; None if images differ in size.
    """

    wrapper: PrunedModel
    depth: int
    visual_tokens: int | None

    @property
    def prompt_sizes(self) -> PromptSizes:
        """The sizes that budgets are solved for."""
        from lmms_prune.efficiency.estimate import prompt_sizes

        return prompt_sizes(self.wrapper.architecture, self.visual_tokens)

    @property
    def name(self) -> str:
        """The checkpoint's name without its owner or folder."""
        return Path(self.wrapper.arguments.pretrained).name


def load_unpruned(model: str, model_args: str) -> LoadedModel:
    """Load the model as an evaluation without a schedule does."""
    from lmms_prune.harness.models import unpruned

    wrapper = unpruned(model, model_args)
    config = wrapper.model.config
    return LoadedModel(wrapper, config.text_config.num_hidden_layers, wrapper.family.tokens_per_image(config))


def depth_and_name(model: str, model_args: str) -> tuple[int, str]:
    """The number of decoder layers and the checkpoint's name, without loading its weights."""
    from lmms_prune.harness.arguments import ModelArguments
    from lmms_prune.harness.loading import read_config
    from lmms_prune.models import MODEL_NAMES

    arguments = ModelArguments.read(model_args, None, MODEL_NAMES[model])
    config = read_config(arguments, MODEL_NAMES[model])
    return config.text_config.num_hidden_layers, Path(arguments.pretrained).name


def numbers_of(documents: Sequence[Document]) -> dict[str, list[int]]:
    """The documents' numbers, by task."""
    numbers: dict[str, list[int]] = {}
    for document in documents:
        numbers.setdefault(document.task, []).append(document.number)
    return numbers


def measured_rows(
    loaded: LoadedModel,
    names: list[str],
    limit: int | None,
    block: int,
    include: Path | None,
    out: Path,
    draw: Draw | None = None,
    label: Label = "probable",
) -> pd.DataFrame:
    """The information of all documents at all layers; measures what the folder `out` does not contain yet."""
    documents = DocumentChoice(names, include, limit, draw).documents(loaded.wrapper.family.model_name)
    store = measure_missing(loaded.wrapper, documents, list(range(loaded.depth)), block, out, label)
    return store.read([document.sample for document in documents])


def measure_missing(
    wrapper: PrunedModel,
    documents: list[Document],
    layers: list[int],
    block: int,
    out: Path,
    label: Label = "probable",
) -> Store:
    """Measure the documents that the folder `out` does not contain yet, and return the folder's store."""
    from lmms_prune.information.run import measure_documents
    from lmms_prune.record.information import Store

    about: dict[str, Any] = {"model": wrapper.family.model_name, "settings": wrapper.settings}
    # A checkpoint whose weights changed under the same name is a different model.
    about |= {f"{name} of the checkpoint": wrapper.made_from[kind] for name, kind in _CHECKPOINT.items()}
    store = Store.open(out, {**about, "layers": layers, "block": block, "label": label})
    with Progress("information, documents", len(documents), shown=wrapper.rank == 0) as progress:
        measure_documents(wrapper, documents, store, layers, block, lambda document: progress.advance(), label)
    return store


def task_names(text: str) -> list[str]:
    """The single tasks of ``--tasks``: this package's groups are replaced by their members."""
    from lmms_prune.harness.tasks import single_tasks

    return single_tasks(text)


def label_of(text: str) -> Label:
    """The rule that ``--label`` names."""
    from lmms_prune.information.answers import LABELS

    for label in LABELS:
        if text == label:
            return label
    fail(f"--label {text}: write {' or '.join(LABELS)}.{did_you_mean(text, list(LABELS))}")


def refuse_unscored(names: Sequence[str], model: str, include: Path | None) -> None:
    """Refuse tasks that log no score of each document, before anything is run; names the metric that is read of the others.

    Raises:
        ArgumentError: a task that does not exist.
        InformationError: a task without a score for each document.
    """
    from lmms_prune.leaderboard.benchmarks import NAMED
    from lmms_prune.leaderboard.other_tasks import metrics_of
    from lmms_prune.record.information import InformationError

    if not (others := [name for name in names if name not in NAMED]):
        return
    from lmms_prune.harness.documents import metric_lists, scored_without_answer
    from lmms_prune.harness.tasks import task_configs

    for name, listed in metric_lists(others, model, include or task_configs()).items():
        if not (metrics := metrics_of(listed)):
            raise InformationError(
                f"--tasks: the YAML of '{name}' names no metric (metric_list), so it has no score to read; of a group, name the single tasks."
            )
        metric = metrics[0]
        scored = None if metric.mean else scored_without_answer(name, model, include or task_configs(), metric.name)
        if not metric.mean and not isinstance(scored, (int, float)):
            raise InformationError(
                f"--tasks: '{name}' has no score of each document: its code makes {metric.name} of {str(scored)[:60]}. This "
                "command needs a metric whose process_results gives a number."
            )
        if not metric.mean or len(metrics) > 1:
            others_of = (
                f"; its other metrics: {', '.join(other.name for other in metrics[1:])}" if len(metrics) > 1 else ""
            )
            typer.echo(
                f"lmms-prune: {name} is scored by the mean of {metric.name} over the documents{others_of}.", err=True
            )


def method_names(text: str, oracle: bool = False, options: bool = False, own: bool = False) -> list[str]:
    """The methods in ``--methods``, all of which keep some tokens.

    Args:
        text: names with commas.
        oracle: whether oracles are allowed.
        options: whether a name may have options: ``sgl;guide=FOLDER``.
        own: whether methods of one's own are allowed: ``file.py:Class``; their code is imported.
    """
    methods = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for method in methods:
        name = method.partition(";")[0]
        if "@" in name or re.search(r":[^A-Za-z_]", name):
            fail(f"--methods {method}: write the method without layer and keep; all layers and --keeps are tried.")
        if own and (is_reference(name) or name in entry_points()):
            _check_own(method)
            continue
        if is_reference(name):
            fail(f"--methods {method}: only built-in methods are taken here.")
        if name not in METHODS:
            fail(f"--methods {method}: there is no such method.{did_you_mean(name, list(METHODS))}")
        if METHODS[name].drops_all:
            fail(f"--methods {method}: it keeps nothing; name methods that keep some tokens.")
        if METHODS[name].kind == "oracle" and not oracle:
            fail(
                f"--methods {method}: an oracle, which knows the right answers and cannot be used as a method; only `horizon` "
                "draws it, for comparison."
            )
        if method != name:
            _check_options(method, options)
    return methods


def _check_own(method: str) -> None:
    """Refuse a method of one's own whose code cannot be used, or that has no such options."""
    from lmms_prune.information.layer_sweep import single_stage, spec_named
    from lmms_prune.pruning.block import bound

    try:
        bound(Schedule.parse(single_stage(method, spec_named(method).lowest_layer, 0.5)))
    except (OptionError, ScheduleError) as error:
        fail(f"--methods {method}: {str(error).splitlines()[0].removeprefix('schedule: ').removeprefix('stage 1: ')}")


def _check_options(method: str, allowed: bool) -> None:
    """Refuse options of a method in ``--methods`` that it does not have, or that this command sets or cannot pass on."""
    name, _, options = method.partition(";")
    if not allowed:
        fail(f"--methods {method}: only names are taken here; leave ;{options} out.")
    if METHODS[name].kind == "oracle":
        fail(f"--methods {method}: the command itself says which measurements it reads; leave ;{options} out.")
    try:
        Schedule.parse(f"{name}@{METHODS[name].lowest_layer}:0.5;{options}")
    except ScheduleError as error:
        fail(f"--methods {method}: {str(error).splitlines()[0].removeprefix('schedule: ')}")


@dataclass(frozen=True)
class DocumentChoice:
    """Which documents a command measures.

    Args:
        tasks: single tasks.
        include: a folder of further task YAMLs; None for this package's own.
        limit: only the first documents of each task; None for all.
        draw: documents to draw instead.
    """

    tasks: Sequence[str]
    include: Path | None = None
    limit: int | None = None
    draw: Draw | None = None

    def numbers(self, model: str) -> dict[str, list[int]]:
        """The documents' numbers, by task."""
        from lmms_prune.harness.documents import document_numbers
        from lmms_prune.harness.tasks import task_configs

        return document_numbers(self.tasks, model, self.limit, self.include or task_configs(), self.draw)

    def documents(self, model: str) -> list[Document]:
        """The documents, with their images, in one order in every process: lmms-eval's order of tasks differs."""
        only = None if self.draw is None else self.numbers(model)
        documents = load_documents(list(self.tasks), model, self.limit, self.include, only)
        order = {task: place for place, task in enumerate(self.tasks)}
        return sorted(
            documents, key=lambda document: (order.get(document.task, len(order)), document.task, document.number)
        )

    def smaller(self, limit: int | None) -> DocumentChoice:
        """The first `limit` of the documents; of drawn ones, as many of them. All without a limit."""
        if limit is None:
            return self
        if self.draw is None:
            return replace(self, limit=limit)
        return replace(self, draw=replace(self.draw, size=limit))

    def record(self, numbers: Mapping[str, Sequence[int]], out: Path) -> None:
        """Write which documents were drawn to ``documents.json``; nothing if none was."""
        if self.draw is not None:
            content = {"sample": self.draw.size, "sample_seed": self.draw.seed, "documents": dict(numbers)}
            write(out / "documents.json", json.dumps(content))


def load_documents(
    names: list[str],
    model: str,
    limit: int | None,
    include: Path | None,
    only: Mapping[str, Sequence[int]] | None = None,
) -> list[Document]:
    """The documents of some tasks; without `include`, this package's own tasks are known.

    Args:
        names, model, limit, include, only: as for `lmms_prune.harness.documents.documents`.
    """
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    return list(documents(names, model, limit, include or task_configs(), only=only))


def layer_numbers(text: str | None, depth: int) -> list[int]:
    """The layers that ``--layers`` names, such as ``0-3,8``; all layers without a text."""
    if text is None:
        return list(range(depth))
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
        fail(f"--layers {text}: write numbers and ranges with commas, such as 0-31 or 0,8,16.")
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            fail(f"--layers {text}: the range {part} ends before it begins; write {last}-{first}.")
        layers |= set(range(int(first), int(last or first) + 1))
    if max(layers) >= depth:
        fail(f"--layers {text}: the model's layers are 0 to {depth - 1}.")
    return sorted(layers)


def keeps_of(text: str) -> list[float | str]:
    """The keeps in ``--keeps``: ratios as numbers, counts as texts such as ``60t``."""
    keeps: list[float | str] = []
    for part in map(str.strip, text.split(",")):
        if re.fullmatch(r"[1-9][0-9]{0,6}t", part):
            keeps.append(part)
        elif re.fullmatch(r"[0-9]*\.?[0-9]+", part) and 0 < float(part) <= 1:
            keeps.append(float(part))
        else:
            fail(
                f"--keeps {text}: write ratios above 0 and up to 1, or numbers of tokens, with commas, such as 0.1,0.25 or "
                "60t,148t."
            )
    return list(dict.fromkeys(keeps))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one message and exit code 2."""
    from lmms_prune.errors import ConfigError, PruningError, UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.record.information import InformationError
    from lmms_prune.sweep.jobs import SweepError

    fixable = (ArgumentError, ConfigError, InformationError, PruningError, ScheduleError, SweepError)
    with plainly(*fixable, UnsupportedModelError):
        yield
