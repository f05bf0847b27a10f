"""The sizes of a model from which its cost is computed. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lmms_prune.models.family import Family


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes of a vision encoder and of its projector.

    Args:
        layers, hidden, heads, intermediate: of its blocks.
        patch: values (channels x pixels x frames) in one patch.
        matrices: matrices of a block's MLP: 2, or 3 if it is gated.
        full: blocks that attend over the whole image; the others attend in windows.
        window: side of a window in visual tokens; 0 without windows.
        merge: side of the square of patches that become one visual token.
        class_tokens: class tokens before an image's patches.
        projector: input and output widths of the matrices after the encoder, for each visual token.
        tile: side, in visual tokens, of the tiles that are encoded one by one; 0 where an image is encoded whole.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    patch: int
    matrices: int
    full: tuple[int, ...]
    window: int
    merge: int
    class_tokens: int
    projector: tuple[tuple[int, int], ...]
    tile: int = 0


@dataclass(frozen=True)
class Architecture:
    """Sizes of a decoder and its vision encoder.

    Args:
        name: the name or path by which it was requested.
        family: its model family.
        layers, hidden, heads, kv_heads, head_dim, intermediate, vocabulary: of the decoder.
        encoder: sizes of the vision encoder.
        tokens_per_image: visual tokens of every image; None where images differ in size.
        bytes_per_number: bytes per value of the cache: 4 in float32, 2 in 16-bit.
        tied: whether embeddings and output matrix are one matrix.
    """

    name: str
    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    encoder: EncoderSizes
    tokens_per_image: int | None
    bytes_per_number: int = 2
    tied: bool = False

    def in_dtype(self, dtype: str) -> Architecture:
        """The same where the model is loaded in `dtype`: "float32", "float16", "bfloat16", or "auto", the checkpoint's."""
        return self if dtype == "auto" else replace(self, bytes_per_number=4 if dtype == "float32" else 2)

    @property
    def example_tokens(self) -> int:
        """Visual tokens of an image in estimates: those of every image, or of the family's example."""
        rows, columns = self.family.example
        return self.tokens_per_image or rows * columns


class ArchitectureError(ValueError):
    """An unknown architecture, a configuration of another family, or an invalid size."""


_OPTIONAL = ("num_key_value_heads", "head_dim")  # if null or absent, they follow from other sizes
_MOST, _MOST_LAYERS = 10**7, 10**4  # larger numbers are mistakes, and would take long to compute with


def stated_sizes(defaults: Mapping[str, Any], stated: Any, where: str) -> dict[str, Any]:
    """The sizes that a configuration states, with defaults for the others.

    Raises:
        ArchitectureError: names the invalid size.
    """
    if not isinstance(stated, Mapping):
        raise ArchitectureError(f"{where} is {stated!r}; it must be an object with the model's sizes.")
    sizes = {**defaults, **stated}
    for name in dict.fromkeys((*defaults, *_OPTIONAL)):
        value = sizes.get(name)
        is_list = isinstance(defaults.get(name), tuple)
        numbers = value if is_list and isinstance(value, (list, tuple)) else [value]
        high = _MOST_LAYERS if name in ("num_hidden_layers", "depth") else _MOST
        valid = all(type(number) is int and (0 if is_list else 1) <= number < high for number in numbers)
        if not valid and not (name in _OPTIONAL and value is None):
            kind = "a list of whole numbers" if is_list else "a whole number from 1"
            raise ArchitectureError(f"{where}.{name} is {value!r}; it must be {kind}.")
    return sizes


def bytes_per_number(config: Mapping[str, Any]) -> int:
    """Bytes per value in the checkpoint's default dtype (``dtype``; ``torch_dtype`` in older configurations)."""
    return 4 if "float32" in str(config.get("dtype") or config.get("torch_dtype")) else 2


def decoder_sizes(
    family: Family,
    text: Mapping[str, Any],
    name: str,
    encoder: EncoderSizes,
    tokens_per_image: int | None,
    bytes_per_number: int,
) -> Architecture:
    """The architecture of a decoder whose configuration uses the usual names of sizes."""
    heads = text["num_attention_heads"]
    return Architecture(
        name=name,
        family=family,
        layers=text["num_hidden_layers"],
        hidden=text["hidden_size"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        encoder=encoder,
        tokens_per_image=tokens_per_image,
        bytes_per_number=bytes_per_number,
    )
