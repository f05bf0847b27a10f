"""FlashAttention's functions in plain torch, and a way to put them under the real code of transformers.

They take what the packages ``flash_attn`` (2) and ``flash_attn_interface`` (3) take, in the same layouts: (B, S, H, D), or
packed (total, H, D) with cumulative lengths. The kernels read whatever memory a wrong call points at; these functions refuse
it instead, and they refuse what they do not implement. Dimension letters: S queries, K keys, H heads, D head size.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from importlib.machinery import ModuleSpec
from inspect import signature
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import modeling_flash_attention_utils as library

from lmms_prune.models.kernels import KERNELS

HALVES = (torch.float16, torch.bfloat16)
"""The dtypes of the real kernels."""
ALL = (*HALVES, torch.float32, torch.float64)
"""For exact tests."""
KERNEL = {2: "flash_attention_2", 3: "flash_attention_3"}
_EVERYWHERE = (-1, -1)


class WrongCallError(ValueError):
    """A call of which the real kernel would compute garbage, or which the stand-in does not implement."""


@dataclass(frozen=True)
class Call:
    """One call of a function of FlashAttention.

    Args:
        packed: whether the sequences came packed, with cumulative lengths.
        causal: whether a query sees only keys up to its own.
        queries, keys: the lengths of all sequences.
    """

    packed: bool
    causal: bool
    queries: tuple[int, ...]
    keys: tuple[int, ...]


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float | None, causal: bool) -> Tensor:
    """Attention of queries (…, S, H, D) to keys and values (…, K, H or fewer, D).

    The causal mask is aligned to the bottom right: the last query sees all keys. A query that sees none gets zeros.
    """
    fine = torch.promote_types(query.dtype, torch.float32)
    queries, keys, group = query.shape[-3], key.shape[-3], query.shape[-2] // key.shape[-2]
    # Heads before tokens, and each head of the keys once for every head of the queries that shares it.
    q, k, v = (x.to(fine).transpose(-2, -3) for x in (query, key, value))
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=-3) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if causal and queries > 1:
        column = torch.arange(keys, device=scores.device)
        row = torch.arange(queries, device=scores.device)[:, None]
        seen = column <= row + (keys - queries)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        weights = torch.where(seen.any(-1, keepdim=True), weights, 0)
    else:
        weights = scores.softmax(-1)
    return (weights @ v).transpose(-2, -3).to(query.dtype)


def check(holds: bool, message: str) -> None:
    if not holds:
        raise WrongCallError(message)


def check_states(query: Tensor, key: Tensor, value: Tensor, dims: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """What the kernels require of queries, keys and values."""
    states = {"q": query, "k": key, "v": value}
    for name, x in states.items():
        check(x.dim() == dims, f"{name} has {x.dim()} dimensions, not {dims}")
        check(x.dtype in dtypes, f"{name} is {x.dtype}; FlashAttention computes in {dtypes}")
        check(x.dtype == query.dtype, f"{name} is {x.dtype}, but q is {query.dtype}")
        check(x.device == query.device, f"{name} is on {x.device}, but q is on {query.device}")
        check(x.stride(-1) == 1, f"{name} must be contiguous in its last dimension")
        check(min(x.shape) > 0, f"{name} is empty: {tuple(x.shape)}")
    check(key.shape == value.shape, f"k has the shape {tuple(key.shape)}, but v {tuple(value.shape)}")
    check(query.shape[-1] == key.shape[-1] <= 256, f"heads of {query.shape[-1]} and {key.shape[-1]} numbers")
    check(query.shape[-2] % key.shape[-2] == 0, f"{query.shape[-2]} heads of q for {key.shape[-2]} of k")


def lengths(name: str, cumulative: Tensor, longest: Any, states: Tensor) -> list[int]:
    """The lengths of packed sequences, from a checked ``cu_seqlens`` and ``max_seqlen``."""
    check(isinstance(cumulative, Tensor), f"cu_seqlens_{name} is a {type(cumulative).__name__}, not a tensor")
    check(cumulative.dtype == torch.int32, f"cu_seqlens_{name} is {cumulative.dtype}, not torch.int32")
    check(cumulative.dim() == 1 and len(cumulative) > 1, f"cu_seqlens_{name} has the shape {tuple(cumulative.shape)}")
    check(cumulative.is_contiguous(), f"cu_seqlens_{name} must be contiguous")
    check(cumulative.device == states.device, f"cu_seqlens_{name} is on {cumulative.device}")
    bounds = cumulative.tolist()
    check(bounds[0] == 0, f"cu_seqlens_{name} begins with {bounds[0]}, not 0")
    check(bounds == sorted(bounds), f"cu_seqlens_{name} decreases: {bounds}")
    check(bounds[-1] == len(states), f"cu_seqlens_{name} ends with {bounds[-1]}, but there are {len(states)} tokens")
    # The kernels take an integer, or a tensor of one integer.
    whole = isinstance(longest, int) or (
        isinstance(longest, Tensor) and longest.dim() == 0 and not longest.is_floating_point()
    )
    check(whole, f"max_seqlen_{name} is {longest!r}, not an integer")
    found = [end - start for start, end in pairwise(bounds)]
    check(int(longest) == max(found), f"max_seqlen_{name} is {int(longest)}, but the longest has {max(found)}")
    return found


def check_plain(**options: Any) -> None:
    """Refuse options that the stand-in does not implement; `options` have the values of which nothing depends on them."""
    plain = {"dropout_p": 0.0, "window_size": _EVERYWHERE, "softcap": 0.0, "return_attn_probs": False}
    for name, value in options.items():
        value = tuple(value) if name == "window_size" else value
        check(value == plain.get(name), f"{name}={value!r} is not implemented here")


def functions(dtypes: tuple[torch.dtype, ...]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The computations on a batch and on packed sequences, for any package."""

    def batched(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
        check_states(q, k, v, 4, dtypes)
        check(len(q) == len(k), f"{len(q)} rows of q for {len(k)} of k")
        return attend(q, k, v, scale, causal)

    def packed(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: tuple[Tensor, Tensor],
        longest: tuple[Any, Any],
        scale: float | None,
        causal: bool,
    ) -> Tensor:
        check_states(q, k, v, 3, dtypes)
        queries, keys = (lengths(*given) for given in zip("qk", ends, longest, (q, k), strict=True))
        check(len(queries) == len(keys), f"{len(queries)} sequences of q for {len(keys)} of k")
        rows = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        return torch.cat([attend(*row, scale, causal) for row in rows])

    return batched, packed


def flash_attn_2(dtypes: tuple[torch.dtype, ...] = HALVES) -> dict[str, ModuleType]:
    """The modules ``flash_attn`` and ``flash_attn.bert_padding``, with the signatures of 2.7 and 2.8."""
    batched, packed = functions(dtypes)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = _EVERYWHERE,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Tensor:
        check_plain(dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes)
        check_plain(return_attn_probs=return_attn_probs)
        return batched(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = _EVERYWHERE,
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        block_table: Tensor | None = None,
    ) -> Tensor:
        check_plain(dropout_p=dropout_p, window_size=window_size, softcap=softcap, alibi_slopes=alibi_slopes)
        check_plain(return_attn_probs=return_attn_probs, block_table=block_table)
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return packed(q, k, v, ends, longest, softmax_scale, causal)

    package = module("flash_attn", flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)
    padding = module("flash_attn.bert_padding", pad_input, unpad_input)
    package.bert_padding = padding  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.bert_padding": padding}


def flash_attn_3(dtypes: tuple[torch.dtype, ...] = HALVES) -> dict[str, ModuleType]:
    """The module ``flash_attn_interface``; of its parameters those that transformers looks for."""
    batched, packed = functions(dtypes)

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = _EVERYWHERE,
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        check_plain(window_size=window_size, softcap=softcap)
        return batched(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: Tensor | None = None,
        seqused_k: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = _EVERYWHERE,
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> Tensor:
        check_plain(window_size=window_size, softcap=softcap, seqused_q=seqused_q, seqused_k=seqused_k)
        ends, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return packed(q, k, v, ends, longest, softmax_scale, causal)

    name = "flash_attn_interface"
    return {name: module(name, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache)}


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Any = None, block_table: Any = None, **_: Any
) -> Tensor:
    raise WrongCallError("flash_attn_with_kvcache is not implemented here")


def unpad_input(x: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None) -> tuple[Tensor, ...]:
    """The tokens of (B, S, …) that the mask (B, S) marks, packed.

    Returns:
        the packed tokens, their columns in the flattened batch, cumulative lengths, the longest, and all lengths.
    """
    check_plain(unused_mask=unused_mask)
    check(attention_mask.shape == x.shape[:2], f"a mask {tuple(attention_mask.shape)} for {tuple(x.shape)}")
    counts = attention_mask.sum(1, dtype=torch.int32)
    columns = attention_mask.flatten().nonzero().flatten()
    ends = pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return x.flatten(0, 1)[columns], columns, ends, counts.max().item(), counts


def pad_input(x: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Packed tokens at their columns `indices` of a flattened (batch, seqlen, …), zeros elsewhere."""
    check(len(x) == len(indices), f"{len(x)} tokens for {len(indices)} columns")
    check(len(indices.unique()) == len(indices), "two tokens have one column")
    check(int(indices.min()) >= 0 and int(indices.max()) < batch * seqlen, "a column is outside of the batch")
    return x.new_zeros(batch * seqlen, *x.shape[1:]).index_put((indices,), x).unflatten(0, (batch, seqlen))


def module(name: str, *members: Callable[..., Any]) -> ModuleType:
    created = ModuleType(name)
    created.__spec__ = ModuleSpec(name, None)
    for member in members:
        setattr(created, member.__name__, member)
    return created


def recorded(function: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    """`function`, adding to `calls` each of its calls that returns."""
    parameters = signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        returned = function(*args, **kwargs)
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        packed = "cu_seqlens_q" in given
        if packed:
            queries, keys = (tuple(given[f"cu_seqlens_{name}"].diff().tolist()) for name in "qk")
        else:
            queries, keys = ((given[name].shape[1],) * len(given[name]) for name in "qk")
        calls.append(Call(packed, given["causal"], queries, keys))
        return returned

    return call


def is_installed(version: int = 2) -> bool:
    """Whether the real package is there, and a GPU for it."""
    return bool(library.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]["general_availability_check"]())


@contextmanager
def flash_attention(
    version: int = 2, dtypes: tuple[torch.dtype, ...] = HALVES, real: bool = False
) -> Iterator[list[Call]]:
    """Inside this context transformers runs FlashAttention: the stand-in on the CPU, or the real package.

    Its own code stays as it is: its checks of a model, the unpadding, the cumulative lengths, the question whether
    positions are those of packed sequences. What is replaced is what it imports and whether it believes that it can.

    Args:
        version: 2 or 3.
        dtypes: that the stand-in takes.
        real: whether the installed package runs, and is only watched.

    Yields:
        the calls of FlashAttention, as they come.
    """
    calls: list[Call] = []
    with pytest.MonkeyPatch.context() as patch:
        modules = {2: flash_attn_2, 3: flash_attn_3}[version](dtypes)
        package = next(iter(modules))
        if real:
            __import__(package)
        else:
            for name, created in modules.items():
                patch.setitem(sys.modules, name, created)
            _available(patch, version, dtypes)
        for name in ("flash_attn_func", "flash_attn_varlen_func"):
            function = getattr(sys.modules[package], name)
            patch.setattr(sys.modules[package], name, recorded(function, calls))
        # transformers imports the functions once and keeps them.
        for name in ("_flash_fn", "_flash_varlen_fn", "_flash_with_kvcache_fn", "_pad_fn", "_unpad_fn"):
            patch.setattr(library, name, None)
        for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
            patch.setattr(library, name, None, raising=False)
        patch.setattr(library, "_loaded_implementation", None)
        yield calls


def _available(patch: pytest.MonkeyPatch, version: int, dtypes: tuple[torch.dtype, ...]) -> None:
    """Let transformers and this package take the stand-in for a kernel that runs on the CPU in `dtypes`."""
    for other in (2, 3):
        available = (lambda: True) if other == version else (lambda: False)
        patch.setattr(library, f"is_flash_attn_{other}_available", available)
        patch.setitem(library.FLASH_ATTENTION_COMPATIBILITY_MATRIX[other], "general_availability_check", available)
    compatible = library.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version]
    patch.setitem(compatible, "supported_devices", (*compatible["supported_devices"], (lambda: True, "cpu")))
    names = tuple(str(dtype).removeprefix("torch.") for dtype in dtypes)
    kernel = KERNELS[KERNEL[version]]
    patch.setitem(KERNELS, KERNEL[version], replace(kernel, dtypes=names, gpu=False))


@dataclass(frozen=True)
class Flash:
    """FlashAttention as the tests have it: the stand-in on the CPU, or the installed package on a GPU.

    Args:
        calls: the calls of its functions, as they come.
        real: whether it is the installed package.
    """

    calls: list[Call]
    real: bool

    @property
    def device(self) -> str:
        return "cuda" if self.real else "cpu"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of models, the most precise one first."""
        return ("bfloat16",) if self.real else ("float32", "bfloat16")

    def since(self, first: int, causal: bool) -> list[Call]:
        """The calls after the first ones, of the decoder (causal) or of the vision encoder."""
        return [call for call in self.calls[first:] if call.causal == causal]
