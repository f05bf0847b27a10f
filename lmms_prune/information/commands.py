"""``lmms-prune information``, ``horizon`` and ``show``. Heavy modules are imported only when one of them runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lmms_prune.information.options import (
    DocumentChoice,
    Keeps,
    LabelOption,
    Sample,
    SampleSeed,
    Shard,
    Tasks,
    draw_of,
    keeps_of,
    label_of,
    layer_numbers,
    load_unpruned,
    measure_missing,
    method_names,
    numbers_of,
    refuse_unscored,
    task_names,
    user_errors,
)
from lmms_prune.record.files import write
from lmms_prune.terminal.console import SECRETS, fail
from lmms_prune.terminal.options import Include, Json, Launch, Limit, Model, ModelArgs, Wrapper
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.harness.documents import Document, Draw
    from lmms_prune.harness.pruned import PrunedModel
    from lmms_prune.information.horizon import Horizon
    from lmms_prune.information.part import MeasureRequest
    from lmms_prune.record.information import Store


def information(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run resumes from it.")],
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    limit: Limit = None,
    layers: Annotated[str | None, typer.Option(help="Decoder layers: 0-31, or 0,8,16. Default: all.")] = None,
    block: Annotated[
        int,
        typer.Option(
            min=1,
            help="Side of a unit, in visual tokens: 1 for single tokens, as the paper defines it; 2 for squares of four, as the "
            "authors' code measures it.",
        ),
    ] = 2,
    label: LabelOption = "probable",
    methods: Annotated[
        str,
        typer.Option(
            help="Also measure how much information these methods keep; slower. Names, also with options, separated by commas: "
            "dart;order=reference,my_idea.py."
        ),
    ] = "",
    keeps: Keeps = "0.1,0.25,0.5",
    sample: Sample = None,
    sample_seed: SampleSeed = 0,
    shard: Shard = None,
    launch: Launch = "",
    pictures: Annotated[int, typer.Option(min=0, help="Number of documents of each task to draw heat maps of.")] = 2,
    include: Include = None,
    as_json: Json = False,
) -> None:
    """Measure what each visual token is worth at each layer.

    It is measured on the documents of any lmms-eval task. The information of a token at a layer is how much it raises
    the probability of the right answer's first token if the layers from there on see no other visual token (arXiv
    2512.07580). The others are deleted, as in the paper's code; the zero masks of its equations 2, 3 and 5 would give
    other numbers, and other signs. Results are stored document by document. The same folder gets tables (CSV) and plots
    (PNG, SVG) of all documents.

    Example: lmms-prune information --tasks pope --limit 50 --out information
    """
    chosen, kept, rule = method_names(methods, options=True, own=True), keeps_of(keeps), label_of(label)
    draw = draw_of(sample, sample_seed, limit)
    with user_errors():
        from lmms_prune.harness.models import as_lmms_eval
        from lmms_prune.information.part import MeasureRequest, measure_launched, measure_part
        from lmms_prune.sweep.jobs import shard_of

        choice = DocumentChoice(task_names(tasks), include, limit, draw)
        part = shard_of(shard)
        wrapper, model_args = as_lmms_eval(model, wrapper, model_args)
        request = MeasureRequest(wrapper, model_args, choice, layers, block, out, rule, part)
        if shard is not None:
            return _shard_measured(request, measure_part(launch, request), as_json)
        if launch:
            measure_launched(launch, request)
        loaded = load_unpruned(wrapper, model_args)
        numbers, documents = layer_numbers(layers, loaded.depth), choice.documents(wrapper)
        store = measure_missing(loaded.wrapper, documents, numbers, block, out, rule)
        choice.record(numbers_of(documents), out)
        averages = _write_averages(loaded.wrapper, documents, store)
        _heatmaps(loaded.wrapper, documents, store, pictures, numbers, block)
        if chosen:
            _kept(loaded.wrapper, documents, store, chosen, kept, numbers, block)
    if as_json:
        typer.echo(json.dumps({"out": str(out), "samples": len(documents), "layers": averages.to_dict("records")}))
        return
    console = Console(markup=False)
    console.print("mean information of a visual token (probability, in thousandths)")
    for table in _tables(averages, console.width):
        console.print(table)
    typer.echo(f"{len(documents)} document{'' if len(documents) == 1 else 's'}; tables and pictures are in {out}.")


def _shard_measured(request: MeasureRequest, counts: tuple[int, int], as_json: bool) -> None:
    """Say what a part of the work has measured, and what collects it."""
    (own, total), (part, parts) = counts, request.shard
    if as_json:
        typer.echo(json.dumps({"out": str(request.out), "shard": f"{part}/{parts}", "samples": own, "of": total}))
        return
    typer.echo(
        f"{own} of {total} documents are measured in {request.out}; the same command without --shard collects all parts."
    )


def _write_averages(wrapper: PrunedModel, documents: list[Document], store: Store) -> pd.DataFrame:
    """Write and plot mean information by layer; returns the output of `by_layer`."""
    from lmms_prune.information.aggregate import by_layer, by_sample
    from lmms_prune.information.plots import draw_layers

    averages = by_layer(by_sample(store.read([document.sample for document in documents])))
    write(store.folder / "layers.csv", averages.to_csv(index=False))
    model = Path(wrapper.arguments.pretrained).name
    title = f"{model}: information of visual tokens ({len(documents)} documents)"
    draw_layers(averages, title, store.folder / "layers")
    return averages


def _tables(averages: pd.DataFrame, width: int) -> list[Table]:
    """Mean information with one line per layer and one column per task; several tables if `width` is too narrow."""
    tasks = list(dict.fromkeys(averages.task))
    # The column of layers is 9 characters wide, the others 8, with 3 between them.
    per_table = max(1, (width - 9) // 11)
    tables = []
    for start in range(0, len(tasks), per_table):
        names = tasks[start : start + per_table]
        table = Table(box=box.SIMPLE_HEAD)
        table.add_column("layer", justify="right")
        for task in names:
            # A long name may be wrapped, a number must not.
            table.add_column(task, justify="right", overflow="fold", min_width=8)
        for layer, lines in averages.groupby("layer"):
            means = dict(zip(lines.task, lines["mean"], strict=True))
            table.add_row(str(layer), *(f"{1000 * means[task]:+.2f}" if task in means else "" for task in names))
        tables.append(table)
    return tables


def _heatmaps(
    wrapper: PrunedModel, documents: list[Document], store: Store, pictures: int, numbers: list[int], block: int
) -> None:
    """Draw heat maps of the first documents of each task: information at some layers over what the model sees."""
    from lmms_prune.harness.prompts import question_text
    from lmms_prune.information.canvas import grids_by_image, seen_images
    from lmms_prune.information.plots import draw_heatmaps, task_title
    from lmms_prune.record.information import token_information

    layers = numbers[:: max(1, -(-len(numbers) // 7))]
    drawn: dict[str, int] = {}
    for document in documents:
        drawn[document.task] = drawn.get(document.task, 0) + 1
        if drawn[document.task] > pictures:
            continue
        rows = store.read([document.sample])
        inputs = dict(wrapper.inputs_of(document.messages))
        images = grids_by_image(wrapper, inputs)
        grids = [grid for of_image in images for grid in of_image]
        by_layer = [
            [
                values
                for image, of_image in enumerate(images)
                for values in token_information(rows[rows.layer == n], image, of_image, block)
            ]
            for n in layers
        ]
        for number, picture in enumerate(seen_images(wrapper, inputs, grids)):
            maps = [(n, values[number]) for n, values in zip(layers, by_layer, strict=True)]
            line = rows.iloc[0]
            question = question_text(wrapper.chat(document.messages))
            title = f"{task_title(document.task)}, {document.sample}: {question}\n"
            title += f"The right answer is '{line.answer}', unpruned {line.p_full:.1%} probable. "
            title += "Red: the token alone makes it more probable, blue: less."
            name = document.sample.replace("/", "-") + (f"-image{number}" if len(grids) > 1 else "")
            draw_heatmaps(picture, maps, title, store.folder / "heatmaps" / name)


def _kept(
    wrapper: PrunedModel,
    documents: list[Document],
    store: Store,
    methods: list[str],
    keeps: list[float | str],
    numbers: list[int],
    block: int,
) -> None:
    """Write and plot how much information the methods keep."""
    from lmms_prune.information.kept import kept_information
    from lmms_prune.information.plots import draw_kept, task_title

    with Progress("kept information, documents", len(documents)) as progress:
        kept = kept_information(wrapper, progress.over(documents), store, methods, keeps, numbers, block)
    write(store.folder / "kept.csv", kept.to_csv(index=False))
    for task, lines in kept.groupby("task", sort=False):
        documents_read = lines["sample"].nunique()
        title = (
            f"{Path(wrapper.arguments.pretrained).name}, {task_title(str(task))}: mean of {documents_read} documents"
        )
        draw_kept(lines, title, store.folder / f"kept-{task}")


def horizon(
    tasks: Tasks,
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run resumes from it.")],
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    limit: Limit = None,
    block: Annotated[int, typer.Option(min=1, help="Side of a unit of information, in visual tokens.")] = 2,
    label: LabelOption = "probable",
    epsilon: Annotated[float, typer.Option(help="Share of the unpruned score that may be lost.")] = 0.01,
    methods: Annotated[
        str,
        typer.Option(
            help="Also evaluate these methods, each as the only stage, at each layer; `information` is an oracle. Names, also "
            "with options, separated by commas: random,sgl;guide=FOLDER,my_idea.py."
        ),
    ] = "",
    keeps: Keeps = "0.1,0.25",
    sample: Sample = None,
    sample_seed: SampleSeed = 0,
    information_limit: Annotated[
        int | None, typer.Option(min=1, help="Measure information on so many of the documents only; scores on all.")
    ] = None,
    scores_only: Annotated[
        bool, typer.Option("--scores-only", help="Measure no information: the horizon is found by scores alone.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap resamples.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    include: Include = None,
    measured_in: Annotated[
        Path | None,
        typer.Option(
            "--information", help="Folder of measured information, also of other commands. Default: in --out."
        ),
    ] = None,
    shard: Shard = None,
    launch: Launch = "",
    as_json: Json = False,
) -> None:
    """Find from which layer on visual tokens are worthless.

    This layer is each task's information horizon. It is the smallest layer such that at it and at all deeper layers,
    removing all visual tokens costs at most --epsilon of the unpruned score, and mean information is below 0.01.
    Measures information (as `information` does), evaluates the removal at every layer with lmms-eval, and plots both.
    VTW's criterion is shown for comparison.

    Example: lmms-prune horizon --tasks textvqa_val --limit 64 --out horizon
    """
    chosen = method_names(methods, oracle=True, options=True, own=True)
    kept, rule = keeps_of(keeps), label_of(label)
    if not 0 <= epsilon < 1:
        fail(f"--epsilon {epsilon}: write a share from 0 to below 1, such as 0.01.")
    draw = draw_of(sample, sample_seed, limit)
    with user_errors():
        from lmms_prune.harness.models import as_lmms_eval
        from lmms_prune.information.layer_horizons import (
            HorizonRequest,
            averages_of,
            evaluate_part,
            is_oracle,
            scores_of,
            write_horizons,
        )
        from lmms_prune.information.layer_sweep import Evaluation
        from lmms_prune.information.part import MeasureRequest
        from lmms_prune.sweep.jobs import shard_of

        oracles = [name for name in chosen if is_oracle(name)]
        _refuse_contradictions(scores_only, information_limit, sample or limit, oracles, measured_in)
        names = task_names(tasks)
        choice = DocumentChoice(names, include, limit, draw)
        wrapper, model_args = as_lmms_eval(model, wrapper, model_args)
        refuse_unscored(names, wrapper, include)
        smaller, store = choice.smaller(information_limit), measured_in or out / "information"
        drawn = None if draw is None else choice.numbers(wrapper)
        evaluation = Evaluation(
            wrapper,
            model_args,
            names,
            limit,
            documents=drawn,
            sample="" if draw is None else draw.described,
            include=include,
            secrets=SECRETS.get(),
        )
        request = HorizonRequest(
            MeasureRequest(wrapper, model_args, smaller, None, block, store, rule, shard_of(shard)),
            evaluation,
            methods=chosen,
            keeps=kept,
            out=out,
            scores_only=scores_only,
            partial=information_limit is not None,
            epsilon=epsilon,
            resamples=resamples,
            seed=seed,
            launch=launch,
        )
        if shard is not None:
            return _shard_evaluated(request.measure, out, *evaluate_part(request), as_json)
        depth, model_title, averages = averages_of(request)
        scores = scores_of(request, depth)
        choice.record(drawn or {}, out)
        horizons = write_horizons(request, depth, model_title, averages, scores)
    _say_horizons(horizons, model_title, depth, draw, out, as_json)


def _refuse_contradictions(
    scores_only: bool,
    information_limit: int | None,
    limit: int | None,
    oracles: Sequence[str],
    measured_in: Path | None,
) -> None:
    """End the command if its options about information contradict each other."""
    if scores_only and measured_in is not None:
        fail(f"--information {measured_in} and --scores-only: without information that folder is not read.")
    if scores_only and information_limit is not None:
        fail(
            f"--information-limit {information_limit} and --scores-only: without information there is nothing to limit."
        )
    if scores_only and oracles:
        fail(f"--methods {oracles[0]}: an oracle reads measured information, and --scores-only measures none.")
    if information_limit is not None and oracles:
        fail(
            f"--methods {oracles[0]}: an oracle needs the information of every evaluated document; leave --information-limit out."
        )
    if information_limit is not None and limit is not None and information_limit > limit:
        fail(f"--information-limit {information_limit}: only {limit} documents of each task are evaluated.")


def _shard_evaluated(
    request: MeasureRequest, out: Path, schedules: int, counts: tuple[int, int], as_json: bool
) -> None:
    """Say what a part of the work has done, and what collects it."""
    part, parts = request.shard
    if as_json:
        done = {"shard": f"{part}/{parts}", "schedules": schedules, "samples": counts[0]}
        typer.echo(json.dumps({"out": str(out), **done}))
        return
    typer.echo(
        f"part {part} of {parts}: {schedules} schedules are evaluated, and {counts[0]} documents measured; the same command "
        "without --shard collects all parts."
    )


def _say_horizons(
    horizons: Sequence[Horizon], model: str, depth: int, draw: Draw | None, out: Path, as_json: bool
) -> None:
    """Write all horizons to ``horizon.json``, and print them."""
    task_records = [{k: v for k, v in vars(horizon).items() if k != "layers"} for horizon in horizons]
    record: dict[str, Any] = {"model": model, "depth": depth, "tasks": task_records}
    record |= {} if draw is None else {"sample": draw.size, "sample_seed": draw.seed}
    write(out / "horizon.json", json.dumps(record, indent=1))
    if as_json:
        typer.echo(json.dumps({"out": str(out), **{k: v for k, v in record.items() if k != "model"}}))
        return
    Console(markup=False).print(_horizons(horizons, f"information horizon of {model}, {depth} layers ({depth}: none)"))
    typer.echo(f"tables and pictures are in {out}.")


def _horizons(horizons: Sequence[Horizon], title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    for column in ("task", "horizon", "95 %", "by score", "by information", "VTW's criterion", "units"):
        table.add_column(column, justify="left" if column == "task" else "right")
    for horizon in horizons:
        interval = f"{horizon.low} to {horizon.high}"
        criteria = (horizon.by_accuracy, horizon.by_information, horizon.by_divergence)
        cells = (horizon.layer, interval, *criteria, horizon.units)
        table.add_row(horizon.task, *("-" if cell is None else str(cell) for cell in cells))
    return table


def show(
    images: Annotated[list[Path], typer.Argument(help="One or more image files, asked about together.")],
    question: Annotated[str, typer.Option(help="The question about them.")],
    schedule: Annotated[
        str, typer.Option(help="The schedule: dart@2:0.44,random@20:0.07, or a preset's name; may end with ,budget=….")
    ],
    out: Annotated[Path, typer.Option(help="File of the picture: .png, .svg or .pdf.")] = Path("kept.png"),
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    new_tokens: Annotated[int, typer.Option(min=1, help="The largest number of tokens in an answer.")] = 64,
    as_json: Json = False,
) -> None:
    """Draw which visual tokens each stage keeps.

    They are drawn on the image, with the answers with and without pruning.

    Example: lmms-prune show a.png --question 'Which city?' --schedule dart@2:0.44
    """
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        fail(f"--out {out}: the name must end with .png, .svg or .pdf.")
    with user_errors():
        from lmms_prune.information.show import show as compare

        comparison = compare(
            list(images),
            question,
            schedule,
            model=model,
            wrapper=wrapper,
            model_args=model_args,
            new_tokens=new_tokens,
            out=out,
        )
    trace = comparison.trace
    if as_json:
        record: dict[str, Any] = {"unpruned": comparison.unpruned, "pruned": comparison.answer}
        record |= {"schedule": str(comparison.schedule), "out": str(out), "kept": trace.kept}
        typer.echo(json.dumps({**record, "avg_visual_tokens": trace.avg_visual_tokens}))
        return
    typer.echo(
        f"unpruned: {comparison.unpruned}\npruned:   {comparison.answer}\n{out}: on average "
        f"{trace.avg_visual_tokens:.1f} of {trace.visual_tokens} visual tokens a layer"
    )
