"""The budget that a file claims in a comment, which lmms-eval ignores, and the budget that its schedule actually keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import Schedule

TOLERANCE = Fraction(5, 100)
"""The largest deviation from the claim, as a share of it, that needs no "really …" in the comment."""

_LINE = re.compile(r"^\s*#\s*budget:(.*)$", re.MULTILINE)
_CLAIM = re.compile(r"([0-9]+(?:\.[0-9]+)?)(t|%)(?:, really ([0-9]+(?:\.[0-9]+)?)(t|%))?")


class ClaimError(ValueError):
    """A budget comment cannot be read, or contradicts the schedule."""


@dataclass(frozen=True)
class Claim:
    """The budget that a file claims.

    Args:
        amount: visual tokens per layer, or percent of them.
        unit: "t" or "%".
        really: the stated actual value, in the same unit, to two decimals; None if the file does not state it.
    """

    amount: Fraction
    unit: str
    really: Fraction | None = None

    def __str__(self) -> str:
        return self.written(self.amount) + ("" if self.really is None else f", really {self.written(self.really)}")

    def written(self, amount: Fraction) -> str:
        """`amount` as text with the claim's unit, such as "49.17%"."""
        return f"{float(amount):.2f}".rstrip("0").rstrip(".") + self.unit

    def check(self, kept: Fraction, at_most: bool) -> None:
        """Compare the claim with the schedule's actual value.

        Args:
            kept: the average that the schedule keeps, in the claim's unit.
            at_most: whether `kept` is only an upper bound; the exact value is then known only after a run.

        Raises:
            ClaimError: they do not agree.
        """
        actual = self.written(kept)
        if self.really is not None and self.written(self.really) != actual and not (at_most and self.really < kept):
            raise ClaimError(f"budget: it says 'really {self.written(self.really)}', but the schedule keeps {actual}.")
        off = kept - self.amount
        if self.really is None and abs(off) > TOLERANCE * self.amount and not (at_most and off > 0):
            deviation = f"{float(off / self.amount):+.1%}, " if self.amount else ""
            raise ClaimError(
                f"budget: it claims {self}, but the schedule keeps {actual} ({deviation}the tolerance is "
                f"{float(TOLERANCE):.0%}). Change the schedule, or state the actual value: '# budget: {self}, really {actual}'."
            )


def claims(text: str) -> list[Claim]:
    """The claims in a file's comments ``# budget: 192t`` or ``# budget: 50%, really 49.17%``, in order.

    Raises:
        ClaimError: a comment starts with ``# budget:`` but cannot be read.
    """
    parsed = []
    for line in _LINE.findall(text):
        match = _CLAIM.fullmatch(line.strip())
        if match is None or (match[4] and match[4] != match[2]):
            raise ClaimError(
                f"'# budget:{line}' is not understood; write '# budget: 192t' or '# budget: 50%, really 49.17%'."
            )
        parsed.append(Claim(Fraction(match[1]), match[2], Fraction(match[3]) if match[3] else None))
    return parsed


def kept_average(schedule: Schedule, model: Architecture, unit: str) -> Fraction:
    """The visual tokens of one image that a schedule keeps, averaged over the layers.

    Args:
        schedule: a schedule without ``?``.
        model: the model's sizes.
        unit: "t" for tokens, "%" for percent of the image's tokens.

    Raises:
        ClaimError: the unit is tokens, but images of the model differ in size.
    """
    if unit == "t" and model.tokens_per_image is None:
        raise ClaimError(f"budget: images of {model.name} differ in size, so claim a share, such as 50%.")
    tokens = model.example_tokens
    average = schedule.avg_visual_tokens(model.layers, [tokens], prompt_sizes(model).tiles(tokens))
    return average if unit == "t" else 100 * average / tokens
