"""Tensor functions that never make the host wait for the device, and the finest type that it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def to_device(values: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on `device`, without waiting for it; a tensor that lies there already is returned.

    Args:
        values: a (nested) list of numbers, or a tensor on the host.
        device: where to.
        dtype: of the result; by default that of `values`.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda" and host.device.type == "cpu":
        # From memory that is not pinned the driver may finish all queued work first, whatever non_blocking says.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def is_finite(x: Float[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
    """Which numbers are neither infinite nor NaN: only a finite number times zero is zero. Half the launches of ``isfinite``."""
    return x * 0 == 0


def finest(device: torch.device) -> torch.dtype:
    """The finest floating type of a device; Apple GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
