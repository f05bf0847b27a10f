"""The commands ``lmms-prune leaderboard`` and ``gate``. They import heavy modules only when they run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lmms_prune.errors import ScheduleError, did_you_mean
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.options import Data, KeepPaths, UseCache, Verify, samples_reader
from lmms_prune.record.files import write
from lmms_prune.record.redaction import redacted
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS, fail, plainly
from lmms_prune.terminal.options import Include
from lmms_prune.terminal.progress import Progress

if TYPE_CHECKING:
    from lmms_prune.leaderboard.page.render import Submitter
    from lmms_prune.leaderboard.reader import SamplesReader
    from lmms_prune.leaderboard.results import Results
    from lmms_prune.leaderboard.rows import Leaderboard

MOST_REL = 200  # percent; no schedule doubles the unpruned score

Resamples = Annotated[int, typer.Option(min=200, help="Number of resamples for every interval.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the resampling; the same seed gives the same intervals.")]
Baseline = Annotated[
    Path | None, typer.Option(help="Results to compare with, instead of the unpruned runs among PATHS.")
]

Count = Annotated[
    str | None,
    typer.Option(
        "--count",
        metavar="TASKS",
        help="Tasks that count in Acc and Rel beside the paper's ten benchmarks, separated by commas, or 'all'.",
    ),
]


def leaderboard(
    paths: Annotated[list[Path] | None, typer.Argument(help="lmms-eval's result folders or files.")] = None,
    form: Annotated[str, typer.Option("--format", help="table, markdown, csv, json, latex or html.")] = "table",
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")] = None,
    images: Annotated[
        bool,
        typer.Option("--images", help="With html: read the benchmarks again, to show the images of changed answers."),
    ] = False,
    details: Annotated[bool, typer.Option("--details", help="Also print each row's statistics by benchmark.")] = False,
    benchmarks: Annotated[
        str | None, typer.Option(help="Show only these columns, separated by commas: POPE,TextVQA.")
    ] = None,
    count: Count = None,
    baseline: Baseline = None,
    strict: Annotated[bool, typer.Option("--strict", help="Verify all rows; fail if a row is marked.")] = False,
    verify: Verify = True,
    data: Data = False,
    include_path: Include = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    keep_paths: KeepPaths = False,
    cache: UseCache = True,
    bench: Annotated[
        Path | None, typer.Option(help="Output of `bench --tasks … --json`: its times, beside the paper's Table 3.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="With html: the page's title.")] = None,
    submitter: Annotated[
        list[str] | None,
        typer.Option(help="With html: who submitted the results, NAME, or FOLDER=NAME of one folder. Repeatable."),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Print the paper's own Tables 1 to 3 instead.")
    ] = False,
) -> None:
    """Compare runs: scores, Rel, tokens, cost and intervals.

    The tables are the paper's, made from result folders: scores, Acc, Rel, measured budgets, intervals and warning
    marks. Every row is compared with the unpruned run of the same checkpoint. Files that cannot be read are named after
    the table, and the exit code is then 1. With --strict all rows are verified as by `lmms-prune verify`, and the exit
    code is also 1 if a row is marked.

    Example: lmms-prune leaderboard results --format html --out board.html
    """
    from lmms_prune.leaderboard.bench_times import BenchTimesError, read_times
    from lmms_prune.leaderboard.formats import FORMATS
    from lmms_prune.leaderboard.reproduced import published_table
    from lmms_prune.leaderboard.sharing import shared
    from lmms_prune.leaderboard.terminal import show

    if form not in FORMATS:
        fail(f"--format {form}: unknown.{did_you_mean(form, list(FORMATS))} Use one of {', '.join(FORMATS)}.")
    if images and form != "html":
        fail(f"--images belongs to the page: --format html, not {form}.")
    for option, value in (("--title", title), ("--submitter", submitter)):
        if value is not None and form != "html":
            fail(f"{option} belongs to the page: --format html, not {form}.")
    if form == "html" and out is None and Console().is_terminal:
        fail("--format html: name a file for the page: --out page.html.")
    if out is not None and not out.absolute().parent.is_dir():
        fail(f"--out {out}: there is no folder {out.parent}.")
    if out is not None and out.is_dir():
        fail(f"--out {out}: this is a folder; name a file in it.")
    if bool(paths) == published or (published and (baseline or benchmarks or bench or count)):
        fail("leaderboard: give lmms-eval's result folders, or --published alone.")
    with plainly(BenchTimesError):
        times = None if bench is None else read_times(bench)
    reader = None if published else samples_reader(cache)
    if reader is None:
        board = published_table()
    else:
        verified = Verified(data, include_path) if strict and verify else None
        board = _board(paths or [], baseline, (benchmarks, count), resamples, seed, reader, verified)
    board = replace(board, keep_paths=keep_paths, times=times)
    console = Console()
    if form == "table" and console.is_terminal and out is None:
        show(shared(board), details, console)
    else:
        text = (
            _page(board, images, include_path, reader, title, submitter or [])
            if form == "html"
            else FORMATS[form](board, details, SECRETS.get())
        )
        if out is None:
            typer.echo(text, nl=False)
        else:
            write(out, text)
    for problem in board.problems:
        typer.echo(f"lmms-prune: {problem}", err=True)
    if strict:
        for title, row in board.unverified:
            typer.echo(f"lmms-prune: {title}, {row.label}: not verified: {'; '.join(row.unverified)}.", err=True)
        for title, row in board.marked:
            typer.echo(f"lmms-prune: --strict: {title}, {row.label}: {'; '.join(row.marks)}.", err=True)
    if board.problems or (strict and board.marked):
        raise typer.Exit(1)


def gate(
    paths: Annotated[list[Path], typer.Argument(help="lmms-eval's result folders or files.")],
    min_rel: Annotated[
        str | None, typer.Option(metavar="PERCENT", help="The least Rel: 95 is 95 % of the unpruned scores.")
    ] = None,
    max_drop: Annotated[
        list[str] | None, typer.Option(help="BENCHMARK=POINTS, the largest drop: textvqa=2.0; repeatable.")
    ] = None,
    schedule: Annotated[
        list[str] | None, typer.Option(help="Judge only this schedule; it may be a control. Repeatable.")
    ] = None,
    count: Count = None,
    baseline: Baseline = None,
    significant: Annotated[
        bool, typer.Option("--significant", help="Only a real loss (after Holm's correction) breaks a limit.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="A marked row fails.")] = False,
    verify: Verify = True,
    data: Data = False,
    include_path: Include = None,
    resamples: Resamples = 2000,
    seed: Seed = 0,
    keep_paths: KeepPaths = False,
    cache: UseCache = True,
) -> None:
    """Fail if a pruned row loses too much.

    The exit code is then 1. A Markdown summary for a pull request has the reasons. All rows but baselines and controls
    are judged, each against the unpruned run of its checkpoint. The measured numbers decide: a loss that is not real is
    named "not distinguishable", but still fails unless --significant is given. Results that cannot be read fail too,
    and so does a row, or a baseline, with a contradicted or unverified number: all are verified first, as by
    `lmms-prune verify`.

    Example: lmms-prune gate results --min-rel 95 --max-drop textvqa=2.0
    """
    from lmms_prune.leaderboard.gate import Limits, judged, summary
    from lmms_prune.leaderboard.records import Problem
    from lmms_prune.leaderboard.sharing import names

    if min_rel is None and not max_drop and not strict:
        fail("gate: say what must hold: --min-rel 95, --max-drop textvqa=2.0 or --strict.")
    drops = [_drop(text, paths) for text in max_drop or []]
    if len(limited := dict(drops)) < len(drops):
        fail(f"--max-drop {' '.join(max_drop or [])}: a benchmark is there twice; keep one of its limits.")
    limits = Limits(None if min_rel is None else _percent(min_rel), limited, significant, strict, verify)
    with plainly(ScheduleError):
        wanted = None if schedule is None else [str(Schedule.parse(text)) for text in schedule]
    verified = Verified(data, include_path) if verify else None
    board = _board(paths, baseline, (None, count), resamples, seed, samples_reader(cache), verified)
    board = replace(board, keep_paths=keep_paths)
    judgements = judged(board, limits, wanted)
    for text in wanted or []:
        if text not in [judgement.row.runs[0].schedule for judgement in judgements]:
            missing_row = Problem(f"--schedule {text}", "no such row with a baseline among the results.")
            board = replace(board, problems=(*board.problems, missing_row))
    path_names = names(board)
    typer.echo(
        redacted(summary(path_names.shared(judgements), path_names.shared(board), limits), SECRETS.get()), nl=False
    )
    for problem in board.problems:
        typer.echo(f"lmms-prune: {problem}", err=True)
    if not judgements or board.problems or any(judgement.failed for judgement in judgements):
        raise typer.Exit(1)


def _page(
    board: Leaderboard,
    images: bool,
    include: Path | None,
    reader: SamplesReader | None,
    title: str | None,
    submitters: Sequence[str],
) -> str:
    from lmms_prune.leaderboard.page.pictures import PicturesError
    from lmms_prune.leaderboard.page.render import TITLE, html
    from lmms_prune.leaderboard.samples import ChangedError

    who = [_submitter(text, board) for text in submitters]
    with plainly(PicturesError, ChangedError):
        return html(
            board,
            secrets=SECRETS.get(),
            images=images,
            include=include,
            reader=reader,
            title=title or TITLE,
            submitters=who,
        )


def _submitter(text: str, board: Leaderboard) -> Submitter:
    """Parse NAME or FOLDER=NAME, or fail."""
    from lmms_prune.leaderboard.page.render import Submitter

    folder_name, equals, name = text.rpartition("=")
    folder = Path(folder_name) if equals else None
    if not name.strip() or (equals and not folder_name):
        fail(f"--submitter {text}: write NAME, or FOLDER=NAME for the results below one folder.")
    runs = [run for model in board.models for row in model.rows for run in row.runs]
    paths = [source.path.resolve() for run in runs for source in run.sources]
    if folder is not None and not any(path.is_relative_to(folder.resolve()) for path in paths):
        fail(f"--submitter {text}: none of the results is below {folder}; name a folder of results among PATHS.")
    return Submitter(name.strip(), folder)


@dataclass(frozen=True)
class Verified:
    """How rows are verified: by the benchmarks' data too or not, with a folder of further task YAMLs or without."""

    data: bool
    include: Path | None


def _board(
    paths: Sequence[Path],
    baseline: Path | None,
    chosen: tuple[str | None, str | None],
    resamples: int,
    seed: int,
    reader: SamplesReader,
    verified: Verified | None,
) -> Leaderboard:
    """Build the leaderboard.

    Args:
        paths, baseline, resamples, seed: as the commands' options.
        chosen: the columns that --benchmarks names, and the tasks that --count does.
        reader: reads the samples.
    """
    from lmms_prune.leaderboard.reading import LeaderboardError, read_board

    benchmarks, count = chosen
    with Progress("samples files") as progress, plainly(LeaderboardError):
        reader.counted = progress.count
        board, results = read_board(paths, baseline, benchmarks, count, resamples, seed, reader)
    return board if verified is None else _verified(board, results, reader, verified)


def _verified(board: Leaderboard, results: Sequence[Results], reader: SamplesReader, verified: Verified) -> Leaderboard:
    """Return a leaderboard with what all checks find in its runs."""
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.leaderboard.verify.rescoring import Rescoring
    from lmms_prune.leaderboard.verify.verdicts import verification, with_verdicts

    runs = [run for result in results for run in result.records]
    rescoring = Rescoring(verified.data, verified.include)
    with plainly(ArgumentError), Progress("verify, rows") as progress:
        return with_verdicts(board, verification(runs, (), reader, rescoring, progress.count))


def _percent(text: str) -> float:
    """Parse the least Rel, in percent."""
    allowed = f"a share of the unpruned scores in percent, above 1 and at most {MOST_REL}, such as 95; 0 for none"
    try:
        least = float(text)
    except ValueError:
        fail(f"--min-rel {text}: write {allowed}.")
    if 0 < least <= 1:
        fail(f"--min-rel {text}: percent: {100 * least:g}? It is {allowed}.")
    # A gate that every row passes, or that every row fails, would tell nothing.
    if not 0 <= least <= MOST_REL:
        fail(f"--min-rel {text}: it is {allowed}.")
    return least


def _drop(text: str, paths: Sequence[Path]) -> tuple[tuple[str, ...], float]:
    from lmms_prune.leaderboard.reading import LeaderboardError, tasks_of

    name, _, points = text.partition("=")
    try:
        most = float(points)
    except ValueError:
        fail(f"--max-drop {text}: write BENCHMARK=POINTS, such as textvqa=2.0.")
    with plainly(LeaderboardError):
        tasks = tasks_of("--max-drop", name, paths)
    best = TASKS[tasks[0]].best_score
    # No drop exceeds "nan" or the best score, so such a limit would let every row pass.
    if not 0 <= most < best:
        limit = f"from 0 on and below {best:g}, the best score" if TASKS[tasks[0]].scaled else "from 0 on"
        worse = "lower" if TASKS[tasks[0]].higher_is_better else "higher"
        fail(f"--max-drop {text}: points are a number {limit}: how much {worse} than the baseline a score may be.")
    return tasks, most
