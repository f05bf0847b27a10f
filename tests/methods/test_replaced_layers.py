"""Models whose Linear layers were replaced: quantised ones, and ones with an adapter around them, have no plain `weight`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import pytest
import torch
from observed import Tiny
from test_contract import SPECS, rows_in_turn, stage
from torch import Tensor, nn

from lmms_prune import prune
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods import MethodSpec


class Packed(nn.Module):
    """Eight-bit weights, as libraries of quantisation pack them: as integers, under another name."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def unpacked(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == self.scale.dtype
        return nn.functional.linear(x, self.unpacked(), self.bias)


class FourBit(Packed):
    """Its `weight` is there, but holds packed integers (bitsandbytes' Linear4bit)."""

    @property
    def weight(self) -> Tensor:
        return self.codes.view(torch.uint8).flatten()[:, None]


class Method(Packed):
    """Its `weight` is a method (torch.ao's dynamically quantised Linear)."""

    def weight(self) -> Tensor:
        return self.codes


class Adapted(nn.Module):
    """A low-rank adapter around a Linear layer."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        generator = torch.Generator().manual_seed(linear.in_features)
        self.base = linear
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator).to(linear.weight) / 8)
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator).to(linear.weight) / 8)

    def unpacked(self) -> Tensor:
        return self.base.weight + self.up @ self.down

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def replaced(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind(child))
    return model


def plain(model: nn.Module, kind: type) -> nn.Module:
    """Linear layers that compute what the replaced ones do."""

    def linear(layer: nn.Linear) -> nn.Module:
        twin = copy.deepcopy(layer)
        twin.weight.data = kind(layer).unpacked().detach()
        return twin

    return replaced(model, linear)


KINDS = (Packed, FourBit, Method, Adapted)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_replaced_linear_layers_do_not_matter(tiny: Tiny, spec: MethodSpec) -> None:
    """Kept tokens and logits are those of Linear layers that compute the same."""
    kind = KINDS[SPECS.index(spec) % len(KINDS)]
    rng = random.Random(6)
    rows = [tiny.row(rng, images=n, words=4) for n in (1, 2, 0)]
    inputs = tiny.batch(rows)
    results = []
    for model in (plain(tiny.model(), kind), replaced(tiny.model(), kind)):
        options = {"samples": ["a", "b", "c"], "questions": rows_in_turn(rows)}
        with torch.no_grad(), prune(model, stage(spec, 2), **options) as trace:
            logits = model(**inputs, logits_to_keep=1).logits
        results.append(([row.indices(0) for row in trace.rows], logits))
    (kept, logits), (kept_replaced, logits_replaced) = results
    assert kept_replaced == kept
    torch.testing.assert_close(logits_replaced, logits)


class Wrapper(nn.Module):
    """Forwards attributes to the inner model, as PEFT's models, compiled ones and DistributedDataParallel do in part."""

    def __init__(self, inner: nn.Module, hands_on: bool):
        super().__init__()
        self.inner, self.hands_on = inner, hands_on

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("inner", "hands_on") or not self.hands_on:
                raise
            return getattr(self.inner, name)


@pytest.mark.parametrize("hands_on", [True, False])
def test_a_wrapper_around_the_model_is_refused_by_name(tiny: Tiny, hands_on: bool) -> None:
    model = tiny.model()
    message = r"^Wrapper is a wrapper around a model; pass the model inside it \(PEFT: get_base_model\(\)"
    with pytest.raises(UnsupportedModelError, match=message), prune(Wrapper(model, hands_on), "random@2:0.5"):
        pass
    assert "generate" not in vars(model)


def test_a_compiled_model_is_refused_before_hooks_are_registered(tiny: Tiny) -> None:
    model = copy.copy(tiny.model())
    with (
        pytest.raises(UnsupportedModelError, match="OptimizedModule is a wrapper"),
        prune(torch.compile(model, backend="eager"), "random@2:0.5"),
    ):
        pass
    assert "generate" not in vars(model)
