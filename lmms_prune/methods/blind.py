"""Blind: the decoder sees no image at all."""

from __future__ import annotations

from lmms_prune.methods.vtw import VTW


class Blind(VTW):
    """Drops every visual token before the decoder, which shows the score of a benchmark's text alone.

    The prompt is otherwise the same, placeholder positions included under ``positions=original``.

    Paper: https://arxiv.org/abs/2405.05803 (withdrawal at layer 0).
    Differs from the paper: none known; no paper prunes this way, it is the lower bound of every comparison.
    """
