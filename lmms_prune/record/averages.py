"""Average cost of samples, for a run and each of its tasks, as stored in the results. Without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lmms_prune.record.accounting import PARTS, TokenAccounting, TokenTotals, count, number


@dataclass(frozen=True)
class Averages:
    """Average cost of a sample.

    Args:
        original_visual_tokens: over the samples with an image.
        avg_visual_tokens: visual tokens, average over the decoder's layers and the samples with an image.
        input_tokens: over all samples, as the rest.
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
        """The averages of some samples."""
        totals = TokenTotals.of(samples)
        inputs = sum(sample.input_tokens for sample in samples) / max(1, len(samples))
        return cls(totals.original_visual_tokens, totals.avg_visual_tokens, inputs, **totals.costs())

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Averages:
        """What `written` has made of it, now or before; what was not counted then is 0."""
        return cls(**{one.name: number(entry, one.name, 0.0) for one in fields(cls)})


@dataclass(frozen=True)
class TaskAverages(Averages):
    """Average cost of a sample of one task, in total and by layer.

    Args:
        samples: how many were answered. with_image: how many of them have visual tokens.
        text_tokens: of the prompt, over all samples, as all that follows.
        layer_visual_tokens: in each decoder layer. layer_tokens: with the text.
        recycled_visual_tokens: after each stage.
        layer_kv_mib: of each layer.
        computed_tokens: that a layer processed, padding included.
        padding: the share of the executed tokens that were no sample's own.
        cache_mib: the cache as it was, padding included.
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
        """The sums behind the averages, for where no samples were logged."""
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
        """The averages of one task's samples.

        Args:
            samples: at least one.
            computed: tokens that were executed for each, over all layers, padding included.
            cached: bytes that the prefill left in the cache for each, padding included.
        """
        sample_count, executed = len(samples), sum(computed)
        text = sum(sample.text_tokens for sample in samples) / sample_count
        visual = _means([sample.layer_visual_tokens for sample in samples])
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
            padding=1 - (text * len(visual) + sum(visual)) * sample_count / executed,
            cache_mib=sum(cached) / sample_count / 2**20,
        )

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> TaskAverages:
        """What `written` has made of it, now or before.

        Records of before do not say how many samples had an image, nor what these had before the first layer: there
        every sample counts, and the first layer stands for the original.
        """
        samples, visual = count(entry, "samples"), _floats(entry, "layer_visual_tokens")
        with_image = count(entry, "with_image", samples)
        if "with_image" not in entry:
            entry = {**entry, "original_visual_tokens": visual[0], "avg_visual_tokens": sum(visual) / len(visual)}
        number(entry, "kv_mib")  # which all have had
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
    """Averages over the samples' lists, entry by entry."""
    return tuple(sum(values) / len(samples) for values in zip(*samples, strict=True))


def _floats(entry: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return tuple(map(float, entry.get(name, ())))
