"""What a run leaves in the harness's results: a ledger in every sample, averages and provenance in every run."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts

from lmms_prune.trace import RowTrace


@dataclass
class PrunedTokenCounts(TokenCounts):
    """The harness's token counts with the ledger; lands in every line of the samples file.

    Args:
        visual_tokens: original visual tokens of the sample's images.
        kept_visual_tokens: visual tokens left after each stage.
        avg_visual_tokens: average visual tokens per decoder layer.
    """

    visual_tokens: int = 0
    kept_visual_tokens: list[int] = field(default_factory=list)
    avg_visual_tokens: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(cls, row: RowTrace, input_tokens: int, output_tokens: int) -> PrunedTokenCounts:
        kept = [sum(images) for images in row.kept]
        return cls(input_tokens, output_tokens, None, row.visual_tokens, kept, row.avg_visual_tokens)


@dataclass
class RunRecord:
    """Sums over the samples of one process, and where the run took place."""

    samples: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    with_image: int = 0
    visual_tokens: int = 0
    avg_visual_tokens: float = 0.0
    input_tokens: int = 0

    def add(self, counts: list[PrunedTokenCounts], seconds: float) -> None:
        """Count one batch that took `seconds` to generate."""
        self.seconds += seconds
        for count in counts:
            self.samples += 1
            self.output_tokens += count.output_tokens or 0
            self.input_tokens += count.input_tokens or 0
            if count.visual_tokens:
                self.with_image += 1
                self.visual_tokens += count.visual_tokens
                self.avg_visual_tokens += count.avg_visual_tokens

    def averages(self) -> dict[str, float]:
        """Per sample, over the samples with an image where visual tokens are meant."""
        images, samples = max(1, self.with_image), max(1, self.samples)
        return {
            "original_visual_tokens": self.visual_tokens / images,
            "visual_tokens_per_layer": self.avg_visual_tokens / images,
            "input_tokens": self.input_tokens / samples,
        }


def provenance(device: torch.device) -> dict[str, str]:
    """Versions and device of this run; the harness records neither."""
    names = ("lmms-prune", "lmms-eval", "torch", "transformers")
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})"
    return {**{name: version(name) for name in names}, "device": where}
