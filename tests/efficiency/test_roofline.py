"""Estimated times and memory on a card, and what bench measured on it beside them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.efficiency.estimate import estimate, on_gpu, prompt_sizes
from lmms_prune.efficiency.roofline import FILLED, GPUS, Gpu, weight_bytes
from lmms_prune.models.architectures import PUBLISHED, architecture
from lmms_prune.schedule import Budget, Schedule

LLAVA = architecture("llava-1.5-7b")
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "400"}
ENDLESS = 1e40


def call(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["schedule", *map(str, args)], env=PLAIN)
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def card(flops: float, bandwidth: float, memory: float = 80e9) -> Gpu:
    return Gpu("test", "test card", flops, bandwidth, memory, "TEST", "no data sheet")


def test_without_limits_of_bandwidth_the_times_are_those_of_the_flops() -> None:
    parsed = Schedule.parse("dart@2:0.44,random@20:0.07")
    cost = estimate(LLAVA, parsed, 576, 64)
    least = on_gpu(LLAVA, parsed, 576, 64, card(1e12, ENDLESS))
    assert least.first_token == pytest.approx(cost.total_flops / 1e12)
    assert least.encoder == pytest.approx(cost.encoder_flops / 1e12)


def test_without_limits_of_flops_the_times_are_those_of_reading() -> None:
    parsed = Schedule.parse("vtw@16")
    least = on_gpu(LLAVA, parsed, 576, 64, card(ENDLESS, 1e9))
    embeddings = LLAVA.vocabulary * LLAVA.hidden * 2
    cache = 2 * LLAVA.kv_heads * LLAVA.head_dim * 2 * (16 * (576 + 64) + 16 * 64)
    assert least.first_token == pytest.approx((weight_bytes(LLAVA) - embeddings + cache) / 1e9)
    decoder = weight_bytes(LLAVA) - embeddings - least.encoder * 1e9
    assert least.per_token == pytest.approx((decoder + cache) / 1e9)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llava-1.5-7b", 7.06),
        ("llava-1.5-13b", 13.35),
        ("qwen2-vl-2b", 2.21),
        ("qwen2-vl-7b", 8.29),
        ("qwen2.5-vl-3b", 3.75),
        ("qwen2.5-vl-7b", 8.29),
        ("qwen3-vl-2b", 2.13),
        ("qwen3-vl-4b", 4.44),
        ("qwen3-vl-8b", 8.77),
    ],
)
def test_the_weights_are_those_of_the_published_checkpoints(name: str, billions: float) -> None:
    """Parameters as the hub's pages print them, of which matrices are nearly all; small models share one for words in and out."""
    assert weight_bytes(architecture(name)) / 2e9 == pytest.approx(billions, rel=0.01)


def test_an_estimate_of_what_may_be_fewer_tokens_says_so() -> None:
    words = ("--model", "llava-1.5-7b", "--gpu", "a100")
    assert "the estimate is of the most that it keeps" in call("prumerge@0", *words)
    assert "the estimate is of the most" not in call("dart@2:0.44", *words)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    parsed, gpu = Schedule.parse("dart@2:0.44"), GPUS["l40s"]
    largest = on_gpu(LLAVA, parsed, 576, 64, gpu).largest_batch
    fits, beyond = (on_gpu(LLAVA, parsed, 576, 64, gpu, batch=n).peak for n in (largest, largest + 1))
    assert fits <= FILLED * gpu.memory < beyond
    assert on_gpu(LLAVA, Schedule(()), 576, 64, gpu).largest_batch < largest
    small = card(1e12, 1e12, 10e9)
    assert on_gpu(LLAVA, parsed, 576, 64, small).largest_batch == 0


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("gpu", GPUS)
def test_more_tokens_never_take_less(name: str, gpu: str) -> None:
    model = architecture(name)
    rows = [
        on_gpu(model, Schedule.parse(f"random@2:{keep}"), model.example_tokens, 64, GPUS[gpu]) for keep in (0.1, 0.5, 1)
    ]
    for fewer, more in pairwise(rows):
        assert fewer.first_token <= more.first_token
        assert fewer.per_token <= more.per_token
        assert fewer.peak <= more.peak
        assert fewer.largest_batch >= more.largest_batch


def test_every_card_names_its_source_and_is_told_from_the_others_by_its_name() -> None:
    names = {
        "b200": "NVIDIA B200",
        "h200": "NVIDIA H200",
        "h100": "NVIDIA H100 80GB HBM3",
        "h100-pcie": "NVIDIA H100 PCIe",
        "a100": "NVIDIA A100-SXM4-80GB",
        "a100-40gb": "NVIDIA A100-SXM4-40GB",
        "l40s": "NVIDIA L40S",
        "l4": "NVIDIA L4",
        "a6000": "NVIDIA RTX A6000",
        "rtx4090": "NVIDIA GeForce RTX 4090",
    }
    assert set(names) == set(GPUS)
    for name, gpu in GPUS.items():
        assert gpu.source.startswith("https://")
        assert [other for other, device in names.items() if gpu.is_named(device)] == [name]
    for device in ("NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA RTX 6000 Ada Generation", "NVIDIA L40"):
        assert not any(gpu.is_named(device) for gpu in GPUS.values())


def test_the_command_says_that_it_estimates_and_what_it_assumes() -> None:
    printed = call("dart@2:0.44", "--model", "llava-hf/llava-1.5-7b-hf", "--gpu", "H100", "--batch-size", 4)
    assert "Estimate for H100 SXM 80 GB: first token" in printed
    assert "An estimate, not a measurement" in printed
    assert GPUS["h100"].source in printed
    assert "batch 4" in printed
    shown = json.loads(call("dart@2:0.44", "--model", "llava-1.5-7b", "--gpu", "h100", "--json"))["estimate"]
    assert shown["schedule"]["first_token_ms"] < shown["unpruned"]["first_token_ms"]
    assert (shown["gpu"], shown["batch"]) == ("h100", 1)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--model", "llava-1.5-7b", "--gpu", "h10"), "--gpu h10: unknown. Did you mean"),
        (("--gpu", "h100"), "an estimate needs the model's sizes"),
        (("--model", "llava-1.5-7b", "--bench", "x.json"), "name the card"),
        (("--model", "llava-1.5-7b", "--gpu", "h100", "--bench", "nowhere.json"), "No such file"),
    ],
)
def test_what_cannot_be_estimated_is_refused(words: tuple[str, ...], reason: str) -> None:
    assert reason in call("dart@2:0.44", *words, code=2)


def timed(schedule: str, new_tokens: int) -> dict[str, object]:
    parts = {"tower": 0.004, "selection": 0.001, "prefill": 0.02, "decode": 0.3}
    case = {"batch": 1, "text_tokens": 60, "new_tokens": new_tokens}
    return {"schedule": schedule, "case": case, "parts": parts, "peak_bytes": 15 * 2**30}


@pytest.mark.parametrize("suite", [False, True])
def test_what_bench_measured_on_the_card_stands_beside_the_estimate(tmp_path: Path, suite: bool) -> None:
    device, path = "NVIDIA H100 80GB HBM3", tmp_path / "bench.json"
    runs = [timed("none", 1), timed("dart@2:0.44", 31), timed("random@2:0.1", 1)]
    output = {"model": "llava-1.5-7b, float16, cuda", "runs": runs}
    whole = {"facts": {"card": f"{device}, 80 GiB"}, "parts": {"speed": {"result": output}, "failed": {"result": None}}}
    path.write_text(json.dumps(whole if suite else {**output, "card": device}))
    words = ("dart@2:0.44", "--model", "llava-hf/llava-1.5-7b-hf", "--bench", path)
    printed = call(*words, "--gpu", "h100")
    assert (
        "Measured: unpruned: first token 25.00 ms, peak memory 15.00 GiB (batch 1, 60 text tokens) on NVIDIA H100"
        in printed
    )
    assert "Measured: first token 25.00 ms, each further token 10.00 ms" in printed
    assert printed.count("Measured:") == 2
    assert "Measured:" not in call(*words, "--gpu", "a100")
    output["model"] = "llava-1.5-7b, 4 decoder layers of random weights, float16, cuda"
    path.write_text(json.dumps(whole if suite else {**output, "card": device}))
    assert "Measured:" not in call(*words, "--gpu", "h100")


def test_a_file_without_a_card_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"model": "llava-1.5-7b, float32, cpu", "runs": [timed("none", 1)]}))
    words = ("dart@2:0.44", "--model", "llava-1.5-7b", "--gpu", "h100", "--bench", path)
    assert "it names no card" in call(*words, code=2)
    path.write_text(
        json.dumps({"card": "NVIDIA H100 80GB HBM3", "model": "llava-1.5-7b", "runs": [{"schedule": "none"}]})
    )
    assert "no output of `lmms-prune bench" in call(*words, code=2)


@pytest.mark.parametrize("budget", ["ttft@h100=85%", "ttft@l4=65ms", "ttft@a100=0.025s"])
@pytest.mark.parametrize("text", ["dart@2:?", "random@16:?", "divprune@0:?"])
def test_a_budget_of_time_is_met_by_the_largest_keep(budget: str, text: str) -> None:
    sizes = prompt_sizes(LLAVA)
    solved = Schedule.parse(text).solve(budget, sizes)
    parsed = Budget.parse(budget)
    gpu = GPUS[parsed.measure.partition("@")[2]]
    whole = on_gpu(LLAVA, Schedule(()), 576, 64, gpu).first_token
    limit = float(parsed.amount) * {"%": whole / 100, "ms": 1e-3, "s": 1}[parsed.unit]
    [stage] = solved.stages
    more = Schedule.parse(f"{stage.method}@{stage.layer}:{int(stage.keep) + 5}t")
    assert on_gpu(LLAVA, solved, 576, 64, gpu).first_token <= limit * (1 + 1e-9)
    assert on_gpu(LLAVA, more, 576, 64, gpu).first_token > limit


@pytest.mark.parametrize(
    ("budget", "reason"),
    [
        ("ttft=60%", "names no card; write ttft@h100=60%"),
        ("ttft@=60%", "names no card"),
        ("ttft@h999=60%", "this card is not known; use one of b200, h200, h100"),
        ("ttft@h100=60", "is no amount with a unit; write ttft@h100=60%"),
        ("kv@h100=60%", "'kv' is the same on every card"),
        ("ttft@h100=1%", "cannot be met"),
    ],
)
def test_a_budget_of_time_that_cannot_be_is_refused(budget: str, reason: str) -> None:
    assert reason in call("dart@2:?", "--model", "llava-1.5-7b", "--budget", budget, code=2)
