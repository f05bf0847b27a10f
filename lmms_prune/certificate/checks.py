"""The checks of one cell: functions that measure how far a case deviates from what must hold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_prune.certificate.case import STEPS, Case, off
from lmms_prune.certificate.observe import Observed, Rewritten, bare_loop
from lmms_prune.certificate.prompts import PromptRow

# How far logits may be apart, as a multiple of what the unpruned model's own logits are when they are made step by step
# in a batch and at once. That is rounding, which depends on type, depth and weights.
TIMES = 4.0
BARE = 3  # tokens of a hand-written loop
# Cosines and sines that are rounded to the type, of the same position.
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Result:
    """The result of a check of a cell.

    Args:
        check: its name.
        reason: what is wrong; "" if the check passed.
        deviation: the largest deviation, in the check's own unit; None if there is nothing to measure.
        skipped: why the check does not apply; "" if it does.
        note: an event worth counting; "" if none.
    """

    check: str
    reason: str = ""
    deviation: float | None = None
    skipped: str = ""
    note: str = ""


Rows = tuple[PromptRow, ...]


def keeps_all(case: Case, rows: Rows, name: str) -> Result:
    """Where every stage keeps everything, the logits are those of the model without hooks, bit for bit."""
    if any(stage.spec.drops_all for stage in case.schedule.stages):
        return Result("keep-all", skipped="a method that drops everything cannot keep it")
    logits, plain = case.kept_all(rows).logits, case.subject.plain(name)
    if torch.equal(logits, plain):
        return Result("keep-all", deviation=0.0)
    deviation = max(off(mine, other) for mine, other in zip(logits, plain, strict=True))
    return Result("keep-all", f"keeping everything changes the logits by {deviation:.1e}", deviation)


def equals_reference(case: Case, rows: Rows, name: str) -> Result:
    """The logits of the prefill and of 16 decode steps are those of a model that only masks what is dropped."""
    seen = case.run(rows)
    deviation = max(off(seen.logits[number], case.reference(rows, number).logits) for number in range(len(rows)))
    return _within("reference", deviation, case, "logits are off the masked reference by")


def cache_is_the_trace(case: Case, rows: Rows, name: str) -> Result:
    """Each layer's cache, the trace and the plan hold the same number of tokens."""
    seen, layers = case.run(rows), len(case.parts.layers)
    longest = [0] * layers
    for number, record in enumerate(seen.trace.rows):
        standing = case.standings(rows, number)
        forgotten = case.forgotten(standing)
        whole = record.text_tokens + record.visual_tokens
        for layer in range(layers):
            reached = [stage for stage in standing if stage <= layer]
            left = list(standing[max(reached)].columns) if reached else list(range(whole))
            if record.text_tokens + record.visual[layer] != len(left):
                said = f"{record.visual[layer]} visual tokens, {len(left) - record.text_tokens} stand there"
                return Result("cache", f"row {number}: at layer {layer} the trace says {said}")
            remembered = [column for column in left if column not in forgotten.get(layer, ())]
            longest[layer] = max(longest[layer], len(remembered))
        if not case.schedule.at_most and record.kept != case.schedule.plan(record.images):
            return Result("cache", f"row {number} keeps {record.kept}, planned: {case.schedule.plan(record.images)}")
        if record.cached != seen.cached:
            return Result("cache", f"row {number}: the trace says {record.cached}, the cache holds {seen.cached}")
    if seen.cached != longest:
        return Result("cache", f"the cache holds {seen.cached}, what is left is {longest}")
    return Result("cache", deviation=0.0)


def positions_continue(case: Case, rows: Rows, name: str) -> Result:
    """In every decode step each layer is given the rotary tables of the position after the last one.

    For a single row also where nobody tells the library positions, so that it takes them from the cache.
    """
    seen = case.run(rows)
    if len(seen.tables) != STEPS + 1 or any(len(step) != len(case.parts.layers) for step in seen.tables):
        runs = sorted({len(step) for step in seen.tables})
        return Result("positions", f"{len(seen.tables)} forwards of {runs} layers, not of {len(case.parts.layers)}")

    def look(number: int) -> float:
        reference = case.reference(rows, number)
        worst = 0.0
        for step in range(1, STEPS + 1):
            for given, expected in zip(seen.tables[step], reference.tables, strict=True):
                at = expected[0].shape[-2] - (STEPS + 1) + step - 1
                for mine, other in zip(given, expected, strict=True):
                    worst = max(worst, float((_entry(mine, number, -1) - _entry(other, 0, at)).abs().max()))
        return worst

    deviation, limit = max(look(number) for number in range(len(rows))), ROUNDING[case.subject.dtype]
    if deviation > limit:
        return Result("positions", f"rotary tables of decode steps are off by {deviation:.1e}", deviation)
    if len(rows) > 1:
        return Result("positions", deviation=deviation)
    logits = bare_loop(case.subject.model, rows[0], case.schedule, case.positions, BARE)
    apart = off(logits, seen.logits[0, :BARE])
    found = _within("positions", apart, case, "where only the cache is handed on, the logits are off by")
    return Result("positions", found.reason, deviation)


def order_is_kept(case: Case, rows: Rows, name: str) -> Result:
    """After a stage a layer gets exactly the states that stay, in their order, or in the order of a method that merges."""
    seen = case.run(rows)
    for number, record in enumerate(seen.trace.rows):
        before = list(range(record.text_tokens + record.visual_tokens))
        for layer, standing in case.standings(rows, number).items():
            entering = dict(zip(before, seen.entering[layer][number, -len(before) :], strict=True))
            wanted = [standing.written.get(column, entering.get(column)) for column in standing.columns]
            if any(state is None for state in wanted):
                return Result("order", f"row {number}: a token at layer {layer} that was gone already")
            states = torch.stack([state for state in wanted if state is not None]).to(seen.standing[layer].dtype)
            if not torch.equal(seen.standing[layer][number, -len(wanted) :], states):
                return Result("order", f"row {number}: other states, or another order, stand at layer {layer}")
            if not standing.written and list(standing.columns) != [c for c in before if c in set(standing.columns)]:
                return Result("order", f"row {number}: the order changes at layer {layer}")
            before = list(standing.columns)
    return Result("order", deviation=0.0)


def row_equals_batch(case: Case, rows: Rows, name: str) -> Result:
    """A row in a batch keeps the tokens and has the logits that it has alone; those of the first row to its end."""
    if len(rows) == 1:
        return Result("alone", skipped="a batch of one row")
    together = case.run(rows)
    alone = [case.run((row,)) if number == 0 else case.begun((row,)) for number, row in enumerate(rows)]
    return _same_answers("alone", case, [(together, number, one, 0) for number, one in enumerate(alone)])


def permutation_permutes(case: Case, rows: Rows, name: str) -> Result:
    """Rows in another order have the same answers in that order."""
    if len(rows) == 1:
        return Result("permuted", skipped="a batch of one row")
    straight, moved = case.run(rows), case.begun((rows[-1], *rows[:-1]))
    order = [len(rows) - 1, *range(len(rows) - 1)]
    return _same_answers("permuted", case, [(straight, number, moved, place) for place, number in enumerate(order)])


def _same_answers(check: str, case: Case, pairs: Sequence[tuple[Observed, int, Observed, int]]) -> Result:
    """Compare rows of two runs: they must keep the same tokens, and have the same logits as far as both go.

    In 16-bit types rounding may decide between two tokens, or which of two a third is merged into; then both runs are
    only held against the reference, each by its own choice, and the case is counted.
    """
    worst, otherwise = 0.0, 0
    for one, number, other, place in pairs:
        mine, theirs = one.trace.rows[number], other.trace.rows[place]
        stages = range(len(case.schedule.stages))
        kept = [mine.indices(i) for i in stages] == [theirs.indices(i) for i in stages]
        exact = case.subject.dtype == "float32"
        if kept and (exact or _merged_alike(_written(one, number), _written(other, place), case.subject.dtype)):
            steps = min(one.logits.shape[1], other.logits.shape[1])
            worst = max(worst, off(one.logits[number, :steps], other.logits[place, :steps]))
        elif exact:
            return Result(check, f"row {number} keeps other tokens")
        else:
            otherwise += 1
    note = "rows choose otherwise by rounding" if otherwise else ""
    return _within(check, worst, case, "the logits of a row differ by", note)


def _written(seen: Observed, number: int) -> list[Rewritten]:
    """Return the states that methods wrote into one row's images, by stage and image."""
    first = sum(len(row.images) for row in seen.trace.rows[:number])
    images = slice(first, first + len(seen.trace.rows[number].images))
    return [one for layer in sorted(seen.rewritten) for one in seen.rewritten[layer][images] if one is not None]


def _merged_alike(mine: Sequence[Rewritten], theirs: Sequence[Rewritten], dtype: str) -> bool:
    """Whether two runs put the same into images' places, but for rounding: then they merged the same tokens."""
    for one, other in zip(mine, theirs, strict=True):
        if one.index != other.index:
            return False
        apart = (one.states.float() - other.states.float()).norm(dim=1)
        if bool((apart > TIMES * ROUNDING[dtype] * other.states.float().norm(dim=1)).any()):
            return False
    return True


def really_pruned(case: Case, rows: Rows, name: str) -> Result:
    """From the first stage's layer on, the sequence that layers receive is actually shorter."""
    seen = case.run(rows)
    if any(record.computed != seen.lengths for record in seen.trace.rows):
        said = seen.trace.rows[0].computed
        return Result("pruned", f"layers are given {seen.lengths} tokens, the trace says {said}")
    whole, first = seen.tables[0][0][0].shape[-2], case.schedule.stages[0].layer
    uncut = max(row.text_tokens + row.visual_tokens for row in seen.trace.rows)
    if seen.lengths[:first] != [uncut] * first or any(length >= uncut for length in seen.lengths[first:]):
        return Result("pruned", f"of {whole} tokens layers are given {seen.lengths}")
    if any(row.images and row.visual[layer] >= row.visual_tokens for row in seen.trace.rows for layer in (first, -1)):
        return Result("pruned", "a row with an image keeps all of its tokens")
    return Result("pruned", deviation=0.0)


CheckFunction = Callable[[Case, Rows, str], Result]
CHECKS: dict[str, CheckFunction] = {
    "keep-all": keeps_all,
    "reference": equals_reference,
    "cache": cache_is_the_trace,
    "positions": positions_continue,
    "order": order_is_kept,
    "alone": row_equals_batch,
    "permuted": permutation_permutes,
    "pruned": really_pruned,
}


def _entry(table: Tensor, row: int, column: int) -> Tensor:
    """One row's entry of a rotary table (…, 1 or B, L, d)."""
    return table[..., row if table.shape[-3] > 1 else 0, column, :].float()


def _within(check: str, deviation: float, case: Case, what: str, note: str = "") -> Result:
    limit = TIMES * case.subject.noise
    wrong = "" if deviation <= limit else f"{what} {deviation:.1e}, more than {limit:.1e}"
    return Result(check, wrong, deviation, note=note)
