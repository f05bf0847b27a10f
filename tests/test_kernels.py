"""The fused greedy search equals its plain reference; here in Triton's interpreter, on a GPU for real."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from lmms_prune.methods.shared.kernels import _fused, _plain, farthest

COMPARE = """
import sys, torch
from lmms_prune.methods.shared.kernels import _fused, _plain
device, torch_seed = sys.argv[1], 0
for tokens in (1, 2, 5, 64, 100, 257):
    generator = torch.Generator().manual_seed(tokens)
    unit = torch.nn.functional.normalize(torch.randn(3, tokens, 8, generator=generator), dim=-1)
    # Two equal tokens tie exactly.
    unit[:, -1] = unit[:, 0]
    similarity = (unit @ unit.transpose(1, 2)).mul(4096).round().div(4096).to(device)
    first = torch.rand(3, tokens, generator=generator).mul(8).round().to(device)
    lengths = torch.tensor([tokens, max(1, tokens // 2), max(1, tokens - 1)])
    valid = (torch.arange(tokens) < lengths[:, None]).to(device)
    for share in (0.0, 0.3, 1.0):
        count = (lengths * share).long()
        fused, plain = _fused(similarity, first, valid, count), _plain(similarity, first, valid, count)
        assert torch.equal(fused, plain), (tokens, share)
        assert fused.sum(1).tolist() == count.tolist()
print("equal")
"""


def test_fused_equals_plain_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", COMPARE, "cpu"], env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_fused_equals_plain_on_a_gpu() -> None:
    run = subprocess.run([sys.executable, "-c", COMPARE, "cuda"], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "equal", run.stderr[-2000:]


def test_by_hand() -> None:
    """Points on a circle at 0°, 90°, 100° and 180°: the first score picks 0°, then 180° is farthest, then 90°, not 100°."""
    angle = torch.tensor([0.0, 90.0, 100.0, 180.0]).deg2rad()
    unit = torch.stack([angle.cos(), angle.sin()], dim=-1)[None]
    first, valid = torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    picks = [farthest(unit @ unit.transpose(1, 2), first, valid, torch.tensor([n]))[0].tolist() for n in range(5)]
    assert [[i for i, picked in enumerate(row) if picked] for row in picks] == [
        [],
        [0],
        [0, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
    ]


def test_the_plain_path_runs_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_prune.methods.shared.kernels._fused", lambda *args: pytest.fail("no GPU here"))
    similarity, valid = torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool)
    assert torch.equal(
        farthest(similarity, torch.zeros(1, 4), valid, torch.tensor([2])),
        _plain(similarity, torch.zeros(1, 4), valid, torch.tensor([2])),
    )
    assert callable(_fused)
