"""What was executed, as the records in the harness's results have it: one of every sample, one of every run."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.harness.checkout import code_state
from lmms_prune.harness.fingerprint import code
from lmms_prune.models.sizes import Architecture
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.averages import Averages, TaskAverages
from lmms_prune.record.bitmaps import encode
from lmms_prune.record.run import VERSIONS, Provenance


def token_accounting(
    row: RowTrace, grids: Sequence[tuple[int, int]], model: Architecture, input_tokens: int, output_tokens: int
) -> TokenAccounting:
    """What one executed row cost, whose images have `grids` of visual tokens and whose masks are on the CPU."""
    lengths = [row.text_tokens + visual for visual in row.visual]
    # Where a method made earlier layers forget, they hold what a later layer had.
    held = tuple(int(size) for size in kv_bytes(model, [lengths[row.computed.index(n)] for n in row.cached]))
    return TokenAccounting(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        visual_tokens=row.visual_tokens,
        avg_visual_tokens=row.avg_visual_tokens,
        text_tokens=row.text_tokens,
        kept_visual_tokens=tuple(sum(images) for images in row.kept),
        recycled_visual_tokens=tuple(sum(images) for images in row.recycled),
        layer_visual_tokens=tuple(row.visual),
        visual_grids=tuple(grids),
        token_bitmaps=tuple(
            tuple(encode(_grid(mask, grid)) for mask, grid in zip(masks, grids, strict=True)) for masks in row.masks
        ),
        kv_bytes=sum(held),
        layer_kv_bytes=held,
        encoder_flops=sum(encoder_flops(model.encoder, grid) for grid in grids),
        selection_flops=round(row.selection_flops or 0),
        prefill_flops=int(prefill_flops(model, lengths)),
        # The prefill gives the first new token.
        decode_flops=int(decode_flops(model, lengths, max(0, output_tokens - 1))),
    )


def _grid(mask: Bool[Tensor, " V"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """One image's mask in rows and columns, without the class token that may stand before them."""
    return mask[len(mask) - grid[0] * grid[1] :].numpy().reshape(grid)


@dataclass(frozen=True)
class AnsweredSample:
    """One answered sample, with what it took.

    Args:
        text: the answer.
        accounting: what it cost by itself.
        computed: tokens that were executed for it, over all layers, padding included.
        cached: bytes that the prefill left in the cache for it, padding included.
        rows: of the batch in which it was answered.
        seconds: its share of that batch's generation.
    """

    text: str
    accounting: TokenAccounting
    computed: int
    cached: int
    rows: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"accounting": self.accounting.to_dict()}

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> AnsweredSample:
        """What `to_dict` has written."""
        accounting = TokenAccounting.read(entry["accounting"])
        assert accounting is not None  # `to_dict` has written it
        return cls(**{one.name: entry[one.name] for one in fields(cls)} | {"accounting": accounting})


@dataclass
class Answered:
    """The samples of one process, by their tasks, whether they were answered now or come from the journal.

    Args:
        tasks: the answers.
        resumed: how many of them an earlier process left in the journal.
    """

    tasks: dict[str, list[AnsweredSample]] = field(default_factory=dict)
    resumed: int = 0

    def add(self, task: str, answer: AnsweredSample) -> None:
        """Count one sample."""
        self.tasks.setdefault(task, []).append(answer)

    @property
    def answers(self) -> list[AnsweredSample]:
        """Of all tasks."""
        return [one for answers in self.tasks.values() for one in answers]

    def averages(self) -> Averages:
        """Over all samples."""
        return Averages.of([one.accounting for one in self.answers])

    def by_task(self) -> dict[str, TaskAverages]:
        """Each task's averages over its samples."""
        return {
            task: TaskAverages.of_task(
                [one.accounting for one in answers],
                [one.computed for one in answers],
                [one.cached for one in answers],
            )
            for task, answers in self.tasks.items()
        }


def provenance(model: Any, device: torch.device) -> Provenance:
    """What a loaded model's answers are made with; the harness records none of it."""
    cuda = device.type == "cuda"
    return Provenance(
        versions={name: version(name) for name in VERSIONS},
        code=code(),
        commit=code_state(),
        device=torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})",
        attention=str(model.config._attn_implementation),
        dtype=str(model.dtype).removeprefix("torch."),
    )
