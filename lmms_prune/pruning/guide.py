"""Guidance by an answer: the attention that a (smaller) model pays while it reads the prompt and answers greedily.

Paper: https://arxiv.org/abs/2412.03324 (SGL). Dimension letters: R rows, L sequence, I images, H heads, d head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from lmms_prune.compat.tiles import unpads
from lmms_prune.compat.transformers import cache_of, layer_keys
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.view import LayerInput, Tokens
from lmms_prune.models.encoder import Encoder
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import to_device
from lmms_prune.pruning.layout import Layout


class Guide:
    """Answers with an auxiliary model, or with the model itself, and sums the attention of the answer.

    Args:
        model: the pruned model, as passed to `prune`.
        parts: the parts of the model.
    """

    def __init__(self, model: Any, parts: ModelParts):
        self._model, self._parts = model, parts
        self._answers: dict[tuple[str, int, bool], Float[Tensor, "I V"]] = {}
        self.running = False

    def model(self, checkpoint: str) -> Any:
        """The model that answers: a checkpoint's, or the pruned model for ``self``.

        Raises:
            UnsupportedModelError: it cannot be loaded, or does not read the same prompts; or ``self`` cannot generate.
        """
        if checkpoint != "self":
            weight = self._parts.decoder.norm.weight
            guide = load_guide(checkpoint, weight.device, weight.dtype)
            check_guide(self._model, guide, checkpoint)
            return guide
        if not hasattr(self._model, "generate"):
            raise UnsupportedModelError("guide=self needs a model that can generate; give prune() the whole model.")
        return self._model

    def answer(
        self, ids: Tensor, layout: Layout, encoder: Encoder, checkpoint: str, new_tokens: int, last_visual: bool
    ) -> Float[Tensor, "I V"]:
        """Attention that a guide model's answer to a batch pays to each visual token; computed once per prefill.

        Args:
            ids: of the prompts.
            layout: of the unpruned prompts.
            encoder: of the images.
            checkpoint, new_tokens, last_visual: as for `model` and `answer_attention`.
        """
        key = (checkpoint, new_tokens, last_visual)
        if key not in self._answers:
            # generate() passes on no mask where nothing is padded, but needs one as its input.
            inputs = {"input_ids": ids, "attention_mask": layout.present.to(ids), **encoder.inputs()}
            inputs |= self._parts.family.extra_inputs(self._parts.config, ids)
            self.running = True
            try:
                guide = self.model(checkpoint)
                self._answers[key] = answer_attention(guide, inputs, layout.copy(), new_tokens, last_visual)
            finally:
                self.running = False
        return self._answers[key]

    def forget(self) -> None:
        """Discard the answers of the last prefill."""
        self._answers = {}


@lru_cache(maxsize=1)
def load_guide(checkpoint: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The guide model, kept for the next prompt.

    Raises:
        UnsupportedModelError: it cannot be loaded.
    """
    try:
        model = AutoModelForImageTextToText.from_pretrained(
            checkpoint, dtype=dtype, device_map=str(device), trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        message = f"guide={checkpoint} cannot be loaded: give the folder or hub name of a checkpoint. ({reason})"
        raise UnsupportedModelError(message) from error
    return model.eval()


def check_guide(model: Any, guide: Any, name: str) -> None:
    """Check that a guide reads the same prompts and pixels as the model.

    Raises:
        UnsupportedModelError: another family, placeholder or number of visual tokens.
    """
    model_config, guide_config = model.config, guide.config
    if unpads(model_config) != unpads(guide_config):
        raise UnsupportedModelError(
            f"guide={name} cuts off the padding of tiles, and the model does not: use guide=self."
        )
    for field in ("model_type", "image_token_id"):
        if getattr(model_config, field) != getattr(guide_config, field, None):
            values = f"{field} is {getattr(guide_config, field, None)}, the model's {getattr(model_config, field)}"
            raise UnsupportedModelError(f"guide={name} does not read the model's prompts: its {values}.")
    vision = ("image_size", "patch_size", "spatial_merge_size", "temporal_patch_size")
    for field in vision:
        if getattr(model_config.vision_config, field, None) != getattr(guide_config.vision_config, field, None):
            raise UnsupportedModelError(f"guide={name} has another grid of visual tokens: its {field} differs.")


class AnswerAttention:
    """Sums, while a model generates, the attention that prompt text and answer pay to each visual token."""

    def __init__(self, parts: ModelParts, layout: Layout, last_visual: bool):
        self.parts, self.layout, self.last_visual = parts, layout, last_visual
        self.prompt = layout.present
        self.sums: Tensor | None = None
        device = layout.present.device
        self.alive = torch.ones(len(layout.traces), dtype=torch.bool, device=device)
        self.ends = torch.empty(0, dtype=torch.long, device=device)

    def register(self, ends: list[int]) -> Iterator[Any]:
        """Put the hooks on; `ends` are the tokens that end an answer."""
        self.ends = to_device(ends, self.ends.device, torch.long)
        yield self.parts.multimodal.register_forward_pre_hook(self._see_tokens, with_kwargs=True)
        for layer, module in enumerate(self.parts.layers):
            yield module.register_forward_hook(partial(self._see_layer, layer), with_kwargs=True)

    def _see_tokens(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None and ids.shape[1] == 1:
            # A row that has ended is fed its end token, then padding, until the others end. Alone it would be fed neither.
            ended = (ids[:, :1].to(self.ends.device) == self.ends).any(1)
            self.alive &= ~ended

    def _see_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        state = LayerInput(layer, hidden, kwargs["position_embeddings"])
        if hidden.shape[1] > 1:
            self._add_prompt(state)
        else:
            self._add_step(state, layer_keys(cache_of(kwargs), layer))

    def _add_prompt(self, state: LayerInput) -> None:
        view = self.layout.view(self.parts, state, None, 0)
        queries = view.text
        if self.last_visual:
            counts = to_device(view.counts, view.valid.device)[:, None]
            last = view.visual.slots.gather(1, counts - 1)
            slots = torch.cat([last, queries.slots], dim=1)
            queries = Tokens(slots, torch.cat([torch.ones_like(last, dtype=torch.bool), queries.valid], dim=1))
        for piece, attention in view.attention_chunks(queries, ahead=True):
            self._add((attention * queries.valid[:, piece][:, None, :, None]).sum((1, 2)))

    def _add_step(self, state: LayerInput, keys: Tensor) -> None:
        fine = torch.promote_types(keys.dtype, torch.float32)
        query = self.parts.queries(state.layer, state.hidden, state.rotary).to(fine)
        query = query * self.parts.layers[state.layer].self_attn.scaling
        grouped = query.unflatten(1, (keys.shape[1], -1))
        scores = (grouped @ keys.to(fine)[:, :, None].transpose(-1, -2)).flatten(1, 2).squeeze(2)
        present = self.prompt.to(scores.device)
        present = nn.functional.pad(present, (0, scores.shape[-1] - present.shape[1]), value=True)
        attention = scores.masked_fill(~present[:, None], -torch.inf).softmax(-1).sum(1)
        attention = attention * self.alive.to(attention.device)[:, None]
        slots, rows = self.layout.visual.slots.to(attention.device), self.layout.rows.to(attention.device)
        self._add(attention[rows[:, None], slots])

    def _add(self, more: Float[Tensor, "I V"]) -> None:
        self.sums = more if self.sums is None else self.sums.to(more.device) + more


@torch.no_grad()
def answer_attention(
    model: Any, inputs: dict[str, Any], layout: Layout, new_tokens: int, last_visual: bool
) -> Float[Tensor, "I V"]:
    """Attention paid to each visual token by the prompt's text and by every answer token that is fed back.

    Summed over layers, heads and query rows, of a greedy answer.

    Args:
        model: the guide.
        inputs: as for ``model.generate``, left-padded.
        layout: of these prompts.
        new_tokens: the answer's length at most.
        last_visual: whether the last visual token's own row counts, too (as in the reference code).

    Returns:
        one row per image, in the order of the batch; 0 where padding.
    """
    parts = ModelParts.of(model)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    watcher = AnswerAttention(parts, layout, last_visual)
    # Some checkpoints' generation settings penalise repetition, which would not be a greedy answer.
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    with hooked(watcher.register(ends)):
        model.generate(**inputs, max_new_tokens=new_tokens, **greedy)
    assert watcher.sums is not None
    return torch.where(layout.visual.valid, watcher.sums.to(layout.visual.valid.device), 0)
