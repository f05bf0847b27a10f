"""Where in a picture each token of an answer can be read, and what a question's words name there."""

from __future__ import annotations

from collections.abc import Sequence

from lmms_prune.demo.content import COLOURS, KINDS, Scene
from lmms_prune.demo.pictures import Mark, Picture
from lmms_prune.demo.questions import CHINESE


def named(picture: Picture, question: str, part: tuple[str, str]) -> dict[str, list[Mark]]:
    """The words of a question, in English, that name some of a picture's marks.

    Args:
        picture: what is asked about.
        question: the bare question, without options and instructions.
        part: the entry and the column of a page that hold the answer; empty if the question is not about one entry.
    """
    found: dict[str, list[Mark]] = {}
    if isinstance(picture.content, Scene):
        for name in (*COLOURS, *KINDS):
            if name in question or CHINESE[name] in question:
                found[name] = [mark for mark in picture.marks if name in (mark.colour, mark.kind)]
        return found
    entry, column = part
    if entry:
        found[entry] = [mark for mark in picture.marks if mark.entry == entry]
    if column:
        found[column] = [mark for mark in picture.marks if mark.column == column]
    return found


def grounds(picture: Picture, question: str, part: tuple[str, str], answer: Sequence[str]) -> list[list[Mark]]:
    """For each token of an answer, given as texts, the marks that tell it; an empty list where none does.

    Args:
        picture, question, part: as `named`.
        answer: the answer's tokens. Written text is spelled, so that each token has one letter at most.
    """
    if isinstance(picture.content, Scene):
        names = named(picture, question, part)
        told = [mark for marks in names.values() for mark in marks] if names else list(picture.marks)
        return [told] * len(answer)
    letters = [mark for mark in picture.marks if mark.letter and (not any(part) or (mark.entry, mark.column) == part)]
    if "".join(mark.letter for mark in letters) == "".join(answer).replace(" ", ""):
        left = iter(letters)
        return [[next(left)] if token.strip() else [] for token in answer]
    board = [mark for mark in picture.marks if mark.colour]
    return [board if question.startswith("What colour") else letters] * len(answer)
