"""Shared by the tests of merging methods: matching steps in plain Python, and the states that enter a pruned model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from observed import Observed, Tiny
from slow import Vector, dot, unit
from torch import Tensor

from lmms_prune import Trace, prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class Token:
    """One token on its way: its raster index (-1: the class token), state, metric and number of tokens."""

    index: int
    state: list[float]
    metric: list[float]
    size: float = 1.0
    salience: float = 0.0


def mean(vectors: Sequence[Vector], weights: Sequence[float]) -> list[float]:
    """The weighted mean, entry by entry."""
    total = sum(weights)
    return [sum(w * x for w, x in zip(weights, column, strict=True)) / total for column in zip(*vectors, strict=True)]


def step(
    tokens: Sequence[Token], remove: int, *, order: str = "raster", penalty: float = 0.0
) -> tuple[list[Token], float]:
    """One matching step; returns the remaining tokens and the step's margin.

    Args:
        tokens: as they stand; a class token may come first.
        remove: tokens that go.
        order: "raster" keeps the places, "evens first" puts what is left of the even places first.
        penalty: how much of a token's salience is taken off its best cosine.
    """
    if remove == 0:
        return list(tokens), math.inf
    margin, best = math.inf, {}
    units = [unit(token.metric) for token in tokens]
    for a in range(0, len(tokens), 2):
        if tokens[a].index < 0:
            continue
        likeness = {b: dot(units[a], units[b]) for b in range(1, len(tokens), 2)}
        ranked = sorted(likeness, key=lambda b: (-likeness[b], b))
        if len(ranked) > 1:
            margin = min(margin, likeness[ranked[0]] - likeness[ranked[1]])
        best[a] = (likeness[ranked[0]] - penalty * tokens[a].salience, ranked[0])
    ranked = sorted(best, key=lambda a: (-best[a][0], a))
    assert remove <= len(ranked)
    if remove < len(ranked):
        margin = min(margin, best[ranked[remove - 1]][0] - best[ranked[remove]][0])
    gone: dict[int, list[int]] = {}
    for a in ranked[:remove]:
        gone.setdefault(best[a][1], []).append(a)
    left = {}
    for span, token in enumerate(tokens):
        if span not in gone:
            left[span] = token
            continue
        group = [token, *(tokens[a] for a in gone[span])]
        sizes = [x.size for x in group]
        left[span] = replace(
            token,
            state=mean([x.state for x in group], sizes),
            metric=mean([x.metric for x in group], sizes),
            size=sum(sizes),
            salience=sum(x.salience for x in group) / len(group),
        )
    stay = [span for span in range(len(tokens)) if span not in ranked[:remove]]
    if order == "evens first":
        stay = [p for p in stay if p % 2 == 0] + [p for p in stay if p % 2 == 1]
    return [left[span] for span in stay], margin


def attended(
    module: torch.nn.Module, tokens: list[Token], heads: int, proportional: bool
) -> tuple[list[Token], Tensor]:
    """A CLIP block's attention half, head by head, and the class token's attention (t,)."""
    x = torch.tensor([token.state for token in tokens], dtype=torch.float64)
    normed = module.layer_norm1(x)
    query, key, value = (getattr(module.self_attn, f"{name}_proj")(normed) for name in "qkv")
    size = x.shape[1] // heads
    bias = torch.tensor([math.log(token.size) if proportional else 0.0 for token in tokens], dtype=torch.float64)
    parts, looks = [], []
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        weights = (query[:, part] @ key[:, part].T / math.sqrt(size) + bias).softmax(1)
        parts.append(weights @ value[:, part])
        looks.append(weights[0])
    x = x + module.self_attn.out_proj(torch.cat(parts, dim=1))
    keys = key.unflatten(1, (heads, size)).mean(1)
    left = [
        Token(token.index, state, metric, token.size)
        for token, state, metric in zip(tokens, x.tolist(), keys.tolist(), strict=True)
    ]
    return left, torch.stack(looks).mean(0)


def fed(module: torch.nn.Module, tokens: list[Token]) -> list[Token]:
    x = torch.tensor([token.state for token in tokens], dtype=torch.float64)
    x = x + module.mlp(module.layer_norm2(x))
    return [Token(t.index, state, t.metric, t.size) for t, state in zip(tokens, x.tolist(), strict=True)]


def outcome(
    tiny: Tiny, seen: Observed, schedule: str, dtype: torch.dtype = torch.float64
) -> tuple[Trace, list[Tensor]]:
    """The trace, and for each image the states (n, D) of its visual tokens that enter the last stage's layer.

    Every row holds one image.
    """
    layer = Schedule.parse(schedule).stages[-1].layer
    entering: list[Tensor] = []
    model = tiny.model(dtype)
    with torch.no_grad(), prune(model, schedule) as trace:
        # Put on after the pruning hook of the same layer, it sees what that one hands on.
        module = model.model.language_model.layers[layer]
        handle = module.register_forward_pre_hook(lambda module, args: entering.append(args[0]))
        try:
            model(**seen.inputs)
        finally:
            handle.remove()
    states = []
    for span, row in zip(seen.spans, trace.rows, strict=True):
        [count] = row.kept[-1]
        length = span.length - len(span.visual) + count
        start = entering[0].shape[1] - length + span.visual[0]
        states.append(entering[0][span.row, start : start + count])
    return trace, states


def assert_same_tokens(
    trace: Trace, states: Sequence[Tensor], want: Sequence[tuple[list[Token], float]], order: str = "raster"
) -> None:
    """Indices, states and order are those of the reference, but where it hesitated between two tokens."""
    assert len(trace.rows) == len(states) == len(want)
    close = 0
    for row, found, (tokens, margin) in zip(trace.rows, states, want, strict=True):
        if margin < 1e-6:
            close += 1
            continue
        [image] = row.indices(len(row.kept) - 1)
        assert sorted(image) == sorted(token.index for token in tokens)
        if order == "raster":
            assert [token.index for token in tokens] == sorted(token.index for token in tokens)
        expected = torch.tensor([token.state for token in tokens], dtype=torch.float64)
        torch.testing.assert_close(found.double(), expected, atol=1e-7, rtol=1e-6)
    assert close <= len(want) // 20
