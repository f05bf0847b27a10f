"""FLOPs and cache bytes: counted from sizes, they are what torch counts and what the caches hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import LAYERS, Family, noise
from torch.utils.flop_counter import FlopCounterMode

from lmms_prune import Schedule, prune
from lmms_prune.compat.torch import forgotten_rules
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.efficiency.cost import decode_flops, encoder_flops, kv_bytes, peak_bytes, prefill_flops
from lmms_prune.models.architectures import architecture, from_config
from lmms_prune.models.sizes import ArchitectureError

TABLES = json.loads((Path(__file__).parents[1] / "paper_table3.json").read_text(encoding="utf-8"))
SIZES = {
    "llava": (112, 112),
    "qwen": (196, 140),
    "qwen2": (196, 140),
    "qwen3": (224, 160),
    "next": (196, 140),
}  # Qwen: 5 x 7 tokens, so that windows at both edges are smaller
# LLaVA-NeXT: two by two tiles and the base, of four by four patches, some of which unpadding leaves out.
GRIDS = {"llava": (8, 8), "qwen": (5, 7), "qwen2": (5, 7), "qwen3": (5, 7), "next": (20, 4)}


@pytest.fixture(params=sorted(SIZES))
def family(request: pytest.FixtureRequest, loaded: Callable[..., Family]) -> Family:
    """In float32, where the models of the tests are the library's in every module."""
    return loaded(request.param, torch.float32)


def sizes(family: Family):
    return from_config(family.model.config.to_dict(), family.name)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False, custom_mapping=forgotten_rules()) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("schedule", ["none", "random@2:0.4", "random@0:0.5,random@5:0.1", "vtw@3"])
@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_equals_what_torch_counts(family: Family, schedule: str, batch: int) -> None:
    """The same question and image size in every row: no padding, so that the executed lengths are the rows' own."""
    images = [[noise(seed, *SIZES[family.name])] for seed in range(batch)]
    inputs = family.inputs(["What is it?"] * batch, images)
    model = sizes(family)
    with prune(family.model, schedule) as trace:
        total = counted(lambda: family.model(**inputs, logits_to_keep=1))
    rows = [[row.text_tokens + visual for visual in row.visual] for row in trace.rows]
    expected = sum(prefill_flops(model, row) + encoder_flops(model.encoder, GRIDS[family.name]) for row in rows)
    assert total == expected


@pytest.mark.parametrize("schedule", ["none", "random@1:0.4,random@5:0.1"])
def test_decoding_and_the_cache(family: Family, schedule: str) -> None:
    """Five new tokens take one prefill and four steps; every layer's cache has the bytes that were counted."""
    inputs = family.inputs(["What is it?"], [[noise(1, *SIZES[family.name])]])
    model = sizes(family)
    with prune(family.model, schedule) as trace:
        first = counted(lambda: family.model(**inputs, logits_to_keep=1))
        trace.rows.clear()
        out = None

        def generate() -> None:
            nonlocal out
            out = family.model.generate(
                **inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
            )

        total = counted(generate)
    (row,) = trace.rows
    assert total - first == decode_flops(model, row.cached, 4)
    assert out is not None
    width = filled_cache(out).layers[0].keys.element_size()
    for layer, layer_bytes in enumerate(kv_bytes(model, row.cached)):
        held = filled_cache(out).layers[layer]
        grown = 4 * 2 * held.keys.shape[1] * held.keys.shape[3] * width
        real = sum(tensor.numel() * tensor.element_size() for tensor in (held.keys, held.values))
        assert layer_bytes * width // model.bytes_per_number == real - grown


@pytest.mark.parametrize("row", TABLES["rows"], ids=lambda row: row["name"])
def test_the_papers_table_3(row: dict) -> None:
    """Storage and FLOPs of LLaVA-1.5-7B with 576 visual and 116.4 text tokens, decoder layers only, within 1 %.

    Where the printed row does not follow from its schedule, its deviations (FLOPs, storage) are in the file.
    """
    model = architecture("llava-1.5-7b")
    lengths = [116.4 + n for n in Schedule.parse(row["schedule"]).layer_counts(32, [576])]
    tflops = prefill_flops(model, lengths, logits=0) / 1e12
    mib = sum(kv_bytes(model, lengths)) / 2**20
    percent = [100 * (tflops / row["tflops"] - 1), 100 * (mib / row["mib"] - 1)]
    if row["consistent"]:
        assert max(map(abs, percent)) < 1
    else:
        assert percent == pytest.approx(row["deviation_percent"], abs=0.005)


def test_the_named_architectures_are_the_published_ones() -> None:
    llava, qwen = architecture("llava-1.5-7b"), architecture("qwen2.5-vl-7b")
    assert (llava.layers, llava.hidden, llava.heads, llava.kv_heads, llava.intermediate) == (32, 4096, 32, 32, 11008)
    assert (qwen.layers, qwen.hidden, qwen.heads, qwen.kv_heads, qwen.intermediate) == (28, 3584, 28, 4, 18944)
    assert llava.tokens_per_image == 576
    assert (qwen.encoder.window, qwen.encoder.full, qwen.encoder.layers) == (4, (7, 15, 23, 31), 32)
    small, large = (architecture(f"qwen2-vl-{size}") for size in ("2b", "7b"))
    assert (small.layers, small.hidden, small.heads, small.kv_heads, small.intermediate) == (28, 1536, 12, 2, 8960)
    assert replace(large, name=qwen.name, family=qwen.family, encoder=qwen.encoder) == qwen, "one decoder, two encoders"
    assert (large.encoder.hidden, large.encoder.window, large.encoder.matrices) == (1280, 0, 2)
    assert large.encoder.full == tuple(range(32))
    assert [model.encoder.projector[-1][-1] for model in (small, large)] == [small.hidden, large.hidden]
    dense = [architecture(f"qwen3-vl-{size}") for size in ("2b", "4b", "8b")]
    sizes_of = [(model.layers, model.hidden, model.heads, model.kv_heads, model.intermediate) for model in dense]
    assert sizes_of == [(28, 2048, 16, 8, 6144), (36, 2560, 32, 8, 9728), (36, 4096, 32, 8, 12288)]
    assert [model.head_dim for model in dense] == [128] * 3
    assert [(model.encoder.layers, model.encoder.hidden) for model in dense] == [(24, 1024), (24, 1024), (27, 1152)]
    assert all(len(model.encoder.projector) == 2 * 4 for model in dense), "a merger, and one for each added feature"
    assert sum(kv_bytes(llava, [1] * 32)) == 2**19  # half a MiB a token


def test_a_checkpoint_folder_and_its_config_file_are_read(family: Family) -> None:
    folder = family.folder
    one, two = architecture(str(folder)), architecture(str(folder / "config.json"))
    assert one.layers == two.layers == LAYERS
    assert one.encoder == two.encoder == sizes(family).encoder


def test_an_older_qwen_config_keeps_the_decoders_sizes_at_the_top() -> None:
    new = architecture("qwen2.5-vl-7b")
    old = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "vision_config": {"hidden_size": 1280},
    }
    assert from_config(old, new.name) == new


@pytest.mark.parametrize(
    ("stated", "width"),
    [({"dtype": "float32"}, 4), ({"torch_dtype": "float16"}, 2), ({"dtype": "bfloat16"}, 2), ({}, 2)],
)
def test_the_cache_has_the_dtype_of_the_checkpoint(stated: dict, width: int) -> None:
    model = from_config({"model_type": "llava", **stated}, "model")
    assert kv_bytes(model, [3]) == [2 * 3 * 4096 * width]


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"llava-1\.5-7b"):
        architecture("llava-1.6")
    with pytest.raises(ArchitectureError, match="holds no config"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "idefics"}')
    with pytest.raises(ArchitectureError, match="idefics"):
        architecture(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ArchitectureError, match="no JSON"):
        architecture(str(tmp_path))


_MISTRAL = {"model_type": "mistral", "hidden_size": 4096}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava", "mm_vision_tower": "openai/clip"}, "layout of LLaVA's own repository"),
        ({"model_type": "llava_llama"}, "layout of LLaVA's own repository"),
        ({"model_type": "llava_next", "text_config": {**_MISTRAL, "sliding_window": 4096}}, "sliding windows"),
        ({"model_type": "qwen2_vl", "use_sliding_window": True, "sliding_window": 4096}, "sliding windows"),
        ({"model_type": "qwen3_vl", "text_config": {"layer_types": ["sliding_attention"]}}, "sliding windows"),
        ({"model_type": "qwen3_vl", "text_config": {"num_experts": 8}}, "mixture of experts"),
        ({"model_type": "llava_next", "vision_config": {"model_type": "siglip_vision_model"}}, "only CLIP's is"),
    ],
)
def test_variants_that_no_run_takes_have_no_cost_either(config: dict, message: str) -> None:
    """A folder of another layout would get the library's default sizes: 49 visual tokens, and no error."""
    with pytest.raises(ArchitectureError, match=message):
        from_config(config, "folder")


def test_a_window_that_is_stated_and_not_used_is_none() -> None:
    """Qwen2-VL's published files state one and switch it off; LLaVA-NeXT's Mistral states that there is none."""
    for config in (
        {"model_type": "qwen2_vl", "use_sliding_window": False, "sliding_window": 32768},
        {"model_type": "qwen2_vl", "sliding_window": 32768},
        {"model_type": "llava_next", "text_config": {**_MISTRAL, "sliding_window": None}},
    ):
        assert from_config(config, "folder").layers in (32, 80)


def test_peak_memory_is_at_the_layer_where_cache_and_activations_are_largest() -> None:
    """By hand, in bytes: 16,384 a token of a layer's cache; 82,432 a token in an MLP, 2 x 4096 + 3 x 11008 numbers of 2 bytes."""
    sizes = replace(architecture("llava-1.5-7b"), layers=3)
    cached, active = 2 * 4096 * 2, (2 * 4096 + 3 * 11008) * 2
    assert (cached, active) == (16384, 82432)
    # The longest row pads the others. The second layer has the peak: the third drops more than its cache adds.
    rows = [[100, 100, 10], [90, 80, 5]]
    assert peak_bytes(sizes, rows, 0) == 2 * (200 * cached) + 200 * active
    # A long answer's cache outgrows the prefill's activations.
    assert peak_bytes(sizes, rows, 1000) == (200 + 200 + 20 + 3 * 2 * 1000) * cached
