"""A schedule on a loaded model, with runs that several cells of the matrix share."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmms_prune.certificate.observe import Observed, Rewritten, generate, observe
from lmms_prune.certificate.prompts import BATCHES, PromptRow, answer, batch
from lmms_prune.certificate.reference import Masked, Standing, masked_run
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule import Schedule

STEPS = 16  # decode steps, after the token that the prefill answers
# Rounding of a type that is expected of any model, even where two ways of computing happen to agree: 8 times its step.
LEAST = {"float32": 1e-6, "float16": 8e-3, "bfloat16": 3e-2}
FEW = 2  # tokens of runs of which only the beginning is compared


@dataclass
class Subject:
    """A loaded model in one type and with one attention kernel; `unpruned` holds its plain answers by batch."""

    model: Any
    dtype: str
    unpruned: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def noise(self) -> float:
        """Return the rounding noise: how far the unpruned model's stepwise, batched logits are from those of one pass.

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
            # A limit derived from it would let everything pass.
            message = f"the unpruned model's own logits are no numbers in {self.dtype}; try another --dtype."
            raise UnsupportedModelError(message)
        return worst

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(ModelParts.of(self.model).layers)

    def plain(self, name: str) -> Tensor:
        """Logits of a batch's first tokens without any hook."""
        if name not in self.unpruned:
            with torch.inference_mode():
                self.unpruned[name] = generate(self.model, BATCHES[name], FEW)[0]
        return self.unpruned[name]


@dataclass
class Case:
    """A schedule and a position policy on a subject; runs of the same rows are made once."""

    subject: Subject
    schedule: Schedule
    positions: str
    observed: dict[tuple[str, ...], Observed] = field(default_factory=dict)
    references: dict[tuple[Any, ...], Masked] = field(default_factory=dict)

    @cached_property
    def parts(self) -> ModelParts:
        return ModelParts.of(self.subject.model)

    def run(self, rows: tuple[PromptRow, ...]) -> Observed:
        """Return the pruned answers of some rows, generated together."""
        key = tuple(row.name for row in rows)
        if key not in self.observed:
            self.observed[key] = self.begun(rows, STEPS + 1)
        return self.observed[key]

    def begun(self, rows: tuple[PromptRow, ...], steps: int = FEW) -> Observed:
        """Return only the first tokens of the rows' pruned answers."""
        return observe(self.subject.model, rows, self.schedule, self.positions, steps)

    def kept_all(self, rows: tuple[PromptRow, ...]) -> Observed:
        """The first answers of the rows where every stage keeps everything."""
        whole = tuple(replace(stage, keep=Decimal(1)) for stage in self.schedule.stages)
        return observe(self.subject.model, rows, Schedule(whole), self.positions, FEW)

    def standings(self, rows: tuple[PromptRow, ...], number: int) -> dict[int, Standing]:
        """Return which tokens one row of a run has from each stage's layer on, as its methods decided.

        Columns are those of the row without padding.
        """
        seen = self.run(rows)
        before = sum(len(row.grids) for row in rows[:number])
        images = range(before, before + len(rows[number].grids))
        ids = batch(self.subject.model, rows[number : number + 1])["input_ids"][0].tolist()
        visual = [column for column, token in enumerate(ids) if token == self.parts.config.image_token_id]
        record, found, columns = seen.trace.rows[number], {}, list(range(len(ids)))
        for position, stage in enumerate(self.schedule.stages):
            written: dict[int, Tensor] = {}
            first = 0
            for image, size, mask in zip(images, record.images, record.masks[position], strict=True):
                own, first = visual[first : first + size], first + size
                rewritten = seen.rewritten.get(stage.layer)
                now = None if rewritten is None else rewritten[image]
                columns = _stays(columns, own, mask.tolist(), now)
                if now is not None:
                    written |= {own[index]: state for index, state in zip(now.index, now.states, strict=True)}
            found[stage.layer] = Standing(list(columns), written)
        return found

    def forgotten(self, standing: dict[int, Standing]) -> dict[int, set[int]]:
        """Columns that generated tokens do not see at layers which ran before what a MustDrop stage dropped."""
        cropping = [stage.layer for stage in self.schedule.stages if stage.spec.crops_cache and stage.layer]
        if not cropping:
            return {}
        left, all_columns = set(standing[max(cropping)].columns), set()
        for one in standing.values():
            all_columns |= set(one.columns)
        length = max(all_columns) + 1
        return dict.fromkeys(range(min(cropping) - 1, max(cropping)), set(range(length)) - left)

    def reference(self, rows: tuple[PromptRow, ...], number: int) -> Masked:
        """What the masked reference answers for one row of a run, given what the run's methods answered."""
        row, standing = rows[number], self.standings(rows, number)
        key: tuple[Any, ...] = (row.name, *(tuple(one.columns) for one in standing.values()))
        if any(one.written for one in standing.values()):
            # What was written differs between runs by rounding.
            key += tuple(one.name for one in rows)
        if key not in self.references:
            made = masked_run(
                self.subject.model,
                batch(self.subject.model, (row,)),
                answer(self.subject.model, row, STEPS + 1).to(self.parts.decoder.norm.weight.device),
                standing,
                self.positions == "compact",
                self.forgotten(standing),
            )
            self.references[key] = made
        return self.references[key]


def _stays(columns: list[int], own: list[int], mask: list[bool], now: Rewritten | None) -> list[int]:
    """`columns` after a stage: of an image's `own` ones those that the mask keeps, or what was put in their place."""
    if now is None:
        kept = {column for column, flag in zip(own, mask, strict=True) if flag}
        return [column for column in columns if column in kept or column not in set(own)]
    placed = [own[index] for index in now.index]
    return [c for c in columns if c < own[0]] + placed + [c for c in columns if c > own[-1]]


def off(logits: Tensor, other: Tensor) -> float:
    """Return the distance of logits (S, vocabulary) from others, relative to the others' norm."""
    distance = float((logits.float() - other.float()).norm() / other.float().norm())
    return distance if distance == distance else float("inf")
