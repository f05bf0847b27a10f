"""The fused searches equal their plain references; here in Triton's interpreter, on a GPU for real."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmms_prune.methods.shared.greedy import searches
from lmms_prune.methods.shared.greedy.searches import Rule, greedy, in_turn, run
from lmms_prune.methods.shared.tensors import directions
from lmms_prune.pruning.flops import ProductCounter

CASES = Path(__file__).with_name("kernel_cases.py")


def test_fused_equals_plain_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, CASES, "cpu"], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_equals_plain_on_a_gpu() -> None:
    run = subprocess.run([sys.executable, CASES, "cuda"], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


def test_the_kernels_build_for_a_gpu(tmp_path: Path) -> None:
    """For one that this machine does not have: what the interpreter allows, the compiler may refuse."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, CASES, "build"], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "built", run.stderr[-2000:]


def test_by_hand() -> None:
    """Points on a circle at 0°, 90°, 100° and 180°: the first score picks 0°, then 180° is farthest, then 90°, not 100°."""
    angle = torch.tensor([0.0, 90.0, 100.0, 180.0]).deg2rad()
    unit = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    first, valid = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    expected = [[], [0], [0, 3], [0, 1, 3], [0, 1, 2, 3]]
    for count, picks in enumerate(expected):
        found = greedy("farthest", unit, first, valid, torch.tensor([count]), count)[0].tolist()
        assert [i for i, picked in enumerate(found) if picked] == picks


def test_sums_by_hand() -> None:
    """After 0°, 180° has the smallest cosine; then 90° and 100° have sums of 0, and the tie goes to the lower index."""
    angle = torch.tensor([0.0, 90.0, 100.0, 180.0], dtype=torch.float64).deg2rad()
    unit = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    first, valid = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    for count, picks in enumerate([[], [0], [0, 3], [0, 1, 3]]):
        found = greedy("sums", unit, first, valid, torch.tensor([count]), count)[0].tolist()
        assert [i for i, picked in enumerate(found) if picked] == picks


def test_pivots_take_turns_by_hand() -> None:
    """The first takes 2 and 0; the second would take 2 and 1, and gets 1 and 3, as 2 is taken and 4 is not free."""
    order = torch.tensor([[[2, 0, 1, 3, 4], [2, 4, 1, 0, 3]]])
    free = torch.tensor([[True, True, True, True, False]])
    assert in_turn(order, free, torch.tensor([[2, 2]]))[0].tolist() == [True, True, True, True, False]
    assert in_turn(order, free, torch.tensor([[1, 1]]))[0].tolist() == [False, True, True, False, False]
    assert in_turn(order, free, torch.tensor([[0, 0]]))[0].tolist() == [False] * 5


def test_the_plain_path_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_prune.methods.shared.greedy.searches._fused", lambda *args: pytest.fail("no GPU here"))
    unit, valid = torch.eye(4, dtype=torch.float64)[None], torch.ones(1, 4, dtype=torch.bool)
    assert greedy("farthest", unit, torch.zeros(1, 4), valid, torch.tensor([2]), 2)[0].tolist() == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("tokens", [20, 100])
@pytest.mark.parametrize("most", [1, 2, 9])
@pytest.mark.parametrize("rule", ["farthest", "sums", "determinant"])
def test_flops_are_those_of_the_reference_whoever_searches(
    rule: Rule, most: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No product inside a fused kernel reaches the dispatcher, so that on a GPU it would count nothing."""
    unit = directions(torch.randn(2, tokens, 5))
    first, valid, limit = (
        torch.rand(2, tokens).double(),
        torch.ones(2, tokens, dtype=torch.bool),
        torch.tensor([1, most]),
    )
    with FlopCounterMode(display=False) as torchs, ProductCounter() as counter:
        greedy(rule, unit, first, valid, limit, most)
    assert counter.flops == torchs.get_total_flops() > 0
    monkeypatch.setattr(searches, "_plain", lambda *_: valid)
    with ProductCounter() as fused:
        greedy(rule, unit, first, valid, limit, most)
    assert fused.flops == counter.flops


def test_so_are_the_flops_of_a_merging_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    metric, lengths = torch.randn(2, 9, 3), torch.tensor([9, 4])
    with FlopCounterMode(display=False) as torchs, ProductCounter() as counter:
        run("nearest", metric, lengths)
    assert counter.flops == torchs.get_total_flops() == 2 * 2 * 5 * 4 * 3
    monkeypatch.setattr(searches, "_plain", lambda *_: None)
    with ProductCounter() as fused:
        run("nearest", metric, lengths)
    assert fused.flops == counter.flops
