"""Tiny checkpoints and local benchmarks, each built once for all processes of a test run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import pytest
from filelock import FileLock

from lmms_prune.demo.benchmarks import build_mirror
from lmms_prune.demo.checkpoints import BUILDERS

UNLIKE = ("llava", "qwen2_5_vl")
"""Two families that differ in all that a family decides: for tests of what is done the same way for every family.

A test of what a family decides itself runs on all of `BUILDERS`.
"""


class Checkpoint(Protocol):
    """The folder of a family's random-weight checkpoint; options are those of its builder. No test may change it."""

    def __call__(self, family: str, **options: Any) -> Path: ...


class Mirror(Protocol):
    """The folder of the local benchmarks with so many rows each. No test may change it."""

    def __call__(self, rows: int = 4) -> Path: ...


class Built:
    """Folders below `root` that the first process which asks for them builds."""

    def __init__(self, root: Path):
        self.root = root

    def folder(self, name: str, build: Callable[..., Path], **options: Any) -> Path:
        """The folder that `build(folder, **options)` writes; it appears only when it is complete."""
        label = json.dumps(options, sort_keys=True) if options else ""
        folder = self.root / "".join(letter for letter in name + label if letter.isalnum() or letter in "_-")
        with FileLock(f"{folder}.lock"):
            return folder if folder.exists() else build(folder, **options)

    def checkpoint(self, family: str, **options: Any) -> Path:
        return self.folder(family, BUILDERS[family], **options)

    def mirror(self, rows: int = 4) -> Path:
        return self.folder("mirror", build_mirror, rows=rows)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """The temporary folder of a test run, which all its processes share."""
    own = factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own
