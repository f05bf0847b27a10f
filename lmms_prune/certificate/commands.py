"""The command ``lmms-prune doctor``. It imports heavy modules only when it runs."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console

from lmms_prune.certificate.cells import ATTENTIONS, covering, enumerate_cells
from lmms_prune.errors import did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.models.kernels import KERNELS
from lmms_prune.terminal.console import fail, plainly
from lmms_prune.terminal.options import Device, Json
from lmms_prune.terminal.progress import Progress

_DTYPES = ("auto", "float32", "float16", "bfloat16")


def doctor(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint's folder or hub name. Default: small random ones of each family.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Methods, separated by commas; default: all.")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Run every cell, not only a choice that covers all pairs.")
    ] = False,
    dtype: Annotated[
        str | None, typer.Option(help="With commas. Default: the checkpoint's own; without one float32,bfloat16.")
    ] = None,
    attention: Annotated[str, typer.Option(help=f"With commas: {', '.join(KERNELS)}.")] = ",".join(ATTENTIONS),
    device: Device = "auto",
    model_args: Annotated[
        str, typer.Option("--model-args", help="With --model: how it is loaded: peft=ADAPTER, load_in_4bit=true, …")
    ] = "",
    installation: Annotated[
        bool, typer.Option("--installation", help="Check the installation instead, and print the commands that fix it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Certify that pruning a checkpoint computes correctly.

    Every method is tried in every way that it can be run. Each way (layer and number of stages, batch, position policy,
    type, attention kernel) is compared with a reference that removes nothing and only masks, in the prefill and 16
    decode steps; see docs/reliability.md. Exits with 1 if anything fails, or nothing can be run.

    --installation is for when nothing runs at all: versions against those that were tested, whether libraries can be
    imported and lmms-eval finds the models, two documents evaluated by lmms-eval, CUDA and FlashAttention if there are
    any.

    Example: lmms-prune doctor --methods dart,random --dtype float32
    """
    if installation:
        if full or attention != ",".join(ATTENTIONS) or device != "auto" or any((model, methods, dtype, model_args)):
            fail("--installation examines no checkpoint; only --json goes with it.")
        return _examine(as_json)
    if model_args and model is None:
        fail(f"doctor --model-args {model_args}: it is about the checkpoint of --model; give --model too.")
    kinds = _chosen("--dtype", dtype or ("auto" if model else "float32,bfloat16"), _DTYPES)
    kernels = _chosen("--attention", attention, tuple(KERNELS))
    names = _chosen("--methods", methods or ",".join(METHODS), tuple(METHODS))
    from lmms_prune.certificate.models import Models, random_checkpoints
    from lmms_prune.certificate.report import described, tables
    from lmms_prune.certificate.runner import Certificate, certify
    from lmms_prune.errors import UnsupportedModelError
    from lmms_prune.harness.arguments import ArgumentError

    checkpoint_context = random_checkpoints() if model is None else nullcontext({"": model})
    with (
        plainly(ArgumentError, UnsupportedModelError),
        checkpoint_context as checkpoints,
        Progress("cells") as progress,
    ):
        loaders = [Models(checkpoint, device, progress.begin, model_args) for checkpoint in checkpoints.values()]
        families = {loader.family: loader for loader in loaders}
        certificate = Certificate(title=f"certificate of {_title(model, model_args)}")
        cells = certificate.possible(enumerate_cells(list(families), names, kinds, kernels))
        chosen = cells if full else covering(cells)
        certify(chosen, families, certificate, progress.count)
        certificate.outside = _outside({dtype for _, dtype, _ in certificate.limits}, kernels, names)
    if as_json:
        typer.echo(json.dumps({**described(certificate), "full": full, "possible_cells": len(cells)}))
    else:
        for part in tables(certificate):
            Console(highlight=False).print(part)
        if not full:
            Console(highlight=False).print(
                f"A choice of {len(cells)} cells that covers all pairs; --full runs them all."
            )
    if certificate.failures or not certificate.cells:
        raise typer.Exit(1)


def _title(model: str | None, model_args: str) -> str:
    if model is None:
        return "random models of every family"
    return f"{model} with {model_args}" if model_args else model


def _examine(as_json: bool) -> None:
    from lmms_prune.certificate.examination import commands, described, examine, table

    start = time.monotonic()
    console = Console(stderr=as_json, highlight=False)
    with console.status("examining the installation"):
        checks = list(examine())
    if as_json:
        typer.echo(json.dumps(described(checks, time.monotonic() - start)))
    else:
        console.print(table(checks))
        if fixes := commands(checks):
            typer.echo("\n".join(["To fix it:", *(f"  {command}" for command in fixes)]))
    if any(check.state == "failed" for check in checks):
        raise typer.Exit(1)


def _chosen(option: str, text: str, allowed: Sequence[str]) -> list[str]:
    """Parse names separated by commas; each must be one of `allowed`."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in allowed:
            fail(f"{option} {text}: '{name}' is unknown.{did_you_mean(name, list(allowed))}")
    return list(dict.fromkeys(names))


def _outside(dtypes: Collection[str], kernels: Collection[str], methods: Collection[str]) -> list[str]:
    """List what a certificate of these axes does not cover."""
    excluded = []
    for what, tried, known in (("attention kernels", kernels, KERNELS), ("types", dtypes, _DTYPES[1:])):
        if rest := [name for name in known if name not in tried]:
            excluded.append(f"the {what} {', '.join(rest)}")
    if rest := [name for name in METHODS if name not in methods]:
        excluded.append(f"the methods {', '.join(rest)}")
    return [*excluded, "beam search, assisted decoding, static caches, video, right padding: pruning refuses them"]
