"""``lmms-prune calibrate --tasks …``: a hybrid schedule from what was measured. Heavy modules are imported only when it runs."""

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
    Ready,
    found_documents,
    load_unpruned,
    measured_rows,
    method_names,
    said_plainly,
    task_names,
)
from lmms_prune.record.files import write
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS, fail
from lmms_prune.terminal.options import DEFAULT_MODEL, Json, Model, ModelArgs

if TYPE_CHECKING:
    from lmms_prune.calibration.propose import Proposal


def calibrate(
    tasks: Annotated[str, typer.Option(help="Benchmarks whose documents decide, with commas.")],
    budget: Annotated[
        str, typer.Option(help="Average visual tokens a layer (192t, 0.5), FLOPs (flops=40%) or cache (kv=100MiB).")
    ],
    limit: Annotated[
        int, typer.Option(min=2, help="Documents of each task that choose, and as many that verify.")
    ] = 64,
    model: Model = DEFAULT_MODEL,
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
    chosen = method_names(methods)
    with said_plainly():
        from lmms_prune.calibration.propose import candidates, propose, removal_horizon
        from lmms_prune.harness.calibrations import calibration_file, keep_calibration
        from lmms_prune.information.aggregate import by_layer, by_sample
        from lmms_prune.information.horizon import vanishes
        from lmms_prune.information.layer_sweep import Evaluation

        names = task_names(tasks)
        read = [Schedule.parse(text) for text in beside or []]
        evaluation = Evaluation(model, model_args, names, limit, secrets=SECRETS.get())
        ready = load_unpruned(model, model_args)
        _check_budget(budget, ready)
        _check_documents(names, ready, limit, include)
        others = [str(_solved(one, budget, ready)) for one in read]
        measured = measured_rows(ready, names, limit, block, include, out / "information")
        first = vanishes(by_layer(by_sample(measured)))
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("evaluations", total=None)
            report = lambda outcome: progress.advance(bar)  # noqa: E731
            layer = removal_horizon(evaluation, first, ready.depth, out / "chosen", launch, report)
            texts = candidates(chosen, sorted({first, layer}), budget, ready.prompt_sizes)
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
        _write_config(path, model, f"{model_args},schedule={found.schedule}".strip(","), names)
    if as_json:
        typer.echo(json.dumps({**said, "yaml": str(path), "kept": str(kept)}))
        return
    _print(found, f"information vanishes at layer {first}, removal is free at {layer}, of {ready.depth}", limit)
    typer.echo(f"{path}\nFrom now on schedule=auto,budget={budget} stands for it.")


def _write_config(path: Path, model: str, model_args: str, tasks: list[str]) -> None:
    """A YAML for ``lmms-eval --config``."""
    import yaml

    settings: dict[str, Any] = {"model": model, "model_args": model_args, "tasks": ",".join(tasks)}
    settings |= {"log_samples": True, "output_path": f"results/{path.stem}"}
    write(path, yaml.safe_dump(settings, sort_keys=False))


def _print(found: Proposal, title: str, limit: int) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=title)
    table.add_column("schedule", overflow="fold")
    table.add_column("loss", justify="right")
    table.add_column("95 %", justify="right")
    for text, one in found.tried.items():
        table.add_row(text, f"{one.value:.1f} %", f"{one.low:.1f} to {one.high:.1f} %")
    Console(markup=False).print(table)
    sure = found.verified
    typer.echo(
        f"schedule={found.schedule}\nloses {sure.value:.1f} % of the unpruned scores ({sure.low:.1f} to {sure.high:.1f} %) "
        f"on {limit} other documents of each task."
    )
    for text, one in found.beside.items():
        typer.echo(f"there {text} loses {one.value:.1f} % ({one.low:.1f} to {one.high:.1f} %)")


def _check_budget(budget: str, ready: Ready) -> None:
    """Refuse a budget that no schedule meets, before anything is measured."""
    try:
        # Before the decoder any number of tokens can be kept.
        Schedule.parse("random@0:?").solve(budget, ready.prompt_sizes)
    except ScheduleError as error:
        said = str(error).splitlines()[0].removeprefix("schedule: ")
        fail(f"--budget {budget}: {said}")


def _check_documents(names: list[str], ready: Ready, limit: int, include: Path | None) -> None:
    """Refuse a limit that leaves too few documents to verify on, before anything is measured."""
    found = found_documents(names, ready.wrapper.family.model_name, 2 * limit, include)
    for task, count in Counter(document.task for document in found).items():
        if count < 2 * limit:
            fail(
                f"--limit {limit}: {task} has {count} documents, {2 * limit} are needed: half of them choose and half verify. "
                f"Use --limit {count // 2} or less."
            )


def _solved(schedule: Schedule, budget: str, ready: Ready) -> Schedule:
    """A schedule given for comparison, at the same budget where it leaves a ``?``."""
    if schedule.unknown is not None:
        return schedule.solve(budget, ready.prompt_sizes)
    schedule.check(ready.depth)
    return schedule
