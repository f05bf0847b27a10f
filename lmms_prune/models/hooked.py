"""Hooks that are on for the length of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Inside, the hooks are on; afterwards none is left, whatever happened, also while they were put on.

    Args:
        handles: what ``register_forward_hook`` and its kin return; a generator that registers one hook after the other
            leaves none behind either where a later one fails.
    """
    kept = []
    try:
        for handle in handles:
            kept.append(handle)
        yield
    finally:
        for handle in kept:
            handle.remove()
