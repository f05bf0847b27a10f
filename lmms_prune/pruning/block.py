"""The settings of one `prune` block, and everything derived from them before the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lmms_prune.errors import OptionError, ScheduleError, UnsupportedModelError
from lmms_prune.methods.base import Method
from lmms_prune.methods.own import load, refuse_clash
from lmms_prune.methods.spec import print_option
from lmms_prune.models.encoder import Signals
from lmms_prune.models.mosaic import Kind
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.guide import Guide
from lmms_prune.schedule import Schedule, Stage

POSITIONS = ("original", "compact")


@dataclass(frozen=True)
class Acting:
    """One stage of a block that is ready to act: its number from 0, the stage, and its method with the stage's options."""

    number: int
    stage: Stage
    method: Method

    @property
    def kind(self) -> Kind:
        """Into what the stage divides an image that is encoded in tiles: a method of grids gets them one by one."""
        if self.stage.per == "tile":
            return "tile"
        return "rectangle" if self.stage.spec.needs_grid else "image"


@dataclass(frozen=True)
class Block:
    """Everything about a `prune` block that is the same for all prompts.

    Args:
        model: as passed to `prune`.
        parts: the parts of the model.
        schedule: every ``?`` solved.
        stages: by the layer at whose input each acts.
        signals: the signals to record from the vision encoder.
        guide: answers with an auxiliary model, if a method needs one.
        seed, positions, samples, questions, count_selection: as for `prune`.
    """

    model: Any
    parts: ModelParts
    schedule: Schedule
    stages: Mapping[int, Acting]
    signals: Signals
    guide: Guide
    seed: int = 0
    positions: str = POSITIONS[0]
    samples: Sequence[str] | None = None
    questions: Sequence[str] | None = None
    count_selection: bool = False

    @classmethod
    def of(cls, model: Any, parts: ModelParts, schedule: Schedule, **settings: Any) -> Block:
        """Build the stages' methods, with everything that they need; `settings` are further fields.

        Raises:
            ScheduleError, UnsupportedModelError: the model cannot run the schedule.
        """
        fixed = parts.tokens_per_image
        schedule = bound(schedule)
        schedule.check(len(parts.layers), [fixed] if fixed else None)
        stages = {
            stage.layer: Acting(i, stage, stage.spec.build(dict(stage.options)))
            for i, stage in enumerate(schedule.stages)
        }
        guide = Guide(model, parts)
        for acting in stages.values():
            refuse_tiles(parts, acting.stage)
            acting.method.prepare(parts)
            if "guide" in acting.stage.spec.reads:
                guide.model(str(dict(acting.stage.options).get("guide", "self")))
        return cls(model, parts, schedule, stages, _signals(parts, stages), guide, **settings)

    def __post_init__(self) -> None:
        if self.positions not in POSITIONS:
            raise UnsupportedModelError(f"positions '{self.positions}' is unknown; use {' or '.join(POSITIONS)}.")
        if self.positions == "compact" and not self.parts.family.renumbers:
            raise UnsupportedModelError(
                "positions=compact would destroy the height and width channels of M-RoPE; use positions=original."
            )

    def reads_before(self, layer: int) -> bool:
        """Whether a stage at the next layer reads attention, keys or values of `layer`."""
        acting = self.stages.get(layer + 1)
        return acting is not None and bool({"attention", "keys", "values"} & set(acting.stage.spec.reads))

    def following(self, layer: int) -> Acting | None:
        """The next stage after the one at `layer`."""
        return min((acting for at, acting in self.stages.items() if at > layer), key=_layer_of, default=None)

    @property
    def reads_embeddings(self) -> bool:
        """Whether a method reads the input of layer 0."""
        return any("embeddings" in acting.stage.spec.reads for acting in self.stages.values())


def _layer_of(acting: Acting) -> int:
    return acting.stage.layer


def bound(schedule: Schedule) -> Schedule:
    """The schedule with the classes of its own methods imported: this runs the code that it names.

    Raises:
        ScheduleError: a method's file or class is not usable, or the stage is not one that it can do; points at the stage.
    """
    stages = []
    for i, stage in enumerate(schedule.stages):
        try:
            refuse_clash(stage.method)
            if stage.spec.own and stage.row is None:
                row = load(stage.method)
                read = tuple((name, print_option(row.option(name, str(text)))) for name, text in stage.options)
                stage = replace(stage, row=row, options=read)
        except (OptionError, ScheduleError) as error:
            raise schedule.error(i, f"stage {i + 1}: {str(error).removeprefix('schedule: ')}") from error
        stages.append(stage)
    return Schedule(tuple(stages))


def refuse_tiles(parts: ModelParts, stage: Stage) -> None:
    """Refuse a stage that is not defined for images in tiles, if the model encodes them so.

    Raises:
        UnsupportedModelError: names the stage and the reason.
    """
    if parts.tiled and (reason := stage.undefined_on_tiles(parts.family.title)):
        raise UnsupportedModelError(reason)


def _signals(parts: ModelParts, stages: Mapping[int, Acting]) -> Signals:
    """The signals that the methods need from the vision encoder."""
    reads = {name for acting in stages.values() for name in acting.stage.spec.reads}
    signals = Signals(grids=bool(reads & {"grid", "rectangles"}))
    if reads & {"encoder", "pixels"}:
        for acting in stages.values():
            signals |= acting.method.signals(parts.encoder_shape)
    return signals
