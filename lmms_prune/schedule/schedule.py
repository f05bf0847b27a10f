"""A schedule: a tuple of stages, the tokens that it keeps at each layer, and its checks against a model.

Nothing in this package needs torch, so a schedule can be checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from lmms_prune.errors import (
    FROM_ONE,
    TOKEN_COUNTS,
    ScheduleError,
    did_you_mean,
    expect,
    optional,
    tuple_of,
)
from lmms_prune.methods import METHODS
from lmms_prune.schedule.budgets import Budget, PromptSizes, solved
from lmms_prune.schedule.presets import PRESETS
from lmms_prune.schedule.stage import ADAPTIVE, Stage, print_keep
from lmms_prune.schedule.text import read_stages, text_of


@dataclass(frozen=True, init=False, repr=False)
class Schedule:
    """A tuple of stages with strictly increasing layers and non-increasing keeps; `Schedule()` prunes nothing.

    Args:
        stages: the stages, or the schedule's text.
    """

    stages: tuple[Stage, ...]

    def __init__(self, stages: tuple[Stage, ...] | str = ()) -> None:
        object.__setattr__(self, "stages", self.parse(stages).stages if isinstance(stages, str) else stages)
        expect(stages=(self.stages, tuple_of(Stage)))
        for i, stage in enumerate(self.stages):
            self._check_stage(i, stage)

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) or "none"

    def __repr__(self) -> str:
        return f"Schedule({str(self)!r})"

    def _repr_html_(self) -> str:
        """The stages as a table, for notebooks."""
        from lmms_prune.schedule.html import table

        return table(self.stages)

    @classmethod
    def parse(cls, value: Any, sizes: PromptSizes | None = None) -> Schedule:
        """Read a schedule from a value of a command line or a YAML file; everything that reads schedules calls this.

        Args:
            value: a text, a preset's name, ``none``, or a list of stages, each a text or a mapping with ``method``,
                ``layer``, ``keep`` and options. A text may end with ``,budget=…``, which solves its ``?``.
            sizes: the prompt on which a budget is solved.

        Raises:
            ScheduleError: it is no schedule (the message points into the text), or its budget cannot be met.
        """
        schedule, budget = cls.with_budget(value)
        if budget is None:
            return schedule
        if sizes is None:
            raise ScheduleError(
                f"budget={budget}: a budget can be solved only where the model is known; solve it before."
            )
        return schedule.solve(budget, sizes)

    @classmethod
    def with_budget(cls, value: Any) -> tuple[Schedule, Budget | None]:
        """A schedule whose ``?`` is not solved yet, and the budget at the text's end, if any; `value` as in `parse`.

        Raises:
            ScheduleError: either is invalid.
        """
        if isinstance(value, Schedule):
            return value, None
        if isinstance(value, Stage):
            value = [value]
        if isinstance(value, (list, tuple)) and any(isinstance(stage, Stage) for stage in value):
            # Stages that were built in Python keep their classes; texts beside them are read.
            read = [stage if isinstance(stage, Stage) else cls._only_stage(stage) for stage in value]
            return cls(tuple(read)), None
        text, _, budget = text_of(value).partition(",budget=")
        return cls._of(text.strip()), Budget.parse(budget) if budget else None

    @classmethod
    def _only_stage(cls, value: Any) -> Stage:
        stages = cls.parse(value).stages
        if len(stages) != 1:
            raise ScheduleError(f"{value!r} in a list of stages must be one stage.")
        return stages[0]

    @property
    def portable(self) -> Schedule:
        """The schedule as runs record it: files of methods without their folders, told apart by `sources`."""
        return Schedule(tuple(stage.portable for stage in self.stages))

    @property
    def absolute(self) -> Schedule:
        """The schedule with the files of methods by their absolute paths, for a process that starts in another folder."""
        return Schedule(tuple(stage.absolute for stage in self.stages))

    @property
    def sources(self) -> str:
        """The SHA-256 of each file of a method of one's own that the schedule names, once imported; "" without any."""
        return " ".join(f"{stage.portable.method}={stage.spec.sha256}" for stage in self.stages if stage.spec.sha256)

    @classmethod
    def _of(cls, text: str) -> Schedule:
        if text.lower() == "none":
            return cls()
        if not text:
            raise ScheduleError("it is empty; write 'none' to prune nothing.")
        if text in PRESETS:
            text = PRESETS[text]
        elif "@" not in text:
            hint = did_you_mean(text, [*METHODS, *PRESETS, "none"])
            if text in METHODS:
                hint = f" A method needs a layer: e.g. '{METHODS[text].example}'."
            raise ScheduleError(
                f"'{text}' is neither a preset nor a stage such as 'dart@2:0.44'.{hint}", text, (0, len(text))
            )
        return cls(read_stages(text))

    @property
    def unknown(self) -> int | None:
        """The index of the stage whose keep is ``?``, or None."""
        return next((i for i, stage in enumerate(self.stages) if stage.keep is None), None)

    @property
    def at_most(self) -> bool:
        """Whether some stage may keep fewer tokens than planned, so that the plan and its averages are upper bounds."""
        return any(stage.at_most for stage in self.stages)

    def check(self, layers: int, images: Sequence[int] | None = None) -> None:
        """Refuse a schedule that a model of `layers` decoder layers cannot run, or images of these token counts cannot.

        Raises:
            ScheduleError: a layer beyond the model, an unsolved ``?``, or a stage that keeps more than an earlier one.
        """
        expect(layers=(layers, FROM_ONE), images=(images, optional(TOKEN_COUNTS)))
        for i, stage in enumerate(self.stages):
            if stage.layer >= layers:
                message = (
                    f"layer {stage.layer} in stage {i + 1} is beyond the model, whose layers are 0 to {layers - 1}."
                )
                raise self.error(i, message)
            if stage.keep is None:
                raise self.error(
                    i,
                    f"the '?' of stage {i + 1} needs a budget, e.g. budget=192t or budget=0.5 (in Python: Schedule.solve).",
                )
        if images is None:
            return self._check_units()
        for i in range(1, len(self.stages)):
            before, now = (sum(stage.requested(images)) for stage in self.stages[i - 1 : i + 1])
            if now > before and self.stages[i].keep != ADAPTIVE:
                raise self.error(
                    i, f"stage {i + 1} keeps {now} of the {before} tokens that stage {i} keeps: keeps never grow."
                )

    def _check_units(self) -> None:
        """Refuse to mix ratios and counts: without the images' sizes they cannot be compared."""
        for i in range(1, len(self.stages)):
            before, now = (self.stages[j].keep for j in (i - 1, i))
            if ADAPTIVE not in (before, now) and now != 0 and before != 1 and type(before) is not type(now):
                message = f"stages {i} and {i + 1} mix a ratio and a number of tokens, but this model's images differ in size, "
                raise self.error(i, message + "so that the second may be more; use the same unit.")

    def check_tiles(self, title: str) -> None:
        """Refuse a stage that is not defined for images in tiles.

        Args:
            title: the model's name for people.

        Raises:
            ScheduleError: says why it is not.
        """
        for i, stage in enumerate(self.stages):
            if reason := stage.undefined_on_tiles(title):
                raise self.error(i, reason)

    def plan(self, images: Sequence[int], tiles: Sequence[Sequence[int]] = ()) -> list[list[int]]:
        """Tokens kept in each image after each stage, by the methods' count rules.

        Args:
            images: the original visual tokens of each image of one row.
            tiles: those of each tile of each image, for stages whose keep holds per tile; by default each image is one.

        Returns:
            one list of per-image counts per stage. A run keeps exactly these (`at_most`: no more), and budgets are
            computed from them.
        """
        expect(images=(images, TOKEN_COUNTS))
        sizes = tiles or [[size] for size in images]
        present, plan = [list(image) for image in sizes], []
        for stage in self.stages:
            if stage.per == "tile":
                kept = iter(stage.kept(_flat(sizes), _flat(present)))
                present = [[next(kept) for _ in image] for image in sizes]
            else:
                # How many of an image's tokens are in which tile is no longer known, and no later stage needs it.
                present = [[n] for n in stage.kept(images, [sum(image) for image in present])]
            plan.append([sum(image) for image in present])
        return plan

    @property
    def keeps_all(self) -> bool:
        """Whether every stage requests all tokens, by the ratio 1: a control that is meant to change nothing."""
        return all(isinstance(stage.keep, Decimal) and stage.keep == 1 for stage in self.stages)

    @property
    def cropped(self) -> range:
        """The layers whose caches lose, after the prompt, the tokens that deeper stages dropped (`MethodSpec.crops_cache`)."""
        cropping = [stage for stage in self.stages if stage.spec.crops_cache and stage.layer]
        if not cropping:
            return range(0)
        return range(min(0 if s.spec.crops_cache == "all" else s.layer - 1 for s in cropping), cropping[-1].layer)

    def idle(self, images: Sequence[int]) -> list[Stage]:
        """The stages that prune nothing of a row with these images, although they do not request all tokens."""
        present, idle = list(images), []
        for stage in self.stages:
            kept = stage.kept(images, present)
            if kept == present and any(present) and not stage.at_most and stage.keep != 1:
                idle.append(stage)
            present = kept
        return idle

    def layer_counts(self, layers: int, images: Sequence[int], tiles: Sequence[Sequence[int]] = ()) -> list[int]:
        """Visual tokens entering each of `layers` decoder layers for one row with these images; `tiles` as for `plan`."""
        expect(layers=(layers, FROM_ONE), images=(images, TOKEN_COUNTS))
        counts, present, plan = [], sum(images), self.plan(images, tiles)
        for layer in range(layers):
            for stage, kept in zip(self.stages, plan, strict=True):
                if stage.layer == layer:
                    present = sum(kept)
            counts.append(present)
        return counts

    def cached_counts(self, layers: int, images: Sequence[int], tiles: Sequence[Sequence[int]] = ()) -> list[int]:
        """Visual tokens in the cache of each layer after the prompt: `layer_counts`, less what is cropped from earlier layers."""
        counts, cropped = self.layer_counts(layers, images, tiles), self.cropped
        if cropped.stop >= layers:
            return counts
        return [counts[cropped.stop] if layer in cropped else count for layer, count in enumerate(counts)]

    def avg_visual_tokens(self, layers: int, images: Sequence[int], tiles: Sequence[Sequence[int]] = ()) -> Fraction:
        """Average visual tokens per decoder layer for one row with these images; `tiles` as for `plan`."""
        return Fraction(sum(self.layer_counts(layers, images, tiles)), layers)

    def solve(self, budget: Budget | str | float, sizes: PromptSizes) -> Schedule:
        """Replace the one ``?`` by the largest keep whose measured cost stays within the budget.

        Args:
            budget: a `Budget` or its text: ``192t``, ``0.5``, ``flops=40%``, ``flops=3.5T``, ``kv=40%``, ``kv=100MiB``.
            sizes: of the prompt and the model (`lmms_prune.efficiency.estimate.prompt_sizes` adds the costs).

        Raises:
            ScheduleError: no ``?`` or several, or a budget that cannot be met; the message says what can.
        """
        return solved(self, Budget.parse(budget), sizes)

    def _check_stage(self, i: int, stage: Stage) -> None:
        spec = stage.spec
        if stage.layer < spec.lowest_layer:
            message = (
                f"{stage.method} cannot act at layer {stage.layer}: it reads {spec.reads_text}, so its lowest layer is "
            )
            raise self.error(i, message + f"{spec.lowest_layer}.")
        if spec.highest_layer is not None and stage.layer > spec.highest_layer:
            message = f"{stage.method} cannot act at layer {stage.layer}: the layers at which it can act: "
            raise self.error(i, message + f"{spec.layers_text}.")
        if reason := spec.refuses(stage.layer, dict(stage.options)):
            raise self.error(i, f"{stage.method} cannot act like that in stage {i + 1}: {reason}.")
        if spec.drops_all and stage.per != "image":
            raise self.error(i, f"{stage.method} drops every visual token; write '{stage.method}@{stage.layer}'.")
        if stage.per == "tile" and i and self.stages[i - 1].per == "image":
            message = f"per=tile in stage {i + 1} follows stage {i}, which keeps by image: how many tokens each tile has left "
            raise self.error(i, message + "is not planned then. Give both per=tile, or neither.")
        if spec.drops_all and stage.keep != 0:
            raise self.error(i, f"{stage.method} drops every visual token; write '{stage.method}@{stage.layer}'.")
        if isinstance(stage.keep, Decimal) and not 0 <= stage.keep <= 1:
            hint = "a number of tokens ends in 't'"
            if stage.keep < 0:
                hint = "it cannot be negative"
            elif stage.keep == stage.keep.to_integral_value():
                hint = f"for a number of tokens write '{int(stage.keep)}t'"
            raise self.error(i, f"the ratio {stage.keep} in stage {i + 1} must lie in [0, 1]; {hint}.")
        if isinstance(stage.keep, int) and stage.keep < 0:
            raise self.error(i, f"the count {stage.keep} in stage {i + 1} must not be negative.")
        if i == 0:
            return
        before = self.stages[i - 1]
        if stage.layer <= before.layer:
            message = f"layers must increase: stage {i + 1} acts at layer {stage.layer}, stage {i} at {before.layer}."
            raise self.error(i, message)
        comparable = {type(stage.keep), type(before.keep)} in ({int}, {Decimal})
        if comparable and stage.keep > before.keep:  # type: ignore[operator]
            message = f"keeps never grow: stage {i + 1} keeps {print_keep(stage.keep)}, stage {i} only "
            raise self.error(i, message + f"{print_keep(before.keep)}.")

    def error(self, i: int, message: str) -> ScheduleError:
        """An error that points at stage `i` (from 0) of the text."""
        start = sum(len(str(stage)) + 1 for stage in self.stages[:i])
        return ScheduleError(message, str(self), (start, start + len(str(self.stages[i]))))


def _flat(images: Sequence[Sequence[int]]) -> list[int]:
    return [size for image in images for size in image]
