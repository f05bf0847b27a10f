"""VFlowOpt's search: its options and keeps, tuned so that the decoder's last state changes least.

Paper: https://arxiv.org/abs/2508.05211. Needs optuna (``pip install 'lmms-prune[calibrate]'``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmms_prune.calibration.data import CalibrationError
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.layout import Layout
from lmms_prune.schedule import PromptSizes, Schedule, Stage

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 27
# The presets published lie between 28 and 40.
_HIGHEST_T = 50.0
_FINE = 10_000


@dataclass(frozen=True)
class FoundOptions:
    """What the search found.

    Args:
        schedule: the best one.
        similarity: its cosine, mean over the prompts.
        start: the same of the best random trial.
    """

    schedule: Schedule
    similarity: float
    start: float


@dataclass(frozen=True)
class Space:
    """Which schedules are tried: none that misses the budget, so that no trial is lost.

    A draw is t, m, and for every layer but the last a place in [0, 1] between the fewest and the most tokens with which
    the budget can still be met; the last layer's keep is solved. Keeps are numbers of tokens where all images have as
    many, else ratios of four decimals.

    Args:
        layers: at which vflowopt acts, 0 first.
        depth: decoder layers of the model.
        budget: the share of the tokens to keep, averaged over the decoder's layers.
        fixed: visual tokens of every image, or None where they differ.
        widest: the largest m, in tokens: an image of one cell.
    """

    layers: tuple[int, ...]
    depth: int
    budget: Fraction
    fixed: int | None
    widest: int

    def schedule(self, t: float, m: float, places: Sequence[float]) -> Schedule:
        """The schedule of a draw; its average is within the budget, and short of it by less than a token (or 0.0001)."""
        unit = self.fixed or _FINE
        stages, keep, total = [], unit, self.budget * unit * self.depth
        left = total
        for layer, after, place in zip(self.layers[:-1], self.layers[1:], places, strict=True):
            high = floor(min(Fraction(keep), left / (after - layer)))
            # Where the fewest are no whole number below the most, a part of a token is given away.
            low = min(high, ceil(left / (self.depth - layer)))
            keep = low + round(place * (high - low))
            left -= keep * (after - layer)
            stages.append(self._stage(layer, keep if self.fixed else Decimal(keep) / _FINE, t, m))
        stages.append(self._stage(self.layers[-1], None, t, m))
        reached = total - max(Fraction(0), left - keep * (self.depth - self.layers[-1]))
        budget = f"{reached / self.depth}t" if self.fixed else str(reached / self.depth / unit)
        return Schedule(tuple(stages)).solve(budget, PromptSizes(self.depth, self.fixed))

    @staticmethod
    def _stage(layer: int, keep: Decimal | int | None, t: float, m: float) -> Stage:
        # Cells are merged before the decoder alone.
        options: tuple[tuple[str, object], ...] = (("t", t), ("m", m)) if layer == 0 else (("t", t),)
        return Stage("vflowopt", layer, keep, options)


def search_vflowopt(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    budget: str | float,
    layers: Sequence[int] = (9, 18),
    trials: int = 327,
    random_trials: int = RANDOM_TRIALS,
    seed: int = 42,
    report: Callable[[str], None] = lambda line: None,
) -> FoundOptions:
    """The schedule with the highest sum, over the prompts, of the cosine between pruned and unpruned last states.

    Tuned by a Gaussian process after a random start. The state is the last token's after the last decoder layer, before
    the final norm. Not published, so chosen here: t up to 50, m up to an image's longer side, alpha 0 as in all presets.

    Args:
        model: a loaded checkpoint.
        prompts: inputs of the model, one row each.
        budget: average visual tokens per layer as a share of the original ones.
        layers: where tokens are dropped, besides the merging at layer 0.
        trials: schedules drawn.
        random_trials: how many of them at random, at the beginning.
        seed: decides all draws.
        report: is told each better schedule.

    Raises:
        CalibrationError: a budget or layers that cannot be, or optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise CalibrationError("this search needs optuna: pip install 'lmms-prune[calibrate]'.") from error
    if trials < 1:
        raise CalibrationError(f"--trials {trials} must be at least 1.")
    parts = ModelParts.of(model)
    space = _space(parts, prompts, budget, layers)
    whole = [_last_state(parts, prompt) for prompt in prompts]
    best = float("-inf")

    def objective(trial: optuna.Trial) -> float:
        nonlocal best
        t, m = round(trial.suggest_float("t", 0, _HIGHEST_T), 3), round(trial.suggest_float("m", 1, space.widest), 3)
        places = [trial.suggest_float(f"keep_{layer}", 0, 1) for layer in space.layers[:-1]]
        schedule = space.schedule(t, m, places)
        trial.set_user_attr("schedule", str(schedule))
        value = 0.0
        for prompt, unpruned in zip(prompts, whole, strict=True):
            with prune(model, schedule):
                state = _last_state(parts, prompt)
            value += float(torch.cosine_similarity(state, unpruned, dim=0))
        if value > best:
            best = value
            report(f"trial {trial.number}: cosine {value / len(prompts):.6f} of {schedule}")
        return value

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=random_trials)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials)
    first = max(trial.values[0] for trial in study.trials[:random_trials])
    return FoundOptions(
        schedule=Schedule.parse(study.best_trial.user_attrs["schedule"]),
        similarity=study.best_value / len(prompts),
        start=first / len(prompts),
    )


def _space(
    parts: ModelParts, prompts: Sequence[Mapping[str, Any]], budget: str | float, layers: Sequence[int]
) -> Space:
    depth = len(parts.layers)
    try:
        share = Fraction(str(budget).strip())
    except (ValueError, ZeroDivisionError) as error:
        raise CalibrationError(f"--budget {budget} is no ratio of the visual tokens; write e.g. 0.25.") from error
    if not 0 < share < 1:
        raise CalibrationError(f"--budget {budget} must lie between 0 and 1: it is a ratio of the visual tokens.")
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 1 or layers[-1] >= depth:
        listed = ",".join(map(str, layers)) or "(none)"
        raise CalibrationError(f"--layers {listed} must increase and lie between 1 and {depth - 1}, the model's last.")
    grids = [grid for prompt in prompts for grid in Layout.of(parts, dict(prompt), None, None).grids]
    widest = max(max(grid) for grid in grids)
    return Space((0, *layers), depth, share, parts.family.tokens_per_image(parts.config), widest)


@torch.no_grad()
def _last_state(parts: ModelParts, prompt: Mapping[str, Any]) -> Float[Tensor, " D"]:
    """The last token's state after the last layer, in float32 or finer."""
    seen: list[Tensor] = []

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        seen.append(output[0, -1])

    with hooked([parts.layers[-1].register_forward_hook(see)]):
        parts.multimodal(**prompt, use_cache=False)
    return seen[0].to(torch.promote_types(seen[0].dtype, torch.float32))
