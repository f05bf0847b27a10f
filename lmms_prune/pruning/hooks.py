"""prune(): the context manager that removes visual tokens inside the decoder, and its hooks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from operator import is_not
from typing import Any

from torch import Tensor, nn

from lmms_prune.compat.torch import forward_pre_hooks
from lmms_prune.compat.transformers import cache_of, cached_lengths, filled_cache, named
from lmms_prune.errors import (
    FLAG,
    TEXT,
    TEXTS,
    WHOLE,
    BrokenImageError,
    PruningError,
    expect,
    optional,
)
from lmms_prune.models.encoder import EncoderRecorder
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.block import Block
from lmms_prune.pruning.guards import CacheGuard, GenerateGuard, refuse_arguments, refuse_growing_prompt, refuse_inputs
from lmms_prune.pruning.layout import read_rows
from lmms_prune.pruning.prefill import OTHER_CACHE, Prefill
from lmms_prune.pruning.trace import RowTrace, Trace
from lmms_prune.schedule import PromptSizes, Schedule


@contextmanager
def prune(
    model: nn.Module,
    schedule: Schedule | str | Sequence[str],
    *,
    seed: int = 0,
    positions: str = "original",
    samples: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    count_selection: bool = False,
) -> Iterator[Trace]:
    """Remove visual tokens by `schedule` from every prefill that `model` runs inside the ``with`` block.

    Each decoder layer gets one pre-hook; the model itself is not changed, and no hook is left afterwards. Logits and
    hidden states of a direct forward are those of the tokens that are left. A left-padded batch that is given to the
    model directly needs ``position_ids`` (counted without the padding), as ``generate()`` makes them.

    Args:
        model: a loaded LLaVA-1.5 or Qwen2.5-VL checkpoint.
        schedule: a `Schedule`, its text or a list of stages, every ``?`` solved. An empty one lets the
            model run in any way; its trace says what the unpruned model sees of prompts that come whole, with images.
        seed: decides every random draw, together with the sample's id and the layer.
        positions: "original" keeps each token's position id; "compact" renumbers after every stage (not for M-RoPE).
        samples: one id a row, for seeding; by default a row's own token ids are its id.
        questions: the question of each row as text, for methods that read it.
        count_selection: count what the methods multiply (`RowTrace.selection_flops`); costs them about 25 µs an operation.

    Yields:
        the trace of what happened, filled as the model runs.

    Raises:
        TypeError: an argument is of another type; names it.
        ScheduleError: the schedule does not fit the model.
        UnsupportedModelError: the model, its attention kernel, or the position policy is not supported.
        PruningError: an argument of ``forward`` or ``generate`` that `lmms_prune.pruning.calls` refuses or does not know, a cache
            that cannot hold layers of different lengths or is used outside of the block that filled it, right padding,
            video input, a prompt whose last token is visual and may be dropped, a model that is copied, or whose layers
            are replaced, inside the block, a block inside a block, a schedule that never got to act (an image with no
            more tokens than a stage keeps is left whole; that is no error), or one that was not executed as planned,
            with the sample's name.
    """
    expect(
        seed=(seed, WHOLE),
        positions=(positions, TEXT),
        samples=(samples, optional(TEXTS)),
        questions=(questions, optional(TEXTS)),
        count_selection=(count_selection, FLAG),
    )
    parts = ModelParts.of(model)
    schedule = Schedule.parse(schedule, PromptSizes(len(parts.layers), parts.tokens_per_image))
    trace = Trace(schedule)
    block = Block.of(
        model,
        parts,
        schedule,
        seed=seed,
        positions=positions,
        samples=samples,
        questions=questions,
        count_selection=count_selection,
    )
    _refuse_nesting(parts)
    hooks: Hooks = Pruner(block, trace) if schedule.stages else Recorder(parts, samples, trace)
    try:
        with hooked(hooks.register()):
            yield trace
    finally:
        hooks.close()
    if schedule.stages and not trace.rows:
        raise PruningError(f"the schedule '{schedule}' never acted: no prefill of this model ran inside the block.")


def check(model: nn.Module, schedule: Schedule) -> None:
    """Whether `model` can run `schedule`, with all that its methods need; loads their second models.

    Raises:
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    Block.of(model, ModelParts.of(model), schedule)


def _refuse_nesting(parts: ModelParts) -> None:
    hooked = [*forward_pre_hooks(parts.multimodal), *forward_pre_hooks(parts.decoder)]
    if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in hooked):
        raise PruningError("this model is inside another prune block; put all stages into one schedule.")


class Hooks(ABC):
    """Hooks of a block, which end with it."""

    @abstractmethod
    def register(self) -> Iterator[Any]:
        """Put the hooks on, yielding each handle at once so that the caller can always take it off again."""

    def close(self) -> None:  # noqa: B027  (a block without stages leaves nothing behind)
        """What outlives the block can no longer be used by what needs its hooks."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PruningError(
            "this model is inside a prune block, whose hooks a copy would keep for ever; copy or save it outside of the block."
        )


class Recorder(Hooks):
    """The hooks of a block without stages: they only write down what the unpruned model sees."""

    def __init__(self, parts: ModelParts, samples: Sequence[str] | None, trace: Trace):
        self.parts, self.samples, self.trace = parts, samples, trace
        self.open: list[RowTrace] = []

    def register(self) -> Iterator[Any]:
        """Put the hooks on."""
        yield self.parts.multimodal.register_forward_pre_hook(self.record, with_kwargs=True)
        yield self.parts.multimodal.register_forward_hook(self.note_cache)

    def note_cache(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Note what the prefill left in the cache."""
        cache = filled_cache(output)
        for row in self.open:
            row.cached = [] if cache is None else cached_lengths(cache)
        self.open = []

    def record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note a prefill; decode steps are known by their filled cache, chunks of a prompt by their missing images."""
        self.open = []
        inputs = named(module, args, kwargs)
        ids, cache, mask = inputs.get("input_ids"), cache_of(inputs), inputs.get("attention_mask")
        if (
            ids is None
            or inputs.get("video_grid_thw") is not None
            or (cache is not None and cache.get_seq_length() > 0)
        ):
            return
        pads = [0] * len(ids)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            pads = (~mask.bool()).sum(1).tolist()
        try:
            rows, _ = read_rows(self.parts, inputs, ids.tolist(), pads, self.samples)
        except BrokenImageError:
            return
        layers = len(self.parts.layers)
        for row in rows:
            row.visual, row.computed = [row.visual_tokens] * layers, [ids.shape[1]] * layers
        self.open = rows
        self.trace.rows += rows


class Pruner(Hooks):
    """The hooks of one `prune` block: they tell prefill from decode step, and pass each layer's input to it."""

    def __init__(self, block: Block, trace: Trace):
        self.block, self.parts, self.trace = block, block.parts, trace
        self.recorder = EncoderRecorder(block.parts, block.signals)
        self.layers = list(block.parts.layers)
        self.guards: list[CacheGuard] = []
        self.inputs: dict[str, Any] | None = None
        self.running: Prefill | None = None
        self.decoding = False

    def register(self) -> Iterator[Any]:
        parts, model = self.parts, self.block.model
        yield from self.recorder.register()
        if model is not parts.multimodal:
            yield model.register_forward_pre_hook(self.see_call, with_kwargs=True)
        if hasattr(model, "generate"):
            yield GenerateGuard(model, parts.family.image_arguments)
        yield parts.multimodal.register_forward_pre_hook(self.see_inputs, with_kwargs=True)
        yield parts.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
        for layer, module in enumerate(self.layers):
            yield module.register_forward_pre_hook(partial(self.enter_layer, layer), with_kwargs=True)
            if parts.family.adds_between_layers:
                yield module.register_forward_hook(partial(self.leave_layer, layer))
        yield parts.decoder.register_forward_hook(self.end)

    def close(self) -> None:
        """The caches that were filled here can be used here alone."""
        for guard in self.guards:
            guard.inside = False

    @property
    def asleep(self) -> bool:
        """While the model guides itself, its own unpruned run passes the hooks by."""
        return self.block.guide.running

    def see_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the arguments that only the whole model sees."""
        if not self.asleep:
            refuse_arguments(named(module, args, kwargs), self.parts)

    def see_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remember the token ids, which only the multimodal module sees."""
        if not self.asleep:
            self.inputs = named(module, args, kwargs)
            refuse_arguments(self.inputs, self.parts)
            refuse_inputs(self.inputs)

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Lay out a new prefill, or put a decode step right."""
        if self.asleep:
            return args, kwargs
        inputs, self.inputs = self.inputs, None
        if inputs is None or inputs.get("input_ids") is None:
            raise PruningError("pruning needs input_ids to find the visual tokens; do not call the decoder by itself "
                               "nor with inputs_embeds.")  # fmt: skip
        if len(self.layers) != len(self.parts.layers) or any(map(is_not, self.layers, self.parts.layers)):
            raise PruningError("decoder layers were replaced inside the block; replace them before it begins.")
        cache = cache_of(kwargs)
        self.decoding = cache is not None and cache.get_seq_length() > 0
        if self.decoding:
            if self.running is None:
                raise PruningError(OTHER_CACHE)
            return args, self.running.begin_step(inputs, cache, kwargs)
        if cache is None and self.running is not None and self.running.cache is None:
            refuse_growing_prompt(self.running.ids, inputs["input_ids"])
        self.running = Prefill(self.block, inputs, cache, kwargs.get("position_ids"), self.recorder)
        self.guards.append(self.running.guard)
        kwargs, self.running.between = self.parts.family.between_layers(kwargs)
        return args, kwargs

    def enter_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a decoder layer: give it what a stage has kept."""
        running = self.running
        if self.asleep:
            return args, kwargs
        if running is None:
            raise PruningError("a decoder layer ran by itself; inside a prune block call the whole model.")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.decoding:
            kwargs = running.enter_step(layer, hidden, kwargs)
        else:
            hidden, kwargs = running.enter(layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def leave_layer(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a decoder layer of a prefill: add what the decoder itself would have added."""
        if self.running is None or self.asleep or self.decoding:
            return output
        return self.running.leave(layer, output)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After the last layer: check what was done, and write it down."""
        if self.running is None or self.asleep:
            return
        if self.decoding:
            self.running.finish_step()
        else:
            self.trace.rows += self.running.finish(output)
