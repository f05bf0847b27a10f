"""Time of each method's selection, relative to one decoder layer of the 7B shape in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lmms_prune.bench.clock import median_seconds
from lmms_prune.bench.models import random_inputs, random_model
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.view import LayerInput, TokenView
from lmms_prune.models import FAMILIES
from lmms_prune.models.architectures import architecture
from lmms_prune.models.encoder import EncoderRecorder, Signals
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.layout import Layout
from lmms_prune.schedule import Schedule

TEXT = 95  # text tokens of the prompt
GRID = (64, 32)  # rows and columns of visual tokens, if the model's images differ in size


@dataclass(frozen=True)
class Timing:
    """Measured time of one method's selection.

    Args:
        method: the method's name.
        layer: the decoder layer at which it selected.
        seconds: median seconds of `select` (and `rewrite`) for the whole batch.
        of_layer: fraction of one unpruned decoder layer's time.
        of_prefill: fraction of all decoder layers' time.
    """

    method: str
    layer: int
    seconds: float
    of_layer: float
    of_prefill: float


@torch.no_grad()
def time_selection(
    family: str, names: Sequence[str], batch: int, keep: float, repeats: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, list[Timing]]:
    """Time methods on a model of the 7B widths with random weights and few layers.

    Args:
        family: a ``model_type``. Images have the family's grid, or `GRID` if they differ in size.
        names: methods; those that need trained weights or an auxiliary model's answer are skipped.
        batch: number of images selected for at once.
        keep: ratio of tokens to keep.
        repeats: number of runs; the median is reported.
        device, dtype: device and dtype of the model.

    Returns:
        the seconds of one unpruned decoder layer on the same batch, and one timing per method.
    """
    chosen = [METHODS[name] for name in names if _timeable(METHODS[name])]
    methods = [spec.build(dict(Schedule.parse(spec.example).stages[0].options)) for spec in chosen]
    name = next(name for name in FAMILIES[family].published if name.endswith("7b"))
    sizes = architecture(name)
    grid = FAMILIES[family].example if sizes.tokens_per_image else GRID
    model = random_model(name, 2, device, dtype)
    parts = ModelParts.of(model)
    views, run_layer = _observe(model, parts, random_inputs(model, batch, grid, TEXT), methods)
    layer = median_seconds(run_layer, repeats, device)
    timings = []
    for spec, method in zip(chosen, methods, strict=True):
        view = views[min(max(spec.lowest_layer, 1), 1 if spec.highest_layer is None else spec.highest_layer)]
        stage = Schedule.parse(f"{spec.name}@{view.layer}" + ("" if spec.drops_all else f":{keep}")).stages[0]
        budget = torch.tensor(stage.kept(list(view.sizes), list(view.counts)))
        seconds = median_seconds(lambda: _select(method, spec, view, budget), repeats, device)  # noqa: B023
        timings.append(Timing(spec.name, view.layer, seconds, seconds / layer, seconds / layer / sizes.layers))
    return layer, timings


def _timeable(spec: MethodSpec) -> bool:
    return spec.ready and "guide" not in spec.reads


def _select(method: Method, spec: MethodSpec, view: TokenView, budget: Tensor) -> None:
    # A new view with an empty memory, so that nothing is reused from the previous run.
    fresh = replace(view, memory=Memory(), carry=None)
    keep = method.select(fresh, budget)
    if spec.rewrites:
        method.rewrite(fresh, keep)


def _observe(
    model: Any, parts: ModelParts, inputs: dict[str, Tensor], methods: Sequence[Method]
) -> tuple[dict[int, TokenView], Callable[[], Any]]:
    """Return token views at layers 0 and 1 of one unpruned prefill, and a function that runs layer 1 again."""
    signals = Signals(grids=True)
    for method in methods:
        signals |= method.signals(parts.encoder_shape)
    recorder = EncoderRecorder(parts, signals)
    calls: list[tuple[Tensor, dict]] = []

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        calls.append((args[0], kwargs))

    handles = [
        *recorder.register(),
        *(layer.register_forward_pre_hook(look, with_kwargs=True) for layer in parts.layers),
    ]
    with hooked(handles):
        model(**inputs, logits_to_keep=1, use_cache=False)
    assert recorder.run is not None
    layout = Layout.of(parts, inputs, None, recorder.run.grids)
    states = [LayerInput(i, hidden, kwargs["position_embeddings"]) for i, (hidden, kwargs) in enumerate(calls)]
    from_encoder = {"_embedded": states[0].hidden, "_unpruned_rotary": states[0].rotary, "_encoder_run": recorder.run}
    views = {
        layer: layout.view(parts, states[layer], states[layer - 1] if layer else None, 0, **from_encoder)
        for layer in (0, 1)
    }
    hidden, kwargs = calls[1]
    return views, lambda: parts.layers[1](hidden, **kwargs)
