"""The models on which items are made: the paper's, the demo's, or a checkpoint of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import isdir
from pathlib import Path

from lmms_prune.configs.render import BATCH_SIZE
from lmms_prune.configs.table import TABLES, PaperTable
from lmms_prune.demo.models import MODELS, DemoCheckpoint, model_arguments, weights
from lmms_prune.harness.argument_text import split
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.leaderboard.benchmarks import BENCHMARKS
from lmms_prune.leaderboard.published import published
from lmms_prune.models.architectures import architecture
from lmms_prune.models.sizes import Architecture
from lmms_prune.reproduce.items import Item, ReproduceError, paper_models

DEMO = "demo"
_FURTHER = {"OCRVQA": "ocrvqa_test"}  # columns of Figure 9 that are none of the ten benchmarks
_OWN_ARGUMENTS = {
    "pretrained": "--models names the checkpoint, also a folder",
    "schedule": "the items decide what is pruned",
    "budget": "the items decide what is pruned",
    "seed": "--seeds says how many runs a row has",
    "journal": "the command keeps what it has done",
}
_FIRST_TASK = {benchmark.name: benchmark.tasks[0] for benchmark in BENCHMARKS}


@dataclass(frozen=True)
class StudiedModel:
    """One model on which items are made.

    Args:
        name: a short name; its folder below ``--out`` has it.
        table: the paper's table whose schedules and protocol it takes, scaled to its depth.
        sizes: its sizes.
        pretrained: the checkpoint.
        model_args: lmms-eval's arguments for it, without a schedule.
        demo: whether it is one of the demo's, which are evaluated on the demo's mini benchmarks.
    """

    name: str
    table: PaperTable
    sizes: Architecture
    pretrained: str
    model_args: str
    demo: bool = False

    @property
    def wrapper(self) -> str:
        """lmms-eval's name of the model."""
        return self.sizes.family.model_name

    @property
    def number(self) -> int:
        """The number of the paper's table that is about this kind of model."""
        return self.table.number

    @property
    def reference(self) -> Architecture:
        """The sizes of the paper's own model, from which depths and keeps are scaled."""
        return architecture(self.table.model)

    @property
    def scaled(self) -> bool:
        """Whether its depth or its number of visual tokens is another than the paper's model has."""
        own, paper = self.sizes, self.reference
        return (own.layers, own.tokens_per_image) != (paper.layers, paper.tokens_per_image)

    @property
    def deep(self) -> int:
        """The first of the deep layers: "beyond the 20th" of the abstract, scaled to this model's depth."""
        return round(20 * self.sizes.layers / self.reference.layers)

    @property
    def shallow(self) -> int:
        """The first layer after the shallow ones, which are the first third."""
        return max(1, round(self.sizes.layers / 3))

    @property
    def columns(self) -> list[str]:
        """The columns of its table."""
        return list(next(row for row in published() if row.table == self.number).scores)

    @property
    def arguments(self) -> dict[str, str]:
        """`model_args` by name."""
        return split(self.model_args)

    def task(self, column: str) -> str:
        """The lmms-eval task that measures a column: the table's protocol, or the demo's mini benchmark."""
        plain = _FURTHER.get(column) or _FIRST_TASK[column]
        if self.demo:
            return plain
        protocol = next(row for row in published() if row.table == self.number).protocol
        return protocol.tasks.get(column, plain)

    def tasks(self, columns: Sequence[str]) -> list[str]:
        """The tasks of several columns."""
        return [self.task(column) for column in columns]

    def makes(self, item: Item) -> bool:
        """Whether an item is about this kind of model."""
        return self.number in item.tables


def studied_models(text: str, extra: str) -> list[StudiedModel]:
    """The models of ``--models``: names and folders with commas.

    Args:
        text: ``demo``, the short names of the paper's models, or checkpoints' folders.
        extra: further ``--model_args`` of every model.

    Raises:
        ReproduceError: a name that is neither, or a family without a table in the paper.
        ArchitectureError: a folder that is no checkpoint.
        ArgumentError: an argument that a model does not have.
        DemoError: the demo's weights are missing.
    """
    models: list[StudiedModel] = []
    for name in dict.fromkeys(part.strip() for part in text.split(",") if part.strip()):
        if name == DEMO:
            models += [_demo_model(model, extra) for model in MODELS]
        elif name in paper_models():
            table = TABLES[paper_models()[name]]
            sizes = architecture(table.model)
            models.append(_evaluated_as(table, table.model, sizes, table.family.checkpoint, extra))
        elif isdir(name):
            sizes = architecture(name)
            models.append(
                _evaluated_as(_table_of(sizes), Path(name).resolve().name, sizes, str(Path(name).resolve()), extra)
            )
        else:
            raise ReproduceError(
                f"--models {name}: write {DEMO}, {', '.join(paper_models())} or a checkpoint's folder, or several with commas."
            )
    if not models:
        raise ReproduceError(f"--models {text!r} names no model.")
    repeated = [model.name for model in models if [other.name for other in models].count(model.name) > 1]
    if repeated:
        raise ReproduceError(
            f"--models {text}: two models would share the folder '{repeated[0]}'; rename one of theirs."
        )
    _refuse_arguments(models, extra)
    if len({model.demo for model in models}) > 1:
        raise ReproduceError(
            f"--models {text}: the demo's models are evaluated on the demo's own mini benchmarks, others on the real ones; start "
            "two commands, each with an --out of its own."
        )
    return models


def _refuse_arguments(models: Sequence[StudiedModel], extra: str) -> None:
    """Refuse ``--model_args`` that the command sets itself, or that a model does not have.

    Raises:
        ReproduceError, ArgumentError: names the argument.
    """
    for name, reason in _OWN_ARGUMENTS.items():
        if name in split(extra):
            raise ReproduceError(f"--model-args {name}=…: {reason}; leave it out.")
    for model in models:
        ModelArguments.read(model.model_args, None, model.sizes.family)


def _evaluated_as(table: PaperTable, name: str, sizes: Architecture, pretrained: str, extra: str) -> StudiedModel:
    """A model with the protocol of the paper's table; `extra` arguments replace those of the protocol."""
    arguments = {"pretrained": pretrained, **table.arguments, "batch_size": str(BATCH_SIZE), **split(extra)}
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return StudiedModel(name, table, sizes, pretrained, text)


def _table_of(sizes: Architecture) -> PaperTable:
    """The paper's table about a family, or the one that this project scales for it."""
    for table in sorted(TABLES.values(), key=lambda table: bool(table.like)):
        if table.family is sizes.family:
            return table if not table.like else TABLES[table.like]
    titles = ", ".join(dict.fromkeys(table.family.title for table in TABLES.values()))
    raise ReproduceError(
        f"--models {sizes.name}: the paper has no table about {sizes.family.title}; it has of {titles}."
    )


def _demo_model(model: DemoCheckpoint, extra: str) -> StudiedModel:
    folder = weights(model)
    arguments = {**split(model_arguments(model, folder)), "device": "cpu", **split(extra)}
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    sizes = architecture(str(folder))
    return StudiedModel(model.folder, _table_of(sizes), sizes, str(folder), text, demo=True)
