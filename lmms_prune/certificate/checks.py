"""The checks of one cell. Each is a function that tests one property of a case and measures the deviation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmms_prune.certificate.case import STEPS, Case, off
from lmms_prune.certificate.observe import Observed, Rewritten, bare_loop
from lmms_prune.certificate.prompts import PromptRow

# Tolerance for logits, as a multiple of the unpruned model's rounding noise: the distance between its stepwise, batched
# logits and those of one pass. Rounding depends on dtype, depth and weights, so a fixed limit would not do.
TIMES = 4.0
BARE = 3  # tokens that the hand-written loop generates
# Allowed difference between cosines and sines of the same position, rounded to the dtype.
ROUNDING = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


@dataclass(frozen=True)
class Result:
    """The result of a check of a cell.

    Args:
        check: the name of the check.
        reason: why the check failed; "" if it passed.
        deviation: the largest deviation, in the check's own unit; None if there is nothing to measure.
        skipped: why the check does not apply; "" if it does.
        note: an event to count in the certificate; "" if none.
    """

    check: str
    reason: str = ""
    deviation: float | None = None
    skipped: str = ""
    note: str = ""


Rows = tuple[PromptRow, ...]


def keeps_all(case: Case, rows: Rows, name: str) -> Result:
    """If every stage is a keep-all stage, the logits equal those of the model without hooks, bit for bit."""
    if any(stage.spec.drops_all for stage in case.schedule.stages):
        return Result("keep-all", skipped="a method that drops everything cannot keep it")
    logits, plain = case.kept_all(rows).logits, case.subject.plain(name)
    if torch.equal(logits, plain):
        return Result("keep-all", deviation=0.0)
    deviation = max(off(row_logits, expected) for row_logits, expected in zip(logits, plain, strict=True))
    return Result("keep-all", f"keeping everything changes the logits by {deviation:.1e}", deviation)


def equals_reference(case: Case, rows: Rows, name: str) -> Result:
    """The logits of the prefill and of 16 decode steps equal those of a model that only masks dropped tokens."""
    seen = case.run(rows)
    deviation = max(off(seen.logits[number], case.reference(rows, number).logits) for number in range(len(rows)))
    return _within("reference", deviation, case, "logits are off the masked reference by")


def cache_is_the_trace(case: Case, rows: Rows, name: str) -> Result:
    """Each layer's cache, the trace, the plan and the masks agree on the number of tokens."""
    seen, layers = case.run(rows), len(case.parts.layers)
    longest = [0] * layers
    for number, record in enumerate(seen.trace.rows):
        kept = case.kept_columns(rows, number)
        forgotten = case.forgotten(kept)
        prompt_length = record.text_tokens + record.visual_tokens
        for layer in range(layers):
            reached = [stage for stage in kept if stage <= layer]
            columns = list(kept[max(reached)].columns) if reached else list(range(prompt_length))
            if record.text_tokens + record.visual[layer] != len(columns):
                counts = f"{record.visual[layer]} visual tokens, but {len(columns) - record.text_tokens} are kept"
                return Result("cache", f"row {number}: at layer {layer} the trace has {counts}")
            # A cropped cache misses columns that the layer itself still had.
            remembered = [column for column in columns if column not in forgotten.get(layer, ())]
            longest[layer] = max(longest[layer], len(remembered))
        if not case.schedule.at_most and record.kept != case.schedule.plan(record.images, record.tiles):
            return Result(
                "cache", f"row {number} keeps {record.kept}, planned: {case.schedule.plan(record.images, record.tiles)}"
            )
        if record.cached != seen.cached:
            return Result(
                "cache", f"row {number}: the trace has {record.cached} cached tokens, the cache {seen.cached}"
            )
    if seen.cached != longest:
        return Result("cache", f"the cache holds {seen.cached} tokens, but {longest} are kept")
    return Result("cache", deviation=0.0)


def positions_continue(case: Case, rows: Rows, name: str) -> Result:
    """In every decode step each layer gets the rotary tables of the position after the last one.

    For a single row this must also hold if the caller passes no positions, so that they come from the cache.
    """
    seen = case.run(rows)
    if len(seen.tables) != STEPS + 1 or any(len(step) != len(case.parts.layers) for step in seen.tables):
        runs = sorted({len(step) for step in seen.tables})
        return Result(
            "positions",
            f"{len(seen.tables)} forwards of {runs} layers; expected {STEPS + 1} of {len(case.parts.layers)}",
        )

    def table_deviation(number: int) -> float:
        reference = case.reference(rows, number)
        worst = 0.0
        for step in range(1, STEPS + 1):
            for received, expected in zip(seen.tables[step], reference.tables, strict=True):
                # Step 1 reads the first generated token: the reference has S = STEPS + 1 of them after the prompt.
                column = expected[0].shape[-2] - (STEPS + 1) + step - 1
                for table, reference_table in zip(received, expected, strict=True):
                    difference = _entry(table, number, -1) - _entry(reference_table, 0, column)
                    worst = max(worst, float(difference.abs().max()))
        return worst

    deviation, limit = max(table_deviation(number) for number in range(len(rows))), ROUNDING[case.subject.dtype]
    if deviation > limit:
        return Result("positions", f"rotary tables of decode steps are off by {deviation:.1e}", deviation)
    if len(rows) > 1:
        return Result("positions", deviation=deviation)
    logits = bare_loop(case.subject.model, rows[0], case.schedule, case.positions, BARE)
    loop_deviation = off(logits, seen.logits[0, :BARE])
    loop_result = _within("positions", loop_deviation, case, "if only the cache is passed on, the logits are off by")
    return Result("positions", loop_result.reason, deviation)


def order_is_kept(case: Case, rows: Rows, name: str) -> Result:
    """After a stage, its layer gets exactly the kept states, in sequence order or in the order of a method that merges."""
    seen = case.run(rows)
    for number, record in enumerate(seen.trace.rows):
        before = list(range(record.text_tokens + record.visual_tokens))
        for layer, kept in case.kept_columns(rows, number).items():
            entering = dict(zip(before, seen.entering[layer][number, -len(before) :], strict=True))
            expected = [kept.written.get(column, entering.get(column)) for column in kept.columns]
            if any(state is None for state in expected):
                return Result("order", f"row {number}: layer {layer} keeps a token that was dropped before")
            states = torch.stack([state for state in expected if state is not None]).to(seen.received[layer].dtype)
            if not torch.equal(seen.received[layer][number, -len(expected) :], states):
                return Result("order", f"row {number}: layer {layer} receives other states, or another order")
            # Only a method that writes states may also reorder them.
            if not kept.written and list(kept.columns) != [c for c in before if c in set(kept.columns)]:
                return Result("order", f"row {number}: the order changes at layer {layer}")
            before = list(kept.columns)
    return Result("order", deviation=0.0)


def row_equals_batch(case: Case, rows: Rows, name: str) -> Result:
    """A row in a batch keeps the same tokens and has the same logits as alone.

    The first row is compared over all generated tokens, the others over the first few.
    """
    if len(rows) == 1:
        return Result("alone", skipped="a batch of one row")
    together = case.run(rows)
    alone = [case.run((row,)) if number == 0 else case.begun((row,)) for number, row in enumerate(rows)]
    return _same_results("alone", case, [(together, number, single, 0) for number, single in enumerate(alone)])


def permutation_permutes(case: Case, rows: Rows, name: str) -> Result:
    """Rows in another order give the same results in that order."""
    if len(rows) == 1:
        return Result("permuted", skipped="a batch of one row")
    original, permuted = case.run(rows), case.begun((rows[-1], *rows[:-1]))
    order = [len(rows) - 1, *range(len(rows) - 1)]
    pairs = [(original, number, permuted, other_number) for other_number, number in enumerate(order)]
    return _same_results("permuted", case, pairs)


def _same_results(check: str, case: Case, pairs: Sequence[tuple[Observed, int, Observed, int]]) -> Result:
    """Compare rows of two runs: they must keep the same tokens and have the same logits, as far as both runs go.

    In 16-bit dtypes rounding may decide which of two tokens is kept, or into which of two a third is merged. Such rows
    are not compared with each other but counted; each run is still compared with the reference of its own choice.

    Args:
        check: the name of the check.
        case: the case of both runs.
        pairs: a run, the row's request index in it, another run, and the row's request index in that one.
    """
    worst, rounded_differently = 0.0, 0
    for run, number, other, other_number in pairs:
        record, other_record = run.trace.rows[number], other.trace.rows[other_number]
        stages = range(len(case.schedule.stages))
        same_kept = [record.indices(i) for i in stages] == [other_record.indices(i) for i in stages]
        exact = case.subject.dtype == "float32"
        written, other_written = _written(run, number), _written(other, other_number)
        if same_kept and (exact or _merged_alike(written, other_written, case.subject.dtype)):
            steps = min(run.logits.shape[1], other.logits.shape[1])
            worst = max(worst, off(run.logits[number, :steps], other.logits[other_number, :steps]))
        elif exact:
            return Result(check, f"row {number} keeps other tokens")
        else:
            rounded_differently += 1
    note = "rows choose otherwise by rounding" if rounded_differently else ""
    return _within(check, worst, case, "the logits of a row differ by", note)


def _written(seen: Observed, number: int) -> list[Rewritten]:
    """Return the states that methods wrote into one row's images, by stage and image."""
    rewrites = [rewritten for layer in sorted(seen.rewritten) for rewritten in seen.rewritten[layer]]
    return [rewritten for rewritten in rewrites if rewritten is not None and rewritten.row == number]


def _merged_alike(rewrites: Sequence[Rewritten], others: Sequence[Rewritten], dtype: str) -> bool:
    """Return whether two runs wrote the same states except for rounding, so that they merged the same tokens."""
    for rewritten, other in zip(rewrites, others, strict=True):
        if rewritten.index != other.index:
            return False
        distance = (rewritten.states.float() - other.states.float()).norm(dim=1)
        if bool((distance > TIMES * ROUNDING[dtype] * other.states.float().norm(dim=1)).any()):
            return False
    return True


def really_pruned(case: Case, rows: Rows, name: str) -> Result:
    """From the first stage's layer on, the sequences that layers receive are actually shorter."""
    seen = case.run(rows)
    if any(record.computed != seen.lengths for record in seen.trace.rows):
        traced = seen.trace.rows[0].computed
        return Result("pruned", f"layers receive {seen.lengths} tokens, but the trace has {traced}")
    unpruned, first = seen.tables[0][0][0].shape[-2], case.schedule.stages[0].layer
    longest = max(row.text_tokens + row.visual_tokens for row in seen.trace.rows)
    if seen.lengths[:first] != [longest] * first or any(length >= longest for length in seen.lengths[first:]):
        return Result("pruned", f"of {unpruned} tokens layers receive {seen.lengths}")
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
    """Return one row's entry at one column of a rotary table (…, 1 or B, L, d), in float32."""
    return table[..., row if table.shape[-3] > 1 else 0, column, :].float()


def _within(check: str, deviation: float, case: Case, message: str, note: str = "") -> Result:
    """Return the result of a check of logits; `message` starts the reason if the deviation exceeds the tolerance."""
    limit = TIMES * case.subject.noise
    reason = "" if deviation <= limit else f"{message} {deviation:.1e}, more than {limit:.1e}"
    return Result(check, reason, deviation, note=note)
