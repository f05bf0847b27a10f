"""``lmms-prune calibrate …`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from built import UNLIKE
from forking import Forking
from masked import Searched
from tiny import noise
from typer.testing import CliRunner

from lmms_prune import Schedule
from lmms_prune.cli import app

MODELS = {"llava": "llava_pruned", "qwen2_5_vl": "qwen2_5_vl_pruned"}
SEARCHES = {
    "fitprune": ["--reduction", "50"],
    "vflowopt": ["--budget", "0.3", "--layers", "1,2", "--trials", "4"],
    "vtw": ["--lowest", "1", "--eta", "1e9"],
}


def call(search: str, *args: Any) -> Any:
    return CliRunner().invoke(app, ["calibrate", search, *map(str, args)])


def arguments(family: str, folder: Path, samples: Path) -> list[Any]:
    pixels = "" if family == "llava" else ",min_pixels=784"
    return ["--model", folder, "--model-args", f"device=cpu,dtype=float32{pixels}", "--data", samples]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("family", UNLIKE)
def test_a_search_prints_a_schedule_that_runs(
    shallow: dict[str, Path], samples: Path, family: str, search: str
) -> None:
    options = arguments(family, shallow[family], samples)
    result = call(search, *options, *SEARCHES[search], "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert printed["samples"] == 3
    schedule = Schedule.parse(printed["schedule"])
    schedule.check(4, [64] if family == "llava" else None)
    assert {stage.method for stage in schedule.stages} == {search}
    if family == "llava":
        shown = call(search, *options, *SEARCHES[search])
        assert shown.exit_code == 0
        assert shown.stdout.strip().endswith(printed["schedule"])
    if search == "fitprune":
        assert printed["reduction"] >= 0.5
        assert len(printed["deletions"]) == 4
    if search == "vtw":
        assert printed["schedule"] == "vtw@1"
        assert list(printed["divergences"]) == ["1", "2", "3"]


@pytest.mark.parametrize("family", UNLIKE)
def test_prompts_are_those_of_an_evaluation(
    all_searched: dict[str, Searched], shallow: dict[str, Path], family: str
) -> None:
    """The checkpoint's own chat template and processor, the image first."""
    from lmms_prune.harness.models import MODELS as CLASSES

    kind = CLASSES[MODELS[family]]
    model_args = {"pretrained": str(shallow[family]), "device": "cpu", "dtype": "float32"}
    pixels = {} if family == "llava" else {"min_pixels": 784, "max_pixels": 784 * 64}
    wrapper = kind.create_from_arg_string({**model_args, **pixels})
    image = noise(1)
    got, want = wrapper.inputs(image, "how many"), all_searched[family].sdpa.inputs(["how many"], [[image]])
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor.to(got[name].dtype)), name
    assert got["pixel_values"].dtype == torch.float32


@pytest.mark.slow
def test_as_a_process(shallow: dict[str, Path], samples: Path, forking: Forking) -> None:
    options = arguments("llava", shallow["llava"], samples)
    search = ("--lowest", "2", "--limit", "1", "--eta", "0", "--json")
    process = forking.run("lmms-prune", "calibrate", "vtw", *options, *search)
    assert process.returncode == 1
    printed = json.loads(process.stdout.strip().splitlines()[-1])
    assert (printed["schedule"], printed["samples"], list(printed["divergences"])) == (None, 1, ["2", "3"])
    assert "lmms-prune: no layer's divergence is at or below --eta 0.\n" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("search", "more", "message"),
    [
        (
            "vtw",
            ["--wrapper", "clip"],
            "--wrapper clip is unknown. Known: llava_next_pruned, llava_pruned, qwen2_5_vl_pruned, qwen2_vl_pruned, qwen3_vl_pruned.",
        ),
        ("vtw", ["--wrapper", "qwen2_5_vl_pruned"], "is a LLaVA-1.5, which llava_pruned loads; leave --wrapper out."),
        ("vtw", ["--model", "/nowhere"], "pretrained=/nowhere is no checkpoint"),
        ("vtw", ["--model-args", "schedule=vtw@3"], "--model-args schedule=…: the command itself decides"),
        ("vtw", ["--model-args", "budget=0.5"], "--model-args budget=…: the command itself decides"),
        ("vtw", ["--model-args", "pretraind=x"], "unknown argument 'pretraind'"),
        ("vtw", ["--data", "/nowhere.jsonl"], "--data /nowhere.jsonl cannot be read: No such file"),
        ("vtw", ["--images", "/nowhere"], "--images /nowhere is not a folder"),
        ("vtw", ["--limit", "0"], "--limit"),
        ("vtw", ["--lowest", "9"], "--lowest 9 is beyond the model, whose layers are 0 to 3."),
        ("fitprune", ["--reduction", "100"], "--reduction 100 must lie between 0 and 100 percent."),
        ("fitprune", ["--reduction", "99"], "--reduction 99: of this model at most"),
        ("fitprune", [], "--reduction"),
        ("vflowopt", ["--budget", "192t"], "--budget 192t is not a ratio"),
        ("vflowopt", ["--budget", "0.2"], "--layers 9,18 must increase and lie between 1 and 3"),
        ("vflowopt", ["--budget", "0.2", "--layers", "1;2"], "--layers 1;2 must be whole numbers with commas: 9,18."),
    ],
)
def test_errors_exit_with_2_and_one_message(
    shallow: dict[str, Path], samples: Path, search: str, more: list[str], message: str
) -> None:
    result = call(search, *arguments("llava", shallow["llava"], samples), *more)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_samples_are_read_before_the_weights(samples: Path) -> None:
    file = samples.parent / "text.jsonl"
    file.write_text('{"image": "samples.jsonl", "question": "x"}', "utf-8")
    assert "cannot be read: No such file" in call("vtw", "--model", "x", "--data", "/nowhere.jsonl").output
    assert "pretrained=x is no checkpoint" in call("vtw", "--model", "x", "--data", file).output
