"""CLI options shared by the information commands, with validation and conversion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from lmms_prune.errors import did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.terminal.console import fail, plainly

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.harness.documents import Document
    from lmms_prune.harness.pruned import PrunedModel
    from lmms_prune.information.answers import Label
    from lmms_prune.record.information import Store
    from lmms_prune.schedule import PromptSizes

Tasks = Annotated[str, typer.Option(help="Tasks and groups of lmms-eval, separated by commas.")]
Include = Annotated[
    Path | None,
    typer.Option(
        "--include_path",
        exists=True,
        file_okay=False,
        help="A folder of further task YAMLs. Default: this package's own.",
    ),
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


def measured_rows(
    loaded: LoadedModel,
    names: list[str],
    limit: int | None,
    block: int,
    include: Path | None,
    out: Path,
    label: Label = "probable",
) -> pd.DataFrame:
    """The information of all documents at all layers; measures what the folder `out` does not contain yet."""
    documents = load_documents(names, loaded.wrapper.family.model_name, limit, include)
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

    about: dict[str, Any] = {"model": wrapper.family.model_name, "settings": wrapper.arguments.settings()}
    # A checkpoint whose weights changed under the same name is a different model.
    about |= {f"{name} of the checkpoint": wrapper.made_from[kind] for name, kind in _CHECKPOINT.items()}
    store = Store.open(out, {**about, "layers": layers, "block": block, "label": label})
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("information", total=len(documents))
        measure_documents(wrapper, documents, store, layers, block, lambda document: progress.advance(bar), label)
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


def method_names(text: str, oracle: bool = False) -> list[str]:
    """The names in ``--methods``, all of methods that keep some tokens; oracles only if `oracle` allows them."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            fail(f"--methods {name}: there is no such method.{did_you_mean(name, list(METHODS))}")
        if METHODS[name].drops_all:
            fail(f"--methods {name}: it keeps nothing; name methods that keep some tokens.")
        if METHODS[name].kind == "oracle" and not oracle:
            fail(
                f"--methods {name}: an oracle, which knows the right answers and cannot be used as a method; only `horizon` "
                "draws it, for comparison."
            )
    return names


def load_documents(names: list[str], model: str, limit: int | None, include: Path | None) -> list[Document]:
    """The documents of some tasks; without `include`, this package's own tasks are known."""
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    return list(documents(names, model, limit, include or task_configs()))


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


def ratios_of(text: str) -> list[float]:
    """The ratios in ``--keeps``."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        fail(f"--keeps {text}: write ratios above 0 and up to 1 with commas, such as 0.1,0.25.")
    return ratios


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn errors that a user can fix into one message and exit code 2."""
    from lmms_prune.errors import ConfigError, PruningError, ScheduleError, UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.record.information import InformationError
    from lmms_prune.sweep.jobs import SweepError

    fixable = (ArgumentError, ConfigError, InformationError, PruningError, ScheduleError, SweepError)
    with plainly(*fixable, UnsupportedModelError):
        yield
