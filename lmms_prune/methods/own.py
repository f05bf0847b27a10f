"""Methods of one's own: importing the file or module that a schedule names, and reading what the class says of itself.

This runs the author's code. It is called where a model is pruned, never where a text is only read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, get_origin

from lmms_prune.errors import OptionError, did_you_mean
from lmms_prune.methods import METHODS
from lmms_prune.methods.base import Method
from lmms_prune.methods.reference import GROUP, Reference, entry_points
from lmms_prune.methods.spec import OWN, READS, MethodSpec, Option, print_option

_BUILT_IN = "lmms_prune.methods."
# Words that a schedule text or a YAML stage gives another meaning.
_RESERVED = ("method", "layer", "keep", "per", "budget")
_TYPES = (bool, int, float, str)


class OwnMethodError(OptionError):
    """A method of one's own that cannot be used; the message names the file or class, what came and what is allowed."""


def load(name: str) -> MethodSpec:
    """Import the method that a schedule calls `name`, and return the row that its class describes.

    Raises:
        OwnMethodError: there is no such file, it raises, it holds no such method, or the class is not usable.
    """
    reference = Reference.read(name)
    module, digest = _file(reference.source) if reference.is_file else _module(reference.source)
    return spec_of(_chosen(module, reference), name, digest)


def name_of(method: Method) -> str:
    """How a schedule text names the class of a method object: as the table does, else by its module or its script."""
    cls = type(method)
    if (built_in := _built_in(cls)) is not None:
        return built_in
    if cls.__module__ == "__main__":
        file = getattr(sys.modules["__main__"], "__file__", None)
        return f"{file}:{cls.__name__}" if file else f"__main__:{cls.__name__}"
    return f"{cls.__module__}:{cls.__name__}"


def options_of(method: Method) -> tuple[tuple[str, object], ...]:
    """The fields of a method object that differ from their defaults.

    Raises:
        OwnMethodError: a value cannot be written in a schedule text.
    """
    pairs = []
    for item in dataclasses.fields(method):
        value = getattr(method, item.name)
        if type(value) not in _TYPES:
            raise OwnMethodError(
                f"{type(method).__name__}.{item.name} is a {type(value).__name__}; allowed are flags, numbers and texts, "
                "because a schedule must be written down to be run again."
            )
        if value != item.default:
            pairs.append((item.name, value))
    return tuple(pairs)


def spec_of(cls: type[Method], name: str, sha256: str | None = None) -> MethodSpec:
    """The row of a method of one's own, from what its class says of itself.

    Raises:
        OwnMethodError: it says something that is not allowed.
    """
    where = f"{name}: the method {cls.__name__}"
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise OwnMethodError(f"{where} lacks {' and '.join(f'`{word}`' for word in missing)}.")
    reads = _reads(cls, where)
    lowest = _layer(cls.lowest_layer, "lowest_layer", where)
    if {"attention", "keys", "values"} & set(reads):
        lowest = max(lowest, 1)
    highest = None if cls.highest_layer is None else _layer(cls.highest_layer, "highest_layer", where)
    if highest is not None and highest < lowest:
        raise OwnMethodError(f"{where}: highest_layer={highest} is below its lowest layer, {lowest}.")
    for flag in ("adaptive", "at_most"):
        if not isinstance(getattr(cls, flag), bool):
            raise OwnMethodError(f"{where}: {flag}={getattr(cls, flag)!r}; allowed are True and False.")
    return MethodSpec(
        name=name,
        class_name=cls.__name__,
        paper=str(cls.paper),
        kind=OWN,
        reads=reads,
        example=f"{name}@{max(lowest, 2)}:0.3",
        lowest_layer=lowest,
        highest_layer=highest,
        keep="optional" if cls.adaptive else "given",
        at_most=cls.at_most,
        rewrites=cls.rewrite is not Method.rewrite,
        options=_options(cls, where),
        method_class=cls,
        sha256=_source_digest(cls) if sha256 is None else sha256,
    )


def refuse_clash(name: str) -> None:
    """Refuse a built-in method whose name an installed package gives to one of its own: nobody could say which was meant.

    Raises:
        OwnMethodError: names both.
    """
    if name in METHODS and (value := entry_points().get(name)) is not None:
        raise OwnMethodError(
            f"'{name}' is a built-in method, and an installed package names its {value} so too (entry points of the group "
            f"{GROUP}); rename it there, or uninstall the package. '{value}@…' can be written in full."
        )


def _reads(cls: type[Method], where: str) -> tuple[str, ...]:
    reads = cls.reads
    if isinstance(reads, str) or not all(isinstance(word, str) for word in reads):
        raise OwnMethodError(f"{where}: reads={reads!r}; write a tuple of words: ('attention',).")
    allowed = [word for word in READS if word != "answer"]
    for word in reads:
        if word not in allowed:
            raise OwnMethodError(f"{where} reads {word!r}, which is no signal.{did_you_mean(word, allowed)}")
    return tuple(reads)


def _layer(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise OwnMethodError(f"{where}: {name}={value!r}; allowed are whole numbers from 0.")
    return value


def _options(cls: type[Method], where: str) -> tuple[Option, ...]:
    fields = {item.name: item for item in dataclasses.fields(cls)}
    plain = [
        name
        for name, kind in inspect.get_annotations(cls).items()
        if name not in fields
        and get_origin(kind) is not ClassVar
        and not str(kind).startswith(("ClassVar", "typing.ClassVar"))
    ]
    if plain:
        raise OwnMethodError(
            f"{where}: '{plain[0]}' is an option only in a dataclass; write @dataclass(frozen=True) above the class."
        )
    return tuple(_option(item, where) for item in fields.values())


def _option(item: dataclasses.Field[Any], where: str) -> Option:
    if item.name in _RESERVED:
        raise OwnMethodError(
            f"{where}: no option can be called '{item.name}', which a schedule uses itself; rename it."
        )
    if type(item.default) not in _TYPES:
        came = "none" if item.default is dataclasses.MISSING else repr(item.default)
        raise OwnMethodError(
            f"{where}: the option '{item.name}' needs a flag, a number or a text as default, and has {came}."
        )
    more: Mapping[str, Any] = item.metadata
    default: Any = item.default
    option = Option(
        item.name,
        default,
        str(more.get("help", "")),
        tuple(more.get("choices", ())),
        more.get("low"),
        more.get("high"),
    )
    if isinstance(item.default, str) and not item.default:
        return option  # an empty text is written by leaving the option out
    try:
        option.read(print_option(item.default))
    except OptionError as error:
        raise OwnMethodError(f"{where}: its own default is refused: {error}") from None
    return option


# -- importing -------------------------------------------------------------------------------------------------------------


class _Held(SourceFileLoader):
    """Runs the very bytes that were hashed: a cached .pyc may be of another version that was saved in the same second."""

    def __init__(self, name: str, path: str, source: bytes):
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.source, self.path)


def _file(source: str) -> tuple[ModuleType, str]:
    """Import a file, once for each content; returns the module and the SHA-256."""
    path = Path(source).expanduser()
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = f"there is no such file below {Path.cwd()}" if isinstance(error, FileNotFoundError) else error.strerror
        raise OwnMethodError(f"{source}: {reason}.") from None
    digest = hashlib.sha256(content).hexdigest()
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    name = f"lmms_prune_own_{place[:8]}_{digest[:16]}"
    if name not in sys.modules:
        loader = _Held(name, str(path.resolve()), content)
        spec = ModuleSpec(name, loader, origin=loader.path)
        spec.has_location = True
        module = module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        try:
            loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise OwnMethodError(f"{source} raises when it is imported: {_reason(error, loader.path)}") from error
    return sys.modules[name], digest


def _module(source: str) -> tuple[ModuleType, str | None]:
    try:
        return import_module(source), None
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and source.startswith(str(error.name))
        hint = ". Is it installed? A file is named by its path: 'path/to/file.py:Class'." if absent else ""
        raise OwnMethodError(f"{source} raises when it is imported: {_reason(error, '')}{hint}") from error


def _reason(error: BaseException, path: str) -> str:
    """The error with the line of the author's file from which it came."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {text}" + ("" if line is None else f" (line {line})")


def _chosen(module: ModuleType, reference: Reference) -> type[Method]:
    """The class that a reference names, or the only method of a file."""
    methods = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    names = [cls.__name__ for cls in methods]
    if reference.class_name:
        return _named(module, reference, names)
    ready = [cls for cls in methods if not getattr(cls, "__abstractmethods__", ())] or methods
    if len(ready) == 1:
        return ready[0]
    if ready:
        raise OwnMethodError(
            f"{reference} holds {len(ready)} methods; name one: "
            f"{' or '.join(f'{reference.source}:{cls.__name__}' for cls in ready)}."
        )
    raise OwnMethodError(
        f"{reference} holds no method: no class in it is a ScoreMethod or a Method (lmms_prune.methods.base). "
        "`lmms-prune new-method NAME` writes one to begin with."
    )


def _named(module: ModuleType, reference: Reference, names: list[str]) -> type[Method]:
    value = getattr(module, reference.class_name, None)
    if value is None:
        known = did_you_mean(reference.class_name, names) if names else " It holds no method."
        raise OwnMethodError(f"{reference.source} has no class '{reference.class_name}'.{known}")
    if not isinstance(value, type) or not issubclass(value, Method):
        raise OwnMethodError(f"{reference} is no method: it must be a subclass of ScoreMethod or Method.")
    if (built_in := _built_in(value)) is not None:
        raise OwnMethodError(f"{reference} is the built-in method '{built_in}'; write '{METHODS[built_in].example}'.")
    return value


def _built_in(cls: type) -> str | None:
    """The name in the table of a built-in method's class."""
    name = cls.__module__.removeprefix(_BUILT_IN)
    return name if name in METHODS and METHODS[name].class_name == cls.__name__ else None


def _source_digest(cls: type) -> str:
    """SHA-256 of the file that defines a class, or of its text in a notebook; "" if neither is to be had."""
    try:
        file = Path(inspect.getsourcefile(cls) or "")
        content = file.read_bytes() if file.is_file() else inspect.getsource(cls).encode()
    except (OSError, TypeError):
        return ""
    return hashlib.sha256(content).hexdigest()
