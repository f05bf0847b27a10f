"""Without a schedule the model is lmms-eval's own, and a batch is its rows one by one."""

from __future__ import annotations

import re
from collections import Counter
from hashlib import sha256

import pytest
import torch

from lmms_prune.demo.benchmarks import TASKS
from lmms_prune.models import FAMILIES

STOCK = {name: family.stock_model for name, family in FAMILIES.items()}
ALL = (*TASKS, "scienceqa")
# The stock LLaVA wrapper ends with an IndexError at a row without an image, which full ScienceQA has.
SHARED = {**dict.fromkeys(FAMILIES, ALL), "llava": TASKS, "llava_next": TASKS}
# The stock Qwen2.5-VL and Qwen3-VL wrappers load every checkpoint in bfloat16.
DTYPE = {**dict.fromkeys(FAMILIES, "auto"), "qwen2_5_vl": "bfloat16", "qwen3_vl": "bfloat16"}
# The stock Qwen2-VL wrapper, a simple model, returns texts alone.
UNCOUNTED = {"qwen2_vl"}
PRUNED = "dart@2:0.44,random@5:0.07"
# Rows without an image, pictures of several shapes, and two benchmarks whose rows share batches.
VARIOUS = ("mme", "scienceqa", "docvqa_val", "infovqa_val")

pytestmark = [
    # Importing the stock wrappers: decord and torch's TorchScript.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    # The stock Qwen wrapper gives its image bounds in the old way.
    pytest.mark.filterwarnings("ignore:Passing `min_pixels` and `max_pixels`:FutureWarning"),
]


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family: what is tested here is its own doing."""
    return request.param


@pytest.fixture(scope="module")
def pair(harness, family):
    """The stock run and ours."""
    pytest.importorskip("decord", reason="the stock wrappers import decord")
    options = {"gen_kwargs": "max_new_tokens=8"}
    text = harness.text(family, device_map="cpu")
    stock = harness.evaluate(STOCK[family], SHARED[family], text, device="cpu", **options)
    ours = harness.pruned(family, SHARED[family], options, schedule="none", dtype=DTYPE[family])
    return stock, ours


@pytest.mark.slow
def test_answers_are_the_stock_models(pair, family):
    stock, ours = pair
    assert set(stock.answers) == set(SHARED[family])
    assert ours.answers == stock.answers
    assert len({answer for rows in ours.answers.values() for answer in rows}) > 3, "constant answers prove nothing"


@pytest.mark.slow
def test_scores_and_output_counts_are_the_stock_models(pair, family):
    stock, ours = pair
    assert ours.metrics == stock.metrics
    if family in UNCOUNTED:
        assert not any(row for rows in stock.accounting.values() for row in rows)
        return
    for task, rows in stock.accounting.items():
        assert [row["output_tokens"] for row in rows] == [row["output_tokens"] for row in ours.accounting[task]]


@pytest.mark.slow
def test_prompts_and_pixels_are_the_stock_models(pair, family):
    def digest(tensor: torch.Tensor | None) -> tuple | None:
        return None if tensor is None else (tuple(tensor.shape), sha256(tensor.float().numpy().tobytes()).hexdigest())

    def fed(run) -> Counter:
        seen = Counter()
        for call in run.calls:
            pixels = call.get("pixel_values")
            if DTYPE[family] == "bfloat16" and pixels is not None:
                # The vision encoder casts to its own type; the stock Qwen wrappers leave that to it.
                pixels = pixels.bfloat16()
            seen[
                tuple(map(digest, (call["input_ids"], call.get("image_grid_thw"), call.get("image_sizes"), pixels)))
            ] += 1
        return seen

    stock, ours = map(fed, pair)
    assert sum(stock.values()) == sum(len(rows) for rows in pair[0].answers.values())
    assert ours == stock


@pytest.mark.slow
def test_prompt_text_is_the_familys(pair, harness, family):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(harness.checkpoints[family])
    image = "<image>" if "llava" in family else "<|image_pad|>"
    whole = [tokenizer.decode(call["input_ids"][0]) for call in pair[1].calls]
    prompts = {re.sub(f"({re.escape(image)})+", image, prompt) for prompt in whole}
    question = "What number is on the sign?\nAnswer the question using a single word or phrase."
    llava = f"<s>USER: {image}\n{question} ASSISTANT:"
    qwen = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        f"{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (llava if "llava" in family else qwen) in prompts, sorted(prompts, key=len)[0]


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["none", PRUNED, "divprune@0:0.33,vtw@6", "fastv@3:40t"])
def test_a_batch_of_eight_is_eight_batches_of_one(schedule, harness, family):
    # In float32: bfloat16 rounds differently in another batch, and near ties then fall the other way.
    one, eight = (
        harness.pruned(family, VARIOUS, {"gen_kwargs": "max_new_tokens=8"}, schedule=schedule, batch_size=size)
        for size in (1, 8)
    )
    widths = [call["input_ids"].shape[0] for call in eight.calls]
    assert max(widths) == 8
    assert len(eight.calls) < len(one.calls) == 16
    assert eight.answers == one.answers
    # What a method multiplies is counted with the batch's padding.
    without = [
        {
            task: [{k: v for k, v in row.items() if k != "selection_flops"} for row in rows]
            for task, rows in run.accounting.items()
        }
        for run in (one, eight)
    ]
    assert without[0] == without[1]
    assert eight.metrics == one.metrics


@pytest.mark.parametrize("batch_size", ["4", 4])
def test_the_harness_batch_size_is_taken(batch_size, harness):
    run = harness.pruned("llava", ["pope"], {"batch_size": batch_size}, schedule=PRUNED)
    assert [call["input_ids"].shape[0] for call in run.calls] == [4]
    assert torch.equal(run.calls[0]["attention_mask"][:, -1], torch.ones(4, dtype=torch.long)), "padding goes left"
