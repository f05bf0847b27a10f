"""The budget that a file claims, in a comment that lmms-eval does not read, and what its schedule really leaves."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import Schedule

TOLERANCE = Fraction(5, 100)
"""How far a schedule may be from its claim, as a share of the claim, before the file must say so."""

_LINE = re.compile(r"^\s*#\s*budget:(.*)$", re.MULTILINE)
_CLAIM = re.compile(r"([0-9]+(?:\.[0-9]+)?)(t|%)(?:, really ([0-9]+(?:\.[0-9]+)?)(t|%))?")


class ClaimError(ValueError):
    """A budget's comment that is not understood, or that the schedule contradicts."""


@dataclass(frozen=True)
class Claim:
    """What a file says of its budget.

    Args:
        amount: visual tokens a layer, or percent of them.
        unit: "t" or "%".
        really: what the schedule leaves, in the same unit, to two decimals; None if the file does not say.
    """

    amount: Fraction
    unit: str
    really: Fraction | None = None

    def __str__(self) -> str:
        return self.written(self.amount) + ("" if self.really is None else f", really {self.written(self.really)}")

    def written(self, amount: Fraction) -> str:
        """`amount` as a file writes it, with the claim's unit."""
        return f"{float(amount):.2f}".rstrip("0").rstrip(".") + self.unit

    def hold_against(self, left: Fraction, at_most: bool) -> None:
        """Compare with what the schedule leaves.

        Args:
            left: in the claim's unit.
            at_most: whether the schedule may leave less than that, as only a run tells.

        Raises:
            ClaimError: they do not agree.
        """
        said = self.written(left)
        if self.really is not None and self.written(self.really) != said and not (at_most and self.really < left):
            raise ClaimError(f"budget: it says 'really {self.written(self.really)}', but the schedule leaves {said}.")
        off = left - self.amount
        if self.really is None and abs(off) > TOLERANCE * self.amount and not (at_most and off > 0):
            more = f"{float(off / self.amount):+.1%}, " if self.amount else ""
            raise ClaimError(
                f"budget: it claims {self}, but the schedule leaves {said} ({more}the tolerance is "
                f"{float(TOLERANCE):.0%}). Change the schedule, or say so: '# budget: {self}, really {said}'."
            )


def claims(text: str) -> list[Claim]:
    """The claims of a file's comments ``# budget: 192t`` or ``# budget: 50%, really 49.17%``, in order.

    Raises:
        ClaimError: a comment that begins like one and is none.
    """
    found = []
    for line in _LINE.findall(text):
        read = _CLAIM.fullmatch(line.strip())
        if read is None or (read[4] and read[4] != read[2]):
            raise ClaimError(
                f"'# budget:{line}' is not understood; write '# budget: 192t' or '# budget: 50%, really 49.17%'."
            )
        found.append(Claim(Fraction(read[1]), read[2], Fraction(read[3]) if read[3] else None))
    return found


def left(schedule: Schedule, model: Architecture, unit: str) -> Fraction:
    """The average of visual tokens a layer that a schedule leaves of one image, or in percent.

    Raises:
        ClaimError: tokens, where images differ in size.
    """
    if unit == "t" and model.tokens_per_image is None:
        raise ClaimError(f"budget: images of {model.name} differ in size, so claim a share, such as 50%.")
    tokens = model.example_tokens
    average = schedule.average(model.layers, [tokens])
    return average if unit == "t" else 100 * average / tokens
