"""SCOPE: keep the tokens that are salient and add most to how well the kept tokens cover all others.

Worked example: N = 3 of six patches v0 to v5, whose features are plane vectors.

    angle      v0 0°    v1 0°    v2 60°   v3 60°   v4 90°   v5 180°
    saliency   v0 .1    v1 .2    v2 .1    v3 .15   v4 .1    v5 .1

A token's gain is at first the sum of its positive cosines: v0 and v1 2 + 2·.5 = 3, v2 and v3 2 + 2·.5 + .866 = 3.866, v4
1 + 2·.866 = 2.732, v5 1. Times saliency v1 has the most: .6 (v3: .58). It covers v0 and v1 by 1, v2 and v3 by .5. Gains are now
v2 and v3 2·.5 + .866 = 1.866, v4 1 + 2·.366 = 1.732, v5 1, and v3 has the most: .28. It covers v2 and v3 by 1, v4 by .866.
Left are .134 for v4 and 1 for v5, which is kept, though v4 is as salient. Kept: v1 v3 v5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.greedy.searches import covering
from lmms_prune.methods.shared.tensors import directions
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import finest


@dataclass(frozen=True)
class SCOPE(Method):
    """Picks, one by one, the token with the highest gain in coverage times its saliency to the power alpha.

    A token's coverage is its highest cosine to a pick, at least 0; a candidate's gain is what it adds to the coverage of all
    tokens, picked ones and itself included. Features are those of the encoder before the projector, saliency the class
    token's attention in CLIP's block 22 (normalised over all keys, mean over heads). Published before the decoder; at deeper
    layers, tokens that were dropped are neither covered nor candidates.

    Args:
        alpha: a larger value makes saliency count more; 0 is coverage alone.

    Paper: https://arxiv.org/abs/2510.24214.
    Differs from the reference:
        - cosines are rounded to 2⁻²⁴ and gains are exact (the reference's half precision picks other tokens)
        - a zero vector has cosine 0 to all (in the reference not a number)
        - N is that of each image (the reference divides it by the images of a batch)
        - ties go to the lower index
        - not by the authors: Qwen's encoders have no class token; features are the merger's, saliency the attention received in the
          last block, each image by itself (a public port takes one N for all images of a prompt).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    alpha: float = 1.0

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        weight = saliency.to(finest(saliency.device)) ** self.alpha
        return covering(directions(view.of_image(view.encoder.features())), weight, view.valid, budget)
