"""Conversion of a task's generation_kwargs to transformers' options, and of tokens to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_prune.harness.arguments import ArgumentError

# Characters that openpyxl refuses; a single one in an answer would lose a run's whole spreadsheet.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_DEFAULT_LENGTH = 128
_PASSED_ON = ("min_new_tokens", "top_k", "repetition_penalty", "no_repeat_ngram_size")
KNOWN = frozenset({"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", *_PASSED_ON})


def options(kwargs: Mapping[str, Any], tokenizer: Any, use_cache: bool) -> dict[str, Any]:
    """Return transformers' generation options for a task's `kwargs`, which are not changed.

    Raises:
        ArgumentError: a value is not a number, or options contradict each other.
    """
    beams = _number(kwargs, "num_beams", int, 1, lowest=1)
    result = {
        "max_new_tokens": _number(kwargs, "max_new_tokens", int, _DEFAULT_LENGTH, lowest=1),
        "temperature": None,
        "top_p": None,
        "top_k": None,
        **_sampling(kwargs),
        **{name: kwargs[name] for name in _PASSED_ON if name in kwargs},
        "num_beams": beams,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "use_cache": use_cache,
    }
    if stops := stop_texts(kwargs):
        result |= {"stop_strings": stops, "tokenizer": tokenizer}
    return result


def stop_texts(kwargs: Mapping[str, Any], blank_line: bool = False) -> list[str]:
    """Return the texts at which an answer ends; with `blank_line`, the one that lmms-eval fills in is among them."""
    until = kwargs.get("until") or []
    if not isinstance(until, str) and not (isinstance(until, (list, tuple)) and all(isinstance(s, str) for s in until)):
        raise ArgumentError(f"gen_kwargs: until={until!r} must be a text or a list of texts.")
    # lmms-eval fills in "\n\n" for tasks without a stop text; the stock chat models ignore it, too.
    ignored = ("",) if blank_line else ("", "\n\n")
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop not in ignored]


def own_tokens(ids: list[int], tokenizer: Any) -> list[int]:
    """Return a row's tokens up to the end token, or without the padding after a stop text."""
    if tokenizer.eos_token_id in ids:
        return ids[: ids.index(tokenizer.eos_token_id) + 1]
    length = len(ids)
    while length and ids[length - 1] == tokenizer.pad_token_id:
        length -= 1
    return ids[:length]


def clean(text: str, stops: Sequence[str], strip: bool = False) -> str:
    """Return `text` up to the first stop text, without control characters; with `strip`, without white space around it."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    text = _CONTROL.sub("", text)
    return text.strip() if strip else text


def _sampling(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sampling options: sampled if do_sample says so or, without it, if the temperature is above 0."""
    temperature = _number(kwargs, "temperature", float, None, lowest=0)
    flag = str(kwargs.get("do_sample", "none")).lower()
    if flag not in ("true", "false", "1", "0", "none"):
        raise ArgumentError(f"gen_kwargs: do_sample={kwargs['do_sample']} must be true or false.")
    sampling = bool(temperature) if flag == "none" else flag in ("true", "1")
    if not sampling:
        return {"do_sample": False}
    if temperature == 0:
        raise ArgumentError("gen_kwargs: do_sample=true contradicts temperature=0; say one of them.")
    return {"do_sample": True, "temperature": temperature, "top_p": _number(kwargs, "top_p", float, None, lowest=0)}


def _number(kwargs: Mapping[str, Any], name: str, kind: type, default: Any, lowest: int) -> Any:
    value = kwargs.get(name)
    if value is None:
        return default
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        number = None
    if number is None or number < lowest or number != float(value):
        kinds = "a whole number" if kind is int else "a number"
        raise ArgumentError(f"gen_kwargs: {name}={value} must be {kinds} of at least {lowest}.")
    return number
