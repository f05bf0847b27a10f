"""The option that an MMBench answer names, by the rules of lmms-eval's static scoring.

The samples file has MMBench's answers but not their scores, so the rules are implemented here again. A test compares
them with lmms-eval's own on random answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LETTERS = "ABCDE"
_AFFIXES = (
    ("", "."),
    ("", ","),
    ("", ":"),
    ("", ")"),
    ("", ")."),
    ("(", ")"),
    ("(", ")."),
    (":", ""),
    (":", ","),
    (":", "."),
    (":", ")"),
    (":", ")."),
)
_PHRASES = (
    *("the answer is", "answer is", "the correct answer is", "correct answer is", "the best answer is"),
    *("best answer is", "the correct option is", "correct option is", "the best option is", "best option is"),
    *("the choice is", "choice is", "the correct choice is", "correct choice is", "i choose", "i select", "i pick"),
    *("my answer is", "my choice is", "옵션", "정답은", "답은", "답:", "答案是", "答案为", "选", "答えは"),
)


def chosen(item: Mapping[str, Any]) -> str:
    """Return the letter that an answer names; "" if none.

    Args:
        item: one logged ``gpt_eval_score``: the prediction, and the options A to D.
    """
    # An absent option is None or NaN (which is not equal to itself). lmms-eval takes the text "nan" for an option.
    options = {
        letter: item[letter] for letter in "ABCD" if item.get(letter) is not None and item[letter] == item[letter]
    }
    answer = str(item["prediction"])
    return _letter(answer) or _text(answer, options) or _extracted(answer, sorted(options))


def _letter(answer: str) -> str:
    """Return the letter that stands by itself, if there is exactly one."""
    if "Failed to obtain answer via API" in answer:
        return ""
    words = [word.strip() for word in answer.split()]
    alone = [letter for letter in _LETTERS if letter in words]
    # "A" may be an article in a sentence.
    if len(alone) == 1 and not ("A" in words and len(words) > 3):
        return alone[0]
    for before, after in _AFFIXES:
        marked = [letter for letter in _LETTERS if before + letter + after in words]
        if len(marked) == 1:
            return marked[0]
    return ""


def _text(answer: str, options: Mapping[str, Any]) -> str:
    """Return the option whose text the answer contains, if there is exactly one."""
    contained = [letter for letter, text in options.items() if str(text).lower() in answer.lower()]
    return contained[0] if len(contained) == 1 else ""


def _extracted(answer: str, letters: Sequence[str]) -> str:
    """Return the best candidate among letters in any usual form: highest rank of the form, then the last in the text."""
    text = answer.strip()
    for mark in (",", ".", "!", "?", ";", ":", "'", '"'):
        text = text.strip(mark)
    bare = text.strip()
    text = f" {text} "
    candidates: list[tuple[int, int, str]] = []  # rank of the form, index in the text, letter
    for rank, form in ((6, "({})"), (5, "{}."), (4, "{}:"), (3, "{})"), (2, "{} ")):
        candidates += [(rank, text.rfind(form.format(a)), a) for a in letters if form.format(a) in text]
    for phrase in _PHRASES:
        if phrase in text.lower():
            after = text.lower().find(phrase) + len(phrase)
            candidates += [(7, text.find(a, after), a) for a in letters if text.find(a, after) != -1]
    candidates += [(10, 0, a) for a in letters if bare.startswith(a) and not bare[1:2].isalpha()]
    candidates += [(9, len(text) - 1, a) for a in letters if bare.endswith(a) and not bare[-2:-1].isalpha()]
    if not candidates:
        candidates = [(0, text.rfind(a), a) for a in letters if a in text]
    # `max` returns the first of equal candidates, as lmms-eval does.
    return max(candidates, key=lambda candidate: candidate[:2])[2] if candidates and answer.strip() else ""
