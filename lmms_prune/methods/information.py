"""Information: an oracle that knows the right answer, hence an upper bound for methods and not one of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView
from lmms_prune.models.parts import ModelParts
from lmms_prune.record.information import InformationError, Store, token_information


@dataclass(frozen=True)
class Information(ScoreMethod):
    """Keeps the visual tokens that alone raise the probability of the right answer most, as measured at this layer.

    Args:
        of: the folder that `lmms-prune information` wrote for this model and the same documents.

    Paper: https://arxiv.org/abs/2512.07580 (Figures 6 and 11).
    Differs from the reference:
        - the paper samples windows of two by two tokens; here all windows are used, of any side.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"
    of: str = ""

    def prepare(self, parts: ModelParts) -> None:
        Store(Path(self.of)).settings()

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        store = Store(Path(self.of))
        settings = store.settings()
        if view.layer not in settings["layers"]:
            measured = ", ".join(map(str, settings["layers"]))
            raise InformationError(f"{self.of} holds information at layers {measured}, not at {view.layer}.")
        signal = torch.zeros(len(view.sizes), max(view.sizes), dtype=torch.float64)
        for row, ((sample, image), (grids, raster)) in enumerate(zip(view.images, view.rectangles, strict=True)):
            lines = store.read([sample])
            arrays = token_information(lines[lines.layer == view.layer], image, grids, settings["block"])
            worth = np.concatenate([values.ravel() for values in arrays])
            signal[row, : len(raster)] = torch.from_numpy(worth[raster])
        return view.of_image(signal)
