"""Scores of documents for which lmms-eval logs the answer alone: boxes of RefCOCO, and MMMU's answers.

Tests compare both with lmms-eval's own functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

BOX_IOU = 0.5
"""Intersection over union from which a box counts as right: RefCOCO's ACC@0.5."""


def box_is_right(item: Mapping[str, Any]) -> bool:
    """Tell whether the predicted box overlaps the right one enough; boxes are (left, top, right, bottom)."""
    truth, predicted = ([float(side) for side in item[name]] for name in ("bbox", "pred"))
    width = max(0.0, min(truth[2], predicted[2]) - max(truth[0], predicted[0]))
    height = max(0.0, min(truth[3], predicted[3]) - max(truth[1], predicted[1]))
    union = _area(truth) + _area(predicted) - width * height
    return width * height / union >= BOX_IOU


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def mmmu_is_right(item: Mapping[str, Any]) -> bool:
    """Tell whether one of the parsed answers is right: the same option, or for an open question one that contains it."""
    if item["question_type"] == "multiple-choice":
        answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
        return any(answer in answers for answer in item["parsed_pred"])
    answers = item["answer"] if isinstance(item["answer"], list) else [item["answer"]]
    wanted = [form for answer in answers for form in _forms(str(answer))]
    return any(_contains(answer, wanted) for parsed in item["parsed_pred"] for answer in parsed)


def _contains(answer: Any, wanted: Sequence[str | float]) -> bool:
    if isinstance(answer, str):
        return any(isinstance(form, str) and form in answer for form in wanted)
    return answer in wanted


def _forms(text: str) -> list[str | float]:
    """Return an answer as MMMU compares it: a number of two decimals, else lower case; one letter only beside a space."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]
