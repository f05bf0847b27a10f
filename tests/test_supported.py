"""Versions outside the supported range are refused where the package is imported, with the range."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from lmms_prune.supported import VERSIONS, UnsupportedVersionError, refuse_other_versions

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_ranges_are_those_of_the_dependencies() -> None:
    written = [line.strip(' ",') for line in PYPROJECT.read_text(encoding="utf-8").splitlines()]
    for name, allowed in VERSIONS.items():
        (line,) = [line for line in written if line.startswith(name) and Requirement(line).name == name]
        assert Requirement(line).specifier == Requirement(f"{name}{allowed}").specifier


@pytest.mark.parametrize(
    ("allowed", "fine"),
    [(">=0.1", True), ("<0.1", False), (">=999", False), (f"=={version('transformers')}", True), (">=5.17,<6", True)],
)
def test_an_installed_version_is_held_against_a_range(allowed: str, fine: bool) -> None:
    if fine:
        return refuse_other_versions({"transformers": allowed})
    with pytest.raises(UnsupportedVersionError, match=rf"transformers {version('transformers')}.*{allowed}"):
        refuse_other_versions({"transformers": allowed})


def test_what_is_not_installed_is_somebody_elses_to_miss() -> None:
    refuse_other_versions({"no-such-package-of-ours": ">=1"})


@pytest.mark.parametrize(
    ("name", "found"), [("transformers", "4.57.6"), ("transformers", "6.0.0"), ("lmms-eval", "0.8.0")]
)
def test_an_import_beside_another_version_ends_with_the_range(tmp_path: Path, name: str, found: str) -> None:
    """As if that version were installed: its metadata comes first on the path."""
    folder = tmp_path / f"{name.replace('-', '_')}-{found}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n", encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lmms_prune"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"{name} {found} is installed, which is not supported; use one of {VERSIONS[name]}" in done.stderr
