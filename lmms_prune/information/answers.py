"""Finds the first token of the right answer, for any task: one rule chooses the reference, one the spelling.

*References.* If a document has a list of `answers` (TextVQA, DocVQA, InfographicVQA), these are its references. Otherwise
the references are the task's target: yes or no (MME, POPE), an option's letter (ScienceQA, MMBench), a word (GQA) or a
list (OCRBench). Of several references, the one that agrees with most others is used; of equal ones, the first. For
TextVQA's ten answers this is the one with the highest soft accuracy, as in the paper.

*Spelling.* There are two rules. `probable`, the default: a model may start an answer with or without a space, and with or without a capital letter. The spelling that
the unpruned model finds most probable is used. If the spelling's first token is blank (LLaMA writes a number as a space
and its digits), the blank is appended to the prompt and the next token is used: a blank contains no information about
the image. `release`, the rule of the paper's code: the reference as it is written, and of its tokens the first, even if that is
blank. For LLaVA-1.5 on MME these are the tokens of " Yes" and " No".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lmms_prune.record.information import InformationError

Label = Literal["probable", "release"]
LABELS: tuple[Label, ...] = ("probable", "release")


@dataclass(frozen=True)
class AnswerToken:
    """The first token of the right answer.

    Args:
        text: the reference.
        blank: blank tokens before the first token; they become part of the prompt.
        token: the first token's vocabulary index.
    """

    text: str
    blank: tuple[int, ...]
    token: int


def references(fields: Mapping[str, Any], target: Any) -> list[str]:
    """The references of a document, without empty ones, in the dataset's order.

    Args:
        fields: the document's fields in the dataset.
        target: the target that its task computes.
    """
    answers = fields.get("answers")
    answers = target if answers is None else answers
    listed = answers if isinstance(answers, (list, tuple)) else [answers]
    return [text for text in (str(answer).strip() for answer in listed if answer is not None) if text and text != "nan"]


def agreed(texts: Sequence[str]) -> str:
    """The reference that agrees with most others, ignoring case; of equal ones, the first."""
    lowered = [text.lower() for text in texts]
    return max(texts, key=lambda text: lowered.count(text.lower()))


@torch.no_grad()
def find_answer(
    model: Any, tokenizer: Any, inputs: Mapping[str, Any], texts: Sequence[str], label: Label = "probable"
) -> AnswerToken:
    """The first token of the right answer to one prompt.

    Args:
        model: the unpruned checkpoint.
        tokenizer: the checkpoint's tokenizer.
        inputs: the prompt's model inputs, one row.
        texts: the document's references.
        label: the rule for the spelling.

    Raises:
        InformationError: there is no reference, or it has no token that is not blank.
    """
    if not texts:
        raise InformationError("it has no right answer: its split may be one whose answers are kept secret.")
    text = agreed(texts)
    if label == "release":
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids:
            raise InformationError(f"its answer {text!r} has no token.")
        return AnswerToken(text, (), ids[0])
    spellings = dict.fromkeys((*_cased(text), *(f" {cased}" for cased in _cased(text))))
    starts = dict.fromkeys(start for start in (_first(tokenizer, text) for text in spellings) if start is not None)
    if not starts:
        raise InformationError(f"its answer {text!r} has no token that is not blank.")
    probable: dict[tuple[tuple[int, ...], int], float] = {}
    # One forward scores all spellings with the same blanks; the blanks' own probability counts too.
    for blank in {blank for blank, _ in starts}:
        logits = model(**extended(inputs, blank), logits_to_keep=1 + len(blank), use_cache=False).logits[0].double()
        logs = logits.log_softmax(-1)
        blank_log = sum(float(logs[row, token]) for row, token in enumerate(blank))
        probable |= {(blank, token): blank_log + float(logs[-1, token]) for b, token in starts if b == blank}
    blank, token = max(starts, key=lambda start: probable[start])
    return AnswerToken(text, blank, token)


def extended(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """A prompt's inputs with text tokens appended."""
    if not tokens:
        return dict(inputs)
    length = inputs["input_ids"].shape[1]
    longer = dict(inputs)
    for name, value in inputs.items():
        # Any other value per token (such as which tokens are visual) is 0 for text.
        if isinstance(value, torch.Tensor) and value.shape == (1, length):
            more = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            longer[name] = torch.cat([value, value.new_tensor(more)[None]], 1)
    return longer


def _cased(text: str) -> tuple[str, ...]:
    return text, text.lower(), text[:1].upper() + text[1:].lower()


def _first(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int] | None:
    """The blank tokens at a text's start, and its first token that is not blank; None if all are blank."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for count, token in enumerate(ids):
        if tokenizer.decode([token]).strip():
            return tuple(ids[:count]), token
    return None
