"""Visual-token pruning for LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL and Qwen3-VL, as a plugin of lmms-eval and as a library.

from lmms_prune import prune

with prune(model, "dart@2:0.44,random@20:0.07", seed=0) as trace:
    model.generate(**inputs)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lmms_prune.errors import ScheduleError
from lmms_prune.schedule import Schedule, Stage
from lmms_prune.schedule.stage import stage

if TYPE_CHECKING:
    from lmms_prune.information.evaluate import evaluate
    from lmms_prune.information.show import show
    from lmms_prune.leaderboard.frame import leaderboard
    from lmms_prune.pruning.hooks import prune
    from lmms_prune.pruning.trace import Trace

__version__ = "0.2.0"
__all__ = ["Schedule", "ScheduleError", "Stage", "Trace", "evaluate", "leaderboard", "prune", "show", "stage"]
# Torch takes seconds to import, and the command line must answer without it. `leaderboard` is the package of that name, which
# is callable.
_LAZY = {
    "Trace": "lmms_prune.pruning.trace",
    "evaluate": "lmms_prune.information.evaluate",
    "prune": "lmms_prune.pruning.hooks",
    "show": "lmms_prune.information.show",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name == "leaderboard":
        return import_module("lmms_prune.leaderboard")
    raise AttributeError(f"module 'lmms_prune' has no attribute '{name}'")
