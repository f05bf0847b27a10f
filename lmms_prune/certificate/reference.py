"""An independent reference for pruning: it removes nothing and only masks the keys of dropped tokens.

The reference runs the unmodified model on one unpadded row, with prompt and generated tokens in one pass and without a
cache. It gives every decoder layer the mask that hides the dropped tokens and, with compact positions, the renumbered
rotary tables. It shares no code with the pruning itself, and it is as simple as possible so that a reader can see that
it is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.models import family_of
from lmms_prune.models.kernels import KERNELS

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KeptColumns:
    """The prompt columns that one row keeps from one stage's layer on.

    Args:
        columns: kept columns of the prompt, in sequence order.
        written: by column, the hidden state that the stage's method wrote at this layer, if it wrote any.
        added: by column, what is added to this token after the layers from the stage's on, if the method wrote it
            (DeepStack), layer by layer, side by side.
    """

    columns: Sequence[int]
    written: Mapping[int, Float[Tensor, " D"]] = field(default_factory=dict)
    added: Mapping[int, Float[Tensor, " A"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Masked:
    """The reference's results for one row of prompt and S generated tokens.

    Args:
        logits: logits that predict each of the S generated tokens.
        tables: for each layer, the cosine and sine tables over prompt and generated tokens.
    """

    logits: Float[Tensor, "S vocabulary"]
    tables: list[Tables]


def masked_run(
    model: Any,
    inputs: Mapping[str, Tensor],
    generated: Int[Tensor, " S"],
    kept: Mapping[int, KeptColumns],
    compact: bool,
    forgotten: Mapping[int, set[int]] | None = None,
) -> Masked:
    """Run one row with all dropped tokens masked.

    Args:
        model: the unmodified model. Its decoder runs with SDPA if its own kernel takes no 4-D mask (FlashAttention).
        inputs: the model inputs of one unpadded row.
        generated: ids of the tokens after the prompt.
        kept: by stage layer, the prompt columns that are kept from that layer on.
        compact: whether kept tokens get consecutive positions from each stage's layer on.
        forgotten: by layer, further columns that generated tokens do not see there.
    """
    prompt = inputs["input_ids"].shape[1]
    extended = _extended(inputs, generated)
    length = extended["input_ids"].shape[1]
    decoder = model.model.language_model
    tables: list[Tables] = []

    def swap(layer: int) -> Callable[..., tuple[tuple, dict]]:
        stages = [stage for stage in sorted(kept) if stage <= layer]
        columns = list(kept[stages[-1]].columns) if stages else list(range(prompt))
        columns += range(prompt, length)
        written = kept[layer].written if layer in kept else {}

        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0].clone()
            for column, state in written.items():
                hidden[0, column] = state.to(hidden)
            # Rank of each column among the kept ones; a dropped column has the rank `length`, which no kept one has.
            rank = torch.full((length,), length)
            rank[columns] = torch.arange(len(columns))
            # Causal by rank, since a method that merges may change the order of columns.
            allowed = (rank[None, :] <= rank[:, None]) & (rank < length)[None, :]
            allowed[prompt:, sorted((forgotten or {}).get(layer, ()))] = False
            # Every token sees itself, dropped ones too: attention needs at least one visible token.
            allowed |= torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(1, 1, length, length, dtype=hidden.dtype)
            mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min).to(hidden.device)
            kwargs = {**kwargs, "attention_mask": mask}
            if compact and stages:
                position_ids = torch.where(rank < length, rank, 0)[None]
                kwargs["position_embeddings"] = decoder.rotary_emb(hidden, position_ids.to(hidden.device))
            tables.append(kwargs["position_embeddings"])
            return (hidden, *args[1:]), kwargs

        return hook

    def replace_additions(module: Any, args: tuple, kwargs: dict) -> None:
        # The model adds its own tensors, in which the rows of merged tokens are changed in place.
        _, additions = family_of(model.config).between_layers(dict(kwargs))
        visual = (extended["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0].tolist()
        for stage in sorted(kept):
            for column, state in kept[stage].added.items():
                for extra, part in zip(additions[stage:], state.chunk(len(additions) - stage), strict=True):
                    extra[visual.index(column)] = part.to(extra)

    handles = [
        module.register_forward_pre_hook(swap(layer), with_kwargs=True) for layer, module in enumerate(decoder.layers)
    ]
    handles.append(decoder.register_forward_pre_hook(replace_additions, with_kwargs=True))
    try:
        with torch.no_grad(), _takes_masks(decoder):
            logits = model(**extended, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Masked(logits[prompt - 1 : length - 1], tables)


@contextmanager
def _takes_masks(decoder: Any) -> Iterator[None]:
    """Inside this context the decoder has an attention kernel that takes a 4-D mask."""
    kernel = decoder.config._attn_implementation
    if KERNELS[kernel].form != "flash":
        yield
        return
    # The decoder alone: the vision encoder's features must be those of the run that is compared.
    decoder.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        decoder.set_attn_implementation(kernel)


def _extended(inputs: Mapping[str, Tensor], generated: Tensor) -> dict[str, Tensor]:
    """Return a row's inputs with the generated tokens appended to the prompt."""
    extended = dict(inputs)
    for name, fill in (("input_ids", generated), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            tail = torch.zeros_like(generated)[None] + fill
            extended[name] = torch.cat([inputs[name], tail.to(inputs[name])], dim=1)
    return extended
