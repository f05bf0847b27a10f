"""``peft=ADAPTER``: lmms-eval's answers with an adapter, what is recorded of it, and adapters that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
from adapters import WEIGHTS, rename, save_adapter, save_merged
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import ArgumentError, CheckpointError, ModelArguments
from lmms_prune.harness.calibrations import calibration_file
from lmms_prune.harness.loading import load_model, pick_device, shared_weights
from lmms_prune.leaderboard.records import RunRecord

SCHEDULE = "divprune@0:0.9,dart@2:0.5,fastv@3:0.2"
# Names of modules before transformers 4.52; adapters on the hub have them.
OLDER = {
    "llava": (
        ("model.model.language_model.", "model.language_model.model."),
        ("model.model.vision_tower.", "model.vision_tower.vision_model."),
        ("model.model.multi_modal_projector", "model.multi_modal_projector"),
    ),
    "qwen2_5_vl": (("model.model.language_model.", "model.model."), ("model.model.visual.", "model.visual.")),
}


@pytest.fixture(scope="module")
def adapter(harness, family, tmp_path_factory):
    return save_adapter(harness.checkpoints[family], tmp_path_factory.mktemp("adapters") / f"{family}-lora")


@pytest.fixture
def llava_adapter(harness, tmp_path):
    """An adapter that a test may damage."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return save_adapter(harness.checkpoints["llava"], tmp_path / "adapter", config)


def loaded(harness, family, **arguments):
    values = {"pretrained": str(harness.checkpoints[family]), "device": "cpu", "dtype": "float32", **arguments}
    read = ModelArguments.read(values)
    return load_model(read, pick_device(read, 0, 1))


def test_answers_are_those_of_the_merged_checkpoint(harness, family, adapter, tmp_path):
    merged = save_merged(harness.checkpoints[family], adapter, tmp_path / "merged")
    options = {"schedule": SCHEDULE, "dtype": "float32", "batch_size": 3}
    run, same, base = (
        harness.pruned(family, ["pope", "textvqa_val"], **options, **checkpoint)
        for checkpoint in ({"peft": str(adapter)}, {"pretrained": str(merged)}, {})
    )
    assert run.answers == same.answers
    assert run.answers != base.answers
    # The same tokens of every image; a method's own projections cost the adapter's products too.
    for rows, rows_merged in zip(run.accounting.values(), same.accounting.values(), strict=True):
        for row, row_merged in zip(rows, rows_merged, strict=True):
            differing = {name for name in row if row[name] != row_merged[name]}
            assert differing == {"selection_flops"}
            assert row["selection_flops"] > row_merged["selection_flops"]
    settings = run.recorded["settings"]
    assert settings["peft"] == str(adapter)
    assert len(settings["peft_sha256"]) == 16
    assert not {"peft", "peft_sha256", "load_in_4bit"} & set(base.recorded["settings"])


def test_an_adapter_of_an_older_transformers_is_loaded_whole(harness, family, adapter, tmp_path):
    """Its weights have other names; PEFT alone leaves them out with a warning."""

    def older(name):
        for new, old in OLDER[family]:
            name = name.replace(f"base_model.{new}", f"base_model.{old}")
        return name

    renamed = rename(adapter, tmp_path / "older", older)
    assert set(load_file(renamed / WEIGHTS)).isdisjoint(load_file(adapter / WEIGHTS))
    weights, same = (
        dict(loaded(harness, family, peft=str(folder)).named_parameters()) for folder in (adapter, renamed)
    )
    assert sum("lora_" in name for name in weights) == len(load_file(adapter / WEIGHTS))
    assert all(weight.equal(same[name]) for name, weight in weights.items())


def test_an_adapter_trained_again_is_another_run(harness, llava_adapter):
    first = harness.create("llava", peft=str(llava_adapter))
    weights = load_file(llava_adapter / WEIGHTS)
    save_file({name: weight * 2 for name, weight in weights.items()}, llava_adapter / WEIGHTS)
    second = harness.create("llava", peft=str(llava_adapter))
    assert first.settings["peft_sha256"] != second.settings["peft_sha256"]
    for name in ("peft_sha256", "files"):
        assert first.made_from[name] != second.made_from[name]
    assert "version of peft" in first.made_from
    assert repr(first) != repr(second)
    plain = harness.create("llava")
    assert not [name for name in plain.made_from if "peft" in name]
    # A model of its own on the leaderboard, with its own baseline.
    models = {RunRecord("llava_pruned", model.settings, True, {}).model for model in (first, second, plain)}
    assert len(models) == 3
    assert str(harness.checkpoints["llava"]) in models


def test_equal_weights_are_shared_and_an_adapters_are_not(harness, llava_adapter):
    with shared_weights():
        plain, adapted = loaded(harness, "llava"), loaded(harness, "llava", peft=str(llava_adapter))
        assert plain is not adapted
        assert loaded(harness, "llava", peft=str(llava_adapter)) is adapted
    assert not any("lora" in name for name, _ in plain.named_parameters())


def test_a_calibration_is_of_checkpoint_and_adapter(tmp_path):
    files = {calibration_file("org/model", "0.5", adapter=name) for name in (None, "org/a", "org/b")}
    assert len(files) == 3
    with pytest.raises(ArgumentError, match=r"--model org/model --model-args peft=org/a --tasks"):
        ModelArguments.read("pretrained=org/model,peft=org/a,schedule=auto,budget=192t")


# -- adapters that do not fit ------------------------------------------------------------------------------------------


def message_of(harness, folder, error=CheckpointError, family="llava", **arguments):
    with pytest.raises(error) as raised:
        harness.create(family, peft=str(folder), **arguments)
    assert str(folder) in str(raised.value)
    return str(raised.value)


def test_an_adapter_of_another_base_is_named(harness, checkpoint, tmp_path):
    llava, qwen = harness.checkpoints["llava"], harness.checkpoints["qwen2_5_vl"]
    other = save_adapter(qwen, tmp_path / "of-qwen")
    text = message_of(harness, other)
    assert f"(trained on {qwen}) does not fit pretrained={llava}" in text
    assert (
        "the adapter is of a Qwen2_5_VLForConditionalGeneration, the checkpoint a LlavaForConditionalGeneration" in text
    )
    wide = save_adapter(checkpoint("llava", hidden=128), tmp_path / "wide")
    assert "size mismatch for base_model.model" in message_of(harness, wide)
    deep = save_adapter(checkpoint("llava", layers=10), tmp_path / "deep")
    text = message_of(harness, deep)
    assert "weights in the file have no place in the model (base_model.model.model.language_model.layers.8" in text
    shallow = save_adapter(checkpoint("llava", layers=6), tmp_path / "shallow")
    text = message_of(harness, shallow)
    assert (
        "weights that the model has places for are not in the file (base_model.model.model.language_model.layers.6"
        in text
    )


def test_a_part_of_an_adapter_is_not_loaded_as_if_it_were_all(harness, llava_adapter):
    weights = load_file(llava_adapter / WEIGHTS)
    save_file(
        {name: weight for name, weight in weights.items() if "layers.2.self_attn.q_proj" not in name},
        llava_adapter / WEIGHTS,
    )
    assert "weights that the model has places for are not in the file" in message_of(harness, llava_adapter)


def test_modules_that_are_not_there_are_named(harness, llava_adapter):
    config = json.loads((llava_adapter / "adapter_config.json").read_text())
    (llava_adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query_key_value"]}))
    assert "query_key_value" in message_of(harness, llava_adapter)


def test_what_is_no_adapter_is_named(harness, llava_adapter, tmp_path):
    llava = harness.checkpoints["llava"]
    assert "is no adapter: neither a folder with an adapter_config.json" in message_of(harness, tmp_path / "nowhere")
    assert "a whole checkpoint: give it as pretrained=" in message_of(harness, llava)
    (llava_adapter / "non_lora_trainables.bin").write_bytes(b"")
    assert "trained with LLaVA's own code: non_lora_trainables.bin" in message_of(harness, llava_adapter)
    (llava_adapter / "non_lora_trainables.bin").unlink()
    (llava_adapter / WEIGHTS).write_bytes(b"{")
    assert "does not fit" in message_of(harness, llava_adapter)
    (llava_adapter / WEIGHTS).unlink()
    assert f"holds no weights: there is no {WEIGHTS}" in message_of(harness, llava_adapter)
    (llava_adapter / "adapter_config.json").write_text("{")
    assert "adapter_config.json cannot be read" in message_of(harness, llava_adapter, pretrained=str(llava_adapter))


@pytest.mark.parametrize("whole", [False, True], ids=["adapter alone", "adapter beside a whole checkpoint"])
def test_an_adapter_as_checkpoint_is_refused_with_both_arguments(harness, llava_adapter, whole, tmp_path):
    """transformers would load the base that the adapter names, which nothing records."""
    if whole:
        shutil.copytree(harness.checkpoints["llava"], tmp_path / "whole")
        shutil.copytree(llava_adapter, tmp_path / "whole", dirs_exist_ok=True)
        llava_adapter = tmp_path / "whole"
    with pytest.raises(CheckpointError) as error:
        harness.create("llava", pretrained=str(llava_adapter))
    text = f"pretrained={harness.checkpoints['llava']},peft={llava_adapter}."
    assert str(error.value).endswith(text)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_kinds_that_are_not_supported_are_named(harness, tmp_path):
    model = loaded(harness, "llava")
    sizes = {"num_layers": 2, "token_dim": 64, "num_attention_heads": 4}
    get_peft_model(model, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM", **sizes)).save_pretrained(
        tmp_path / "prompt"
    )
    text = message_of(harness, tmp_path / "prompt", UnsupportedModelError)
    assert "of the kind PROMPT_TUNING, which is not supported; supported: LORA" in text


def test_another_name_of_the_base_is_said(harness, llava_adapter):
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING")
    try:
        harness.create("llava", peft=str(llava_adapter))
        assert not [line for line in lines if "was trained on" in line]
        config = llava_adapter / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/another"}))
        harness.create("llava", peft=str(llava_adapter))
        assert [line for line in lines if f"peft={llava_adapter} was trained on org/another" in line]
    finally:
        logger.remove(sink)
