"""Imports go down only, and the command line stays free of torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lmms_prune

sys.path.append(str(Path(__file__).parent / "leaderboard"))
from written import write_run

PACKAGE = Path(lmms_prune.__file__).parent
# Each part may import the parts named with it, and itself.
BELOW = {
    "errors": set(),
    "compat": set(),
    "record": set(),
    "models": {"compat", "errors"},
    "methods": {"errors", "models", "record"},
    "schedule": {"errors", "methods"},
    "terminal": {"models", "record"},
    "efficiency": {"models", "schedule"},
    "pruning": {"compat", "errors", "methods", "models", "schedule"},
    "harness": {"compat", "efficiency", "errors", "models", "pruning", "record", "schedule"},
    "configs": {"efficiency", "errors", "harness", "models", "record", "schedule", "terminal"},
    "sweep": {"configs", "errors", "harness", "record", "terminal"},
    "leaderboard": {"efficiency", "errors", "harness", "methods", "models", "record", "schedule", "terminal"},
    "demo": {"efficiency", "harness", "leaderboard", "models", "pruning", "record", "schedule", "terminal"},
    "certificate": {
        "compat",
        "demo",
        "errors",
        "harness",
        "methods",
        "models",
        "pruning",
        "record",
        "schedule",
        "terminal",
    },
    "information": {
        "compat",
        "efficiency",
        "errors",
        "harness",
        "leaderboard",
        "methods",
        "models",
        "pruning",
        "record",
        "schedule",
        "sweep",
        "terminal",
    },
    "calibration": {
        "errors",
        "harness",
        "information",
        "leaderboard",
        "methods",
        "models",
        "pruning",
        "record",
        "schedule",
        "terminal",
    },
    "bench": {
        "compat",
        "demo",
        "efficiency",
        "errors",
        "harness",
        "information",
        "leaderboard",
        "methods",
        "models",
        "pruning",
        "record",
        "schedule",
        "terminal",
    },
    "reproduce": {
        "configs",
        "demo",
        "efficiency",
        "errors",
        "harness",
        "information",
        "leaderboard",
        "models",
        "record",
        "schedule",
        "sweep",
        "terminal",
    },
    "cli": {
        "bench",
        "calibration",
        "certificate",
        "configs",
        "demo",
        "errors",
        "harness",
        "information",
        "leaderboard",
        "methods",
        "record",
        "reproduce",
        "sweep",
        "terminal",
    },
    "__init__": {"errors", "information", "leaderboard", "pruning", "schedule"},
}
ONLY_IN = {
    "triton": {"methods"},
    "transformers": {"compat", "bench", "certificate", "demo", "harness", "methods", "models", "pruning"},
    "lmms_eval": {"harness"},
    "datasets": {"demo", "harness"},
    "typer": {
        "bench",
        "calibration",
        "certificate",
        "cli",
        "configs",
        "demo",
        "information",
        "leaderboard",
        "reproduce",
        "sweep",
        "terminal",
    },
    "optuna": {"calibration"},
    "matplotlib": {"information", "terminal"},
}


def test_the_parts_are_named_from_the_lowest_up() -> None:
    """So that no circle can be written down."""
    seen: set[str] = set()
    for name, below in BELOW.items():
        assert below <= seen, f"{name} stands above {below - seen}"
        seen.add(name)


def imports(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(node.module or "")
    return names


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    mine = part(path)
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "lmms_prune" and rest:
            assert rest[0] in BELOW[mine] | {mine}, f"{path} imports {name}"
        assert mine in ONLY_IN.get(top, {mine}), f"{path} imports {name}"


def test_every_arrow_is_drawn_and_their_number_is_what_the_page_says() -> None:
    """An import that is gone leaves no permission behind; of what the command line imports by name, the texts count."""
    drawn: dict[str, set[str]] = {name: set() for name in BELOW}
    for path in FILES:
        named = re.findall(r"\"lmms_prune\.(\w+)", path.read_text(encoding="utf-8")) if part(path) == "cli" else []
        tops = [name.split(".")[1] for name in imports(path) if re.match(r"lmms_prune\.", name)]
        drawn[part(path)] |= ({*tops, *named} & set(BELOW)) - {part(path)}
    assert drawn == BELOW
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert f"{len(BELOW)} parts, {sum(map(len, BELOW.values()))} arrows" in page


@pytest.mark.parametrize("path", [path for path in FILES if part(path) == "record"], ids=lambda path: path.name)
def test_what_is_on_disk_is_read_without_torch(path: Path) -> None:
    assert not {"torch", "transformers", "lmms_eval"} & {name.split(".")[0] for name in imports(path)}


# Where our command begins, and where lmms-eval's comes to us.
COMMAND_LINES = {"cli.py", "harness/plugin.py"}


def test_the_environment_is_read_at_the_command_line_only() -> None:
    reading = {str(path.relative_to(PACKAGE)) for path in FILES if "os.environ" in path.read_text(encoding="utf-8")}
    assert reading == COMMAND_LINES


@pytest.mark.parametrize("path", [path for path in FILES if part(path) != "demo"], ids=lambda path: path.name)
def test_an_assert_only_narrows_a_type(path: Path) -> None:
    """Under ``python -O`` there are none: what guards a figure or looks at what a user gave is an error of its own."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assert):
            said = ast.unparse(node.test)
            assert re.fullmatch(r"isinstance\([\w.]+, \w+\)|[\w.]+ is not None|\w+ != [A-Z]+", said), f"{path}: {said}"


def run(code: str, *words: object) -> dict[str, Any]:
    """What `code` leaves in `report`, run as a process of its own."""
    code = f"import json, sys\nreport = {{}}\n{code}\nprint(json.dumps(report))"
    process = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    return json.loads(process.stdout.splitlines()[-1])


# Each step imports more, so that the first which brings what it should not is the one at fault.
LIGHT = """
def note(step, *others):
    report[step] = sorted({"torch", "transformers", "lmms_eval", "jaxtyping", "rich.table", *others} & set(sys.modules))

import lmms_prune, lmms_prune.schedule, lmms_prune.methods
for spec in lmms_prune.methods.METHODS.values():
    for option in spec.options:
        spec.option(option.name, str(option.default) or "text")
note("the table of methods", "numpy")
from lmms_prune.cli import app
note("the command line", "numpy")
words = ["schedule", "dart@2:?", "--model", "llava-1.5-7b", "--budget", "flops=40%", "--json"]
app(words, standalone_mode=False)
note("the command schedule", "numpy", *(n for n in sys.modules if n.startswith("lmms_prune.") and n.endswith(("commands", "command"))))
app(words[:-1], standalone_mode=False)
heavy = {"torch", "transformers", "lmms_eval"}
report["its table"] = sorted((heavy | {"numpy"}) & set(sys.modules))
from pathlib import Path
from typing import Any
from lmms_prune.configs.check import check
from lmms_prune.configs.runs import read
(run,) = read(Path(sys.argv[1]))
report["problems"] = check(run).problems
report["a check"] = sorted(heavy & set(sys.modules))
from importlib import import_module
for name in ("record.run", "record.information", "record.bitmaps", "leaderboard.table", "leaderboard.formats", "leaderboard.gate", "leaderboard.page.render"):
    import_module(f"lmms_prune.{name}")
    report[name] = sorted(heavy & set(sys.modules))
from importlib.metadata import entry_points
[entry] = [e for e in entry_points(group="lmms_eval.models") if e.name == "lmms-prune"]
report["models"] = [model.model_id for model in entry.load()()]
# Its manifests are lmms-eval's own.
report["the entry point"] = sorted((heavy - {"lmms_eval"}) & set(sys.modules))
"""
CONFIG = (
    "model: llava_pruned\nmodel_args: {pretrained: llava-hf/llava-1.5-7b-hf, schedule: 'dart@2:0.44'}\ntasks: pope\n"
)


def test_what_needs_no_weights_imports_no_torch(tmp_path: Path) -> None:
    """The table of methods, `schedule` and costs, `check`, the leaderboard and the entry point; no command waits for
    another's imports, nor for rich where it draws nothing."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG, encoding="utf-8")
    report = run(LIGHT, config)
    assert report.pop("models") == [
        "llava_pruned",
        "llava_next_pruned",
        "qwen2_5_vl_pruned",
        "qwen2_vl_pruned",
        "qwen3_vl_pruned",
    ]
    assert report.pop("the command schedule") == ["lmms_prune.configs.schedule_command"]
    assert len(report) == 13
    assert {step: names for step, names in report.items() if names} == {}


# Importing any of these takes a good part of the time in which a command should have printed its help; scipy.stats, more.
SLOW = """
import contextlib, io
slow = {"torch", "transformers", "lmms_eval", "datasets", "numpy", "scipy", "pandas", "pyarrow", "matplotlib", "PIL"}
slow |= {"jaxtyping", "jinja2", "optuna", "filelock", "asyncio"}
from lmms_prune.cli import COMMANDS, app

def call(*words):
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            app(words)
        except SystemExit as end:
            assert not end.code, words
    report[" ".join(words)] = [len(printed.getvalue()) > 100, *sorted(slow & set(sys.modules))]

for name in ("methods", "demo", *COMMANDS):
    call(name, "--help")
for name in ("fitprune", "vflowopt", "vtw", "hybrid"):
    call("calibrate", name, "--help")
call("--help")
call("leaderboard", "--published")
call("leaderboard", "--published", "--format", "json")
"""


def test_help_and_the_published_tables_wait_for_no_slow_import() -> None:
    report = run(SLOW)
    assert len(report) == 33
    assert {words: slow for words, slow in report.items() if slow != [True]} == {}


TABLE = """
from lmms_prune.cli import app
app(["leaderboard", sys.argv[1], "--no-cache", "--resamples", "200"], standalone_mode=False)
report["special"] = "scipy.special" in sys.modules
report["slow"] = sorted({"scipy.stats", "pandas", "matplotlib", "torch", "jinja2", "datasets"} & set(sys.modules))
"""


def test_a_leaderboard_waits_for_no_scipy_stats(tmp_path: Path) -> None:
    """Nor for what draws a page."""
    for name, schedule, values in (("a", "none", [1.0, 1.0, 0.0]), ("b", "random@2:0.33", [1.0, 0.0, 0.0])):
        write_run(tmp_path / name, {"gqa": values}, schedule, tokens=33)
    assert run(TABLE, tmp_path) == {"special": True, "slow": []}


HEAVY = """
sys.modules["decord"] = None
from importlib import import_module
import torch
names = ("models.llama.modeling_llama", "models.llava.modeling_llava", "cache_utils")
libraries = [import_module(f"transformers.{name}") for name in names]
def snap():
    return {(library.__name__, k, n): id(v) for library in libraries for k, o in vars(library).items()
            if isinstance(o, type) for n, v in vars(o).items() if callable(v)}
before, threads = snap(), torch.get_num_threads()
# Commands first, as their programs import them; in the tests' own process something else always was.
import lmms_prune.information.commands, lmms_prune.calibration.commands, lmms_prune.bench.commands
import lmms_prune.pruning.hooks, lmms_prune.harness.models
report["same"] = before == snap()
report["threads"] = threads == torch.get_num_threads()
"""


def test_importing_changes_nothing_elsewhere_and_needs_no_decord() -> None:
    """Every class and function of the libraries that we hook into is the same object after the import.

    The stock wrappers import decord unconditionally, and it has no wheel for some machines.
    """
    assert run(HEAVY) == {"same": True, "threads": True}


# Tables whose subject is one model: the paper's runs, its schedules, the demo's checkpoints, and library names.
ABOUT_ONE_MODEL = {"compat/transformers.py", "configs/table.py", "schedule/presets.py"}


def told_of_one_family(path: Path) -> list[str]:
    """Names of families, sizes of their images, and stand-ins for a family, outside of docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in texts:
            value = node.value
            named = isinstance(value, str) and re.search(r"llava|qwen2", value, re.IGNORECASE)
            if named or (type(value) is int and value in (576, 1280)):
                found.append(f"line {node.lineno}: {value!r}")
        name = getattr(node, "id", getattr(node, "attr", ""))
        if re.search(r"llava|qwen|mrope|class_token$", name, re.IGNORECASE):
            found.append(f"line {node.lineno}: {name}")
    return found


@pytest.mark.parametrize("path", [p for p in FILES if part(p) not in ("demo", "models")], ids=lambda path: path.name)
def test_nothing_outside_of_models_knows_a_family(path: Path) -> None:
    """A family is asked, never told from another by its name, or by a stand-in such as "has M-RoPE"."""
    if str(path.relative_to(PACKAGE)) not in ABOUT_ONE_MODEL:
        assert told_of_one_family(path) == []


# Words that say nothing of what a variable holds.
EMPTY_NAMES = {
    "one",
    "some",
    "found",
    "said",
    "made",
    "given",
    "whole",
    "its",
    "mine",
    "many",
    "told",
    "theirs",
    "gone",
}


def test_a_variable_says_what_it_holds() -> None:
    empty = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            stored = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
            name = node.id if stored else node.arg if isinstance(node, ast.arg) else ""
            if name in EMPTY_NAMES:
                empty.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {name}")
    assert not empty


def test_no_two_classes_have_one_name() -> None:
    """Whoever reads a name must know which of them is meant."""
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(str(path.relative_to(PACKAGE)))
    assert {name: files for name, files in homes.items() if len(files) > 1} == {}
