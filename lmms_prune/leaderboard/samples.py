"""Reading a samples file of lmms-eval: score, answer and token accounting of each document."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lmms_prune.leaderboard.benchmarks import Benchmark
from lmms_prune.leaderboard.mmbench import chosen
from lmms_prune.leaderboard.scorers import box_is_right, mmmu_is_right
from lmms_prune.record.accounting import TokenAccounting, TokenTotals
from lmms_prune.record.results import CIRCLE
from lmms_prune.record.stored import opened

RIGHT = 0.5  # partial scores (TextVQA, ANLS) of at least this count as right where right answers are counted


# The errors that Python raises for missing, mistyped or out-of-range values, and for invalid JSON.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class SamplesError(ValueError):
    """A samples file that cannot be used; the message names it."""


class NoDocumentScoresError(SamplesError):
    """A sound file of a task that does not log one score for each document; only the task's own score is known."""


class ChangedError(SamplesError):
    """A samples file that has changed since it was read."""


class Stamp(NamedTuple):
    """The state of a file; another content has another stamp.

    Args:
        size: in bytes.
        modified: time of the last change of the content, in nanoseconds.
        changed: time of the last change of the file's status, in nanoseconds. A program can set `modified`, but not this.
        inode: the file's number; a file that is put in the place of another has another one.
    """

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass(frozen=True, eq=False)
class Samples:
    """The documents of one task in one run.

    Resampling draws *units*: the two questions about an MME image, the circular group of an MMBench question, or one
    document of any other task. The score is the sum over the strata (categories of MME and MMStar) of the sum of `num` over
    the sum of `den`.

    Args:
        signature: a digest that is equal for runs of the same documents, questions and targets.
        num, den, stratum, right: numerator, denominator, stratum index and correctness of each unit, ordered by key.
        documents: document ids, ascending. unit: the index of each document's unit.
        answers: a hash of each document's answer text, the same in every process.
        offsets: where each document's line begins in the file, in bytes.
        score: the score that follows from the units, on the paper's scale.
        logged: number of documents in the file, including MMBench copies whose original question is absent.
        empty: number of documents with an empty answer.
        accounting: token totals of all documents; None if one has no token accounting.
        extras: POPE's accuracy, precision, recall and yes-rate, in percent.
        stamp: the file's state when it was opened.
        scaled, sign: as of the benchmark; without a scale, `right` says nothing (`right_pair` compares two runs).
    """

    signature: str
    num: Float[np.ndarray, " units"]
    den: Float[np.ndarray, " units"]
    stratum: Int[np.ndarray, " units"]
    right: Bool[np.ndarray, " units"]
    documents: Int[np.ndarray, " documents"]
    unit: Int[np.ndarray, " documents"]
    answers: Int[np.ndarray, " documents"]
    offsets: Int[np.ndarray, " documents"]
    score: float
    logged: int
    empty: int
    accounting: TokenTotals | None
    extras: Mapping[str, float]
    stamp: Stamp
    scaled: bool = True
    sign: int = 1


class _Document(NamedTuple):
    """One line of the file."""

    doc_id: int
    key: tuple[Any, ...]
    stratum: str
    score: float
    answer: str
    asked: str
    offset: int
    main: bool = True  # False for MMBench's copies with rotated options
    pope: tuple[str, str] = ("", "")  # the right answer, and the given one


def read_samples(path: Path, benchmark: Benchmark) -> Samples:
    """Read one samples file.

    Raises:
        SamplesError: a broken line, a document that is there twice, or an MME image without its two questions.
        NoDocumentScoresError: a task that logs no number for each document, or several by different filters.
        OSError: the file cannot be read.
    """
    if benchmark.filters > 1:
        message = (
            f"{path}: {benchmark.filters} filters score each document, and the file does not say which line is whose."
        )
        raise NoDocumentScoresError(message)
    documents: list[_Document] = []
    accounted: list[TokenAccounting] = []
    with opened(path) as (stream, status):
        stamp = Stamp.of(status)
        for number, (offset, line) in enumerate(_lines(stream), 1):
            try:
                logged = json.loads(line)
                if not isinstance(logged, Mapping):
                    raise TypeError(f"a {type(logged).__name__}, where an object is expected")
                documents.append(_document(logged, benchmark, offset))
                if benchmark.kind != "any" and not 0 <= documents[-1].score <= 1:
                    raise ValueError(f"a score of {documents[-1].score:g}, where 0 to 1 is possible")
                if (accounting := sample_accounting(logged)) is not None:
                    accounted.append(accounting)
            except NoDocumentScoresError as error:
                raise NoDocumentScoresError(f"{path}, line {number}: {error}") from None
            except (*UNREADABLE, StopIteration) as error:
                reason = f"{type(error).__name__}: {error}"
                raise SamplesError(f"{path}, line {number}: no sample of {benchmark.name} ({reason}).") from error
    ids = {document.doc_id for document in documents}
    if len(ids) < len(documents):
        raise SamplesError(
            f"{path}: {len(documents)} lines for {len(ids)} documents; two runs of the same second write into one "
            "file. Give each run an output folder of its own."
        )
    if not documents:
        raise SamplesError(f"{path}: no samples.")
    totals = TokenTotals.of(accounted) if len(accounted) == len(documents) else None
    # lmms-eval scores no rotated copy whose original question is absent; neither do we.
    main = {document.key for document in documents if document.main}
    scored = sorted(document for document in documents if document.key in main)
    return _assemble(path, benchmark, scored, totals, len(documents), stamp)


def _lines(stream: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    """Yield the lines of a samples file, without empty ones, each with its offset in bytes."""
    offset = 0
    for line in stream:
        if line.strip():
            yield offset, line.decode(errors="replace")
        offset += len(line)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a samples file, without empty ones; raises OSError if the file cannot be read."""
    with opened(path) as (stream, _):
        yield from (line for _, line in _lines(stream))


def line_at(path: Path, samples: Samples, document: int) -> Mapping[str, Any]:
    """Read again the line of one document.

    Args:
        path: the samples file.
        samples: what was read of it.
        document: its number.

    Raises:
        ChangedError: the file is not the one that was read.
        OSError: the file cannot be read.
    """
    with opened(path) as (stream, status):
        if Stamp.of(status) == samples.stamp:
            stream.seek(int(samples.offsets[np.searchsorted(samples.documents, document)]))
            logged: Mapping[str, Any] = json.loads(stream.readline().decode(errors="replace"))
            return logged
    raise ChangedError(
        f"{path}: changed while the leaderboard read it. Run the command again when the evaluation is over."
    )


def sample_accounting(logged: Mapping[str, Any]) -> TokenAccounting | None:
    """Return the token accounting of one line of a samples file; None if it has none of ours."""
    return TokenAccounting.read((logged.get("token_counts") or [None])[0])


def answer_text(logged: Mapping[str, Any]) -> str:
    """Return the answer text of one line of a samples file."""
    responses = logged["filtered_resps"]
    return (responses if isinstance(responses, str) else json.dumps(responses, ensure_ascii=False)).strip()


def _document(logged: Mapping[str, Any], benchmark: Benchmark, offset: int) -> _Document:
    doc_id = int(np.int64(logged["doc_id"]))  # a damaged file may have a number of any length
    asked, answer = f"{logged['target']}\0{logged['input']}", answer_text(logged)
    if benchmark.kind == "mme":
        item = next(logged[metric] for metric in benchmark.metrics if metric in logged)
        key = (str(item["category"]), str(item["question_id"]))
        return _Document(doc_id, key, key[0], float(item["score"]), answer, asked, offset)
    if benchmark.kind == "mmbench":
        item = logged["gpt_eval_score"]
        index, value = int(item["index"]), float(chosen(item) == item["answer"])
        return _Document(doc_id, (index % CIRCLE,), "", value, answer, asked, offset, index < CIRCLE)
    if benchmark.kind == "pope":
        item = logged["pope_accuracy"]
        pair = (item["ground_truth"], item["prediction"])
        return _Document(doc_id, (doc_id,), "", float(item["score"]), answer, asked, offset, True, pair)
    if benchmark.kind in ("box", "mmmu"):
        item = logged[benchmark.metrics[0]]
        value = float(box_is_right(item) if benchmark.kind == "box" else mmmu_is_right(item))
        return _Document(doc_id, (doc_id,), "", value, answer, asked, offset)
    if benchmark.kind == "categories":
        item = logged[benchmark.metrics[0]]
        return _Document(doc_id, (doc_id,), str(item["l2_category"]), float(item["score"]), answer, asked, offset)
    if benchmark.kind == "any":
        return _Document(doc_id, (doc_id,), "", _any_score(logged, benchmark.metrics[0]), answer, asked, offset)
    scored = logged[benchmark.metrics[0]]
    value = float(scored["score"] if isinstance(scored, Mapping) else scored)
    return _Document(doc_id, (doc_id,), "", value, answer, asked, offset)


def _any_score(logged: Mapping[str, Any], metric: str) -> float:
    """Return the number that a task logs of a document, or its field "score".

    Raises:
        NoDocumentScoresError: it logs something else, from which its own code makes the score.
    """
    scored = logged.get(metric)
    value = scored.get("score") if isinstance(scored, Mapping) else scored
    if not isinstance(value, (int, float)) or not isfinite(value):
        text = json.dumps(scored, ensure_ascii=False)
        raise NoDocumentScoresError(
            f"{metric} of a document is {text if len(text) <= 60 else text[:59] + '…'}, no number"
        )
    return float(value)


def right_pair(before: Samples, after: Samples) -> tuple[Bool[np.ndarray, " units"], Bool[np.ndarray, " units"]]:
    """Return for two runs of the same documents which units are right in each, so that differences are flips.

    Where no scale says what is right, the better of both scores counts as right.
    """
    if before.scaled and after.scaled:
        return before.right, after.right
    gained = after.sign * (after.num / after.den - before.num / before.den)
    return gained < 0, gained > 0


def _assemble(
    path: Path,
    benchmark: Benchmark,
    documents: Sequence[_Document],
    totals: TokenTotals | None,
    logged: int,
    stamp: Stamp,
) -> Samples:
    keys = sorted({document.key for document in documents})
    index = {key: i for i, key in enumerate(keys)}
    unit = np.array([index[document.key] for document in documents], int)
    counts = np.bincount(unit, minlength=len(keys))
    total = np.bincount(unit, np.array([document.score for document in documents]), len(keys))
    strata = {name: i for i, name in enumerate(sorted({document.stratum for document in documents}))}
    stratum = np.zeros(len(keys), int)
    stratum[unit] = [strata[document.stratum] for document in documents]
    num, den, right = benchmark.factor * total, np.ones(len(keys)), total >= RIGHT
    if not benchmark.higher_is_better:
        right = total < RIGHT
    if benchmark.kind == "mme":
        if (counts != 2).any():
            key = keys[int(np.argmax(counts != 2))]
            raise SamplesError(f"{path}: MME asks twice about each image, but not about {'/'.join(key)}.")
        right = total == 2
        num = 50 * total + 100 * right
    elif benchmark.kind == "mmbench":
        right = total == counts
        num = 100.0 * right
    elif benchmark.kind == "categories":
        num = num / len(strata)
    elif benchmark.kind == "pope":
        num, den = _f1_parts([document.pope for document in documents])
    digest = blake2b(digest_size=12)
    for document in documents:
        # A text may contain half of a surrogate pair, such as JSON's \\ud83d.
        digest.update(f"{document.doc_id}\0{document.key}\0{document.asked}\0".encode(errors="surrogatepass"))
    return Samples(
        signature=digest.hexdigest(),
        num=num,
        den=den,
        stratum=stratum,
        right=right,
        documents=np.array([document.doc_id for document in documents], int),
        unit=unit,
        answers=np.array([_hashed(document.answer) for document in documents], np.int64),
        offsets=np.array([document.offset for document in documents], int),
        score=float(ratios(np.bincount(stratum, num), np.bincount(stratum, den)).sum()),
        logged=logged,
        empty=sum(not document.answer for document in documents),
        accounting=totals,
        extras=_pope_extras([document.pope for document in documents]) if benchmark.kind == "pope" else {},
        stamp=stamp,
        scaled=benchmark.scaled,
        sign=benchmark.sign,
    )


def _hashed(text: str) -> int:
    """Return a hash of a text. Python's own differs between processes, so a pool's or a cache's would agree with none."""
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little", signed=True)


def ratios(num: Float[np.ndarray, "..."], den: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return `num` / `den`, and 0 where `den` is 0, as lmms-eval does for F1."""
    return np.divide(num, den, out=np.zeros(np.broadcast(num, den).shape), where=den > 0)


def _f1_parts(pairs: Sequence[tuple[str, str]]) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Return each document's 2·TP and 2·TP + FP + FN; F1 is the ratio of their sums.

    As in lmms-eval, an answer that is neither yes nor no is not a false negative.
    """
    parts = {("yes", "yes"): (200.0, 2.0), ("no", "yes"): (0.0, 1.0), ("yes", "no"): (0.0, 1.0)}
    table = np.array([parts.get(pair, (0.0, 0.0)) for pair in pairs])
    return table[:, 0], table[:, 1]


def _pope_extras(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return POPE's further metrics in percent; a metric without any case is left out."""
    answered_yes = [truth for truth, answer in pairs if answer == "yes"]
    positives = [answer for truth, answer in pairs if truth == "yes" and answer in ("yes", "no")]
    parts = {
        "accuracy": (sum(truth == answer for truth, answer in pairs), len(pairs)),
        "precision": (answered_yes.count("yes"), len(answered_yes)),
        "recall": (positives.count("yes"), len(positives)),
        "yes-rate": (len(answered_yes), len(pairs)),
    }
    return {name: 100 * part / total for name, (part, total) in parts.items() if total}
