"""What a run says about itself: the tokens of every sample, the averages, and where it took place."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fractions import Fraction
from functools import wraps
from importlib.metadata import version

import psutil
import pytest
import torch

from lmms_prune import Schedule
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.efficiency.cost import kv_bytes
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.harness.checkout import code_state
from lmms_prune.harness.fingerprint import code
from lmms_prune.harness.records import ImageGrids, token_accounting
from lmms_prune.models import FAMILIES
from lmms_prune.models.architectures import DEFAULT, from_config
from lmms_prune.pruning.trace import RowTrace

LAYERS = 8
TASKS = ("mme", "docvqa_val", "scienceqa")


def _part(text: str, n: int) -> int:
    # round() of a Fraction rounds halves to even.
    return round(Fraction(text) * n)


# The tokens that enter each layer, by hand: (schedule, kept after each stage, layers with the full set and after each).
CASES = {
    "none": (lambda n: [], [8]),
    "dart@2:0.44,random@5:0.07": (lambda n: [8 * (_part("0.44", n) // 8) + 4, _part("0.07", n)], [2, 3, 3]),
    "divprune@0:0.33": (lambda n: [_part("0.33", n)], [0, 8]),
    "fastv@3:30t,vtw@6": (lambda n: [30, 0], [3, 3, 2]),
    "random@1:0.5,fastv@4:0.25,random@7:0.1": (
        lambda n: [_part("0.5", n), _part("0.25", n), _part("0.1", n)],
        [1, 3, 3, 1],
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, harness, family):
    return request.param, harness.pruned(family, TASKS, schedule=request.param)


def _images(run, family: str) -> list[int]:
    """Visual tokens of the images as they were handed to the model, in no particular order."""
    if family == "llava":
        return [(112 // 14) ** 2 for call in run.calls if "pixel_values" in call]
    grids = [call["image_grid_thw"].tolist() for call in run.calls if "image_grid_thw" in call]
    return [t * h * w // 4 for grid in grids for t, h, w in grid]


def test_every_sample_has_its_tokens(case, family):
    schedule, run = case
    kept, spans = CASES[schedule]
    rows = [row for task in TASKS for row in run.accounting[task]]
    assert len(rows) == 12
    for row in rows:
        n = row["visual_tokens"]
        stages = kept(n) if n else [0] * len(kept(0))
        assert row["kept_visual_tokens"] == stages
        by_hand = [count for count, span in zip([n, *stages], spans, strict=True) for _ in range(span)]
        assert len(by_hand) == LAYERS
        assert row["avg_visual_tokens"] == pytest.approx(sum(by_hand) / LAYERS)
        assert row["layer_visual_tokens"] == by_hand
        assert row["text_tokens"] == row["input_tokens"] - n
        if n:
            assert Schedule.parse(schedule).layer_counts(LAYERS, [n]) == by_hand
        assert n < row["input_tokens"]
        assert row["output_tokens"] >= 1
    assert sorted(row["visual_tokens"] for row in rows if row["visual_tokens"]) == sorted(_images(run, family))
    assert [row["visual_tokens"] == 0 for row in run.accounting["scienceqa"]] == [False, True] * 2


def test_input_tokens_are_the_prompts(case):
    _, run = case
    rows = [row["input_tokens"] for task in TASKS for row in run.accounting[task]]
    assert sorted(rows) == sorted(call["input_ids"].shape[1] for call in run.calls)


def test_averages_are_in_the_throughput_section(case):
    schedule, run = case
    rows = [row for task in TASKS for row in run.accounting[task]]
    pictured = [row for row in rows if row["visual_tokens"]]
    averages = {
        "original_visual_tokens": sum(row["visual_tokens"] for row in pictured) / len(pictured),
        "avg_visual_tokens": sum(row["avg_visual_tokens"] for row in pictured) / len(pictured),
        "input_tokens": sum(row["input_tokens"] for row in rows) / len(rows),
        "kv_mib": sum(row["kv_bytes"] for row in rows) / len(rows) / 2**20,
        **{
            f"{part}_tflops": sum(row[f"{part}_flops"] for row in rows) / len(rows) / 1e12
            for part in ("encoder", "selection", "prefill", "decode")
        },
    }
    throughput = run.results["throughput"]
    assert {name: throughput[f"avg_{name.removeprefix('avg_')}"] for name in averages} == pytest.approx(averages)
    assert throughput["total_gen_tokens"] == sum(row["output_tokens"] for row in rows)
    assert throughput["total_elapsed_time"] > 0
    assert run.recorded["averages"] == pytest.approx(averages)
    assert run.recorded["schedule"] == schedule


def test_every_task_has_its_averages_layer_by_layer(case):
    run = case[1]
    assert set(run.recorded["tasks"]) == set(TASKS)
    for task, said in run.recorded["tasks"].items():
        rows = run.accounting[task]
        layers = [sum(some) / len(rows) for some in zip(*(row["layer_visual_tokens"] for row in rows), strict=True)]
        text = sum(row["text_tokens"] for row in rows) / len(rows)
        assert said["samples"] == len(rows)
        assert said["text_tokens"] == pytest.approx(text)
        assert said["layer_visual_tokens"] == pytest.approx(layers)
        assert said["layer_tokens"] == pytest.approx([text + visual for visual in layers])
        # Over the samples with an image, as in all other averages of visual tokens.
        pictured = [row for row in rows if row["visual_tokens"]]
        assert said["with_image"] == len(pictured)
        for name, source in (("avg_visual_tokens", "avg_visual_tokens"), ("original_visual_tokens", "visual_tokens")):
            assert said[name] == pytest.approx(sum(row[source] for row in pictured) / len(pictured))
        assert said["avg_visual_tokens"] * len(pictured) / len(rows) == pytest.approx(sum(layers) / LAYERS)
        recycled = [sum(some) for some in zip(*(row["recycled_visual_tokens"] for row in rows), strict=True)]
        assert said["recycled_visual_tokens"] == pytest.approx([some / len(rows) for some in recycled])
        held = [sum(some) / len(rows) for some in zip(*(row["layer_kv_bytes"] for row in rows), strict=True)]
        assert said["layer_kv_mib"] == pytest.approx([size / 2**20 for size in held])
        assert sum(said["layer_kv_mib"]) == pytest.approx(said["kv_mib"]) == pytest.approx(said["cache_mib"])
        assert said["padding"] == 0  # one row a batch
        assert said["prefill_tflops"] == pytest.approx(sum(row["prefill_flops"] for row in rows) / len(rows) / 1e12)


def test_padding_is_accounted(harness):
    """Rows of different lengths in one batch: the share of executed tokens that are no sample's own."""
    run = harness.pruned("llava", ["mme"], batch_size=4)
    (call,) = run.calls
    mask = call["attention_mask"]
    assert run.recorded["tasks"]["mme"]["padding"] == pytest.approx(1 - float(mask.float().mean()))


@pytest.mark.parametrize(
    "schedule", ["random@2:0.4,vtw@6", "dart@2:0.4,fastv@5:0.2", "divprune@0:0.5,sgl@4:0.2;new_tokens=2"]
)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_and_bytes_are_those_of_the_executed_passes(schedule, harness, family):
    """Against torch's own count over the whole run, selecting and a guide's answer included, with one row a batch."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lmms_prune.compat.torch import forgotten_rules

    with FlopCounterMode(display=False, custom_mapping=forgotten_rules()) as counter:
        run = harness.pruned(family, ["docvqa_val"], schedule=schedule)
    rows = run.accounting["docvqa_val"]
    # generate() computes the output matrix once in the prefill, and once for each further token.
    expected = sum(row["encoder_flops"] + row["prefill_flops"] + row["decode_flops"] for row in rows)
    selection = sum(row["selection_flops"] for row in rows)
    assert counter.get_total_flops() == expected + selection
    assert (selection > 0) == (not schedule.startswith("random"))
    width = torch.float32.itemsize
    heads = 2 if family.startswith("qwen") else 4
    for row in rows:
        cached = [row["text_tokens"] + visual for visual in row["layer_visual_tokens"]]
        assert row["layer_kv_bytes"] == [2 * n * heads * 16 * width for n in cached]
        assert row["kv_bytes"] == sum(row["layer_kv_bytes"])


@pytest.mark.parametrize(
    ("schedule", "layers"), [("none", 1), ("sparsevlm@2:0.4,vtw@6", 3), ("mustdrop@3:0.5,random@6:0.1", 3)]
)
def test_a_layers_bytes_are_those_of_the_caches_real_tensors(schedule, layers, harness, family, monkeypatch):
    """With one row a batch, so that nothing is padding; MustDrop makes an earlier layer forget what it drops."""
    from transformers.generation.utils import GenerationMixin

    original, real = GenerationMixin.generate, []

    @wraps(GenerationMixin.generate)
    def generate(model, **given):
        out = original(model, **{**given, "max_new_tokens": 1, "return_dict_in_generate": True})
        layers = filled_cache(out).layers
        real.append([sum(x.numel() * x.element_size() for x in (layer.keys, layer.values)) for layer in layers])
        return out.sequences

    monkeypatch.setattr(GenerationMixin, "generate", generate)
    run = harness.pruned(family, ["docvqa_val"], schedule=schedule)
    said = [row["layer_kv_bytes"] for row in run.accounting["docvqa_val"]]
    assert [len(set(sample)) for sample in said] == [layers] * len(said)
    assert sorted(said) == sorted(real)


def test_provenance_is_recorded(case):
    recorded = case[1].recorded
    for name in ("lmms-prune", "lmms-eval", "torch", "transformers"):
        assert recorded[name] == version(name)
    assert recorded["device"].startswith("cpu")
    assert (recorded["attention"], recorded["dtype"]) == ("sdpa", "float32")
    assert recorded["code"] == code()
    assert recorded.get("commit") == code_state()
    assert recorded["batch_size"] == 1
    assert recorded["machine"]
    assert recorded["threads"] == str(torch.get_num_threads())
    assert recorded["processes"] == "1"
    assert 0 <= recorded["other_load"] <= 1
    # With torch and the weights, this process holds more than 100 MiB; a wrong unit would be beyond the machine.
    assert recorded["peak_memory_of"] == "process"
    assert 100 * 2**20 < recorded["peak_memory"] < psutil.virtual_memory().total


@pytest.mark.parametrize(("budget", "limit"), [("24t", 24), ("0.5", 32)])
def test_a_solved_budget_is_recorded_and_kept(budget, limit, harness):
    run = harness.pruned("llava", ["pope"], schedule="dart@2:?,random@5:4t", budget=budget)
    assert "?" not in run.recorded["schedule"]
    first = run.accounting["pope"][0]["kept_visual_tokens"][0]
    if budget.endswith("t"):
        assert run.recorded["schedule"] == f"dart@2:{first}t,random@5:4t"
    else:
        assert re.fullmatch(r"dart@2:0\.\d{1,4},random@5:4t", run.recorded["schedule"])
    average = (2 * 64 + 3 * first + 3 * 4) / LAYERS
    # DART's next larger choice has eight more.
    assert average <= limit < average + 3 * 8 / LAYERS
    assert all(row["avg_visual_tokens"] == average for row in run.accounting["pope"])


@pytest.mark.parametrize(
    ("family", "budget"), [("llava", "flops=70%"), ("qwen2_5_vl", "flops=70%"), ("llava", "kv=60%")]
)
def test_a_budget_of_cost_is_solved_for_the_checkpoint(family, budget, harness):
    """As on the command line: of the checkpoint's own sizes, for a prompt of the length that estimates take."""
    run = harness.pruned(family, ["pope"], schedule="random@1:?", budget=budget)
    sizes = prompt_sizes(from_config(json.loads((harness.checkpoints[family] / "config.json").read_text()), family))
    assert run.recorded["schedule"] == str(Schedule.parse("random@1:?").solve(budget, sizes))
    assert run.recorded["schedule"].endswith("t") == (family == "llava")
    assert all(row["avg_visual_tokens"] < row["visual_tokens"] for row in run.accounting["pope"])


def test_bytes_of_the_cache_are_those_of_the_type_that_is_loaded(harness):
    """A checkpoint in float32, loaded in bfloat16, takes half as much a token."""
    solved = [
        harness.create("llava", schedule="random@1:?", budget=f"kv={mib}MiB", dtype=dtype).arguments.schedule
        for dtype, mib in (("float32", 0.4), ("bfloat16", 0.2))
    ]
    assert solved[0] == solved[1]


def test_output_tokens_end_with_the_answer_in_any_batch(harness):
    """A row that meets its stop text waits, padded, for the others: padding is no output."""
    options = {"gen_kwargs": "until=o,max_new_tokens=12,min_new_tokens=12"}
    one, four = (harness.pruned("llava", ["pope", "gqa"], options, batch_size=size) for size in (1, 8))
    assert len({row["output_tokens"] for row in one.accounting["gqa"]}) > 1
    assert four.answers == one.answers
    assert four.accounting == one.accounting


def pruned_row(computed: list[int], cached: list[int]) -> RowTrace:
    """500 visual tokens of one image, of which 252 are kept from layer 2 on."""
    visual, masks = [500, 500, 252, 252], [[torch.arange(500) < 252]]
    return RowTrace(
        "a", 40, [500], kept=[[252]], recycled=[[0]], visual=visual, computed=computed, cached=cached, masks=masks
    )


WHOLE = [ImageGrids(((20, 25),), (), (20, 25))]


@pytest.mark.parametrize(("cached", "tokens"), [([600, 600, 600, 600], [540, 540, 292, 292]), ([], [])])
def test_a_longer_row_of_the_batch_does_not_hide_what_is_cached(cached, tokens):
    """Padded, all layers have the length of a row that is not pruned; in its own tokens, this row's caches differ."""
    model = replace(DEFAULT, layers=4)
    accounting = token_accounting(pruned_row([600] * 4, cached), WHOLE, model, 540, 1)
    assert list(accounting.layer_kv_bytes) == kv_bytes(model, tokens)


def test_a_cropped_cache_holds_the_tokens_of_the_layer_that_crops():
    """Two layers before the stage are cropped to what it keeps."""
    accounting = token_accounting(pruned_row([540, 540, 292, 292], [292] * 4), WHOLE, DEFAULT, 540, 1)
    assert list(accounting.layer_kv_bytes) == kv_bytes(DEFAULT, [292] * 4)
