"""Facts about a method that need no import of its module: options, count rules, layers. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from math import inf
from typing import TYPE_CHECKING, Literal, TypeAlias

from lmms_prune.errors import OptionError

if TYPE_CHECKING:
    from lmms_prune.methods.base import Method


def print_option(value: object) -> str:
    """An option's value as written in a schedule text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Option:
    """One option of a method; its type is the default's: a flag, a number, a choice of texts or any text.

    Args:
        name: as written in the schedule.
        default: its value where it is not written.
        help: its effect, in a line.
        choices: the texts that a choice allows; empty for other types.
        low, high: bounds of a number, both allowed.
        old: former spellings of choices, as recorded schedules have them: still read, no longer written.
    """

    name: str
    default: bool | int | float | str
    help: str
    choices: tuple[str, ...] = ()
    low: int | float | None = None
    high: int | float | None = None
    old: Mapping[str, str] = field(default_factory=dict)

    @property
    def allowed(self) -> str:
        """The values that may be written, in words."""
        if self.choices or isinstance(self.default, bool):
            return " and ".join(self.choices or ("true", "false"))
        if isinstance(self.default, str):
            return "any text without commas and semicolons"
        kind = "whole numbers" if isinstance(self.default, int) else "numbers"
        bounds = [f"{word} {bound:g}" for word, bound in (("from", self.low), ("to", self.high)) if bound is not None]
        return " ".join([kind, *bounds])

    def read(self, text: str) -> bool | int | float | str:
        """The value written as `text`; raises `OptionError` with what is allowed."""
        value = self._value(text)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is None or (number and not self._within(value)):  # type: ignore[arg-type]
            raise OptionError(f"option {self.name}={text}: allowed are {self.allowed}.")
        return value

    def _value(self, text: str) -> bool | int | float | str | None:
        if self.choices:
            choice = self.old.get(text.lower(), text.lower())
            return choice if choice in self.choices else None
        if isinstance(self.default, bool):
            return {"true": True, "false": False}.get(text.lower())
        if isinstance(self.default, str):
            return text or None
        # Python reads digits of all scripts, and underscores between them; a schedule's text is compared and printed.
        if not text.isascii() or "_" in text:
            return None
        try:
            return int(text) if isinstance(self.default, int) else float(text)
        except ValueError:
            return None

    def _within(self, value: int | float) -> bool:
        # NaN compares false with everything, so it is within no bounds; an infinite value would make all scores equal.
        low, high = (-inf if self.low is None else self.low), (inf if self.high is None else self.high)
        return low <= value <= high and -inf < value < inf


Options: TypeAlias = Mapping[str, object]
OWN = "own"
"""The kind of a method that is defined outside of this package."""


def exactly(requested: int, present: int, options: Options) -> int:
    """The count rule of most methods: as many tokens as requested are kept."""
    return requested


def dart_count(requested: int, present: int, options: Options) -> int:
    """8⌊N/8⌋+4: DART keeps four pivots and eight equal quotas (no tokens if none are requested)."""
    if not options.get("native_count", True) or requested == 0:
        return requested
    return 8 * (requested // 8) + 4


def sparsevlm_count(requested: int, present: int, options: Options) -> int:
    """N + ⌊q/10⌋+1: SparseVLM v1.5 recycles the best q = ⌊0.3·D⌋+1 of the D dropped tokens into ⌊q/10⌋+1 clusters."""
    recycles = options.get("version", "v1.5") == "v1.5" and options.get("native_count", True)
    if requested == 0 or not recycles:
        return requested
    kept = min(requested, present - 1)
    return kept + (3 * (present - kept) // 10 + 1) // 10 + 1


def all_layers(layer: int, options: Options) -> str:
    """The layer rule of most methods: all options are allowed at all layers."""
    return ""


def tome_layers(layer: int, options: Options) -> str:
    """Inside the encoder ToMe precedes the decoder; keys are those of the layer before."""
    if options.get("place") == "encoder" and layer:
        return "place=encoder merges inside the vision encoder, so the stage must act at layer 0"
    if options.get("metric") == "keys" and not layer and options.get("place") != "encoder":
        return "metric=keys reads the layer before, so the stage must act at layer 1 or deeper"
    return ""


def folder_layers(layer: int, options: Options) -> str:
    """The full variant folds inside the encoder."""
    if options.get("variant") == "full" and layer:
        return "variant=full folds inside the vision encoder, so the stage must act at layer 0"
    return ""


def oracle_needs(layer: int, options: Options) -> str:
    """The oracle needs measurements to choose by."""
    if not options.get("of"):
        return "it chooses by what was measured with the right answers; add ';of=FOLDER', a folder of `lmms-prune information`"
    return ""


_REENCODES = "it runs the vision encoder's blocks on all of an image at once"


def inside_encoder(layer: int, options: Options) -> str:
    """ToMe and FOLDER run the encoder anew only in the variants that act inside it."""
    inside = options.get("place") == "encoder" or options.get("variant") == "full"
    return _REENCODES if inside else ""


def before_decoder(layer: int, options: Options) -> str:
    """Downsample and MustDrop run the encoder anew before the decoder."""
    return _REENCODES if layer == 0 else ""


READS = {
    "attention": "attention rows of the layer before",
    "attention ahead": "attention rows of the layer itself",
    "keys": "keys of the layer before",
    "values": "value vectors of the layer before",
    "positions": "rotary tables of its positions",
    "hidden": "hidden states",
    "embeddings": "input embeddings",
    "encoder": "signals from the vision encoder",
    "pixels": "the image's pixels",
    "grid": "the image's grid",
    "rectangles": "the image's grids",
    "question": "the question as text",
    "guide": "a second model",
    "answer": "the right answer (as information measured with it)",
}


@dataclass(frozen=True)
class MethodSpec:
    """One row of the table of methods: everything about a method that needs no import of its module.

    Args:
        name: the name in a schedule, also the module's name and the class's in lower case.
        class_name: the class in ``lmms_prune.methods.<name>``.
        paper: URL.
        kind: "importance", "diversity", "hybrid", "merging", "control", or "oracle" if it reads the right answer.
        reads: the signals that the method uses beyond the tokens' presence: names of `READS`.
        example: a stage of the method, which runs as written if the method is `ready`.
        lowest_layer: the first decoder layer at whose input the method can act.
        highest_layer: the last one; None is the model's last.
        keep: "given": the stage must state a keep; "none": the method drops everything and takes no keep;
            "optional": without a keep the method decides how many tokens are kept (an adaptive keep).
        count: tokens kept in an image for (tokens requested, tokens present, options), before the cap by tokens present.
        at_most: the method may keep fewer than `count` says; the number is known only after it has run.
        rewrites: the method changes kept tokens: they are merged, recycled or encoded anew.
        refuses: the fault of a stage at (layer, options), in a sentence; an empty text if there is none.
        crops_cache: after the prompt, tokens that the method's stages (deeper than 0) dropped are also removed from the
            caches of layers that ran before its last one: "" of none, "later" from the layer before its first stage on, "all"
            of all.
        regions: it divides the image into regions by its raster, and so needs a single rectangle of tokens; what reads the
            grid does so anyway.
        undefined_on_tiles: why a stage at (layer, options) is not defined for an image that is encoded in tiles, in a
            clause; an empty text if it is.
        options: the options that may follow in the stage's text.
        trained: it needs weights that were trained for it.
        method_class: the class of a method of one's own, once its file or module was imported.
        sha256: of the file that defines that class.
    """

    name: str
    class_name: str
    paper: str
    kind: str
    reads: tuple[str, ...]
    example: str
    lowest_layer: int = 0
    highest_layer: int | None = None
    keep: Literal["given", "none", "optional"] = "given"
    count: Callable[[int, int, Options], int] = exactly
    at_most: bool = False
    rewrites: bool = False
    refuses: Callable[[int, Options], str] = all_layers
    crops_cache: Literal["", "later", "all"] = ""
    regions: bool = False
    undefined_on_tiles: Callable[[int, Options], str] = all_layers
    options: tuple[Option, ...] = ()
    trained: bool = False
    method_class: type[Method] | None = None
    sha256: str = ""

    @property
    def own(self) -> bool:
        """Whether it is a method of one's own, defined outside of this package."""
        return self.kind == OWN

    @property
    def ready(self) -> bool:
        """Whether it runs without further files: no weights trained for it, no measurements."""
        return not self.trained and self.kind != "oracle"

    @property
    def needs_grid(self) -> bool:
        """Whether it needs the image as a single rectangle of tokens."""
        return self.regions or "grid" in self.reads

    @property
    def drops_all(self) -> bool:
        """Whether it drops every visual token."""
        return self.keep == "none"

    @property
    def reads_text(self) -> str:
        """The signals that it reads, in words."""
        return " and ".join(READS[name] for name in self.reads) or "nothing"

    @property
    def count_text(self) -> str:
        """How many tokens are kept for N requested, in words."""
        if self.drops_all:
            return "none"
        # A count rule's docstring begins with its formula.
        rule = "N" if self.count is exactly else (self.count.__doc__ or "").strip().split(":")[0]
        text = f"at most {rule}" if self.at_most else rule
        return f"{text}, or its own rule" if self.keep == "optional" else text

    @property
    def layers_text(self) -> str:
        """The layers at whose input it can act, in words."""
        if self.highest_layer is None:
            return "any" if self.lowest_layer == 0 else f"{self.lowest_layer} and deeper"
        low, high = self.lowest_layer, self.highest_layer
        return str(low) if low == high else f"{low} to {high}"

    def option(self, name: str, text: str) -> object:
        """The value of option `name` written as `text`; raises `OptionError` with what is allowed."""
        if self.own and self.method_class is None:
            return _unread(self.name, name, text)
        for option in self.options:
            if option.name == name:
                return option.read(text)
        known = [option.name for option in self.options]
        near = get_close_matches(name, known, n=1)
        hint = f"Did you mean '{near[0]}'?" if near else f"Its options: {', '.join(known) or 'none'}."
        raise OptionError(f"{self.name} has no option '{name}'. {hint}")

    def build(self, options: Options) -> Method:
        """The method object with the stage's options; the module of a built-in one is imported only here."""
        if self.own:
            if self.method_class is None:
                raise OptionError(f"{self.name} was not imported; `prune` does that, or `pruning.block.bound`.")
            return self.method_class(**{name: self.option(name, str(text)) for name, text in options.items()})
        module = import_module(f"lmms_prune.methods.{self.name}")
        return getattr(module, self.class_name)(**options)


def unread_spec(name: str) -> MethodSpec:
    """What is known of a method of one's own before its code has run: next to nothing, so its plan is an upper bound."""
    return MethodSpec(
        name=name,
        class_name=name.rpartition(":")[2],
        paper="",
        kind=OWN,
        reads=(),
        example=f"{name}@2:0.3",
        keep="optional",
        at_most=True,
    )


def _unread(method: str, name: str, text: str) -> str:
    """The text of an option whose type is not known yet."""
    if not name.isidentifier() or not name.isascii():
        raise OptionError(f"'{name}' is no name of an option of {method}: it must be a field of the class.")
    if not text or text != text.strip() or not text.isprintable() or set(text) & set(",;"):
        raise OptionError(f"option {name}={text}: allowed is any text without commas and semicolons.")
    return text
