"""What others give us, files and names, never becomes code, and never leads out of its place."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import lmms_prune
from lmms_prune.cli import app
from lmms_prune.record import yamls
from lmms_prune.sweep.jobs import SweepError, plan

PACKAGE = Path(lmms_prune.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "tempfile.mktemp",
    "mktemp",
    "pandas.read_pickle",
}
# What the one reader of YAML makes values with: each is a SafeLoader with fewer or harmless constructors.
LOADERS = (yamls._Loader, yamls._TaskLoader)
PAYLOADS = [
    '!!python/object/apply:os.system ["touch {}"]',
    "!!python/object/new:subprocess.Popen [[touch, '{}']]",
    "!!python/name:os.system",
    "!!python/module:antigravity",
    "!function os.system",
]


def unsafe(tree: ast.AST) -> Iterator[str]:
    """What is not done in this package, as it stands in a module."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {one.arg: ast.unparse(one.value) for one in node.keywords}
        if name in CALLS or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            yield ast.unparse(node)
        if name == "torch.load" and given.get("weights_only") != "True":
            yield ast.unparse(node)
        # There is one reader, which knows how much a text stands for before it makes values of it.
        if re.fullmatch(r"yaml\.\w*(load|compose|Loader)\w*", name):
            yield ast.unparse(node)
        trust = given.get("trust_remote_code")
        if name.startswith("Auto") and name.endswith(".from_pretrained") and trust not in TRUST:
            yield ast.unparse(node)


TRUST = ("False", "arguments.trust_remote_code")
# The trainer reads the folder that it has written itself.
ADAPTIVE = PACKAGE / "demo" / "training"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    found = list(unsafe(ast.parse(path.read_text(encoding="utf-8"))))
    if path.is_relative_to(ADAPTIVE):
        found = [one for one in found if ".from_pretrained(" not in one]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.safe_load(text)",
        "yaml.unsafe_load_all(text)",
        "yaml.SafeLoader(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "numpy.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_the_rules_see_what_they_forbid(line: str) -> None:
    assert list(unsafe(ast.parse(line)))


def test_loaders_of_yaml_make_plain_values_only() -> None:
    for loader in LOADERS:
        assert issubclass(loader, yaml.SafeLoader)
        assert not [tag for tag in loader.yaml_constructors if tag and "python" in tag]
        assert not loader.yaml_multi_constructors


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("command", [["check"], ["sweep", "--dry-run"]])
def test_a_config_from_a_stranger_runs_nothing(tmp_path: Path, command: list[str], payload: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "a.yaml"
    path.write_text(
        f"model: llava_pruned\nmodel_args: schedule=vtw@2\ntasks: {payload.format(mark)}\n", encoding="utf-8"
    )
    done = CliRunner().invoke(app, [*command, str(path)])
    assert done.exit_code == 2
    assert f"{path}: is not YAML: line 3" in done.output
    assert not mark.exists()


def laughs(deep: int, merged: bool) -> str:
    """A billion values in a kilobyte: each of `deep` lists, or mappings merged into the next, names the one before nine times."""
    first = "{k: v}" if merged else "[x]"
    lines = [f"a0: &a0 {first}"]
    for i in range(1, deep + 1):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} " + (f"{{<<: [{many}]}}" if merged else f"[{many}]"))
    return "\n".join([*lines, f"model: *a{deep}", "tasks: pope\n"])


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("command", [["check"], ["sweep", "--dry-run"]])
def test_aliases_are_counted_before_they_are_expanded(tmp_path: Path, command: list[str], merged: bool) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(laughs(9, merged), encoding="utf-8")
    done = CliRunner().invoke(app, [*command, str(path)])
    assert done.exit_code == 2
    assert f"{path}: is not YAML: line 5, column " in done.output
    assert "more than 10,000 values, where each alias counts as all the values" in done.output


def test_a_few_aliases_are_read_and_what_holds_itself_is_not() -> None:
    assert yamls.read_yaml("- &a {x: 1}\n- {<<: *a, y: 2}") == [{"x": 1}, {"x": 1, "y": 2}]
    assert yamls.read_yaml("# nothing") is None
    with pytest.raises(
        yamls.YamlError, match=r"line 1, column 1: an alias refers to a value that contains the alias itself"
    ):
        yamls.read_yaml("&a [*a]")
    with pytest.raises(yamls.YamlError, match="200,001 characters"):
        yamls.read_yaml("#" * 200_001)
    # A task's tag is text in a task's file, and nothing else.
    assert yamls.read_yaml("a: !function utils.score", functions=True) == {"a": "utils.score"}
    with pytest.raises(yamls.YamlError, match="!function"):
        yamls.read_yaml("a: !function utils.score")


@pytest.mark.parametrize("name", ["../../x", "a/../../../x", "/etc/x", "..", ".hidden", "a\\..\\x", "pope,../x"])
def test_a_task_cannot_lead_out_of_a_sweeps_folder(tmp_path: Path, name: str) -> None:
    """A sweep empties the folder in which it works, so that a name with a way in it could empty any other."""
    path = tmp_path / "a.yaml"
    path.write_text(f"model: llava_pruned\nmodel_args: schedule=vtw@2\ntasks: '{name}'\n", encoding="utf-8")
    with pytest.raises(SweepError, match=r"is not a task name"):
        plan([path], tmp_path / "out")
    with pytest.raises(SweepError, match=r"is not a task name"):
        plan([path], tmp_path / "out", tasks=name)


@pytest.mark.parametrize("name", ["..yaml", "...yaml", ".a.yaml"])
def test_a_files_name_cannot_lead_out_of_a_sweeps_folder(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("model: llava_pruned\nmodel_args: schedule=vtw@2\ntasks: pope\n", encoding="utf-8")
    with pytest.raises(SweepError, match=r"rename it"):
        plan([path], tmp_path / "out")


@pytest.fixture
def stranger(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose configuration is code, and the file that the code would write."""
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    folder.mkdir()
    said = {"model_type": "stranger", "auto_map": {"AutoConfig": "configuration_stranger.StrangerConfig"}}
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    code = (
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedConfig\n"
        "class StrangerConfig(PreTrainedConfig):\n    model_type = 'stranger'\n"
    )
    (folder / "configuration_stranger.py").write_text(code, encoding="utf-8")
    return folder, mark


@pytest.mark.parametrize("trusted", [False, True])
def test_a_checkpoints_code_runs_only_where_that_is_asked_for(
    stranger: tuple[Path, Path], trusted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_prune.errors import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError, ModelArguments
    from lmms_prune.harness.loading import read_config
    from lmms_prune.models import FAMILIES

    folder, mark = stranger
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    text = f"pretrained={folder},schedule=vtw@2" + (",trust_remote_code=true" if trusted else "")
    arguments = ModelArguments.read(text, None, FAMILIES["llava"])
    with pytest.raises(UnsupportedModelError if trusted else ArgumentError):
        read_config(arguments, FAMILIES["llava"])
    assert mark.exists() is trusted


def test_check_tells_where_a_config_would_run_a_checkpoints_code(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: llava_pruned\nmodel_args: {trust_remote_code: true}\ntasks: pope\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 0
    assert "trust_remote_code: the checkpoint's own code would run" in done.output
