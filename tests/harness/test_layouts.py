"""Checkpoints that look like supported ones and are not: LLaVA's original layout, stored quantisations, processors without fields."""

from __future__ import annotations

import json
import shutil

import pytest

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import ArgumentError, CheckpointError, ModelArguments
from lmms_prune.harness.loading import load_model, pick_device
from lmms_prune.models.foreign import foreign_layout

# As on the hub: liuhaotian/llava-v1.5-7b, -13b and llava-v1.6-vicuna-7b, lmms-lab/llava-onevision-qwen2-7b-ov.
TOWER = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
ORIGINAL = {
    "llava-hf/llava-1.5-7b-hf": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "hidden_size": 4096,
        "image_aspect_ratio": "pad",
        **TOWER,
    },
    "llava-hf/llava-1.5-13b-hf": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": 5120,
        "image_aspect_ratio": "pad",
        **TOWER,
    },
    "llava-hf/llava-v1.6-vicuna-7b-hf": {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "hidden_size": 4096,
        "image_aspect_ratio": "anyres",
        **TOWER,
    },
    "llava-hf/llava-v1.6-mistral-7b-hf": {
        "architectures": ["LlavaMistralForCausalLM"],
        "model_type": "llava_mistral",
        "hidden_size": 4096,
        "image_aspect_ratio": "anyres",
        **TOWER,
    },
    "llava-hf/llava-onevision-qwen2-7b-ov-hf": {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava",
        "hidden_size": 3584,
        "image_aspect_ratio": "anyres_max_9",
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
    },
}


def of_config(folder, config, **arguments):
    """Every way to the weights reads the configuration first; no weight is here."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    read = ModelArguments.read({"pretrained": str(folder), "device": "cpu", **arguments})
    load_model(read, pick_device(read, 0, 1))


@pytest.mark.parametrize("converted", ORIGINAL)
def test_the_original_layout_of_llava_names_the_converted_checkpoint(converted, harness, tmp_path):
    config = ORIGINAL[converted]
    text = f"pretrained={tmp_path} is in the layout of LLaVA's own repository (architectures {config['architectures'][0]}, "
    text += f"mm_vision_tower {config['mm_vision_tower']}), which transformers does not load; give the converted checkpoint, "
    for load in (
        lambda: of_config(tmp_path, config),
        lambda: harness.create("llava", pretrained=str(tmp_path)),
        lambda: harness.create("qwen2_5_vl", pretrained=str(tmp_path)),
    ):
        with pytest.raises(CheckpointError) as error:
            load()
        assert str(error.value).startswith(f"{text}pretrained={converted}, or convert")


def test_an_original_layout_of_unknown_size_names_the_conversions():
    config = {"architectures": ["LlavaMptForCausalLM"], "model_type": "llava_mpt", "hidden_size": 4096}
    assert "give its conversion, a checkpoint of https://huggingface.co/llava-hf." in foreign_layout(config)
    assert "(model_type llava_llama)" in foreign_layout({"model_type": "llava_llama"})


def test_converted_checkpoints_are_not_taken_for_original_ones(harness):
    for folder in harness.checkpoints.values():
        assert foreign_layout(json.loads((folder / "config.json").read_text())) is None


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8", "quanto"])
def test_stored_quantisations_are_refused_by_name(method, harness, family, tmp_path):
    config = json.loads((harness.checkpoints[family] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    with pytest.raises(UnsupportedModelError) as error:
        of_config(tmp_path, config)
    assert str(error.value) == (
        f"pretrained={tmp_path} is stored quantised by {method}, which is not supported; supported are checkpoints in 16 or 32 "
        "bits, these with load_in_4bit=true or load_in_8bit=true, and those that bitsandbytes stored."
    )
    with pytest.raises(
        ArgumentError, match=rf"load_in_8bit=true: .* is quantised already \({method}\); leave load_in_8bit"
    ):
        of_config(tmp_path, config, load_in_8bit="true")


def test_a_damaged_quantisation_is_refused_by_name(harness, family, tmp_path):
    config = json.loads((harness.checkpoints[family] / "config.json").read_text()) | {"quantization_config": "x"}
    with pytest.raises(UnsupportedModelError, match=r"quantization_config in config\.json is 'x', not an object"):
        of_config(tmp_path, config)


def edited(harness, folder, family="llava", **fields):
    """A copy of a tiny LLaVA with other fields in its processor; None takes one out."""
    shutil.copytree(harness.checkpoints[family], folder)
    file = folder / "processor_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


FIX = "Set patch_size=14, vision_feature_select_strategy=default, num_additional_image_tokens=1 there."


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"patch_size": None}, ("has no patch_size, so no prompt can be made", FIX)),
        ({"vision_feature_select_strategy": None}, ("has no vision_feature_select_strategy", FIX)),
        (
            {"num_additional_image_tokens": None},
            ("counts 63 tokens for an image of which the model makes 64", "num_additional_image_tokens=0", FIX),
        ),
        ({"patch_size": 16}, ("counts 49 tokens", "patch_size=16", FIX)),
        (
            {"vision_feature_select_strategy": "full"},
            ("counts 65 tokens", "vision_feature_select_strategy=full", FIX),
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_processor_that_miscounts_is_named_before_any_document(fields, parts, harness, tmp_path):
    folder = edited(harness, tmp_path / "edited", **fields)
    with pytest.raises(CheckpointError) as error:
        harness.create("llava", pretrained=str(folder))
    for part in (f"pretrained={folder}: its processor_config.json ", *parts):
        assert part in str(error.value)


FAMILIES_OF_CLIP = ("llava", "llava_next")


def test_tiles_are_counted_as_images_are(harness, tmp_path):
    """LLaVA-NeXT's processor counts the base from the same fields, though its images have no one number of tokens."""
    folder = edited(harness, tmp_path / "edited", "llava_next", num_additional_image_tokens=None)
    with pytest.raises(CheckpointError, match="counts 15 tokens for an image of which the model makes 16 "):
        harness.create("llava_next", pretrained=str(folder))


def test_a_next_that_keeps_class_tokens_is_refused_by_its_configuration(harness, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(harness.checkpoints["llava_next"], folder)
    config = json.loads((folder / "config.json").read_text()) | {"vision_feature_select_strategy": "full"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="vision_feature_select_strategy 'full' of a LLaVA-NeXT"):
        harness.create("llava_next", pretrained=str(folder))


@pytest.mark.parametrize("family", FAMILIES_OF_CLIP)
def test_fields_that_count_alike_are_allowed(family, harness, tmp_path):
    """Without the class token and without a strategy that drops it, the count is the same."""
    fields = {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    folder = edited(harness, tmp_path / "edited", family, **fields)
    harness.create(family, pretrained=str(folder))
