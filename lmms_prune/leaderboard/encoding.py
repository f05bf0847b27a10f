"""`Samples` as bytes, for the cache: a line of JSON, then the arrays. Reading them runs no code, unlike pickle."""

from __future__ import annotations

import json
from dataclasses import astuple, fields
from typing import Any

import numpy as np

from lmms_prune.leaderboard.samples import Samples, Stamp
from lmms_prune.record.accounting import TokenTotals

# Arrays of whole numbers are stored in the first of these types that holds them all.
_WHOLE = ("u1", "u2", "u4", "i8")


def encoded(samples: Samples, version: str) -> bytes:
    """Return samples as bytes.

    Args:
        samples: what was read of one file.
        version: of the code that read it.
    """
    values = {item.name: getattr(samples, item.name) for item in fields(samples)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    parts = [(name, _narrow(array)) for name, array in arrays.items()]
    header = {
        **{name: value for name, value in values.items() if name not in arrays},
        "accounting": None if samples.accounting is None else astuple(samples.accounting),
        "extras": dict(samples.extras),
        "stamp": list(samples.stamp),
        "version": version,
        "arrays": [
            [name, part.dtype.str, len(part), arrays[name].dtype.str, len(arrays[name])] for name, part in parts
        ],
    }
    return b"".join([json.dumps(header).encode(), b"\n", *(part.tobytes() for _, part in parts)])


def decoded(content: memoryview, stamp: Stamp, version: str) -> Samples | None:
    """Return the samples of `encoded`; None if they are of another state of the file, or of another version."""
    end = bytes(content[: 2**16]).index(b"\n")
    header: dict[str, Any] = json.loads(bytes(content[:end]))
    if header.pop("version") != version or Stamp(*header.pop("stamp")) != stamp:
        return None
    arrays: dict[str, Any] = {}
    start = end + 1
    for name, stored, count, dtype, length in header.pop("arrays"):
        part = np.frombuffer(content, stored, count, start)
        start += part.nbytes
        # One value stands for an array in which all are alike.
        arrays[name] = part.astype(dtype) if count == length else np.full(length, part[0], dtype)
    totals = header.pop("accounting")
    return Samples(**header, **arrays, accounting=None if totals is None else TokenTotals(*totals), stamp=stamp)


def _narrow(array: np.ndarray) -> np.ndarray:
    """Return the same values in fewer bytes: one value if all have the same bits, else a smaller type of whole numbers."""
    if len(array) > 1 and array.tobytes() == array[:1].tobytes() * len(array):
        return array[:1]
    if array.dtype.kind != "i" or not len(array):
        return array
    low, high = int(array.min()), int(array.max())
    dtype = next(name for name in _WHOLE if np.iinfo(name).min <= low and high <= np.iinfo(name).max)
    return array.astype(dtype)
