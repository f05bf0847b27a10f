"""Measures information in one or several processes: ``[torchrun …] -m lmms_prune.information.part REQUEST``.

`measure_launched` starts it. Each process measures every n-th document into the same folder, in which each document has a
file of its own.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer

from lmms_prune.harness.documents import Draw
from lmms_prune.information.answers import Label
from lmms_prune.information.options import (
    DocumentChoice,
    layer_numbers,
    load_unpruned,
    measure_missing,
    user_errors,
)
from lmms_prune.record.information import InformationError

_STDERR = 2  # its file descriptor: the standard output of a command is its result


@dataclass(frozen=True)
class MeasureRequest:
    """What is measured.

    Args:
        model, model_args: as for lmms-eval, without a schedule.
        choice: the documents.
        layers: as ``--layers``; None for all.
        block: side of a unit.
        out: folder of the results.
        label: which token stands for the right answer.
        shard: the part of the documents, from 1, and the number of parts.
    """

    model: str
    model_args: str
    choice: DocumentChoice
    layers: str | None
    block: int
    out: Path
    label: Label = "probable"
    shard: tuple[int, int] = (1, 1)

    def to_json(self) -> str:
        """The request as the process reads it."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> MeasureRequest:
        """Read what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        choice = values.pop("choice")
        draw, include = choice.pop("draw"), choice.pop("include")
        chosen = DocumentChoice(**choice, draw=draw and Draw(**draw), include=include and Path(include))
        values |= {"out": Path(values["out"]), "shard": tuple(values["shard"])}
        return cls(choice=chosen, **values)


def measure(request: MeasureRequest) -> None:
    """Measure the documents of the request's part that its folder does not contain yet, shared with other processes.

    Raises:
        ArgumentError, InformationError, SweepError: see the message.
    """
    loaded = load_unpruned(request.model, request.model_args)
    numbers = layer_numbers(request.layers, loaded.depth)
    part, parts = request.shard
    own, wrapper = request.choice.documents(request.model)[part - 1 :: parts], loaded.wrapper
    measure_missing(
        wrapper, own[wrapper.rank :: wrapper.world_size], numbers, request.block, request.out, request.label
    )


def measure_part(launch: str, request: MeasureRequest) -> tuple[int, int]:
    """Measure a part in this process, or in a launcher's.

    Returns:
        the number of documents in the part, and of all.

    Raises:
        ArgumentError, InformationError, SweepError: see the message.
    """
    if launch:
        measure_launched(launch, request)
    else:
        measure(request)
    total = sum(map(len, request.choice.numbers(request.model).values()))
    part, parts = request.shard
    return len(range(part - 1, total, parts)), total


def measure_launched(launch: str, request: MeasureRequest) -> None:
    """Measure in the processes of a launcher, such as "torchrun --nproc_per_node 4"; returns when all have ended.

    Raises:
        InformationError: the launcher does not exist, or a process failed.
    """
    start = _program(shlex.split(launch))
    command = [*start, "-m", "lmms_prune.information.part", request.to_json()]
    try:
        code = subprocess.run(command, check=False, stdout=_STDERR).returncode
    except OSError as error:
        raise InformationError(f"--launch {launch}: {start[0]}: {error.strerror}.") from None
    if code:
        raise InformationError(f"--launch {launch}: measuring information failed (exit code {code}); see above.")


def _program(words: Sequence[str]) -> list[str]:
    """The launcher's command, from this Python's folder if it is there: the shell may find another environment's."""
    if not words:
        return [sys.executable]
    beside = Path(sys.executable).parent / words[0]
    return [str(beside) if beside.is_file() else words[0], *words[1:]]


if __name__ == "__main__":
    try:
        with user_errors():
            measure(MeasureRequest.from_json(sys.argv[1]))
    except typer.Exit as ended:
        sys.exit(ended.exit_code)
