"""Measures the information of visual tokens on the documents of lmms-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from lmms_prune.harness.documents import Document
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.answers import Label, extended, find_answer, references
from lmms_prune.information.measure import Unit, measure
from lmms_prune.record.information import InformationError, Store


def measure_documents(
    wrapper: PrunedModel,
    documents: Iterable[Document],
    store: Store,
    layers: Sequence[int],
    block: int,
    done: Callable[[Document], None] = lambda document: None,
    label: Label = "probable",
) -> None:
    """Measure every document that `store` does not contain yet.

    Args:
        wrapper: the unpruned model, which makes prompts and pixels as in an evaluation.
        documents: the documents to measure.
        store: receives the results, document by document.
        layers: the layers at which to measure.
        block: side of a unit, see `measure.units`.
        done: called with each document, also with those that were measured before.
        label: which token stands for the right answer, see `answers`.

    Raises:
        InformationError: a document cannot be measured; the message names it.
    """
    for document in documents:
        if not store.has(document.sample):
            try:
                rows = measure_document(wrapper, document, layers, block, label)
            except InformationError as error:
                raise InformationError(f"task '{document.task}', document {document.number}: {error}") from error
            store.write(document.sample, rows)
        done(document)


def measure_document(
    wrapper: PrunedModel, document: Document, layers: Sequence[int], block: int, label: Label = "probable"
) -> pd.DataFrame:
    """Measure one document; returns its lines in the columns of `Store`."""
    inputs: dict[str, Any] = dict(wrapper.inputs_of(document.messages))
    right = references(document.fields, document.target)
    answer = find_answer(wrapper.model, wrapper.processor.tokenizer, inputs, right, label)
    measured = measure(wrapper.model, extended(inputs, answer.blank), answer.token, layers, block)
    unit_columns = _unit_columns(measured.units)
    fixed = {"sample": document.sample, "task": document.task, "answer": answer.text, "p_full": measured.p_full}
    tables = [
        pd.concat([unit_columns, pd.DataFrame({"p_k": result.p.tolist()})], axis=1).assign(
            **fixed, layer=result.layer, p_text=result.p_text, divergence=result.divergence
        )
        for result in measured.layers
    ]
    order = [*fixed, "layer", "p_text", "divergence", *unit_columns.columns, "p_k"]
    return pd.concat(tables, ignore_index=True)[order]


def _unit_columns(units: Sequence[Unit]) -> pd.DataFrame:
    """The image, first token, row, column and number of tokens of each unit, one line per unit."""
    lines = [(unit.image, unit.tokens[0], unit.row, unit.column, len(unit.tokens)) for unit in units]
    return pd.DataFrame(lines, columns=["image", "token", "row", "column", "tokens"])
