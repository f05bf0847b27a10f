"""The FLOPs of the methods' own computations: counted once for each combination of shapes.

Counting looks at every operation, which costs the host more than starting it does. What a selection multiplies follows
from numbers that the host knows before it, so a second batch of the same sizes needs no count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmms_prune.compat.torch import flop_rules, is_composite, needs_rule, quantised_rule, refuse_uncounted
from lmms_prune.methods.spec import MethodSpec
from lmms_prune.models.counting import Tally

Result = TypeVar("Result")
_MOST = 10_000  # combinations of shapes remembered for a model


class SelectionFlops:
    """FLOPs of a model's selections, remembered by their shapes."""

    _of: WeakKeyDictionary[Any, SelectionFlops] = WeakKeyDictionary()

    def __init__(self) -> None:
        self._known: dict[Hashable, int] = {}

    @classmethod
    def of(cls, model: Any) -> SelectionFlops:
        """Those of a model; one object for all blocks."""
        return cls._of.setdefault(model, cls())

    def run(self, select: Callable[[], Result], spec: MethodSpec, shapes: Hashable) -> tuple[Result, int]:
        """Run a selection; returns its result and its FLOPs.

        Args:
            select: selects and rewrites.
            spec: the method's row.
            shapes: everything known on the host that its shapes follow from: schedule, stage, sizes, budgets.
        """
        # What an auxiliary model computes depends on the text that it reads or answers.
        varies = bool({"guide", "question"} & set(spec.reads))
        if not varies and shapes in self._known:
            return select(), self._known[shapes]
        with ProductCounter() as counter:
            result = select()
        if not varies:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[shapes] = counter.flops
        return result, counter.flops


class ProductCounter(TorchDispatchMode):
    """Counts the FLOPs of matrix products (2 per multiply-accumulate) by torch's own rules.

    A greedy search counts as its reference, also where one fused kernel does it. The sum equals that of torch's
    ``FlopCounterMode``, which also follows modules, takes several times as long, and counts an operation without a rule
    as 0.

    Raises:
        UncountedOperationError: an operation that multiplies has no rule.
    """

    def __init__(self) -> None:
        super().__init__()
        self._tally, self._rules = Tally(), flop_rules()

    @property
    def flops(self) -> int:
        """FLOPs counted so far."""
        return self._tally.flops

    def __enter__(self) -> ProductCounter:
        Tally.open.append(self._tally)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._tally in Tally.open:
            Tally.open.remove(self._tally)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, rule = kwargs or {}, self._rules.get(func._overloadpacket) or quantised_rule(func)
        if self._tally.paused:
            return func(*args, **kwargs)
        if rule is None and not _only_moves(func):
            # In inference mode a product may be part of a composite operation, which has no rule itself.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            refuse_uncounted(func, args, kwargs)
        out = func(*args, **kwargs)
        if rule is not None:
            self._tally.flops += rule(*args, **kwargs, out_val=out)
        return out


@cache
def _only_moves(operation: Any) -> bool:
    """Whether an operation multiplies no matrices, whatever it is called with."""
    return operation is torch.ops.prim.device.default or not (needs_rule(operation) or is_composite(operation))
