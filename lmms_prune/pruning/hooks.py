"""prune(): the context manager that removes visual tokens inside the decoder. Cutting exists here once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from operator import is_not
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lmms_prune.compat.torch import forward_pre_hooks
from lmms_prune.compat.transformers import cache_of, cached_lengths, filled_cache, layer_keys, named
from lmms_prune.errors import (
    FLAG,
    TEXT,
    TEXTS,
    WHOLE,
    BrokenImageError,
    PruningError,
    UnsupportedModelError,
    expect,
    optional,
)
from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import LayerInput, TokenView
from lmms_prune.models.encoder import Encoder, EncoderRecorder, EncoderRun, Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.guards import CacheGuard, GenerateGuard, refuse_arguments, refuse_growing_prompt, refuse_inputs
from lmms_prune.pruning.guide import answer_attention, check_guide, load_guide
from lmms_prune.pruning.layout import Layout, read_rows
from lmms_prune.pruning.ragged import Packing, attention_mask, gather_rotary, pack
from lmms_prune.pruning.trace import ProductCounter, RowTrace, Trace
from lmms_prune.schedule import ADAPTIVE, PromptSizes, Schedule, Stage

POSITIONS = ("original", "compact")


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
    _check_fit(parts, schedule)
    trace = Trace(schedule)
    if positions not in POSITIONS:
        raise UnsupportedModelError(f"positions '{positions}' is unknown; use {' or '.join(POSITIONS)}.")
    if positions == "compact" and not parts.family.renumbers:
        message = "positions=compact would destroy the height and width channels of M-RoPE; use positions=original."
        raise UnsupportedModelError(message)
    hooked = [*forward_pre_hooks(parts.multimodal), *forward_pre_hooks(parts.decoder)]
    if any(isinstance(getattr(hook, "__self__", None), (_Pruner, _Recorder)) for hook in hooked):
        raise PruningError("this model is inside another prune block; put all stages into one schedule.")
    hooks: _Recorder | _Pruner = _Recorder(parts, samples, trace)
    if schedule.stages:
        hooks = _Pruner(model, parts, schedule, seed, positions, samples, trace, questions, count_selection)
    handles: list[Any] = []
    try:
        handles += hooks.register()
        yield trace
    finally:
        for handle in handles:
            handle.remove()
        hooks.close()
    if schedule.stages and not trace.rows:
        raise PruningError(f"the schedule '{schedule}' never acted: no prefill of this model ran inside the block.")


def check(model: nn.Module, schedule: Schedule) -> None:
    """Whether `model` can run `schedule`, with all that its methods need; loads their second models.

    Raises:
        ScheduleError, UnsupportedModelError: as `prune`.
    """
    parts = ModelParts.of(model)
    _check_fit(parts, schedule)
    _Pruner(model, parts, schedule, 0, POSITIONS[0], None, Trace(schedule), None)


def _check_fit(parts: ModelParts, schedule: Schedule) -> None:
    """Refuse a schedule that does not fit the model's depth and images."""
    fixed = parts.tokens_per_image
    schedule.check(len(parts.layers), [fixed] if fixed else None)


@dataclass
class _Segment:
    """What every layer from one cut to the next is given instead of the library's tensors."""

    valid: Bool[Tensor, "B N"]
    padded: bool
    mask: Tensor | None
    rotary: tuple[Tensor, Tensor]
    lengths: Int[Tensor, " B"]
    origin: Int[Tensor, "B N"]
    host_lengths: list[int]
    decode_mask: Tensor | None = None
    decode_rotary: tuple[Tensor, Tensor] | None = None


@dataclass
class _Prefill:
    """One prompt batch, from its prefill through its decode steps."""

    ids: Tensor
    present: Bool[Tensor, "B L"]
    layout: Layout
    cache: Any
    next_position: Int[Tensor, "#B 1"]
    segments: list[_Segment | None]
    guard: CacheGuard
    encoder: EncoderRun | None = None
    embedded: Tensor | None = None
    before: LayerInput | None = None
    guided: dict[tuple[str, int, bool], list[Tensor]] = field(default_factory=dict)
    steps: int = 0
    entered: int = 0


class _Hooks:
    """Hooks of a block, which end with it."""

    def close(self) -> None:
        """What outlives the block can no longer be used by what needs its hooks."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise PruningError(
            "this model is inside a prune block, whose hooks a copy would keep for ever; copy or save it outside of the block."
        )


class _Recorder(_Hooks):
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


class _Pruner(_Hooks):
    """The hooks of one `prune` block and the state that they share."""

    def __init__(
        self,
        model: Any,
        parts: ModelParts,
        schedule: Schedule,
        seed: int,
        positions: str,
        samples: Sequence[str] | None,
        trace: Trace,
        questions: Sequence[str] | None,
        count_selection: bool = False,
    ):
        self.model, self.parts, self.schedule, self.seed, self.positions = model, parts, schedule, seed, positions
        self.samples, self.trace, self.questions = samples, trace, questions
        self.count_selection = count_selection
        self.stages: dict[int, tuple[int, Stage, Method]] = {
            stage.layer: (i, stage, stage.spec.build(dict(stage.options))) for i, stage in enumerate(schedule.stages)
        }
        reading = {"attention", "keys"}
        # A stage at layer 0 has no layer before it; a method that may stand there reads something else then.
        self.recorded = {s.layer - 1 for s in schedule.stages if s.layer and reading & set(s.spec.reads)}
        self.embedding = any("embeddings" in stage.spec.reads for stage in schedule.stages)
        for stage in schedule.stages:
            self.stages[stage.layer][2].prepare(parts)
            if "guide" in stage.spec.reads:
                self._guide_model(str(dict(stage.options).get("guide", "self")))
        asks = Signals(grids=any("grid" in stage.spec.reads for stage in schedule.stages))
        if any({"encoder", "pixels"} & set(stage.spec.reads) for stage in schedule.stages):
            shape = parts.encoder_shape
            for _, _, method in self.stages.values():
                asks |= method.signals(shape)
        self.encoder = EncoderRecorder(parts, asks)
        self.layers = list(parts.layers)
        self.guards: list[CacheGuard] = []
        self.inputs: dict[str, Any] | None = None
        self.running: _Prefill | None = None
        self.decoding = False
        # While the model guides itself, its own unpruned run passes the hooks by.
        self.asleep = False

    def register(self) -> Iterator[Any]:
        """Put the hooks on, yielding each handle at once so that the caller can always take it off again."""
        parts = self.parts
        yield from self.encoder.register()
        if self.model is not parts.multimodal:
            yield self.model.register_forward_pre_hook(self.see_call, with_kwargs=True)
        if hasattr(self.model, "generate"):
            yield GenerateGuard(self.model)
        yield parts.multimodal.register_forward_pre_hook(self.see_inputs, with_kwargs=True)
        yield parts.decoder.register_forward_pre_hook(self.begin, with_kwargs=True)
        for layer, module in enumerate(self.layers):
            yield module.register_forward_pre_hook(partial(self.enter_layer, layer), with_kwargs=True)
        yield parts.decoder.register_forward_hook(self.end)

    def close(self) -> None:
        """The caches that were filled here can be used here alone."""
        for guard in self.guards:
            guard.inside = False

    # -- the whole model -------------------------------------------------------------------------------------------

    def see_call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Look at the arguments that only the whole model sees."""
        if not self.asleep:
            refuse_arguments(named(module, args, kwargs), self.parts.config)

    def see_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remember the token ids, which only the multimodal module sees."""
        if not self.asleep:
            self.inputs = named(module, args, kwargs)
            refuse_arguments(self.inputs, self.parts.config)
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
        if cache is not None and cache.get_seq_length() > 0:
            return args, self._begin_step(inputs, cache, kwargs)
        self._begin_prefill(inputs, cache, kwargs)
        return args, kwargs

    def _begin_prefill(self, inputs: dict, cache: Any, kwargs: dict) -> None:
        self.guards.append(guard := CacheGuard())
        if cache is not None:
            guard.watch(cache)
        ids, layers = inputs["input_ids"], len(self.parts.layers)
        if cache is None and self.running is not None and self.running.cache is None:
            refuse_growing_prompt(self.running.ids, ids)
        encoder, self.encoder.run = self.encoder.run, None
        # generate() gives the images' grids to the encoder alone.
        layout = Layout.of(self.parts, inputs, self.samples, encoder.grids if encoder else None)
        for row in layout.traces:
            self.schedule.check(layers, row.images)
        self._refuse_dropped_ends(layout)
        following = _next_position(kwargs.get("position_ids"), layout.present)
        self.running = _Prefill(ids, layout.present, layout, cache, following, [None] * layers, guard, encoder)
        self.decoding = False

    def _refuse_dropped_ends(self, layout: Layout) -> None:
        """The logits of a prompt are those of its last token, so that none may be dropped that stands there."""
        dropped = [
            row.sample
            for row, ends in zip(layout.traces, layout.ends_in_image, strict=True)
            if ends
            and (
                any(s.keep == ADAPTIVE for s in self.schedule.stages)
                or self.schedule.plan(row.images)[-1][-1] < row.images[-1]
            )
        ]
        if dropped:
            raise PruningError(
                f"sample {', '.join(dropped)}: the prompt ends in an image, whose last token answers it and may be "
                "dropped; end the prompt with text (a chat template does), or keep all tokens."
            )

    def _begin_step(self, inputs: dict, cache: Any, kwargs: dict) -> dict:
        running, ids = self.running, inputs["input_ids"]
        if running is None or cache is not running.cache:
            raise PruningError(
                "this cache was not filled inside the block by its latest prompt; start from the whole prompt."
            )
        if ids.shape[1] != 1:
            message = f"{ids.shape[1]} tokens at once after the prefill: chunked prefill, assisted decoding and "
            raise PruningError(message + "continuing a conversation are not supported while pruning.")
        running.steps += 1
        running.entered = 0
        self.decoding = True
        segments = {id(s): s for s in running.segments if s is not None}.values()
        for segment in segments:
            self._step_segment(segment, running.steps)
        if segments and inputs.get("position_ids") is None:
            # The library counts from the length of layer 0's cache, which a stage at layer 0 has shortened.
            kwargs = {**kwargs, "position_ids": running.next_position + (running.steps - 1)}
        if running.segments[0] is not None:
            kwargs = {**kwargs, "attention_mask": None}
        return kwargs

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After a prefill: what was done must be what was planned, down to the cache's real tensors."""
        running = self.running
        if running is None or self.asleep:
            return
        if self.decoding:
            if running.entered != len(self.layers):
                raise PruningError(f"{running.entered} of {len(self.layers)} decoder layers ran in a decode step.")
            return
        if running.cache is None and (cache := filled_cache(output)) is not None:
            # The decoder has just made it itself, as it does when the caller brings none.
            running.guard.watch(cache)
            running.cache = cache
        layout, cache = running.layout, running.cache
        layout.verify()
        # Errors and no asserts: these guard figures, and must hold under python -O, too.
        for row in layout.traces:
            if not self.schedule.at_most and row.kept != (plan := self.schedule.plan(row.images)):
                raise PruningError(f"sample {row.sample}: {row.kept} tokens were kept, planned were {plan}.")
            if len(row.computed) != (layers := len(self.parts.layers)):
                raise PruningError(f"sample {row.sample}: {len(row.computed)} of {layers} decoder layers ran.")
        if cache is not None and layout.traces:
            held, planned = cached_lengths(cache), layout.traces[0].computed
            if held != planned:
                names = ", ".join(row.sample for row in layout.traces)
                raise PruningError(f"samples {names}: the cache holds {held} tokens, planned were {planned}.")
            self._crop_caches(running)
            for row in layout.traces:
                row.cached = cached_lengths(cache)
        self.trace.rows += layout.traces
        running.before = running.embedded = running.encoder = None
        layout.memory, layout.checks, layout.recycled = {}, [], []

    def _crop_caches(self, running: _Prefill) -> None:
        """Let earlier layers forget what later stages dropped, for methods that are published so (MustDrop)."""
        cropping = [stage.layer for stage in self.schedule.stages if stage.spec.crops_cache and stage.layer]
        final = running.segments[max(cropping)] if cropping else None
        if final is None:
            return
        left = torch.zeros_like(running.present, dtype=torch.int32, device=final.valid.device)
        left = left.scatter_add(1, final.origin.to(left.device), final.valid.int()) > 0
        columns = torch.arange(left.shape[1], device=left.device).expand_as(left)
        present = running.present.to(left.device)
        for layer in range(min(cropping) - 1, max(cropping)):
            segment = running.segments[layer]
            if segment is final:
                continue
            origin, valid = (columns, present) if segment is None else (segment.origin, segment.valid)
            packing = pack(valid.to(left.device) & left.gather(1, origin.to(left.device)), final.host_lengths, "left")
            held = running.cache.layers[layer]
            for name in ("keys", "values"):
                states = getattr(held, name)
                index = packing.index.to(states.device)[:, None, :, None]
                index = index.expand(-1, states.shape[1], -1, states.shape[3])
                setattr(held, name, states.gather(2, index))
            # Positions go on as if nothing had been cut from this layer.
            lengths = present.sum(1) if segment is None else segment.lengths
            kept_origin = gather(origin, packing.index)
            running.segments[layer] = _Segment(
                packing.valid, packing.padded, None, final.rotary, lengths, kept_origin, final.host_lengths
            )

    # -- one layer -------------------------------------------------------------------------------------------------

    def enter_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Before a decoder layer: give it what a stage has left."""
        running = self.running
        if self.asleep:
            return args, kwargs
        if running is None:
            raise PruningError("a decoder layer ran by itself; inside a prune block call the whole model.")
        running.entered += 1
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if self.decoding:
            kwargs = self._swap_step(running.segments[layer], kwargs, hidden)
        else:
            hidden, kwargs = self._swap_prefill(running, layer, hidden, kwargs)
        return (hidden, *args[1:]), kwargs

    def _swap_prefill(self, running: _Prefill, layer: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        segment = running.segments[layer - 1] if layer else None
        rotary = segment.rotary if segment else kwargs["position_embeddings"]
        if layer == 0 and self.embedding:
            running.embedded = hidden
        cache = cache_of(kwargs)
        if running.before is not None and cache is not None:
            # The layer before has just stored them.
            running.before = replace(running.before, keys=layer_keys(cache, layer - 1))
        if layer in self.stages:
            state = LayerInput(layer, hidden, rotary)
            hidden, segment = self._act(running, state, segment, kwargs["position_embeddings"])
        running.segments[layer] = segment
        if segment is not None:
            running.guard.cut = True
            rotary = segment.rotary = _on(hidden.device, *segment.rotary)
            segment.mask = None if segment.mask is None else segment.mask.to(hidden.device)
            # Without position_ids FlashAttention cannot mistake the gaps in kept positions for packed sequences.
            kwargs = {**kwargs, "attention_mask": segment.mask, "position_embeddings": rotary, "position_ids": None}
        running.layout.record_layer(hidden.shape[1])
        running.before = LayerInput(layer, hidden, rotary) if layer in self.recorded else None
        return hidden, kwargs

    @torch.no_grad()
    def _select(
        self, running: _Prefill, state: LayerInput, budget: list[int], original: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Bool[Tensor, "I V"], list[int], Tensor | None]:
        """Ask the method of a stage.

        Returns:
            the batch's hidden states (merged ones written in), the mask, its counts, and how many tokens of each image
            hold something of others now.
        """
        _, stage, method = self.stages[state.layer]
        layout = running.layout
        view = layout.view(
            self.parts,
            state,
            running.before,
            self.seed,
            embedded=running.embedded,
            uncut_rotary=original,
            encoder_run=running.encoder,
            questions=self._questions(layout),
            asked=[n for row in layout.traces for n in stage.asked(row.images)],
            # The view is not in it: as a cycle the two would hold the cache until the collector comes by.
            guide=partial(self._guide, running),
        )
        # An image that keeps all its tokens is left alone, unless the method itself decides how many that is.
        left_alone = [stage.keep != ADAPTIVE and kept == n for kept, n in zip(budget, layout.counts, strict=True)]
        # In the others something is chosen, unless all goes. One copy to the device for both.
        chosen_from = [n > 0 and not alone for n, alone in zip(budget, left_alone, strict=True)]
        full, matters = torch.tensor([left_alone, chosen_from], device=view.valid.device)
        chosen = method.select(view, torch.tensor(budget)) if any(budget) else torch.zeros_like(view.valid)
        keep = torch.where(full[:, None], view.valid, chosen)
        if stage.at_most:
            budget = keep.sum(1).tolist()
        hidden, recycled = state.hidden, None
        if stage.spec.rewrites and any(budget):
            rewritten, index = method.rewrite(view, keep)
            rewritten = torch.where(full[:, None, None], view.hidden, rewritten.to(view.hidden.dtype))
            index = torch.where(full[:, None], view.index, index)
            recycled = (keep & ((rewritten != view.hidden).any(-1) | (index != view.index))).sum(1)
            hidden = layout.write(hidden, rewritten, index)
        if any(chosen_from):
            self._check_numbers(layout, view, matters)
        return hidden, keep, budget, recycled

    def _check_numbers(self, layout: Layout, view: TokenView, matters: Bool[Tensor, " I"]) -> None:
        """Have it looked at, with the prefill's other checks, that a stage chose by numbers, in the images that it cuts."""
        number, stage, _ = self.stages[view.layer]
        checks = [("hidden states that enter it", (view.hidden.isfinite().all(-1) | ~view.valid).all(1))]
        if "encoder" in vars(view):
            checks.insert(0, ("encoder features that it reads", view.encoder.finite()))
        checks += [(f"scores of {stage.method}", finite) for finite in view.finite_scores]
        for what, finite in checks:
            problem = (
                f"in stage {number + 1} ('{stage}') the {what} are not all finite, so that its choice means nothing"
            )
            layout.check(f"{problem}; do they overflow the dtype?", finite.to(matters.device) | ~matters)

    def _act(
        self, running: _Prefill, state: LayerInput, segment: _Segment | None, original: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, _Segment | None]:
        """Cut the sequence at a stage; returns the hidden states that go on and what its layers are given."""
        stage, layout, hidden = self.stages[state.layer][1], running.layout, state.hidden
        budget = layout.planned(stage)
        if budget == layout.counts and (stage.keep != ADAPTIVE or not any(budget)):
            layout.record_all()
            return hidden, segment
        self.encoder.paused = True
        counter = ProductCounter()
        try:
            with counter if self.count_selection else nullcontext():
                hidden, keep, budget, recycled = self._select(running, state, budget, original)
        finally:
            self.encoder.paused = False
        if self.count_selection:
            layout.add_selection(counter.flops)
        packing = layout.cut(keep, budget, recycled)
        hidden = gather(hidden, packing.index)
        lengths = packing.valid.sum(1)
        rotary = self._cut_rotary(hidden, original, layout, packing)
        mask = attention_mask(packing.valid, hidden.shape[1], packing.padded, self.parts.form, hidden.dtype)
        segment = _Segment(packing.valid, packing.padded, mask, rotary, lengths, layout.origin, list(layout.lengths))
        return hidden, segment

    def _cut_rotary(
        self, hidden: Tensor, original: tuple[Tensor, Tensor], layout: Layout, packing: Packing
    ) -> tuple[Tensor, Tensor]:
        """Rotary tables after a cut: of the tokens' own positions, or of new ones."""
        if self.positions == "compact":
            return self.parts.rotary(hidden, (packing.valid.cumsum(1) - 1).clamp(min=0))
        cos, sin = original
        return gather_rotary(cos, layout.origin), gather_rotary(sin, layout.origin)

    def _questions(self, layout: Layout) -> list[str] | None:
        """The question of each image's row."""
        if self.questions is None:
            return None
        repeats, rest = divmod(len(layout.traces), len(self.questions) or 1)
        if not self.questions or rest:
            raise PruningError(f"{len(self.questions)} questions were given for a batch of {len(layout.traces)} rows.")
        return [self.questions[row // repeats] for row in layout.owning_rows]

    def _guide(
        self, running: _Prefill, encoder: Encoder, checkpoint: str, new_tokens: int, last_visual: bool
    ) -> list[Tensor]:
        """What a guide model's answer to this batch looks at; it is asked once a prefill."""
        asked = (checkpoint, new_tokens, last_visual)
        if asked not in running.guided:
            ids = running.ids
            # generate() hands on no mask where nothing is padded, but would miss it here.
            inputs = {"input_ids": ids, "attention_mask": running.present.to(ids), **encoder.inputs()}
            inputs |= self.parts.family.extra_inputs(self.parts.config, ids)
            self.asleep = True
            try:
                running.guided[asked] = answer_attention(self._guide_model(checkpoint), inputs, new_tokens, last_visual)
            finally:
                self.asleep = False
        return running.guided[asked]

    def _guide_model(self, checkpoint: str) -> Any:
        if checkpoint != "self":
            weight = self.parts.decoder.norm.weight
            guide = load_guide(checkpoint, weight.device, weight.dtype)
            check_guide(self.model, guide, checkpoint)
            return guide
        if not hasattr(self.model, "generate"):
            raise UnsupportedModelError("guide=self needs a model that can generate; give prune() the whole model.")
        return self.model

    # -- decode ----------------------------------------------------------------------------------------------------

    def _step_segment(self, segment: _Segment, step: int) -> None:
        """Prepare what the segment's layers are given at this decode step."""
        valid = torch.nn.functional.pad(segment.valid, (0, step), value=True)
        dtype = segment.rotary[0].dtype
        segment.decode_mask = attention_mask(valid, 1, segment.padded, self.parts.form, dtype)
        if self.positions == "compact":
            position = segment.lengths[:, None] + (step - 1)
            segment.decode_rotary = self.parts.rotary(segment.rotary[0], position)

    def _swap_step(self, segment: _Segment | None, kwargs: dict, hidden: Tensor) -> dict:
        if segment is None:
            return kwargs
        if segment.decode_mask is not None:
            segment.decode_mask = segment.decode_mask.to(hidden.device)
        kwargs = {**kwargs, "attention_mask": segment.decode_mask, "position_ids": None}
        if segment.decode_rotary is not None:
            kwargs["position_embeddings"] = segment.decode_rotary = _on(hidden.device, *segment.decode_rotary)
        return kwargs


def _next_position(positions: Tensor | None, present: Bool[Tensor, "B L"]) -> Int[Tensor, "#B 1"]:
    """The position after a prompt: the largest of all its tokens, and with M-RoPE of all channels, and 1 more.

    Args:
        positions: (B or 1, L), (3, B or 1, L), or (4, B or 1, L) with the columns' numbers first; None where columns are positions.
        present: which columns hold a token.
    """
    if positions is None:
        return torch.full((1, 1), present.shape[1], device=present.device)
    if positions.dim() == 3:
        positions = positions[-3:].amax(0)
    return torch.where(present, positions, 0).amax(1, keepdim=True) + 1


def _on(device: torch.device, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return cos.to(device), sin.to(device)
