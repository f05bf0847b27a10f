"""The parts of a picture that attention supervision points to: where an answer can be read, and what a question names."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_prune.demo.content import COLOURS, KINDS, Scene
from lmms_prune.demo.pictures import Mark, Picture
from lmms_prune.demo.questions import CHINESE


def named_marks(picture: Picture, question: str, part: tuple[str, str]) -> dict[str, list[Mark]]:
    """The words of a question that name marks of a picture, in English, each with these marks.

    Args:
        picture: the picture that the question is about.
        question: the question without options and instructions.
        part: the entry and the column of a page that contain the answer; empty if the question is not about one entry.
    """
    marks_of: dict[str, list[Mark]] = {}
    if isinstance(picture.content, Scene):
        for name in (*COLOURS, *KINDS):
            if name in question or CHINESE[name] in question:
                marks_of[name] = [mark for mark in picture.marks if name in (mark.colour, mark.kind)]
        return marks_of
    entry, column = part
    if entry:
        marks_of[entry] = [mark for mark in picture.marks if mark.entry == entry]
    if column:
        marks_of[column] = [mark for mark in picture.marks if mark.column == column]
    return marks_of


def answer_marks(picture: Picture, question: str, part: tuple[str, str], answer: Sequence[str]) -> list[list[Mark]]:
    """For each token of an answer, the marks from which it can be read; an empty list if there are none.

    Args:
        picture, question, part: as for `named_marks`.
        answer: the answer's tokens, as texts. Written text is spelled, so each token has at most one letter.
    """
    if isinstance(picture.content, Scene):
        names = named_marks(picture, question, part)
        # A question that names no shape, such as one for their number, is about all of them.
        shapes = [mark for marks in names.values() for mark in marks] if names else list(picture.marks)
        return [shapes] * len(answer)
    letters = [mark for mark in picture.marks if mark.letter and (not any(part) or (mark.entry, mark.column) == part)]
    if "".join(mark.letter for mark in letters) == "".join(answer).replace(" ", ""):
        remaining = iter(letters)
        return [[next(remaining)] if token.strip() else [] for token in answer]
    board = [mark for mark in picture.marks if mark.colour]
    return [board if question.startswith("What colour") else letters] * len(answer)
