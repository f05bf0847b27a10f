"""Schedules: which method acts at which decoder layer and how many visual tokens it keeps. Free of torch."""

from lmms_prune.schedule.budgets import Budget, PromptSizes
from lmms_prune.schedule.presets import PRESETS
from lmms_prune.schedule.schedule import Schedule
from lmms_prune.schedule.stage import ADAPTIVE, Keep, Stage, share

__all__ = ["ADAPTIVE", "PRESETS", "Budget", "Keep", "PromptSizes", "Schedule", "Stage", "share"]
