"""The chain of steps that makes some items. A step is a command line of this package; items share steps."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from lmms_prune.configs.table import TABLES
from lmms_prune.harness.argument_text import split
from lmms_prune.information.layer_sweep import acts_at, single_stage
from lmms_prune.leaderboard.published import published_costs, published_text_tokens
from lmms_prune.reproduce.estimate import BLOCK, DOCUMENTS, document_flops, information_flops, schedules_flops
from lmms_prune.reproduce.items import Item, Kind, ReproduceError
from lmms_prune.reproduce.models import StudiedModel
from lmms_prune.reproduce.rows import CostPlan, RowPlan, cost_plans, cost_rows, table_rows

ORACLE, CONTROL = "information", "random"
_QUICK = ("MME", "TextVQA")  # columns of a quick run; the oracle's is the last of them
_PIECES = (
    "sweep.json",
    ".parquet",
)  # ends of the names of files that stand for a finished evaluation or a measured document


@dataclass(frozen=True)
class ChainOptions:
    """What a chain is made for.

    Args:
        items: the items.
        limit: the first so many documents of each task, everywhere; None for the items' own numbers.
        methods: the methods of the figures besides random, as for ``horizon --methods``; None for the default ones.
        keeps: what the methods of the figures keep, as for ``horizon --keeps``; None for the paper's or the items' own.
        block: side of a unit of information; None for the commands' own.
        tasks: tasks of the figures, instead of the paper's benchmarks.
        seeds: runs of a table's row that draws at random.
        quick: fewer rows, benchmarks, methods and keeps.
        include: a folder of further task YAMLs.
    """

    items: tuple[Item, ...]
    limit: int | None = None
    methods: str | None = None
    keeps: str | None = None
    block: int | None = None
    tasks: tuple[str, ...] = ()
    seeds: int = 3
    quick: bool = False
    include: Path | None = None


@dataclass(frozen=True)
class Step:
    """One command of the chain.

    Args:
        name: unique in the chain; a folder of this name holds its record and its log.
        words: the command, without the program.
        items: the items that it serves.
        lane: steps of one lane run one after the other.
        needs: names of steps that must have succeeded.
        folder: where its results land; None if they are only printed.
        pieces: evaluations and measured documents.
        divisible: whether it takes --shard and --launch.
        flops: its estimated work.
    """

    name: str
    words: tuple[str, ...]
    items: tuple[str, ...]
    lane: str
    needs: tuple[str, ...] = ()
    folder: Path | None = None
    pieces: int = 1
    divisible: bool = False
    flops: float = 0.0

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(["lmms-prune", *self.words])

    def finished_pieces(self) -> int:
        """Evaluations and documents that lie in its folder; those that are being made have hidden folders."""
        count = 0
        # Unlike `glob`, it passes over a folder that disappears while others work there.
        for _, folders, files in os.walk(self.folder or ""):
            folders[:] = [name for name in folders if not name.startswith(".")]
            count += sum(name.endswith(_PIECES) for name in files)
        return count


@dataclass(frozen=True)
class ModelPlan:
    """The steps of one model.

    Args:
        model: the model.
        folder: where its results lie.
        rows: evaluations of its table; empty if no item needs them.
        costs: rows of Table 3.
        steps: in the order in which they run.
        configs: texts of the sweeps' files, by path.
        options: what the chain is made for.
    """

    model: StudiedModel
    folder: Path
    options: ChainOptions
    rows: tuple[RowPlan, ...] = ()
    costs: tuple[CostPlan, ...] = ()
    steps: tuple[Step, ...] = ()
    configs: Mapping[Path, str] = field(default_factory=dict)

    @property
    def items(self) -> list[Item]:
        """The items that are about this model."""
        return [item for item in self.options.items if self.model.makes(item)]

    def of_kind(self, *kinds: Kind) -> list[Item]:
        """Its items of some kinds."""
        return [item for item in self.items if item.kind in kinds]

    @property
    def table(self) -> Path:
        """The folder of its table's evaluations."""
        return self.folder / "table"

    @property
    def information(self) -> Path:
        """The folder of measured information, which several steps share."""
        return self.folder / "information"

    @property
    def horizon(self) -> Path:
        """The folder of evaluations by layer."""
        return self.folder / "horizon"

    @property
    def oracle(self) -> Path:
        """The folder of evaluations that keep the tokens of the highest information."""
        return self.folder / "oracle"

    def item_tasks(self, item: Item) -> list[str]:
        """A figure's tasks."""
        if self.options.tasks:
            return list(self.options.tasks)
        quick = _QUICK[-1:] if item.kind == "oracle" else _QUICK
        return self.model.tasks([name for name in item.columns if not self.options.quick or name in quick])

    def item_keeps(self, item: Item) -> list[str]:
        """A figure's keeps; counts are shares where the model's images have another number of tokens."""
        if self.options.keeps is not None:
            return [keep.strip() for keep in self.options.keeps.split(",") if keep.strip()]
        tokens = self.model.reference.tokens_per_image
        keeps = list(item.keeps[:1] if self.options.quick else item.keeps)
        if tokens and self.model.sizes.tokens_per_image != tokens:
            keeps = [f"{round(int(keep[:-1]) / tokens, 3):g}" if keep.endswith("t") else keep for keep in keeps]
        return keeps

    @property
    def methods(self) -> list[str]:
        """The methods of its figures; random is always among them, since every claim is against it."""
        if self.options.methods is not None:
            named = [name.strip() for name in self.options.methods.split(",") if name.strip()]
            return list(dict.fromkeys([CONTROL, *named]))
        names = (CONTROL, "dart") if self.options.quick else (CONTROL, "fastv", "dart", "divprune")
        protocol = next((row.printed.protocol for row in self.rows or table_rows(self.model, 1)), None)
        chosen = []
        for name in names:
            options = () if protocol is None else protocol.options(name)
            chosen.append(name + "".join(f";{key}={value}" for key, value in options))
        return chosen


def plan_model(model: StudiedModel, out: Path, options: ChainOptions) -> ModelPlan:
    """Plan the steps of one model.

    Raises:
        ScheduleError: the paper's schedules do not fit the model.
        ReproduceError: no item is about the model.
    """
    plan = ModelPlan(model, out / model.name, options)
    if not plan.items:
        names = ", ".join(item.name for item in options.items)
        raise ReproduceError(f"{names}: the paper does not show this for {model.name}'s family; give another --models.")
    if plan.of_kind("scores", "costs"):
        rows = table_rows(model, options.seeds, options.quick)
        costs = cost_rows(model, rows) if plan.of_kind("costs") else []
        plan = replace(plan, rows=tuple(rows), costs=tuple(costs))
    steps = [*_table_steps(plan), *_cost_steps(plan), *_information_steps(plan), *_layer_steps(plan)]
    return replace(plan, steps=tuple(steps), configs=_configs(plan))


def arithmetic_steps(items: Sequence[Item]) -> Iterator[Step]:
    """Steps that need no model: the costs of Table 3 by arithmetic, for the paper's own architecture."""
    costs = [item for item in items if item.kind == "costs"]
    names = _names(costs)
    for row in published_costs() if costs else ():
        architecture = next(
            table.model for table in TABLES.values() if table.number in costs[0].tables and not table.like
        )
        words = (
            "schedule",
            row.schedule,
            "--model",
            architecture,
            "--text-tokens",
            f"{published_text_tokens():g}",
            "--json",
        )
        yield Step(f"schedule-{row.label.replace(' ', '-')}", words, names, "arithmetic")


def _names(items: Iterable[Item]) -> tuple[str, ...]:
    return tuple(item.name for item in items)


def _configs(plan: ModelPlan) -> dict[Path, str]:
    """The sweep's files of a plan's rows."""
    arguments = {**split(plan.model.model_args)}
    texts = {}
    for row in plan.rows:
        model_args = {**arguments, "schedule": str(row.schedule), "seed": row.seed}
        settings = {"model": plan.model.wrapper, "model_args": model_args, "tasks": ",".join(_table_tasks(plan))}
        settings |= {} if plan.options.include is None else {"include_path": str(plan.options.include.absolute())}
        texts[_config(plan, row)] = yaml.safe_dump(settings, sort_keys=False)
    return texts


def _config(plan: ModelPlan, row: RowPlan) -> Path:
    return plan.folder / "configs" / f"{row.stem}.yaml"


def _table_tasks(plan: ModelPlan) -> list[str]:
    columns = [name for name in plan.model.columns if not plan.options.quick or name in _QUICK]
    return plan.model.tasks(columns)


def _table_steps(plan: ModelPlan) -> Iterator[Step]:
    """The evaluations of a table, or only those that Table 3 needs, and their leaderboard."""
    scores, costs = plan.of_kind("scores"), plan.of_kind("costs")
    if not scores and not costs:
        return
    model, limit = plan.model, plan.options.limit
    # The unpruned row first: without it, the others have no Rel in a report over half of the runs.
    rows = sorted(plan.rows if scores else cost_plans(plan.rows), key=lambda row: bool(row.schedule.stages))
    tasks = _table_tasks(plan) if scores else model.tasks(costs[0].columns)
    words = ["sweep", *(str(_config(plan, row)) for row in rows), "--out", str(plan.table), "--tasks", ",".join(tasks)]
    words += [] if limit is None else ["--limit", str(limit)]
    columns = [name for name in DOCUMENTS if model.task(name) in tasks]
    documents = sum(_documents(name, limit) for name in columns)
    flops = documents * sum(document_flops(model.sizes, row.schedule) for row in rows)
    yield Step(
        f"{model.name}-table",
        tuple(words),
        _names([*scores, *costs]),
        model.name,
        folder=plan.table,
        pieces=len(rows) * len(tasks),
        divisible=True,
        flops=flops,
    )
    page = str(plan.folder / "leaderboard.html")
    board = ("leaderboard", str(plan.table), "--format", "html", "--out", page)
    yield Step(f"{model.name}-leaderboard", board, _names([*scores, *costs]), model.name, (f"{model.name}-table",))


def _cost_steps(plan: ModelPlan) -> Iterator[Step]:
    """The times of Table 3's schedules on real documents."""
    items, model = plan.of_kind("costs"), plan.model
    if not items:
        return
    arguments = dict(model.arguments)
    arguments.pop("pretrained")
    arguments.pop("batch_size", None)
    device, dtype = arguments.pop("device", "cuda"), arguments.pop("dtype", "auto")
    schedules = [str(row.schedule) for row in plan.costs if row.schedule.stages]
    documents = plan.options.limit or items[0].documents or 1
    words = ["bench", *schedules, "--model", model.pretrained, "--device", device, "--dtype", dtype]
    words += ["--tasks", ",".join(model.tasks(items[0].columns)), "--limit", str(documents), "--json"]
    words += ["--model-args", ",".join(f"{k}={v}" for k, v in arguments.items())] if arguments else []
    words += [] if plan.options.include is None else ["--include-path", str(plan.options.include)]
    repeats = 2 if plan.options.quick else 5
    flops = documents * (repeats + 1) * sum(document_flops(model.sizes, row.schedule) for row in plan.costs)
    words += ["--repeats", str(repeats)]
    yield Step(f"{model.name}-bench", tuple(words), _names(items), model.name, pieces=1, flops=flops)


def _command(plan: ModelPlan, name: str, items: Sequence[Item], out: Path) -> tuple[list[str], list[str], int]:
    """The first words of ``horizon`` and ``information``; the tasks; documents of each task."""
    tasks = list(dict.fromkeys(task for item in items for task in plan.item_tasks(item)))
    arguments = {key: value for key, value in plan.model.arguments.items() if key != "pretrained"}
    words = [name, "--model", plan.model.pretrained, "--model-args", ",".join(f"{k}={v}" for k, v in arguments.items())]
    words += ["--tasks", ",".join(tasks)]
    words += ["--out", str(out), "--json"]
    documents = plan.options.limit or max(item.documents or 1 for item in items)
    flag = ["--sample", str(documents), "--sample-seed", "0"]
    words += flag if plan.options.limit is None else ["--limit", str(documents)]
    words += [] if plan.options.block is None else ["--block", str(plan.options.block)]
    words += [] if plan.options.include is None else ["--include-path", str(plan.options.include)]
    return words, tasks, documents


def _keeps(plan: ModelPlan, items: Iterable[Item]) -> list[str]:
    return list(dict.fromkeys(keep for item in items for keep in plan.item_keeps(item)))


def _information_steps(plan: ModelPlan) -> Iterator[Step]:
    """Information and what methods keep of it: Figures 5, 7 and 12, and what the oracle reads."""
    items, sizes = plan.of_kind("kept", "variance"), plan.model.sizes
    if not items:
        return
    words, tasks, documents = _command(plan, "information", items, plan.information)
    kept = [item for item in items if item.kind == "kept"]
    flops = len(tasks) * information_flops(sizes, documents, plan.options.block or BLOCK)
    if kept:
        keeps = _keeps(plan, kept)
        words += ["--methods", ",".join(plan.methods), "--keeps", ",".join(keeps)]
        flops += schedules_flops(sizes, _single_stages(plan.methods, keeps, sizes.layers), documents * len(tasks))
    words += ["--pictures", "1"]
    yield Step(
        f"{plan.model.name}-information",
        tuple(words),
        _names(items),
        plan.model.name,
        folder=plan.information,
        pieces=len(tasks) * documents,
        divisible=True,
        flops=flops,
    )


def _layer_steps(plan: ModelPlan) -> Iterator[Step]:
    """Scores by layer: with single stages (Figures 1, 2, 10), without visual tokens (8, 9), with an oracle (6, 11)."""
    model, sizes = plan.model, plan.model.sizes
    shared = ["--information", str(plan.information)]
    removed = ["none", *(f"vtw@{layer}" for layer in range(sizes.layers))]
    seen: set[tuple[str, str]] = set()
    measured_tasks = {task for item in plan.of_kind("kept", "variance") for task in plan.item_tasks(item)}

    def step(
        name: str, items: list[Item], out: Path, extra: list[str], stages: list[str], measured: int | None
    ) -> Step:
        words, tasks, documents = _command(plan, "horizon", items, out)
        # What an earlier step of the same folder has evaluated is not evaluated again.
        runs = [(task, text) for text in [*removed, *stages] for task in tasks if (str(out) + task, text) not in seen]
        seen.update((str(out) + task, text) for task, text in runs)
        flops = sum(schedules_flops(sizes, [text], documents) for _, text in runs)
        new = [] if measured is None else [task for task in tasks if task not in measured_tasks]
        own = len(new) * min(measured or 0, documents)
        measured_tasks.update(new)
        return Step(
            f"{model.name}-{name}",
            (*words, *extra),
            _names(items),
            model.name,
            folder=out,
            pieces=len(runs) + own,
            divisible=True,
            flops=flops + information_flops(sizes, own, plan.options.block or BLOCK),
        )

    if items := plan.of_kind("methods"):
        keeps = _keeps(plan, items)
        extra = ["--scores-only", "--methods", ",".join(plan.methods), "--keeps", ",".join(keeps)]
        yield step("methods", items, plan.horizon, extra, _single_stages(plan.methods, keeps, sizes.layers), None)
    if items := plan.of_kind("vanishing", "horizons"):
        extra = list(shared) if plan.options.limit else [*shared, "--information-limit", "200"]
        yield step("horizon", items, plan.horizon, extra, [], plan.options.limit or 200)
    if items := plan.of_kind("oracle"):
        keeps = _keeps(plan, items)
        names = [ORACLE, CONTROL]
        extra = [*shared, "--methods", ",".join(names), "--keeps", ",".join(keeps)]
        documents = plan.options.limit or max(item.documents or 1 for item in items)
        yield step("oracle", items, plan.oracle, extra, _single_stages(names, keeps, sizes.layers), documents)


def _single_stages(methods: Iterable[str], keeps: Iterable[str], layers: int) -> list[str]:
    """Schedules with one method as the only stage, at every layer at which it can act."""
    return [
        single_stage(method, layer, keep)
        for keep in keeps
        for method in methods
        for layer in range(layers)
        if acts_at(method, layer)
    ]


def _documents(column: str, limit: int | None) -> int:
    return DOCUMENTS[column] if limit is None else min(limit, DOCUMENTS[column])
