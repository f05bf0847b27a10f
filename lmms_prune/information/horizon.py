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
            `epsilon` of the unpruned score and mean information is below LITTLE; the model's depth if there is none. Without
            information, only the first condition counts.
        low, high: the layer's 95 % bootstrap interval over the task's units.
        by_accuracy, by_information: the horizon by only one of the two conditions.
        by_divergence: VTW's criterion: the first layer with mean KL(withdrawn || unpruned) at or below ETA.
        epsilon: the share of the unpruned score that may be lost.
        units: number of units (documents or groups of them) that were resampled.
        measured: number of documents with measured information.
        layers: columns layer, score (without visual tokens), full (unpruned score), score_low and score_high (the score's
            95 % interval), and with information also mean and divergence.
    """

    task: str
    layer: int
    low: int
    high: int
    by_accuracy: int
    by_information: int | None
    by_divergence: int | None
    epsilon: float
    units: int
    measured: int
    layers: pd.DataFrame


def find_horizon(
    task: str,
    information: pd.DataFrame | None,
    unpruned: Samples,
    removed: Mapping[int, Samples],
    epsilon: float = EPSILON,
    resamples: int = 1000,
    seed: int = 0,
    partial: bool = False,
) -> Horizon:
    """The horizon of one task.

    Args:
        task: the task's name.
        information: the output of `aggregate.by_sample` for the task's documents, at every layer of `removed`; None to
            find the horizon by scores alone.
        unpruned: the scores of the unpruned model.
        removed: the scores with all visual tokens removed, for each layer of the model.
        epsilon: the relative loss that is allowed.
        resamples: number of bootstrap resamples.
        seed: the bootstrap's seed.
        partial: whether `information` may be of fewer documents than the scores. Its documents are then resampled by
            themselves.

    Raises:
        InformationError: the evaluated documents are not the measured ones.
    """
    order = sorted(removed)
    for samples in removed.values():
        if samples.signature != unpruned.signature or set(samples.documents) != set(unpruned.documents):
            raise InformationError(f"task '{task}': information and scores are not of the same documents.")
    curves = pd.DataFrame({"layer": order, "score": [removed[n].score for n in order], "full": unpruned.score})
    means = by_divergence = None
    if information is not None:
        table = _with_units(task, information, unpruned, partial)
        means = table.pivot_table(index="unit", columns="layer", values="mean").sort_index()[order].to_numpy()
        divergence = table.groupby("layer").divergence.mean()[order].to_numpy()
        curves = curves.assign(mean=means.mean(0), divergence=divergence)
        by_divergence = next((order[n] for n in np.flatnonzero(divergence <= ETA)), order[-1] + 1)
    strata, rng = len(np.unique(unpruned.stratum)), np.random.default_rng(seed)
    runs = [unpruned, *(removed[layer] for layer in order)]
    values = np.array([[run.score for run in runs]])
    if means is not None:
        values = np.concatenate([values, strata * means.mean(0)[None]], axis=1)
    draws = _draws(runs, means, strata, resamples, rng)
    spread = np.nanpercentile(draws[:, 1 : 1 + len(order)], [2.5, 97.5], axis=0)
    curves.insert(3, "score_low", spread[0])
    curves.insert(4, "score_high", spread[1])
    # Index 0: the documents themselves; index 1: the resamples.
    kept, little = zip(*(_conditions(scores, len(order), strata, epsilon) for scores in (values, draws)), strict=True)
    low, high = np.percentile(_smallest(kept[1] & little[1], order), [2.5, 97.5], method="nearest")
    return Horizon(
        task=task,
        layer=int(_smallest(kept[0] & little[0], order)[0]),
        low=int(low),
        high=int(high),
        by_accuracy=int(_smallest(kept[0], order)[0]),
        by_information=None if information is None else int(_smallest(little[0], order)[0]),
        by_divergence=by_divergence,
        epsilon=epsilon,
        units=len(unpruned.num),
        measured=0 if information is None else information["sample"].nunique(),
        layers=curves,
    )


def _draws(
    runs: Sequence[Samples], means: np.ndarray | None, strata: int, resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Resampled scores of the runs, followed by those of mean information at each layer: the columns of `_conditions`.

    Args:
        runs: the unpruned scores, then those without visual tokens at each layer.
        means: mean information of each measured unit at each layer; None without information.
        strata: the number of strata of the scores.
        resamples, rng: number of resamples, and what draws them.
    """
    if means is None:
        return resampled(runs, resamples, rng)
    unpruned = runs[0]
    if len(means) == len(unpruned.num):
        # Information must be resampled together with the scores, so it enters as further scores. A score sums the means
        # of its strata: hence the factor `strata`, which `_conditions` divides out.
        ones = np.ones(len(unpruned.num))
        columns = [replace(unpruned, num=means[:, column].copy(), den=ones) for column in range(means.shape[1])]
        return resampled([*runs, *columns], resamples, rng)
    draws = resampled(runs, resamples, rng)
    picks = rng.integers(0, len(means), size=(resamples, len(means)))
    return np.concatenate([draws, strata * np.stack([means[units].mean(0) for units in picks])], axis=1)


def score_horizons(
    unpruned: Samples,
    removed: Mapping[int, Samples],
    epsilon: float = EPSILON,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[int, np.ndarray]:
    """The horizon by scores alone, on the documents themselves and on each resample, for comparisons of tasks.

    Args:
        unpruned, removed, epsilon, resamples, seed: as for `find_horizon`.
    """
    order = sorted(removed)
    runs, strata = [unpruned, *(removed[layer] for layer in order)], len(np.unique(unpruned.stratum))
    draws = resampled(runs, resamples, np.random.default_rng(seed))
    scores = np.array([[run.score for run in runs]])
    own, drawn = (_smallest(_conditions(table, len(order), strata, epsilon)[0], order) for table in (scores, draws))
    return int(own[0]), drawn


def _with_units(task: str, information: pd.DataFrame, unpruned: Samples, partial: bool) -> pd.DataFrame:
    """The information with the unit of each document.

    Raises:
        InformationError: as for `find_horizon`.
    """
    numbers = information["sample"].str.rsplit("/", n=1).str[-1].astype(int)
    unit_of = dict(zip(unpruned.documents.tolist(), unpruned.unit.tolist(), strict=True))
    measured = set(numbers)
    if not measured or not (measured <= set(unit_of) if partial else measured == set(unit_of)):
        raise InformationError(f"task '{task}': information and scores are not of the same documents.")
    return information.assign(unit=numbers.map(unit_of))


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

    The columns of `scores`: the unpruned score, L scores without visual tokens, L means of information. Without the latter,
    information counts as little everywhere.
    """
    kept = scores[:, 1 : 1 + depth] >= (1 - epsilon) * scores[:, :1] - 1e-9
    means = scores[:, 1 + depth :]
    return kept, np.abs(means / strata) < LITTLE if means.shape[1] else np.ones_like(kept)


def _smallest(met: np.ndarray, order: Sequence[int]) -> np.ndarray:
    """For each line, the smallest layer from which on all layers are met; the layer after the last if the last is not."""
    # Counts the met layers from the deepest one backwards, up to the first that fails.
    unbroken = np.cumprod(met[:, ::-1], axis=1).sum(1)
    return np.array([*order, order[-1] + 1])[len(order) - unbroken]
