"""HiPrune: keep the tokens that the vision encoder's middle attends to, their neighbours, and those its end attends to."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class HiPrune(Method):
    """Keeps anchors and their neighbours by the vision encoder's middle, and registers by its end.

    A token's score in a block is the attention it receives, mean over heads and all queries. Anchors are the top
    round(alpha·N/5) of the object layer (block 8 of CLIP's 24, 15 of Qwen2.5-VL's 32, counted from 0); buffers are the
    anchors' raster neighbours at ±1 and ±width, clamped to the image's first and last token, so that they cross from row
    to row. The rest of the N are registers: the top of the block whose output the decoder is given. Published before the
    decoder; at deeper layers, dropped tokens are neither anchors nor buffers.

    Args:
        alpha: a larger value keeps more anchors and fewer registers.

    Paper: https://arxiv.org/abs/2508.00553.
    Differs from the reference:
        - if anchors and buffers exceed N, the N best of them by the object layer are kept (in the reference an error)
        - the grid's width is that of each image (in the reference that of the first one)
        - Qwen2.5-VL's blocks attend in their windows, as in the reference's eager path
        - ties go to the lower index
        - scores are not rounded to half precision.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.00553"
    alpha: float = 0.1

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({_object_block(encoder), encoder.selected}), grids=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        shape = view.encoder.shape
        objects = view.ranking(view.of_image(view.encoder.received(_object_block(shape))))
        registers = view.ranking(view.of_image(view.encoder.received(shape.selected)))
        share = Fraction(str(self.alpha)) / 5
        anchors = highest(objects, view.valid, torch.tensor([round(share * n) for n in budget.tolist()]))
        near = anchors | (_neighbours(view, anchors) & view.valid)
        first = highest(objects, near, budget)
        return first | highest(registers, view.valid & ~near, to_device(budget, near.device) - first.sum(1))


def _object_block(encoder: EncoderShape) -> int:
    return encoder.scaled(8, of=24) if encoder.class_tokens else encoder.scaled(15, of=32)


def _neighbours(view: TokenView, anchors: Bool[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
    """The tokens one step, and one row, before and after the anchors."""
    device = anchors.device
    widths = to_device([columns for _, columns in view.grids], device)[:, None]
    last = to_device(view.sizes, device)[:, None] - 1
    hits = torch.zeros(len(view.sizes), max(view.sizes, default=0), dtype=torch.long, device=device)
    for step in (torch.ones_like(widths), widths):
        for target in (view.index - step, view.index + step):
            hits = hits.scatter_add(1, torch.minimum(target.clamp(min=0), last), anchors.long())
    return view.of_image(hits > 0)
