"""Rows of the benchmarks that ask about writing: TextVQA, DocVQA, InfographicVQA and OCRBench."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from datasets import Features, Image, Value

from lmms_prune.demo.pictures import draw_infographic, draw_page, draw_sign
from lmms_prune.demo.tables import Configs, Rows, schema, seeded, texts

WORDS = ("OPEN", "STOP", "CENTRE", "LIVING", "PARK", "MARKET", "HOTEL", "MUSEUM", "NORTH", "COFFEE", "TAXI", "BANK")


def textvqa(rows: int, seed: int) -> Configs:
    """TextVQA: two words on a sign, with ten people's answers and the OCR tokens; none for the test split."""
    features = schema(
        "image_id",
        "question",
        "set_name",
        image=Image(),
        question_id=Value("int32"),
        image_width=Value("int32"),
        image_height=Value("int32"),
        question_tokens=texts(),
        answers=texts(),
        image_classes=texts(),
        ocr_tokens=texts(),
    )

    def row(number: int, split: str) -> dict[str, Any]:
        rng = seeded(seed, "textvqa", split, str(number))
        first, second = rng.sample(WORDS, 2)
        image = draw_sign(rng, f"{first} {second}")
        question = rng.choice(("what is written on the sign?", "what does the board say?"))
        # Ten people answer; where they differ, an answer counts in part. The test split keeps its answers back.
        answers = [f"{first} {second}".lower()] * 7 + [first.lower()] * 3 if split == "validation" else [""] * 10
        row = {"image_id": f"drawing{number}", "question_id": number, "question": question, "set_name": split}
        row |= {"question_tokens": question.rstrip("?").split(), "image": image, "image_classes": ["Sign"]}
        row |= {"image_width": image.width, "image_height": image.height}
        return {**row, "answers": answers, "ocr_tokens": [first, second]}

    names = ("validation", "test")
    return {"default": {split: ([row(number, split) for number in range(rows)], features) for split in names}}


def documents(rows: int, seed: int) -> Configs:
    """DocVQA (tall pages) and InfographicVQA (long pictures), one repository; no answers for the test splits."""
    page = schema(
        "questionId",
        "question",
        "data_split",
        image=Image(),
        docId=Value("int64"),
        question_types=texts(),
        answers=texts(),
    )
    long = schema(
        "questionId", "question", "image_url", "ocr", "data_split", image=Image(), answer_type=texts(), answers=texts()
    )
    kinds: tuple[tuple[str, Callable[[random.Random, int], dict[str, Any]], Features], ...] = (
        ("DocVQA", _letter, page),
        ("InfographicVQA", _infographic, long),
    )

    def row(config: str, make: Callable[..., dict[str, Any]], number: int, split: str) -> dict[str, Any]:
        made = {
            "questionId": str(number),
            "data_split": split,
            **make(seeded(seed, config, split, str(number)), number),
        }
        return made if split == "validation" else {**made, "answers": None}

    return {
        config: {s: ([row(config, make, number, s) for number in range(rows)], columns) for s in ("validation", "test")}
        for config, make, columns in kinds
    }


def _letter(rng: random.Random, number: int) -> dict[str, Any]:
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1970, 2010)
    fields = {
        "date": f"{day:02d}/{month:02d}/{year}",
        "invoice number": str(rng.randint(1000, 9999)),
        "name": rng.choice(("Ada Byron", "Alan Kay", "Grace Hopper", "Kurt Klein")),
        "total": f"${rng.randint(10, 99)}.00",
    }
    asked = list(fields)[number % len(fields)]
    body = [f"{name.capitalize()}: {text}" for name, text in fields.items()]
    body += [f"{rng.choice(WORDS).lower()} {rng.choice(WORDS).lower()} {rng.randint(1, 99)}" for _ in range(6)]
    size = rng.choice(((360, 480), (390, 560), (420, 540)))
    question = f"What is the {asked} mentioned in the document?"
    facts = {"question": question, "answers": [fields[asked]], "docId": number, "question_types": ["form"]}
    return {**facts, "image": draw_page("INVOICE", body, size)}


def _infographic(rng: random.Random, number: int) -> dict[str, Any]:
    labels = rng.sample(("Bus", "Train", "Car", "Bike", "Walk", "Ferry"), 4)
    bars = {label: rng.randint(5, 95) for label in labels}
    asked = rng.choice(labels)
    size = rng.choice(((240, 720), (280, 840), (224, 896)))
    facts = {"question": f"What percentage of people travel by {asked.lower()}?", "answer_type": ["single span"]}
    facts |= {"answers": [f"{bars[asked]}%", str(bars[asked])], "image_url": "", "ocr": ""}
    return {**facts, "image": draw_infographic(rng, "How people travel", bars, size)}


def ocrbench(rows: int, seed: int) -> Configs:
    """OCRBench: six of its question types in turn."""
    kinds = (
        ("IIIT5K", "Regular Text Recognition"),
        ("HME100k", "Handwritten Mathematical Expression Recognition"),
        ("ReCTS", "Non-Semantic Text Recognition"),
        ("docVQA", "Doc-oriented VQA"),
        ("ORAND", "Digit String Recognition"),
        ("textVQA", "Scene Text-centric VQA"),
    )
    made: Rows = []
    for number in range(rows):
        rng = seeded(seed, "ocrbench", str(number))
        source, kind = kinds[number % len(kinds)]
        if source == "docVQA":
            facts = _letter(rng, number)
            row = {"question": facts["question"], "answer": facts["answers"], "image": facts["image"]}
        else:
            written = {"HME100k": f"x + {rng.randint(1, 9)}", "ORAND": str(rng.randint(100, 9999)), "ReCTS": "KQZW"}
            text = written.get(source, rng.choice(WORDS))
            row = {"question": "what is written in the image?", "answer": [text], "image": draw_sign(rng, text)}
        made.append({"dataset": source, "question_type": kind, **row})
    return {"default": {"test": (made, schema("dataset", "question", "question_type", image=Image(), answer=texts()))}}
