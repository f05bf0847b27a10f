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
from lmms_prune.models.adapters import unwrapped
from lmms_prune.models.encoder import EncoderRecorder
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.block import Block, bound
from lmms_prune.pruning.decode import OTHER_CACHE, DecodeSteps
from lmms_prune.pruning.guards import (
    CacheGuard,
    EncodedImages,
    GenerateGuard,
    refuse_arguments,
    refuse_growing_prompt,
    refuse_inputs,
)
from lmms_prune.pruning.prefill import Prefill
from lmms_prune.pruning.prompts import read_rows
from lmms_prune.pruning.trace import RowTrace, Trace
from lmms_prune.schedule import PromptSizes, Schedule, Stage


@contextmanager
def prune(
    model: nn.Module,
    schedule: Schedule | Stage | str | Sequence[str | Stage],
    *,
    seed: int = 0,
    positions: str = "original",
    samples: Sequence[str] | None = None,
    questions: Sequence[str] | None = None,
    count_selection: bool = False,
) -> Iterator[Trace]:
    """Remove visual tokens by `schedule` from every prefill that `model` runs inside the ``with`` block.

    Each decoder layer gets one pre-hook; the model itself is not changed, and all hooks are removed afterwards. Logits
    and hidden states of a direct forward pass are those of the kept tokens. A left-padded batch that is passed to the
    model directly needs ``position_ids`` (counted without the padding), as ``generate()`` makes them.

    Args:
        model: a loaded checkpoint of a family in `lmms_prune.models.FAMILIES`, or a `peft.PeftModel` of it.
        schedule: a `Schedule`, its text or a list of stages, every ``?`` solved. A method of one's own is named in the text
            (``file.py:Class@2:0.3``) or given as an object (``[stage(MyMethod(), 2, 0.3)]``); its code runs here. With an empty
            schedule the model may run in any way; its trace then describes the unpruned prefills of complete prompts with images.
        seed: decides every random draw, together with the sample's id and the layer.
        positions: "original" keeps each token's position id; "compact" renumbers after every stage (not for M-RoPE).
        samples: one id per row, for seeding; by default a hash of the row's token ids.
        questions: the question of each row as text, for methods that read it.
        count_selection: count the FLOPs of the methods (`RowTrace.selection_flops`), once for each combination of sizes.

    Yields:
        the trace, filled as the model runs.

    Raises:
        TypeError: an argument is of another type; names it.
        ScheduleError: the schedule does not fit the model.
        UnsupportedModelError: the model, its attention kernel, or the position policy is not supported.
        PruningError: one of
            - an argument of ``forward`` or ``generate`` that `lmms_prune.pruning.calls` refuses or does not list
            - a cache that cannot hold layers of different lengths, or that is used outside the block that filled it
            - right padding, or video input
            - a prompt whose last token is visual and may be dropped
            - a model that is copied, or whose layers are replaced, inside the block
            - a block inside a block
            - a schedule that never acted (an image with no more tokens than a stage keeps is not pruned; that is no error)
            - a schedule that was not executed as planned; names the sample.
    """
    expect(
        seed=(seed, WHOLE),
        positions=(positions, TEXT),
        samples=(samples, optional(TEXTS)),
        questions=(questions, optional(TEXTS)),
        count_selection=(count_selection, FLAG),
    )
    model = unwrapped(model)
    parts = ModelParts.of(model)
    tile = parts.family.tile_tokens(parts.config)
    schedule = bound(Schedule.parse(schedule, PromptSizes(len(parts.layers), parts.tokens_per_image, tile=tile)))
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
    """Check that `model` can run `schedule`, with everything that its methods need; loads their auxiliary models.

    Raises:
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    Block.of(unwrapped(model), ModelParts.of(model), schedule)


def _refuse_nesting(parts: ModelParts) -> None:
    existing = [*forward_pre_hooks(parts.multimodal), *forward_pre_hooks(parts.decoder)]
    if any(isinstance(getattr(hook, "__self__", None), Hooks) for hook in existing):
        raise PruningError("this model is inside another prune block; put all stages into one schedule.")


class Hooks(ABC):
    """The hooks of a block; they are removed when it ends."""

    @abstractmethod
    def register(self) -> Iterator[Any]:
        """Register the hooks, yielding each handle at once so that the caller can always remove it again."""

    def close(self) -> None:  # noqa: B027  (a block without stages leaves nothing behind)
        """Make objects that outlive the block, such as caches, unusable where they need its hooks."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PruningError(
            "this model is inside a prune block, and a copy would keep its hooks for ever; copy or save it outside the block."
        )


class Recorder(Hooks):
    """The hooks of a block without stages: they only record the prefills of the unpruned model."""

    def __init__(self, parts: ModelParts, samples: Sequence[str] | None, trace: Trace):
        self.parts, self.samples, self.trace = parts, samples, trace
        self.open: list[RowTrace] = []
        self.images: EncodedImages | None = None

    def register(self) -> Iterator[Any]:
        """Register the hooks."""
        if self.parts.tiled:
            self.images = EncodedImages(self.parts, lambda: False)
            yield self.images
        yield self.parts.multimodal.register_forward_pre_hook(self.record, with_kwargs=True)
        yield self.parts.multimodal.register_forward_hook(self.note_cache)

    def note_cache(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Record the cache's lengths after the prefill."""
        cache = filled_cache(output)
        for row in self.open:
            row.cached = [] if cache is None else cached_lengths(cache)
        self.open = []

    def record(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Record a prefill. A filled cache marks a decode step, missing images mark a chunk of a prompt; both are skipped."""
        self.open = []
        inputs = named(module, args, kwargs)
        ids, cache, mask = inputs.get("input_ids"), cache_of(inputs), inputs.get("attention_mask")
        if (
            ids is None
            or inputs.get("video_grid_thw") is not None
            or (cache is not None and cache.get_seq_length() > 0)
        ):
            return
        inputs = inputs if self.images is None else self.images.take(inputs)
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
    """The hooks of one block with stages: they tell prefills from decode steps and pass the layers' inputs to `Prefill`."""

    def __init__(self, block: Block, trace: Trace):
        self.block, self.parts, self.trace = block, block.parts, trace
        self.recorder = EncoderRecorder(block.parts, block.signals)
        self.layers = list(block.parts.layers)
        self.guards: list[CacheGuard] = []
        self.inputs: dict[str, Any] | None = None
        self.running: Prefill | None = None
        self.steps: DecodeSteps | None = None
        self.decoding = False
        self.images: EncodedImages | None = None

    def register(self) -> Iterator[Any]:
        parts, model = self.parts, self.block.model
        yield from self.recorder.register()
        if model is not parts.multimodal:
            yield model.register_forward_pre_hook(self.see_call, with_kwargs=True)
        if hasattr(model, "generate"):
            yield GenerateGuard(model, parts.family.image_arguments)
        if parts.tiled:
            self.images = EncodedImages(parts, lambda: self.asleep)
            yield self.images
        yield parts.multimodal.register_forward_pre_hook(self.see_inputs, with_kwargs=True)
        yield parts.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
        for layer, module in enumerate(self.layers):
            yield module.register_forward_pre_hook(partial(self.enter_layer, layer), with_kwargs=True)
            if parts.family.adds_between_layers:
                yield module.register_forward_hook(partial(self.leave_layer, layer))
        yield parts.decoder.register_forward_hook(self.end)

    def close(self) -> None:
        """Make caches that were filled in this block unusable outside it."""
        for guard in self.guards:
            guard.inside = False

    @property
    def asleep(self) -> bool:
        """Whether the hooks are off because the model runs unpruned as its own guide."""
        return self.block.guide.running

    def see_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Check the arguments that only the outermost model receives."""
        if not self.asleep:
            refuse_arguments(named(module, args, kwargs), self.parts)

    def see_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Store the token ids, which only the multimodal module receives."""
        if not self.asleep:
            self.inputs = named(module, args, kwargs)
            refuse_arguments(self.inputs, self.parts)
            refuse_inputs(self.inputs)

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Set up a new prefill, or correct the arguments of a decode step."""
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
            if self.steps is None:
                raise PruningError(OTHER_CACHE)
            return args, self.steps.begin(inputs, cache, kwargs)
        if cache is None and self.running is not None and self.running.cache is None:
            refuse_growing_prompt(self.running.ids, inputs["input_ids"])
        # Before anything is checked: a cache whose prompt is refused is free again once the block ends.
        self.guards.append(guard := CacheGuard())
        inputs = inputs if self.images is None else self.images.take(inputs)
        self.running = Prefill(self.block, inputs, cache, kwargs.get("position_ids"), self.recorder, guard)
        self.steps = DecodeSteps(self.running)
        kwargs, self.running.between = self.parts.family.between_layers(kwargs)
        return args, kwargs

    def enter_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a decoder layer: pass it the kept tokens."""
        running, steps = self.running, self.steps
        if self.asleep:
            return args, kwargs
        if running is None or steps is None:
            raise PruningError("a decoder layer ran by itself; inside a prune block call the whole model.")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.decoding:
            kwargs = steps.enter(layer, hidden, kwargs)
        else:
            hidden, kwargs = running.enter(layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def leave_layer(self, layer: int, module: nn.Module, args: tuple, output: Any) -> Any:
        """After a decoder layer of a prefill: add the tensors that the decoder would have added (DeepStack)."""
        if self.running is None or self.asleep or self.decoding:
            return output
        return self.running.leave(layer, output)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After the last layer: verify the prefill and add it to the trace."""
        if self.running is None or self.steps is None or self.asleep:
            return
        if self.decoding:
            self.steps.finish()
        else:
            self.trace.rows += self.running.finish(output)
