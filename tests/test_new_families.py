"""What the next families need: random weights that use each seam of the contract of a family.

A decoder that adds encoder features between its layers and norms its queries and keys (Qwen3-VL, a throw-away class here:
nothing else knows of it), and images that differ in size without M-RoPE and hold tokens of no grid (LLaVA-NeXT).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from flash_stand_in import KERNEL, Flash
from transformers import AutoModelForImageTextToText, LlavaNextConfig, Qwen3VLConfig

import lmms_prune.models
from lmms_prune import Schedule, prune
from lmms_prune.certificate.case import Case, Subject
from lmms_prune.certificate.prompts import BATCHES, batch
from lmms_prune.certificate.runner import examine
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.models.family import Family
from lmms_prune.models.llava_next import LLAVA_NEXT
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.qwen2_5_vl import QWEN2_5_VL, Qwen25VL

LAYERS = 6


@dataclass(frozen=True)
class Qwen3VL(Qwen25VL):
    def between_layers(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
        extras = kwargs.get("deepstack_visual_embeds")
        return {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}, extras or ()

    def encoder_shape(self, config: Any) -> Any:
        return super(Qwen25VL, self).encoder_shape(config)  # without windows

    def rotary_table(self, decoder: Any, table: Any) -> Any:
        return table  # interleaved, and merged by the decoder itself


def qwen3() -> Any:
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 160,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [2, 3, 3],
            "mrope_interleaved": True,
        },
    }
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 64,
        "patch_size": 4,
        "deepstack_visual_indexes": [0, 1, 2],
        "num_position_embeddings": 64,
    }
    marks = {"image_token_id": 150, "video_token_id": 151, "vision_start_token_id": 152, "vision_end_token_id": 153}
    return Qwen3VLConfig(text_config=text, vision_config=vision, **marks)


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


def from_family(kind: type[Family], family: Family, **changed: Any) -> Family:
    values = {name: getattr(family, name) for name in family.__dataclass_fields__}
    return kind(**{**values, **changed})


FAMILIES = {
    "qwen3_vl": (from_family(Qwen3VL, QWEN2_5_VL, model_type="qwen3_vl", model_name="qwen3_vl_pruned"), qwen3),
    "llava_next": (LLAVA_NEXT, next_),
}
# A stage among the layers between which something is added, methods that read queries, keys and embeddings, a merge.
SCHEDULES = (
    "random@0:0.6",
    "random@1:0.7,dart@2:0.5,fastv@4:0.2",
    "pdrop@2:0.5,random@4:0.2",
    "divprune@0:0.5,vtw@3",
    "sparsevlm@2:0.5",
    "tome@1:0.5,random@5:0.1",
)


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A model of a family that only this file knows; its weights are large enough that every token counts."""
    family, config = FAMILIES[request.param]
    monkeypatch.setitem(lmms_prune.models.FAMILIES, request.param, family)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config(), dtype=torch.float32).eval()
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
    if schedule.startswith("tome") and model.config.model_type == "qwen3_vl":
        # After a merge the feature of the target is added, where the reference adds one to each token.
        case = replace(case, schedule=Schedule.parse(schedule.replace("tome@1", "tome@3")))
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


def test_positions_may_be_renumbered_where_the_family_says_so(model: Any) -> None:
    if not ModelParts.of(model).family.renumbers:
        pytest.skip("M-RoPE")
    case = Case(Subject(model, "float32"), Schedule.parse("random@1:0.5,dart@3:0.3"), "compact")
    assert [result for result in examine(case, "ragged") if result.reason] == []


def test_images_of_other_sizes_keep_the_same_share(model: Any) -> None:
    with torch.no_grad(), prune(model, "random@1:0.5") as trace:
        model(**batch(model, BATCHES["ragged"]))
    sizes = [size for row in trace.rows for size in row.images]
    assert len(set(sizes)) > 1
    assert [kept for row in trace.rows for kept in row.kept[0]] == [round(size / 2) for size in sizes]
