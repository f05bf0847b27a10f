"""Tiny checkpoints of both families, random prompts, and methods that a test defines itself."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from built import Checkpoint
from observed import EVERY, FAMILIES, LAYERS, Observed, Tiny, observe
from torch import Tensor

from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.base import Method
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

# The eight batches have their own ratios and layers in every test; fewer inputs leave no setting out.
BATCHES, FULL_BATCH, SHORT_BATCH = 8, 25, 7


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hundreds of images through plain Python loops are the slow part; hand cases and the contract are the quick one."""
    for item in items:
        name = getattr(item, "originalname", item.name)
        if "slow_reference" in name and "a_few" not in name:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def all_tiny(checkpoint: Checkpoint) -> dict[str, Tiny]:
    return {family: Tiny.load(family, checkpoint(family, layers=LAYERS)) for family in EVERY}


@pytest.fixture(scope="session")
def observed_batches(all_tiny: dict[str, Tiny], full: bool) -> Callable[[str], list[Observed]]:
    """For a family, 8 batches of random prompts (one image each) with what the unpruned model computes for them.

    With --full a batch has 25 prompts, so that they are 200 in all; without, 7, so that they are 56.
    """
    size = FULL_BATCH if full else SHORT_BATCH
    cache: dict[str, list[Observed]] = {}

    def of(family: str) -> list[Observed]:
        if family not in cache:
            tiny, rng = all_tiny[family], random.Random(7)
            batches = [[tiny.row(rng) for _ in range(size)] for _ in range(BATCHES)]
            cache[family] = [observe(tiny, tiny.batch(rows)) for rows in batches]
        return cache[family]

    return of


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest, all_tiny: dict[str, Tiny]) -> Tiny:
    return all_tiny[request.param]


@pytest.fixture
def batches(tiny: Tiny, observed_batches: Callable[[str], list[Observed]]) -> list[Observed]:
    return observed_batches(tiny.family)


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Add a method of a test's own to the table, as a new file and a new row would."""

    def add(method: type[Method], **row: Any) -> None:
        name = method.__name__.lower()
        module = ModuleType(f"lmms_prune.methods.{name}")
        setattr(module, method.__name__, method)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        filled = {"reads": (), "kind": "control", "paper": "https://arxiv.org", "example": f"{name}@1:0.5", **row}
        monkeypatch.setitem(METHODS, name, MethodSpec(name=name, class_name=method.__name__, **filled))

    return add


@pytest.fixture
def capture_view(register: Callable[..., None]) -> Iterator[Callable[..., TokenView]]:
    """The view that a method gets at a layer, in a real run."""
    views: list[TokenView] = []

    class Spy(Method):
        paper = "https://arxiv.org"

        def signals(self, encoder: EncoderShape) -> Signals:
            every = frozenset(range(encoder.depth))
            return Signals(attention=every, outputs=every, features=True, pixels=True)

        def select(self, view: TokenView, budget: Tensor) -> Tensor:
            views.append(view)
            rank = torch.arange(view.valid.shape[1], device=view.valid.device)
            return view.valid & (rank < budget[:, None])

    def capture(tiny: Tiny, inputs: dict[str, Tensor], layer: int, before: str = "", **options: Any) -> TokenView:
        reads = ("hidden", "embeddings", "encoder", "pixels", *(("attention", "keys", "values") if layer else ()))
        options.setdefault("questions", [f"question {row}" for row in range(len(inputs["input_ids"]))])
        register(Spy, reads=reads, lowest_layer=min(layer, 1))
        tiny.run(inputs, f"{before}spy@{layer}:0.2", **options)
        return views[-1]

    yield capture
    views.clear()


@pytest.fixture
def encoder_view(capture_view: Callable[..., TokenView]) -> Callable[[Tiny, Observed], TokenView]:
    """A shared batch's view, to read the encoder's signals of: taken once for all tests, none of which changes it."""

    def of(tiny: Tiny, seen: Observed) -> TokenView:
        if seen.encoder_view is None:
            seen.encoder_view = capture_view(tiny, seen.inputs, 2)
        return seen.encoder_view

    return of
