"""A pretended GPU: tensors that say they lie on ``cuda:0`` and are computed on the CPU, with every operation counted.

What would make the host wait for a real GPU follows from torch's behaviour on CUDA: copies between host and device, unless
``non_blocking`` and (towards the device) from pinned memory; ``item()``, ``tolist()`` and ``bool()``; operations whose result's
size depends on values (``nonzero``, ``unique``, ``masked_select``, ``repeat_interleave`` by a tensor) and indexing by a boolean
tensor. An operation on tensors of different devices raises, as on a GPU. Times cannot be learned here, only counts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from traceback import walk_stack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lmms_prune.compat.torch import is_composite, pretend_device, tensors_by_name, without_driver
from lmms_prune.methods.shared.greedy import searches

GPU = torch.device("cuda:0")
OWN = "lmms_prune/"
_LIBRARIES = ("/transformers/", "/accelerate/", "/lmms_eval/")
# Functions of this package that only run the model's own layers, and this package's own counting.
_PASSING_ON = (
    "guards.py guarded",
    "qwen_encoder.py encode",
    "clip_encoder.py embed",
    "clip_encoder.py run_blocks",
    "clip_encoder.py attend",
    "clip_encoder.py feed",
    "clip_encoder.py project",
    "compat/transformers.py attend",
    "guide.py answer_attention",
    "compat/transformers.py call",
    "bench/waits.py count",
)
_NAMES = tuple(name.strip("/") for name in _LIBRARIES)
# Operations that only make another view of a tensor, reserve memory, or answer a question about it: no kernel is launched.
_VIEWS = [
    "view",
    "alias",
    "expand",
    "permute",
    "transpose",
    "slice",
    "select",
    "unsqueeze",
    "squeeze",
    "detach",
    "split",
    "split_with_sizes",
    "chunk",
    "t",
    "unbind",
    "as_strided",
    "_unsafe_view",
    "_reshape_alias",
    "reshape",
    "unfold",
    "diagonal",
    "empty",
    "empty_like",
    "new_empty",
    "empty_strided",
    "lift_fresh",
    "view_as",
    "device",
    "sym_size",
    "movedim",
    "real",
    "_local_scalar_dense",
    "narrow",
    "expand_as",
    "is_same_size",
    "_has_compatible_shallow_copy_type",
    "item",
    "is_nonzero",
]
# Launches of operations that take more than one (lower bounds: a segmented sort takes two or more).
_LAUNCHES = {"constant_pad_nd": 2, "sort": 2, "topk": 2}
_SIZED_BY_VALUES = (
    "nonzero",
    "masked_select",
    "_unique",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "nonzero_static",
)
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put")
_PINNED = "_pretended_pinned"


class WrongDeviceError(RuntimeError):
    """Tensors of different devices met in one operation."""


class PretendedTensor(Tensor):
    """A tensor on a pretended device; `numbers` are its values, on the CPU."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, device: torch.device = GPU) -> PretendedTensor:
        tensor = pretend_device(cls, values, device)
        tensor.numbers = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a pretended GPU outside of PretendedGpu.running()")


def on_cpu(x: Any) -> Any:
    """`x` with the numbers of all pretended tensors in it."""
    return tree_map(lambda leaf: leaf.numbers if isinstance(leaf, PretendedTensor) else leaf, x)


class PretendedGpu:
    """Counts what a program on a pretended GPU does, by `phase`; set the phase as the program goes on.

    Args:
        builds: whether fused kernels can be built, for which a GPU needs a compiler.

    Attributes:
        operations, launches: number of operations and of kernel launches in each phase.
        waits: how often the host would wait for the device in each phase, by (reason, line of code).
        largest: bytes of the largest tensor that any operation of each phase returned.
        lines: launches by line of code, of each phase.
    """

    def __init__(self, builds: bool = True) -> None:
        self.phase, self.builds = "", builds
        self.operations: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        self.waits: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self.lines: dict[str, Counter[str]] = defaultdict(Counter)
        self.silent = 0

    @contextmanager
    def running(self) -> Iterator[PretendedGpu]:
        """A block in which pretended tensors can be computed with; fused kernels count as one launch."""
        with ExitStack() as stack:
            stack.enter_context(without_driver())
            stack.enter_context(patch.object(searches, "_works", lambda *_: self.builds))
            stack.enter_context(patch.object(searches, "_fused", partial(self._fused, searches._plain)))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operations(self))
            yield self

    @contextmanager
    def placed(self, model: nn.Module, devices: Mapping[str, torch.device] | None = None) -> Iterator[None]:
        """A block in which a model's parameters and buffers lie on the pretended GPU.

        Args:
            model: on the CPU.
            devices: for each name of a module the device of all its tensors, as a ``device_map``; by default all on `GPU`.
        """
        before = [(held, name, x) for held, name, x, _ in _tensors(model)]
        try:
            for held, name, x, owner in _tensors(model):
                device = next((d for key, d in (devices or {}).items() if f"{owner}.".startswith(f"{key}.")), GPU)
                held[name] = PretendedTensor(x.detach(), device)
            yield
        finally:
            for held, name, x in before:
                held[name] = x

    def wait(self, reason: str) -> None:
        """Record that the host would wait here."""
        self.waits[self.phase][reason, _line()] += 1

    def count(self, name: str, result: Any = None) -> None:
        """Record an operation, and its launches if it has any."""
        self.operations[self.phase] += 1
        if name.rstrip("_") in _VIEWS:
            return
        launches = _LAUNCHES.get(name, 1)
        self.launches[self.phase] += launches
        self.lines[self.phase][_line()] += launches
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.largest[self.phase] = max(self.largest[self.phase], x.numel() * x.element_size())

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """A block that computes with bare numbers, such as the inside of one kernel."""
        self.silent += 1
        try:
            yield
        finally:
            self.silent -= 1

    def _fused(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The reference of a fused search, with the launches of its kernels."""
        device = next(x.device for x in tree_leaves(args) if isinstance(x, PretendedTensor))
        with self.uncounted():
            result = plain(*on_cpu(args), **on_cpu(kwargs))
        for _ in range(searches.launches(*args)):
            self.count("fused", result)
        return tree_map(lambda x: PretendedTensor(x, device) if isinstance(x, Tensor) else x, result)


def _tensors(model: nn.Module) -> Iterator[tuple[dict, str, Tensor, str]]:
    for owner, module in model.named_modules():
        for held in tensors_by_name(module):
            for name, x in list(held.items()):
                if x is not None:
                    yield held, name, x, owner


def _line() -> str:
    """The innermost line of this package that led here; else of the library that did; else of the caller."""
    best = ""
    for frame, number in walk_stack(None):
        file = frame.f_code.co_filename
        where = f"{file}:{number} {frame.f_code.co_name}"
        if f"{file} {frame.f_code.co_name}".endswith(_PASSING_ON):
            return best or where
        if f"/{OWN}" in file and file != __file__:
            return OWN + where.split(f"/{OWN}", 1)[1]
        named = next((name for name in _LIBRARIES if name in file), None)
        if named and not best.startswith(_NAMES):
            best = named.strip("/") + "/" + where.split(named, 1)[1]
        elif not best and "/torch/" not in file and "contextlib" not in file and file != __file__:
            best = where
    return best


class _Functions(TorchFunctionMode):
    """What never reaches the dispatcher as an operation on tensors."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, gpu = kwargs or {}, getattr(func, "__name__", ""), self.gpu
        pretended = args and isinstance(args[0], PretendedTensor)
        if func in (torch.tensor, torch.as_tensor) and _is_gpu(kwargs.get("device")):
            if pretended:
                return args[0].to(kwargs["device"], kwargs.get("dtype"))
            values = func(*on_cpu(args), **{**kwargs, "device": "cpu"})
            if values.numel():  # an empty copy returns at once
                gpu.wait("a list copied to the device")
                gpu.count("copy_")
            return PretendedTensor(values, torch.device(kwargs["device"]))
        if name == "pin_memory" and not pretended:
            pinned = args[0].clone()
            setattr(pinned, _PINNED, True)
            return pinned
        if name in ("tolist", "__format__", "__repr__") and pretended:
            gpu.wait(f"{name} of a tensor on the device")
            return getattr(args[0].numbers, name)(*args[1:])
        if name in ("numpy", "__array__") and pretended:
            raise TypeError("numpy() of a tensor on a device; copy it to the CPU first.")
        if name in ("__getitem__", "__setitem__") and pretended:
            # torch would make the index on the device at once, without a word to the dispatcher.
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(part) if isinstance(part, list) else part for part in index)
            return func(args[0], index, *args[2:])
        if name == "scaled_dot_product_attention" and any(isinstance(x, PretendedTensor) for x in args):
            device = _common_device(name, tree_leaves((args, kwargs))) or GPU
            with torch._C.DisableTorchFunction(), gpu.uncounted():
                out = func(*on_cpu(args), **on_cpu(kwargs))
            gpu.count(name, out)
            return PretendedTensor(out, device)
        return func(*args, **kwargs)


class _Operations(TorchDispatchMode):
    """Every operation on tensors: computed on the CPU, counted for the pretended device."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu = kwargs or {}, self.gpu
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        pretended = [x for x in tensors if isinstance(x, PretendedTensor)]
        asked = kwargs.get("device")
        if gpu.silent or not (pretended or _is_gpu(asked)):
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:
            return pretended[0].device
        if _composite(func):  # in inference mode these arrive whole
            with self:
                return func.decompose(*args, **kwargs)
        name = func._overloadpacket.__name__
        moves = name in ("_to_copy", "copy_")
        device = torch.device(asked) if asked is not None else pretended[0].device
        if name == "copy_":
            device = args[0].device
        if moves:
            self._copy(args, kwargs, tensors, device)
        else:
            if name not in _INDEXING:
                _common_device(name, tensors)
            self._waits(name, func._overloadname, args, kwargs)
        inputs = {id(x.numbers): x for x in pretended}
        plain = {k: torch.device("cpu") if k == "device" and v is not None else v for k, v in kwargs.items()}
        plain = {k: False if k == "pin_memory" else v for k, v in plain.items()}
        result = func(*on_cpu(args), **on_cpu(plain))
        gpu.count(name, result)
        if name in ("_local_scalar_dense", "is_nonzero"):
            return result
        if device.type != "cuda":
            return (
                tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, result) if name == "_to_copy" else args[0]
            )

        def wrap(x: Any) -> Any:
            return inputs.get(id(x), PretendedTensor(x, device)) if isinstance(x, Tensor) else x

        return tree_map(wrap, result)

    def _copy(self, args: Any, kwargs: Any, tensors: list[Tensor], device: torch.device) -> None:
        """Whether a copy makes the host wait."""
        source = tensors[-1]
        blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2] is True))
        if not source.numel() or source.device == device or device.type == source.device.type == "cuda":
            return
        if device.type == "cpu":
            if blocking:
                self.gpu.wait("a copy from the device")
        elif blocking or not getattr(source, _PINNED, False):
            self.gpu.wait("a copy to the device" + ("" if blocking else " from memory that is not pinned"))

    def _waits(self, name: str, overload: str, args: Any, kwargs: Any) -> None:
        """Whether an operation makes the host wait."""
        if name in ("_local_scalar_dense", "is_nonzero"):
            self.gpu.wait("the value of a tensor on the device")
        elif name in (*_SIZED_BY_VALUES, "equal") or (
            name == "repeat_interleave" and overload == "Tensor" and kwargs.get("output_size") is None
        ):
            self.gpu.wait(name)
        elif name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            puts = "put" in name
            number = puts and args[2].numel() == 1 and not isinstance(args[2], PretendedTensor)
            fills = number and len(indices) == 1 and indices[0].dtype == torch.bool
            if number and not fills:
                # index_put_ copies a number on the host over and waits; x[mask] = 1 is a fill.
                self.gpu.wait("x[i] = number")
            for index in indices:
                if index.dtype in (torch.bool, torch.uint8):
                    if not fills:
                        self.gpu.wait("a boolean index")
                elif not isinstance(index, PretendedTensor) and index.dim():
                    self.gpu.wait("an index on the host")


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _common_device(name: str, leaves: list[Any]) -> torch.device | None:
    """The one device of all tensors, if there are any; a number on the host may meet any.

    Raises:
        WrongDeviceError: there are several.
    """
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    devices = {x.device for x in tensors if x.dim() or isinstance(x, PretendedTensor)}
    if len(devices) > 1:
        raise WrongDeviceError(f"{name}: tensors on {', '.join(sorted(map(str, devices)))}, at {_line()}")
    return next(iter(devices), None)


@lru_cache(None)
def _composite(func: Any) -> bool:
    return is_composite(func)
