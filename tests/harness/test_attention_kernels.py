"""Evaluations with another attention kernel give the same answers and token accounting."""

from __future__ import annotations

import pytest
from flash_stand_in import KERNEL, Flash

SCHEDULE = "divprune@0:0.6,random@4:0.3"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_flash_attention_answers_as_sdpa(harness, flash: Flash, family: str) -> None:
    given = {"schedule": SCHEDULE, "batch_size": 3, "device": flash.device, "dtype": flash.dtypes[0]}
    options, runs = {"limit": 5}, {}
    for kernel in ("sdpa", KERNEL[2]):
        first = len(flash.calls)
        runs[kernel] = harness.pruned(family, ["pope"], options, attn_implementation=kernel, **given)
        assert bool(flash.since(first, causal=True)) == (kernel != "sdpa")
        assert runs[kernel].recorded["attention"] == kernel
    sdpa, flashed = runs["sdpa"], runs[KERNEL[2]]
    assert flashed.accounting == sdpa.accounting
    if not flash.real:  # in 16 bits rounding may decide
        assert flashed.answers == sdpa.answers
