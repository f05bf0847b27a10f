"""What an answer depends on beside its document: arguments, versions, this package's own code, and files they name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from os.path import isdir, isfile
from pathlib import Path

from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.tasks import task_configs
from lmms_prune.record.run import Provenance

PACKAGE = Path(__file__).parents[1]
# Parts that no evaluation runs through. All else counts, also where it does not matter to a given run.
ASIDE = (
    "bench",
    "calibration",
    "certificate",
    "cli",
    "configs",
    "demo",
    "information",
    "leaderboard",
    "sweep",
    "terminal",
)
_PACKAGES = ("lmms-prune", "lmms-eval", "torch", "transformers", "tokenizers", "torchvision", "pillow", "qwen-vl-utils")


@cache
def versions() -> dict[str, str]:
    """The packages that answers depend on most."""
    return {name: version(name) for name in _PACKAGES}


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
    """Sizes and times of the local files that a run's arguments name: a checkpoint's, those of prompts and of methods."""
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in _files(arguments)}


def _files(arguments: ModelArguments) -> Iterator[Path]:
    named = [arguments.pretrained, arguments.system_prompt, arguments.chat_template]
    methods = [value for stage in arguments.schedule.stages for _, value in stage.options if isinstance(value, str)]
    # Measurements lie in folders of folders; what lies below a checkpoint is another one.
    for below, names in (("*", named), ("**/*", methods)):
        # Unlike Path's own, these answer for a template, which is too long for a file's name.
        for path in (Path(name) for name in names if name):
            yield from (file for file in (sorted(path.glob(below)) if isdir(path) else [path]) if isfile(file))


def made_from(arguments: ModelArguments, executed: Provenance, commit: str | None) -> dict[str, str]:
    """All that a run's answers depend on beside its documents, as texts.

    Args:
        arguments: as executed, with what their files say.
        executed: of which device, attention kernel and dtype of the loaded model are taken.
        commit: of a checkpoint from the hub.
    """
    return {
        **arguments.settings(),
        **{name: str(getattr(executed, name)) for name in ("device", "attention", "dtype")},
        "checkpoint": commit or "",
        "files": digest(inputs(arguments)),
        "code": code(),
        **versions(),
    }


def digest(said: Mapping[str, object]) -> str:
    """Of a mapping, whatever its order."""
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:32]
