"""All that an answer depends on besides its document: arguments, versions, this package's code, and named files."""

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
# Parts that no evaluation uses. All others count, even if a given run does not use them.
ASIDE = (
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
)
_PACKAGES = ("lmms-prune", "lmms-eval", "torch", "transformers", "tokenizers", "torchvision", "pillow", "qwen-vl-utils")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that answers depend on most."""
    return {name: version(name) for name in _PACKAGES}


@cache
def code(aside: tuple[str, ...] = ASIDE) -> str:
    """Return a digest of this package's modules and tasks, except those in `aside`; any change, committed or not, changes it."""
    digest = hashlib.sha256()
    modules = [
        path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0].removesuffix(".py") not in aside
    ]
    for path in sorted([*modules, *task_configs().glob("*.yaml")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def inputs(arguments: ModelArguments) -> dict[str, list[int]]:
    """Return sizes and times of the local files that a run's arguments name: checkpoint, adapter, prompts, methods, files of methods."""
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in _files(arguments)}


def _files(arguments: ModelArguments) -> Iterator[Path]:
    named_files = [arguments.pretrained, arguments.peft, arguments.system_prompt, arguments.chat_template]
    stages = arguments.schedule.stages
    options = [value for stage in stages for _, value in stage.options if isinstance(value, str)]
    own = [stage.file for stage in stages]
    # Measurements are in nested folders; a folder inside a checkpoint is another checkpoint, so it is skipped.
    for pattern, names in (("*", named_files), ("**/*", [*options, *own])):
        # `os.path` functions return False for a template's text, which is too long for a file name; Path's methods raise.
        for path in (Path(name) for name in names if name):
            yield from (file for file in (sorted(path.glob(pattern)) if isdir(path) else [path]) if isfile(file))


def made_from(arguments: ModelArguments, executed: Provenance, commit: str | None) -> dict[str, str]:
    """Return all that a run's answers depend on besides its documents, as texts.

    Args:
        arguments: the executed arguments, with the contents of their files.
        executed: provenance of the loaded model; its device, attention kernel and dtype are used.
        commit: the commit of a checkpoint from the hub.
    """
    return {
        **arguments.settings(),
        **{name: str(getattr(executed, name)) for name in ("device", "attention", "dtype")},
        "checkpoint": commit or "",
        "files": digest(inputs(arguments)),
        "code": code(),
        **versions(),
        **_versions_in_use(arguments),
    }


def _versions_in_use(arguments: ModelArguments) -> dict[str, str]:
    """Return the versions of libraries that only some runs use."""
    used = {"peft": arguments.peft, "bitsandbytes": arguments.quantisation}
    return {f"version of {name}": version(name) for name, use in used.items() if use}


def digest(values: Mapping[str, object]) -> str:
    """Return a digest of a mapping, independent of its order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]
