"""What the commands are given: options that they share, checked and turned into what they mean."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from lmms_prune.record.information import Store
    from lmms_prune.schedule import PromptSizes

Tasks = Annotated[str, typer.Option(help="Tasks and groups of lmms-eval, with commas.")]
Include = Annotated[
    Path | None,
    typer.Option(
        "--include_path",
        exists=True,
        file_okay=False,
        help="A folder of further task YAMLs. Default: this package's own.",
    ),
]


_CHECKPOINT = {"commit": "checkpoint", "files": "files"}


@dataclass(frozen=True)
class Ready:
    """A loaded model, its decoder layers, and the visual tokens of an image, where all have as many."""

    wrapper: PrunedModel
    depth: int
    visual_tokens: int | None

    @property
    def prompt_sizes(self) -> PromptSizes:
        """What budgets are solved on."""
        from lmms_prune.efficiency.estimate import prompt_sizes

        return prompt_sizes(self.wrapper.architecture, self.visual_tokens)

    @property
    def name(self) -> str:
        return Path(self.wrapper.arguments.pretrained).name


def load_unpruned(model: str, model_args: str) -> Ready:
    """The model as an evaluation without a schedule would load it."""
    from lmms_prune.harness.models import unpruned

    wrapper = unpruned(model, model_args)
    config = wrapper.model.config
    return Ready(wrapper, config.text_config.num_hidden_layers, wrapper.family.tokens_per_image(config))


def measured_rows(
    ready: Ready, names: list[str], limit: int | None, block: int, include: Path | None, out: Path
) -> pd.DataFrame:
    """The information of all documents at all layers, measured as far as it is not yet."""
    found = found_documents(names, ready.wrapper.family.model_name, limit, include)
    store = measured(ready.wrapper, found, list(range(ready.depth)), block, out)
    return store.read([document.sample for document in found])


def measured(wrapper: PrunedModel, found: list[Document], numbers: list[int], block: int, out: Path) -> Store:
    """The folder of measurements with all of some documents, measured as far as they are not yet."""
    from lmms_prune.information.run import measure_documents
    from lmms_prune.record.information import Store

    settings = {"model": wrapper.family.model_name, "identity": wrapper.arguments.identity()}
    # Weights that have changed under the same name are another model.
    settings |= {f"{name} of the checkpoint": wrapper.made_from[kind] for name, kind in _CHECKPOINT.items()}
    store = Store.open(out, {**settings, "layers": numbers, "block": block})
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("information", total=len(found))
        measure_documents(wrapper, found, store, numbers, block, lambda document: progress.advance(bar))
    return store


def task_names(text: str) -> list[str]:
    """``--tasks``, with this package's groups replaced by their members."""
    from lmms_prune.harness.tasks import single_tasks

    return single_tasks(text)


def method_names(text: str, oracle: bool = False) -> list[str]:
    """``--methods``: names of methods that keep some tokens; an oracle only where it is shown as one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS:
            fail(f"--methods {name}: there is no such method.{did_you_mean(name, list(METHODS))}")
        if METHODS[name].drops_all:
            fail(f"--methods {name}: it keeps nothing; name methods that keep some tokens.")
        if METHODS[name].kind == "oracle" and not oracle:
            fail(
                f"--methods {name}: it is told the right answers, so it is no method to use; `horizon` draws it beside others."
            )
    return names


def found_documents(names: list[str], model: str, limit: int | None, include: Path | None) -> list[Document]:
    """All documents of some tasks; the package's own tasks are found without a path."""
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    return list(documents(names, model, limit, include or task_configs()))


def layer_numbers(text: str | None, depth: int) -> list[int]:
    """``0-3,8`` as numbers; all layers where nothing is given."""
    if text is None:
        return list(range(depth))
    if not re.fullmatch(r"[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*", text):
        fail(f"--layers {text}: write numbers and ranges with commas, such as 0-31 or 0,8,16.")
    made: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            fail(f"--layers {text}: the range {part} ends before it begins; write {last}-{first}.")
        made |= set(range(int(first), int(last or first) + 1))
    if max(made) >= depth:
        fail(f"--layers {text}: the model's layers are 0 to {depth - 1}.")
    return sorted(made)


def ratios_of(text: str) -> list[float]:
    """``--keeps``."""
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        fail(f"--keeps {text}: write ratios above 0 and up to 1 with commas, such as 0.1,0.25.")
    return ratios


@contextmanager
def said_plainly() -> Iterator[None]:
    """What a user can put right ends the command with exit code 2 and one message."""
    from lmms_prune.configs.runs import ConfigError
    from lmms_prune.errors import PruningError, ScheduleError, UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.record.information import InformationError
    from lmms_prune.sweep.jobs import SweepError

    mendable = (ArgumentError, ConfigError, InformationError, PruningError, ScheduleError, SweepError)
    with plainly(*mendable, UnsupportedModelError):
        yield
