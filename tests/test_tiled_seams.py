"""Random weights that use the seams of a family whose images differ in size without M-RoPE and hold tokens of no grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from flash_stand_in import KERNEL, Flash
from transformers import AutoModelForImageTextToText, LlavaNextConfig

from lmms_prune import Schedule, prune
from lmms_prune.certificate.case import Case, Subject
from lmms_prune.certificate.prompts import BATCHES, batch
from lmms_prune.certificate.runner import examine
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.models.parts import ModelParts

LAYERS = 6


def next_() -> Any:
    text = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": 160,
    }
    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
    }
    return LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_id=150, image_grid_pinpoints=[[16, 32], [32, 16]]
    )


# Methods that read queries, keys and embeddings, a merge.
SCHEDULES = (
    "random@0:0.6",
    "random@1:0.7,dart@2:0.5,fastv@4:0.2",
    "pdrop@2:0.5,random@4:0.2",
    "divprune@0:0.5,vtw@3",
    "sparsevlm@2:0.5",
    "tome@1:0.5,random@5:0.1",
)


@pytest.fixture
def model() -> Any:
    """Its weights are large enough that every token counts."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(next_(), dtype=torch.float32).eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
            elif "norm" in name:
                torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


@pytest.mark.core
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_certified_properties_hold(model: Any, schedule: str) -> None:
    """The masked reference does not change the library's own additions, norms and positions."""
    case = Case(Subject(model, "float32"), Schedule.parse(schedule), "original")
    failed = [result for name in ("1", "ragged") for result in examine(case, name) if result.reason]
    assert failed == []


@pytest.mark.parametrize("schedule", ["random@0:0.6,divprune@2:0.3", "tome@3:0.5,random@5:0.1"])
def test_they_hold_with_flash_attention_too(model: Any, flash: Flash, schedule: str) -> None:
    model.to(flash.device, getattr(torch, flash.dtypes[0])).set_attn_implementation(KERNEL[2])
    case, first = Case(Subject(model, flash.dtypes[0]), Schedule.parse(schedule), "original"), len(flash.calls)
    failed = [result for name in ("1", "ragged") for result in examine(case, name) if result.reason]
    assert failed == []
    assert {call.packed for call in flash.since(first, causal=True)} == {False, True}


def test_recomputed_keys_are_those_that_the_layer_caches(model: Any) -> None:
    """Without the norms of queries and keys they are others, and nothing would fail."""
    parts, seen = ModelParts.of(model), {}
    layer = parts.layers[2]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(hidden=args[0], rotary=kwargs["position_embeddings"]), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**batch(model, BATCHES["1"]), use_cache=True)
        keys = parts.keys(2, seen["hidden"], seen["rotary"])
    handle.remove()
    torch.testing.assert_close(keys, filled_cache(output).layers[2].keys)


def test_positions_may_be_renumbered(model: Any) -> None:
    case = Case(Subject(model, "float32"), Schedule.parse("random@1:0.5,dart@3:0.3"), "compact")
    assert [result for result in examine(case, "ragged") if result.reason] == []


def test_images_of_other_sizes_keep_the_same_share(model: Any) -> None:
    with torch.no_grad(), prune(model, "random@1:0.5") as trace:
        model(**batch(model, BATCHES["ragged"]))
    sizes = [size for row in trace.rows for size in row.images]
    assert len(set(sizes)) > 1
    assert [kept for row in trace.rows for kept in row.kept[0]] == [round(size / 2) for size in sizes]
