"""GlimpsePrune with a selector of known weights; and what it says without one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from observed import Observed, Tiny, assert_agree, image_count, kept
from torch import Tensor, nn
from torch.export import Dim

from lmms_prune import prune
from lmms_prune.errors import UnsupportedModelError


class Selector(nn.Module):
    """logit = 40·mean attention − ½·mean of the first half of the state."""

    def forward(self, attention: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
        logits = 40 * attention.mean(1) - 0.5 * hidden[..., :32].mean(-1)
        return torch.where(valid, logits, -1.0)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("selector") / "selector.pt2"
    rows, tokens = Dim("rows"), Dim("tokens")
    example = (torch.rand(2, 4, 9).double(), torch.rand(2, 9, 64).double(), torch.ones(2, 9, dtype=torch.bool))
    shapes = ({0: rows, 2: tokens}, {0: rows, 1: tokens}, {0: rows, 1: tokens})
    torch.export.save(torch.export.export(Selector(), example, dynamic_shapes=shapes), path)
    return path


def slow_logits(seen: Observed, layer: int) -> list[list[float]]:
    found = []
    for span in seen.spans:
        states, attention = seen.states(span, layer), seen.attention(span, layer - 1)
        rows = []
        for column in span.visual:
            mean = sum(head[0][column] for head in attention) / len(attention)
            rows.append(40 * mean - 0.5 * sum(states[column][:32]) / 32)
        found.append(rows)
    return found


def test_a_keep_ranks_by_logit(tiny: Tiny, batches: list[Observed], weights: Path) -> None:
    got, want = [], []
    for number, seen in enumerate(batches):
        layer = 1 + number % 7
        trace, _ = tiny.run(seen.inputs, f"glimpseprune@{layer}:0.3;weights={weights}")
        got += kept(trace)
        for logits in slow_logits(seen, layer):
            order, count = sorted(range(len(logits)), key=lambda i: (-logits[i], i)), round(0.3 * len(logits))
            want.append((set(order[:count]), logits[order[count - 1]] - logits[order[count]]))
    assert len(got) == image_count(batches)
    assert_agree(got, want)


def test_without_a_keep_the_logits_decide(tiny: Tiny, batches: list[Observed], weights: Path) -> None:
    seen = batches[0]
    trace, _ = tiny.run(seen.inputs, f"glimpseprune@2;weights={weights},random@5:0.1")
    want = [{i for i, x in enumerate(logits) if x > 0} for logits in slow_logits(seen, 2)]
    assert kept(trace) == want
    assert len({len(tokens) for tokens in want}) > 3, "the counts follow the prompts"
    for row in trace.rows:
        assert row.kept[1][0] == min(row.kept[0][0], round(0.1 * row.images[0]))
        assert row.visual[2] == row.kept[0][0]


def test_it_refuses_to_run_untrained(tiny: Tiny, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pt2"
    wrong.write_bytes(b"not an archive")
    for text, match in (
        ("glimpseprune@2:0.3", "needs its trained selector"),
        (f"glimpseprune@2:0.3;weights={tmp_path / 'none.pt2'}", "none.pt2 is no file"),
        (f"glimpseprune@2:0.3;weights={wrong}", r"wrong.pt2 is no torch.export archive"),
    ):
        with pytest.raises(UnsupportedModelError, match=match), prune(tiny.model(), text):
            pytest.fail("the error comes before anything runs")


def test_several_images_and_rows_without_one(tiny: Tiny, weights: Path) -> None:
    rng = random.Random(1)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (2, 0, 1)])
    trace, logits = tiny.run(inputs, f"glimpseprune@2:0.3;weights={weights}")
    assert torch.isfinite(logits).all()
    assert [len(row.indices(0)) for row in trace.rows] == [2, 0, 1]
