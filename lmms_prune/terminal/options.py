"""Options that several commands share: each is said once, here, and means the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmms_prune.models import MODEL_NAMES

DEFAULT_WRAPPER = next(iter(MODEL_NAMES))
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Model = Annotated[
    str | None,
    typer.Option(help=f"A checkpoint's folder or hub name. Default: {MODEL_NAMES[DEFAULT_WRAPPER].checkpoint}."),
]
Wrapper = Annotated[
    str | None,
    typer.Option(
        help=f"lmms-eval's name of the model: {' or '.join(MODEL_NAMES)}. Default: what loads --model. Without --model, "
        "its own default checkpoint is taken."
    ),
]
ModelArgs = Annotated[
    str,
    typer.Option(
        "--model-args",
        help="Further arguments, as after lmms-eval's --model_args: dtype=…,batch_size=…; no checkpoint, schedule or budget.",
    ),
]
Device = Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu, cuda or cuda:N.")]
Include = Annotated[
    Path | None,
    typer.Option(
        "--include-path",
        exists=True,
        file_okay=False,
        help="A folder of further task YAMLs. Default: this package's own.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first documents of each task.")]
Launch = Annotated[
    str,
    typer.Option(help="Several GPUs for each run: 'torchrun --nproc_per_node 4', 'accelerate launch …'."),
]
Cluster = Annotated[
    str | None, typer.Option(help="slurm (needs the extra 'slurm') or local: run each job there, then collect.")
]
ClusterOption = Annotated[
    list[str] | None, typer.Option(help="name=value for submitit, such as slurm_partition=gpu; repeatable.")
]
