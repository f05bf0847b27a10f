"""The right answer's first token: which reference, and which spelling of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lmms_prune.harness.documents import Document
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.answers import AnswerToken, agreed, extended, find_answer, references
from lmms_prune.record.information import InformationError


@pytest.mark.parametrize(
    ("fields", "target", "expected"),
    [
        ({"answer": "Yes"}, "Yes", ["Yes"]),  # MME, POPE, GQA
        ({"answer": 1}, "B", ["B"]),  # ScienceQA
        (
            {"answers": ["12", " 12 ", "", "13"]},
            "answer",
            ["12", "12", "13"],
        ),  # TextVQA, whose target is the word answer
        ({"answer": ["OBO"]}, ["OBO"], ["OBO"]),  # OCRBench
        ({"answer": "nan"}, "nan", []),  # MMBench's secret split
        ({"answers": None}, None, []),
    ],
)
def test_references(fields: dict[str, Any], target: Any, expected: list[str]) -> None:
    assert references(fields, target) == expected


@pytest.mark.parametrize(
    ("texts", "expected"),
    [(["a", "B", "b", "c"], "B"), (["x", "y"], "x"), (["12"] * 3 + ["13"] * 7, "13")],
)
def test_the_reference_that_agrees_with_most_is_used(texts: list[str], expected: str) -> None:
    assert agreed(texts) == expected


class Letters:
    """A tokenizer with a token a letter, as LLaMA's writes a number: a blank first."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Fixed:
    """A model whose next token is always as probable as `likes` says, whatever came before."""

    def __init__(self, likes: dict[str, float]) -> None:
        self.logits = torch.full((128,), -20.0)
        for letter, value in likes.items():
            self.logits[ord(letter)] = value

    def __call__(self, input_ids: torch.Tensor, logits_to_keep: int, **_: Any) -> Any:
        rows = self.logits.expand(1, logits_to_keep, -1)
        return type("Output", (), {"logits": rows})()


@pytest.mark.parametrize(
    ("likes", "texts", "expected"),
    [
        ({"y": 1.0, "Y": 0.0}, ["Yes"], AnswerToken("Yes", (), ord("y"))),
        ({"y": 0.0, "Y": 1.0}, ["yes"], AnswerToken("yes", (), ord("Y"))),
        (
            {" ": 5.0, "4": 1.0},
            ["4"],
            AnswerToken("4", (), ord("4")),
        ),  # what comes first is more probable than both together
    ],
)
def test_the_most_probable_spelling_is_used(likes: dict[str, float], texts: list[str], expected: AnswerToken) -> None:
    assert find_answer(Fixed(likes), Letters(), {"input_ids": torch.zeros(1, 3, dtype=torch.long)}, texts) == expected


@pytest.mark.parametrize(("texts", "first"), [(["Yes"], "Y"), (["no", "Yes", "yes"], "Y"), (["4 cats"], "4")])
def test_the_releases_label_is_the_first_token_as_written_whatever_the_model_finds_probable(
    texts: list[str], first: str
) -> None:
    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    answer = find_answer(Fixed({"y": 9.0, " ": 8.0}), Letters(), inputs, texts, "release")
    assert (answer.blank, answer.token) == ((), ord(first))


def test_the_releases_label_may_be_a_blank() -> None:
    """LLaMA's tokenizer writes a number as a blank and its digits; the release takes the first id."""

    class Blank(Letters):
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(" "), *super().encode(text, add_special_tokens)] if text else []

    inputs = {"input_ids": torch.zeros(1, 3, dtype=torch.long)}
    assert find_answer(Fixed({"7": 0.0}), Blank(), inputs, ["7"], "release") == AnswerToken("7", (), ord(" "))


def test_a_blank_joins_the_prompt_if_every_spelling_starts_with_one() -> None:
    class Blank(Letters):
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return [ord(" "), *super().encode(text.strip(), add_special_tokens)]

    inputs = {
        "input_ids": torch.tensor([[1, 2]]),
        "attention_mask": torch.tensor([[1, 1]]),
        "pixel_values": torch.ones(3),
    }
    answer = find_answer(Fixed({"7": 0.0}), Blank(), inputs, ["7"])
    assert answer == AnswerToken("7", (ord(" "),), ord("7"))
    longer = extended({**inputs, "mm_token_type_ids": torch.tensor([[1, 0]])}, answer.blank)
    assert longer["input_ids"].tolist() == [[1, 2, ord(" ")]]
    assert longer["attention_mask"].tolist() == [[1, 1, 1]]
    assert longer["mm_token_type_ids"].tolist() == [[1, 0, 0]]
    assert longer["pixel_values"] is inputs["pixel_values"]


@pytest.mark.parametrize(("texts", "message"), [([], "no right answer"), ([" "], "no token that is not blank")])
def test_a_document_without_an_answer_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(InformationError, match=message):
        find_answer(Fixed({}), Letters(), {"input_ids": torch.zeros(1, 1, dtype=torch.long)}, texts)


def test_a_trained_model_is_sure_of_the_right_spelling(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document]
) -> None:
    """The demo's model generates first the token found from the reference, in any case."""
    wrapper = wrappers["llava_pruned"]
    right = 0
    for number in range(8):
        one = document(number)
        inputs = dict(wrapper.inputs_of(one.messages))
        generated = wrapper.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
        answer = find_answer(wrapper.model, wrapper.processor.tokenizer, inputs, [str(one.target).upper(), one.target])
        right += answer.token == generated
    assert right >= 5
