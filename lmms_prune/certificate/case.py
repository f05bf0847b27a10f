"""A schedule on a loaded model, with cached runs that several cells of the matrix share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmms_prune.certificate.observe import Observed, Rewritten, generate, observe
from lmms_prune.certificate.prompts import BATCHES, PromptRow, answer, batch
from lmms_prune.certificate.reference import KeptColumns, Masked, masked_run
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.mosaic import Kind
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.block import Acting
from lmms_prune.pruning.prompts import ImageColumns, read_rows
from lmms_prune.schedule import Schedule

STEPS = 16  # decode steps, after the token that the prefill predicts
# Lower bound of the rounding noise by dtype, for models where two ways of computing happen to agree: about 8 times the
# dtype's step.
LEAST = {"float32": 1e-6, "float16": 8e-3, "bfloat16": 3e-2}
FEW = 2  # tokens to generate if only the start of a run is compared


@dataclass
class Subject:
    """A loaded model in one dtype with one attention kernel.

    Args:
        model: the loaded model, without hooks.
        dtype: name of its dtype, without "torch.".
        unpruned: cached logits without pruning, by batch name.
    """

    model: Any
    dtype: str
    unpruned: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def noise(self) -> float:
        """The rounding noise: the relative distance between stepwise, batched logits and logits of one pass, unpruned.

        Raises:
            UnsupportedModelError: the logits are not finite.
        """
        device, deviations = next(self.model.parameters()).device, [LEAST[self.dtype]]
        for rows in (BATCHES["3"], BATCHES["ragged"]):
            with torch.inference_mode():
                logits, _ = generate(self.model, rows, STEPS + 1)
            for row, row_logits in zip(rows, logits, strict=True):
                tokens = answer(self.model, row, STEPS + 1).to(device)
                deviations.append(
                    off(row_logits, masked_run(self.model, batch(self.model, (row,)), tokens, {}, False).logits)
                )
        if (worst := max(deviations)) == float("inf"):
            # With an infinite limit every check would pass.
            message = f"the unpruned model's own logits are not finite in {self.dtype}; try another --dtype."
            raise UnsupportedModelError(message)
        return worst

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(ModelParts.of(self.model).layers)

    def plain(self, name: str) -> Tensor:
        """Return the logits of the first tokens of the batch `name`, without any hooks."""
        if name not in self.unpruned:
            with torch.inference_mode():
                self.unpruned[name] = generate(self.model, BATCHES[name], FEW)[0]
        return self.unpruned[name]


@dataclass
class Case:
    """A schedule and a position policy on a subject. Runs of the same rows are cached."""

    subject: Subject
    schedule: Schedule
    positions: str
    observed: dict[tuple[str, ...], Observed] = field(default_factory=dict)
    references: dict[tuple[Any, ...], Masked] = field(default_factory=dict)

    @cached_property
    def parts(self) -> ModelParts:
        return ModelParts.of(self.subject.model)

    def run(self, rows: tuple[PromptRow, ...]) -> Observed:
        """Return the pruned generation of `rows` as one batch."""
        key = tuple(row.name for row in rows)
        if key not in self.observed:
            self.observed[key] = self.begun(rows, STEPS + 1)
        return self.observed[key]

    def begun(self, rows: tuple[PromptRow, ...], steps: int = FEW) -> Observed:
        """Return the first `steps` tokens of the rows' pruned generation, uncached."""
        return observe(self.subject.model, rows, self.schedule, self.positions, steps)

    def kept_all(self, rows: tuple[PromptRow, ...]) -> Observed:
        """Return the first tokens of the rows with every stage as keep-all."""
        keep_all_stages = tuple(replace(stage, keep=Decimal(1)) for stage in self.schedule.stages)
        return observe(self.subject.model, rows, Schedule(keep_all_stages), self.positions, FEW)

    def kept_columns(self, rows: tuple[PromptRow, ...], number: int) -> dict[int, KeptColumns]:
        """Return the columns that row `number` of a run keeps from each stage's layer on, by layer.

        They follow the masks that the methods decided in that run. Columns count without padding.
        """
        seen, inputs = self.run(rows), batch(self.subject.model, rows[number : number + 1])
        ids = inputs["input_ids"].tolist()
        _, images = read_rows(self.parts, inputs, ids, [0], None)
        before = [self._pictures(row) for row in rows[:number]]
        record, kept, columns = seen.trace.rows[number], {}, list(range(len(ids[0])))
        for stage_index, stage in enumerate(self.schedule.stages):
            written: dict[int, Tensor] = {}
            added: dict[int, Tensor] = {}
            width = self.parts.decoder.config.hidden_size
            stage_rewrites = seen.rewritten.get(stage.layer)
            kind = Acting(stage_index, stage, stage.spec.build(dict(stage.options))).kind
            first = sum(len(_rasters(image, kind)) for pictures in before for image in pictures)
            for image, mask in zip(images, record.masks[stage_index], strict=True):
                rasters = _rasters(image, kind)
                view_rows = range(first, first + len(rasters))
                first += len(rasters)
                if stage_rewrites is None:
                    dropped = {column for column, flag in zip(image.patches, mask.tolist(), strict=True) if not flag}
                    columns = [column for column in columns if column not in dropped]
                for view_row, raster in zip(view_rows, rasters, strict=True):
                    rewritten = None if stage_rewrites is None else stage_rewrites[view_row]
                    if rewritten is not None:
                        own = [image.patches[index] for index in raster]
                        columns = _rewritten(columns, own, rewritten)
                        states = list(zip(rewritten.index, rewritten.states, strict=True))
                        written |= {own[index]: state[:width] for index, state in states}
                        added |= {own[index]: state[width:] for index, state in states if len(state) > width}
                if not mask.any():
                    # Newline tokens are dropped with the last of their image's other tokens.
                    columns = [column for column in columns if column not in set(image.newlines)]
            kept[stage.layer] = KeptColumns(list(columns), written, added)
        return kept

    def _pictures(self, row: PromptRow) -> list[ImageColumns]:
        inputs = batch(self.subject.model, (row,))
        return read_rows(self.parts, inputs, inputs["input_ids"].tolist(), [0], None)[1]

    def forgotten(self, kept: dict[int, KeptColumns]) -> dict[int, set[int]]:
        """Return the columns that generated tokens do not see, by layer, because a stage cropped earlier caches.

        MustDrop and IVC-Prune also remove the tokens that they dropped from caches that were filled before.
        """
        cropped = self.schedule.cropped
        if not cropped:
            return {}
        remaining, all_columns = set(kept[cropped.stop].columns), set()
        for stage_kept in kept.values():
            all_columns |= set(stage_kept.columns)
        length = max(all_columns) + 1
        return dict.fromkeys(cropped, set(range(length)) - remaining)

    def reference(self, rows: tuple[PromptRow, ...], number: int) -> Masked:
        """Return the masked reference for row `number` of a run, with the tokens that the run's methods kept."""
        row, kept = rows[number], self.kept_columns(rows, number)
        key: tuple[Any, ...] = (row.name, *(tuple(stage_kept.columns) for stage_kept in kept.values()))
        if any(stage_kept.written for stage_kept in kept.values()):
            # Written states differ between runs by rounding, so such a reference holds for its own run only.
            key += tuple(other.name for other in rows)
        if key not in self.references:
            self.references[key] = masked_run(
                self.subject.model,
                batch(self.subject.model, (row,)),
                answer(self.subject.model, row, STEPS + 1).to(self.parts.decoder.norm.weight.device),
                kept,
                self.positions == "compact",
                self.forgotten(kept),
            )
        return self.references[key]


def _rasters(image: ImageColumns, kind: Kind) -> list[Sequence[int]]:
    """The raster indices of each row of a view that belongs to the image."""
    if image.mosaic is None:
        return [range(len(image.patches))]
    return [region.raster for region in image.mosaic.regions(kind)]


def _rewritten(columns: list[int], own: list[int], rewritten: Rewritten) -> list[int]:
    """Return `columns` after a method wrote its new tokens over those of one row of its view, and the others were dropped."""
    members = set(own)
    entries = [number for number, column in enumerate(columns) if column in members]
    # A rewrite may change the order of the tokens: the new ones lie where the entries lay that they replace.
    replaced = {entries[e]: own[index] for e, index in zip(rewritten.entries, rewritten.index, strict=True)}
    return [
        replaced.get(number, column)
        for number, column in enumerate(columns)
        if column not in members or number in replaced
    ]


def off(logits: Tensor, other: Tensor) -> float:
    """Return the distance of logits (S, vocabulary) from `other`, relative to the norm of `other`.

    The distance is infinite if it is not a number.
    """
    distance = float((logits.float() - other.float()).norm() / other.float().norm())
    return distance if distance == distance else float("inf")
