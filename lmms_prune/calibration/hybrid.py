"""``lmms-prune calibrate --tasks …``: finds a hybrid schedule from measurements. Heavy modules are imported when it runs."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from lmms_prune.errors import ScheduleError
from lmms_prune.information.options import (
    Include,
    LoadedModel,
    load_documents,
    load_unpruned,
    measured_rows,
    method_names,
    refuse_unscored,
    task_names,
    user_errors,
)
from lmms_prune.record.files import write
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS, fail
from lmms_prune.terminal.options import DEFAULT_MODEL, Json, Model, ModelArgs

if TYPE_CHECKING:
    from lmms_prune.calibration.propose import Proposal


def calibrate(
    tasks: Annotated[str, typer.Option(help="Benchmarks to choose the schedule on, separated by commas.")],
    budget: Annotated[
        str, typer.Option(help="Average visual tokens a layer (192t, 0.5), FLOPs (flops=40%) or cache (kv=100MiB).")
    ],
    limit: Annotated[
        int, typer.Option(min=2, help="Documents of each task to choose on; as many more are used to verify.")
    ] = 64,
    model: Model = DEFAULT_MODEL,
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
    launch: Annotated[str, typer.Option(help="Launcher of the evaluating processes, as for `sweep`.")] = "",
    as_json: Json = False,
) -> None:
    """Find the hybrid schedule that loses least at a budget; `lmms-prune calibrate --tasks …` runs this command too.

    Measures information on the first --limit documents of each task. In the candidates, few random tokens or none are kept
    from the layer on at which information has vanished, or at which removing all visual tokens loses nothing. Before that
    layer, a method prunes to meet the budget. All candidates are evaluated, and the best one again on the next --limit
    documents. It is stored for `schedule=auto,budget=…`, and written as a YAML for lmms-eval.
    """
    chosen = method_names(methods)
    with user_errors():
        from lmms_prune.calibration.propose import candidates, propose, removal_horizon
        from lmms_prune.harness.calibrations import calibration_file, keep_calibration
        from lmms_prune.information.aggregate import by_layer, by_sample
        from lmms_prune.information.horizon import vanishes
        from lmms_prune.information.layer_sweep import Evaluation

        names = task_names(tasks)
        parsed = [Schedule.parse(text) for text in compared or []]
        refuse_unscored(names, model, include)
        evaluation = Evaluation(model, model_args, names, limit, include=include, secrets=SECRETS.get())
        loaded = load_unpruned(model, model_args)
        _check_budget(budget, loaded)
        _check_documents(names, loaded, limit, include)
        others = [str(_solved(schedule, budget, loaded)) for schedule in parsed]
        rows = measured_rows(loaded, names, limit, block, include, out / "information")
        first = vanishes(by_layer(by_sample(rows)))
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("evaluations", total=None)
            report = lambda outcome: progress.advance(bar)  # noqa: E731
            layer = removal_horizon(evaluation, first, loaded.depth, out / "chosen", launch, report)
            texts = candidates(chosen, sorted({first, layer}), budget, loaded.prompt_sizes)
            progress.update(bar, completed=0, total=(len(texts) + 3 + len(others)) * len(names))
            proposal = propose(evaluation, texts, layer, out, launch, report, others)
        checkpoint, adapter = loaded.wrapper.arguments.pretrained, loaded.wrapper.arguments.peft
        record = {
            "schedule": proposal.schedule,
            "vanishes": first,
            "horizon": layer,
            "budget": budget,
            "tasks": names,
            "limit": limit,
        }
        record |= {"chosen": vars(proposal.chosen), "verified": vars(proposal.verified)}
        record |= {"tried": {text: vars(measured) for text, measured in proposal.tried.items()}}
        record |= {"compared": {text: vars(measured) for text, measured in proposal.compared.items()}}
        stored = calibration_file(checkpoint, budget, adapter=adapter)
        keep_calibration(stored, record)
        path = out / f"{Path(checkpoint).name}_auto-{budget}.yaml"
        _write_config(path, model, f"{model_args},schedule={proposal.schedule}".strip(","), names)
    if as_json:
        typer.echo(json.dumps({**record, "yaml": str(path), "kept": str(stored)}))
        return
    _print(proposal, f"information vanishes at layer {first}, removal is free at {layer}, of {loaded.depth}", limit)
    typer.echo(f"{path}\nFrom now on, schedule=auto,budget={budget} means this schedule.")


def _write_config(path: Path, model: str, model_args: str, tasks: list[str]) -> None:
    """A YAML for ``lmms-eval --config``."""
    import yaml

    settings: dict[str, Any] = {"model": model, "model_args": model_args, "tasks": ",".join(tasks)}
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


def _check_documents(names: list[str], loaded: LoadedModel, limit: int, include: Path | None) -> None:
    """Refuse a limit that leaves too few documents to verify on, before anything is measured."""
    documents = load_documents(names, loaded.wrapper.family.model_name, 2 * limit, include)
    for task, count in Counter(document.task for document in documents).items():
        if count < 2 * limit:
            fail(
                f"--limit {limit}: {task} has {count} documents, {2 * limit} are needed: half to choose on and half to verify. "
                f"Use --limit {count // 2} or less."
            )


def _solved(schedule: Schedule, budget: str, loaded: LoadedModel) -> Schedule:
    """A schedule given for comparison, checked, and with its ``?`` solved from the same budget."""
    if schedule.unknown is not None:
        return schedule.solve(budget, loaded.prompt_sizes)
    schedule.check(loaded.depth)
    return schedule
