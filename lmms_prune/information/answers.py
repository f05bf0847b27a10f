"""Which token counts as the right answer's first, for any task: one rule for its references, one for its spelling.

*References.* Where a document has a list of `answers` (TextVQA, DocVQA, InfographicVQA), these are its references, else
what its task calls the target: yes or no (MME, POPE), an option's letter (ScienceQA, MMBench), a word (GQA) or a list
(OCRBench). Of several references the one counts that agrees with most others, of equal ones the first. For TextVQA's ten
answers that is the one with the highest soft accuracy, as in the paper.

*Spelling.* A model may begin an answer with a space or without, and with a capital or without. Of these spellings the one
counts that the unpruned model finds most probable. Where the spelling's first token is blank (LLaMA writes a number as a
space and its digits) the blank is added to the prompt and the token after it counts: a blank says nothing of the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lmms_prune.record.information import InformationError


@dataclass(frozen=True)
class Answer:
    """The first token of the right answer.

    Args:
        text: the reference.
        blank: blank tokens that stand before it, part of the prompt.
        token: its vocabulary index.
    """

    text: str
    blank: tuple[int, ...]
    token: int


def references(fields: Mapping[str, Any], target: Any) -> list[str]:
    """The references of a document, without empty ones, in the dataset's order.

    Args:
        fields: what the dataset says of it.
        target: what its task calls its target.
    """
    given = fields.get("answers")
    given = target if given is None else given
    listed = given if isinstance(given, (list, tuple)) else [given]
    return [text for text in (str(one).strip() for one in listed if one is not None) if text and text != "nan"]


def agreed(texts: Sequence[str]) -> str:
    """The reference that agrees with most others; of equal ones the first."""
    plain = [text.lower() for text in texts]
    return max(texts, key=lambda text: plain.count(text.lower()))


@torch.no_grad()
def find_answer(model: Any, tokenizer: Any, inputs: Mapping[str, Any], texts: Sequence[str]) -> Answer:
    """The first token of the right answer to one prompt.

    Args:
        model: the unpruned checkpoint.
        tokenizer: its own.
        inputs: of the prompt, one row.
        texts: the document's references.

    Raises:
        InformationError: no reference, or none that has a token.
    """
    if not texts:
        raise InformationError("it has no right answer: its split may be one whose answers are kept secret.")
    text = agreed(texts)
    spelled = dict.fromkeys((*_cased(text), *(f" {one}" for one in _cased(text))))
    found = dict.fromkeys(first for first in (_first(tokenizer, one) for one in spelled) if first is not None)
    if not found:
        raise InformationError(f"its answer {text!r} has no token that is not blank.")
    probable: dict[tuple[tuple[int, ...], int], float] = {}
    for blank in {blank for blank, _ in found}:
        logits = model(**extended(inputs, blank), logits_to_keep=1 + len(blank), use_cache=False).logits[0].double()
        whole = logits.log_softmax(-1)
        before = sum(float(whole[place, token]) for place, token in enumerate(blank))
        probable |= {(blank, token): before + float(whole[-1, token]) for b, token in found if b == blank}
    blank, token = max(found, key=lambda one: probable[one])
    return Answer(text, blank, token)


def extended(inputs: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    """A prompt's inputs with text tokens added at its end."""
    if not tokens:
        return dict(inputs)
    length = inputs["input_ids"].shape[1]
    made = dict(inputs)
    for name, value in inputs.items():
        # Whatever else goes with the tokens (which of them are visual, say) is 0 for text.
        if isinstance(value, torch.Tensor) and value.shape == (1, length):
            more = {"input_ids": tokens, "attention_mask": [1] * len(tokens)}.get(name, [0] * len(tokens))
            made[name] = torch.cat([value, value.new_tensor(more)[None]], 1)
    return made


def _cased(text: str) -> tuple[str, ...]:
    return text, text.lower(), text[:1].upper() + text[1:].lower()


def _first(tokenizer: Any, text: str) -> tuple[tuple[int, ...], int] | None:
    """The blank tokens that a text begins with, and its first other one."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    for place, token in enumerate(ids):
        if tokenizer.decode([token]).strip():
            return tuple(ids[:place]), token
    return None
