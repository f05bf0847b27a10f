"""The information horizon: the layer from which on visual tokens carry no information, with a bootstrap interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import resampled
from lmms_prune.record.information import InformationError

EPSILON = 0.01  # the share of the unpruned score that may be lost
LITTLE = 0.01  # mean information below this counts as none; a probability
ETA = 0.003  # VTW's threshold of the divergence, in nats


@dataclass(frozen=True)
class Horizon:
    """One task's horizon.

    Args:
        task: lmms-eval's name.
        layer: the smallest layer such that at it and at all deeper layers, removing all visual tokens costs at most
            `epsilon` of the unpruned score and mean information is below LITTLE; the model's depth if there is none.
        low, high: the layer's 95 % bootstrap interval over the task's units.
        by_accuracy, by_information: the horizon by only one of the two conditions.
        by_divergence: VTW's criterion: the first layer with mean KL(withdrawn || unpruned) at or below ETA.
        epsilon: the share of the unpruned score that may be lost.
        units: number of units (documents or groups of them) that were resampled.
        layers: columns layer, score (without visual tokens), full (unpruned score), mean (information), divergence.
    """

    task: str
    layer: int
    low: int
    high: int
    by_accuracy: int
    by_information: int
    by_divergence: int
    epsilon: float
    units: int
    layers: pd.DataFrame


def find_horizon(
    task: str,
    information: pd.DataFrame,
    unpruned: Samples,
    removed: Mapping[int, Samples],
    epsilon: float = EPSILON,
    resamples: int = 1000,
    seed: int = 0,
) -> Horizon:
    """The horizon of one task.

    Args:
        task: the task's name.
        information: the output of `aggregate.by_sample` for the task's documents, at every layer of `removed`.
        unpruned: the scores of the unpruned model.
        removed: the scores with all visual tokens removed, for each layer of the model.
        epsilon: the relative loss that is allowed.
        resamples: number of bootstrap resamples.
        seed: the bootstrap's seed.

    Raises:
        InformationError: the evaluated documents are not the measured ones.
    """
    order = sorted(removed)
    numbers = information["sample"].str.rsplit("/", n=1).str[-1].astype(int)
    table = information.assign(document=numbers)
    for samples in (unpruned, *removed.values()):
        if samples.signature != unpruned.signature or set(samples.documents) != set(numbers):
            raise InformationError(f"task '{task}': information and scores are not of the same documents.")
    unit_of = dict(zip(unpruned.documents.tolist(), unpruned.unit.tolist(), strict=True))
    means = (
        table.assign(unit=table.document.map(unit_of))
        .pivot_table(index="unit", columns="layer", values="mean")
        .sort_index()[order]
        .to_numpy()
    )
    # Information must be resampled together with the scores, so it enters as further scores. A score sums the means of
    # its strata: hence the factor `strata` in `data`, which `_conditions` divides out.
    ones, strata = np.ones(len(unpruned.num)), len(np.unique(unpruned.stratum))
    as_scores = [replace(unpruned, num=means[:, column].copy(), den=ones) for column in range(len(order))]
    draws = resampled(
        [unpruned, *(removed[layer] for layer in order), *as_scores], resamples, np.random.default_rng(seed)
    )
    data = np.array([[unpruned.score, *(removed[layer].score for layer in order), *(strata * means.mean(0))]])
    # Index 0: the documents themselves; index 1: the resamples.
    kept, little = zip(*(_conditions(scores, len(order), strata, epsilon) for scores in (data, draws)), strict=True)
    layers = _smallest(kept[1] & little[1], order)
    divergence = table.groupby("layer").divergence.mean()[order].to_numpy()
    curves = pd.DataFrame({"layer": order, "score": data[0, 1 : 1 + len(order)], "full": unpruned.score})
    curves = curves.assign(mean=means.mean(0), divergence=divergence)
    near = np.flatnonzero(divergence <= ETA)
    low, high = np.percentile(layers, [2.5, 97.5], method="nearest")
    return Horizon(
        task=task,
        layer=int(_smallest(kept[0] & little[0], order)[0]),
        low=int(low),
        high=int(high),
        by_accuracy=int(_smallest(kept[0], order)[0]),
        by_information=int(_smallest(little[0], order)[0]),
        by_divergence=order[near[0]] if len(near) else order[-1] + 1,
        epsilon=epsilon,
        units=len(unpruned.num),
        layers=curves,
    )


def vanishes(layers: pd.DataFrame) -> int:
    """The smallest layer from which on mean information is below LITTLE in every task.

    Args:
        layers: the output of `aggregate.by_layer`.

    Returns:
        the layer; the number of layers if there is none.
    """
    table = layers.pivot_table(index="task", columns="layer", values="mean").sort_index(axis=1)
    return int(_smallest((table.abs() < LITTLE).to_numpy(), table.columns.tolist()).max())


def _conditions(scores: np.ndarray, depth: int, strata: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the score is kept, and whether information is little: two boolean arrays (R, L).

    The columns of `scores`: the unpruned score, L scores without visual tokens, L means of information.
    """
    kept = scores[:, 1 : 1 + depth] >= (1 - epsilon) * scores[:, :1] - 1e-9
    return kept, np.abs(scores[:, 1 + depth :] / strata) < LITTLE


def _smallest(met: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """For each line, the smallest layer from which on all layers are met; the layer after the last if the last is not."""
    # Counts the met layers from the deepest one backwards, up to the first that fails.
    unbroken = np.cumprod(met[:, ::-1], axis=1).sum(1)
    return np.array([*order, order[-1] + 1])[len(order) - unbroken]
