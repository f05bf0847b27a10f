"""Questions about pictures as the ten benchmarks ask them, with the true answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import NamedTuple

from lmms_prune.demo.content import (
    COLOURS,
    FRENCH,
    HEADS,
    KINDS,
    LABELS,
    Chart,
    Content,
    Form,
    NumberTable,
    Scene,
    Sign,
    Split,
    Thing,
    of_split,
    word,
)

CHINESE = {
    **{"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "black": "黑色"},
    **{"circle": "圆形", "square": "方形", "triangle": "三角形", "star": "星形", "cross": "十字形"},
}


@dataclass(frozen=True)
class Question:
    """A question with its answer.

    Args:
        question: the question, without options or instructions.
        answer: the true answer.
        wrong: wrong answers of the same sort, the most similar first.
        category: the sort of question.
        part: the entry and the column of the page that contain the answer, as in its marks (`pictures.Mark`).
    """

    question: str
    answer: str
    wrong: tuple[str, ...] = ()
    category: str = ""
    part: tuple[str, str] = ("", "")


def number_names(count: int) -> tuple[str, tuple[str, ...]]:
    """A count from 1 to 4 as text, and the other three."""
    return str(count), tuple(str(other) for other in range(1, 5) if other != count)


def about(rng: random.Random, content: Content, split: Split) -> Question:
    """An open question about a picture, with wrong answers to choose from."""
    if isinstance(content, Scene):
        return rng.choice((_colour, _kind, _colour, _kind, _count, _size))(rng, content)
    if isinstance(content, Sign):
        return _written(rng, content, split)
    return looked_up(rng, content)


def in_chinese(rng: random.Random, scene: Scene) -> Question:
    """A question about a scene, with its answers, in Chinese."""
    thing = rng.choice(scene.things)
    turn = rng.randrange(3)
    if turn == 0:
        answer, wrong = number_names(len(scene.things))
        return Question("图中有几个图形？", answer, wrong, "object_counting")
    asked = _colour_of(rng, thing) if turn == 1 else _kind_of(rng, thing)
    known, text = (thing.kind, "是什么颜色？") if turn == 1 else (thing.colour, "的是什么形状？")
    question = f"图中{CHINESE[known]}{text}"
    return Question(question, CHINESE[asked.answer], tuple(CHINESE[name] for name in asked.wrong), asked.category)


def _colour_of(rng: random.Random, thing: Thing) -> Question:
    wrong = rng.sample([colour for colour in COLOURS if colour != thing.colour], len(COLOURS) - 1)
    return Question(f"What colour is the {thing.kind}?", thing.colour, tuple(wrong), "attribute_recognition")


def _kind_of(rng: random.Random, thing: Thing) -> Question:
    wrong = rng.sample([kind for kind in KINDS if kind != thing.kind], len(KINDS) - 1)
    return Question(f"What shape is the {thing.colour} thing?", thing.kind, tuple(wrong), "object_recognition")


def _colour(rng: random.Random, scene: Scene) -> Question:
    return _colour_of(rng, rng.choice(scene.things))


def _kind(rng: random.Random, scene: Scene) -> Question:
    return _kind_of(rng, rng.choice(scene.things))


def _count(rng: random.Random, scene: Scene) -> Question:
    return Question("How many shapes are there?", *number_names(len(scene.things)), "object_counting")


def _size(rng: random.Random, scene: Scene) -> Question:
    thing = rng.choice(scene.things)
    names = ("large", "small") if thing.large else ("small", "large")
    return Question(f"Is the {thing.kind} large or small?", names[0], names[1:], "attribute_comparison")


def where(rng: random.Random, scene: Scene) -> Question:
    """Ask in which third of the picture a shape is.

    No benchmark asks this openly, but a model that can answer it can also answer the benchmarks' yes/no questions.
    """
    thing = rng.choice(scene.things)
    if rng.random() < 0.5:
        names, place = ("left", "middle", "right"), thing.column
        question = f"Is the {thing.kind} on the left, in the middle or on the right?"
    else:
        names, place = ("above", "middle", "below"), thing.row
        question = f"Is the {thing.kind} above, in the middle or below?"
    return Question(question, names[place], tuple(name for name in names if name != names[place]), "place")


def position(rng: random.Random, scene: Scene) -> tuple[str, str] | None:
    """Two questions about the side of the picture that a shape is on: the answer is yes to the first, no to the second.

    Returns:
        the two questions; None if the only shape is in the middle.
    """
    across = [(thing, ("on the left", "on the right"), thing.column) for thing in scene.things if thing.column != 1]
    down = [(thing, ("above the middle", "below the middle"), thing.row) for thing in scene.things if thing.row != 1]
    if not across and not down:
        return None
    thing, ways, place = rng.choice(across + down)
    right, wrong = ways if place == 0 else ways[::-1]
    return _both(f"Is the {thing.kind} {{}} of the image?", right, wrong)


def present(rng: random.Random, scene: Scene, truth: bool, category: str) -> Question:
    """A yes/no question about the presence of a shape.

    For no, the category `adversarial` combines the colour and kind of two shapes that are present.
    """
    kinds = [thing.kind for thing in scene.things]
    thing = rng.choice(scene.things)
    if category == "adversarial":
        colours = [other.colour for other in scene.things if other is not thing] or [
            c for c in COLOURS if c != thing.colour
        ]
        named = str(thing) if truth else f"{rng.choice(colours)} {thing.kind}"
    else:
        absent = [kind for kind in (KINDS[:3] if category == "popular" else KINDS) if kind not in kinds]
        named = thing.kind if truth else rng.choice(absent or [kind for kind in KINDS if kind not in kinds])
    return Question(f"Is there a {named} in the image?", "yes" if truth else "no", category=category)


def _written(rng: random.Random, sign: Sign, split: Split) -> Question:
    if rng.random() < 0.2:
        wrong = rng.sample([colour for colour in COLOURS if colour != sign.colour], len(COLOURS) - 1)
        return Question("What colour is the sign?", sign.colour, tuple(wrong), "attribute_recognition")
    if sign.kind == "sum":
        total = sum_of(sign)
        return Question("What is the sum?", str(total), tuple(str(total + by) for by in (1, -1, 2)), "calculation")
    if sign.kind == "number":
        others = tuple(changed(rng, sign.lines[0], "0123456789") for _ in range(3))
        return Question("What number is on the sign?", sign.lines[0], others, "ocr")
    return Question(
        "What is written on the sign?", " ".join(sign.lines), tuple(word(rng, split) for _ in range(3)), "ocr"
    )


def sum_of(sign: Sign) -> int:
    """The value of a sum on a sign."""
    return sum(int(digit) for digit in sign.lines[0].rstrip("=").split("+"))


def changed(rng: random.Random, text: str, letters: str) -> str:
    """`text` with one letter changed."""
    place = rng.randrange(len(text))
    return text[:place] + rng.choice([letter for letter in letters if letter != text[place]]) + text[place + 1 :]


def read_out(content: Content) -> Question:
    """A question whose answer is all the text of a picture, line by line."""
    if isinstance(content, Sign):
        lines = list(content.lines)
    elif isinstance(content, Form):
        lines = [f"{key} {value}" for key, value in content.fields]
    elif isinstance(content, NumberTable):
        lines = [" ".join(HEADS), *(f"{label} {first} {second}" for label, (first, second) in content.rows)]
    else:
        assert isinstance(content, Chart)
        lines = [f"{label} {value}" for label, value in content.bars]
    return Question("Read all the text.", " ".join(lines), category="ocr")


def looked_up(rng: random.Random, content: Content) -> Question:
    """A question for one entry of a form, a table or a chart."""
    if isinstance(content, Form):
        key, value = rng.choice(content.fields)
        others = tuple(other for name, other in content.fields if name != key)
        return Question(f"What is the {key.lower()} mentioned in the document?", value, others, "form", (key, ""))
    if isinstance(content, NumberTable):
        label, numbers = rng.choice(content.rows)
        column = rng.randrange(2)
        others = tuple(str(n) for name, both in content.rows for n in both if (name, n) != (label, numbers[column]))
        return Question(
            f"What is the {HEADS[column].lower()} of {label.lower()} in the table?",
            str(numbers[column]),
            others,
            "table/list",
            (label, HEADS[column]),
        )
    assert isinstance(content, Chart)
    label, height = rng.choice(content.bars)
    others = tuple(str(other) for name, other in content.bars if name != label)
    return Question(f"What is the number of {label.lower()} in the chart?", str(height), others, "chart", (label, ""))


SCENE_PAIRS = ("existence", "count", "position", "color", "commonsense_reasoning")


class Pair(NamedTuple):
    """Two questions about one picture with the answers yes and no, and MME's category."""

    category: str
    yes: str
    no: str


def pair(rng: random.Random, content: Content, split: Split, category: str | None = None) -> Pair | None:
    """Two questions about a sign, or about a scene in `category` (one of SCENE_PAIRS).

    Returns:
        the questions; None if they cannot be asked: the position of a single shape in the middle.
    """
    if isinstance(content, Scene):
        return _scene_pair(rng, content, category or rng.choice(SCENE_PAIRS))
    assert isinstance(content, Sign)
    text = " ".join(content.lines)
    if content.kind == "sum":
        right = sum_of(content)
        near = [n for n in range(max(2, right - 3), right + 4) if n != right]
        return Pair(
            "numerical_calculation", *_both("Is the answer to the sum in the image {}?", right, rng.choice(near))
        )
    if content.kind == "french":
        english = FRENCH[text]
        wrong = rng.choice([name for name in FRENCH.values() if name != english])
        return Pair("text_translation", *_both("Is the French word in the image {} in English?", english, wrong))
    if content.kind == "number":
        return Pair("OCR", *_both("Is the number in the image {}?", text, changed(rng, text, "0123456789")))
    wrong = text
    while wrong == text:
        wrong = " ".join(word(rng, split, len(line), len(line)) for line in content.lines)
    return Pair("OCR", *_both("Is the word in the image {}?", text, wrong))


def _both(question: str, right: object, wrong: object) -> tuple[str, str]:
    return question.format(right), question.format(wrong)


def _scene_pair(rng: random.Random, scene: Scene, category: str) -> Pair | None:
    thing = rng.choice(scene.things)
    if category == "existence":
        yes, no = (present(rng, scene, truth, "random").question for truth in (True, False))
    elif category == "count":
        right, others = number_names(len(scene.things))
        yes, no = _both("Is the number of shapes in this image {}?", right, rng.choice(others))
    elif category == "color":
        present_colours = [other.colour for other in scene.things if other is not thing]
        wrong = rng.choice(
            present_colours if present_colours and rng.random() < 0.5 else [c for c in COLOURS if c != thing.colour]
        )
        yes, no = _both(f"Is the {thing.kind} {{}}?", thing.colour, wrong)
    elif category == "position":
        if (both := position(rng, scene)) is None:
            return None
        yes, no = both
    else:
        rolls = f"Can the {thing.colour} thing roll?"
        corners = f"Does the {thing.colour} thing have corners?"
        yes, no = (rolls, corners) if thing.kind == "circle" else (corners, rolls)
    return Pair(category, yes, no)


def without_image(rng: random.Random, split: Split) -> Question:
    """A question that needs no picture: which of these is a colour, a shape or a vehicle?

    Its answer and wrong options together decide whether it is held out.
    """
    sorts = {"colour": tuple(COLOURS), "shape": KINDS, "vehicle": tuple(label.lower() for label in LABELS)}

    def draw_question() -> Question:
        asked = rng.choice(sorted(sorts))
        wrong = [name for sort, names in sorts.items() if sort != asked for name in names]
        return Question(
            f"Which of these is a {asked}?", rng.choice(sorts[asked]), tuple(rng.sample(wrong, 3)), "naming"
        )

    return of_split(split, draw_question, lambda drawn: (f"{drawn.answer}, not {', '.join(sorted(drawn.wrong))}",))
