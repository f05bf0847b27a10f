"""Every wrong argument and every wrong checkpoint has one clear message; the command then ends with code 2."""

from __future__ import annotations

import re
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from lmms_prune.errors import ScheduleError
from lmms_prune.harness.arguments import ArgumentError, ModelArguments

OURS = (ArgumentError, ScheduleError)


def _holds(message: str, parts: tuple[str, ...]) -> None:
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in:\n{message}"
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (
            {"schedule": "divprune@0:0.5,fastvv@2:0.25"},
            ("unknown method 'fastvv' in stage 2", "Did you mean 'fastv'?", "divprune@0:0.5,fastvv@2:0.25", "^^^^^^"),
        ),
        ({"schedule": "xyz@2:0.5"}, ("unknown method 'xyz'", "Known: ", "dart", "vtw")),
        ({"schedule": "dart-19"}, ("'dart-19'", "neither a preset nor a stage", "Did you mean 'dart-192'?")),
        ({"schedule": "fastv"}, ("'fastv'", "needs a layer", "fastv@3:0.26")),
        ({"schedule": "dart@2"}, ("does not say how much dart keeps", "dart@2:0.44")),
        ({"schedule": "dart@two:0.4"}, ("the layer 'two' in stage 1", "whole number")),
        ({"schedule": "fastv@3:0.4;order=x"}, ("fastv has no option 'order'",)),
        ({"schedule": "dart@3:0.4;order=x"}, ("order=x", "stable and reference")),
        ({"schedule": "fastv@8:0.2"}, ("layer 8", "0 to 7", "fastv@8:0.2")),
        ({"schedule": "dart+random-192"}, ("layer 20", "0 to 7", "dart@2:0.44,random@20:0.07")),
        ({"schedule": "fastv@3:0.2,random@5:0.3"}, ("keeps never grow", "stage 2 keeps 0.3", "stage 1 only 0.2")),
        ({"schedule": "fastv@3:10t,random@5:0.3"}, ("keeps never grow", "19", "10")),
        ({"schedule": "fastv@5:0.2,random@5:0.1"}, ("layers must increase", "stage 2", "layer 5")),
        ({"schedule": "dart@2:1.2"}, ("the ratio 1.2", "[0, 1]")),
        ({"schedule": "dart@2:252"}, ("the ratio 252", "[0, 1]", "write '252t'")),
        ({"schedule": "dart@2:-0.1"}, ("-0.1", "[0, 1]")),
        ({"schedule": "fastv@0:0.2"}, ("fastv cannot act at layer 0", "lowest layer is 1")),
        ({"schedule": "vtw@3:0.5"}, ("vtw drops every visual token",)),
        ({"schedule": "fastv@3:?"}, ("'?'", "budget=192t")),
        (
            {"schedule": "fastv@3:?", "budget": "10t"},
            (
                "budget 10t cannot be met: layers 0 to 2 alone average 24t",
                "the smallest possible is 24t, the largest 64t",
            ),
        ),
        ({"schedule": "fastv@3:?", "budget": "1.5"}, ("budget '1.5'", "[0, 1]")),
        ({"schedule": "fastv@3:?", "budget": "many"}, ("budget 'many'", "192t", "0.5")),
        ({"schedule": "fastv@3:0.2", "budget": "30t"}, ("exactly one '?'", "fastv@3:0.2")),
        ({"schedule": 3}, ("3 is neither a text", "a list of stages")),
        ({"shedule": "dart@2:0.44"}, ("unknown argument 'shedule'", "Did you mean 'schedule'?")),
        ({"min_pixels": 1000}, ("unknown argument 'min_pixels'", "another model family")),
        ({"device": "cuda:7"}, ("device=cuda:7", "CUDA devices", "cpu")),
        ({"device": "gpu"}, ("device=gpu", "cpu, cuda or cuda:N")),
        ({"device_map": "bogus"}, ("device_map=bogus", "auto")),
        ({"dtype": "fp16"}, ("dtype=fp16", "float16", "bfloat16", "float32", "auto")),
        ({"seed": -1}, ("seed=-1", "at least 0")),
        ({"seed": "abc"}, ("seed=abc", "whole number")),
        ({"seed": "１２"}, ("seed=１２", "whole number")),
        ({"seed": "1.5"}, ("seed=1.5", "whole number")),
        ({"seed": True}, ("seed=True", "whole number")),
        ({"batch_size": 0}, ("batch_size=0", "at least 1")),
        ({"batch_size": "many"}, ("batch_size=many", "whole number", "auto")),
        ({"use_cache": "maybe"}, ("use_cache=maybe", "true or false")),
        ({"use_cache": False, "schedule": "vtw@3"}, ("use_cache=false", "schedule")),
        ({"positions": "compacted"}, ("positions=compacted", "Did you mean 'compact'?")),
        ({"prompt": "llama"}, ("prompt=llama", "hf", "vicuna")),
        ({"image_aspect": "square"}, ("image_aspect=square", "crop", "pad")),
        ({"attn_implementation": "flash"}, ("attn_implementation=flash", "flash_attention_2")),
        ({"system_prompt": ""}, ("system_prompt is empty",)),
        ({"chat_template": "{% if %}"}, ("chat_template", "{% if %}")),
        ({"chat_template": "/no/such/template.jinja"}, ("chat_template", "/no/such/template.jinja", "no such file")),
        ({"system_prompt": "/no/such/prompt.txt"}, ("system_prompt=/no/such/prompt.txt", "no such file")),
        ({"schedule": ""}, ("empty", "write 'none'")),
        ({"schedule": []}, ("empty", "write 'none'")),
        ({"device": "cpu", "device_map": "auto"}, ("device=cpu contradicts device_map=auto",)),
        ({"prompt": "vicuna", "chat_template": "{{ messages }}"}, ("prompt=vicuna and chat_template",)),
    ],
    ids=str,
)
def test_wrong_llava_arguments(given, parts, harness):
    with pytest.raises(OURS) as error:
        harness.create("llava", **given)
    _holds(str(error.value), parts)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({"prompt": "vicuna"}, ("unknown argument 'prompt'", "another model family")),
        ({"image_aspect": "pad"}, ("unknown argument 'image_aspect'", "another model family")),
        ({"positions": "compact"}, ("positions=compact", "M-RoPE", "positions=original")),
        ({"min_pixels": 0}, ("min_pixels=0", "at least 1")),
        ({"min_pixels": 200000, "max_pixels": 100000}, ("min_pixels", "200000", "max_pixels", "100000")),
        ({"schedule": "fastv@3:?", "budget": "30t"}, ("'30t' is a number of tokens", "differ in size", "ratio")),
        (
            {"schedule": "fastv@3:?", "budget": "0.2"},
            ("budget 0.2 cannot be met: layers 0 to 2 alone average 0.375;", "the smallest possible is 0.375,"),
        ),
    ],
    ids=str,
)
def test_wrong_qwen_arguments(given, parts, harness):
    with pytest.raises(OURS) as error:
        harness.create("qwen2_5_vl", **given)
    _holds(str(error.value), parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("just/a/path", ("'just/a/path' is no argument", "name=value")),
        ("seed=1,schedule=vtw@3,seed=2", ("'seed' is given twice",)),
        ("seed=,schedule=vtw@3", ("seed=",)),
    ],
)
def test_wrong_argument_texts(text, parts, harness):
    with pytest.raises(ArgumentError) as error:
        harness.create("llava", text)
    _holds(str(error.value), parts)


@pytest.mark.parametrize(("name", "inner", "outer"), [("batch_size", 2, "4"), ("device", "cpu", "cuda:0")])
def test_contradicting_the_command_is_an_error(name, inner, outer, harness):
    from lmms_prune.harness.models import MODELS

    given = {"pretrained": str(harness.checkpoints["llava"]), name: inner}
    with pytest.raises(ArgumentError, match=f"{name}={inner} contradicts --{name} {outer}"):
        MODELS["llava_pruned"].create_from_arg_string(given, {name: outer})


def _text_only(folder: Path, harness) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=32, **small)).save_pretrained(folder)


def _llava_onevision(folder: Path, harness) -> None:
    from transformers import LlavaOnevisionConfig

    LlavaOnevisionConfig().save_pretrained(folder)


def _empty(folder: Path, harness) -> None:
    folder.mkdir()


def _nothing(folder: Path, harness) -> None:
    pass


def _copy(folder: Path, harness, *without: str) -> Path:
    shutil.copytree(harness.checkpoints["llava"], folder)
    for pattern in without:
        for file in folder.glob(pattern):
            file.unlink()
    return folder / "model.safetensors"


def _edit(folder: Path, harness, change) -> None:
    from safetensors.torch import load_file, save_file

    file = _copy(folder, harness)
    weights = load_file(file)
    name = next(name for name in weights if "layers.3.self_attn.q_proj" in name)
    change(weights, name)
    save_file(weights, file, metadata={"format": "pt"})


def _missing_weight(folder: Path, harness) -> None:
    _edit(folder, harness, lambda weights, name: weights.pop(name))


def _wrong_shape(folder: Path, harness) -> None:
    _edit(folder, harness, lambda weights, name: weights.update({name: weights[name][:8].clone()}))


def _extra_layer(folder: Path, harness) -> None:
    """As with a config.json that says fewer layers than the checkpoint has."""
    _edit(folder, harness, lambda weights, name: weights.update({name.replace("s.3.", "s.8."): weights[name].clone()}))


def _adapter(folder: Path, harness) -> None:
    _edit(
        folder,
        harness,
        lambda weights, name: weights.update({name.replace("weight", "lora_A"): weights[name][:2].clone()}),
    )


def _no_weights(folder: Path, harness) -> None:
    _copy(folder, harness, "model.safetensors")


def _truncated(folder: Path, harness) -> None:
    file = _copy(folder, harness)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _experts(folder: Path, harness) -> None:
    _config(folder, "qwen3_vl_moe")


def _linear(folder: Path, harness) -> None:
    _config(folder, "qwen3_5")


def _sliding(folder: Path, harness) -> None:
    """A Mistral whose layers slide, in a LLaVA; refused before a weight is looked for."""
    _config(folder, "llava", text_config={"model_type": "mistral", "sliding_window": 4096})


def _config(folder: Path, model_type: str, **values) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(model_type, **values).save_pretrained(folder)


def _no_processor(folder: Path, harness) -> None:
    _copy(folder, harness, "*processor*")


def _no_tokenizer(folder: Path, harness) -> None:
    _copy(folder, harness, "token*")


def _no_template(folder: Path, harness) -> None:
    _copy(folder, harness, "chat_template*")


def _broken_config(folder: Path, harness) -> None:
    _copy(folder, harness)
    (folder / "config.json").write_text("{")


OTHER_MODELS = (_text_only, _llava_onevision, _experts, _linear, _sliding)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (_text_only, ("'llama'", "no image input", "llava_pruned", "qwen2_5_vl_pruned", "qwen2_vl_pruned")),
        (
            _llava_onevision,
            ("'llava_onevision'", "not supported", "llava_pruned", "qwen2_5_vl_pruned", "qwen2_vl_pruned"),
        ),
        (_experts, ("'qwen3_vl_moe'", "mixture of experts", "dense", "qwen3_vl_pruned")),
        (_linear, ("'qwen3_5'", "linear attention", "qwen3_vl_pruned")),
        (_sliding, ("sliding windows", "sliding_attention", "full attention", "qwen3_vl_pruned")),
        (_empty, ("pretrained=", "no checkpoint", "config.json")),
        (_nothing, ("pretrained=", "no checkpoint", "config.json")),
        (_broken_config, ("pretrained=", "no checkpoint")),
        (_missing_weight, ("pretrained=", "1 weights are missing", "layers.3.self_attn.q_proj")),
        (_wrong_shape, ("pretrained=", "wrong shape", "layers.3.self_attn.q_proj")),
        (_extra_layer, ("pretrained=", "1 weights have no place", "layers.8.self_attn.q_proj", "config.json")),
        (_adapter, ("pretrained=", "1 weights have no place", "layers.3.self_attn.q_proj.lora_A", "not merged")),
        (_no_weights, ("pretrained=", "model.safetensors")),
        (_truncated, ("pretrained=",)),
        (_no_processor, ("pretrained=", "processor")),
        (_no_tokenizer, ("pretrained=", "tokenizer")),
        (_no_template, ("pretrained=", "no chat template", "prompt=vicuna", "chat_template=FILE")),
    ],
)
def test_wrong_checkpoints(make, parts, harness, tmp_path):
    from lmms_prune.errors import UnsupportedModelError

    make(tmp_path / "made", harness)
    with pytest.raises((*OURS, UnsupportedModelError)) as error:
        harness.create("llava", {"pretrained": str(tmp_path / "made")})
    _holds(str(error.value), parts if make in OTHER_MODELS else (*parts, str(tmp_path)))


def test_the_other_familys_checkpoint_names_its_model(harness, family):
    from lmms_prune.errors import UnsupportedModelError

    other = next(name for name in harness.models if name != family)
    with pytest.raises(UnsupportedModelError) as error:
        harness.create(family, {"pretrained": str(harness.checkpoints[other])})
    _holds(str(error.value), (f"'{other}'", f"use --model {harness.models[other]}", f"not {harness.models[family]}"))


def test_beam_search_is_refused_with_a_schedule_only(harness):
    options = {"gen_kwargs": "num_beams=2"}
    with pytest.raises(ArgumentError) as error:
        harness.pruned("llava", ["pope"], options, schedule="dart@2:0.44")
    _holds(str(error.value), ("num_beams=2", "use num_beams=1"))
    run = harness.pruned("llava", ["pope"], options)
    assert all(call["num_beams"] == 2 for call in run.calls)


def test_no_argument_is_redacted_by_the_harness():
    """The harness writes [REDACTED] for these names, and the schedule's neighbours would be lost."""
    names = [field.name for field in fields(ModelArguments)]
    assert len(names) > 10
    assert not [name for name in names if re.search(r"(token|secret|password|api_key)$", name)]


@pytest.fixture(scope="module")
def processes(harness, tmp_path_factory):
    weightless = tmp_path_factory.mktemp("checkpoints") / "weightless"
    _no_weights(weightless, harness)
    llava, qwen = (str(harness.checkpoints[family]) for family in ("llava", "qwen2_5_vl"))
    nowhere = weightless / "nowhere"
    lines = {
        "method": ("llava_pruned", f"pretrained={llava},schedule=divprune@0:0.5,fastvv@2:0.25"),
        "argument": ("qwen2_5_vl_pruned", f"pretrained={qwen},shedule=vtw@3"),
        "weights": ("llava_pruned", f"pretrained={weightless}"),
        "guide of LLaVA": ("llava_pruned", f"pretrained={llava},schedule=sgl@2:0.3;guide={nowhere}"),
        "guide of Qwen": ("qwen2_5_vl_pruned", f"pretrained={qwen},schedule=sgl@2:0.3;guide={nowhere}"),
        "beams": ("llava_pruned", f"pretrained={llava},schedule=vtw@3"),
    }
    extra = {"beams": ("--gen_kwargs", "num_beams=2")}
    return {
        name: harness.fork("--model", model, "--model_args", text, "--tasks", "pope", *extra.get(name, ()))
        for name, (model, text) in lines.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("method", ("unknown method 'fastvv'", "Did you mean 'fastv'?", "\n                   ^^^^^^\n")),
        ("argument", ("unknown argument 'shedule'", "Did you mean 'schedule'?")),
        ("weights", ("pretrained=", "model.safetensors")),
        # What a method lacks is known before the first sample.
        ("guide of LLaVA", ("guide=", "nowhere cannot be loaded")),
        ("guide of Qwen", ("guide=", "nowhere cannot be loaded")),
        ("beams", ("num_beams=2", "use num_beams=1")),
    ],
)
def test_the_command_ends_with_code_2_and_the_message(name, parts, processes):
    run = processes[name]
    assert run.results is None
    assert run.returncode == 2
    assert "Traceback" not in run.stdout + run.stderr
    _holds(run.stderr, parts)
    assert run.stderr.count("lmms-prune: error: ") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pretrained={P},foo", "'foo' is no argument"),
        ("foo,pretrained={P}", "'foo' is no argument"),
        ("pretrained={P},schedule=none,schedule=vtw@3", "'schedule' is given twice"),
        ("pretrained={P},schedule=", "write 'none'"),
    ],
)
def test_wrong_texts(text, message, harness):
    with pytest.raises(OURS, match=message):
        harness.create("llava", text.replace("{P}", str(harness.checkpoints["llava"])))


@pytest.mark.parametrize("given", [["a"], {1: "a"}, 3])
def test_what_is_neither_text_nor_mapping(given, harness):
    with pytest.raises(ArgumentError, match=r"neither a text nor a mapping|unknown argument '1'"):
        harness.create("llava", given)


UNSEEN = {
    "num_fewshot": (2, "--num_fewshot 2: lmms-eval shows no examples to chat models"),
    "system_instruction": (
        "Answer in German.",
        "--system_instruction Answer in German.: .* use --model_args system_prompt=",
    ),
    "apply_chat_template": (
        True,
        "--apply_chat_template: the checkpoint's chat template is applied anyway; leave it out",
    ),
}


@pytest.mark.parametrize("name", UNSEEN)
@pytest.mark.parametrize("as_object", [False, True], ids=["arguments", "object"])
def test_an_option_of_which_the_model_is_shown_nothing_is_refused(name, as_object, harness):
    """lmms-eval answers as without it, and writes it into the results; of a few it ends in an error of its own."""
    value, message = UNSEEN[name]
    given = {"pretrained": str(harness.checkpoints["llava"])}
    if not as_object:
        with pytest.raises(ArgumentError, match=message):
            harness.evaluate("llava_pruned", ["pope"], given, **{name: value})
    elif name == "system_instruction":  # the others' own errors come first
        with pytest.raises(ArgumentError, match=message):
            harness.evaluate(harness.create("llava", given), ["pope"], **{name: value})


def test_an_option_that_is_set_to_nothing_is_not_refused(harness):
    nothing = {"num_fewshot": 0, "system_instruction": "", "apply_chat_template": False, "fewshot_as_multiturn": False}
    run = harness.evaluate("llava_pruned", ["pope"], {"pretrained": str(harness.checkpoints["llava"])}, **nothing)
    assert len(run.calls) == 4


def test_an_image_that_the_family_s_reader_refuses_is_told(harness):
    from PIL import Image

    model = harness.create("qwen2_5_vl")
    with pytest.raises(ArgumentError, match="cannot be made the model's input: absolute aspect ratio must be smaller"):
        model.inputs(Image.new("RGB", (10, 3000)), "what?")
