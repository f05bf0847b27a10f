"""VFlowOpt's search: tunes its options and keeps so that the decoder's last state changes least.

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

from lmms_prune.calibration.data import SearchError
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.layout import Layout
from lmms_prune.schedule import PromptSizes, Schedule, Stage

if TYPE_CHECKING:
    import optuna

RANDOM_TRIALS = 27
_HIGHEST_T = 50.0  # the published presets lie between 28 and 40
_FINE = 10_000  # ratios have four decimals


@dataclass(frozen=True)
class FoundOptions:
    """The result of VFlowOpt's search.

    Args:
        schedule: the best schedule.
        similarity: its cosine between pruned and unpruned last states, averaged over the prompts.
        start: the same for the best random trial.
    """

    schedule: Schedule
    similarity: float
    start: float


@dataclass(frozen=True)
class Space:
    """The schedules to search among. All of them meet the budget, so that no trial is wasted.

    A draw is t, m, and a fraction in [0, 1] for every layer but the last. The fraction chooses between the fewest and the
    most tokens with which the budget can still be met; the last layer's keep is solved from the budget. Keeps are numbers
    of tokens if all images have the same number, else ratios of four decimals.

    Args:
        layers: the layers at which vflowopt acts, starting with 0.
        depth: decoder layers of the model.
        budget: the share of the tokens to keep, averaged over the decoder's layers.
        fixed: visual tokens of every image; None if images differ in size.
        widest: the largest m, in tokens: the whole image is one cell.
    """

    layers: tuple[int, ...]
    depth: int
    budget: Fraction
    fixed: int | None
    widest: int

    def schedule(self, t: float, m: float, fractions: Sequence[float]) -> Schedule:
        """The schedule of a draw. Its average is at most the budget, and less than one token (or 0.0001) below it."""
        unit = self.fixed or _FINE
        stages, keep, total = [], unit, self.budget * unit * self.depth
        # All sums are over layers: `remaining` is what the layers from here on may hold together.
        remaining = total
        for layer, after, fraction in zip(self.layers[:-1], self.layers[1:], fractions, strict=True):
            high = floor(min(Fraction(keep), remaining / (after - layer)))
            # No whole number may lie between the fewest and the most; then part of a token is lost to rounding.
            low = min(high, ceil(remaining / (self.depth - layer)))
            keep = low + round(fraction * (high - low))
            remaining -= keep * (after - layer)
            stages.append(self._stage(layer, keep if self.fixed else Decimal(keep) / _FINE, t, m))
        stages.append(self._stage(self.layers[-1], None, t, m))
        # Later layers cannot hold more than this stage kept, so the budget may not be fully spent.
        reached = total - max(Fraction(0), remaining - keep * (self.depth - self.layers[-1]))
        budget = f"{reached / self.depth}t" if self.fixed else str(reached / self.depth / unit)
        return Schedule(tuple(stages)).solve(budget, PromptSizes(self.depth, self.fixed))

    @staticmethod
    def _stage(layer: int, keep: Decimal | int | None, t: float, m: float) -> Stage:
        # Cells are merged only before the decoder, so later stages have no m.
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
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> FoundOptions:
    """Find the schedule with the highest cosine between pruned and unpruned last states, summed over the prompts.

    A Gaussian process tunes it after a random start. The state is that of the last token after the last decoder layer,
    before the final norm. The paper does not state the ranges; chosen here: t up to 50, m up to an image's longer side,
    alpha 0 as in all presets.

    Args:
        model: a loaded checkpoint.
        prompts: model inputs, one row each.
        budget: average visual tokens per layer as a share of the original ones.
        layers: layers at which tokens are dropped, in addition to the merging at layer 0.
        trials: number of schedules drawn.
        random_trials: number of random trials at the start.
        seed: seed of all draws.
        report: called with a line for each schedule better than all before.
        counted: called with the number of schedules that were tried, and that will be.

    Raises:
        SearchError: the budget or the layers are not possible, or optuna is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise SearchError("this search needs optuna: pip install 'lmms-prune[calibrate]'.") from error
    if trials < 1:
        raise SearchError(f"--trials {trials} must be at least 1.")
    parts = ModelParts.of(model)
    space = _space(parts, prompts, budget, layers)
    unpruned_states = [_last_state(parts, prompt) for prompt in prompts]
    best = float("-inf")

    def objective(trial: optuna.Trial) -> float:
        nonlocal best
        t, m = round(trial.suggest_float("t", 0, _HIGHEST_T), 3), round(trial.suggest_float("m", 1, space.widest), 3)
        fractions = [trial.suggest_float(f"keep_{layer}", 0, 1) for layer in space.layers[:-1]]
        schedule = space.schedule(t, m, fractions)
        trial.set_user_attr("schedule", str(schedule))
        value = 0.0
        for prompt, unpruned in zip(prompts, unpruned_states, strict=True):
            with prune(model, schedule):
                state = _last_state(parts, prompt)
            value += float(torch.cosine_similarity(state, unpruned, dim=0))
        if value > best:
            best = value
            report(f"trial {trial.number}: cosine {value / len(prompts):.6f} of {schedule}")
        counted(trial.number + 1, trials)
        return value

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=random_trials)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=trials)
    best_random = max(trial.values[0] for trial in study.trials[:random_trials])
    return FoundOptions(
        schedule=Schedule.parse(study.best_trial.user_attrs["schedule"]),
        similarity=study.best_value / len(prompts),
        start=best_random / len(prompts),
    )


def _space(
    parts: ModelParts, prompts: Sequence[Mapping[str, Any]], budget: str | float, layers: Sequence[int]
) -> Space:
    """The search space, from checked options."""
    depth = len(parts.layers)
    try:
        share = Fraction(str(budget).strip())
    except (ValueError, ZeroDivisionError) as error:
        raise SearchError(f"--budget {budget} is not a ratio of the visual tokens; write e.g. 0.25.") from error
    if not 0 < share < 1:
        raise SearchError(f"--budget {budget} must lie between 0 and 1: it is a ratio of the visual tokens.")
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 1 or layers[-1] >= depth:
        listed = ",".join(map(str, layers)) or "(none)"
        raise SearchError(f"--layers {listed} must increase and lie between 1 and {depth - 1}, the model's last.")
    layouts = [Layout.of(parts, dict(prompt), None, None) for prompt in prompts]
    grids = [grid for layout in layouts for grid in layout.divided("rectangle").grids]
    widest = max(max(grid) for grid in grids)
    return Space((0, *layers), depth, share, parts.family.tokens_per_image(parts.config), widest)


@torch.no_grad()
def _last_state(parts: ModelParts, prompt: Mapping[str, Any]) -> Float[Tensor, " D"]:
    """The last token's state after the last layer, in float32 or finer."""
    states: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: Tensor) -> None:
        states.append(output[0, -1])

    with hooked([parts.layers[-1].register_forward_hook(record)]):
        parts.multimodal(**prompt, use_cache=False)
    return states[0].to(torch.promote_types(states[0].dtype, torch.float32))
