"""Rows of the benchmarks about text in images: TextVQA, DocVQA, InfographicVQA, OCRBench and OCR-VQA."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from datasets import Features, Image, Value

from lmms_prune.demo import content, questions
from lmms_prune.demo.content import Content, Sign
from lmms_prune.demo.pictures import Picture, draw
from lmms_prune.demo.tables import Configs, Rows, schema, seeded, texts


def textvqa(rows: int, seed: int) -> Configs:
    """TextVQA: the text on a sign, with ten people's answers and the OCR tokens. The test split has no answers."""
    features = schema(
        "image_id",
        "question",
        "set_name",
        "flickr_original_url",
        "flickr_300k_url",
        image=Image(),
        question_id=Value("int32"),
        image_width=Value("int32"),
        image_height=Value("int32"),
        question_tokens=texts(),
        answers=texts(),
        image_classes=texts(),
        ocr_tokens=texts(),
    )
    kinds = ("word", "number", "words", "word", "letters")

    def row(number: int, split: str) -> dict[str, Any]:
        rng = seeded(seed, "textvqa", split, str(number))
        shown = content.sign(rng, "test", kinds[number % len(kinds)])
        picture = draw(rng, shown)
        asked = _reading(rng, shown)
        # Ten people answer; if they differ, an answer scores in part. The test split has no answers.
        answers = [asked.answer.lower()] * 8 + [shown.lines[0].lower()] * 2
        row = {"image_id": f"drawing{number}", "question_id": number, "set_name": split, "image": picture.image}
        row |= {"question": asked.question.lower(), "question_tokens": asked.question.lower().rstrip("?").split()}
        row |= {"image_width": picture.image.width, "image_height": picture.image.height, "image_classes": ["Sign"]}
        row |= {"flickr_original_url": "", "flickr_300k_url": ""}
        return {**row, "answers": answers if split == "validation" else [""] * 10, "ocr_tokens": list(shown.lines)}

    names = ("validation", "test")
    return {"default": {split: ([row(number, split) for number in range(rows)], features) for split in names}}


def documents(rows: int, seed: int) -> Configs:
    """DocVQA (forms, tables) and InfographicVQA (tall and wide charts), in one repository. The test splits have no answers."""
    page = schema(
        "questionId",
        "question",
        "data_split",
        "ucsf_document_id",
        "ucsf_document_page_no",
        image=Image(),
        docId=Value("int64"),
        question_types=texts(),
        answers=texts(),
    )
    lists = {name: texts() for name in ("answer_type", "answers", "operation/reasoning")}
    long = schema("questionId", "question", "image_url", "ocr", "data_split", image=Image(), **lists)
    kinds: tuple[tuple[str, Callable[[random.Random, int], dict[str, Any]], Features], ...] = (
        ("DocVQA", _page, page),
        ("InfographicVQA", _infographic, long),
    )

    def row(config: str, make: Callable[..., dict[str, Any]], number: int, split: str) -> dict[str, Any]:
        fields = {
            "questionId": str(number),
            "data_split": split,
            **make(seeded(seed, config, split, str(number)), number),
        }
        return fields if split == "validation" else {**fields, "answers": None}

    return {
        config: {s: ([row(config, make, number, s) for number in range(rows)], columns) for s in ("validation", "test")}
        for config, make, columns in kinds
    }


def _page(rng: random.Random, number: int) -> dict[str, Any]:
    """A table in every fourth row, else a form; the number of lines cycles from three to seven."""
    shown = content.number_table(rng, "test") if number % 4 == 3 else content.form(rng, "test", 3 + number % 5)
    picture, asked = draw(rng, shown), questions.looked_up(rng, shown)
    facts = {"question": asked.question, "answers": [asked.answer], "docId": number, "question_types": [asked.category]}
    facts |= {"ucsf_document_id": f"drawing{number}", "ucsf_document_page_no": "1"}
    return {**facts, "image": picture.image}


def _infographic(rng: random.Random, number: int) -> dict[str, Any]:
    shown = content.chart(rng, "test")
    picture, asked = draw(rng, shown), questions.looked_up(rng, shown)
    facts = {"question": asked.question, "answers": [asked.answer], "answer_type": ["single span"]}
    facts |= {"operation/reasoning": []}
    return {**facts, "image_url": "", "ocr": questions.read_out(shown).answer, "image": picture.image}


def ocrbench(rows: int, seed: int) -> Configs:
    """OCRBench: cycles through seven of its ten question types; irregular, artistic and handwritten text is not drawn."""
    kinds: tuple[tuple[str, str, Callable[[random.Random], Content]], ...] = (
        ("IIIT5K", "Regular Text Recognition", lambda rng: content.sign(rng, "test", "word")),
        ("docVQA", "Doc-oriented VQA", lambda rng: content.form(rng, "test")),
        ("ReCTS", "Non-Semantic Text Recognition", lambda rng: content.sign(rng, "test", "letters")),
        ("textVQA", "Scene Text-centric VQA", lambda rng: content.sign(rng, "test", "number")),
        ("FUNSD", "Key Information Extraction", lambda rng: content.form(rng, "test", 4)),
        ("ORAND", "Digit String Recognition", lambda rng: content.sign(rng, "test", "number")),
        ("HME100k", "Handwritten Mathematical Expression Recognition", lambda rng: content.sign(rng, "test", "sum")),
    )
    table: Rows = []
    for number in range(rows):
        rng = seeded(seed, "ocrbench", str(number))
        source, kind, draws = kinds[number % len(kinds)]
        shown = draws(rng)
        picture: Picture = draw(rng, shown)
        if isinstance(shown, Sign):
            question, answer = "What is written in the image?", " ".join(shown.lines)
            if source == "textVQA":
                question = _reading(rng, shown).question
        else:
            asked = questions.looked_up(rng, shown)
            question, answer = asked.question, asked.answer
        row = {"dataset": source, "question_type": kind, "question": question, "answer": [answer]}
        table.append({**row, "image": picture.image})
    return {"default": {"test": (table, schema("dataset", "question", "question_type", image=Image(), answer=texts()))}}


def ocrvqa(rows: int, seed: int) -> Configs:
    """OCR-VQA: two questions about each sign or form, in one row. Only the test split is drawn."""
    columns = schema("image_id", "title", "authorName", "genre", "image_url", "set_name", image=Image())
    features = Features({**columns, **{name: texts() for name in ("questions", "answers", "ocr_tokens")}})
    features |= {"image_width": Value("int64"), "image_height": Value("int64")}
    table: Rows = []
    for number in range(rows // 2):
        rng = seeded(seed, "ocrvqa", str(number))
        shown = content.form(rng, "test", 4 + number % 3)
        first, second = questions.looked_up(rng, shown), questions.looked_up(rng, shown)
        image = draw(rng, shown).image
        row: dict[str, Any] = {"image_id": f"drawing{number}", "title": "", "authorName": "", "genre": "Forms"}
        row |= {"questions": [first.question, second.question], "answers": [first.answer, second.answer]}
        row |= {"ocr_tokens": questions.read_out(shown).answer.split(), "image_url": "", "set_name": "test"}
        table.append({**row, "image": image, "image_width": image.width, "image_height": image.height})
    return {"default": {"test": (table, features)}}


def _reading(rng: random.Random, shown: Sign) -> questions.Question:
    """A question about a sign's text, never its colour."""
    while (asked := questions.about(rng, shown, "test")).category != "ocr":
        pass
    return asked
