"""Rows against each other: copies under other names, other documents, and models of other sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from math import lgamma, log

import numpy as np
from jaxtyping import Int

from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.leaderboard.verify.costs import Implied, unlike_sizes
from lmms_prune.leaderboard.verify.evidence import RecordedTask
from lmms_prune.leaderboard.verify.findings import Doubt, NotRecordedError
from lmms_prune.schedule import Schedule

ENOUGH_BITS = 64.0
"""Information of a choice of tokens above which two methods do not make it by chance."""
ENOUGH_ANSWERS = 100
"""Documents above which equal answers of two schedules are worth a remark."""


@dataclass(frozen=True, eq=False)
class TaskDigest:
    """What is compared of one task of a run with other runs.

    Args:
        task: its name.
        asked: the digest of its prompts, data and generation settings.
        documents: numbers of the documents, ascending.
        targets, questions: a hash of each document's target, and of its target with its question.
        answers: a digest of all answers.
        choices: a digest of all token bitmaps; "" if not all are recorded.
        selection: a digest of what the methods computed.
        bits: information of the choices of tokens, in bits, by stage.
    """

    task: str
    asked: str
    documents: Int[np.ndarray, " documents"]
    targets: Int[np.ndarray, " documents"]
    questions: Int[np.ndarray, " documents"]
    answers: str
    choices: str
    selection: str
    bits: tuple[float, ...]


@dataclass
class RunDigest:
    """What is compared of a run with other runs.

    Args:
        name: by which findings name it.
        run: the run.
        schedule: its schedule; None if this version cannot read it.
        tasks: of its tasks with samples.
        implied: what its samples imply of the model's sizes.
    """

    name: str
    run: RunRecord
    schedule: Schedule | None
    tasks: dict[str, TaskDigest] = field(default_factory=dict)
    implied: Implied = field(default_factory=Implied)


def digest_of(task: RecordedTask) -> TaskDigest:
    """Return what is compared of a task's samples."""
    samples = sorted(task.samples, key=lambda sample: sample.document)
    answers, choices, selection = (blake2b(digest_size=16) for _ in range(3))
    bits = np.zeros(0)
    recorded = True
    for sample in samples:
        answers.update(f"{sample.document}\0{sample.logged.get('filtered_resps')}\0".encode(errors="surrogatepass"))
        counted = sample.accounting
        if counted is None or (counted.visual_tokens and not counted.token_bitmaps):
            recorded = False
            continue
        choices.update(f"{sample.document}\0{counted.token_bitmaps}\0".encode())
        selection.update(f"{counted.selection_flops}\0{counted.recycled_visual_tokens}\0".encode())
        chosen = _bits(counted.visual_tokens, counted.kept_visual_tokens)
        bits = chosen if not len(bits) else bits + chosen if len(bits) == len(chosen) else bits
    targets = [str(sample.logged.get("target")) for sample in samples]
    questions = [f"{sample.logged.get('target')}\0{sample.logged.get('input')}" for sample in samples]
    return TaskDigest(
        task.name,
        task.record.asked,
        np.array([sample.document for sample in samples], np.int64),
        _hashes(targets),
        _hashes(questions),
        answers.hexdigest(),
        choices.hexdigest() if recorded and len(bits) else "",
        selection.hexdigest(),
        tuple(bits.tolist()),
    )


def _hashes(texts: Iterable[str]) -> Int[np.ndarray, " texts"]:
    digests = (blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest() for text in texts)
    return np.array([int.from_bytes(digest, "little", signed=True) for digest in digests], np.int64)


def _bits(original: int, kept: Sequence[int]) -> np.ndarray:
    """Return the information of each stage's choice: the logarithm of how many choices there are of so many tokens."""
    present, bits = original, []
    for count in kept:
        count = min(count, present)
        choices = lgamma(present + 1) - lgamma(count + 1) - lgamma(present - count + 1)
        bits.append(choices / log(2))
        present = count
    return np.array(bits)


def copies(runs: Sequence[RunDigest]) -> dict[str, list[tuple[str, Doubt]]]:
    """Find runs that record the same answers, and the same tokens, as another run of the model under another schedule.

    Returns:
        by name of the later run: the task and the doubt.
    """
    doubts: dict[str, list[tuple[str, Doubt]]] = {}
    first: dict[tuple[str, ...], list[RunDigest]] = {}
    for later in runs:
        for task in later.tasks.values():
            earlier = first.setdefault((later.run.model, task.task, task.answers), [])
            reasons = (doubt for other in earlier if (doubt := _copied(later, other, task.task)) is not None)
            doubt = min(reasons, key=lambda doubt: not doubt.contradicted, default=None)
            if doubt is not None:
                doubts.setdefault(later.name, []).append((task.task, doubt))
            earlier.append(later)
    return doubts


def _copied(later: RunDigest, earlier: RunDigest, task: str) -> Doubt | None:
    if later.schedule is None or earlier.schedule is None or later.schedule == earlier.schedule:
        return None
    if later.schedule.keeps_all and earlier.schedule.keeps_all:
        return None
    later_answers, earlier_answers = later.tasks[task], earlier.tasks[task]
    documents = len(later_answers.documents)
    text = f"the same {documents} answers as {earlier.name}"
    if not later_answers.choices or not earlier_answers.choices or later_answers.choices != earlier_answers.choices:
        if documents < ENOUGH_ANSWERS:
            return None
        tokens = (
            "other tokens"
            if later_answers.choices and earlier_answers.choices
            else "tokens that are not recorded by both"
        )
        return Doubt(f"{text}, with {tokens}: that is possible, but nothing recorded shows it", contradicted=False)
    unlike = [
        (a, b, bits)
        for a, b, bits in zip(later.schedule.stages, earlier.schedule.stages, later_answers.bits, strict=False)
        if bits and (a.method, a.layer) != (b.method, b.layer)
    ]
    if not unlike or sum(bits for _, _, bits in unlike) < ENOUGH_BITS:
        return None  # the same method under other options or with another seed, or no choice at all
    plain = not any(stage.options for a, b, _ in unlike for stage in (a, b))
    # With other options, one method may be another one; it then computes something else.
    certain = plain or later_answers.selection == earlier_answers.selection
    return Doubt(f"{text}, from the same kept tokens: a copy under another schedule", contradicted=certain)


def other_documents(runs: Sequence[RunDigest]) -> dict[str, list[tuple[str, Doubt]]]:
    """Find documents whose target, or question, is another one than in the first run that has them.

    Returns:
        by name of the later run: the task and the doubt.
    """
    doubts: dict[str, list[tuple[str, Doubt]]] = {}
    references: dict[tuple[str, ...], dict[int, tuple[int, str]]] = {}
    for run in runs:
        for task in run.tasks.values():
            # Questions are worded by model and task settings; targets are the benchmark's.
            kinds = (("target", task.targets, (task.task,)), ("question", task.questions, _wording(run, task)))
            for kind, hashes, key in kinds:
                known = references.setdefault((kind, *key), {})
                unlike = list(_unlike(task.documents, hashes, known, run.name))
                if unlike:
                    number, other = unlike[0]
                    more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
                    text = f"document {number}{more} has another {kind} than in {other}"
                    doubts.setdefault(run.name, []).append((task.task, Doubt(text, contradicted=True)))
                    break
    return doubts


def _wording(run: RunDigest, task: TaskDigest) -> tuple[str, ...]:
    return (task.task, task.asked, run.run.wrapper)


def _unlike(
    documents: np.ndarray, hashes: np.ndarray, known: dict[int, tuple[int, str]], name: str
) -> Iterator[tuple[int, str]]:
    for number, value in zip(documents.tolist(), hashes.tolist(), strict=True):
        expected, other = known.setdefault(number, (value, name))
        if expected != value:
            yield number, other


def by_model(runs: Sequence[RunDigest]) -> Mapping[tuple[str, ...], list[RunDigest]]:
    """Group runs by checkpoint and dtype."""
    groups: dict[tuple[str, ...], list[RunDigest]] = {}
    for run in runs:
        dtypes = sorted(run.run.facts("dtype"))
        groups.setdefault((run.run.model, *dtypes), []).append(run)
    return groups


def schedule_or_none(task: RecordedTask) -> Schedule | None:
    """Return a task's schedule; None if this version cannot read it."""
    try:
        return task.schedule
    except NotRecordedError:
        return None


def models_of_other_sizes(runs: Sequence[RunDigest]) -> dict[str, list[tuple[str, Doubt]]]:
    """Find runs whose KV bytes and FLOPs are those of another model than most runs of their checkpoint have."""
    return {
        name: [("", Doubt(reason, contradicted=True))]
        for group in by_model(runs).values()
        for name, reason in unlike_sizes({run.name: run.implied for run in group}).items()
    }
