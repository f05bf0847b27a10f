"""Measure the information of visual tokens on the documents of lmms-eval's tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd

from lmms_prune.harness.documents import Document
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.answers import extended, find_answer, references
from lmms_prune.information.measure import Unit, measure
from lmms_prune.record.information import InformationError, Store


def measure_documents(
    wrapper: PrunedModel,
    documents: Iterable[Document],
    store: Store,
    layers: Sequence[int],
    block: int,
    done: Callable[[Document], None] = lambda document: None,
) -> None:
    """Measure every document that `store` does not have yet.

    Args:
        wrapper: the model, unpruned, with the prompts and pixels of an evaluation.
        documents: what to measure.
        store: where the results go, document by document.
        layers: at which to measure.
        block: side of a unit, see `measure.units`.
        done: is told each document, also those that were measured before.

    Raises:
        InformationError: a document that cannot be measured; names it.
    """
    for document in documents:
        if not store.has(document.sample):
            try:
                rows = measure_document(wrapper, document, layers, block)
            except InformationError as error:
                raise InformationError(f"task '{document.task}', document {document.number}: {error}") from error
            store.write(document.sample, rows)
        done(document)


def measure_document(wrapper: PrunedModel, document: Document, layers: Sequence[int], block: int) -> pd.DataFrame:
    """One document's lines, in the columns of `store`."""
    inputs: dict[str, Any] = dict(wrapper.inputs_of(document.messages))
    right = references(document.fields, document.target)
    answer = find_answer(wrapper.model, wrapper.processor.tokenizer, inputs, right)
    measured = measure(wrapper.model, extended(inputs, answer.blank), answer.token, layers, block)
    places = _unit_columns(measured.units)
    fixed = {"sample": document.sample, "task": document.task, "answer": answer.text, "p_full": measured.p_full}
    found = [
        pd.concat([places, pd.DataFrame({"p_k": one.p.tolist()})], axis=1).assign(
            **fixed, layer=one.layer, p_text=one.p_text, divergence=one.divergence
        )
        for one in measured.layers
    ]
    order = [*fixed, "layer", "p_text", "divergence", *places.columns, "p_k"]
    return pd.concat(found, ignore_index=True)[order]


def _unit_columns(units: Sequence[Unit]) -> pd.DataFrame:
    """Where each unit stands, a line each."""
    lines = [(unit.image, unit.tokens[0], unit.row, unit.column, len(unit.tokens)) for unit in units]
    return pd.DataFrame(lines, columns=["image", "token", "row", "column", "tokens"])
