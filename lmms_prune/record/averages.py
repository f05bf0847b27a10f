"""Average cost of a sample, for a run and for each of its tasks, as stored in the results. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lmms_prune.record.accounting import PARTS, TokenAccounting, TokenTotals, count, number


@dataclass(frozen=True)
class Averages:
    """Average cost of a sample.

    Args:
        original_visual_tokens: original visual tokens, averaged over the samples with an image.
        avg_visual_tokens: visual tokens, averaged over the decoder's layers and the samples with an image.
        input_tokens: tokens of the prompt. This and all fields below are averaged over all samples.
        kv_mib: size of the KV cache after the prefill.
        encoder_tflops, selection_tflops, prefill_tflops, decode_tflops: see `TokenAccounting`.
    """

    original_visual_tokens: float
    avg_visual_tokens: float
    input_tokens: float
    kv_mib: float
    encoder_tflops: float
    selection_tflops: float
    prefill_tflops: float
    decode_tflops: float

    @classmethod
    def of(cls, samples: Sequence[TokenAccounting]) -> Averages:
        """Average the accounting of samples."""
        totals = TokenTotals.of(samples)
        inputs = sum(sample.input_tokens for sample in samples) / max(1, len(samples))
        return cls(totals.original_visual_tokens, totals.avg_visual_tokens, inputs, **totals.costs())

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Averages:
        """Read what `written` wrote, also in older versions; fields that these did not count are 0."""
        return cls(**{item.name: number(entry, item.name, 0.0) for item in fields(cls)})


@dataclass(frozen=True)
class TaskAverages(Averages):
    """Average cost of a sample of one task, in total and by layer.

    Args:
        samples: number of answered samples.
        with_image: number of samples that have visual tokens.
        text_tokens: text tokens of the prompt. This and all fields below are averaged over all samples.
        layer_visual_tokens: visual tokens in each decoder layer.
        layer_tokens: visual and text tokens in each decoder layer.
        recycled_visual_tokens: kept tokens that contain states of other tokens, after each stage.
        layer_kv_mib: size of each layer's KV cache after the prefill.
        computed_tokens: tokens that a layer processed, padding included.
        padding: share of the executed tokens that are padding.
        cache_mib: size of the allocated KV cache, padding included.
    """

    samples: int
    with_image: int
    text_tokens: float
    layer_visual_tokens: tuple[float, ...]
    layer_tokens: tuple[float, ...]
    recycled_visual_tokens: tuple[float, ...]
    layer_kv_mib: tuple[float, ...]
    computed_tokens: float
    padding: float
    cache_mib: float

    @property
    def totals(self) -> TokenTotals:
        """The sums behind the averages, used when no samples were logged."""
        samples, with_image = float(self.samples), float(self.with_image)
        return TokenTotals(
            samples,
            with_image,
            self.original_visual_tokens * with_image,
            self.avg_visual_tokens * with_image,
            self.kv_mib * 2**20 * samples,
            *(getattr(self, f"{part}_tflops") * 1e12 * samples for part in PARTS),
        )

    @classmethod
    def of_task(
        cls, samples: Sequence[TokenAccounting], computed: Sequence[int], cached: Sequence[int]
    ) -> TaskAverages:
        """Average the accounting of one task's samples.

        Args:
            samples: at least one.
            computed: executed tokens of each sample, summed over all layers, padding included.
            cached: bytes in the cache after the prefill for each sample, padding included.
        """
        sample_count, executed = len(samples), sum(computed)
        text = sum(sample.text_tokens for sample in samples) / sample_count
        visual = _means([sample.layer_visual_tokens for sample in samples])
        # Of whole numbers: a mean's rounding would make no padding slightly negative, which no reader takes.
        tokens = sum(sample.text_tokens * len(visual) + sum(sample.layer_visual_tokens) for sample in samples)
        return cls(
            **asdict(Averages.of(samples)),
            samples=sample_count,
            with_image=sum(sample.visual_tokens > 0 for sample in samples),
            text_tokens=text,
            layer_visual_tokens=visual,
            layer_tokens=tuple(text + tokens for tokens in visual),
            recycled_visual_tokens=_means([sample.recycled_visual_tokens for sample in samples]),
            layer_kv_mib=tuple(size / 2**20 for size in _means([sample.layer_kv_bytes for sample in samples])),
            computed_tokens=executed / sample_count / len(visual),
            padding=(executed - tokens) / executed,
            cache_mib=sum(cached) / sample_count / 2**20,
        )

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> TaskAverages:
        """Read what `written` wrote, also in older versions.

        Older records lack the number of samples with an image and the original number of visual tokens. For them every
        sample counts as one with an image, and the first layer's visual tokens count as the original ones.
        """
        samples, visual = count(entry, "samples"), _floats(entry, "layer_visual_tokens")
        with_image = count(entry, "with_image", samples)
        if "with_image" not in entry:
            entry = {**entry, "original_visual_tokens": visual[0], "avg_visual_tokens": sum(visual) / len(visual)}
        number(entry, "kv_mib")  # required: every version has recorded it
        lists = ("layer_tokens", "recycled_visual_tokens", "layer_kv_mib")
        rest: dict[str, Any] = {name: _floats(entry, name) for name in lists}
        rest |= {name: number(entry, name, 0.0) for name in ("text_tokens", "computed_tokens", "padding", "cache_mib")}
        return cls(
            **asdict(Averages.read(entry)),
            samples=samples,
            with_image=with_image,
            layer_visual_tokens=visual,
            **rest,
        )


def _means(samples: Sequence[Sequence[int]]) -> tuple[float, ...]:
    """Average the samples' lists entry by entry."""
    return tuple(sum(values) / len(samples) for values in zip(*samples, strict=True))


def _floats(entry: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(map(float, entry.get(name, ())))
