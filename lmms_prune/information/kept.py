"""How much information methods keep: the measured information of the tokens that they select at a layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.harness.documents import Document
from lmms_prune.harness.prompts import question_text
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.canvas import grids_by_image
from lmms_prune.information.layer_sweep import acts_at, single_stage
from lmms_prune.pruning.hooks import prune
from lmms_prune.record.information import Store, token_information
from lmms_prune.schedule import Schedule


@torch.no_grad()
def kept_information(
    wrapper: PrunedModel,
    documents: Iterable[Document],
    store: Store,
    methods: Sequence[str],
    keeps: Sequence[float | str],
    layers: Sequence[int],
    block: int,
) -> pd.DataFrame:
    """The sum of information over the tokens that each method keeps when it is the only stage.

    Args:
        wrapper: the model, unpruned.
        documents: documents that `store` has measurements of.
        store: the measurements.
        methods: names, with options or without (``dart;order=reference``); layers at which a method cannot act are skipped.
        keeps: ratios, or counts such as ``60t``.
        layers: measured layers.
        block: side of a unit, as for `measure.units`.

    Returns:
        columns sample, task, layer, keep, method, kept (tokens), information. There are two references among the methods:
        "mean" (the average information of this many tokens, which random ones have in expectation) and "most" (the best
        possible choice).
    """
    lines: list[dict[str, Any]] = []
    for document in documents:
        rows = store.read([document.sample])
        inputs = dict(wrapper.inputs_of(document.messages))
        images = grids_by_image(wrapper, inputs)
        question = question_text(wrapper.chat(document.messages))
        for layer in layers:
            here = rows[rows.layer == layer]
            maps = [_raster(token_information(here, i, grids, block)) for i, grids in enumerate(images)]
            fixed = {"sample": document.sample, "task": document.task, "layer": layer}
            for keep in keeps:
                counts = Schedule.parse(single_stage("random", layer, keep)).plan([len(values) for values in maps])[0]
                best = sum(float(v.topk(count).values.sum()) for v, count in zip(maps, counts, strict=True))
                mean = sum(float(v.mean()) * count for v, count in zip(maps, counts, strict=True))
                for name, value in (("most", best), ("mean", mean)):
                    line = {"keep": keep, "method": name, "kept": sum(counts), "information": value}
                    lines.append({**fixed, **line})
                for method in methods:
                    if not acts_at(method, layer):
                        continue
                    with prune(
                        wrapper.model,
                        single_stage(method, layer, keep),
                        seed=wrapper.arguments.seed,
                        samples=[document.sample],
                        questions=[question],
                    ) as trace:
                        wrapper.model(**inputs, logits_to_keep=1)
                    masks = trace.rows[0].masks[0]
                    total = sum(float(v[mask.cpu()].sum()) for v, mask in zip(maps, masks, strict=True))
                    count = sum(trace.rows[0].kept[0])
                    lines.append({**fixed, "keep": keep, "method": method, "kept": count, "information": total})
    return pd.DataFrame(lines)


def _raster(grids: Sequence[np.ndarray]) -> Float[Tensor, " n"]:
    """The values of an image's grids, by raster index."""
    return torch.from_numpy(np.concatenate([values.ravel() for values in grids]))
