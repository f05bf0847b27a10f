"""``lmms-prune information``, ``horizon`` and ``show``. Heavy modules are imported only when one of them runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmms_prune.console import fail, plainly
from lmms_prune.methods import METHODS
from lmms_prune.schedule import Schedule, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.harness.documents import Document
    from lmms_prune.harness.models import PrunedModel
    from lmms_prune.measurements import Store

Model = Annotated[str, typer.Option(help="llava_pruned or qwen2_5_vl_pruned, as for lmms-eval.")]
ModelArgs = Annotated[
    str, typer.Option("--model_args", help="As for lmms-eval, without schedule and budget: pretrained=…,dtype=….")
]
Tasks = Annotated[str, typer.Option(help="Tasks and groups of lmms-eval, with commas.")]
Include = Annotated[
    Path | None, typer.Option("--include_path", help="A folder of further task YAMLs. Default: this package's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]


def information(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was interrupted goes on there.")],
    model: Model = "llava_pruned",
    model_args: ModelArgs = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    layers: Annotated[str | None, typer.Option(help="Decoder layers: 0-31, or 0,8,16. Default: all.")] = None,
    block: Annotated[int, typer.Option(min=1, help="Side of a unit: 1 a visual token, 2 the paper's squares.")] = 2,
    methods: Annotated[
        str, typer.Option(help="Also: how much information these methods keep, with commas; slower.")
    ] = "",
    keeps: Annotated[str, typer.Option(help="What they keep, as ratios with commas.")] = "0.1,0.25,0.5",
    pictures: Annotated[int, typer.Option(min=0, help="Heat maps of so many documents of each task.")] = 2,
    include: Include = None,
    as_json: Json = False,
) -> None:
    """Measure what each visual token is worth at each decoder layer, on the documents of any lmms-eval task.

    The information of a token at a layer is how much it alone raises the probability of the right answer's first token
    if the deeper layers see no other (arXiv 2512.07580). Results are kept document by document, with tables (CSV) and
    pictures (PNG, SVG) of all of them beside.
    """
    chosen, ratios = _methods(methods), _ratios(keeps)
    with _plainly():
        from lmms_prune.harness.models import unpruned
        from lmms_prune.information.aggregate import by_layer, by_sample
        from lmms_prune.information.plots import draw_layers
        from lmms_prune.information.run import measure_documents
        from lmms_prune.measurements import Store

        wrapper = unpruned(model, model_args)
        numbers = _layers(layers, wrapper.model.config.text_config.num_hidden_layers)
        settings = {"model": model, "identity": wrapper.arguments.identity(), "layers": numbers, "block": block}
        store = Store.open(out, settings)
        found = _documents(_tasks(tasks), model, limit, include)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("documents", total=len(found))
            measure_documents(wrapper, found, store, numbers, block, lambda document: progress.advance(bar))
        rows = store.read([document.sample for document in found])
        averages = by_layer(by_sample(rows))
        averages.to_csv(out / "layers.csv", index=False)
        draw_layers(
            averages, f"{Path(wrapper.arguments.pretrained).name}: information of visual tokens", out / "layers"
        )
        _heatmaps(wrapper, found, store, pictures, numbers, block)
        if chosen:
            _kept(wrapper, found, store, chosen, ratios, numbers, block)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "samples": len(found), "layers": averages.to_dict("records")}))
        return
    Console().print(_table(averages))
    typer.echo(f"{len(found)} documents; tables and pictures are in {out}.")


def _table(averages: pd.DataFrame) -> Table:
    """Mean information, a layer a line and a task a column."""
    tasks = list(dict.fromkeys(averages.task))
    table = Table(box=box.SIMPLE_HEAD, title="mean information of a visual token (probability, in thousandths)")
    table.add_column("layer", justify="right")
    for task in tasks:
        table.add_column(task, justify="right", overflow="fold")
    for layer, lines in averages.groupby("layer"):
        means = dict(zip(lines.task, lines["mean"], strict=True))
        table.add_row(str(layer), *(f"{1000 * means[task]:+.2f}" if task in means else "" for task in tasks))
    return table


def _heatmaps(
    wrapper: PrunedModel, found: list[Document], store: Store, pictures: int, numbers: list[int], block: int
) -> None:
    """The first documents of each task: what the model sees, and the information over it at some layers."""
    from lmms_prune.information.canvas import grids_of, seen_images
    from lmms_prune.information.plots import draw_heatmaps
    from lmms_prune.measurements import token_information

    layers = numbers[:: max(1, -(-len(numbers) // 7))]
    drawn: dict[str, int] = {}
    for document in found:
        drawn[document.task] = drawn.get(document.task, 0) + 1
        if drawn[document.task] > pictures:
            continue
        rows = store.read([document.sample])
        inputs = dict(wrapper.inputs_of(document.messages))
        grids = grids_of(wrapper, inputs)
        for image, picture in enumerate(seen_images(wrapper, document.messages, inputs, grids)):
            maps = [(n, token_information(rows[rows.layer == n], image, grids[image], block)) for n in layers]
            line = rows.iloc[0]
            title = f"{document.sample}: '{line.answer}', {line.p_full:.1%} sure unpruned"
            name = document.sample.replace("/", "-") + (f"-image{image}" if len(grids) > 1 else "")
            draw_heatmaps(picture, maps, title, store.folder / "heatmaps" / name)


def _kept(
    wrapper: PrunedModel,
    found: list[Document],
    store: Store,
    methods: list[str],
    ratios: list[float],
    numbers: list[int],
    block: int,
) -> None:
    from lmms_prune.information.kept import kept_information
    from lmms_prune.information.plots import draw_kept

    kept = kept_information(wrapper, found, store, methods, ratios, numbers, block)
    kept.to_csv(store.folder / "kept.csv", index=False)
    for task, lines in kept.groupby("task", sort=False):
        draw_kept(lines, f"{Path(wrapper.arguments.pretrained).name}, {task}", store.folder / f"kept-{task}")


def horizon(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was interrupted goes on there.")],
    model: Model = "llava_pruned",
    model_args: ModelArgs = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")] = None,
    block: Annotated[int, typer.Option(min=1, help="Side of a unit of information.")] = 2,
    epsilon: Annotated[float, typer.Option(help="Share of the unpruned score that may be lost.")] = 0.01,
    methods: Annotated[
        str,
        typer.Option(help="Also: the score of these methods, each alone at each layer; `information` is an oracle."),
    ] = "",
    keeps: Annotated[str, typer.Option(help="What they keep, as ratios with commas.")] = "0.1,0.25",
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    include: Include = None,
    launch: Annotated[str, typer.Option(help="What starts evaluating processes, as for `sweep`.")] = "",
    as_json: Json = False,
) -> None:
    """Find each task's information horizon: the layer from which on visual tokens are worth nothing.

    That is the smallest layer at which, and at all deeper ones, removing all visual tokens costs at most --epsilon of the
    unpruned score, and mean information is below 0.01. Measures information (as `information` does) and evaluates the
    removal at every layer through lmms-eval, and draws both. VTW's criterion stands beside.
    """
    chosen, ratios = _methods(methods, oracle=True), _ratios(keeps)
    if not 0 <= epsilon < 1:
        fail(f"--epsilon {epsilon}: write a share from 0 to below 1, such as 0.01.")
    with _plainly():
        from lmms_prune.information.aggregate import by_sample
        from lmms_prune.information.depth import Evaluation, acts_at, evaluate
        from lmms_prune.information.horizon import find_horizon
        from lmms_prune.information.plots import draw_horizon, draw_methods

        names = _tasks(tasks)
        ready = _ready(model, model_args)
        depth, about = ready.depth, ready.name
        measured = _measured(ready, names, limit, block, include, out / "information")
        acting = [(m, n, k) for k in ratios for m in chosen for n in range(depth) if acts_at(m, n)]
        alone = {one: _alone(*one, out / "information") for one in acting}
        schedules = ["none", *(f"vtw@{n}" for n in range(depth)), *alone.values()]
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("evaluations", total=len(schedules) * len(names))
            scores = evaluate(
                Evaluation(model, model_args, names, limit),
                schedules,
                out,
                launch,
                lambda outcome: progress.advance(bar),
            )
        found = []
        averages = by_sample(measured)
        for task in names:
            removed = {n: scores[f"vtw@{n}"][task] for n in range(depth)}
            here = averages[averages.task == task]
            found.append(find_horizon(task, here, scores["none"][task], removed, epsilon, resamples, seed))
            draw_horizon(found[-1], f"{about}, {task}", out / f"horizon-{task}")
            found[-1].layers.to_csv(out / f"horizon-{task}.csv", index=False)
            if chosen:
                lines = _method_lines(task, alone, scores)
                lines.to_csv(out / f"methods-{task}.csv", index=False)
                draw_methods(lines, scores["none"][task].score, f"{about}, {task}", out / f"methods-{task}")
    said = [{k: v for k, v in vars(one).items() if k != "layers"} for one in found]
    (out / "horizon.json").write_text(json.dumps({"model": about, "depth": depth, "tasks": said}, indent=1))
    if as_json:
        typer.echo(json.dumps({"out": str(out), "depth": depth, "tasks": said}))
        return
    table = Table(box=box.SIMPLE_HEAD, title=f"information horizon of {about}, {depth} layers ({depth}: none)")
    for column in ("task", "horizon", "95 %", "by score", "by information", "VTW's criterion", "units"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for one in found:
        layers = (one.layer, f"{one.low} to {one.high}", one.by_accuracy, one.by_information, one.by_divergence)
        table.add_row(one.task, *map(str, layers), str(one.units))
    Console().print(table)
    typer.echo(f"tables and pictures are in {out}.")


def _alone(method: str, layer: int, keep: float, measured: Path) -> str:
    """The schedule of a method that acts alone; an oracle chooses by what was measured."""
    text = f"{method}@{layer}:{keep}"
    return f"{text};of={measured}" if METHODS[method].kind == "oracle" else text


def _method_lines(task: str, alone: dict[tuple[str, int, float], str], scores: dict) -> pd.DataFrame:
    import pandas as pd

    lines = [
        {
            "method": f"{m} (oracle)" if METHODS[m].kind == "oracle" else m,
            "layer": n,
            "keep": k,
            "score": scores[text][task].score,
        }
        for (m, n, k), text in alone.items()
    ]
    return pd.DataFrame(lines)


@dataclass(frozen=True)
class _Ready:
    """A loaded model, its decoder layers, and the visual tokens of an image, where all have as many."""

    wrapper: PrunedModel
    depth: int
    visual_tokens: int | None

    @property
    def name(self) -> str:
        return Path(self.wrapper.arguments.pretrained).name


def _ready(model: str, model_args: str) -> _Ready:
    from lmms_prune.harness.models import unpruned

    wrapper = unpruned(model, model_args)
    config = wrapper.model.config
    return _Ready(wrapper, config.text_config.num_hidden_layers, wrapper.family.tokens_per_image(config))


def _measured(
    ready: _Ready, names: list[str], limit: int | None, block: int, include: Path | None, out: Path
) -> pd.DataFrame:
    """The information of all documents at all layers, measured as far as it is not yet."""
    from lmms_prune.information.run import measure_documents
    from lmms_prune.measurements import Store

    numbers, model = list(range(ready.depth)), ready.wrapper.family.model_name
    settings = {"model": model, "identity": ready.wrapper.arguments.identity(), "layers": numbers, "block": block}
    store = Store.open(out, settings)
    found = _documents(names, model, limit, include)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("information", total=len(found))
        measure_documents(ready.wrapper, found, store, numbers, block, lambda document: progress.advance(bar))
    return store.read([document.sample for document in found])


def calibrate(
    tasks: Annotated[str, typer.Option(help="Benchmarks whose documents decide, with commas.")],
    budget: Annotated[str, typer.Option(help="Average visual tokens a layer: 192t, or a ratio: 0.5.")],
    limit: Annotated[
        int, typer.Option(min=2, help="Documents of each task that choose, and as many that verify.")
    ] = 64,
    model: Model = "llava_pruned",
    model_args: ModelArgs = "",
    methods: Annotated[str, typer.Option(help="Methods that may act early, with commas.")] = "dart,divprune",
    beside: Annotated[
        list[str] | None,
        typer.Option(help="A schedule to compare with on the verifying documents; its ? meets the budget. Repeatable."),
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Side of a unit of information.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was interrupted goes on there.")] = Path(
        "calibration"
    ),
    include: Include = None,
    launch: Annotated[str, typer.Option(help="What starts evaluating processes, as for `sweep`.")] = "",
    as_json: Json = False,
) -> None:
    """Find the hybrid schedule that loses least at a budget; `lmms-prune calibrate --tasks …` means this one, too.

    Measures information on the first --limit documents of each task. From where it has vanished, or from where removing
    all visual tokens loses nothing, few random tokens are left or none; before, a method prunes to the budget. All candidates are evaluated, the best one again on the next --limit
    documents. It is kept for `schedule=auto,budget=…` and written as a YAML for lmms-eval.
    """
    chosen = _methods(methods)
    with _plainly():
        import yaml

        from lmms_prune.harness.calibrations import calibration_file, keep_calibration
        from lmms_prune.information.aggregate import by_layer, by_sample
        from lmms_prune.information.depth import Evaluation
        from lmms_prune.information.horizon import vanishes
        from lmms_prune.information.propose import candidates, propose, removal_horizon

        names = _tasks(tasks)
        read = [Schedule.parse(text) for text in beside or []]
        ready = _ready(model, model_args)
        others = [str(_solved(one, budget, ready)) for one in read]
        measured = _measured(ready, names, limit, block, include, out / "information")
        first = vanishes(by_layer(by_sample(measured)))
        evaluation = Evaluation(model, model_args, names, limit)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("evaluations", total=None)
            report = lambda outcome: progress.advance(bar)  # noqa: E731
            layer = removal_horizon(evaluation, first, ready.depth, out / "chosen", launch, report)
            texts = candidates(chosen, sorted({first, layer}), budget, ready.depth, ready.visual_tokens)
            progress.update(bar, completed=0, total=(len(texts) + 3 + len(others)) * len(names))
            found = propose(evaluation, texts, layer, out, launch, report, others)
        checkpoint = ready.wrapper.arguments.pretrained
        said = {
            "schedule": found.schedule,
            "vanishes": first,
            "horizon": layer,
            "budget": budget,
            "tasks": names,
            "limit": limit,
        }
        said |= {"chosen": vars(found.chosen), "verified": vars(found.verified)}
        said |= {"tried": {text: vars(one) for text, one in found.tried.items()}}
        said |= {"beside": {text: vars(one) for text, one in found.beside.items()}}
        kept = calibration_file(checkpoint, budget)
        keep_calibration(kept, said)
        path = out / f"{Path(checkpoint).name}_auto-{budget}.yaml"
        settings: dict[str, Any] = {"model": model}
        settings |= {"model_args": f"{model_args},schedule={found.schedule}".strip(",")}
        settings |= {"tasks": ",".join(names), "log_samples": True, "output_path": f"results/{path.stem}"}
        path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps({**said, "yaml": str(path), "kept": str(kept)}))
        return
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"information vanishes at layer {first}, removal is free at {layer}, of {ready.depth}",
    )
    table.add_column("schedule", overflow="fold")
    table.add_column("loss", justify="right")
    table.add_column("95 %", justify="right")
    for text, one in found.tried.items():
        table.add_row(text, f"{one.value:.1f} %", f"{one.low:.1f} to {one.high:.1f} %")
    Console().print(table)
    sure = found.verified
    typer.echo(
        f"schedule={found.schedule}\nloses {sure.value:.1f} % of the unpruned scores ({sure.low:.1f} to {sure.high:.1f} %) "
        f"on {limit} other documents of each task.\n"
        + "".join(
            f"there {text} loses {one.value:.1f} % ({one.low:.1f} to {one.high:.1f} %)\n"
            for text, one in found.beside.items()
        )
        + f"{path}\nFrom now on schedule=auto,budget={budget} stands for it."
    )


def _solved(schedule: Schedule, budget: str, ready: _Ready) -> Schedule:
    """A schedule given for comparison, at the same budget where it leaves a ``?``."""
    if schedule.unknown is not None:
        return schedule.solve(budget, ready.depth, ready.visual_tokens)
    schedule.check(ready.depth)
    return schedule


def show(
    images: Annotated[list[Path], typer.Argument(help="One or more image files, asked about together.")],
    question: Annotated[str, typer.Option(help="What to ask about them.")],
    schedule: Annotated[str, typer.Option(help="What prunes: dart@2:0.44,random@20:0.07, or a preset.")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
    model: Model = "llava_pruned",
    model_args: ModelArgs = "",
    new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Draw which visual tokens survive each stage, on the image, with the answers with and without pruning."""
    if out.suffix not in (".png", ".svg", ".pdf"):
        fail(f"--out {out}: the name must end with .png, .svg or .pdf.")
    with _plainly():
        from PIL import Image, UnidentifiedImageError

        read = Schedule.parse(schedule)
        opened = []
        for path in images:
            try:
                opened.append(Image.open(path).convert("RGB"))
            except (OSError, UnidentifiedImageError) as error:
                fail(f"{path} cannot be read as an image: {getattr(error, 'strerror', None) or error}.")
        from lmms_prune.harness.models import unpruned
        from lmms_prune.hooks import check
        from lmms_prune.information.show import draw_shown
        from lmms_prune.information.show import show as ask

        wrapper = unpruned(model, model_args)
        read.check(wrapper.model.config.text_config.num_hidden_layers)
        check(wrapper.model, read)
        shown = ask(wrapper, opened, question, read, new_tokens)
        draw_shown(shown, out)
    said: dict[str, Any] = {"unpruned": shown.unpruned, "pruned": shown.answer, "schedule": str(read), "out": str(out)}
    said |= {"kept": shown.trace.kept, "avg_visual_tokens": shown.trace.avg_visual_tokens}
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(
        f"unpruned: {shown.unpruned}\npruned:   {shown.answer}\n{out}: on average "
        f"{shown.trace.avg_visual_tokens:.1f} of {shown.trace.visual_tokens} visual tokens a layer"
    )


def _tasks(text: str) -> list[str]:
    """``--tasks``, with this package's groups replaced by their members."""
    from lmms_prune.harness.tasks import single_tasks

    return single_tasks(text)


def _methods(text: str, oracle: bool = False) -> list[str]:
    """``--methods``: names of methods that keep some tokens; an oracle only where it is shown as one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METHODS or METHODS[name].drops_all:
            fail(f"--methods {name}: no method that keeps some tokens.{did_you_mean(name, list(METHODS))}")
        if METHODS[name].kind == "oracle" and not oracle:
            fail(
                f"--methods {name}: it is told the right answers, so it is no method to use; `horizon` draws it beside others."
            )
    return names


def _documents(names: list[str], model: str, limit: int | None, include: Path | None) -> list[Document]:
    """All documents of some tasks; the package's own tasks are found without a path."""
    from lmms_prune.harness.documents import documents
    from lmms_prune.harness.tasks import task_configs

    return list(documents(names, model, limit, include or task_configs()))


def _layers(text: str | None, depth: int) -> list[int]:
    """``0-3,8`` as numbers; all layers where nothing is given."""
    if text is None:
        return list(range(depth))
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        fail(f"--layers {text}: write numbers and ranges with commas, such as 0-31 or 0,8,16.")
    made: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        made |= set(range(int(first), int(last or first) + 1))
    if max(made) >= depth:
        fail(f"--layers {text}: the model's layers are 0 to {depth - 1}.")
    return sorted(made)


def _ratios(text: str) -> list[float]:
    try:
        ratios = [float(part) for part in text.split(",")]
    except ValueError:
        ratios = []
    if not ratios or not all(0 < ratio <= 1 for ratio in ratios):
        fail(f"--keeps {text}: write ratios above 0 and up to 1 with commas, such as 0.1,0.25.")
    return ratios


@contextmanager
def _plainly() -> Iterator[None]:
    """What a user can put right ends the command with exit code 2 and one message."""
    from lmms_prune.configs.runs import ConfigError
    from lmms_prune.families import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.measurements import InformationError
    from lmms_prune.refusals import PruningError
    from lmms_prune.schedule import ScheduleError
    from lmms_prune.sweep.units import SweepError

    mendable = (ArgumentError, ConfigError, InformationError, PruningError, ScheduleError, SweepError)
    with plainly(*mendable, UnsupportedModelError):
        yield
