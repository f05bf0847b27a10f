"""Operations of bitsandbytes 0.49 to 0.50: what the quantised layers compute, for counts of FLOPs. Imports no bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any


def _packed(activations: Any, packed: Any, shape: Any, *_: Any, **__: Any) -> int:
    # The packed weights have another shape than the matrix (rows, columns) that they stand for.
    return 2 * prod(activations.shape) * int(shape[0])


def _rows(activations: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(activations.shape) * int(matrix.shape[0])


def _mixed(activations: Any, quantised: Any, matrix: Any, *_: Any, **__: Any) -> int:
    return _rows(activations, matrix)


PRODUCTS: Mapping[str, Callable[..., int]] = {
    "bitsandbytes::gemv_4bit": _packed,
    "bitsandbytes::gemm_4bit": _packed,
    "bitsandbytes::int8_mixed_scaled_mm": _mixed,
    "bitsandbytes::int8_scaled_mm": _rows,
    "bitsandbytes::int8_linear_matmul": _rows,
}
"""FLOPs of a product with a quantised matrix: those of the product that it stands for. By the operation's name."""

CONVERSIONS = ("int8_mm_dequant", "dequantize_blockwise", "quantize_blockwise")
"""Operations of several floating-point tensors that only convert numbers."""
