"""FLOPs are counted by a rule, or not at all: an operation that may multiply and has none is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize, scaled_dot_product_attention

from lmms_prune.compat.torch import UncountedOperationError, flop_rules
from lmms_prune.pruning.flops import ProductCounter

pytestmark = pytest.mark.core

X = torch.randn(2, 3, 4, 8)


def counted(run: Callable[[], object], inference: bool = False) -> int:
    with torch.inference_mode(inference), ProductCounter() as counter:
        run()
    return counter.flops


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize(
    ("run", "flops"),
    [
        # Scores and values: 2 x heads x queries x keys x width, twice.
        (lambda: scaled_dot_product_attention(X, X, X), 2 * 2 * (2 * 3) * 4 * 4 * 8),
        (lambda: scaled_dot_product_attention(X, X, X, is_causal=True), 2 * 2 * (2 * 3) * 4 * 4 * 8),
        (lambda: X @ X.transpose(-1, -2), 2 * (2 * 3) * 4 * 4 * 8),
        (lambda: torch.cdist(X, X[:, :, :2]), 2 * (2 * 3) * 4 * 2 * 8),
        (lambda: torch.einsum("bhqd,bhkd->bhqk", X, X), 2 * (2 * 3) * 4 * 4 * 8),
        (lambda: torch.nn.functional.linear(X, torch.ones(5, 8)), 2 * (2 * 3 * 4) * 8 * 5),
    ],
    ids=["attention", "causal attention", "product", "distances", "einsum", "linear"],
)
def test_a_product_is_counted(run: Callable[[], object], flops: int, inference: bool) -> None:
    assert counted(run, inference) == flops


def _moves() -> Tensor:
    """What methods do besides multiplying."""
    y = torch.where(X > 0, X, X.flip(-1))
    y = torch.cat([y, X]).softmax(-1).sort(-1).values
    y = y.index_put((torch.tensor([0]),), X[0]) + normalize(y, dim=-1)
    y = layer_norm(y, (8,)).cumsum(-1).masked_fill(y > 0, 0).logsumexp(-1)
    return y.scatter_add(0, torch.zeros(1, 3, 4, dtype=torch.long), X.sum(-1)).topk(2).values


@pytest.mark.parametrize("inference", [False, True])
def test_operations_that_move_values_count_nothing(inference: bool) -> None:
    assert counted(_moves, inference) == 0


@pytest.mark.parametrize(
    "run",
    [
        lambda: torch.linalg.inv(torch.eye(3)),
        lambda: torch.linalg.cholesky(torch.eye(3)),
        lambda: torch.nn.functional.pdist(X[0, 0]),
    ],
    ids=["inverse", "cholesky", "distances"],
)
def test_an_operation_without_a_rule_is_refused(run: Callable[[], object]) -> None:
    with pytest.raises(UncountedOperationError, match=r"aten\.\w+ may multiply .* lmms_prune/compat/torch.py"):
        counted(run)


def test_a_product_without_its_rule_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch 2.14.1 computed attention on CPUs in an operation that it had no rule for, and counted 0."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    rules = {operation: rule for operation, rule in flop_rules().items() if operation is not attention}
    monkeypatch.setattr("lmms_prune.pruning.flops.flop_rules", lambda: rules)
    with pytest.raises(UncountedOperationError, match="_scaled_dot_product_flash_attention_for_cpu"):
        counted(lambda: scaled_dot_product_attention(X, X, X))
