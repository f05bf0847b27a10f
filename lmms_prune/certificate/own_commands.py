"""The commands ``lmms-prune new-method`` and ``test-method``. They import heavy modules only when they run."""

from __future__ import annotations

import json
import re
import time
from keyword import iskeyword
from pathlib import Path
from string import Template
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from lmms_prune.errors import OptionError
from lmms_prune.methods import METHODS
from lmms_prune.methods.reference import Reference, entry_points
from lmms_prune.record.files import write
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Json

TEMPLATES = Path(__file__).with_name("templates")
_NAME = re.compile(r"[a-z][a-z0-9_]*")


def new_method(
    name: Annotated[str, typer.Argument(help="The method's name in small letters: my_idea.")],
    out: Annotated[Path, typer.Option(help="Folder of the two files.")] = Path(),
) -> None:
    """Write the file of a method of your own, and its test.

    NAME.py is a method with its contract in comments, and test_NAME.py tests it.

    Example: lmms-prune new-method my_idea
    """
    if not _NAME.fullmatch(name) or iskeyword(name):
        fail(f"new-method {name}: allowed are small letters, digits and _, beginning with a letter: my_idea.")
    if name in METHODS or name in entry_points():
        owner = "built in" if name in METHODS else f"installed ({entry_points()[name]})"
        fail(f"new-method {name}: a method of this name is {owner}; choose another name.")
    if not out.is_dir():
        fail(f"--out {out}: there is no such folder.")
    words = {"name": name, "class_name": "".join(part.capitalize() for part in name.split("_"))}
    files = {out / f"{name}.py": "method.txt", out / f"test_{name}.py": "test_method.txt"}
    if existing := next(filter(Path.exists, files), None):
        fail(f"new-method {name}: {existing} exists; it is not overwritten.")
    for path, template in files.items():
        write(path, Template((TEMPLATES / template).read_text(encoding="utf-8")).substitute(words))
    typer.echo(f"{' and '.join(map(str, files))} written. Next:\n  lmms-prune test-method {out / name}.py")


def try_method(
    file: Annotated[str, typer.Argument(help="my_idea.py, my_idea.py:Class or package.module:Class.")],
    as_json: Json = False,
) -> None:
    """Test a method of your own against the contract.

    It runs the file's code on two tiny models with random weights. It exits with 1 if a check fails.

    Example: lmms-prune test-method my_idea.py
    """
    with plainly(OptionError):
        name = str(Reference.read(file))
    console, start = Console(stderr=as_json, highlight=False), time.monotonic()
    with console.status("loading torch"), plainly(OptionError):
        from lmms_prune.certificate.contract import outcomes
        from lmms_prune.methods.own import load

        example = load(name).example
    checked = []
    for outcome in outcomes(name):
        checked.append(outcome)
        mark = "[red]failed[/red]" if outcome.problem else "[green]passed[/green]"
        console.print(f"{mark}  {outcome.model}: {outcome.what}")
        if outcome.problem:
            console.print(f"        {escape(outcome.problem)}", soft_wrap=True)
    failed = [outcome for outcome in checked if outcome.problem]
    seconds = time.monotonic() - start
    if as_json:
        checks = [{"model": x.model, "check": x.what, "problem": x.problem} for x in checked]
        typer.echo(json.dumps({"method": name, "failed": len(failed), "seconds": round(seconds, 1), "checks": checks}))
    else:
        typer.echo(f"{name}: {len(checked) - len(failed)} of {len(checked)} checks passed in {seconds:.0f} s.")
        if not failed:
            typer.echo(f"Next:\n  lmms-prune demo --schedule '{_for_the_demo(example)}'")
    if failed:
        raise typer.Exit(1)


def _for_the_demo(example: str) -> str:
    """The example with a budget that the demo solves."""
    return re.sub(r"@(\d+):.*", r"@\1:?,budget=0.5", example)
