"""What counts as a matrix product is known of every operation that a method may run."""

from __future__ import annotations

import pytest
import torch

from lmms_prune.compat.torch import UncountedOperationError
from lmms_prune.trace import ProductCounter


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_norm_is_no_product_and_a_decomposition_is_refused(mode: type) -> None:
    x = torch.randn(2, 3, 3)
    with mode(), ProductCounter() as counter:
        unit = torch.nn.functional.normalize(x, dim=-1)
        assert counter.flops == 0
        unit @ unit.transpose(-1, -2)
        assert counter.flops == 2 * 2 * 3 * 3 * 3
    with mode(), ProductCounter(), pytest.raises(UncountedOperationError, match="linalg_det|_linalg_det"):
        torch.linalg.det(x)
