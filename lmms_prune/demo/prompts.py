"""Words questions as lmms-eval's tasks do, for training. A test compares them with the tasks."""

from __future__ import annotations

from collections.abc import Sequence

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CHINESE_LETTER = "请直接使用所提供的选项字母作为答案回答。"


def short(question: str) -> str:
    """The wording of MME (without its "Please answer yes or no."), POPE, GQA, DocVQA and InfographicVQA."""
    return question + SHORT


def textvqa(question: str) -> str:
    """The wording of TextVQA, which lower-cases all but the first letter."""
    return question.capitalize() + SHORT


def scienceqa(question: str, options: Sequence[str], hint: str) -> str:
    """The wording of ScienceQA."""
    context = f"Context: {hint}\n" if hint else ""
    return f"{context}{question}\n{_listed(options)}\n{LETTER}"


def mmbench(question: str, options: Sequence[str], hint: str, *, chinese: bool = False) -> str:
    """The wording of MMBench; the Chinese task introduces its options in English too."""
    hinted = f"{hint} {question}" if hint else question
    return f"{hinted} There are several options:\n{_listed(options)}\n\n{CHINESE_LETTER if chinese else LETTER}"


def _listed(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip("ABCDE", options, strict=False))
