"""Pool: average pooling, the control for all merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, grid_within
from lmms_prune.methods.shared.tensors import add_up
from lmms_prune.methods.view import TokenView
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _Cells:
    """For each cell of the coarser grid the sum of its tokens, their number, and the raster index of its middle."""

    sums: Float[Tensor, "B C D"]
    members: Int[Tensor, "B C"]
    middle: Int[Tensor, "B C"]


class Pool(Method):
    """Averages the hidden states of the visual tokens in each cell of a coarser grid.

    The grid is the largest one of the image's shape with at most N cells. A token at row ρ of R belongs to the cell row
    ⌊ρ·r/R⌋ of r, and likewise for columns. Deeper in the decoder a cell averages the tokens still present, and a cell
    without any is omitted. A cell has the position of its middle token. Keeps at most N.

    Paper: https://arxiv.org/abs/2512.07580 (the finding that simple baselines must be in every table).
    Differs from the paper: a control of this project, not a method of the paper.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        pairs = zip(view.grids, budget.tolist(), strict=True)
        view.carry = cells = self._cells(view, [grid_within(*grid, most) for grid, most in pairs])
        filled = cells.members > 0
        entry = torch.arange(view.valid.shape[1], device=filled.device)
        return (entry < filled.sum(1, keepdim=True)) & (to_device(budget, filled.device) > 0)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        cells = view.carried(_Cells)
        # The cells that hold tokens take the first entries, in raster order.
        order = (cells.members == 0).long().argsort(dim=1, stable=True)
        means = cells.sums / cells.members.clamp(min=1)[..., None]
        # A batch may have fewer cells than entries of its longest image.
        short = keep.shape[1] - order.shape[1]
        means = torch.nn.functional.pad(means.gather(1, order[..., None].expand_as(means)), (0, 0, 0, max(0, short)))
        middle = torch.nn.functional.pad(cells.middle.gather(1, order), (0, max(0, short)))
        return means[:, : keep.shape[1]].to(view.hidden.dtype), middle[:, : keep.shape[1]]

    @staticmethod
    def _cells(view: TokenView, grids: list[tuple[int, int]]) -> _Cells:
        device = view.valid.device
        rows, columns = to_device(view.grids, device).T[..., None]
        r, c = to_device(grids, device).T[..., None]
        cells = max(a * b for a, b in grids)
        cell = (view.index // columns) * r // rows * c + (view.index % columns) * c // columns
        # Padding is counted in a spare last cell.
        cell = torch.where(view.valid, cell, cells)
        hidden = view.with_additions(view.hidden).to(torch.promote_types(view.hidden.dtype, torch.float32))
        sums, members = add_up(hidden, cell, cells + 1), add_up(torch.ones_like(cell), cell, cells + 1)
        number = torch.arange(cells, device=device)
        middle = (2 * (number // c) + 1) * rows // (2 * r) * columns + (2 * (number % c) + 1) * columns // (2 * c)
        return _Cells(sums[:, :-1], members[:, :-1], middle)
