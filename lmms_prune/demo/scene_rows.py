"""Rows of the benchmarks that ask about things: MME, ScienceQA, POPE, MMBench and GQA."""

from __future__ import annotations

import random
from typing import Any

from datasets import Image, Value

from lmms_prune.demo.pictures import COLOURS, KINDS, draw_page, draw_scene, draw_sign
from lmms_prune.demo.tables import Configs, Rows, schema, seeded, texts

CHINESE = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色"}
CHINESE_KINDS = {"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形"}
CYCLE = 1_000_000  # MMBench repeats a question with its options rotated under an index raised by this


def mme(rows: int, seed: int) -> Configs:
    """MME: pairs of a yes- and a no-question about the same picture, perception and cognition in turn."""
    kinds = (_mme_existence, _mme_sum, _mme_colour, _mme_code, _mme_count, _mme_translation)
    made: Rows = []
    for pair in range(rows // 2):
        rng = seeded(seed, "mme", str(pair))
        category, image, yes, no = kinds[pair % len(kinds)](rng)
        for question, answer in ((yes, "Yes"), (no, "No")):
            row = {"question_id": f"{category}/{pair:04d}.png", "image": image, "answer": answer, "category": category}
            made.append({**row, "question": f"{question} Please answer yes or no."})
    return {"default": {"test": (made, schema("question_id", "question", "answer", "category", image=Image()))}}


def _mme_existence(rng: random.Random) -> tuple[str, Any, str, str]:
    scene = draw_scene(rng)
    yes, no = (f"Is there a {kind} in this image?" for kind in (scene.shapes[0].kind, scene.absent.kind))
    return "existence", scene.image, yes, no


def _mme_colour(rng: random.Random) -> tuple[str, Any, str, str]:
    scene = draw_scene(rng)
    shape = scene.shapes[-1]
    yes, no = (f"Is the colour of the {shape.kind} {colour}?" for colour in (shape.colour, scene.absent.colour))
    return "color", scene.image, yes, no


def _mme_count(rng: random.Random) -> tuple[str, Any, str, str]:
    scene = draw_scene(rng)
    count = len(scene.shapes)
    yes, no = (f"Are there {number} shapes in this image?" for number in (count, count % 3 + 1))
    return "count", scene.image, yes, no


def _mme_sum(rng: random.Random) -> tuple[str, Any, str, str]:
    one, two = rng.randint(2, 40), rng.randint(2, 40)
    yes, no = (f"Is the answer to the arithmetic question in the image {n}?" for n in (one + two, one + two + 10))
    return "numerical_calculation", draw_sign(rng, f"{one} + {two} ="), yes, no


def _mme_code(rng: random.Random) -> tuple[str, Any, str, str]:
    number = rng.randint(2, 9)
    image = draw_page("code.py", [f"n = {number}", "print(n * n)"], (320, 200))
    yes, no = (f"Is the output of the python code '{out}'?" for out in (number * number, number + number + 1))
    return "code_reasoning", image, yes, no


def _mme_translation(rng: random.Random) -> tuple[str, Any, str, str]:
    word, wrong = rng.sample(("rouge:red", "vert:green", "bleu:blue", "noir:black"), 2)
    french, english = word.split(":")
    yes, no = (f"Is the word in the image '{text}' in English?" for text in (english, wrong.split(":")[1]))
    return "text_translation", draw_sign(rng, french), yes, no


def scienceqa(rows: int, seed: int) -> Configs:
    """ScienceQA: choices of two to four colours, all with a picture (IMG) or every second one without (FULL)."""
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
        scene = draw_scene(rng)
        shape = rng.choice(scene.shapes)
        wrong = [colour for colour in COLOURS if colour != shape.colour]
        choices = rng.sample([shape.colour, *rng.sample(wrong, 1 + number % 3)], 2 + number % 3)
        question = f"Which colour is the {shape.kind}?" if with_image else f"Which colour is named '{shape.colour}'?"
        hint = "Look at the shapes in the picture." if with_image and number % 2 else ""
        shown = {"image": scene.image if with_image else None, "question": question, "hint": hint}
        return {**fixed, **shown, "choices": choices, "answer": choices.index(shape.colour)}

    pictured = [row(number, True) for number in range(rows)]
    mixed = [row(number, number % 2 == 0) for number in range(rows)]
    return {"ScienceQA-IMG": {"test": (pictured, features)}, "ScienceQA-FULL": {"test": (mixed, features)}}


def pope(rows: int, seed: int) -> Configs:
    """POPE: a shape that is there and one that is not, for each picture; in Full, three splits of negatives."""
    features = schema("id", "question_id", "question", "answer", "image_source", "category", image=Image())

    def split(category: str) -> Rows:
        made: Rows = []
        for number in range(rows):
            scene = draw_scene(seeded(seed, "pope", category, str(number // 2)))
            kind, answer = (scene.absent.kind, "no") if number % 2 else (scene.shapes[0].kind, "yes")
            names = {"id": str(number), "question_id": str(number + 1), "image_source": f"drawing_{number // 2:06d}"}
            question = f"Is there a {kind} in the image?"
            made.append({**names, "question": question, "answer": answer, "category": category, "image": scene.image})
        return made

    full = {name: (split(name), features) for name in ("adversarial", "popular", "random")}
    return {"default": {"test": full["adversarial"]}, "Full": full}


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
        rng = seeded(seed, "mmbench", split, str(number))  # not of the language: both ask about the same drawings
        scene = draw_scene(rng, 1 + number % 3)
        shape = rng.choice(scene.shapes)
        names, right = (CHINESE, shape.colour) if number % 2 else (CHINESE_KINDS, shape.kind)
        pool = COLOURS if number % 2 else KINDS
        options = rng.sample([right, *rng.sample([name for name in pool if name != right], 3)], 4)
        asked = ("colour", f"the {shape.kind}") if number % 2 else ("shape", f"the {shape.colour} thing")
        question, hint = f"What is the {asked[0]} of {asked[1]}?", "Look at the drawing." if number % 2 else "nan"
        if language == "cn":
            options = [names[option] for option in options]
            right = names[right]
            thing = (
                f"{CHINESE_KINDS[shape.kind]}是什么颜色？" if number % 2 else f"{CHINESE[shape.colour]}的是什么形状？"
            )
            question, hint = f"图中{thing}", "请看图。" if number % 2 else "nan"
        fixed = {"question": question, "hint": hint, "image": scene.image, "source": "drawing", "comment": "nan"}
        fixed |= {"category": "attribute_recognition", "L2-category": "finegrained_perception", "split": split}
        rotated = (options, [*options[1:], options[0]])
        return [
            {
                **fixed,
                "index": number + turn * CYCLE,
                **dict(zip("ABCD", order, strict=True)),
                "answer": "ABCD"[order.index(right)] if split == "dev" else "nan",
            }
            for turn, order in enumerate(rotated)
        ]

    def made(language: str, split: str) -> Rows:
        return [row for number in range(rows // 2) for row in twins(number, language, split)]

    return {name: {split: (made(name, split), features) for split in ("dev", "test")} for name in ("en", "cn")}


def gqa(rows: int, seed: int) -> Configs:
    """GQA: pictures in one configuration, two questions about each in another."""
    scenes = [draw_scene(seeded(seed, "gqa", str(number)), 2) for number in range(rows // 2)]
    images = [{"id": f"n{number}", "image": scene.image} for number, scene in enumerate(scenes)]
    asked: Rows = []
    for number in range(rows):
        scene = scenes[number // 2]
        left, right = scene.shapes
        if number % 2:
            question, answer, full = (
                f"What colour is the {right.kind}?",
                right.colour,
                f"The {right.kind} is {right.colour}.",
            )
        else:
            truth = number % 4 == 0
            one, two = (left, right) if truth else (right, left)
            question, answer = f"Is the {one.kind} to the left of the {two.kind}?", "yes" if truth else "no"
            full = f"{answer.capitalize()}, the {left.kind} is to the left of the {right.kind}."
        row = {"id": f"{number:08d}", "imageId": f"n{number // 2}", "isBalanced": True, "question": question}
        asked.append({**row, "answer": answer, "fullAnswer": full})
    columns = schema("id", "imageId", "question", "answer", "fullAnswer", isBalanced=Value("bool"))
    return {
        "testdev_balanced_images": {"testdev": (images, schema("id", image=Image()))},
        "testdev_balanced_instructions": {"testdev": (asked, columns)},
    }
