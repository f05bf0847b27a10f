"""The text of --model_args: pairs between commas, as lmms-eval writes them, or one JSON object."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from lmms_prune.errors import Kind, expect
from lmms_prune.schedule.text import text_of

# An argument begins with "name=". Any other piece between commas continues the value before it, so that the comma
# inside schedule=a@2:0.4,b@9:0.1 does not end the argument.
_ARGUMENT = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*=")
# A value that is quoted or bracketed as a whole; an apostrophe inside a text does not start one.
_QUOTED = re.compile(r"""(?<==)\s*("[^"]*"|'[^']*'|\[[^\]]*\]|\{[^}]*\})(?=\s*(?:,|$))""")
# Arguments whose values may contain commas.
_CONTINUED = ("schedule", "system_prompt", "chat_template")


class ArgumentError(ValueError):
    """A model argument that cannot be used; the message names it, its value and what is allowed."""


def split(text: str) -> dict[str, str]:
    """Split ``a=1,schedule=x@2:0.4,y@9:0.1,b=2``, or ``{"a": 1, "schedule": "x@2:0.4,y@9:0.1", "b": 2}``, into a dict of texts.

    Between commas, a piece that does not begin with ``name=`` continues a schedule, system prompt or chat template before
    it. A value that is quoted or bracketed as a whole is never split at its commas; its quotes are removed.
    """
    if "\0" in text:
        raise ArgumentError(f"model_args: {text!r} holds a NUL character.")
    if is_json(text):
        return _read_json(text)
    # Quoted values are replaced by placeholders, so that their commas and equals signs do not count.
    quoted: list[str] = []

    def placeholder(match: re.Match[str]) -> str:
        quoted.append(match.group(1))
        return f"\0{len(quoted) - 1}\0"

    pieces: list[str] = []
    for piece in _QUOTED.sub(placeholder, text.strip().rstrip(", ")).split(","):
        if _ARGUMENT.match(piece):
            pieces.append(piece)
        elif piece.strip() and pieces and pieces[-1].split("=", 1)[0].strip() in _CONTINUED:
            pieces[-1] += "," + piece
        elif piece.strip():
            raise ArgumentError(f"model_args: '{piece.strip()}' is no argument; write name=value.")
    values: dict[str, str] = {}
    for piece in pieces:
        name, value = (part.strip() for part in piece.split("=", 1))
        value = re.sub("\0(\\d+)\0", lambda match: quoted[int(match.group(1))], value)
        if name in values:
            raise ArgumentError(f"model_args: '{name}' is given twice.")
        if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
            value = value[1:-1]
        values[name] = value
    return values


def argument_text(model_args: str | Mapping[str, Any]) -> str:
    """Return model arguments as a text of --model_args; a text is returned as it is.

    Raises:
        TypeError: they are neither a text nor a mapping.
        ArgumentError: a value that no text stands for.
    """
    expect(model_args=(model_args, Kind("a text or a mapping", lambda value: isinstance(value, (str, Mapping)))))
    return model_args if isinstance(model_args, str) else comma_text(split(json.dumps(dict(model_args), default=str)))


def is_json(text: str) -> bool:
    """Whether a text of --model_args is meant as JSON: no pair of the other spelling begins with a brace."""
    return text.lstrip().startswith("{")


def comma_text(values: Mapping[str, str]) -> str:
    """Return the text of pairs between commas that `split` reads as `values`; JSON where there is none."""
    pairs = []
    for name, value in values.items():
        quotes = [mark for mark in ("", '"', "'") if _reads(f"{name}={mark}{value}{mark}", {name: value})]
        pairs.append(f"{name}={quotes[0]}{value}{quotes[0]}" if quotes else "")
    text = ",".join(pairs)
    return text if _reads(text, values) else json.dumps(dict(values), ensure_ascii=False)


def extended(model_args: str, values: Mapping[str, Any]) -> str:
    """Return a text of --model_args, in whichever spelling, with further arguments at its end.

    Raises:
        ArgumentError: one of them is in the text already, or the text is no JSON although it begins like it.
    """
    further = {name: str(value) for name, value in values.items()}
    if is_json(model_args):
        existing = split(model_args)
        if repeated := [name for name in further if name in existing]:
            raise ArgumentError(f"model_args: '{repeated[0]}' is given twice.")
        return json.dumps({**existing, **further}, ensure_ascii=False)
    pairs = (f"{name}={value}" for name, value in further.items())
    return ",".join(filter(None, (model_args.strip().rstrip(", "), *pairs)))


def _reads(text: str, values: Mapping[str, str]) -> bool:
    try:
        return split(text) == values
    except ArgumentError:
        return False


def _read_json(text: str) -> dict[str, str]:
    """Read one JSON object: numbers, true and false become their texts, null is an argument that is not given."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for number, (name, _) in enumerate(pairs):
            if name in dict(pairs[:number]):
                raise ArgumentError(f"model_args: '{name}' is given twice.")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_int=str, parse_float=str, parse_constant=str)
    except json.JSONDecodeError as error:
        raise ArgumentError(_pointing(f"this is no JSON: {error.msg}.", text, error.pos)) from None
    except RecursionError:
        raise ArgumentError(
            "model_args: the JSON is nested too deeply; write one object of names and values."
        ) from None
    return {name: _as_text(name, value) for name, value in content.items() if value is not None}


def _as_text(name: str, value: Any) -> str:
    if name == "schedule" and isinstance(value, (list, dict)):
        return text_of(value)
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str):
        kind = "a list" if isinstance(value, list) else "an object"
        raise ArgumentError(f"model_args: {name} is {kind}; only a schedule may be a list. Give a text or a number.")
    return value


def _pointing(message: str, text: str, position: int) -> str:
    """A message that points at a position of a text, below the line that holds it."""
    start = text.rfind("\n", 0, position) + 1
    line = text[start:].partition("\n")[0]
    shown = "".join(letter if letter.isprintable() else " " for letter in line)
    return f"model_args: {message}\n    {shown}\n    {' ' * (position - start)}^"
