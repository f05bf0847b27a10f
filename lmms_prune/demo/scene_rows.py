"""Rows of the benchmarks about objects: MME, ScienceQA, POPE, MMBench and GQA."""

from __future__ import annotations

import random
from typing import Any

from datasets import Image, Value

from lmms_prune.demo import content, questions
from lmms_prune.demo.pictures import Picture, draw
from lmms_prune.demo.questions import Question
from lmms_prune.demo.tables import Configs, Rows, schema, seeded, texts

CYCLE = 1_000_000  # MMBench repeats a question with its options rotated under an index raised by this
# Perception and cognition alternate.
MME_CATEGORIES = (
    *("existence", "numerical_calculation", "color", "text_translation"),
    *("count", "commonsense_reasoning", "position", "OCR"),
)
# The kind of sign for each category that needs reading.
_SIGNS = {"numerical_calculation": "sum", "text_translation": "french", "OCR": "word"}
NEGATIVES = ("random", "popular", "adversarial")


def mme(rows: int, seed: int) -> Configs:
    """MME: pairs of a yes and a no question about the same picture, cycling through eight of its categories."""
    table: Rows = []
    for number in range(rows // 2):
        rng = seeded(seed, "mme", str(number))
        category = MME_CATEGORIES[number % len(MME_CATEGORIES)]
        asked = None
        while asked is None:
            kind = _SIGNS.get(category)
            shown = content.scene(rng, "test") if kind is None else content.sign(rng, "test", kind)
            asked = questions.pair(rng, shown, "test", category)
        image = draw(rng, shown).image
        for question, answer in zip((asked.yes, asked.no), ("Yes", "No"), strict=True):
            row = {"question_id": f"{category}/{number:04d}.png", "image": image, "answer": answer}
            table.append({**row, "category": category, "question": f"{question} Please answer yes or no."})
    return {"default": {"test": (table, schema("question_id", "question", "answer", "category", image=Image()))}}


def scienceqa(rows: int, seed: int) -> Configs:
    """ScienceQA: two to four choices, all with a picture (IMG) or every second one without (FULL)."""
    features = schema(
        "question",
        "hint",
        "task",
        "grade",
        "subject",
        "topic",
        "category",
        "skill",
        "lecture",
        "solution",
        image=Image(),
        choices=texts(),
        answer=Value("int8"),
    )
    fixed = {"task": "closed choice", "grade": "grade2", "subject": "natural science", "topic": "physics"}
    fixed |= {"category": "Materials", "skill": "Identify properties", "lecture": "", "solution": ""}

    def row(number: int, with_image: bool) -> dict[str, Any]:
        rng = seeded(seed, "scienceqa", str(number), str(with_image))
        picture = _picture(rng) if with_image else None
        asked = questions.about(rng, picture.content, "test") if picture else questions.without_image(rng, "test")
        wrong = asked.wrong[: 1 + number % 3]
        choices = rng.sample([asked.answer, *wrong], 1 + len(wrong))
        hint = "Look at the picture." if with_image and number % 2 else ""
        shown = {"image": picture.image if picture else None, "question": asked.question, "hint": hint}
        return {**fixed, **shown, "choices": choices, "answer": choices.index(asked.answer)}

    pictured = [row(number, True) for number in range(rows)]
    mixed = [row(number, number % 2 == 0) for number in range(rows)]
    return {"ScienceQA-IMG": {"test": (pictured, features)}, "ScienceQA-FULL": {"test": (mixed, features)}}


def pope(rows: int, seed: int) -> Configs:
    """POPE: per picture, a shape that is present and one that is not. Negatives are of three sorts, separate in Full."""
    features = schema("id", "question_id", "question", "answer", "image_source", "category", image=Image())

    def row(number: int, category: str) -> dict[str, Any]:
        rng = seeded(seed, "pope", category, str(number // 2))
        scene = content.scene(rng, "test")
        image = draw(rng, scene).image
        asked = questions.present(rng, scene, number % 2 == 0, category)
        names = {"id": str(number), "question_id": str(number + 1), "image_source": f"drawing_{number // 2:06d}"}
        return {**names, "question": asked.question, "answer": asked.answer, "category": category, "image": image}

    full = {name: ([row(number, name) for number in range(rows)], features) for name in NEGATIVES}
    mixed = [row(number, NEGATIVES[number // 2 % 3]) for number in range(rows)]
    return {"default": {"test": (mixed, features)}, "Full": full}


def mmbench(rows: int, seed: int) -> Configs:
    """MMBench in English and Chinese: each question twice, the second time with its options rotated."""
    features = schema(
        "question",
        "answer",
        "hint",
        *"ABCD",
        "category",
        "L2-category",
        "source",
        "comment",
        "split",
        image=Image(),
        index=Value("int64"),
    )

    def twins(number: int, language: str, split: str) -> Rows:
        rng = seeded(seed, "mmbench", language, split, str(number))
        asked = Question("", "")
        while len(asked.wrong) < 3:  # four options always
            picture = _picture(rng) if language == "en" else draw(rng, content.scene(rng, "test"))
            if isinstance(picture.content, content.Scene) and language == "cn":
                asked = questions.in_chinese(rng, picture.content)
            else:
                asked = questions.about(rng, picture.content, "test")
        options = rng.sample([asked.answer, *asked.wrong[:3]], 4)
        hints = ("nan", "Look at the picture." if language == "en" else "请看图。")
        fixed = {"question": asked.question, "hint": hints[number % 2], "image": picture.image, "source": "drawing"}
        fixed |= {"comment": "nan", "category": asked.category, "L2-category": "perception", "split": split}
        rotated = (options, [*options[1:], options[0]])
        return [
            {
                **fixed,
                "index": number + turn * CYCLE,
                **dict(zip("ABCD", order, strict=True)),
                "answer": "ABCD"[order.index(asked.answer)] if split == "dev" else "nan",
            }
            for turn, order in enumerate(rotated)
        ]

    def table(language: str, split: str) -> Rows:
        return [row for number in range(rows // 2) for row in twins(number, language, split)]

    return {name: {split: (table(name, split), features) for split in ("dev", "test")} for name in ("en", "cn")}


def gqa(rows: int, seed: int) -> Configs:
    """GQA: pictures in one configuration, two questions about each in another."""
    images: Rows = []
    asked: Rows = []
    for number in range(rows // 2):
        rng = seeded(seed, "gqa", str(number))
        scene = content.scene(rng, "test", rng.randint(2, 4))
        images.append({"id": f"n{number}", "image": draw(rng, scene).image})
        sides = questions.position(rng, scene)
        assert sides is not None  # shapes never share a cell, so at least one is not in the middle
        answer = ("yes", "no")[number % 2]
        side = Question(sides[number % 2], answer)
        for question in (side, questions.about(rng, scene, "test")):
            row = {"id": f"{len(asked):08d}", "imageId": f"n{number}", "isBalanced": True}
            row |= {"question": question.question, "answer": question.answer}
            asked.append({**row, "fullAnswer": f"{question.question.rstrip('?')}: {question.answer}."})
    # GQA's scene graph columns are left out: drawings have no scene graphs, and no task reads them.
    columns = schema("id", "imageId", "question", "answer", "fullAnswer", isBalanced=Value("bool"))
    return {
        "testdev_balanced_images": {"testdev": (images, schema("id", image=Image()))},
        "testdev_balanced_instructions": {"testdev": (asked, columns)},
    }


def _picture(rng: random.Random) -> Picture:
    """A held-out scene, or a sign in one case of four."""
    reads = rng.random() < 0.25
    return draw(rng, content.sign(rng, "test", "word") if reads else content.scene(rng, "test"))
