"""One prompt batch: its prefill, in which the stages act, and its decode steps.

Dimension letters: B rows, L sequence, I images of the batch, V visual tokens of an image, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from lmms_prune.compat.transformers import cache_of, cached_lengths, filled_cache, layer_keys
from lmms_prune.errors import PruningError
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import LayerInput, TokenView
from lmms_prune.models.encoder import EncoderRecorder, EncoderRun
from lmms_prune.models.tensors import is_finite, to_device
from lmms_prune.pruning.block import Acting, Block
from lmms_prune.pruning.cropping import crop_caches
from lmms_prune.pruning.decode import next_position
from lmms_prune.pruning.division import Division
from lmms_prune.pruning.flops import SelectionFlops
from lmms_prune.pruning.guards import CacheGuard
from lmms_prune.pruning.layout import Layout
from lmms_prune.pruning.ragged import Packing, attention_mask, gather_rotary
from lmms_prune.pruning.returned import checked_mask, checked_rewrite, marked_padding, miscounted, reading
from lmms_prune.pruning.segment import Rotary, Segment
from lmms_prune.pruning.trace import PrefillTrace, RowTrace
from lmms_prune.schedule import ADAPTIVE

Selected = tuple[Tensor, Bool[Tensor, "I V"], list[int], Tensor | None]
"""What a stage has selected; see `Prefill._select`."""


class Prefill:
    """One prompt batch in the decoder: its prefill and its decode steps.

    Args:
        block: the settings of the `prune` block.
        inputs: the multimodal module's arguments.
        cache: the cache that it fills; None if the decoder makes its own, or none.
        positions: ``position_ids`` of the decoder, if it was called with them.
        recorder: of the vision encoder; its run is taken over.
        guard: of the cache.
    """

    def __init__(
        self,
        block: Block,
        inputs: dict[str, Any],
        cache: Any,
        positions: Tensor | None,
        recorder: EncoderRecorder,
        guard: CacheGuard,
    ):
        self.block, self.recorder, self.cache, self.guard = block, recorder, cache, guard
        if cache is not None:
            self.guard.watch(cache)
        block.guide.forget()
        self.encoder_run: EncoderRun | None = recorder.run
        recorder.run = None
        self.ids: Tensor = inputs["input_ids"]
        # generate() passes the images' grids to the vision encoder alone.
        encoded = self.encoder_run.grids if self.encoder_run else None
        self.layout = Layout.of(block.parts, inputs, block.samples, encoded)
        self.record = PrefillTrace(self.layout.traces)
        layers = len(block.parts.layers)
        for row in self.layout.traces:
            block.schedule.check(layers, row.images)
        self._refuse_dropped_ends()
        self.original = self.layout.copy()
        self.present = self.layout.present
        self.padded = min(self.layout.lengths, default=0) < self.ids.shape[1]
        self.positions, self.next_position = positions, next_position(positions, self.present)
        self.segments: list[Segment | None] = [None] * layers
        self.between: Sequence[Tensor] = ()
        self.embedded: Tensor | None = None
        self.before: LayerInput | None = None

    def _refuse_dropped_ends(self) -> None:
        """Refuse to drop the last token of a prompt, because its logits are the prompt's."""
        stages, plan = self.block.schedule.stages, self.block.schedule.plan
        dropped = [
            row.sample
            for row, ends in zip(self.layout.traces, self.layout.ends_in_image, strict=True)
            if ends
            and (any(s.keep == ADAPTIVE for s in stages) or plan(row.images, row.tiles)[-1][-1] < row.images[-1])
        ]
        if dropped:
            raise PruningError(
                f"sample {', '.join(dropped)}: the prompt ends in an image, whose last token answers it and may be "
                "dropped; end the prompt with text (a chat template does), or keep all tokens."
            )

    # -- one layer of the prefill ----------------------------------------------------------------------------------

    def enter(self, layer: int, hidden: Tensor, kwargs: dict) -> tuple[Tensor, dict]:
        """Before a decoder layer: let its stage act, and return the layer's input and arguments for the kept tokens."""
        segment = self.segments[layer - 1] if layer else None
        original: Rotary = kwargs["position_embeddings"]
        state = LayerInput(layer, hidden, segment.rotary if segment else original)
        if layer == 0 and self.block.reads_embeddings:
            self.embedded = hidden
        cache = cache_of(kwargs)
        if self.before is not None and cache is not None:
            # The layer before has just stored its keys, so they need not be recomputed.
            self.before = replace(self.before, keys=layer_keys(cache, layer - 1))
        if acting := self.block.stages.get(layer):
            hidden, segment = self._act(acting, state, segment, original)
        self.segments[layer] = segment
        if segment is not None:
            self.guard.pruned = True
            kwargs = {**kwargs, **segment.prefill_arguments(hidden.device)}
        self.record.layer(self.layout.visual_counts, hidden.shape[1])
        rotary = segment.rotary if segment else original
        self.before = LayerInput(layer, hidden, rotary) if self.block.reads_before(layer) else None
        return hidden, kwargs

    def leave(self, layer: int, hidden: Tensor) -> Tensor:
        """After a decoder layer: its output, plus the tensors that the family adds between layers."""
        return self.layout.add(hidden, self.between[layer]) if layer < len(self.between) else hidden

    def _act(
        self, acting: Acting, state: LayerInput, segment: Segment | None, original: Rotary
    ) -> tuple[Tensor, Segment | None]:
        """Prune at a stage; returns the kept hidden states and the segment of the following layers."""
        stage, layout = acting.stage, self.layout
        layout.follow(state.hidden.device)
        division = layout.divided(acting.kind)
        budget = layout.planned(stage, division)
        if budget == division.counts and (stage.keep != ADAPTIVE or not any(budget)):
            self.record.stage(layout.index, layout.visual.valid, layout.counts)
            return state.hidden, segment
        self.recorder.paused = True
        try:
            (hidden, keep, budget, recycled), flops = self._counted(acting, state, division, budget, original)
        finally:
            self.recorder.paused = False
        if flops is not None:
            self.record.selection(flops)
        packing = layout.prune(keep, division.host_sums(budget))
        layout.plan_regions(division, budget)
        following = self.block.following(stage.layer)
        if following is not None and not stage.at_most:
            # Here rather than there, where the stage may have to wait for its own count.
            layout.count_regions(following.kind)
        self.record.stage(layout.index, layout.visual.valid, layout.counts, recycled)
        hidden = gather(hidden, packing.index)
        rotary = self._kept_rotary(hidden, original, packing)
        form = self.block.parts.form
        mask = attention_mask(packing.valid, hidden.shape[1], packing.padded, form, hidden.dtype)
        lengths = packing.valid.sum(1)
        return hidden, Segment(
            packing.valid, packing.padded, mask, rotary, lengths, layout.origin, list(layout.lengths)
        )

    def _kept_rotary(self, hidden: Tensor, original: Rotary, packing: Packing) -> Rotary:
        """Rotary tables after a stage: of the original positions, or of new ones (compact)."""
        if self.block.positions == "compact":
            return self.block.parts.rotary(hidden, (packing.valid.cumsum(1) - 1).clamp(min=0))
        cos, sin = original
        return gather_rotary(cos, self.layout.origin), gather_rotary(sin, self.layout.origin)

    # -- one stage -------------------------------------------------------------------------------------------------

    def _counted(
        self, acting: Acting, state: LayerInput, division: Division, budget: list[int], original: Rotary
    ) -> tuple[Selected, int | None]:
        """The result of `_select`, and its FLOPs if they are asked for."""
        block, layout = self.block, self.layout
        select = partial(self._select, acting, state, division, budget, original)
        if not block.count_selection:
            return select(), None
        # All that decides the selection's shapes, with the stages before it, whose results it may reuse.
        host = (division.sizes, division.counts, budget, layout.lengths, layout.owning_rows, division.grids)
        run = self.encoder_run.shapes() if self.encoder_run else ()
        shapes = (
            str(block.schedule),
            type(acting.method),
            acting.number,
            state.hidden.shape,
            layout.text.valid.shape,
            repr(host),
            run,
        )
        return SelectionFlops.of(block.model).run(select, acting.stage.spec, shapes)

    @torch.no_grad()
    def _select(
        self, acting: Acting, state: LayerInput, division: Division, budget: list[int], original: Rotary
    ) -> Selected:
        """Let the method of a stage select tokens and rewrite them.

        Returns:
            the batch's hidden states (rewritten ones included), the mask over the images' tokens, its counts in each row
            of the division, and how many tokens of each image the method has changed (merged, recycled or encoded anew).
        """
        stage, method, layout = acting.stage, acting.method, self.layout
        view = self._view(acting, state, division, original)
        # An image that keeps all its tokens is not changed, unless the keep is adaptive.
        keeps_all = [stage.keep != ADAPTIVE and kept == n for kept, n in zip(budget, division.counts, strict=True)]
        # In the other images the method chooses, unless all tokens are dropped. One copy to the device for both lists.
        chosen_from = [n > 0 and not unchanged for n, unchanged in zip(budget, keeps_all, strict=True)]
        planned, full, matters = to_device([budget, keeps_all, chosen_from], view.valid.device, torch.long)
        full, matters = full.bool(), matters.bool()
        chosen = torch.zeros_like(view.valid)
        if any(budget):
            with reading(acting, view):
                chosen = checked_mask(method.select(view, torch.tensor(budget)), view)
        keep = torch.where(full[:, None], view.valid, chosen)
        if stage.at_most:
            budget = keep.sum(1).tolist()
        hidden, recycled = state.hidden, None
        if stage.spec.rewrites and any(budget):
            with reading(acting, view):
                rewritten, index = checked_rewrite(method.rewrite(view, keep), view)
            index = torch.where(full[:, None], view.index, index)
            rewritten = self._with_additions(acting, view, division, rewritten, index, keep, full)
            rewritten = torch.where(full[:, None, None], view.hidden, rewritten.to(view.hidden.dtype))
            recycled = division.sums((keep & ((rewritten != view.hidden).any(-1) | (index != view.index))).sum(1))
            hidden = layout.write(hidden, division, rewritten, index)
        if any(chosen_from):
            self._check_numbers(acting, view, division, matters)
        if not stage.at_most:
            # After the numbers: of what is not finite, a search may pick too few.
            counted = partial(miscounted, acting, keep, planned)
            self.record.check(counted, division.all_of(keep.sum(1) == planned))
        absent = partial(marked_padding, acting, keep, view)
        self.record.check(absent, division.all_of((keep <= view.valid).all(1)))
        return hidden, division.kept(keep, layout.visual.valid), budget, recycled

    def _with_additions(
        self,
        acting: Acting,
        view: TokenView,
        division: Division,
        rewritten: Tensor,
        index: Tensor,
        keep: Bool[Tensor, "U N"],
        full: Bool[Tensor, " U"],
    ) -> Tensor:
        """The rewritten states; what the decoder will still add to rewritten tokens is replaced by what came with them.

        Raises:
            PruningError: nothing, or something of another size, came with them.
        """
        if not view.additions.shape[2] or rewritten is view.hidden:
            return rewritten
        width, layer = view.hidden.shape[2], view.layer
        if rewritten.shape[2] != width + view.additions.shape[2]:
            raise PruningError(
                f"stage '{acting.stage}' rewrites tokens to which {self.block.parts.family.title} still adds encoder features "
                f"between its layers, but not these features. Let it act at layer {len(self.between)} or deeper, or let the "
                "method return `view.with_additions(…)` of what it merges."
            )
        additions = torch.where(full[:, None, None], view.additions, rewritten[..., width:].to(view.hidden.dtype))
        changed = self.layout.with_rows(self.between[layer:], division, additions, index, keep)
        self.between = [*self.between[:layer], *changed]
        return rewritten[..., :width]

    def _view(self, acting: Acting, state: LayerInput, division: Division, original: Rotary) -> TokenView:
        """The view for the method of a stage."""
        block, layout = self.block, self.layout
        # The view is not among the guide's arguments: a reference cycle would hold the cache until the collector runs.
        answer = partial(block.guide.answer, self.ids, self.original)
        return layout.view(
            block.parts,
            state,
            self.before,
            block.seed,
            division,
            _additions=layout.of_tokens(division, self.between[state.layer :]) if acting.stage.spec.rewrites else (),
            _embedded=self.embedded,
            _unpruned_rotary=original,
            _position_ids=self.positions,
            _encoder_run=self.encoder_run,
            _questions=self._questions(division),
            requested=layout.requested(acting.stage, division),
            _guide=lambda *arguments: division.of_raster(answer(*arguments)),
        )

    def _questions(self, division: Division) -> list[str] | None:
        """The question of the row of each image of a view."""
        questions, rows = self.block.questions, len(self.layout.traces)
        if questions is None:
            return None
        repeats, rest = divmod(rows, len(questions) or 1)
        if not questions or rest:
            raise PruningError(f"{len(questions)} questions were given for a batch of {rows} rows.")
        owning = self.layout.owning_rows
        return [questions[owning[image] // repeats] for image in division.owner]

    def _check_numbers(self, acting: Acting, view: TokenView, division: Division, matters: Bool[Tensor, " U"]) -> None:
        """Register checks that a stage chose by finite numbers, in the images that it prunes; they run after the prefill."""
        stage = acting.stage
        checks = [("hidden states that enter it", (is_finite(view.hidden).all(-1) | ~view.valid).all(1))]
        if "encoder" in vars(view):
            checks.insert(0, ("encoder features that it reads", view.encoder.finite()))
        checks += [(f"scores of {stage.method}", finite) for finite in view.finite_scores]
        for what, finite in checks:
            self.record.check(
                f"in stage {acting.number + 1} ('{stage}') the {what} are not all finite, so its choice is "
                "meaningless; do they overflow the dtype?",
                division.all_of(finite.to(matters.device) | ~matters),
            )

    # -- after the last layer --------------------------------------------------------------------------------------

    def finish(self, output: Any) -> list[RowTrace]:
        """Verify after the prefill that the executed pruning equals the plan, down to the lengths of the cache's tensors.

        Returns:
            the trace of each row.

        Raises:
            PruningError: the executed pruning differs from the plan; names the samples.
        """
        if self.cache is None and (cache := filled_cache(output)) is not None:
            # Without a cache from the caller the decoder makes one.
            self.guard.watch(cache)
            self.cache = cache
        rows = self.record.rows
        self.record.finish()
        self._verify_plan(rows)
        if self.cache is not None and rows:
            self._verify_cache(rows)
            crop_caches(self.block.schedule, self.cache, self.segments, self.present)
            for row in rows:
                row.cached = cached_lengths(self.cache)
        for segment in self.segments:
            if segment is not None:
                segment.mask = None  # rows x columns of the sequence, which no decode step needs
        self.before = self.embedded = self.encoder_run = None
        self.between = ()
        self.layout.memories.clear()
        return rows

    def _verify_plan(self, rows: list[RowTrace]) -> None:
        # Errors, not asserts: these checks protect published numbers, so they must also run under python -O.
        schedule, layers = self.block.schedule, len(self.block.parts.layers)
        for row in rows:
            if not schedule.at_most and row.kept != (plan := schedule.plan(row.images, row.tiles)):
                raise PruningError(f"sample {row.sample}: {row.kept} tokens were kept, planned were {plan}.")
            if len(row.computed) != layers:
                raise PruningError(f"sample {row.sample}: {len(row.computed)} of {layers} decoder layers ran.")

    def _verify_cache(self, rows: list[RowTrace]) -> None:
        cached, planned = cached_lengths(self.cache), rows[0].computed
        if cached != planned:
            names = ", ".join(row.sample for row in rows)
            raise PruningError(f"samples {names}: the cache holds {cached} tokens, planned were {planned}.")
