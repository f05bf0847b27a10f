"""FasterVLM: keep the tokens that the vision encoder's class token attends to."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape


class FasterVLM(ScoreMethod):
    """Keeps the visual tokens with the highest attention from the vision encoder's class token.

    The attention is that of the block whose output the decoder is given (CLIP's last but one), mean over heads. Published
    before the decoder; at a deeper layer the same scores rank the tokens still present.

    Paper: https://arxiv.org/abs/2412.01818.
    Differs from the reference:
        - Qwen's encoders have no class token; it is replaced by the attention that a token receives in the last
          block, mean over heads, queries and its four patches.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}))

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        return view.of_image(view.encoder.saliency())
