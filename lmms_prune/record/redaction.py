"""Redaction of secrets: logs, records and pages contain `redacted` text only.

A secret is recognised by its value, if an environment variable with a name such as ``HF_TOKEN`` holds it, or by its form.
The output of a child process is read through a pipe and redacted line by line before it is written. So no file ever
contains a secret, however the process ends.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import selectors
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import IO, Any
from urllib.parse import quote

MARK = "[REDACTED]"  # as lmms-eval writes it
SHORTEST = 8  # characters; shorter values of variables are flags and numbers more often than secrets
LONGEST = 1024  # characters of a header's secret
_CONTEXT = 4096  # characters; every secret that is recognised by its form is shorter
_LINE = 2**16  # characters; longer lines are written in parts

# Each alternative must end a word of the name, so TOKENIZERS_PARALLELISM and GIT_AUTHOR_NAME do not match; HFTOKEN does.
_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH|APIKEY|_KEY|_PWD|_PAT)S?\d*(?:_|$)"
)
_PATH_NAME = re.compile(r"_(?:PATH|FILE|DIR|HOME|SOCK)$")

_VALUE = r"[^\s\"'`,;&\\\[\](){}<>]"
_RANDOM = rf"(?={_VALUE}{{0,{LONGEST}}}[A-Z0-9]){_VALUE}"  # random texts have capitals or digits, prose rarely has
_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"  # start of a word, also after the escape \n in a text quoted by Python
_ASSIGNED = r"\\?[\"']?\s{0,3}[=:]\s{0,3}\\?[\"']?"
# JSON's numbers are no passwords, and a mark in place of one would not be JSON.
_NUMBER = r"\\?[\"']\s{0,3}:\s{0,3}-?\d[\d.eE+-]*(?=[\s,}\]]|$)"
_NAMED = {
    "key": r"(?:api|access|private|secret|auth|signing|encryption)[_-]?key(?:[_-]?id)?",
    "secret": r"client[_-]?secret",
    "passw": r"passw(?:or)?d",
    "passphrase": r"passphrase",
    "token": r"(?:hf|hub|api|auth|access|refresh|session|github|gitlab|bot)[_-]?token",
}
_NAME = re.compile(rf"(?i:{'|'.join(_NAMED.values())})$")
# Each form has a hint: a lower-case text that every match contains. Most lines contain no hint, so this check is fast.
_FORMS = [
    (hint, re.compile(pattern))
    for hint, pattern in (
        ("hf_", r"hf_[A-Za-z0-9]{20,200}"),
        ("gh", r"gh[pousr]_[A-Za-z0-9]{20,255}"),
        ("github_pat_", r"github_pat_[A-Za-z0-9_]{20,255}"),
        ("glpat-", r"glpat-[A-Za-z0-9_-]{20,255}"),
        ("xox", r"xox[abeoprs]-[A-Za-z0-9-]{10,255}"),
        ("aiza", r"AIza[A-Za-z0-9_-]{35}"),
        ("akia", r"AKIA[A-Z0-9]{16}"),
        ("asia", r"ASIA[A-Z0-9]{16}"),
        ("sk-", rf"{_START}sk-(?=[a-z_-]{{0,255}}[A-Z0-9])[A-Za-z0-9_-]{{20,255}}"),
        ("eyj", r"eyJ[A-Za-z0-9_-]{10,512}\.[A-Za-z0-9_-]{10,2048}\.[A-Za-z0-9_-]{10,512}"),
        ("bearer", rf"(?i:bearer)\s{{1,3}}(?P<secret>{_RANDOM}{{16,{LONGEST}}})"),
        ("authorization", rf"(?i:authorization){_ASSIGNED}\w{{1,20}}\s{{1,3}}(?P<secret>{_RANDOM}{{8,{LONGEST}}})"),
        *(
            (hint, rf"(?i:{name})(?!{_NUMBER}){_ASSIGNED}(?P<secret>(?={_VALUE}{{0,255}}\d){_VALUE}{{8,255}})")
            for hint, name in _NAMED.items()
        ),
        ("://", r"://(?P<secret>[^\s/:@\"'\\<>]{0,255}:[^\s/\"'\\<>]{1,255})@"),
    )
]


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return the secrets of an environment in every form in which they may appear in text.

    The forms are the value itself, its single lines, and both as quoted by Python, JSON or a URL.

    Args:
        environment: variables by name. A variable holds a secret if its name has a word such as TOKEN or PASSWORD, and its
            value has at least `SHORTEST` characters and is not an existing path.
    """
    values: dict[str, None] = {}
    for name, value in environment.items():
        upper = name.upper()
        if not _SECRET_NAME.search(upper) or _PATH_NAME.search(upper) or _is_existing_path(value):
            continue
        for text in (value.strip(), *map(str.strip, value.splitlines())):
            if len(text) >= SHORTEST:
                quoted = (repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
                values |= dict.fromkeys((text, *quoted, quote(text, safe=""), quote(text)))
    return tuple(values)


def _is_existing_path(value: str) -> bool:
    return os.path.isabs(value) and os.path.exists(value)


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """Replace every secret in `text` by `MARK`; text without secrets is returned unchanged.

    Args:
        secrets: from `secret_values`. Tokens, keys, logins in URLs and similar secrets are also recognised by their form.
    """
    # Removing one secret may turn the rest of the text into the form of another, so repeat until nothing changes.
    while (clean := MARK.join(_redacted_once(part, secrets) for part in text.split(MARK))) != text:
        text = clean
    return text


def redacted_values(value: Any, secrets: Collection[str] = ()) -> Any:
    """Apply `redacted` to all texts in a JSON value, including the keys of mappings; a key such as ``api_key`` makes its text a secret."""
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, Mapping):
        return {redacted_values(key, secrets): _redacted_under(key, inner, secrets) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(inner, secrets) for inner in value]
    return value


def _redacted_under(key: Any, value: Any, secrets: Collection[str]) -> Any:
    if isinstance(key, str) and isinstance(value, str) and _NAME.search(key):
        name = 'password="'
        return redacted(name + value, secrets).removeprefix(name)
    return redacted_values(value, secrets)


def _redacted_once(text: str, secrets: Collection[str]) -> str:
    lowered = text.lower()
    forms = [form for hint, form in _FORMS if hint in lowered]
    spans = [match.span(match.lastgroup or 0) for form in forms for match in form.finditer(text)]
    for secret in filter(None, secrets):
        start = text.find(secret)
        while start >= 0:
            spans.append((start, start + len(secret)))
            start = text.find(secret, start + 1)
    clean, end = [], 0
    for start, stop in sorted(spans):
        # Overlapping secrets are replaced by one mark.
        if start >= end:
            clean += [text[end:start], MARK]
        end = max(end, stop)
    return "".join([*clean, text[end:]])


def redacted_lines(chunks: Iterable[bytes], secrets: Collection[str] = ()) -> Iterator[str]:
    """Yield the redacted lines of a stream as they become complete, with their line ends.

    A carriage return also ends a line, since progress bars end with one.

    Args:
        chunks: UTF-8 bytes; invalid bytes become replacement characters. A secret may span several chunks.

    Yields:
        all text of the stream. A line of more than 64 Ki characters comes in parts, none of which ends inside a secret.
    """
    decoder, pending, size = codecs.getincrementaldecoder("utf-8")("replace"), list[str](), 0
    context = max([_CONTEXT, *(2 * len(secret) for secret in secrets)])
    for chunk in chunks:
        for number, part in enumerate(re.split(r"(?<=[\r\n])", decoder.decode(chunk))):
            if number:  # every part but the first begins a new line, so the pending line is complete
                yield redacted("".join(pending), secrets)
                pending, size = [], 0
            pending.append(part)
            size += len(part)
        if size > _LINE + 2 * context:
            line = "".join(pending)
            cut = _safe_cut(line, size - context, context, secrets)
            yield redacted(line[:cut], secrets)
            pending, size = [line[cut:]], size - cut
    if rest := "".join(pending) + decoder.decode(b"", final=True):
        yield redacted(rest, secrets)


def _safe_cut(text: str, cut: int, context: int, secrets: Collection[str]) -> int:
    """Return the last offset at or before `cut` that splits no secret of up to `context` characters."""
    for offset in range(cut, cut - context, -1):
        before, after = text[offset - context : offset], text[offset : offset + context]
        if redacted(before, secrets) + redacted(after, secrets) == redacted(before + after, secrets):
            return offset
    return cut


def printed(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield the output of a process until it ends or closes its standard output, which must be a pipe.

    Child processes that outlive the process and keep the pipe open are not waited for.
    """
    stream: IO[bytes] | None = process.stdout
    if stream is None:
        raise ValueError(
            "printed: the standard output of the process is not a pipe; start it with stdout=subprocess.PIPE."
        )
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.5):
                if not (chunk := os.read(stream.fileno(), 2**16)):
                    return
                yield chunk
            elif process.poll() is not None:
                return
