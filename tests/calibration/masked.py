"""Shared by these tests: tiny models with prompts, and models whose visual tokens are masked layer by layer.

A key that no query sees is as good as deleted for everyone else, and positions stay as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import Family, noise
from torch import Tensor

QUESTIONS = ("is there a dog", "what colour is the square", "read the text", "how many", "is the circle left of it")


@dataclass
class Searched:
    """One family's model in float64 under SDPA, the same under eager attention, and five prompts of one row."""

    name: str
    sdpa: Family
    eager: Family
    prompts: list[dict[str, torch.Tensor]] = field(repr=False)

    @property
    def model(self) -> Any:
        return self.sdpa.model


def picture(number: int) -> Any:
    """Noise; where image sizes count, all differ."""
    return noise(number, 112 + 28 * (number % 3), 84 + 28 * number)


Rows = list[list[list[float]]]
"""Attention as [head][query][key]."""


def columns(searched: Searched, prompt: dict[str, Tensor]) -> tuple[list[int], list[int]]:
    """The columns of the visual tokens, and of the text after them."""
    ids = prompt["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(ids) if token == searched.model.config.image_token_id]
    assert visual == list(range(visual[0], visual[-1] + 1))
    return visual, list(range(visual[-1] + 1, len(ids)))


@contextmanager
def masked(
    searched: Searched, gone: Callable[[int], set[int]], see: Callable[[int, Rows], Any] | None
) -> Iterator[Any]:
    """The eager model; layer i does not see the keys `gone(i)`, and `see(i, attention)` is called with its attention."""
    handles = []

    def blind(layer: int) -> Callable[..., tuple[tuple, dict]]:
        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            length = args[0].shape[1]
            allowed = torch.ones(length, length, dtype=torch.bool).tril()
            # A masked token sees only itself: no other token sees it, and an empty row would be NaN after the softmax.
            allowed[:, sorted(gone(layer))] = False
            allowed |= torch.eye(length, dtype=torch.bool)
            # The lowest float64 would overflow in the library's float32 softmax.
            mask = torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~allowed, -1e30)
            return args, {**kwargs, "attention_mask": mask}

        return hook

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, kwargs: dict, output: tuple) -> None:
            if see is not None:
                see(layer, output[1][0].tolist())

        return hook

    for i, module in enumerate(searched.eager.model.model.language_model.layers):
        handles.append(module.register_forward_pre_hook(blind(i), with_kwargs=True))
        handles.append(module.self_attn.register_forward_hook(watch(i), with_kwargs=True))
    try:
        with torch.no_grad():
            yield searched.eager.model
    finally:
        for handle in handles:
            handle.remove()
