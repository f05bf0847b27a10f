"""The code that a run names: only that of a checkout of this package."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lmms_prune.harness.checkout import code_state


def git(folder: Path, *arguments: str) -> None:
    names = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *names, *arguments], check=True, capture_output=True)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A committed package at the top of a checkout."""
    folder = tmp_path / "lmms_prune"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    return folder


def test_a_checkout_names_its_commit_and_uncommitted_changes(package: Path) -> None:
    head = subprocess.run(
        ["git", "-C", str(package), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert code_state(package) == head[:12]
    (package / "__init__.py").write_text("changed = True\n")
    assert code_state(package) == f"{head[:12]}-dirty"


def test_what_is_installed_inside_another_checkout_has_no_commit(package: Path, tmp_path: Path) -> None:
    site = tmp_path / "venv" / "lib" / "lmms_prune"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    assert code_state(site) is None
    # Even at the top, if the checkout does not hold it.
    beside = tmp_path / "other"
    beside.mkdir()
    (beside / "__init__.py").write_text("")
    assert code_state(beside) is None


def test_without_a_checkout_or_without_git_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_state(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert code_state() is None
