"""Private names of torch that this package uses: the rules by which its operations' FLOPs are counted, and modules' hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from math import prod
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lmms_prune.compat.bitsandbytes import CONVERSIONS, PRODUCTS
from lmms_prune.compat.names import Library, PrivateNames


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _distance_flops(first: Any, second: Any, *_: Any, **__: Any) -> int:
    return 2 * prod(first) * second[-2]


def _shapes(rule: Callable[..., int]) -> Callable[..., int]:
    """Turn a rule on shapes into one on tensors, like those of the registry."""

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return rule(*(x.shape if isinstance(x, torch.Tensor) else x for x in args))

    return count


@cache
def forgotten_rules() -> Mapping[Any, Callable[..., int]]:
    """Our rules, on shapes, for operations without one in torch, as ``FlopCounterMode(custom_mapping=…)`` takes them."""
    # Attention on CPUs has no rule in torch 2.14 and 2.15. Distances of all pairs cost as much as the matrix product of
    # the same shapes.
    rules: dict[str, Callable[..., int]] = {
        "_scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "_cdist_forward": _distance_flops,
    }
    named = {getattr(torch.ops.aten, name, None): rule for name, rule in rules.items()}
    return {
        operation: rule for operation, rule in named.items() if operation is not None and operation not in flop_registry
    }


@cache
def flop_rules() -> Mapping[Any, Callable[..., int]]:
    """Rules for the FLOPs of each operation that multiplies matrices: torch's, and ours for those that it lacks."""
    return {**flop_registry, **{operation: _shapes(rule) for operation, rule in forgotten_rules().items()}}


def quantised_rule(operation: Any) -> Callable[..., int] | None:
    """The rule for a product with a quantised matrix; None for any other operation.

    By its name, since such a library defines its operations when it is imported, which most runs never do.
    """
    rule = PRODUCTS.get(operation._schema.name)
    return None if rule is None else lambda *args, out_val=None, **kwargs: rule(*args, **kwargs)


class UncountedOperationError(RuntimeError):
    """An operation that multiplies matrices has no rule for its FLOPs: a count without it would be wrong."""


# Operations that take several floating-point tensors but only move or compare their values.
_MOVES = """cat stack copy copy_ _to_copy index_put index_put_ _index_put_impl_ _unsafe_index_put scatter scatter_ scatter_add
    scatter_add_ scatter_reduce scatter_reduce_ index_add index_add_ index_copy index_copy_ masked_scatter masked_scatter_
    slice_scatter select_scatter diagonal_scatter set_ equal allclose isin searchsorted bucketize linalg_vector_norm
    native_layer_norm _fused_rms_norm native_group_norm native_batch_norm histogram quantile nanquantile"""
_DECOMPOSES = ("linalg_", "_linalg_", "cholesky", "lu_", "svd", "qr", "inverse", "pdist", "_pdist", "cov", "_fft")


def needs_rule(operation: Any) -> bool:
    """Whether an operation may multiply matrices, for some arguments: not elementwise ones, views, and those that only move values."""
    moves = (*_MOVES.split(), *CONVERSIONS)
    return not (operation.is_view or torch.Tag.pointwise in operation.tags or _name(operation) in moves)


def _name(operation: Any) -> str:
    return str(operation._schema.name.partition("::")[2])


def refuse_uncounted(operation: Any, args: tuple, kwargs: Mapping[str, Any]) -> None:
    """Refuse an operation without a rule that may be a matrix product: one of several floating-point tensors.

    Elementwise operations and views are not refused.

    Raises:
        UncountedOperationError: names the operation.
    """
    if not needs_rule(operation):
        return
    name = _name(operation)
    operands = [x for x in tree_leaves((args, dict(kwargs))) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    if len(operands) < 2 and not name.startswith(_DECOMPOSES):
        return
    namespace = operation._schema.name.partition("::")[0]
    raise UncountedOperationError(
        f"torch {torch.__version__}: {namespace}.{name} may multiply matrices, and no rule says how many FLOPs it takes. Add one to "
        "flop_rules in lmms_prune/compat/torch.py, or its name to those that only move values."
    )


def forward_pre_hooks(module: Any) -> Iterator[Any]:
    """The hooks that run before a module's forward."""
    yield from module._forward_pre_hooks.values()


def tensors_by_name(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and its own buffers; what is put there takes the place of a tensor without any check."""
    return module._parameters, module._buffers


def is_composite(operation: Any) -> bool:
    """Whether an operation is written in other operations for every device."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")


def pretend_device(cls: Any, values: torch.Tensor, device: torch.device) -> Any:
    """A tensor of the class `cls` without memory of its own, in the shape of `values`, that says it lies on `device`."""
    strides, offset = values.stride(), values.storage_offset()
    return torch.Tensor._make_wrapper_subclass(
        cls, values.shape, strides=strides, storage_offset=offset, dtype=values.dtype, device=device
    )


def causal_after_prefix(tokens: int, prefix: int) -> Any:
    """The mask of `tokens` queries that see a prefix in the cache and, of themselves, the earlier ones.

    torch's ``is_causal`` would let the first query see one token of the prefix only. This prototype of torch's says that the last
    query sees all keys: on a GPU it calls the flash or the memory-efficient kernel without a mask, elsewhere it makes one of two
    dimensions. Transformers' attention passes it on as any other mask.
    """
    return causal_lower_right(tokens, prefix + tokens)


@contextmanager
def without_driver() -> Iterator[None]:
    """A block in which tensors may say that they lie on a GPU although this machine has none: no driver is asked."""
    torch._C._ensureCUDADeviceGuardSet()
    with patch.object(torch.cuda, "_lazy_init", lambda: None):
        yield


LIBRARY = Library(
    "torch",
    "lmms_prune/compat/torch.py",
    (
        PrivateNames(
            "torch.utils.flop_counter:",
            "attributes",
            ("flop_registry", "sdpa_flop_count"),
            "2.6",
            "counting the FLOPs of methods",
        ),
        PrivateNames(
            "torch.utils._python_dispatch:TorchDispatchMode",
            "attributes",
            ("__torch_dispatch__",),
            "2.6",
            "counting the FLOPs of methods",
        ),
        PrivateNames(
            "torch.nn.attention.bias:",
            "attributes",
            ("causal_lower_right",),
            "2.6",
            "measuring information with causal kernels",
        ),
        PrivateNames("torch._ops:OpOverload", "attributes", ("decompose",), "2.6", "counting in inference mode"),
        PrivateNames(
            "torch:_C",
            "attributes",
            ("_dispatch_has_kernel_for_dispatch_key", "_ensureCUDADeviceGuardSet", "DisableTorchFunction"),
            "2.6",
            "the pretended GPU",
        ),
        PrivateNames("torch:Tensor", "attributes", ("_make_wrapper_subclass",), "2.6", "the pretended GPU"),
        PrivateNames("torch:cuda", "attributes", ("_lazy_init",), "2.6", "the pretended GPU"),
        PrivateNames(
            "torch.nn:Identity",
            "attributes",
            ("register_forward_pre_hook", "register_forward_hook"),
            "2.6",
            "every hook",
        ),
        PrivateNames("a module", "attributes", ("_forward_pre_hooks",), "2.6", "the order of hooks"),
        PrivateNames("a module", "attributes", ("_parameters", "_buffers"), "2.6", "the pretended GPU"),
        PrivateNames("torch.utils._pytree:", "attributes", ("tree_leaves", "tree_map"), "2.6", "the pretended GPU"),
    ),
    build=lambda _: torch.nn.Identity(),  # what every module has is on no class
)
