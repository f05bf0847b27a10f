"""Observation of one generation under `prune`: the inputs of every layer and the outputs of the methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lmms_prune.certificate.prompts import PromptRow, answer, batch
from lmms_prune.certificate.reference import Tables
from lmms_prune.compat.transformers import cached_lengths, filled_cache, with_cache
from lmms_prune.methods.base import Method
from lmms_prune.methods.view import TokenView
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.trace import Trace
from lmms_prune.schedule import ADAPTIVE, Schedule


@dataclass(frozen=True)
class Rewritten:
    """The tokens that a method wrote for one row of its view, in sequence order.

    Args:
        row: the row of the batch.
        entries: which of the tokens that were present they replace.
        index: raster indices of the n tokens.
        states: their hidden states, and behind them what the decoder will still add to them.
    """

    row: int
    entries: list[int]
    index: list[int]
    states: Float[Tensor, "n E"]


@dataclass
class Observed:
    """One generation of S tokens for B rows.

    Args:
        trace: the trace that `prune` recorded.
        logits: logits of each of the S tokens before any logits processor.
        cached: length of each layer's cache, without the generated tokens.
        entering: hidden states before each stage acts, by its layer.
        received: hidden states that the stage's layer receives after the stage acted, by layer.
        lengths: sequence length that each layer receives in the prefill.
        tables: for the prompt and each step, the rotary tables that each layer receives.
        rewritten: by layer of each stage that rewrites, the new tokens of each row of its view; None for one that keeps all
            its tokens.
    """

    trace: Trace
    logits: Float[Tensor, "B S vocabulary"] = field(default_factory=lambda: torch.empty(0, 0, 0))
    cached: list[int] = field(default_factory=list)
    entering: dict[int, Tensor] = field(default_factory=dict)
    received: dict[int, Tensor] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)
    tables: list[list[Tables]] = field(default_factory=list)
    rewritten: dict[int, list[Rewritten | None]] = field(default_factory=dict)


class Forced(LogitsProcessor):
    """A logits processor that forces every row to generate `tokens`.

    Args:
        tokens: the forced ids.
        prompt: length of the padded prompt.
    """

    def __init__(self, tokens: Int[Tensor, "B S"], prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        return torch.full_like(scores, -torch.inf).scatter(1, self.tokens[:, step : step + 1].to(scores.device), 0.0)


def generate(model: Any, rows: Sequence[PromptRow], steps: int) -> tuple[Tensor, Any]:
    """Generate `steps` forced tokens with the model's own ``generate``.

    Returns:
        logits (B, S, vocabulary) and the filled cache.
    """
    inputs = batch(model, rows)
    tokens = torch.stack([answer(model, row, steps) for row in rows])
    # A checkpoint's own generation settings cannot change forced tokens; switching them off saves time.
    plain = dict.fromkeys(
        ("suppress_tokens", "begin_suppress_tokens", "sequence_bias", "temperature", "top_p", "top_k")
    )
    output = model.generate(
        **inputs,
        **plain,
        do_sample=False,
        num_beams=1,
        max_new_tokens=steps,
        pad_token_id=0,
        exponential_decay_length_penalty=None,
        repetition_penalty=1.0,
        logits_processor=LogitsProcessorList([Forced(tokens, inputs["input_ids"].shape[1])]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    return torch.stack(output.logits, dim=1).float(), filled_cache(output)


def observe(model: Any, rows: Sequence[PromptRow], schedule: Schedule, positions: str, steps: int) -> Observed:
    """Generate `steps` forced tokens under a schedule and record what the layers receive.

    Args:
        model: a loaded model without hooks.
        rows: the prompts of the batch.
        schedule: the schedule to prune with.
        positions: the position policy.
        steps: number of tokens to generate.
    """
    parts = ModelParts.of(model)
    with ExitStack() as stack:
        observer = _Observer(parts, [stage.layer for stage in schedule.stages])
        # Hooks run in the order of registration: these run before the hooks of `prune`, the others after them.
        stack.enter_context(observer.before())
        rewrites = stack.enter_context(_recorded_rewrites(schedule))
        names, questions = [row.name for row in rows], [_question(row) for row in rows]
        trace = stack.enter_context(prune(model, schedule, positions=positions, samples=names, questions=questions))
        stack.enter_context(observer.after())
        observer.seen.trace, observer.seen.rewritten = trace, rewrites
        with torch.inference_mode():
            observer.seen.logits, cache = generate(model, rows, steps)
    # The last generated token never enters the cache.
    observer.seen.cached = [length - (steps - 1) for length in cached_lengths(cache)]
    return observer.seen


def bare_loop(
    model: Any, row: PromptRow, schedule: Schedule, positions: str, steps: int
) -> Float[Tensor, "S vocabulary"]:
    """Return the logits of forced tokens from a hand-written loop.

    The loop passes only the cache from step to step, neither positions nor an attention mask.
    """
    tokens, logits = answer(model, row, steps), []
    pruned = prune(model, schedule, positions=positions, samples=[row.name], questions=[_question(row)])
    with torch.inference_mode(), pruned:
        output = model(**batch(model, (row,)), use_cache=True, logits_to_keep=1)
        for token in tokens:
            logits.append(output.logits[0, -1].float())
            step = token.view(1, 1).to(output.logits.device)
            output = model(input_ids=step, use_cache=True, **with_cache(model, filled_cache(output)))
    return torch.stack(logits)


def _question(row: PromptRow) -> str:
    return f"what is in picture {row.name}"


class _Observer:
    """Hooks around those of `prune`. Nested forwards, which some methods run for guidance, are not recorded.

    Args:
        parts: parts of the model.
        stages: layers of the schedule's stages.
    """

    def __init__(self, parts: ModelParts, stages: Sequence[int]):
        self.parts, self.stages, self.depth = parts, stages, 0
        self.seen = Observed(Trace(Schedule()))

    @contextmanager
    def before(self) -> Iterator[None]:
        """Hook the stages' layers to record their inputs before the stage acts."""
        layers = [(layer, self.parts.layers[layer]) for layer in self.stages]
        with hooked([module.register_forward_pre_hook(self._enters(n), with_kwargs=True) for n, module in layers]):
            yield

    @contextmanager
    def after(self) -> Iterator[None]:
        """Hook the model and all layers to record what the layers receive."""
        handles = [
            self.parts.multimodal.register_forward_pre_hook(self._begins),
            self.parts.multimodal.register_forward_hook(self._ends),
        ]
        for layer, module in enumerate(self.parts.layers):
            handles.append(module.register_forward_pre_hook(self._receives(layer), with_kwargs=True))
        with hooked(handles):
            yield

    def _begins(self, *_: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            self.seen.tables.append([])

    def _ends(self, *_: Any) -> None:
        self.depth -= 1

    def _enters(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            # Only the prefill: the first forward of the model that is not nested.
            if self.depth == 1 and len(self.seen.tables) == 1:
                self.seen.entering[layer] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _receives(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            if self.depth != 1:
                return
            self.seen.tables[-1].append(kwargs["position_embeddings"])
            if len(self.seen.tables) == 1:
                self.seen.lengths.append(args[0].shape[1])
                if layer in self.stages:
                    self.seen.received[layer] = args[0]

        return hook


def entries_of(mask: Bool[Tensor, " V"]) -> list[int]:
    """The entries that a mask sets."""
    return mask.nonzero().flatten().tolist()


@contextmanager
def _recorded_rewrites(schedule: Schedule) -> Iterator[dict[int, list[Rewritten | None]]]:
    """Record the results of all `Method.rewrite` calls inside the context, by the layer of the stage."""
    rewrites: dict[int, list[Rewritten | None]] = {}
    rewriting = [stage for stage in schedule.stages if stage.spec.rewrites]
    adaptive = {stage.layer for stage in rewriting if stage.keep == ADAPTIVE}
    method_classes: set[Any] = {type(stage.spec.build(dict(stage.options))) for stage in rewriting}

    def spy(original: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
        def rewrite(self: Method, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Tensor, Tensor]:
            hidden, index = original(self, view, keep)
            rewrites[view.layer] = [
                # A keep-all image is not rewritten, unless the method itself has decided to keep all.
                None
                if int(mask.sum()) == n and view.layer not in adaptive
                else Rewritten(row, entries_of(mask), index[i][mask].tolist(), hidden[i][mask])
                for i, (mask, n, row) in enumerate(zip(keep, view.counts, view.rows.tolist(), strict=True))
            ]
            return hidden, index

        return rewrite

    originals = {method: method.rewrite for method in method_classes}
    try:
        for method, original in originals.items():
            method.rewrite = spy(original)
        yield rewrites
    finally:
        for method, original in originals.items():
            method.rewrite = original
