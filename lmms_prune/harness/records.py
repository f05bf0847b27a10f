"""What a run leaves in the harness's results: a ledger in every sample, averages and provenance in every run."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from lmms_eval.api.instance import TokenCounts
from torch import Tensor

from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.harness.checkout import code_state
from lmms_prune.harness.fingerprint import code
from lmms_prune.models.sizes import Architecture
from lmms_prune.pruning.trace import RowTrace
from lmms_prune.record.bitmaps import encode


@dataclass
class PrunedTokenCounts(TokenCounts):
    """The harness's token counts with the ledger; lands in every line of the samples file.

    Args:
        visual_tokens: original visual tokens of the sample's images.
        kept_visual_tokens: visual tokens left after each stage.
        recycled_visual_tokens: those of them that hold what the stage's method kept of others.
        avg_visual_tokens: average visual tokens per decoder layer.
        visual_grids: rows and columns of each image's visual tokens.
        kept_places: for each stage and image, which of the original visual tokens go on, as `lmms_prune.record.bitmaps` writes
            them. A token into which others were merged, pooled or resized counts at the place where it stands; a
            class token, which has no place in the image, is left out.
        layer_visual_tokens: visual tokens in each decoder layer, as executed.
        text_tokens: all other tokens of the prompt, padding excluded.
        kv_bytes: keys and values of the row's own tokens that the prefill left in the cache, all layers.
        layer_kv_bytes: the same of each layer.
        tower_flops: of the vision encoder and the projector on the sample's images.
        selection_flops: of the methods that chose, their second models included: the sample's part of its batch,
            padding included.
        prefill_flops: of the decoder over the row's own tokens, padding excluded.
        decode_flops: of the passes after the prefill.
    """

    visual_tokens: int = 0
    kept_visual_tokens: list[int] = field(default_factory=list)
    recycled_visual_tokens: list[int] = field(default_factory=list)
    avg_visual_tokens: float = 0.0
    visual_grids: list[list[int]] = field(default_factory=list)
    kept_places: list[list[str]] = field(default_factory=list)
    layer_visual_tokens: list[int] = field(default_factory=list)
    text_tokens: int = 0
    kv_bytes: int = 0
    layer_kv_bytes: list[int] = field(default_factory=list)
    tower_flops: int = 0
    selection_flops: int = 0
    prefill_flops: int = 0
    decode_flops: int = 0

    @property
    def unpruned(self) -> bool:
        """Whether the sample has an image and every visual token went through all stages as it was."""
        kept = self.kept_visual_tokens
        return (
            bool(self.visual_tokens and kept)
            and kept[-1] == self.visual_tokens
            and not any(self.recycled_visual_tokens)
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def of(
        cls,
        row: RowTrace,
        grids: Sequence[tuple[int, int]],
        model: Architecture,
        input_tokens: int,
        output_tokens: int,
    ) -> PrunedTokenCounts:
        """The ledger of one executed row, whose images have `grids` of visual tokens and whose masks are on the CPU."""
        lengths = [row.text_tokens + visual for visual in row.visual]
        # Where a method made earlier layers forget, they hold what a later layer had.
        held = [int(size) for size in kv_bytes(model, [lengths[row.computed.index(n)] for n in row.cached])]
        return cls(
            input_tokens,
            output_tokens,
            None,
            row.visual_tokens,
            [sum(images) for images in row.kept],
            [sum(images) for images in row.recycled],
            row.avg_visual_tokens,
            [list(grid) for grid in grids],
            [[encode(_grid(mask, grid)) for mask, grid in zip(masks, grids, strict=True)] for masks in row.masks],
            list(row.visual),
            row.text_tokens,
            sum(held),
            held,
            sum(encoder_flops(model.encoder, grid) for grid in grids),
            round(row.selection_flops or 0),
            int(prefill_flops(model, lengths)),
            # The prefill gives the first new token.
            int(decode_flops(model, lengths, max(0, output_tokens - 1))),
        )


def _grid(mask: Bool[Tensor, " V"], grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """One image's mask in rows and columns, without the class token that may stand before them."""
    return mask[len(mask) - grid[0] * grid[1] :].numpy().reshape(grid)


@dataclass(frozen=True)
class Answer:
    """One answered sample, with what it took.

    Args:
        text: the answer.
        counts: its ledger.
        computed: tokens that were executed for it, over all layers, padding included.
        cached: bytes that the prefill left in the cache for it, padding included.
        rows: of the batch in which it was answered.
        seconds: its share of that batch's generation.
    """

    text: str
    counts: PrunedTokenCounts
    computed: int
    cached: int
    rows: int
    seconds: float


@dataclass
class RunTotals:
    """Sums over the samples of one process."""

    samples: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    with_image: int = 0
    unpruned: int = 0  # of the samples with an image, those that lost no token
    visual_tokens: int = 0
    avg_visual_tokens: float = 0.0
    input_tokens: int = 0
    tasks: dict[str, list[PrunedTokenCounts]] = field(default_factory=dict)
    computed: dict[str, list[int]] = field(default_factory=dict)
    cached: dict[str, list[int]] = field(default_factory=dict)
    largest_batch: int = 0
    resumed: int = 0  # of the samples, those whose answers an earlier process left in the journal

    def add(self, task: str, answer: Answer) -> None:
        """Count one sample, whether it was answered now or comes from the journal."""
        count = answer.counts
        self.seconds += answer.seconds
        self.largest_batch = max(self.largest_batch, answer.rows)
        self.cached.setdefault(task, []).append(answer.cached)
        self.samples += 1
        self.tasks.setdefault(task, []).append(count)
        self.computed.setdefault(task, []).append(answer.computed)
        self.output_tokens += count.output_tokens or 0
        self.input_tokens += count.input_tokens or 0
        if count.visual_tokens:
            self.with_image += 1
            self.unpruned += count.unpruned
            self.visual_tokens += count.visual_tokens
            self.avg_visual_tokens += count.avg_visual_tokens

    def averages(self) -> dict[str, float]:
        """Per sample, over the samples with an image where visual tokens are meant."""
        images, samples = max(1, self.with_image), max(1, self.samples)
        return {
            "original_visual_tokens": self.visual_tokens / images,
            "visual_tokens_per_layer": self.avg_visual_tokens / images,
            "input_tokens": self.input_tokens / samples,
            **self.costs([count for counts in self.tasks.values() for count in counts]),
        }

    @staticmethod
    def costs(counts: list[PrunedTokenCounts]) -> dict[str, float]:
        """Average bytes and FLOPs of a sample."""
        many = max(1, len(counts))
        return {
            "kv_mib": sum(count.kv_bytes for count in counts) / many / 2**20,
            **{
                f"{part}_tflops": sum(getattr(count, f"{part}_flops") for count in counts) / many / 1e12
                for part in ("tower", "selection", "prefill", "decode")
            },
        }

    def by_task(self) -> dict[str, dict[str, Any]]:
        """Each task's averages over its samples, layer by layer where layers differ."""
        made = {}
        for task, counts in self.tasks.items():
            many = len(counts)
            layers = _means([count.layer_visual_tokens for count in counts])
            text = sum(count.text_tokens for count in counts) / many
            made[task] = {
                "samples": many,
                "text_tokens": text,
                "layer_visual_tokens": layers,
                "layer_tokens": [text + visual for visual in layers],
                "avg_visual_tokens": sum(layers) / len(layers),
                "recycled_visual_tokens": _means([count.recycled_visual_tokens for count in counts]),
                "layer_kv_mib": [size / 2**20 for size in _means([count.layer_kv_bytes for count in counts])],
                "computed_tokens": sum(self.computed[task]) / many / len(layers),  # of a layer, padding included
                # What padding added: the share of the executed tokens that were no sample's own.
                "padding": 1 - (text * len(layers) + sum(layers)) * many / sum(self.computed[task]),
                "cache_mib": sum(self.cached[task]) / many / 2**20,  # padding included
                **self.costs(counts),
            }
        return made


def _means(samples: list[list[int]]) -> list[float]:
    """Averages over the samples' lists, place by place."""
    return [sum(values) / len(samples) for values in zip(*samples, strict=True)]


def provenance(model: Any, device: torch.device) -> dict[str, str]:
    """Versions, code (a digest, and the commit of a checkout), device, attention kernel and dtype of this run; the harness records none of them."""
    names = ("lmms-prune", "lmms-eval", "torch", "transformers")
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else f"{device.type} ({platform.machine()})"
    commit = code_state()
    return {
        **{name: version(name) for name in names},
        "code": code(),
        **({} if commit is None else {"commit": commit}),
        "device": where,
        "attention": str(model.config._attn_implementation),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
