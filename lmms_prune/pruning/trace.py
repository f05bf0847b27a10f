"""Trace: the executed pruning of every row, from which measured budgets, FLOPs and the token accounting follow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.errors import PruningError
from lmms_prune.schedule import Schedule


@dataclass(repr=False)
class RowTrace:
    """One row (sample) of one prefill. Lists over layers have one entry per decoder layer.

    Args:
        sample: the id that seeds this row's random draws.
        text_tokens: tokens that are not visual, padding excluded.
        images: original visual tokens of each image, without newline tokens.
        newlines: newline tokens of each image; they are kept as long as any other token of their image. Empty without.
        tiles: original visual tokens of each tile of each image; empty where images are encoded whole.
        kept: visual tokens kept in each image after each stage, one list per stage.
        recycled: for each stage and image, how many of the kept tokens the method has changed: it merged other tokens
            into them, recycled others, or encoded them anew.
        visual: visual tokens entering each layer, newline tokens included.
        computed: sequence length that each layer processed, padding included.
        cached: length of each layer's cache once the prompt has run, padding included; empty without a cache.
        masks: for each stage and image, which of the original visual tokens (raster order) are kept.
        grids: rows and columns of each image's visual tokens, of an image in tiles of its base and its canvas; an image's
            are empty where they are not known.
        selection_flops: this row's share, by its images, of the FLOPs of the stages' methods for the batch, padding and
            auxiliary models included; None unless `prune` was called with count_selection.
    """

    sample: str
    text_tokens: int
    images: list[int]
    newlines: list[int] = field(default_factory=list)
    tiles: list[list[int]] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    recycled: list[list[int]] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    cached: list[int] = field(default_factory=list)
    masks: list[list[Bool[Tensor, " V"]]] = field(default_factory=list)
    grids: list[list[tuple[int, int]]] = field(default_factory=list)
    selection_flops: float | None = None

    def __repr__(self) -> str:
        return f"RowTrace({self.sample!r}: {figures([self])})"

    @property
    def visual_tokens(self) -> int:
        """Original visual tokens of all images, newline tokens included."""
        return sum(self.images) + sum(self.newlines)

    @property
    def avg_visual_tokens(self) -> float:
        """Average visual tokens per decoder layer."""
        return sum(self.visual) / len(self.visual)

    @property
    def kept_tokens(self) -> list[int]:
        """Visual tokens of all images kept after each stage, newline tokens included."""
        newlines = self.newlines or [0] * len(self.images)
        return [
            sum(count + (extra if count else 0) for count, extra in zip(stage, newlines, strict=True))
            for stage in self.kept
        ]

    def indices(self, stage: int) -> list[list[int]]:
        """Raster indices of the visual tokens kept after `stage` (0-based), image by image."""
        return [mask.nonzero().flatten().tolist() for mask in self.masks[stage]]


@dataclass(repr=False)
class Trace:
    """All rows of all prefills that ran inside one ``with prune(...)``, in order.

    Args:
        schedule: the executed schedule, every ``?`` solved.
        rows: one per row of each prefill.
    """

    schedule: Schedule
    rows: list[RowTrace] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"Trace({str(self.schedule)!r}: {figures(self.rows)})"

    def _repr_html_(self) -> str:
        """The figures, and the tokens that each stage keeps of each image, for notebooks."""
        from lmms_prune.pruning.html import trace_html

        return trace_html(self)

    @property
    def avg_visual_tokens(self) -> float:
        """Average visual tokens per layer over the rows that have an image; 0.0 if no row has one."""
        rows = [row for row in self.rows if row.images]
        if not self.rows:
            raise ValueError("the trace is empty: no prompt has run inside the block yet.")
        return sum(row.avg_visual_tokens for row in rows) / len(rows) if rows else 0.0


def figures(rows: Sequence[RowTrace]) -> str:
    """What rows kept, in words and as their means; of rows that are not complete, what is known."""
    if not rows:
        return "no prompt has run yet"
    parts = [] if len(rows) == 1 else [f"{len(rows)} rows"]
    parts.append(
        f"{_mean([row.visual_tokens for row in rows])} visual and {_mean([row.text_tokens for row in rows])} text tokens"
    )
    stages = list(zip(*(row.kept for row in rows), strict=False))
    if stages:
        parts.append("kept " + ", ".join(_mean([sum(images) for images in stage]) for stage in stages))
    if layers := [row.avg_visual_tokens for row in rows if row.images and row.visual]:
        parts.append(f"{_mean(layers)} visual tokens per layer")
    return "; ".join(parts)


def _mean(values: Sequence[int | float]) -> str:
    return f"{round(sum(values) / len(values), 1):g}"


MISCOUNTED = (
    "a method kept another number of tokens than its budget says, tokens that were not there, or an index twice."
)


class PrefillTrace:
    """Records the rows of one prefill, and collects the checks that run after it.

    Dimension letters: I images of the batch, V visual tokens of an image.

    Args:
        rows: one per row, with its name and its images.
    """

    def __init__(self, rows: list[RowTrace]):
        self.rows = rows
        self._owners = [number for number, row in enumerate(rows) for _ in row.images]
        self._checks: list[tuple[str | Callable[[], str], Bool[Tensor, " I"]]] = []
        self._recycled: list[Int[Tensor, " I"] | None] = []

    def layer(self, counts: Sequence[int], length: int) -> None:
        """Record the input of a layer: visual tokens of each image, and the sequence's length with its padding."""
        for row, visual in zip(self.rows, self._by_row(counts), strict=True):
            row.visual.append(sum(visual))
            row.computed.append(length)

    def selection(self, flops: int) -> None:
        """Record the FLOPs of a stage's method, distributed among the rows by their images."""
        for row in self.rows:
            row.selection_flops = (row.selection_flops or 0) + flops * len(row.images) / max(1, len(self._owners))

    def stage(
        self,
        index: Int[Tensor, "I V"],
        valid: Bool[Tensor, "I V"],
        counts: Sequence[int],
        recycled: Int[Tensor, " I"] | None = None,
    ) -> None:
        """Record the result of a stage.

        Args:
            index: raster indices of the kept tokens.
            valid: which entries of `index` are tokens; the others are padding.
            counts: how many tokens of each image are kept.
            recycled: how many of them the method has changed, on the device; None if none.
        """
        self._recycled.append(recycled)
        sizes = [size for row in self.rows for size in row.images]
        masks: list[Tensor] = []
        if sizes:
            most = max(sizes)
            # Padding entries are written to a spare last column, which is then removed.
            kept = index.new_zeros(len(sizes), most + 1, dtype=torch.bool)
            kept = kept.scatter_(1, torch.where(valid, index, most), True)[:, :most]
            masks = [kept[image, :size] for image, size in enumerate(sizes)]
            # A mask with fewer entries than tokens kept means that an index occurred twice.
            self.check(MISCOUNTED, kept.sum(1) == valid.sum(1))
        for row, row_masks, row_counts in zip(self.rows, self._by_row(masks), self._by_row(counts), strict=True):
            row.masks.append(row_masks)
            row.kept.append([int(n) for n in row_counts])

    def check(self, problem: str | Callable[[], str], passed: Bool[Tensor, " I"]) -> None:
        """Register a check for `finish`: `passed` says for each image, on the device, whether it is free of `problem`.

        A `problem` that reads tensors to be precise is a function: it is called only once the check has failed.
        """
        self._checks.append((problem, passed))

    def finish(self) -> None:
        """Evaluate all registered checks and read what the methods changed, in one transfer from the device.

        Raises:
            PruningError: a check failed; the message states the problem and names the samples.
        """
        on_device = [passed for _, passed in self._checks]
        on_device += [recycled for recycled in self._recycled if recycled is not None]
        values: Iterator[list[int]] = iter(())
        if on_device:
            device = on_device[0].device
            values = iter(torch.stack([x.to(device, torch.long, non_blocking=True) for x in on_device]).tolist())
        # In the order of the stages: a later failure may be a consequence of an earlier one.
        for problem, _ in self._checks:
            passed = next(values)
            failed = [self.rows[row].sample for row, fine in zip(self._owners, passed, strict=True) if not fine]
            if failed:
                text = problem if isinstance(problem, str) else problem()
                raise PruningError(f"sample {', '.join(dict.fromkeys(failed))}: {text}")
        for recycled in self._recycled:
            counts = [0] * len(self._owners) if recycled is None else next(values)
            for row, row_counts in zip(self.rows, self._by_row(counts), strict=True):
                row.recycled.append(row_counts)
        self._checks, self._recycled = [], []

    def _by_row(self, values: Sequence[Any]) -> list[list[Any]]:
        """One value per image, regrouped into a list per row."""
        rest = iter(values)
        return [[next(rest) for _ in row.images] for row in self.rows]


def masks_to_host(rows: Sequence[RowTrace]) -> None:
    """Move the masks of a batch's rows to the CPU, in one transfer."""
    masks = [mask for row in rows for stage in row.masks for mask in stage]
    if masks:
        on_device = torch.cat([mask.to(masks[0].device) for mask in masks])
        parts = iter(on_device.cpu().split([len(mask) for mask in masks]))
        for row in rows:
            row.masks = [[next(parts) for _ in stage] for stage in row.masks]
