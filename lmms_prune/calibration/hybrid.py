"""``lmms-prune calibrate --tasks …``: finds a hybrid schedule from measurements. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from lmms_prune.errors import ScheduleError
from lmms_prune.harness.argument_text import ArgumentError, extended
from lmms_prune.information.options import (
    DocumentChoice,
    LoadedModel,
    Sample,
    SampleSeed,
    draw_of,
    load_unpruned,
    measured_rows,
    method_names,
    refuse_unscored,
    task_names,
    user_errors,
)
from lmms_prune.record.files import write
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS, fail, plainly
from lmms_prune.terminal.options import Include, Json, Launch, Model, ModelArgs, Wrapper
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    import pandas as pd

    from lmms_prune.calibration.data import Sample as OwnSample
    from lmms_prune.calibration.propose import Proposal
    from lmms_prune.harness.documents import Draw
    from lmms_prune.information.layer_sweep import Evaluation

DEFAULT_LIMIT = 64


def hybrid(
    budget: Annotated[
        str,
        typer.Option(
            help="Average visual tokens a layer (192t, 0.5), FLOPs (flops=40%), cache (kv=100MiB), or the estimated time to first "
            "token on a card (ttft@h100=60%)."
        ),
    ],
    tasks: Annotated[
        str | None, typer.Option(help="Benchmarks to choose the schedule on, separated by commas.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Own samples instead: JSONL or JSON of image, question and answers; without answers, agreement with the unpruned "
            "model is measured."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="With --data: folder that image paths are relative to. Default: the data file's folder."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=2,
            help=f"The first documents of each task, to choose on; as many more verify. Default: {DEFAULT_LIMIT}; of --data at most "
            "half.",
        ),
    ] = None,
    sample: Sample = None,
    sample_seed: SampleSeed = 0,
    model: Model = None,
    wrapper: Wrapper = None,
    model_args: ModelArgs = "",
    methods: Annotated[
        str, typer.Option(help="Methods that may prune in early layers, separated by commas.")
    ] = "dart,divprune",
    compared: Annotated[
        list[str] | None,
        typer.Option(
            "--compare",
            help="A schedule to compare with on the verification documents; its ? is solved from the budget. Repeatable.",
        ),
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Side of a unit of information, in visual tokens.")] = 2,
    out: Annotated[Path, typer.Option(help="Folder of the results; an interrupted run resumes from it.")] = Path(
        "calibration"
    ),
    include: Include = None,
    launch: Launch = "",
    as_json: Json = False,
) -> None:
    """Find the hybrid schedule that loses least at a budget.

    `lmms-prune calibrate --tasks …` runs this command too. It measures information on the first --limit documents of
    each task, or on --sample documents drawn at random. In the candidates, few random tokens or none are kept from the
    layer on at which information has vanished, or at which removing all visual tokens loses nothing. Before that layer,
    a method prunes to meet the budget. All candidates are evaluated, and the best one again on as many other documents;
    with --data, all of this is of your own samples. It is stored for `schedule=auto,budget=…`, and written as a YAML
    for lmms-eval.

    Example: lmms-prune calibrate hybrid --tasks textvqa_val --budget 192t
    """
    chosen = method_names(methods)
    draw = draw_of(sample, sample_seed, limit)
    _check_source(tasks, data, images, include, sample)
    from lmms_prune.calibration.data import SearchError

    with user_errors(), plainly(SearchError):
        from lmms_prune.calibration.own_data import read_own
        from lmms_prune.harness.calibrations import calibration_file, keep_calibration
        from lmms_prune.harness.models import as_lmms_eval
        from lmms_prune.information.layer_sweep import Evaluation

        own: list[OwnSample] = []
        own, count = (own, sample or limit or DEFAULT_LIMIT) if data is None else read_own(data, images, limit)
        parsed = [Schedule.parse(text) for text in compared or []]
        names = [] if tasks is None else task_names(tasks)
        wrapper, model_args = as_lmms_eval(model, wrapper, model_args)
        refuse_unscored(names, wrapper, include)
        loaded = load_unpruned(wrapper, model_args)
        _check_budget(budget, loaded)
        if data is not None:
            include = out / "data"
            names = [_own_task(Evaluation(wrapper, model_args, [], include=include), own, data, out, launch)]
        halves = _halves(names, loaded, count, include, draw)
        common = Evaluation(wrapper, model_args, names, include=include, secrets=SECRETS.get())
        evaluation, verification = _evaluations(common, count, draw, halves)
        others = [str(_solved(schedule, budget, loaded)) for schedule in parsed]
        rows = measured_rows(loaded, names, None if draw else count, block, include, out / "information", draw)
        first, proposal = _search(loaded, rows, evaluation, verification, chosen, budget, others, out, launch)
        record = _about(data, own) | _record(proposal, draw, count)
        record |= {"vanishes": first, "budget": budget, "tasks": names}
        if draw is not None:
            write(out / "documents.json", json.dumps({**vars(draw), "chosen": halves[0], "verified": halves[1]}))
        checkpoint, adapter = loaded.wrapper.arguments.pretrained, loaded.wrapper.arguments.peft
        stored = calibration_file(checkpoint, budget, adapter=adapter)
        keep_calibration(stored, record)
        path = out / f"{Path(checkpoint).name}_auto-{budget}.yaml"
        _write_config(path, wrapper, extended(model_args, {"schedule": proposal.schedule}), names, include)
    if as_json:
        typer.echo(json.dumps({**record, "yaml": str(path), "kept": str(stored)}))
        return
    title = f"information vanishes at layer {first}, removal is free at {proposal.horizon}, of {loaded.depth}"
    _print(proposal, title, count)
    typer.echo(f"{path}\nFrom now on, schedule=auto,budget={budget} means this schedule.")


def _search(
    loaded: LoadedModel,
    rows: pd.DataFrame,
    evaluation: Evaluation,
    verification: Evaluation,
    methods: list[str],
    budget: str,
    others: list[str],
    out: Path,
    launch: str,
) -> tuple[int, Proposal]:
    """Evaluate the candidates and the schedules to compare with.

    Args:
        loaded: the model.
        rows: its measured information.
        evaluation, verification: the documents to choose on, and to verify on.
        methods: methods that may prune in early layers.
        budget: what the candidates must meet.
        others: schedules to compare with.
        out, launch: as for `evaluate`.

    Returns:
        the layer at which information vanishes, and the proposal.
    """
    from lmms_prune.calibration.propose import TRIED, candidates, propose, removal_horizon
    from lmms_prune.information.aggregate import by_layer, by_sample
    from lmms_prune.information.horizon import vanishes

    first, tasks = vanishes(by_layer(by_sample(rows))), len(evaluation.tasks)
    with Progress("without visual tokens, evaluations", (1 + TRIED) * tasks) as progress:
        report = lambda outcome: progress.advance()  # noqa: E731
        layer = removal_horizon(evaluation, first, loaded.depth, out / "chosen", launch, report)
    texts = candidates(methods, sorted({first, layer}), budget, loaded.prompt_sizes)
    with Progress("candidates, evaluations", (len(texts) + 3 + len(others)) * tasks) as progress:
        report = lambda outcome: progress.advance()  # noqa: E731
        return first, propose(evaluation, verification, texts, layer, out, launch, report, others)


def _check_source(
    tasks: str | None, data: Path | None, images: Path | None, include: Path | None, sample: int | None
) -> None:
    """Refuse a call that does not name exactly one source of documents, or an option of the other source."""
    if (tasks is None) == (data is None):
        fail("calibrate: give --tasks, the benchmarks to choose on, or --data, a file of your own samples.")
    for option, value in (("--include-path", include), ("--sample", sample)):
        if data is not None and value is not None:
            fail(f"{option} {value}: it belongs to --tasks; the first samples of --data choose, the next ones verify.")
    if data is None and images is not None:
        fail(f"--images {images}: it belongs to --data.")


def _own_task(evaluation: Evaluation, samples: list[OwnSample], data: Path, out: Path, launch: str) -> str:
    """Write the task of a user's samples, answered by the unpruned model if they have no answers, and return its name."""
    from lmms_prune.calibration.own_data import answered, write_task

    assert evaluation.include is not None
    name = write_task(evaluation.include, data, samples)
    if not samples[0].answers:
        asked = replace(evaluation, tasks=[name], limit=len(samples), secrets=SECRETS.get())
        answers = answered(asked, samples, out / "answers", launch, lambda outcome: None)
        write_task(evaluation.include, data, answers)
    return name


def _record(proposal: Proposal, draw: Draw | None, count: int) -> dict[str, Any]:
    """What is stored of a proposal."""
    record: dict[str, Any] = {"schedule": proposal.schedule, "horizon": proposal.horizon}
    record |= {"limit": count} if draw is None else {"sample": draw.size, "sample_seed": draw.seed}
    record |= {"chosen": vars(proposal.chosen), "verified": vars(proposal.verified)}
    record |= {"tried": {text: vars(measured) for text, measured in proposal.tried.items()}}
    return record | {"compared": {text: vars(measured) for text, measured in proposal.compared.items()}}


def _about(data: Path | None, samples: list[OwnSample]) -> dict[str, str]:
    """What the record says of a user's own samples."""
    from lmms_prune.calibration.own_data import digest

    if data is None:
        return {}
    scored = "answers" if samples[0].answers else "agreement with the unpruned model"
    return {"data": data.name, "data_sha256": digest(data), "scored_by": scored}


def _write_config(path: Path, model: str, model_args: str, tasks: list[str], include: Path | None) -> None:
    """A YAML for ``lmms-eval --config``."""
    import yaml

    settings: dict[str, Any] = {"model": model, "model_args": model_args, "tasks": ",".join(tasks)}
    settings |= {} if include is None else {"include_path": str(include.absolute())}
    settings |= {"log_samples": True, "output_path": f"results/{path.stem}"}
    write(path, yaml.safe_dump(settings, sort_keys=False))


def _print(proposal: Proposal, title: str, limit: int) -> None:
    """Print the candidates' losses, and the best candidate's and the compared schedules' on the verification documents."""
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("schedule", overflow="fold")
    table.add_column("loss", justify="right")
    table.add_column("95 %", justify="right")
    for text, loss in proposal.tried.items():
        table.add_row(text, f"{loss.value:.1f} %", f"{loss.low:.1f} to {loss.high:.1f} %")
    Console(markup=False).print(table)
    verified = proposal.verified
    typer.echo(
        f"schedule={proposal.schedule}\nloses {verified.value:.1f} % of the unpruned scores "
        f"({verified.low:.1f} to {verified.high:.1f} %) "
        f"on {limit} other documents of each task."
    )
    for text, loss in proposal.compared.items():
        typer.echo(f"there {text} loses {loss.value:.1f} % ({loss.low:.1f} to {loss.high:.1f} %)")


def _check_budget(budget: str, loaded: LoadedModel) -> None:
    """Refuse a budget that no schedule can meet, before anything is measured."""
    try:
        # Before the decoder any number of tokens can be kept: what this schedule cannot meet, none can.
        Schedule.parse("random@0:?").solve(budget, loaded.prompt_sizes)
    except ScheduleError as error:
        reason = str(error).splitlines()[0].removeprefix("schedule: ")
        fail(f"--budget {budget}: {reason}")


def _halves(
    names: list[str], loaded: LoadedModel, count: int, include: Path | None, draw: Draw | None
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """The numbers of the documents to choose on and to verify on, by task.

    Ends the command if a task has too few, before anything is measured.
    """
    model = loaded.wrapper.family.model_name
    if draw is None:
        numbers = DocumentChoice(names, include, 2 * count).numbers(model)
        for task, first in numbers.items():
            if len(first) < 2 * count:
                fail(
                    f"--limit {count}: {task} has {len(first)} documents, {2 * count} are needed: half to choose on and half to "
                    f"verify. Use --limit {len(first) // 2} or less."
                )
        return {t: first[:count] for t, first in numbers.items()}, {t: first[count:] for t, first in numbers.items()}
    chosen = DocumentChoice(names, include, draw=draw).numbers(model)
    try:
        both = DocumentChoice(names, include, draw=replace(draw, size=2 * count)).numbers(model)
    except ArgumentError as error:
        raise ArgumentError(f"--sample {count}: as many others are needed to verify on. {error}") from error
    # A smaller draw is a part of the larger one.
    return chosen, {task: sorted({*drawn} - {*chosen[task]}) for task, drawn in both.items()}


def _evaluations(
    common: Evaluation, count: int, draw: Draw | None, halves: tuple[dict[str, list[int]], dict[str, list[int]]]
) -> tuple[Evaluation, Evaluation]:
    """What is evaluated to choose, and to verify."""
    if draw is None:
        return replace(common, limit=count), replace(common, limit=count, offset=count)
    others = f"{count} others of {2 * count} with seed {draw.seed}"
    return (
        replace(common, documents=halves[0], sample=draw.described),
        replace(common, documents=halves[1], sample=others),
    )


def _solved(schedule: Schedule, budget: str, loaded: LoadedModel) -> Schedule:
    """A schedule given for comparison, checked, and with its ``?`` solved from the same budget."""
    if schedule.unknown is not None:
        return schedule.solve(budget, loaded.prompt_sizes)
    schedule.check(loaded.depth)
    return schedule
