"""Splits a line of a samples file into what belongs to its document and what belongs to the answer, and joins them again.

The *skeleton* of a document is its line with a hole in place of each value that the answer decides. It is the same in all
rows of a board, so that a board stores it once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

HOLE = "\0"
"""Stands in a skeleton for a value that the answer decides; lmms-eval's JSON has no such text."""
ANSWER = "filtered_resps"
COUNTS = "token_counts"
# Of the line itself, and of the metrics in it: what is the same whatever the answer.
_DOCUMENT = frozenset({"doc_id", "target", "doc_hash", "input_media", "input"})
_OF_METRICS = frozenset(
    {
        *("question_id", "questionId", "category", "ground_truth", "index", "question", "hint", "source", "split"),
        *("L2-category", "question_type", "A", "B", "C", "D", "E"),
    }
)


class SplitError(ValueError):
    """A line that is not split: joined again, it would not be the same bytes."""


def dumped(logged: Any) -> str:
    """Return a line as lmms-eval writes it, without its end."""
    return json.dumps(logged, ensure_ascii=False)


def digest(skeleton: str) -> bytes:
    """Return the name of a skeleton: a hash of its text."""
    return sha256(skeleton.encode(errors="surrogatepass")).digest()[:16]


def split(line: str) -> tuple[str, str, Any, list[Any]]:
    """Split a line.

    Returns:
        the skeleton, the answer, the token counts, and the other values in the order of their holes.

    Raises:
        SplitError: the line has not the form of a sample.
    """
    try:
        logged = json.loads(line)
        answer = logged[ANSWER]
    except (LookupError, RecursionError, TypeError, ValueError) as error:
        raise SplitError("no sample") from error
    if not isinstance(logged, dict) or not isinstance(answer, str) or COUNTS not in logged or HOLE in line:
        raise SplitError("no sample with one answer")
    values: list[Any] = []
    skeleton = {name: _hollowed(name, value, values) for name, value in logged.items()}
    counts = logged[COUNTS]
    text = dumped(skeleton)
    if dumped(joined(text, answer, counts, values)) != line:
        raise SplitError("not written as lmms-eval writes it")
    return text, answer, counts, values


def _hollowed(name: str, value: Any, values: list[Any]) -> Any:
    if name in _DOCUMENT:
        return value
    if name in (ANSWER, COUNTS):
        return HOLE
    if not isinstance(value, Mapping):
        values.append(value)
        return HOLE
    static, hollow = _static(value), {}
    for part, inner in value.items():
        if part in static:
            hollow[part] = inner
        else:
            values.append(inner)
            hollow[part] = HOLE
    return hollow


def document_fields(logged: Mapping[str, Any]) -> dict[str, str]:
    """Return the fields of a line that are its document's, as texts by name; those of metrics as ``metric.field``."""
    fields: dict[str, str] = {}
    for name, value in logged.items():
        if name in _DOCUMENT:
            fields[name] = str(value)
        elif isinstance(value, Mapping) and name not in (ANSWER, COUNTS):
            fields |= {f"{name}.{part}": str(value[part]) for part in _static(value) if part in value}
    return fields


def _static(metric: Mapping[str, Any]) -> frozenset[str]:
    """Return the fields of a metric that are the document's."""
    # A metric that repeats the prediction has the right answer under "answer"; elsewhere that is the given one.
    return _OF_METRICS | ({"answer"} if "prediction" in metric else frozenset())


def joined(skeleton: str, answer: str, counts: Any, values: Sequence[Any]) -> dict[str, Any]:
    """Return the sample of `split`; raises ValueError if the values are not as many as the holes."""
    rest = iter(values)
    logged = {}
    for name, value in json.loads(skeleton).items():
        if name == ANSWER:
            value = answer
        elif name == COUNTS:
            value = counts
        else:
            value = _filled(value, rest)
        logged[name] = value
    if next(rest, HOLE) != HOLE:
        raise ValueError("more values than holes")
    return logged


def _filled(value: Any, rest: Iterator[Any]) -> Any:
    if value == HOLE:
        return _next(rest)
    if isinstance(value, dict):
        return {name: _next(rest) if part == HOLE else part for name, part in value.items()}
    return value


def _next(rest: Iterator[Any]) -> Any:
    for value in rest:
        return value
    raise ValueError("fewer values than holes")
