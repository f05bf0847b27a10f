"""Auxiliary models that some methods consult, loaded once and kept for the next prompt.

Dimension letters: B images, N tokens, C width of the vision encoder, P width of the shared space, S segments of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, CLIPModel

from lmms_prune.errors import UnsupportedModelError


@dataclass(frozen=True)
class Clip:
    """The parts of a CLIP besides its vision encoder's blocks: the text encoder and both projections."""

    tokenizer: Any
    text_model: Any
    text_projection: Any
    image_norm: Any
    image_projection: Any

    @property
    def width(self) -> int:
        """The width of the vision encoder to which the projection belongs."""
        return self.image_projection.in_features

    @torch.no_grad()
    def images(self, states: Float[Tensor, "B N C"]) -> Float[Tensor, "B N P"]:
        """Outputs of a block of CLIP's vision encoder in the space shared with texts."""
        weight = self.image_projection.weight
        return self.image_projection(self.image_norm(states.to(weight.device, weight.dtype)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> list[Float[Tensor, "S P"]]:
        """The texts in the shared space, each as consecutive segments of at most the encoder's length (77 tokens).

        Every segment has a begin and an end token of its own.
        """
        segments, counts, room = [], [], self.text_model.config.max_position_embeddings - 2
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            parts = [ids[start : start + room] for start in range(0, len(ids), room)] or [[]]
            segments += [torch.tensor([first, *part, last]) for part in parts]
            counts.append(len(parts))
        device = self.image_projection.weight.device
        ids = pad_sequence(segments, batch_first=True, padding_value=last).to(device)
        lengths = torch.tensor([len(part) for part in segments], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        pooled = self.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        return list(self.text_projection(pooled).split(counts))


@lru_cache(maxsize=2)
def load_clip(checkpoint: str, device: torch.device, dtype: torch.dtype) -> Clip:
    """The text encoder and the projections of a CLIP checkpoint.

    Args:
        checkpoint: a folder or a hub name.
        device: where it runs.
        dtype: the type of its weights.

    Raises:
        UnsupportedModelError: it cannot be loaded; names the option `clip`, its value and the ways out.
    """
    fix = "give the folder or hub name of a CLIP checkpoint, or clip=embeddings, which needs no second model."
    try:
        model, report = CLIPModel.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(f"clip={checkpoint} cannot be loaded: {fix} ({reason})") from error
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("vision_model.encoder"))
    if missing:
        message = f"clip={checkpoint} has no weights for {missing[0]} and {len(missing) - 1} others: {fix}"
        raise UnsupportedModelError(message)
    parts = (model.text_model, model.text_projection, model.vision_model.post_layernorm, model.visual_projection)
    # The blocks of its vision encoder are not kept: the LLaVA has them already.
    return Clip(tokenizer, *(part.to(device).eval() for part in parts))
