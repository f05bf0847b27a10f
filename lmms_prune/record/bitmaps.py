"""Token bitmaps: which visual tokens a stage keeps, as a short text for result files. Without torch."""

from __future__ import annotations

from base64 import b64decode, b64encode
from binascii import Error

import numpy as np
from jaxtyping import Bool


def encode(kept: Bool[np.ndarray, "rows columns"]) -> str:
    """Encode which visual tokens of one image are kept, as the base64 text of a bitmap.

    Tokens go row by row from the top left; a set bit marks a kept token. The first token is the highest bit of the first
    byte, and the last byte is filled up with zeros (``numpy.packbits``). 576 tokens take 96 characters.
    """
    return b64encode(np.packbits(kept).tobytes()).decode("ascii")


def decode(text: str, grid: tuple[int, int]) -> Bool[np.ndarray, "rows columns"]:
    """Decode the text of `encode` to the mask of kept tokens.

    Args:
        text: the result of `encode`.
        grid: rows and columns of the image's visual tokens.

    Raises:
        ValueError: the text is not a bitmap of that many tokens.
    """
    rows, columns = grid
    try:
        packed = np.frombuffer(b64decode(text, validate=True), np.uint8)
    except Error as error:
        raise ValueError(f"'{text}' is not base64 ({error}).") from error
    if len(packed) != -(-rows * columns // 8):
        raise ValueError(
            f"'{text}' holds {len(packed)} bytes, which is not a bitmap of {rows} × {columns} visual tokens."
        )
    return np.unpackbits(packed, count=rows * columns).reshape(rows, columns).astype(bool)
