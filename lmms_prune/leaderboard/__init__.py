"""Results of lmms-eval read back: tables with statistics, marks of what is not comparable, and a gate for CI. No torch.

The package is callable, because Python gives the name `lmms_prune.leaderboard` to it as soon as anything in it is imported:
``leaderboard(paths)`` is `lmms_prune.leaderboard.frame.leaderboard`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class CallablePackage(ModuleType):
    """This package, which answers a call as the function `lmms_prune.leaderboard.frame.leaderboard`."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from lmms_prune.leaderboard.frame import leaderboard

        return leaderboard(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        from inspect import signature

        from lmms_prune.leaderboard.frame import leaderboard

        return signature(leaderboard)


sys.modules[__name__].__class__ = CallablePackage
