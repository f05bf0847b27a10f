"""Token accounting: what one sample cost in tokens, bytes and FLOPs. Without torch.

Each line of a samples file holds one `TokenAccounting` in ``token_counts[0]``; only this module writes and reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from math import inf
from typing import Any

PARTS = ("encoder", "selection", "prefill", "decode")
"""Parts of the work whose FLOPs are counted: a sample has the field ``PART_flops``, an average ``PART_tflops``."""

OLD_NAMES = {
    "encoder_flops": "tower_flops",
    "encoder_tflops": "tower_tflops",
    "token_bitmaps": "kept_places",
    "avg_visual_tokens": "visual_tokens_per_layer",  # in the averages of a run
}
"""Field names in older files: still read, no longer written."""


@dataclass(frozen=True)
class TokenAccounting:
    """Executed cost of one sample's own tokens. Padding is excluded, except in `selection_flops`.

    Args:
        input_tokens, output_tokens: tokens of the prompt and of the answer, as lmms-eval counts them.
        visual_tokens: original visual tokens of the sample's images.
        avg_visual_tokens: visual tokens, averaged over the decoder's layers.
        text_tokens: all other tokens of the prompt.
        kept_visual_tokens: visual tokens kept after each stage.
        recycled_visual_tokens: kept tokens that contain states of other tokens, by stage.
        layer_visual_tokens: visual tokens in each decoder layer.
        visual_grids: rows and columns of each image's visual tokens; an image in tiles has two, its base and its canvas.
        grid_boxes: for each of these grids the number of its image, and the part of the grid that shows it: first row and
            column, height and width. Empty where each image is one grid that it fills.
        token_bitmaps: for each stage and image, which of the original visual tokens are kept, as
            `lmms_prune.record.bitmaps` writes them. A token into which others were merged, pooled or resized counts
            at its own raster index; a class token has none and is left out.
        kv_bytes: bytes of the keys and values in the cache after the prefill, over all layers.
        layer_kv_bytes: the same bytes for each layer.
        encoder_flops: FLOPs of the vision encoder and the projector.
        selection_flops: FLOPs of the methods' selection, auxiliary models included; the sample's share of its batch.
        prefill_flops: FLOPs of the decoder's prefill.
        decode_flops: FLOPs of the decode steps.
    """

    input_tokens: int
    output_tokens: int
    visual_tokens: int
    avg_visual_tokens: float
    text_tokens: int
    kept_visual_tokens: tuple[int, ...]
    recycled_visual_tokens: tuple[int, ...]
    layer_visual_tokens: tuple[int, ...]
    visual_grids: tuple[tuple[int, int], ...]
    grid_boxes: tuple[tuple[int, ...], ...]
    token_bitmaps: tuple[tuple[str, ...], ...]
    kv_bytes: int
    layer_kv_bytes: tuple[int, ...]
    encoder_flops: int
    selection_flops: int
    prefill_flops: int
    decode_flops: int

    @property
    def unpruned(self) -> bool:
        """Whether the sample has an image, and all its visual tokens passed all stages unchanged."""
        kept = self.kept_visual_tokens
        everything = bool(self.visual_tokens and kept) and kept[-1] == self.visual_tokens
        return everything and not any(self.recycled_visual_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Return the accounting as stored in a samples file; lmms-eval calls this method by name."""
        return written(self)

    @classmethod
    def read(cls, entry: Any) -> TokenAccounting | None:
        """Read what `to_dict` wrote.

        Entries of older versions, with `OLD_NAMES`, are read too; fields that these did not count are 0 or empty.

        Returns:
            None if the entry has no accounting of lmms-prune: the answer came from a cache, or from another model.

        Raises:
            ValueError: a number is negative, not finite, or too large for a count.
            LookupError, OverflowError, TypeError: a field is missing or of another type.
        """
        if entry is not None and not isinstance(entry, Mapping):
            raise TypeError(f"token_counts is a {type(entry).__name__}, but must be an object")
        if not entry or "avg_visual_tokens" not in entry:
            return None
        boxes = tuple(_counts("grid_boxes", box) for box in entry.get("grid_boxes", ()))
        grids, bitmaps = entry.get("visual_grids", ()), _field(entry, "token_bitmaps", ())
        names = ("kept_visual_tokens", "recycled_visual_tokens", "layer_visual_tokens", "layer_kv_bytes")
        counts: dict[str, Any] = {name: _counts(name, entry.get(name, ())) for name in names}
        counts |= {f"{part}_flops": count(entry, f"{part}_flops", 0) for part in PARTS}
        return cls(
            input_tokens=count(entry, "input_tokens", 0),
            output_tokens=count(entry, "output_tokens", 0),
            visual_tokens=count(entry, "visual_tokens"),
            avg_visual_tokens=number(entry, "avg_visual_tokens"),
            text_tokens=count(entry, "text_tokens", 0),
            visual_grids=tuple((rows, columns) for rows, columns in (_counts("visual_grids", grid) for grid in grids)),
            grid_boxes=boxes,
            token_bitmaps=tuple(tuple(str(text) for text in images) for images in bitmaps),
            kv_bytes=count(entry, "kv_bytes"),
            **counts,
        )


@dataclass(frozen=True)
class TokenTotals:
    """Token accounting summed over samples, so that tasks and seeds can be added.

    Args:
        samples: number of samples.
        with_image: number of samples that have visual tokens.
        visual_tokens: original visual tokens.
        layer_averages: sum of the samples' `avg_visual_tokens`, over the samples with an image.
        kv_bytes, encoder_flops, selection_flops, prefill_flops, decode_flops: see `TokenAccounting`.
    """

    samples: float = 0.0
    with_image: float = 0.0
    visual_tokens: float = 0.0
    layer_averages: float = 0.0
    kv_bytes: float = 0.0
    encoder_flops: float = 0.0
    selection_flops: float = 0.0
    prefill_flops: float = 0.0
    decode_flops: float = 0.0

    def __add__(self, other: TokenTotals) -> TokenTotals:
        return TokenTotals(*(getattr(self, item.name) + getattr(other, item.name) for item in fields(TokenTotals)))

    @property
    def original_visual_tokens(self) -> float:
        """Average number of original visual tokens of a sample with an image."""
        return self.visual_tokens / max(1.0, self.with_image)

    @property
    def avg_visual_tokens(self) -> float:
        """Measured budget: visual tokens, averaged over the decoder's layers and the samples with an image."""
        return self.layer_averages / max(1.0, self.with_image)

    def costs(self) -> dict[str, float]:
        """Return the average MiB and TFLOPs of a sample, under the field names of `Averages`."""
        samples = max(1.0, self.samples)
        flops = {f"{part}_tflops": getattr(self, f"{part}_flops") / samples / 1e12 for part in PARTS}
        return {"kv_mib": self.kv_bytes / samples / 2**20, **flops}

    @classmethod
    def of(cls, samples: Iterable[TokenAccounting]) -> TokenTotals:
        """Sum the accounting of samples."""
        # Imported here, because commands that only write or print records need not wait for it.
        import numpy as np

        rows = [
            (
                1.0,
                float(sample.visual_tokens > 0),
                sample.visual_tokens,
                sample.avg_visual_tokens if sample.visual_tokens else 0.0,
                sample.kv_bytes,
                *(getattr(sample, f"{part}_flops") for part in PARTS),
            )
            for sample in samples
        ]
        return cls(*np.array(rows, float).sum(axis=0).tolist()) if rows else cls()


_LARGEST = 1e300  # what is larger may be no float
_MOST = 2**63  # counts below it can be multiplied and squared as floats


def written(value: Any) -> Any:
    """Convert a record to JSON types: a mapping of its fields, with lists for tuples."""
    if is_dataclass(value):
        return {item.name: written(getattr(value, item.name)) for item in fields(value)}
    return [written(part) for part in value] if isinstance(value, tuple) else value


def _field(entry: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return a field by its name or its older name."""
    return entry[name] if name in entry else entry.get(OLD_NAMES.get(name, name), default)


def _counts(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """Read whole numbers of at least 0."""
    counts = tuple(map(int, values))
    if counts and not (min(counts) >= 0 and max(counts) < _MOST):
        raise ValueError(f"{name}: a count is negative or too large; allowed is 0 to 2**63 - 1")
    return counts


def count(entry: Mapping[str, Any], name: str, default: Any = None) -> int:
    """Read a field that is a whole number of at least 0; it is required unless there is a default."""
    return int(_checked(entry, name, default))


def number(entry: Mapping[str, Any], name: str, default: Any = None) -> float:
    """Read a field that is a number of at least 0; it is required unless there is a default."""
    return float(_checked(entry, name, default))


def _checked(entry: Mapping[str, Any], name: str, default: Any) -> Any:
    value: Any = entry.get(name)
    if type(value) in (float, int) and 0 <= value < _LARGEST:
        return value  # nearly every field of the millions that a leaderboard reads
    value = _field(entry, name, default)
    if value is None:
        raise KeyError(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: {value!r} is not a number")
    if not 0 <= float(value) < inf:
        raise ValueError(f"{name}: {float(value):g}, but must be finite and at least 0")
    return value
