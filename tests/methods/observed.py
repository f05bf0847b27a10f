"""Shared by these tests: tiny models, random prompts, states of an unpruned model, hand-made views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from built import BUILDERS, UNLIKE
from torch import Tensor

from lmms_prune import Trace, prune
from lmms_prune.certificate.tiny import LAYERS, Tiny
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.view import LayerInput, Tokens, TokenView

__all__ = ["LAYERS", "Tiny"]
FAMILIES, EVERY = UNLIKE, tuple(BUILDERS)


@dataclass
class ImageSpan:
    """The columns of one image in its row, counted without padding."""

    row: int
    pad: int
    length: int
    visual: list[int]
    text: list[int]


def image_spans(input_ids: Tensor, attention_mask: Tensor, image_token: int) -> list[ImageSpan]:
    """All images of a batch in order; each run of image tokens is one image, as the prompts here have text between."""
    found = []
    for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
        pad = mask.index(1)
        ids = ids[pad:]
        column = 0
        while column < len(ids):
            if ids[column] != image_token:
                column += 1
                continue
            start = column
            while ids[column] == image_token:
                column += 1
            text = [i for i in range(column, len(ids)) if ids[i] != image_token]
            found.append(ImageSpan(row, pad, len(ids), list(range(start, column)), text))
    return found


@dataclass
class Observed:
    """The states of an unpruned model for a batch, from hooks of the tests and the library's outputs."""

    inputs: dict[str, Tensor]
    spans: list[ImageSpan]
    hidden: list[Tensor]
    keys: list[Tensor]
    last_rows: list[Tensor]
    norm_weight: list[float]
    norm_eps: float
    encoder_view: TokenView | None = None

    def states(self, span: ImageSpan, layer: int) -> list[list[float]]:
        """Hidden states entering `layer`, padding left out."""
        return self.hidden[layer][span.row, span.pad :].tolist()

    def key_rows(self, span: ImageSpan, layer: int) -> list[list[float]]:
        """Rotated keys of `layer`, its KV heads side by side."""
        return self.keys[layer][span.row].transpose(0, 1).flatten(1)[span.pad :].tolist()

    def attention(self, span: ImageSpan, layer: int) -> list[list[list[float]]]:
        """The last query's softmax of eager attention, as [head][the one query][key]."""
        return self.last_rows[layer][span.row, :, None, span.pad :].tolist()


def image_count(batches: Sequence[Observed]) -> int:
    """How many images these batches hold."""
    return sum(len(seen.spans) for seen in batches)


def observe(tiny: Tiny, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Observed:
    """Run the unpruned model: hidden states from pre-hooks, keys from the cache, attentions from an eager copy."""
    model = tiny.model(dtype)
    decoder = model.model.language_model
    hidden: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: hidden.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        for layer in decoder.layers
    ]
    try:
        with torch.no_grad():
            cache = filled_cache(model(**inputs, use_cache=True, logits_to_keep=1))
    finally:
        for handle in handles:
            handle.remove()
    attentions = eager_attentions(tiny, inputs, dtype)
    spans = image_spans(inputs["input_ids"], inputs["attention_mask"], model.config.image_token_id)
    return Observed(
        inputs,
        spans,
        hidden,
        [layer.keys for layer in cache.layers],
        [attention[:, :, -1].clone() for attention in attentions],
        decoder.norm.weight.tolist(),
        decoder.norm.variance_epsilon,
    )


def eager_attentions(tiny: Tiny, inputs: dict[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The softmax of every layer (B, H, L, L), with a mask of our own.

    The library's eager mask holds the lowest float64, which its float32 softmax turns to -inf: the padding's empty rows
    become NaN, and spread.
    """
    model = tiny.model(dtype, "eager")
    real = inputs["attention_mask"].bool()
    allowed = real[:, None, None, :] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, -1e30)
    arguments = {**inputs, "attention_mask": mask}
    if tiny.family == "qwen2_5_vl":
        arguments["position_ids"] = rope_ids(tiny, inputs)
    with torch.no_grad():
        return list(model(**arguments, output_attentions=True, logits_to_keep=1).attentions)


def rope_ids(tiny: Tiny, inputs: dict[str, Tensor]) -> Tensor:
    """Qwen's position ids (3, B, L), computed by the library."""
    names = ("input_ids", "attention_mask", "image_grid_thw", "mm_token_type_ids")
    return tiny.model().model.get_rope_index(**{name: inputs[name] for name in names if name in inputs})[0]


def run_to(tiny: Tiny, inputs: dict[str, Tensor], schedule: str, layer: int) -> tuple[Trace, Tensor]:
    """The trace, and what enters `layer` after its stage has acted."""
    entering: list[Tensor] = []
    model = tiny.model()
    with torch.no_grad(), prune(model, schedule) as trace:
        module = model.model.language_model.layers[layer]
        handle = module.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        try:
            model(**inputs)
        finally:
            handle.remove()
    return trace, entering[0]


class HandView(TokenView):
    """A view of hand-made tensors: one system token, then V visual tokens, then text, for each image.

    `hidden` (B, L, D) enters the layer, `keys` (B, L, K) are those of the layer before, and the final norm leaves
    directions alone. `queries` attend to the keys as to one KV head, unscaled: (B, H, 1, K) those of the last token,
    or (B, H, L, K) those of every column. `embedded` (B, L, D) enters layer 0, by default the same as `hidden`. `encoder`
    stands for the vision encoder: any object with the signals that the method reads. Grids default to one row.
    """

    def __init__(
        self,
        hidden: Tensor,
        visual: int | Sequence[int],
        keys: Tensor | None = None,
        queries: Tensor | None = None,
        seeds: Sequence[str] | None = None,
        embedded: Tensor | None = None,
        encoder: Any = None,
        grids: Sequence[tuple[int, int]] | None = None,
        layer: int = 1,
    ):
        rows, length = hidden.shape[:2]
        counts = [visual] * rows if isinstance(visual, int) else list(visual)
        columns = torch.arange(max(counts))
        valid = columns < torch.tensor(counts)[:, None]
        after = torch.arange(1 + max(counts), length).expand(rows, -1)
        # In the tables, columns instead of cosines: so the queries of any columns can be looked up.
        rotary = (torch.arange(length).view(1, length, 1).expand(1, length, 2), torch.zeros(1, length, 2))
        self.layer, self.rows, self.counts, self.sizes = layer, torch.arange(rows), counts, counts
        self._owning_rows = list(range(rows))
        self.visual = Tokens(torch.where(valid, 1 + columns, 0), valid)
        self.text = Tokens(after, torch.ones_like(after, dtype=torch.bool))
        self.index = columns.expand(rows, -1)
        self.seeds = seeds or [f"image {row}" for row in range(rows)]
        self._parts = SimpleNamespace(
            final_norm=lambda x: x / x.square().mean(-1, keepdim=True).add(1e-12).sqrt(),
            keys=lambda layer, hidden, rotary: keys[:, None],
            queries=lambda layer, hidden, rotary: (
                queries
                if queries.shape[2] == 1
                else torch.stack([q[:, c[:, 0].long()] for q, c in zip(queries, rotary[0], strict=True)])
            ),
            decoder=SimpleNamespace(config=SimpleNamespace(num_attention_heads=1)),
            layers=[SimpleNamespace(self_attn=SimpleNamespace(scaling=1.0))] * (layer + 1),
        )
        self._state = LayerInput(layer, hidden, rotary)
        self._before = LayerInput(layer - 1, hidden, rotary)
        self._embedded = hidden if embedded is None else embedded
        self._origin = torch.arange(length).expand(rows, -1)
        self._columns = (1 + columns).expand(rows, -1)
        self._grid_list = list(grids) if grids else [(1, count) for count in counts]
        self._questions, self._guide, self._encoder_run, self.requested = None, None, None, None
        if encoder is not None:
            self.__dict__["encoder"] = encoder
        self._present = torch.ones(rows, length, dtype=torch.bool)
        self.memory, self.carry = Memory(), None


def angles(*degrees: float, length: float | Sequence[float] = 1.0) -> Tensor:
    """Plane vectors (1, N, 2) at the given angles; the lengths must not matter to a method that uses cosines."""
    turned = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return (torch.stack([turned.cos(), turned.sin()], dim=-1) * torch.as_tensor(length).reshape(-1, 1))[None]


def chosen(mask: Tensor) -> list[set[int]]:
    """The marked columns of each row."""
    return [set(row.nonzero().flatten().tolist()) for row in mask]


def kept(trace: Trace, stage: int = 0) -> list[set[int]]:
    """The raster indices that each image kept, image by image through the batch."""
    return [set(image) for row in trace.rows for image in row.indices(stage)]


def assert_agree(got: Sequence[set[int]], want: Sequence[tuple[set[int], float]]) -> None:
    """The sets are equal; a rare one may differ where the reference itself hesitated between two tokens."""
    assert len(got) == len(want)
    unequal = []
    for number, (tokens, (reference, margin)) in enumerate(zip(got, want, strict=True)):
        assert len(tokens) == len(reference), f"image {number} keeps {len(tokens)}, not {len(reference)}"
        if tokens != reference:
            assert margin < 1e-6, f"image {number}: {sorted(tokens)} against {sorted(reference)}, margin {margin:.2e}"
            unequal.append(number)
    assert len(unequal) <= len(got) // 20, f"too many near-ties: {unequal}"
