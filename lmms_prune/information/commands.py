"""``lmms-prune information``, ``horizon`` and ``show``. Heavy modules are imported only when one of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmms_prune.information.options import (
    Include,
    Tasks,
    found_documents,
    layer_numbers,
    load_unpruned,
    measured,
    measured_rows,
    method_names,
    ratios_of,
    said_plainly,
    task_names,
)
from lmms_prune.methods import METHODS
from lmms_prune.record.files import read_image, write
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS, fail
from lmms_prune.terminal.options import DEFAULT_MODEL, Json, Model, ModelArgs

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.harness.documents import Document
    from lmms_prune.harness.pruned import PrunedModel
    from lmms_prune.information.horizon import Horizon
    from lmms_prune.record.information import Store


def information(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was interrupted goes on there.")],
    model: Model = DEFAULT_MODEL,
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
    chosen, ratios = method_names(methods), ratios_of(keeps)
    with said_plainly():
        from lmms_prune.harness.models import unpruned
        from lmms_prune.information.aggregate import by_layer, by_sample
        from lmms_prune.information.plots import draw_layers

        wrapper = unpruned(model, model_args)
        numbers = layer_numbers(layers, wrapper.model.config.text_config.num_hidden_layers)
        found = found_documents(task_names(tasks), model, limit, include)
        store = measured(wrapper, found, numbers, block, out)
        rows = store.read([document.sample for document in found])
        averages = by_layer(by_sample(rows))
        write(out / "layers.csv", averages.to_csv(index=False))
        draw_layers(
            averages, f"{Path(wrapper.arguments.pretrained).name}: information of visual tokens", out / "layers"
        )
        _heatmaps(wrapper, found, store, pictures, numbers, block)
        if chosen:
            _kept(wrapper, found, store, chosen, ratios, numbers, block)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "samples": len(found), "layers": averages.to_dict("records")}))
        return
    console = Console(markup=False)
    console.print("mean information of a visual token (probability, in thousandths)")
    for table in _tables(averages, console.width):
        console.print(table)
    typer.echo(f"{len(found)} document{'' if len(found) == 1 else 's'}; tables and pictures are in {out}.")


def _tables(averages: pd.DataFrame, width: int) -> list[Table]:
    """Mean information, a layer a line and a task a column; several tables where `width` does not hold all tasks."""
    tasks = list(dict.fromkeys(averages.task))
    # The layers' column is 9 wide, others 8 and 3 between them.
    wide = max(1, (width - 9) // 11)
    made = []
    for start in range(0, len(tasks), wide):
        some = tasks[start : start + wide]
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("layer", justify="right")
        for task in some:
            # A number is never broken; a long name is.
            table.add_column(task, justify="right", overflow="fold", min_width=8)
        for layer, lines in averages.groupby("layer"):
            means = dict(zip(lines.task, lines["mean"], strict=True))
            table.add_row(str(layer), *(f"{1000 * means[task]:+.2f}" if task in means else "" for task in some))
        made.append(table)
    return made


def _heatmaps(
    wrapper: PrunedModel, found: list[Document], store: Store, pictures: int, numbers: list[int], block: int
) -> None:
    """The first documents of each task: what the model sees, and the information over it at some layers."""
    from lmms_prune.information.canvas import grids_of, seen_images
    from lmms_prune.information.plots import draw_heatmaps
    from lmms_prune.record.information import token_information

    layers = numbers[:: max(1, -(-len(numbers) // 7))]
    drawn: dict[str, int] = {}
    for document in found:
        drawn[document.task] = drawn.get(document.task, 0) + 1
        if drawn[document.task] > pictures:
            continue
        rows = store.read([document.sample])
        inputs = dict(wrapper.inputs_of(document.messages))
        grids = grids_of(wrapper, inputs)
        for image, picture in enumerate(seen_images(wrapper, inputs, grids)):
            maps = [(n, token_information(rows[rows.layer == n], image, grids[image], block)) for n in layers]
            line = rows.iloc[0]
            title = f"{document.sample}: the right answer is '{line.answer}', unpruned {line.p_full:.1%} probable\n"
            title += "red: the token alone makes it more probable, blue: less, by at most the number above"
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
    write(store.folder / "kept.csv", kept.to_csv(index=False))
    for task, lines in kept.groupby("task", sort=False):
        draw_kept(lines, f"{Path(wrapper.arguments.pretrained).name}, {task}", store.folder / f"kept-{task}")


def horizon(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; a run that was interrupted goes on there.")],
    model: Model = DEFAULT_MODEL,
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
    chosen, ratios = method_names(methods, oracle=True), ratios_of(keeps)
    if not 0 <= epsilon < 1:
        fail(f"--epsilon {epsilon}: write a share from 0 to below 1, such as 0.01.")
    with said_plainly():
        from lmms_prune.information.aggregate import by_sample
        from lmms_prune.information.horizon import find_horizon
        from lmms_prune.information.layer_sweep import Evaluation, acts_at, evaluate
        from lmms_prune.information.plots import draw_methods

        names = task_names(tasks)
        ready = load_unpruned(model, model_args)
        depth, about = ready.depth, ready.name
        evaluation = Evaluation(model, model_args, names, limit, secrets=SECRETS.get())
        measured = measured_rows(ready, names, limit, block, include, out / "information")
        acting = [(m, n, k) for k in ratios for m in chosen for n in range(depth) if acts_at(m, n)]
        alone = {one: _alone(*one, out / "information") for one in acting}
        schedules = ["none", *(f"vtw@{n}" for n in range(depth)), *alone.values()]
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("evaluations", total=len(schedules) * len(names))
            scores = evaluate(
                evaluation,
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
            _write_horizon(found[-1], f"{about}, {task}", out)
            if chosen:
                lines = _method_lines(task, alone, scores)
                write(out / f"methods-{task}.csv", lines.to_csv(index=False))
                draw_methods(lines, scores["none"][task].score, f"{about}, {task}", out / f"methods-{task}")
    said = [{k: v for k, v in vars(one).items() if k != "layers"} for one in found]
    write(out / "horizon.json", json.dumps({"model": about, "depth": depth, "tasks": said}, indent=1))
    if as_json:
        typer.echo(json.dumps({"out": str(out), "depth": depth, "tasks": said}))
        return
    Console(markup=False).print(_horizons(found, f"information horizon of {about}, {depth} layers ({depth}: none)"))
    typer.echo(f"tables and pictures are in {out}.")


def _write_horizon(found: Horizon, title: str, out: Path) -> None:
    """Both curves of a task, as a table and as a picture."""
    from lmms_prune.information.plots import draw_horizon

    draw_horizon(found, title, out / f"horizon-{found.task}")
    write(out / f"horizon-{found.task}.csv", found.layers.to_csv(index=False))


def _horizons(found: Sequence[Horizon], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("task", "horizon", "95 %", "by score", "by information", "VTW's criterion", "units"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for one in found:
        layers = (one.layer, f"{one.low} to {one.high}", one.by_accuracy, one.by_information, one.by_divergence)
        table.add_row(one.task, *map(str, layers), str(one.units))
    return table


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


def show(
    images: Annotated[list[Path], typer.Argument(help="One or more image files, asked about together.")],
    question: Annotated[str, typer.Option(help="What to ask about them.")],
    schedule: Annotated[str, typer.Option(help="What prunes: dart@2:0.44,random@20:0.07, or a preset.")],
    out: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")],
    model: Model = DEFAULT_MODEL,
    model_args: ModelArgs = "",
    new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Draw which visual tokens survive each stage, on the image, with the answers with and without pruning."""
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        fail(f"--out {out}: the name must end with .png, .svg or .pdf.")
    with said_plainly():
        read = Schedule.parse(schedule)
        if oracles := [stage.method for stage in read.stages if METHODS[stage.method].kind == "oracle"]:
            fail(f"--schedule {schedule}: {oracles[0]} needs a right answer, and a question of your own has none.")
        opened = []
        for path in images:
            try:
                opened.append(read_image(path))
            except OSError as error:
                fail(f"{path} cannot be read as an image: {error.strerror or error}.")
        from lmms_prune.harness.models import unpruned
        from lmms_prune.information.show import draw_shown
        from lmms_prune.information.show import show as ask
        from lmms_prune.pruning.hooks import check

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
