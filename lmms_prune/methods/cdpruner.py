"""CDPruner: keep tokens that are diverse and relevant to the question."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.auxiliary import load_clip
from lmms_prune.methods.shared.greedy.searches import greedy
from lmms_prune.methods.shared.tensors import directions, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts, device_of
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

# Relevances that differ by less are equal up to rounding; scaling them to 0 … 1 would amplify the rounding.
_EQUAL = 1e-6


@dataclass(frozen=True)
class CDPruner(Method):
    """Keeps the tokens of a greedy search in a determinantal point process conditioned on the question.

    The kernel is the cosine of two projected tokens times the relevance of both. Relevance is minus the mean cosine of
    a token and the question's segments of 77 tokens in CLIP's shared space, scaled to 0 … 1 over the image's present
    tokens. Each step adds the token that enlarges the determinant most. The input embeddings are used at any layer.

    Args:
        clip: folder or hub name of the CLIP whose text encoder and projections are read (LLaVA; its vision encoder must be
            the one that the LLaVA has); "embeddings" needs no second model: relevance then follows from the mean cosine
            of the decoder's own input embeddings of a token and of the text tokens after the image (any family).
        sign: whether a token unlike the question is relevant ("negative", as in the reference code), or one like it
            ("positive", as in the paper).

    Paper: https://arxiv.org/abs/2506.10967.
    Differs from the reference:
        - relevance is scaled over each image, not the batch, and is 1 for all tokens if all are equal (to 1e-6; the
          reference divides by zero)
        - kept tokens are no candidates
        - the search runs in float64, and a token's marginal gain is at least 1e-6 of its own kernel entry, so that
          rounding decides nothing
        - each segment of a long question has its own begin and end token
        - the kernel is never stored: directions in feature space are made orthogonal, which is the same algebra.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    clip: str = "openai/clip-vit-large-patch14-336"
    sign: Literal["negative", "positive"] = "negative"

    def prepare(self, parts: ModelParts) -> None:
        if self.clip == "embeddings":
            return
        if not parts.encoder_shape.is_clip:
            raise UnsupportedModelError(_no_clip(self.clip))
        # Not the projector's weight: a quantised one says neither its type nor its width.
        device = device_of(parts.multimodal.multi_modal_projector, parts.decoder.norm.weight.device)
        width = parts.config.vision_config.hidden_size
        self._check(load_clip(self.clip, device, _fine(parts.decoder.norm.weight)).width, width)

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(features=self.clip != "embeddings")

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        relevance = self._by_embeddings(view) if self.clip == "embeddings" else self._by_clip(view)
        view.ranking(relevance)
        relevance = _scaled(relevance if self.sign == "positive" else -relevance, view.valid)
        unit = directions(view.of_image(view.visual_embeddings))
        return _greedy(unit * relevance.to(unit)[..., None], view.valid, budget)

    def _by_clip(self, view: TokenView) -> Float[Tensor, "B V"]:
        questions, encoder = view.question(), view.encoder
        if not encoder.shape.is_clip:
            raise UnsupportedModelError(_no_clip(self.clip))
        states = encoder.features()
        clip = load_clip(self.clip, states.device, _fine(states))
        self._check(clip.width, states.shape[-1])
        # Rows with several images, and several answers to one question, share a text.
        distinct = list(dict.fromkeys(questions))
        texts = torch.stack([directions(segments).mean(0) for segments in clip.texts(distinct)])
        texts = texts[to_device([distinct.index(text) for text in questions], texts.device)]
        return view.of_image(settled(directions(clip.images(states)) @ texts[..., None]).squeeze(-1))

    @staticmethod
    def _by_embeddings(view: TokenView) -> Float[Tensor, "B V"]:
        words = directions(view.text_embeddings) * view.text.valid[..., None]
        mean = words.sum(1) / view.text.valid.sum(1).clamp(min=1)[:, None]
        return view.of_image(settled(directions(view.visual_embeddings) @ mean[..., None]).squeeze(-1))

    def _check(self, width: int, model_width: int) -> None:
        if width != model_width:
            message = f"clip={self.clip} projects a vision encoder of width {width}, but the model's has {model_width}: give the "
            raise UnsupportedModelError(message + "CLIP from which the model's encoder was taken, or clip=embeddings.")


def _no_clip(name: str) -> str:
    return f"clip={name} needs CLIP's vision encoder, which this model does not have; use clip=embeddings."


def _fine(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(relevance: Float[Tensor, "B V"], valid: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Relevance scaled to (nearly) 0 … 1 over the tokens of each image; 1 where all are equal."""
    low = relevance.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    span = relevance.masked_fill(~valid, -torch.inf).amax(1, keepdim=True) - low
    return torch.where(span < _EQUAL, 1.0, (relevance - low + 1e-6) / span.clamp(min=_EQUAL))


def _greedy(
    vectors: Float[Tensor, "B V D"], valid: Bool[Tensor, "B V"], budget: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """The tokens that greedily enlarge the determinant of the vectors' Gram matrix most, ties to the lower index."""
    limit, most = to_device(budget, vectors.device), max(budget.tolist(), default=0)
    return greedy("determinant", vectors, vectors.square().sum(-1), valid, limit, most)
