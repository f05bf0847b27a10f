"""One samples file of lmms-eval: what each document was worth, what it answered, and what it cost."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from lmms_prune.leaderboard.benchmarks import Benchmark
from lmms_prune.leaderboard.mmbench import chosen
from lmms_prune.record.accounting import TokenAccounting, TokenTotals
from lmms_prune.record.files import regular

RIGHT = 0.5  # a partial score (TextVQA, ANLS) from here on counts as right where answers are counted
CIRCLE = 1_000_000  # MMBench asks a question again with its options turned, under its index plus a multiple of this


# What Python says of values that are missing, of another type, or beyond all bounds, and of JSON that is none.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class SamplesError(ValueError):
    """A samples file that cannot be used; the message names it."""


@dataclass(frozen=True, eq=False)
class Samples:
    """The documents of one task in one run.

    What is resampled is a *unit*: the two questions about an MME image, the circular group of an MMBench question, a
    document of all other tasks. The score is the sum over the strata (MME: its categories) of the sum of `num` over the
    sum of `den`.

    Args:
        signature: equal for runs of the same documents with the same questions and targets.
        num, den, stratum, right: of each unit, in the order of the units' keys.
        documents: the ids, ascending. unit: the unit of each.
        answers: a number for the text of each document's answer.
        score: the score that follows, on the paper's scale.
        logged: documents in the file; a copy of MMBench's whose own question is not there is one of them.
        empty: documents that were answered with nothing.
        accounting: of all documents; None where one has no token accounting.
        extras: POPE's accuracy, precision, recall and yes-rate, in percent.
    """

    signature: str
    num: Float[np.ndarray, " units"]
    den: Float[np.ndarray, " units"]
    stratum: Int[np.ndarray, " units"]
    right: Bool[np.ndarray, " units"]
    documents: Int[np.ndarray, " documents"]
    unit: Int[np.ndarray, " documents"]
    answers: Int[np.ndarray, " documents"]
    score: float
    logged: int
    empty: int
    accounting: TokenTotals | None
    extras: Mapping[str, float]


class _Document(NamedTuple):
    """One line of the file."""

    doc_id: int
    key: tuple[Any, ...]
    stratum: str
    score: float
    answer: str
    asked: str
    main: bool = True  # not one of MMBench's turned copies
    pope: tuple[str, str] = ("", "")  # the truth, and what was said


def read_samples(path: Path, benchmark: Benchmark) -> Samples:
    """Read one samples file.

    Raises:
        SamplesError: a broken line, a document that is there twice, or an MME image without its two questions.
        OSError: the file cannot be read.
    """
    documents: list[_Document] = []
    accounted: list[TokenAccounting] = []
    for number, line in enumerate(lines(path), 1):
        try:
            said = json.loads(line)
            if not isinstance(said, Mapping):
                raise TypeError(f"a {type(said).__name__}, where an object is expected")
            documents.append(_document(said, benchmark))
            if not 0 <= documents[-1].score <= 1:
                raise ValueError(f"a score of {documents[-1].score:g}, where 0 to 1 is possible")
            if (accounting := sample_accounting(said)) is not None:
                accounted.append(accounting)
        except (*UNREADABLE, StopIteration) as error:
            reason = f"{type(error).__name__}: {error}"
            raise SamplesError(f"{path}, line {number}: no sample of {benchmark.name} ({reason}).") from error
    ids = {one.doc_id for one in documents}
    if len(ids) < len(documents):
        raise SamplesError(
            f"{path}: {len(documents)} lines for {len(ids)} documents; two runs of the same second write into one "
            "file. Give each run an output folder of its own."
        )
    if not documents:
        raise SamplesError(f"{path}: no samples.")
    totals = TokenTotals.of(accounted) if len(accounted) == len(documents) else None
    # As the harness, which scores no turned copy whose own question is not there.
    main = {one.key for one in documents if one.main}
    scored = sorted(one for one in documents if one.key in main)
    return _assemble(path, benchmark, scored, totals, len(documents))


def lines(path: Path) -> Iterator[str]:
    """The lines of a samples file, without empty ones.

    Raises:
        OSError: it is no regular file, or cannot be read.
    """
    with regular(path).open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            if line.strip():
                yield line


def sample_accounting(said: Mapping[str, Any]) -> TokenAccounting | None:
    """The token accounting of one line of a samples file; None if it has none of ours."""
    return TokenAccounting.read((said.get("token_counts") or [None])[0])


def answer_text(said: Mapping[str, Any]) -> str:
    """The answer of one line of a samples file."""
    given = said["filtered_resps"]
    return (given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)).strip()


def _document(said: Mapping[str, Any], benchmark: Benchmark) -> _Document:
    doc_id = int(np.int64(said["doc_id"]))  # a damaged file may have a number of any length
    asked, answer = f"{said['target']}\0{said['input']}", answer_text(said)
    if benchmark.kind == "mme":
        item = next(said[metric] for metric in benchmark.metrics if metric in said)
        key = (str(item["category"]), str(item["question_id"]))
        return _Document(doc_id, key, key[0], float(item["score"]), answer, asked)
    if benchmark.kind == "mmbench":
        item = said["gpt_eval_score"]
        index, value = int(item["index"]), float(chosen(item) == item["answer"])
        return _Document(doc_id, (index % CIRCLE,), "", value, answer, asked, index < CIRCLE)
    if benchmark.kind == "pope":
        item = said["pope_accuracy"]
        pair = (item["ground_truth"], item["prediction"])
        return _Document(doc_id, (doc_id,), "", float(item["score"]), answer, asked, True, pair)
    given = said[benchmark.metrics[0]]
    value = float(given["score"] if isinstance(given, Mapping) else given)
    return _Document(doc_id, (doc_id,), "", value, answer, asked)


def _assemble(
    path: Path, benchmark: Benchmark, documents: Sequence[_Document], totals: TokenTotals | None, logged: int
) -> Samples:
    keys = sorted({one.key for one in documents})
    place = {key: i for i, key in enumerate(keys)}
    unit = np.array([place[one.key] for one in documents], int)
    many = np.bincount(unit, minlength=len(keys))
    total = np.bincount(unit, np.array([one.score for one in documents]), len(keys))
    strata = {name: i for i, name in enumerate(sorted({one.stratum for one in documents}))}
    stratum = np.zeros(len(keys), int)
    stratum[unit] = [strata[one.stratum] for one in documents]
    num, den, right = 100 * total, np.ones(len(keys)), total >= RIGHT
    if benchmark.kind == "mme":
        if (many != 2).any():
            key = keys[int(np.argmax(many != 2))]
            raise SamplesError(f"{path}: MME asks twice about each image, but not about {'/'.join(key)}.")
        right = total == 2
        num = 50 * total + 100 * right
    elif benchmark.kind == "mmbench":
        right = total == many
        num = 100.0 * right
    elif benchmark.kind == "pope":
        num, den = _f1_parts([one.pope for one in documents])
    digest = blake2b(digest_size=12)
    for one in documents:
        # A text may hold half of a surrogate pair, as JSON's \\ud83d.
        digest.update(f"{one.doc_id}\0{one.key}\0{one.asked}\0".encode(errors="surrogatepass"))
    return Samples(
        signature=digest.hexdigest(),
        num=num,
        den=den,
        stratum=stratum,
        right=right,
        documents=np.array([one.doc_id for one in documents], int),
        unit=unit,
        answers=np.array([hash(one.answer) for one in documents], np.int64),
        score=float(ratios(np.bincount(stratum, num), np.bincount(stratum, den)).sum()),
        logged=logged,
        empty=sum(not one.answer for one in documents),
        accounting=totals,
        extras=_pope_extras([one.pope for one in documents]) if benchmark.kind == "pope" else {},
    )


def ratios(num: Float[np.ndarray, "..."], den: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """`num` over `den`; 0 where there is nothing to share, as the harness says of F1."""
    return np.divide(num, den, out=np.zeros(np.broadcast(num, den).shape), where=den > 0)


def _f1_parts(said: Sequence[tuple[str, str]]) -> tuple[Float[np.ndarray, " units"], Float[np.ndarray, " units"]]:
    """Two true positives, and those with the false of both kinds: F1 is the ratio of their sums.

    As the harness counts: an answer that is neither yes nor no is no false negative.
    """
    parts = {("yes", "yes"): (200.0, 2.0), ("no", "yes"): (0.0, 1.0), ("yes", "no"): (0.0, 1.0)}
    table = np.array([parts.get(pair, (0.0, 0.0)) for pair in said])
    return table[:, 0], table[:, 1]


def _pope_extras(said: Sequence[tuple[str, str]]) -> dict[str, float]:
    """In percent; a share of nothing is left out."""
    answered_yes = [truth for truth, answer in said if answer == "yes"]
    positives = [answer for truth, answer in said if truth == "yes" and answer in ("yes", "no")]
    parts = {
        "accuracy": (sum(truth == answer for truth, answer in said), len(said)),
        "precision": (answered_yes.count("yes"), len(answered_yes)),
        "recall": (positives.count("yes"), len(positives)),
        "yes-rate": (len(answered_yes), len(said)),
    }
    return {name: 100 * part / whole for name, (part, whole) in parts.items() if whole}
