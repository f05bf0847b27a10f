"""The table of methods, written out by hand and free of torch.

Adding a method is its file in this folder, one row here, and one row in the README. The schedule text, the command
line and the leaderboard read only this table; a test holds it against the classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_prune.methods.base import Method


class OptionError(ValueError):
    """An option that a method does not have, or a value that it does not take."""


@dataclass(frozen=True)
class Option:
    """One option of a method: a choice of texts, or a flag when `choices` is empty."""

    name: str
    default: object
    help: str
    choices: tuple[str, ...] = ()

    def read(self, text: str) -> object:
        allowed = self.choices or ("true", "false")
        if text.lower() not in allowed:
            raise OptionError(f"option {self.name}={text}: allowed are {' and '.join(allowed)}.")
        return text.lower() if self.choices else text.lower() == "true"


def exactly(asked: int, options: Mapping[str, object]) -> int:
    """The count rule of most methods: what is asked for is kept."""
    return asked


def dart_count(asked: int, options: Mapping[str, object]) -> int:
    """DART keeps four pivots and eight equal quotas: 8⌊N/8⌋+4 (nothing when nothing is asked for)."""
    if not options.get("native_count", True) or asked == 0:
        return asked
    return 8 * (asked // 8) + 4


@dataclass(frozen=True)
class MethodSpec:
    """What is known of a method without importing it.

    Args:
        name: the schedule's name, also the module's and the lower-case class's.
        class_name: the class in ``lmms_prune.methods.<name>``.
        paper: URL.
        kind: "importance", "diversity", "hybrid", "merging" or "control".
        reads: what of a `TokenView` the method uses beyond the tokens' presence: "attention" (rows of the layer
            before), "keys" (of the layer before), "hidden" (the layer's input).
        example: a stage as one would write it.
        lowest_layer: the first decoder layer at whose input the method can act.
        drops_all: the method takes no keep and leaves nothing.
        count: tokens kept in an image for tokens asked for, before the cap by what is present.
        options: the options that may follow in the stage's text.
    """

    name: str
    class_name: str
    paper: str
    kind: str
    reads: tuple[str, ...]
    example: str
    lowest_layer: int = 0
    drops_all: bool = False
    count: Callable[[int, Mapping[str, object]], int] = exactly
    options: tuple[Option, ...] = ()

    @property
    def reads_text(self) -> str:
        words = {"attention": "attention rows of the layer before", "keys": "keys of the layer before"}
        return " and ".join(words.get(name, f"{name} states") for name in self.reads) or "nothing"

    def option(self, name: str, text: str) -> object:
        """The value of option `name` written as `text`; raises `OptionError` with what is allowed."""
        for option in self.options:
            if option.name == name:
                return option.read(text)
        known = [option.name for option in self.options]
        near = get_close_matches(name, known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Its options: {', '.join(known) or 'none'}."
        raise OptionError(f"{self.name} has no option '{name}'. {hint}")

    def build(self, options: Mapping[str, object]) -> Method:
        """The method itself, with the stage's options; the module is imported only now."""
        module = import_module(f"lmms_prune.methods.{self.name}")
        return getattr(module, self.class_name)(**options)


_ROWS = (
    MethodSpec(
        name="random",
        class_name="Random",
        paper="https://arxiv.org/abs/2512.07580",
        kind="control",
        reads=(),
        example="random@20:0.07",
    ),
    MethodSpec(
        name="vtw",
        class_name="VTW",
        paper="https://arxiv.org/abs/2405.05803",
        kind="control",
        reads=(),
        example="vtw@21",
        drops_all=True,
    ),
    MethodSpec(
        name="fastv",
        class_name="FastV",
        paper="https://arxiv.org/abs/2403.06764",
        kind="importance",
        reads=("attention",),
        example="fastv@3:0.26",
        lowest_layer=1,
    ),
    MethodSpec(
        name="dart",
        class_name="DART",
        paper="https://arxiv.org/abs/2502.11494",
        kind="diversity",
        reads=("keys", "hidden"),
        example="dart@2:0.44",
        lowest_layer=1,
        count=dart_count,
        options=(
            Option("native_count", True, "keep the reference's 8⌊N/8⌋+4 tokens; false keeps exactly N"),
            Option("order", "stable", "order in which the pivots pick", ("stable", "reference")),
        ),
    ),
    MethodSpec(
        name="divprune",
        class_name="DivPrune",
        paper="https://arxiv.org/abs/2503.02175",
        kind="diversity",
        reads=("hidden",),
        example="divprune@0:0.33",
    ),
)

METHODS: dict[str, MethodSpec] = {row.name: row for row in _ROWS}
