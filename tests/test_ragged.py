"""Packing and masks, against plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmms_prune.methods.shared.tensors import gather
from lmms_prune.pruning.ragged import attention_mask, gather_rotary, pack


@given(
    st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_pack_keeps_order_and_pads_one_side(rows: list[list[bool]], pad: str) -> None:
    keep = torch.tensor(rows)
    lengths = [sum(row) for row in rows]
    packing = pack(keep, lengths, pad)
    size = max(lengths)
    assert packing.index.shape == packing.valid.shape == (len(rows), size)
    assert packing.padded == (min(lengths) < size)
    for row, flags in enumerate(rows):
        columns = [column for column, flag in enumerate(flags) if flag]
        gap = [None] * (size - len(columns))
        expected = gap + columns if pad == "left" else columns + gap
        gathered = [int(i) if v else None for i, v in zip(packing.index[row], packing.valid[row], strict=True)]
        assert gathered == expected
        for column in columns:
            assert expected[int(packing.moved[row, column])] == column


def test_gather_takes_rows_from_any_shape() -> None:
    x = torch.arange(24.0).view(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert gather(x, index).tolist() == [[x[0, 3].tolist(), x[0, 0].tolist()], [x[1, 1].tolist()] * 2]
    assert gather(x[..., 0], index).tolist() == [[9.0, 0.0], [15.0, 15.0]]


@pytest.mark.parametrize("shape", [(1, 4, 6), (2, 4, 6), (3, 1, 4, 6), (3, 2, 4, 6)])
def test_gather_rotary_takes_tables_of_old_and_new_versions(shape: tuple[int, ...]) -> None:
    table = torch.randn(shape)
    index = torch.tensor([[3, 0], [1, 2]])
    gathered = gather_rotary(table, index)
    assert gathered.shape == (*shape[:-3], 2, 2, 6)
    for row in range(2):
        source = table[..., min(row, shape[-3] - 1), :, :]
        assert torch.equal(gathered[..., row, :, :], source[..., index[row], :])


VALID = torch.tensor([[False, False, True, True, True], [True] * 5])


def test_the_masks_of_all_kernels_are_equivalent() -> None:
    sdpa = attention_mask(VALID, 5, True, "sdpa", torch.float32)
    eager = attention_mask(VALID, 5, True, "eager", torch.float32)
    for row in range(2):
        for query in range(5):
            for key in range(5):
                seen = (key <= query and bool(VALID[row, key])) or key == query
                assert bool(sdpa[row, 0, query, key]) is seen
                assert bool(eager[row, 0, query, key] == 0) is seen
                assert seen or eager[row, 0, query, key] == torch.finfo(torch.float32).min


def test_flash_attention_takes_the_key_mask_alone() -> None:
    """FlashAttention is causal by itself and wants a 2-D mask, or none when nothing is padded."""
    assert torch.equal(attention_mask(VALID, 5, True, "flash", torch.bfloat16), VALID)
    assert torch.equal(attention_mask(VALID, 1, True, "flash", torch.bfloat16), VALID)
    assert attention_mask(VALID[1:], 5, False, "flash", torch.bfloat16) is None


def test_a_decode_step_sees_all_real_keys() -> None:
    mask = attention_mask(VALID, 1, True, "sdpa", torch.float32)
    assert mask.shape == (2, 1, 1, 5)
    assert torch.equal(mask[:, 0, 0], VALID)
    assert attention_mask(VALID[1:], 1, False, "eager", torch.float32) is None


def test_without_padding_the_fused_kernel_needs_no_mask() -> None:
    assert attention_mask(VALID[1:], 5, False, "sdpa", torch.float32) is None
    assert attention_mask(VALID[1:], 5, False, "eager", torch.float32) is not None
