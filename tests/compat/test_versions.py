"""Versions outside the supported range are refused wherever a model is touched, with the range and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from forking import Forking
from packaging.requirements import Requirement

from lmms_prune.compat.versions import VERSIONS, UnsupportedVersionError, refuse_other_versions

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"

pytestmark = pytest.mark.core


def test_the_ranges_are_those_of_the_dependencies() -> None:
    written = [line.strip(' ",') for line in PYPROJECT.read_text(encoding="utf-8").splitlines()]
    for name, allowed in VERSIONS.items():
        (line,) = [line for line in written if line.startswith(name) and Requirement(line).name == name]
        assert Requirement(line).specifier == Requirement(f"{name}{allowed}").specifier


@pytest.mark.parametrize(
    ("allowed", "fine"),
    [(">=0.1", True), ("<0.1", False), (">=999", False), (f"=={version('transformers')}", True), (">=5.17,<6", True)],
)
def test_an_installed_version_is_compared_with_a_range(allowed: str, fine: bool) -> None:
    if fine:
        return refuse_other_versions({"transformers": allowed})
    with pytest.raises(UnsupportedVersionError, match=rf"transformers {version('transformers')}.*{allowed}"):
        refuse_other_versions({"transformers": allowed})


def test_packages_that_are_not_installed_are_ignored() -> None:
    refuse_other_versions({"no-such-package-of-ours": ">=1"})


OTHERS = [
    ("transformers", "4.57.6"),
    ("transformers", "5.40.0"),
    ("lmms-eval", "0.8.0"),
    ("filelock", "4.3.1"),
    ("torch", "2.9.1"),
]


def pretended(folder: Path, name: str, installed: str) -> Path:
    """A folder that, first on the path, makes `name` look installed in that version."""
    metadata = folder / f"{name.replace('-', '_')}-{installed}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed}\n", encoding="utf-8")
    return folder


def message(name: str, installed: str) -> str:
    return (
        f"{name} {installed} is installed, which is not supported; use one of {VERSIONS[name]}: "
        f"pip install '{name}{VERSIONS[name]}'"
    )


# A fresh import for each pretended version; the refusal happens before torch or transformers are imported.
IMPORTS = """
import json, sys
errors = {}
for folder in sys.argv[1:]:
    sys.path.insert(0, folder)
    try:
        from lmms_prune import prune
    except Exception as error:
        errors[folder] = [type(error).__name__, str(error)]
    sys.path.remove(folder)
    for name in [name for name in sys.modules if name.startswith("lmms_prune")]:
        del sys.modules[name]
print(json.dumps(errors))
"""


def test_pruning_with_an_unsupported_version_names_the_range(tmp_path: Path) -> None:
    folders = [tmp_path / f"{name}-{installed}" for name, installed in OTHERS]
    for folder, (name, installed) in zip(folders, OTHERS, strict=True):
        folder.mkdir()
        pretended(folder, name, installed)
    command = [sys.executable, "-c", IMPORTS, *map(str, folders)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    errors = {
        str(folder): ["UnsupportedVersionError", message(*other)] for folder, other in zip(folders, OTHERS, strict=True)
    }
    assert json.loads(process.stdout) == errors


def test_several_unsupported_versions_are_all_named() -> None:
    with pytest.raises(UnsupportedVersionError) as error:
        refuse_other_versions({"transformers": "<0.1", "torch": "<0.1"})
    assert f"transformers {version('transformers')}" in str(error.value)
    assert f"torch {version('torch')}" in str(error.value)


def test_a_schedule_is_read_with_any_version(tmp_path: Path) -> None:
    folder = pretended(tmp_path, "transformers", "5.40.0")
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); from lmms_prune import Schedule; print(Schedule.parse('dart@2:0.44'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "dart@2:0.44\n"


FRONT_DOOR = """
import sys
sys.path.insert(0, sys.argv.pop(1))
sys.argv[0] = "lmms-eval"
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


def test_the_entry_point_with_an_unsupported_version_exits_with_2_and_the_message(
    forking: Forking, tmp_path: Path
) -> None:
    """lmms-eval itself exits with 0 whatever a model raises."""
    script = tmp_path / "front_door.py"
    script.write_text(FRONT_DOOR, encoding="utf-8")
    words = ["--model", "llava_pruned", "--model_args", "schedule=dart@2:0.44", "--tasks", "mme"]
    command = [*forking.prefix, str(script), str(pretended(tmp_path, "transformers", "5.40.0")), *words]
    environment = forking.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.rstrip().splitlines()[-1] == f"lmms-prune: error: {message('transformers', '5.40.0')}"
