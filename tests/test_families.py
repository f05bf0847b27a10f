"""What is read off a configuration and a prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import Family, noise
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaConfig, LlavaOnevisionConfig

from lmms_prune.certificate.tiny import Patches
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models import FAMILIES, family_of
from lmms_prune.models.architectures import from_config
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.sizes import ArchitectureError
from lmms_prune.models.unsupported import REASONS

LLAVA, QWEN = FAMILIES["llava"], FAMILIES["qwen2_5_vl"]

pytestmark = pytest.mark.core


def test_llava_images_have_one_size_and_qwen_images_do_not(loaded) -> None:
    assert LLAVA.tokens_per_image(loaded("llava").model.config) == 64
    assert QWEN.tokens_per_image(loaded("qwen").model.config) is None
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=336, patch_size=14)
    assert (
        LLAVA.tokens_per_image(SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default")) == 576
    )
    assert LLAVA.tokens_per_image(SimpleNamespace(vision_config=vision, vision_feature_select_strategy="full")) == 577


def test_a_llava_with_another_vision_encoder_is_refused() -> None:
    """Pixtral's images differ in size, though its checkpoints are of type 'llava'."""
    vision = SimpleNamespace(model_type="pixtral", image_size=1024, patch_size=16)
    with pytest.raises(UnsupportedModelError, match="'pixtral' is not supported"):
        LLAVA.tokens_per_image(SimpleNamespace(vision_config=vision, vision_feature_select_strategy="full"))


def test_runs_of_visual_tokens_are_split_into_images() -> None:
    visual = [False, True, True, True, True, False, True, True]
    assert LLAVA.spans(visual, 2, []) == [(1, 2), (3, 2), (6, 2)]
    assert QWEN.spans(visual, None, [4, 2]) == [(1, 4), (6, 2)]
    assert QWEN.spans(visual, None, [1, 3, 2]) == [(1, 1), (2, 3), (6, 2)]
    assert QWEN.spans(visual, None, []) == [(1, 4), (6, 2)]
    assert QWEN.spans([False], None, []) == []


def test_a_run_that_is_no_complete_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="a run of 3 visual tokens does not hold a whole image of 4"):
        LLAVA.spans([True, True, True], 4, [])


@pytest.mark.parametrize("config", [LlavaOnevisionConfig(), LlamaConfig()])
def test_other_model_types_are_refused_by_name(config) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}'.*llava_pruned.*qwen2_5_vl_pruned"):
        family_of(config)


@pytest.mark.parametrize("model_type", REASONS)
def test_what_is_refused_says_why_and_what_is_supported(model_type: str) -> None:
    """The names are those of the library, so that none is waited for in vain."""
    config = AutoConfig.for_model(model_type)
    assert config.model_type == model_type
    with pytest.raises(UnsupportedModelError) as error:
        family_of(config)
    for part in (f"'{model_type}'", REASONS[model_type], *(family.model_name for family in FAMILIES.values())):
        assert part in str(error.value)
    with pytest.raises(
        ArchitectureError, match=f"config: model_type '{model_type}' is not supported.*Supported.*'llava'"
    ):
        from_config({"model_type": model_type}, "config")


def test_no_supported_family_is_among_them() -> None:
    assert not set(REASONS) & set(FAMILIES)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding windows.*sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "full attention.*linear_attention"),
        ({"layer_types": None, "sliding_window": 4096}, "sliding windows.*sliding_attention"),
        ({"num_experts": 128}, "mixture of experts.*num_experts is 128"),
        ({"num_local_experts": 8}, "mixture of experts.*num_local_experts is 8"),
    ],
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_variants_of_a_familys_decoder_are_refused(model_type: str, changed: dict, message: str) -> None:
    config = AutoConfig.for_model(model_type)
    assert family_of(config) is FAMILIES[model_type]
    for name, value in changed.items():
        setattr(config.get_text_config(), name, value)
    with pytest.raises(UnsupportedModelError, match=f"{message}.*Supported.*llava_pruned.*qwen3_vl_pruned"):
        family_of(config)


def test_keys_are_those_that_the_layer_caches(family: Family) -> None:
    """Recomputed keys equal the cache's own, rotation and grouped heads included."""
    captured = {}
    layer = family.model.model.language_model.layers[2]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(hidden=args[0], rotary=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        output = family.model(**family.inputs(["what is this?"], [[noise(0)]]), use_cache=True)
    handle.remove()
    keys = ModelParts.of(family.model).keys(2, captured["hidden"], captured["rotary"])
    torch.testing.assert_close(keys, filled_cache(output).layers[2].keys)


def test_older_three_channel_tables_give_the_same_keys(loaded) -> None:
    """Before the library merged M-RoPE's channels itself, tables were (3, rows, length, features)."""
    family = loaded("qwen")
    parts = ModelParts.of(family.model)
    rotary = parts.decoder.rotary_emb
    hidden = torch.randn(1, 5, 64, dtype=torch.float64)
    positions = torch.tensor([[[0, 1, 1, 1, 2]], [[0, 1, 1, 2, 3]], [[0, 1, 2, 1, 3]]])
    frequencies = positions[..., None] * rotary.inv_freq.double()
    frequencies = torch.cat((frequencies, frequencies), dim=-1)
    old = (frequencies.cos(), frequencies.sin())
    new = parts.rotary(hidden, positions)
    torch.testing.assert_close(parts.keys(1, hidden, old), parts.keys(1, hidden, new), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen", "qwen3"])
def test_the_tests_quick_patch_embedding_is_the_librarys(name: str, loaded) -> None:
    family = loaded(name)
    pixels = family.inputs(["what is this?"], [[noise(2, 84, 140)]])["pixel_values"]
    library = AutoModelForImageTextToText.from_pretrained(family.folder, dtype=torch.float64)
    embedding, quick = library.model.visual.patch_embed, family.model.model.visual.patch_embed
    assert type(embedding.proj) is torch.nn.Conv3d
    assert type(quick.proj) is Patches
    torch.testing.assert_close(quick(pixels), embedding(pixels))
