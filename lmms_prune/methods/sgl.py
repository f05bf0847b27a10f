"""SGL: keep the tokens that a small model attended to while it answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape


@dataclass(frozen=True)
class SGL(ScoreMethod):
    """Keeps the visual tokens that a guide model attended to most while it read the prompt and answered it.

    The guide answers greedily; its attention to each visual token is summed over layers, heads, the prompt's text after
    the image and every answer token that is fed back. The ranking is the same for all layers of the pruned model.

    Args:
        guide: folder or hub name of a smaller checkpoint of the same family with the same grid of visual tokens;
            "self" lets the model guide itself, unpruned (an upper bound for guidance, not a saving).
        new_tokens: maximum length of the guide's answer, in tokens.
        reference: also count the last visual token's own row, as the reference code does; the paper's text does not.

    Paper: https://arxiv.org/abs/2412.03324.
    Differs from the reference:
        - attention rows of the prompt's text only, unless `reference`
        - sums are stored, not attention maps
        - any batch size
        - early exit with the small model's answer is not part of pruning and is omitted.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.03324"
    guide: str = "self"
    new_tokens: int = 128
    reference: bool = False

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(pixels=True)

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        return view.of_image(view.guided(self.guide, self.new_tokens, self.reference))
