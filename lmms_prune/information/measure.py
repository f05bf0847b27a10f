"""Measures the information of visual tokens: how much each one alone raises the probability of the right answer.

Paper: https://arxiv.org/abs/2512.07580, section 3. At layer i the prompt is the system prefix S, visual tokens V and
text T. For a unit k (a token, or a block of tokens) of V,

    I_i(k) = p_k - p_text,

where p_k is the probability of the answer's first token if layers i, i + 1, … run on S, k and T only, and p_text the
probability if they run on S and T only. Dropped tokens are deleted, as in the paper's code, and the others keep their
positions, also the newline tokens of an image in tiles, which belong to no unit. (The paper's equations 2, 3 and 5 write a multiplication by a zero mask. Zero vectors would still be attended to,
with the weight of a zero score, and later layers would fill them; a test shows that this turns signs around.) The text has already
seen the image in the layers before i. So p_text is not that of a prompt without an image, except for i = 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.compat.torch import causal_after_prefix
from lmms_prune.compat.transformers import filled_cache, with_cache
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts, device_of
from lmms_prune.pruning.layout import read_rows
from lmms_prune.pruning.ragged import gather_rotary
from lmms_prune.record.information import InformationError
from lmms_prune.schedule import Schedule

CHUNK = 256  # units that run as one batch


@dataclass(frozen=True)
class Unit:
    """A visual token, or a square block of them: its image, the row and column of its upper left token, and the tokens.

    `tokens` are raster indices in the image; row and column are those in the token's grid, of which an image in tiles has two.
    """

    image: int
    row: int
    column: int
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class LayerInformation:
    """The measurements at one layer of one sample.

    Args:
        layer: the layer i.
        p: the answer's probability with each unit alone, (U,), float64.
        p_text: the answer's probability without any visual token.
        divergence: KL(without any visual token || unpruned) of the next token's distribution, in nats: VTW's criterion.
    """

    layer: int
    p: Float[Tensor, " U"]
    p_text: float
    divergence: float

    @property
    def information(self) -> Float[Tensor, " U"]:
        """The information I_i(k) of each unit, as a probability."""
        return self.p - self.p_text


def units(images: Sequence[Sequence[tuple[int, int]]], block: int) -> list[Unit]:
    """All units of a prompt's images.

    Args:
        images: rows and columns of the grids of each image, whose visual tokens follow one another in raster order.
        block: side of a unit: 1 for single tokens, 2 for squares of four, as the paper's code has them, smaller at odd borders.
    """
    blocks = []
    for image, grids in enumerate(images):
        first = 0
        for rows, columns in grids:
            for row in range(0, rows, block):
                for column in range(0, columns, block):
                    down, across = range(row, min(rows, row + block)), range(column, min(columns, column + block))
                    tokens = tuple(first + r * columns + c for r in down for c in across)
                    blocks.append(Unit(image, row, column, tokens))
            first += rows * columns
    return blocks


@dataclass(frozen=True)
class PromptInformation:
    """The information of one prompt.

    Args:
        units: the prompt's visual tokens or blocks.
        p_full: the answer's probability in the unpruned model.
        layers: one result per layer, computed when the iterator reaches it.
    """

    units: list[Unit]
    p_full: float
    layers: Iterator[LayerInformation]


def measure(
    model: Any, inputs: dict[str, Any], answer: int, layers: Sequence[int], block: int = 1, chunk: int = CHUNK
) -> PromptInformation:
    """The information of every unit of one prompt.

    One unpruned prefill gives the hidden states at all layers. From layer i on, all units run as rows of one batch. A row
    contains only the unit and the text after the first visual token. The tokens before the first visual token never
    depend on the image, so their keys and values come from the prefill.

    Args:
        model: a loaded checkpoint of either family.
        inputs: the inputs of one prompt with at least one image, on the model's device.
        answer: vocabulary index of the answer's first token.
        layers: the layers at which to measure.
        block: side of a unit, as for `units`.
        chunk: units that run as one batch; fewer need less memory.

    Raises:
        InformationError: several prompts, a prompt without an image, an image smaller than a block, or an answer outside
            the vocabulary.
        ScheduleError: a layer that the model does not have.
        UnsupportedModelError: the model uses FlashAttention, which accepts no custom mask.
    """
    parts = ModelParts.of(model)
    if parts.form == "flash":
        raise UnsupportedModelError("measuring information needs custom masks; use attn_implementation=sdpa.")
    for layer in layers:
        Schedule.parse(f"vtw@{layer}").check(len(parts.layers))
    with torch.no_grad():
        prompt = _Prompt.of(model, parts, inputs)
    vocabulary = model.get_output_embeddings().out_features
    if not 0 <= answer < vocabulary:
        raise InformationError(f"the answer's token {answer} is not one of the vocabulary's {vocabulary}.")
    # A canvas may be narrower than a block.
    for rows, columns in (grids[0] for grids in prompt.grids):
        if min(rows, columns) < block:
            raise InformationError(
                f"an image of {rows} x {columns} visual tokens has no block of {block} x {block}; use block {min(rows, columns)}."
            )
    blocks = units(prompt.grids, block)
    results = (_at_layer(model, parts, prompt, answer, layer, blocks, chunk) for layer in layers)
    return PromptInformation(blocks, float(prompt.full[answer].exp()), results)


@dataclass
class _Prompt:
    """The states, cache and layout recorded from one unpruned prefill.

    Args:
        states: the input of each layer, (1, L, D).
        rotary: the rotary tables that all layers share.
        cache: the keys and values of all layers.
        grids: rows and columns of each image's grids.
        columns: the columns of each image's tokens, by raster index.
        text: the columns of text after the first visual token.
        first_text: the first of these columns.
        full: log probabilities of the next token, float64.
        additions: what the decoder adds to each column after its first layers (1, L, D), layer by layer; zero for text.
    """

    states: list[Tensor]
    rotary: tuple[Tensor, Tensor]
    cache: Any
    grids: list[tuple[tuple[int, int], ...]]
    columns: list[Sequence[int]]
    text: Int[Tensor, " T"]
    first_text: int
    full: Float[Tensor, " W"]
    additions: list[Tensor]

    @classmethod
    def of(cls, model: Any, parts: ModelParts, inputs: dict[str, Any]) -> _Prompt:
        ids = inputs["input_ids"]
        if len(ids) != 1:
            raise InformationError(f"information is measured prompt by prompt; {len(ids)} were given at once.")
        visual = ids[0] == parts.config.image_token_id
        if not bool(visual.any()):
            raise InformationError("the prompt has no image, hence no visual token.")
        states, tables = [], []
        features: list[Tensor] = []

        def record(module: Any, args: tuple, kwargs: dict) -> None:
            states.append(args[0] if args else kwargs["hidden_states"])
            tables.append(kwargs["position_embeddings"])

        handles = (layer.register_forward_pre_hook(record, with_kwargs=True) for layer in parts.layers)
        with hooked([parts.record_additions(features), *handles]):
            out = model(**inputs, logits_to_keep=1, use_cache=True)
        additions = [torch.zeros_like(states[0]) for _ in features]
        for addition, feature in zip(additions, features, strict=True):
            addition[0, visual.to(addition.device)] = feature.to(addition)
        _, images = read_rows(parts, inputs, ids.tolist(), [0], None)
        patches = [image.patches for image in images]
        sizes = [len(columns) for columns in patches]
        grids = parts.rectangles(inputs, sizes)
        for of_image, size in zip(grids, sizes, strict=True):
            if sum(rows * columns for rows, columns in of_image) != size:
                shape = " and ".join(f"{rows} x {columns}" for rows, columns in of_image)
                raise InformationError(f"an image of {shape} visual tokens has {size} columns in the prompt.")
        first = patches[0][0]
        all_columns = torch.arange(ids.shape[1], device=ids.device)
        text = all_columns[(all_columns >= first) & ~visual]
        full = _log_probabilities(out.logits[0, -1])
        return cls(states, tables[0], filled_cache(out), grids, patches, text, int(text[0]), full, additions)

    def unit_columns(self, unit: Unit) -> list[int]:
        """The unit's columns in the prompt."""
        return [self.columns[unit.image][token] for token in unit.tokens]

    @property
    def prefix(self) -> int:
        """The number of tokens before the first image."""
        return self.columns[0][0]

    def after_units(self, rows: Sequence[Sequence[int]]) -> bool:
        """Whether all text stands after the visual tokens of every row, so that a row's order is that of its columns."""
        return max((max(row, default=-1) for row in rows), default=-1) < self.first_text


class _Prefix:
    """A read-only cache with the keys and values of the tokens before the first image, shared by all rows.

    Args:
        cache: of the prefill.
        length: tokens before the first image.
        own: keys and values of all tokens of the rows, for a layer that runs for the last of them alone.
    """

    def __init__(self, cache: Any, length: int, own: tuple[Tensor, Tensor] | None = None) -> None:
        self.cache, self.length, self.own = cache, length, own

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The keys and values that a layer attends to: the prefix's, then the row's own. Stores nothing."""
        keys, values = self.own or (keys, values)
        cached = self.cache.layers[layer]
        prefix = [
            states[:, :, : self.length].expand(len(keys), -1, -1, -1).to(keys.device)
            for states in (cached.keys, cached.values)
        ]
        return torch.cat([prefix[0], keys], 2), torch.cat([prefix[1], values], 2)


@torch.no_grad()
def _at_layer(
    model: Any, parts: ModelParts, prompt: _Prompt, answer: int, layer: int, blocks: Sequence[Unit], chunk: int
) -> LayerInformation:
    """Measure all units at one layer, and the prompt without any visual token."""
    rows = [prompt.unit_columns(unit) for unit in blocks]
    [without] = _next_tokens(model, parts, prompt, layer, [[]])
    answers = [
        _next_tokens(model, parts, prompt, layer, rows[start : start + chunk])[:, answer]
        for start in range(0, len(rows), chunk)
    ]
    divergence = (without.exp() * (without - prompt.full.to(without.device))).sum()
    return LayerInformation(layer, torch.cat(answers).exp().cpu(), float(without[answer].exp()), float(divergence))


def _next_tokens(
    model: Any, parts: ModelParts, prompt: _Prompt, layer: int, rows: Sequence[Sequence[int]]
) -> Float[Tensor, "U W"]:
    """Log probabilities of the next token, one line per row; a row is the list of its visual tokens' columns."""
    index, present = _columns(prompt, rows, prompt.states[layer].device)
    prefix = prompt.prefix
    hidden = prompt.states[layer][0, index]
    rotary = [gather_rotary(table, index) for table in prompt.rotary]
    padded = len(set(map(len, rows))) > 1
    causal = not padded and parts.form == "sdpa" and prompt.after_units(rows)
    mask = None if causal else _mask(present, index, prefix, parts, hidden)
    cache = _Prefix(prompt.cache, prefix)
    for number in range(layer, len(parts.layers)):
        module = parts.layers[number]
        # A model that is split over devices has its layers on several.
        device = next(module.parameters()).device
        hidden, mask = hidden.to(device), mask if mask is None else mask.to(device)
        cos, sin = (table.to(device) for table in rotary)
        allowed = causal_after_prefix(index.shape[1], prefix) if causal else mask
        if number == len(parts.layers) - 1:
            # Of the last layer only the last token's output is read; the others give it their keys and values.
            cache.own = parts.keys(number, hidden, (cos, sin)), parts.values(number, hidden)
            hidden, cos, sin = hidden[:, -1:], cos[..., -1:, :], sin[..., -1:, :]
            # Nothing is hidden from the last token but padding.
            allowed = None if mask is None or not padded else mask[:, :, -1:]
        out = module(
            hidden,
            attention_mask=allowed,
            position_embeddings=(cos, sin),
            use_cache=True,
            **with_cache(module, cache),
        )
        hidden = out[0] if isinstance(out, tuple) else out
        if number < min(len(prompt.additions), len(parts.layers) - 1):
            hidden = hidden + prompt.additions[number][0, index].to(hidden)
    last = parts.final_norm(hidden[:, -1])
    head = model.get_output_embeddings()
    return _log_probabilities(head(last.to(device_of(head, last.device))))


def _columns(
    prompt: _Prompt, rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Int[Tensor, "U N"], Bool[Tensor, "U N"]]:
    """The columns that each row contains, its visual tokens before the text, and whether each is more than padding."""
    widest = max(map(len, rows))
    # Rows with fewer visual tokens are padded with the last text token; the mask hides the padding from all queries.
    padding = int(prompt.text[-1])
    columns = torch.tensor([[*row, *[padding] * (widest - len(row))] for row in rows], dtype=torch.long, device=device)
    present = torch.tensor([[number < len(row) for number in range(widest)] for row in rows], device=device)
    text = prompt.text.to(device).expand(len(rows), -1)
    return torch.cat([columns, text], 1), torch.cat([present.bool(), torch.ones_like(text, dtype=torch.bool)], 1)


def _log_probabilities(logits: Float[Tensor, "*U W"]) -> Float[Tensor, "*U W"]:
    # Differences of probabilities can be tiny: float64.
    return logits.to(torch.float64).log_softmax(-1)


def _mask(
    present: Bool[Tensor, "U N"], index: Int[Tensor, "U N"], prefix: int, parts: ModelParts, hidden: Tensor
) -> Tensor:
    """The mask (U, 1, N, prefix + N), in the attention kernel's form: a token sees the prefix and all earlier tokens."""
    earlier = (index[:, None, :] <= index[:, :, None]) & present[:, None, :]
    # A padding query sees itself: an empty row would be NaN after the softmax.
    earlier |= torch.eye(index.shape[1], dtype=torch.bool, device=index.device)
    before = torch.ones(*earlier.shape[:2], prefix, dtype=torch.bool, device=index.device)
    allowed = torch.cat([before, earlier], 2)[:, None]
    if parts.form == "sdpa":
        return allowed
    return torch.zeros_like(allowed, dtype=hidden.dtype).masked_fill(~allowed, torch.finfo(hidden.dtype).min)
