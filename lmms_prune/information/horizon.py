"""The information horizon as a number: from which layer on visual tokens are worth nothing, with an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from lmms_prune.leaderboard.samples import Samples
from lmms_prune.leaderboard.statistics import resampled
from lmms_prune.record.information import InformationError

EPSILON = 0.01  # of the unpruned score that may be lost
LITTLE = 0.01  # mean information, as a probability
ETA = 0.003  # VTW's divergence, in nats


@dataclass(frozen=True)
class Horizon:
    """One task's horizon.

    Args:
        task: lmms-eval's name.
        layer: the smallest layer from which on, at it and all deeper ones, removing all visual tokens costs at most
            `epsilon` of the unpruned score and mean information is below LITTLE; the depth where there is none.
        low, high: its 95 % bootstrap interval over the task's units.
        by_accuracy, by_information: the same by one of the two conditions alone.
        by_divergence: VTW's criterion: the first layer with mean KL(withdrawn || unpruned) at or below ETA.
        epsilon: see above.
        units: what was resampled.
        layers: columns layer, score (on removal), full, mean, divergence.
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
        task: its name.
        information: `aggregate.by_sample` of the task's documents, at every layer of `removed`.
        unpruned: the scores of the unpruned model.
        removed: the scores with all visual tokens removed, by layer: all layers of the model.
        epsilon: the relative loss that is allowed.
        resamples: bootstrap resamples.
        seed: of the bootstrap.

    Raises:
        InformationError: the runs answered other documents than were measured.
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
    # Information is resampled together with the scores, as if its mean over each stratum were one more score.
    ones, strata = np.ones(len(unpruned.num)), len(np.unique(unpruned.stratum))
    as_scores = [replace(unpruned, num=means[:, place].copy(), den=ones) for place in range(len(order))]
    many = resampled(
        [unpruned, *(removed[layer] for layer in order), *as_scores], resamples, np.random.default_rng(seed)
    )
    data = np.array([[unpruned.score, *(removed[layer].score for layer in order), *(strata * means.mean(0))]])
    kept, little = zip(*(_met(scores, len(order), strata, epsilon) for scores in (data, many)), strict=True)
    layers = _smallest(kept[1] & little[1], order)
    divergence = table.groupby("layer").divergence.mean()[order].to_numpy()
    said = pd.DataFrame({"layer": order, "score": data[0, 1 : 1 + len(order)], "full": unpruned.score})
    said = said.assign(mean=means.mean(0), divergence=divergence)
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
        layers=said,
    )


def vanishes(layers: pd.DataFrame) -> int:
    """The smallest layer from which on mean information is below LITTLE in every task of `aggregate.by_layer`.

    The layer after the last where there is none.
    """
    table = layers.pivot_table(index="task", columns="layer", values="mean").sort_index(axis=1)
    return int(_smallest((table.abs() < LITTLE).to_numpy(), table.columns.tolist()).max())


def _met(scores: np.ndarray, depth: int, strata: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether the score is kept and information is little (R, L), from columns: unpruned, L removals, L informations."""
    kept = scores[:, 1 : 1 + depth] >= (1 - epsilon) * scores[:, :1] - 1e-9
    return kept, np.abs(scores[:, 1 + depth :] / strata) < LITTLE


def _smallest(met: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """On each line the smallest layer from which on all are met; the layer after the last where the last is not."""
    # From the deepest layer backwards, as long as nothing fails.
    unbroken = np.cumprod(met[:, ::-1], axis=1).sum(1)
    return np.array([*order, order[-1] + 1])[len(order) - unbroken]
