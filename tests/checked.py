"""Type checks of every call of the package, at a fraction of what jaxtyping's own decorator costs.

``--jaxtyping-packages`` (see pyproject.toml) puts ``@jaxtyping.jaxtyped(typechecker=beartype.beartype)`` on every function,
those inside functions included. jaxtyping binds the arguments of each call a second time, checks them twice, keeps a memory
of dimensions where no shape is named, and has beartype write its checks anew for each closure: half of the time of a test
that runs a model. Importing this module, before the package, puts a decorator in its place that checks the same: beartype
looks at the arguments of each call and at what it returns, and one letter is one number in all of them. The checks of a
function are written once, at its first call, for all closures of it.

tests/test_checked.py holds the two against each other.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cached_property, partial, wraps
from types import CodeType, FunctionType
from typing import Any, get_args, get_type_hints

import jaxtyping

ORIGINAL = jaxtyping.jaxtyped


class Checks:
    """What is checked of all functions that have the code of this one; written when one of them is first called."""

    def __init__(self, function: FunctionType, typechecker: Callable[[Any], Any]):
        # Not the function itself: what it has closed over would live as long as the tests.
        self.signature = inspect.signature(function, follow_wrapped=False)
        self.annotations, self.namespace = function.__annotations__, function.__globals__
        self.names = function.__name__, function.__qualname__, function.__module__
        self.typechecker = typechecker

    @cached_property
    def hints(self) -> dict[str, Any]:
        """Annotations as types; of a name that is known to a type checker alone, Any."""
        return {name: _hint(written, self.namespace) for name, written in self.annotations.items()}

    @cached_property
    def shaped(self) -> bool:
        """Whether any annotation names dimensions."""
        return any(map(_names_dimensions, self.hints.values()))

    @cached_property
    def arguments(self) -> Callable[..., None] | None:
        """Takes the arguments of a call, and raises where one is of another type; None without annotations."""
        hints = {name: hint for name, hint in self.hints.items() if name != "return"}
        if all(hint is Any for hint in hints.values()):
            return None
        defaults: dict[str, Any] = {}
        parameters = []
        for parameter in self.signature.parameters.values():
            default = parameter.default
            if default is not parameter.empty:
                default = _Named(f"_default{len(defaults)}")
                defaults[str(default)] = parameter.default
            parameters.append(parameter.replace(annotation=parameter.empty, default=default))
        return self._checked(f"{inspect.Signature(parameters)}: pass", defaults, hints)

    @cached_property
    def result(self) -> Callable[[Any], Any] | None:
        """Takes what a call returns, and raises where it is of another type; None without an annotation."""
        hint = self.hints.get("return", Any)
        return None if hint is Any else self._checked("(value): return value", {}, {"return": hint})

    def _checked(self, text: str, namespace: dict[str, Any], hints: dict[str, Any]) -> Callable[..., Any]:
        name, qualified, module = self.names
        exec(f"def {name}{text}", namespace)
        made = namespace[name]
        made.__module__, made.__qualname__, made.__annotations__ = module, qualified, hints
        return self.typechecker(made)


CHECKS: dict[int, tuple[CodeType, Checks]] = {}
"""By the identity of a code object, which stays as long as it stands here: equal ones may have other annotations."""


class _Named:
    """Stands for a default, by the name that it has in the function's namespace."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name


def _hint(written: Any, namespace: dict[str, Any]) -> Any:
    def one(value: Any) -> None: ...

    one.__annotations__ = {"value": written}
    try:
        return get_type_hints(one, namespace, include_extras=True)["value"]
    except Exception:  # as jaxtyping does: what cannot be resolved is not checked
        return Any


def _names_dimensions(hint: Any) -> bool:
    if isinstance(hint, list):  # the parameters of a Callable
        return any(map(_names_dimensions, hint))
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_dimensions, get_args(hint)))


def jaxtyped(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """As ``jaxtyping.jaxtyped``, for functions and dataclasses."""
    if fn is None:
        return partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if not inspect.isfunction(fn):
        return ORIGINAL(fn, typechecker=typechecker)
    if hasattr(fn, "__checked__"):
        return fn
    code = fn.__code__
    if id(code) not in CHECKS:
        CHECKS[id(code)] = (code, Checks(fn, typechecker))
    checks = CHECKS[id(code)][1]

    @wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if checks.shaped:
            with ORIGINAL("context"):
                return checked(*args, **kwargs)
        return checked(*args, **kwargs)

    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if checks.arguments is not None:
            checks.arguments(*args, **kwargs)
        returned = fn(*args, **kwargs)
        if checks.result is not None:
            checks.result(returned)
        return returned

    call.__checked__ = True  # type: ignore[attr-defined]
    return call


jaxtyping.jaxtyped = jaxtyped
