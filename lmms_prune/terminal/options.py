"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from lmms_prune.models import MODEL_NAMES

DEFAULT_MODEL = next(iter(MODEL_NAMES))
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line.")]
Model = Annotated[str, typer.Option(help=f"{' or '.join(MODEL_NAMES)}, as for lmms-eval.")]
ModelArgs = Annotated[
    str, typer.Option("--model_args", help="As for lmms-eval, without schedule and budget: pretrained=…,dtype=….")
]
