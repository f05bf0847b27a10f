"""What is read off a configuration and a prompt."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import Family, Patches, noise
from transformers import AutoModelForImageTextToText, LlamaConfig, LlavaNextConfig, LlavaOnevisionConfig

from lmms_prune.compat.transformers import filled_cache
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models import FAMILIES, family_of
from lmms_prune.models.parts import ModelParts

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


@pytest.mark.parametrize("config", [LlavaNextConfig(), LlavaOnevisionConfig(), LlamaConfig()])
def test_other_model_types_are_refused_by_name(config) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{config.model_type}'.*llava_pruned.*qwen2_5_vl_pruned"):
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
