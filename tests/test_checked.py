"""The tests' type checks refuse what jaxtyping's own refuse, and nothing else."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from beartype import beartype
from checked import ORIGINAL, jaxtyped
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune import Schedule
from lmms_prune.pruning.ragged import pack

if TYPE_CHECKING:
    from nowhere import Unknown

BOTH = pytest.mark.parametrize("decorator", [ORIGINAL, jaxtyped], ids=["jaxtyping", "ours"])
Rows = tuple[Float[Tensor, "B D"], ...]


def plain(number: int, /, text: str = "a", *more: int, flag: bool | None = None, **named: float) -> list[int]:
    return [number, *more] if flag is None else text  # type: ignore[return-value]


def shaped(x: Float[Tensor, "B D"], index: Int[Tensor, " B"], *, turn: bool = False) -> Float[Tensor, "B D"]:
    return x.T if turn else x


def nested(rows: Rows, of: Callable[[Float[Tensor, " D"]], int]) -> int:
    return of(rows[0][0])


def known_to_a_checker_alone(x: Unknown, number: int) -> Unknown:
    return x


def yielding(count: int) -> Iterator[int]:
    yield from range(count)


def without(x, y=3):
    return x, y


@dataclass
class Held:
    number: int
    x: Float[Tensor, "B D"] = field(default_factory=lambda: torch.zeros(2, 3))
    index: Int[Tensor, " B"] | None = None

    def times(self, count: int) -> Held:
        return self if count else count  # type: ignore[return-value]


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape)


CASES: list[tuple[Callable[..., Any], tuple, dict[str, Any], bool]] = [
    (plain, (1,), {}, True),
    (plain, (1, "b", 2, 3), {"x": 0.5}, True),
    (plain, ("1",), {}, False),
    (plain, (1, 2), {}, False),
    (plain, (1, "b", 2, "3"), {}, False),
    (plain, (1,), {"x": "y"}, False),
    (plain, (1,), {"flag": 3}, False),
    (plain, (1,), {"flag": True}, False),  # what it returns
    (plain, (), {}, False),
    (shaped, (zeros(2, 3), torch.zeros(2, dtype=torch.long)), {}, True),
    (shaped, (zeros(2, 3), torch.zeros(3, dtype=torch.long)), {}, False),
    (shaped, (zeros(2, 3), torch.zeros(2)), {}, False),
    (shaped, (zeros(2), torch.zeros(2, dtype=torch.long)), {}, False),
    (shaped, (zeros(2, 3), torch.zeros(2, dtype=torch.long)), {"turn": True}, False),  # what it returns
    (shaped, (zeros(3, 3), torch.zeros(3, dtype=torch.long)), {"turn": True}, True),
    (nested, ((zeros(2, 3), zeros(2, 3)), len), {}, True),
    (nested, ((zeros(2),), len), {}, False),
    (nested, ((zeros(2, 3),), 3), {}, False),
    (known_to_a_checker_alone, ("anything", 3), {}, True),
    (known_to_a_checker_alone, ("anything", "3"), {}, False),
    (yielding, (3,), {}, True),
    (yielding, ("3",), {}, False),
    (without, (object(),), {}, True),
]


@BOTH
@pytest.mark.parametrize(("function", "args", "kwargs", "fine"), CASES)
def test_calls(decorator: Any, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], fine: bool) -> None:
    for _ in range(2):  # again with the checks that the first call has written
        checked = decorator(function, typechecker=beartype)
        if fine:
            returned, expected = checked(*args, **kwargs), function(*args, **kwargs)
            if function is yielding:
                returned, expected = list(returned), list(expected)
            assert repr(returned) == repr(expected)
        else:
            with pytest.raises(Exception, match=r"(?i)violate|type-check|missing a required|missing 1 required"):
                checked(*args, **kwargs)
    assert checked.__name__ == function.__name__
    assert checked.__wrapped__ is function


@BOTH
def test_dataclasses(decorator: Any) -> None:
    made = dataclass(type("Made", (), {**vars(Held), "__dict__": {}, "__annotations__": Held.__annotations__}))
    kind = decorator(made, typechecker=beartype)
    assert kind(3).number == 3
    assert kind(3, zeros(4, 5), torch.zeros(4, dtype=torch.long)).x.shape == (4, 5)
    for wrong in (("3",), (3, zeros(4)), (3, zeros(4, 5), torch.zeros(5, dtype=torch.long))):
        with pytest.raises(Exception, match=r"(?i)violate|type-check"):
            kind(*wrong)


@BOTH
def test_each_closure_is_checked_and_calls_itself(decorator: Any) -> None:
    def made(number: int) -> Callable[[int], int]:
        @decorator(typechecker=beartype)
        def add(other: int = number) -> int:
            return number + other

        return add

    one, two = made(1), made(2)
    assert (one(5), two(5), one(), two()) == (6, 7, 2, 4)
    for add in (one, two):
        with pytest.raises(Exception, match=r"(?i)violate|type-check"):
            add("5")


def test_dimensions_of_two_calls_are_two() -> None:
    @jaxtyped(typechecker=beartype)
    def twice(x: Float[Tensor, " N"], again: bool = True) -> Float[Tensor, " N"]:
        if again:
            twice(torch.cat([x, x]), False)
        return x

    assert twice(zeros(3)).shape == (3,)
    assert twice(zeros(4)).shape == (4,)


def test_what_a_closure_holds_goes_with_it() -> None:
    class Model:
        pass

    def hooked() -> tuple[weakref.ref, Callable[[int], int]]:
        model = Model()

        @jaxtyped(typechecker=beartype)
        def hook(number: int) -> int:
            return number if model else 0

        return weakref.ref(model), hook

    reference, hook = hooked()
    assert hook(3) == 3
    assert reference() is not None
    del hook
    gc.collect()
    assert reference() is None


def test_the_package_is_checked() -> None:
    keep = torch.ones(2, 3, dtype=torch.bool)
    pack(keep, [3, 3], "right")
    for wrong in ((keep.float(), [3, 3], "right"), (keep[0], [3, 3], "right"), (keep, [3, 3], 4)):
        with pytest.raises(Exception, match="violate"):
            pack(*wrong)
    with pytest.raises(Exception, match="violate"):
        Schedule.parse("random@2:0.5").layer_counts("4", [36])
