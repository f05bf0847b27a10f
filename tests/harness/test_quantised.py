"""``load_in_4bit`` and ``load_in_8bit``: with bitsandbytes on the CPU where it is installed; refused combinations everywhere."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from adapters import save_adapter
from peft import LoraConfig

from lmms_prune import prune
from lmms_prune.bench.models import ragged_inputs
from lmms_prune.compat.bitsandbytes import CONVERSIONS, PRODUCTS
from lmms_prune.harness import quantisation
from lmms_prune.harness.arguments import ArgumentError, ModelArguments
from lmms_prune.harness.loading import load_model, pick_device
from lmms_prune.harness.quantisation import loading_options
from lmms_prune.methods import METHODS
from lmms_prune.pruning.flops import ProductCounter
from lmms_prune.pruning.hooks import check
from lmms_prune.schedule import Schedule

SCHEDULE = "divprune@0:0.9,dart@2:0.5,fastv@3:0.2"
BITS = {"load_in_4bit": "Linear4bit", "load_in_8bit": "Linear8bitLt"}
needs_library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: pip install '.[dev]'"
)
by_bits = pytest.mark.parametrize("bits", BITS)


@pytest.fixture
def pretended(monkeypatch):
    """As if bitsandbytes were installed, for what needs no weight."""
    monkeypatch.setattr(quantisation, "find_spec", lambda name: name)


def test_both_are_refused():
    with pytest.raises(ArgumentError, match="load_in_4bit=true and load_in_8bit=true exclude each other"):
        ModelArguments.read("pretrained=x,load_in_4bit=true,load_in_8bit=true")
    with pytest.raises(ArgumentError, match="load_in_4bit=yes must be true or false"):
        ModelArguments.read("pretrained=x,load_in_4bit=yes")
    read = ModelArguments.read("pretrained=x,load_in_4bit=true,load_in_8bit=false")
    assert read.quantisation == "load_in_4bit"
    assert read.settings()["load_in_4bit"] == "True"
    assert "load_in_8bit" not in read.settings()


@by_bits
def test_without_the_library_the_message_says_what_to_install(bits, harness, monkeypatch):
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError) as error:
        harness.create("llava", **{bits: "true"})
    assert f"{bits}=true needs bitsandbytes, which is not installed: pip install 'lmms-prune[quantised]'" in str(
        error.value
    )


@pytest.mark.parametrize(("asked", "dtype"), [("auto", torch.float16), ("bfloat16", torch.bfloat16)])
def test_four_bits_are_nf4_and_computed_in_the_runs_dtype(asked, dtype, pretended):
    class Config:
        dtype = torch.float16

    read = ModelArguments.read({"pretrained": "x", "dtype": asked, "load_in_4bit": "true"})
    config = loading_options(read, Config)["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == (True, "nf4", dtype)
    read = ModelArguments.read({"pretrained": "x", "dtype": asked, "load_in_8bit": "true"})
    assert loading_options(read, Config)["quantization_config"].load_in_8bit
    assert loading_options(ModelArguments.read({"pretrained": "x"}), Config) == {}


def loaded(folder, **arguments):
    read = ModelArguments.read({"pretrained": str(folder), "device": "cpu", "dtype": "float32", **arguments})
    return load_model(read, pick_device(read, 0, 1))


def exact(model):
    """The same model, computing in float32 also on CPUs for which bitsandbytes has code in bfloat16."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False
    return model


def unpacked(model):
    """A float32 model whose Linear layers hold what the four-bit ones stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from torch import nn

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Linear4bit":
                weight = dequantize_4bit(child.weight.data, child.weight.quant_state)
                linear = nn.Linear(child.in_features, child.out_features, bias=child.bias is not None)
                linear.weight.data = weight.to(torch.float32)
                if child.bias is not None:
                    linear.bias.data = child.bias.data
                setattr(module, name, linear)
    return model


@needs_library
def test_every_method_sees_the_quantised_layers(harness, family):
    """Kept tokens and logits are those of a model that holds the same weights in float32."""
    folder = harness.checkpoints[family]
    model, plain = exact(loaded(folder, load_in_4bit="true")), unpacked(loaded(folder, load_in_4bit="true"))
    whole = loaded(folder)
    inputs = ragged_inputs(model, 2, None if family == "llava" else (6, 6), 20)
    tried = 0
    for spec in METHODS.values():
        schedule = Schedule.parse(spec.example)
        if not spec.ready or not _runs(model, schedule):
            continue
        results = []
        for subject in (model, plain, whole):
            options = {"samples": ["a", "b"], "questions": ["what is this", "is it red"]}
            with torch.no_grad(), prune(subject, schedule, **options) as trace:
                results.append((subject(**inputs, logits_to_keep=1).logits, [row.indices(0) for row in trace.rows]))
        (logits, kept), (logits_plain, kept_plain), (logits_whole, _) = results
        assert kept == kept_plain, spec.name
        torch.testing.assert_close(logits, logits_plain, rtol=1e-3, atol=1e-3, msg=spec.name)
        # Quantising changes what it can change; a method that drops all tokens has no image left, but words.
        assert not torch.equal(logits, logits_whole), spec.name
        tried += 1
    assert tried >= 20


def _runs(model, schedule):
    try:
        check(model, schedule)
    except ValueError:
        return False
    return True


@needs_library
@by_bits
def test_an_evaluation_runs_and_records_it(harness, family, bits):
    run = harness.pruned(family, ["pope"], schedule=SCHEDULE, dtype="float32", **{bits: "true"})
    base = harness.pruned(family, ["pope"], schedule=SCHEDULE, dtype="float32")
    assert run.recorded["settings"][bits] == "True"
    assert bits not in base.recorded["settings"]
    assert [row["kept_visual_tokens"] for row in run.accounting["pope"]] == [
        row["kept_visual_tokens"] for row in base.accounting["pope"]
    ]
    # A method's own projections are products of the same sizes, quantised or not.
    assert [row["selection_flops"] for row in run.accounting["pope"]] == [
        row["selection_flops"] for row in base.accounting["pope"]
    ]
    model = harness.create(family, **{bits: "true"})
    assert "version of bitsandbytes" in model.made_from
    kinds = {type(layer.self_attn.q_proj).__name__ for layer in model.model.model.language_model.layers}
    assert kinds == {BITS[bits]}


@needs_library
def test_widths_that_the_cpu_code_cannot_run_are_named(harness, checkpoint):
    folder = checkpoint("llava", hidden=96)
    layer = loaded(harness.checkpoints["llava"], load_in_4bit="true").model.language_model.layers[0].self_attn.q_proj
    if not layer.support_avx512bf16_for_cpu:
        loaded(folder, load_in_4bit="true")
        return
    with pytest.raises(
        ArgumentError, match=r"in four bits on this CPU: .* multiple of 64 numbers, and model\.\S+ has 96; use"
    ):
        loaded(folder, load_in_4bit="true")
    loaded(folder, load_in_8bit="true")


@needs_library
def test_an_adapter_on_four_bits(harness, tmp_path):
    """QLoRA: the quantised layer and the adapter beside it, also for the methods' own projections."""
    folder = harness.checkpoints["llava"]
    adapter = save_adapter(folder, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"]))
    model, plain = loaded(folder, load_in_4bit="true", peft=str(adapter)), loaded(folder, load_in_4bit="true")
    assert type(model.model.language_model.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    inputs = ragged_inputs(model, 2, None, 20)
    logits = []
    for subject in (model, plain):
        with torch.no_grad(), prune(subject, SCHEDULE):
            logits.append(subject(**inputs, logits_to_keep=1).logits)
    assert not torch.allclose(*logits, rtol=1e-2)


@needs_library
def test_a_folder_that_bitsandbytes_stored_runs_as_it_is(harness, tmp_path):
    folder = harness.checkpoints["llava"]
    model = loaded(folder, load_in_4bit="true")
    model.save_pretrained(tmp_path / "stored")
    stored = loaded(tmp_path / "stored")
    inputs = ragged_inputs(model, 2, None, 20)
    with torch.no_grad():
        assert torch.equal(stored(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ArgumentError, match=r"is quantised already \(bitsandbytes\); leave load_in_8bit out"):
        loaded(tmp_path / "stored", load_in_8bit="true")


def test_a_stored_folder_without_the_library_says_what_to_install(harness, tmp_path, monkeypatch):
    config = json.loads((harness.checkpoints["llava"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match="is stored quantised and needs bitsandbytes, which is not installed"):
        loaded(tmp_path)


@needs_library
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rows", [1, 5])
def test_quantised_products_are_counted_as_those_that_they_stand_for(bits, rows):
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layer = Linear4bit(64, 32, quant_type="nf4") if bits == 4 else Linear8bitLt(64, 32, has_fp16_weights=False)
    layer.load_state_dict({"weight": torch.randn(32, 64), "bias": torch.zeros(32)})
    layer = layer.to("cpu")
    with ProductCounter() as counter, torch.no_grad():
        layer(torch.randn(2, rows, 64))
    assert counter.flops == 2 * 2 * rows * 64 * 32


@needs_library
def test_the_operations_that_are_counted_have_their_arguments_where_the_rules_take_them():
    import bitsandbytes  # noqa: F401  (defines them)

    second = {"gemv_4bit": "shapeB", "gemm_4bit": "shapeB", "int8_mixed_scaled_mm": "CB"}
    for name in PRODUCTS:
        arguments = [x.name for x in getattr(torch.ops.bitsandbytes, name.split("::")[1]).default._schema.arguments]
        assert arguments[0] == "A", name
        short = name.split("::")[1]
        assert arguments[2 if short in second else 1] == second.get(short, "B"), name
    for name in CONVERSIONS:
        assert hasattr(torch.ops.bitsandbytes, name)
