"""The attention kernels that pruning supports: how each takes its mask, and what it needs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskForm = Literal["sdpa", "eager", "flash"]
"""How an attention kernel takes its mask: boolean 4-D or none, additive 4-D, 2-D key mask or none."""


@dataclass(frozen=True)
class AttentionKernel:
    """One value of transformers' ``attn_implementation``.

    Args:
        form: how it takes its mask.
        dtypes: the only dtypes that it computes in, without "torch."; empty if it computes in all.
        gpu: whether it needs a GPU.
        source: where its package comes from; "" if torch or transformers contains it.
    """

    form: MaskForm
    dtypes: tuple[str, ...] = ()
    gpu: bool = False
    source: str = ""


_HALVES = ("float16", "bfloat16")
# flash-attn is compiled against the installed torch, which an isolated build would not see.
_PIP = "pip install flash-attn --no-build-isolation"
_HOPPER = "flash_attn_3, built from hopper/ of https://github.com/Dao-AILab/flash-attention"

KERNELS: dict[str, AttentionKernel] = {
    "sdpa": AttentionKernel("sdpa"),
    "eager": AttentionKernel("eager"),
    "flash_attention_2": AttentionKernel("flash", _HALVES, gpu=True, source=_PIP),
    "flash_attention_3": AttentionKernel("flash", _HALVES, gpu=True, source=_HOPPER),
}


def dtype_refusal(kernel: str, dtype: str) -> str:
    """Why `kernel` cannot compute in `dtype` (without "torch."); "" if it can."""
    dtypes = KERNELS[kernel].dtypes
    return f"{kernel} computes in {' and '.join(dtypes)} only" if dtypes and dtype not in dtypes else ""


def refusal(kernel: str, dtype: str, device: str) -> str:
    """Why a model in `dtype` on `device` ("cpu", "cuda:0") cannot run with `kernel`, with the fix; "" if it can."""
    if KERNELS[kernel].gpu and device.partition(":")[0] == "cpu":
        return f"{kernel} needs a GPU, but the model is on the CPU; use device=cuda, or sdpa in its place."
    if reason := dtype_refusal(kernel, dtype):
        return f"{reason}, but the model is in {dtype}; use dtype={KERNELS[kernel].dtypes[-1]}, or sdpa in its place."
    return ""


def how_to_get(kernel: str) -> str:
    """What `kernel` needs in order to run, as advice that ends a message."""
    return f"{kernel} needs a GPU and its package ({KERNELS[kernel].source}); or use sdpa in its place."
