"""Redaction of secrets: logs, records and pages are written as `redacted` text only.

A secret is known by its value, where an environment variable with a name such as ``HF_TOKEN`` holds it, or by its form.
What a child process prints is read through a pipe and redacted line by line before it is written, so that no file ever
holds it in clear, whatever ends the process.
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
_CONTEXT = 4096  # characters in which whatever is known by its form has room
_LINE = 2**16  # characters that a line may have before it is written in parts

# Whole words of a name, so that TOKENIZERS_PARALLELISM and GIT_AUTHOR_NAME are none; HFTOKEN is one.
_SECRET_NAME = re.compile(
    r"(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|AUTH|APIKEY|_KEY|_PWD|_PAT)S?\d*(?:_|$)"
)
_PLACE_NAME = re.compile(r"_(?:PATH|FILE|DIR|HOME|SOCK)$")

_VALUE = r"[^\s\"'`,;&\\\[\](){}<>]"
_RANDOM = rf"(?={_VALUE}{{0,{LONGEST}}}[A-Z0-9]){_VALUE}"  # random texts have capitals or digits, where prose has none
_START = r"(?:(?<![A-Za-z0-9])|(?<=\\[nrt]))"  # of a word, also after the \n of a text that is quoted as Python does
_ASSIGNED = r"\\?[\"']?\s{0,3}[=:]\s{0,3}\\?[\"']?"
_NAMED = {
    "key": r"(?:api|access|private|secret|auth|signing|encryption)[_-]?key(?:[_-]?id)?",
    "secret": r"client[_-]?secret",
    "passw": r"passw(?:or)?d",
    "passphrase": r"passphrase",
    "token": r"(?:hf|hub|api|auth|access|refresh|session|github|gitlab|bot)[_-]?token",
}
# Each with a text in small letters that stands in whatever it matches: most lines have none of them, which is soon seen.
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
            (hint, rf"(?i:{name}){_ASSIGNED}(?P<secret>(?={_VALUE}{{0,255}}\d){_VALUE}{{8,255}})")
            for hint, name in _NAMED.items()
        ),
        ("://", r"://(?P<secret>[^\s/:@\"'\\<>]{0,255}:[^\s/\"'\\<>]{1,255})@"),
    )
]


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The secrets that an environment holds, as they may appear in text: quoted by Python, JSON or a URL, and line by line.

    Args:
        environment: variables by name. One holds a secret if a word of its name says so, such as TOKEN or PASSWORD, and its
            value has `SHORTEST` characters or more and is no place in the file system.
    """
    held: dict[str, None] = {}
    for name, value in environment.items():
        upper = name.upper()
        if not _SECRET_NAME.search(upper) or _PLACE_NAME.search(upper) or _is_place(value):
            continue
        for text in (value.strip(), *map(str.strip, value.splitlines())):
            if len(text) >= SHORTEST:
                quoted = (repr(text)[1:-1], json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
                held |= dict.fromkeys((text, *quoted, quote(text, safe=""), quote(text)))
    return tuple(held)


def _is_place(value: str) -> bool:
    return os.path.isabs(value) and os.path.exists(value)


def redacted(text: str, secrets: Collection[str] = ()) -> str:
    """`text` with `MARK` in place of every secret; text without one is returned as it is.

    Args:
        secrets: from `secret_values`; tokens, keys, logins in URLs and the like are also recognised by their form.
    """
    # What a secret was taken from may look like another one then.
    while (clean := MARK.join(_once(part, secrets) for part in text.split(MARK))) != text:
        text = clean
    return text


def redacted_values(value: Any, secrets: Collection[str] = ()) -> Any:
    """`redacted` for all texts in a value of JSON's types, its keys among them."""
    if isinstance(value, str):
        return redacted(value, secrets)
    if isinstance(value, Mapping):
        return {redacted_values(key, secrets): redacted_values(inner, secrets) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [redacted_values(inner, secrets) for inner in value]
    return value


def _once(text: str, secrets: Collection[str]) -> str:
    small = text.lower()
    forms = [form for hint, form in _FORMS if hint in small]
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
    """The lines of a stream as they become complete, redacted, with their ends (a progress bar ends with a carriage return).

    Args:
        chunks: of UTF-8; what is none becomes a replacement character. A secret may lie in two of them.

    Yields:
        all text of the stream. A line of more than 64 Ki characters comes in parts, none of which ends inside of a secret.
    """
    decoder, held, size = codecs.getincrementaldecoder("utf-8")("replace"), list[str](), 0
    context = max([_CONTEXT, *(2 * len(secret) for secret in secrets)])
    for chunk in chunks:
        for number, part in enumerate(re.split(r"(?<=[\r\n])", decoder.decode(chunk))):
            if number:  # what is held has its end
                yield redacted("".join(held), secrets)
                held, size = [], 0
            held.append(part)
            size += len(part)
        if size > _LINE + 2 * context:
            line = "".join(held)
            cut = _cut(line, size - context, context, secrets)
            yield redacted(line[:cut], secrets)
            held, size = [line[cut:]], size - cut
    if rest := "".join(held) + decoder.decode(b"", final=True):
        yield redacted(rest, secrets)


def _cut(text: str, cut: int, context: int, secrets: Collection[str]) -> int:
    """The last place at or before `cut` where no secret of `context` characters or fewer is cut in two."""
    for place in range(cut, cut - context, -1):
        before, after = text[place - context : place], text[place : place + context]
        if redacted(before, secrets) + redacted(after, secrets) == redacted(before + after, secrets):
            return place
    return cut


def printed(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """What a process writes to its standard output, a pipe, until it has ended or closed it.

    A process of its own that it leaves behind, and that holds the pipe, is not waited for.
    """
    stream: IO[bytes] | None = process.stdout
    if stream is None:
        raise ValueError("printed: the process has no pipe; start it with stdout=subprocess.PIPE.")
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if selector.select(timeout=0.5):
                if not (chunk := os.read(stream.fileno(), 2**16)):
                    return
                yield chunk
            elif process.poll() is not None:
                return
