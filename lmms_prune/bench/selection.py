"""Time of each method's selection, relative to one decoder layer of the 7B shape in the same run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lmms_prune.bench.clock import timed
from lmms_prune.bench.models import BenchError, existing_device, given_model, random_inputs, random_model
from lmms_prune.bench.options import timeable
from lmms_prune.bench.ratios import of_medians, ratio
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


@dataclass(frozen=True)
class Timing:
    """Measured time of one method's selection.

    Args:
        method: the method's name.
        layer: the decoder layer at which it selected.
        seconds: median seconds of `select` (and `rewrite`) for the whole batch.
        of_layer: fraction of one unpruned decoder layer's time.
        of_prefill: fraction of all decoder layers' time.
        low, high: 95 % bootstrap interval of `of_layer`.
        marks: of the fractions, if they are no result; see `lmms_prune.bench.ratios`.
    """

    method: str
    layer: int
    seconds: float
    of_layer: float
    of_prefill: float
    low: float
    high: float
    marks: tuple[str, ...]


@dataclass(frozen=True)
class SelectionModel:
    """A model whose selections are timed, its number of layers in full, and the grid of its images."""

    model: Any
    family: str
    layers: int
    grid: tuple[int, int]


def selection_model(family: str, checkpoint: str | None, grid: tuple[int, int], device: str) -> SelectionModel:
    """Load a checkpoint, or make two layers of the family's 7B shape with random weights.

    Weights are float32 on a CPU and bfloat16 on a GPU.

    Args:
        family: a ``model_type``; unused with a checkpoint.
        checkpoint: a folder or hub name.
        grid: rows and columns of visual tokens, if the model's images differ in size.
        device: "cpu", "cuda" or "cuda:N".

    Raises:
        ArgumentError, BenchError, UnsupportedModelError: no such device or checkpoint.
    """
    torch_device = existing_device(device)
    dtype = torch.float32 if torch_device.type == "cpu" else torch.bfloat16
    if checkpoint is None:
        name = FAMILIES[family].published_default
        model, layers = random_model(name, 2, torch_device, dtype), architecture(name).layers
    else:
        model = given_model(checkpoint, None, None, str(dtype).removeprefix("torch."), device).model
        layers = model.config.get_text_config().num_hidden_layers
    parts = ModelParts.of(model)
    return SelectionModel(model, parts.family.model_type, layers, parts.family.only_grid(parts.config) or grid)


@torch.no_grad()
def time_selection(
    subject: SelectionModel,
    names: Sequence[str],
    batch: int,
    keep: float,
    repeats: int,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[float, list[Timing]]:
    """Time methods' selections on a model.

    Args:
        subject: the model.
        names: methods; those that need trained weights or an auxiliary model's answer are skipped.
        batch: number of images selected for at once.
        keep: ratio of tokens to keep.
        repeats: number of runs; the median is reported.
        counted: called with the number of methods that were timed, and of all.

    Returns:
        the seconds of one unpruned decoder layer on the same batch, and one timing per method.

    Raises:
        BenchError: methods that need an image of one grid, where images are in tiles.
    """
    chosen = [METHODS[name] for name in names if timeable(METHODS[name])]
    methods = [spec.build(dict(Schedule.parse(spec.example).stages[0].options)) for spec in chosen]
    model = subject.model
    device = next(model.parameters()).device
    parts = ModelParts.of(model)
    _refuse_grids(parts, chosen)
    views, run_layer = _observe(model, parts, random_inputs(model, batch, subject.grid, TEXT), methods)
    layer = timed(run_layer, repeats, device)
    timings = []
    for spec, method in zip(chosen, methods, strict=True):
        view = views[min(max(spec.lowest_layer, 1), 1 if spec.highest_layer is None else spec.highest_layer)]
        stage = Schedule.parse(f"{spec.name}@{view.layer}" + ("" if spec.drops_all else f":{keep}")).stages[0]
        budget = torch.tensor(stage.kept(list(view.sizes), list(view.counts)))
        seconds = timed(lambda: _select(method, spec, view, budget), repeats, device)  # noqa: B023
        share = ratio(of_medians, seconds, layer, paired=False)
        of_prefill = share.value / subject.layers
        interval = (share.low, share.high, share.marks)
        timings.append(Timing(spec.name, view.layer, median(seconds), share.value, of_prefill, *interval))
        counted(len(timings), len(chosen))
    return median(layer), timings


def _refuse_grids(parts: ModelParts, chosen: Sequence[MethodSpec]) -> None:
    """Refuse methods that need one grid, on a model whose images are in tiles: the views here are of whole images."""
    if parts.tiled and (names := [spec.name for spec in chosen if spec.needs_grid]):
        raise BenchError(
            f"{parts.family.title}'s images are in tiles, and selections are timed on whole images, of which {', '.join(names)} "
            "need one grid: leave these out of --methods, or time them in a schedule with `lmms-prune bench`."
        )


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
    additions: list[Tensor] = []

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        calls.append((args[0], kwargs))

    handles = [
        *recorder.register(),
        parts.record_additions(additions),
        *(layer.register_forward_pre_hook(look, with_kwargs=True) for layer in parts.layers),
    ]
    with hooked(handles):
        model(**inputs, logits_to_keep=1, use_cache=False)
    assert recorder.run is not None
    layout = Layout.of(parts, inputs, None, recorder.run.grids)
    states = [LayerInput(i, hidden, kwargs["position_embeddings"]) for i, (hidden, kwargs) in enumerate(calls)]
    from_encoder: dict[str, Any] = {
        "_embedded": states[0].hidden,
        "_unpruned_rotary": states[0].rotary,
        "_encoder_run": recorder.run,
    }

    def view_at(layer: int) -> TokenView:
        coming = layout.of_tokens(layout.divided("image"), additions[layer:])
        before = states[layer - 1] if layer else None
        return layout.view(parts, states[layer], before, 0, _additions=coming, **from_encoder)

    views = {layer: view_at(layer) for layer in (0, 1)}
    hidden, kwargs = calls[1]
    return views, lambda: parts.layers[1](hidden, **kwargs)
