"""What we touch of torch's private parts: the rules by which FLOPs of its operations are counted, and modules' hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from math import prod
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lmms_prune.compat.names import Library, Names


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _distance_flops(first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(first) * second[-2]


def _shapes(rule: Callable[..., int]) -> Callable[..., int]:
    """A rule on shapes as one on tensors, as the registry's own are."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return rule(*(x.shape if isinstance(x, torch.Tensor) else x for x in args))

    return count


@cache
def forgotten_rules() -> Mapping[Any, Callable[..., int]]:
    """Our rules for operations that torch has none for, on shapes, as its ``FlopCounterMode(custom_mapping=…)`` takes them."""
    # Attention on CPUs has no rule of torch's own in 2.14 and 2.15. Distances of all pairs cost what the product of the
    # same shapes does.
    ours: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_cdist_forward": _distance_flops,
    }
    named = {getattr(torch.ops.aten, name, None): rule for name, rule in ours.items()}
    return {
        operation: rule for operation, rule in named.items() if operation is not None and operation not in flop_registry
    }


@cache
def flop_rules() -> Mapping[Any, Callable[..., int]]:
    """FLOPs of each operation that multiplies matrices, by torch's rules and ours for those that it forgot."""
    return {**flop_registry, **{operation: _shapes(rule) for operation, rule in forgotten_rules().items()}}


class UncountedOperationError(RuntimeError):
    """An operation that multiplies has no rule for its FLOPs: a count without it would be wrong."""


# They take several tensors of floating type, or decompose one, and only move or compare its numbers.
_MOVES = """cat stack copy copy_ _to_copy index_put index_put_ _index_put_impl_ _unsafe_index_put scatter scatter_ scatter_add
    scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_copy index_copy_ masked_scatter masked_scatter_
    slice_scatter select_scatter diagonal_scatter set_ equal allclose isin searchsorted bucketize linalg_vector_norm
    native_layer_norm _fused_rms_norm native_group_norm native_batch_norm histogram quantile nanquantile"""
_DECOMPOSES = ("linalg_", "_linalg_", "cholesky", "lu_", "svd", "qr", "inverse", "pdist", "_pdist", "cov", "_fft")


def refuse_uncounted(operation: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation without a rule that may be a matrix product: one of several floating tensors at once.

    Elementwise operations and views are none.

    Raises:
        UncountedOperationError: names the operation.
    """
    if operation.is_view or torch.Tag.pointwise in operation.tags:
        return
    name = operation._schema.name.partition("::")[2]
    operands = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if name in _MOVES.split() or (len(operands) < 2 and not name.startswith(_DECOMPOSES)):
        return
    raise UncountedOperationError(
        f"torch {torch.__version__}: aten.{name} may multiply matrices, and no rule says how many FLOPs it takes. Add one to "
        "flop_rules in lmms_prune/compat/torch.py, or its name to those that only move numbers."
    )


def forward_pre_hooks(module: Any) -> Iterator[Any]:
    """The hooks that run before a module's forward."""
    yield from module._forward_pre_hooks.values()


LIBRARY = Library(
    "torch",
    "lmms_prune/compat/torch.py",
    (
        Names(
            "torch.utils.flop_counter:",
            "attributes",
            ("flop_registry", "sdpa_flop_count"),
            "2.6",
            "counting what a method multiplies",
        ),
        Names(
            "torch.utils._python_dispatch:TorchDispatchMode",
            "attributes",
            ("__torch_dispatch__",),
            "2.6",
            "counting what a method multiplies",
        ),
        Names("torch._ops:OpOverload", "attributes", ("decompose",), "2.6", "counting in inference mode"),
        Names(
            "torch.nn:Identity",
            "attributes",
            ("register_forward_pre_hook", "register_forward_hook"),
            "2.6",
            "every hook",
        ),
    ),
)
