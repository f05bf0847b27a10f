"""Imports go down only, and the command line stays free of torch."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lmms_prune

PACKAGE = Path(lmms_prune.__file__).parent
# Each part may import the parts named with it, and itself.
BELOW = {
    "cli": {
        "redaction",
        "efficiency",
        "bench",
        "calibration",
        "certificate",
        "console",
        "schedule",
        "methods",
        "demo",
        "harness",
        "information",
        "installation",
        "leaderboard",
        "configs",
        "sweep",
    },
    "installation": {"compat", "supported"},
    "configs": {"console", "efficiency", "harness", "presets", "record", "schedule"},
    "sweep": {"configs", "console", "harness", "installation", "record", "redaction"},
    "record": set(),
    "bench": {
        "console",
        "drawing",
        "efficiency",
        "families",
        "harness",
        "hooks",
        "information",
        "layout",
        "measurements",
        "methods",
        "record",
        "schedule",
        "tower",
        "trace",
        "view",
    },
    "console": {"redaction"},
    "drawing": set(),
    "certificate": {
        "compat",
        "console",
        "demo",
        "families",
        "harness",
        "hooks",
        "installation",
        "methods",
        "schedule",
        "supported",
        "trace",
        "view",
    },
    "information": {
        "compat",
        "configs",
        "console",
        "drawing",
        "families",
        "harness",
        "hooks",
        "leaderboard",
        "measurements",
        "methods",
        "ragged",
        "record",
        "refusals",
        "schedule",
        "sweep",
        "trace",
    },
    "calibration": {
        "console",
        "harness",
        "hooks",
        "layout",
        "methods",
        "schedule",
        "view",
        "families",
        "ragged",
        "record",
        "refusals",
    },
    "harness": {
        "compat",
        "efficiency",
        "hooks",
        "measurements",
        "places",
        "record",
        "redaction",
        "trace",
        "schedule",
        "families",
        "supported",
    },
    "demo": {"compat", "console", "harness", "installation", "leaderboard", "record", "redaction", "schedule"},
    "leaderboard": {
        "console",
        "harness",
        "methods",
        "places",
        "presets",
        "record",
        "redaction",
        "schedule",
        "supported",
    },
    "guide": {"compat", "layout", "families", "view"},
    "hooks": {
        "compat",
        "expected",
        "guide",
        "layout",
        "refusals",
        "schedule",
        "methods",
        "families",
        "view",
        "tower",
        "trace",
        "ragged",
    },
    "layout": {"refusals", "schedule", "families", "view", "trace", "ragged"},
    "view": {"families", "ragged", "refusals", "tower"},
    "tower": {"families"},
    "families": {"compat", "ragged", "supported"},
    "compat": set(),
    "supported": set(),
    "schedule": {"expected", "methods", "presets"},
    "expected": set(),
    "efficiency": {"console", "record", "schedule"},
    "places": set(),
    "presets": set(),
    "measurements": {"record"},
    "methods": {"kernels", "measurements", "view", "tower", "families", "companions", "merging", "ragged"},
    "merging": {"families", "ragged", "tower", "view"},
    "companions": {"families"},
    "trace": {"compat", "schedule"},
    "kernels": set(),
    "ragged": set(),
    "redaction": set(),
    "refusals": {"calls", "compat"},
    "calls": {"compat"},
    "__init__": {"schedule", "hooks", "trace"},
}
ONLY_IN = {
    "triton": {"kernels"},
    "transformers": {"compat", "bench", "certificate", "guide", "families", "harness", "demo", "companions"},
    "lmms_eval": {"harness"},
    "datasets": {"demo", "harness"},
    "typer": {
        "cli",
        "calibration",
        "certificate",
        "demo",
        "bench",
        "console",
        "efficiency",
        "information",
        "leaderboard",
        "configs",
        "sweep",
    },
    "optuna": {"calibration"},
    "matplotlib": {"drawing", "information"},
}


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


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


LIGHT = (
    *("", ".schedule", ".methods", ".cli", ".places"),
    *(".leaderboard.table", ".leaderboard.formats", ".leaderboard.gate", ".leaderboard.page.render"),
)


@pytest.mark.parametrize("module", [f"lmms_prune{name}" for name in LIGHT])
def test_torch_is_not_imported_for_a_schedule(module: str) -> None:
    loaded = json.loads(run(f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "transformers", "lmms_eval"} & set(loaded)


def test_the_entry_point_is_light_and_names_both_models() -> None:
    code = (
        "import json, sys; from importlib.metadata import entry_points\n"
        "[entry] = [e for e in entry_points(group='lmms_eval.models') if e.name == 'lmms-prune']\n"
        "names = [m.model_id for m in entry.load()()]\n"
        "print(json.dumps([names, 'torch' in sys.modules]))"
    )
    assert json.loads(run(code)) == [["llava_pruned", "qwen2_5_vl_pruned"], False]


def test_importing_changes_nothing_elsewhere() -> None:
    """Every class and function of the libraries that we hook into is the same object after the import."""
    code = (
        "import transformers.models.llama.modeling_llama as a, transformers.models.llava.modeling_llava as b\n"
        "import transformers.cache_utils as c, torch\n"
        "def snap(): return {(m.__name__, k, n): id(v) for m in (a, b, c) for k, o in vars(m).items()\n"
        "    if isinstance(o, type) for n, v in vars(o).items() if callable(v)}\n"
        "before = snap(); threads = torch.get_num_threads()\n"
        "import lmms_prune.hooks, lmms_prune.harness.models\n"
        "print(before == snap(), threads == torch.get_num_threads())"
    )
    assert run(code).split() == ["True", "True"]


def test_nothing_of_ours_needs_decord() -> None:
    """The stock wrappers import it unconditionally, and it has no wheel for some machines."""
    code = "import sys; sys.modules['decord'] = None\nimport lmms_prune.harness.models; print('fine')"
    assert run(code).strip().endswith("fine")
