"""What a result depends on beside its settings: versions, this package's own code, and files that the settings name."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path

from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.tasks import task_configs

PACKAGE = Path(__file__).parents[1]
# Parts that no evaluation runs through. All else counts, also where it does not matter to a given run.
ASIDE = ("bench", "calibration", "cli", "configs", "console", "demo", "information", "leaderboard", "sweep")


@cache
def versions() -> dict[str, str]:
    """The packages that answers depend on most."""
    return {name: version(name) for name in ("lmms-prune", "lmms-eval", "torch", "transformers")}


@cache
def code() -> str:
    """A digest of this package's modules and tasks: another one after any change, committed or not."""
    digest = hashlib.sha256()
    modules = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in ASIDE
    ]
    for path in sorted([*modules, *task_configs().glob("*.yaml")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def inputs(arguments: ModelArguments) -> dict[str, list[int]]:
    """Sizes and times of the local files that a run's arguments name: a checkpoint's, and those of prompts."""
    # A template may be given as a text, too long for a file's name.
    names = [name for name in (arguments.pretrained, arguments.system_prompt, arguments.chat_template) if name]
    paths = [Path(name) for name in names if len(name) < 256]
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path]) if file.is_file()]
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
