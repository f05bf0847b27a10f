"""Schedules: which method acts at which decoder layer and how many visual tokens it keeps. Free of torch."""

from lmms_prune.schedule.presets import PRESETS
from lmms_prune.schedule.schedule import Schedule, cannot_be_met
from lmms_prune.schedule.stage import OWN, Keep, Stage, share

__all__ = ["OWN", "PRESETS", "Keep", "Schedule", "Stage", "cannot_be_met", "share"]
