"""The demo's pictures: their drawings, marks and questions, and what is held out of training."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from lmms_prune.demo import content, questions
from lmms_prune.demo.content import Chart, Form, NumberTable, Scene, Sign, Thing, held_out
from lmms_prune.demo.pictures import draw

DRAWS = {
    "scene": content.scene,
    **{
        kind: (lambda rng, split, kind=kind: content.sign(rng, split, kind))
        for kind in ("word", "words", "letters", "number", "sum", "french")
    },
    "form": content.form,
    "grid": content.number_table,
    "chart": content.chart,
}
RED_CIRCLE = Thing("circle", "red", True, 0, 0)
BLUE_SQUARE = Thing("square", "blue", False, 2, 1)
SCENE = Scene((RED_CIRCLE, BLUE_SQUARE))


def drawn(name: str, split: str, count: int) -> list:
    rng = random.Random(f"{name}/{split}")
    return [DRAWS[name](rng, split) for _ in range(count)]


@pytest.mark.parametrize("name", DRAWS)
def test_training_and_evaluation_share_no_fact(name: str) -> None:
    train = {fact for shown in drawn(name, "train", 300) for fact in shown.facts}
    test = {fact for shown in drawn(name, "test", 50) for fact in shown.facts}
    assert train
    assert test
    assert not train & test
    assert not any(map(held_out, train))
    assert all(map(held_out, test))


def test_words_of_evaluation_are_in_no_training_picture() -> None:
    """A word is held out everywhere, on signs and in forms."""
    train = {line for shown in drawn("word", "train", 400) + drawn("words", "train", 400) for line in shown.lines}
    train |= {value for shown in drawn("form", "train", 400) for _, value in shown.fields if value.isalpha()}
    test = {line for shown in drawn("word", "test", 100) for line in shown.lines}
    test |= {value for shown in drawn("form", "test", 100) for _, value in shown.fields if value.isalpha()}
    assert len(test) > 50
    assert not train & test


@pytest.mark.parametrize("name", DRAWS)
def test_the_same_seed_draws_the_same_picture(name: str) -> None:
    shown = drawn(name, "train", 1)[0]
    one, two = (draw(random.Random(3), shown) for _ in range(2))
    assert one.image.tobytes() == two.image.tobytes()
    assert one.marks == two.marks
    assert len({draw(random.Random(seed), shown).image.tobytes() for seed in range(8)}) > 1


@pytest.mark.parametrize("name", DRAWS)
def test_every_letter_has_a_visual_token_of_its_own(name: str) -> None:
    """Both in tokens of 28 x 28 pixels and in a 12 x 12 grid over the square around the picture."""
    for number, shown in enumerate(drawn(name, "train", 60)):
        picture = draw(random.Random(number), shown)
        width, height = picture.image.size
        assert width % 28 == height % 28 == 0
        cell = max(width, height) / 12
        across, down = (max(width, height) - width) // 2, (max(width, height) - height) // 2
        middles = [
            ((mark.box[0] + mark.box[2]) / 2, (mark.box[1] + mark.box[3]) / 2) for mark in picture.marks if mark.letter
        ]
        assert all(0 <= x < width and 0 <= y < height for x, y in middles)
        assert len({(int(x / 28), int(y / 28)) for x, y in middles}) == len(middles)
        assert len({(int((x + across) / cell), int((y + down) / cell)) for x, y in middles}) == len(middles)
        written = questions.read_out(shown).answer.replace(" ", "") if not isinstance(shown, Scene) else ""
        assert Counter(mark.letter for mark in picture.marks if mark.letter) == Counter(written)


def test_a_shape_is_drawn_in_its_colour_where_its_mark_says() -> None:
    for number in range(20):
        picture = draw(random.Random(number), SCENE)
        for mark, thing in zip(picture.marks, SCENE.things, strict=True):
            middle = ((mark.box[0] + mark.box[2]) / 2, (mark.box[1] + mark.box[3]) / 2)
            assert picture.image.getpixel((int(middle[0]), int(middle[1]))) == content.COLOURS[thing.colour]
            assert (mark.kind, mark.colour) == (thing.kind, thing.colour)
            assert (int(3 * middle[0] / picture.image.width), int(3 * middle[1] / picture.image.height)) == (
                thing.column,
                thing.row,
            )
            assert (mark.across, mark.down) == (("left", "", "right")[thing.column], ("above", "", "below")[thing.row])


# The circle is at the top left, the square at the right, in the middle row.
STANDS = {
    "Is the circle on the left of the image?",
    "Is the circle above the middle of the image?",
    "Is the square on the right of the image?",
}
STANDS_NOT = {
    "Is the circle on the right of the image?",
    "Is the circle below the middle of the image?",
    "Is the square on the left of the image?",
}


def test_questions_about_positions_are_true() -> None:
    asked = [questions.position(random.Random(number), SCENE) for number in range(60)]
    both_asked = [both for both in asked if both is not None]
    assert len(both_asked) == len(asked)
    assert {yes for yes, _ in both_asked} == STANDS
    assert {no for _, no in both_asked} == STANDS_NOT
    assert all(yes.split()[2] == no.split()[2] for yes, no in both_asked)


def test_a_single_shape_in_the_middle_has_no_position() -> None:
    assert questions.position(random.Random(0), Scene((Thing("star", "red", True, 1, 1),))) is None


def test_open_and_closed_questions_about_positions_agree() -> None:
    """Open questions cover every shape, and the middle is an answer too."""
    answers = set()
    for number in range(60):
        asked = questions.where(random.Random(number), SCENE)
        assert asked.answer in asked.question.rstrip("?").replace(",", "").split()
        assert {asked.answer, *asked.wrong} <= {"left", "middle", "right", "above", "below"}
        answers.add((asked.question.split()[2], asked.answer))
    assert answers == {("circle", "left"), ("circle", "above"), ("square", "right"), ("square", "middle")}


@pytest.mark.parametrize("category", ["random", "popular", "adversarial"])
def test_questions_about_presence_are_true(category: str) -> None:
    for number in range(100):
        scene = content.scene(random.Random(number), "train")
        there = {thing.kind for thing in scene.things} | {str(thing) for thing in scene.things}
        for truth in (True, False):
            asked = questions.present(random.Random(number), scene, truth, category)
            name = asked.question.removeprefix("Is there a ").removesuffix(" in the image?")
            assert (name in there) == truth == (asked.answer == "yes")
            if category == "adversarial" and not truth:
                assert name.split()[1] in there  # the shape is there, in another colour


@pytest.mark.parametrize("category", questions.SCENE_PAIRS)
def test_pairs_are_answered_with_yes_and_with_no(category: str) -> None:
    asked = questions.pair(random.Random(1), SCENE, "train", category)
    assert asked is not None
    named, yes, no = asked
    assert named == category
    expected = {
        "existence": lambda q: any(f"a {kind} " in q for kind in ("circle", "square")),
        "count": lambda q: q.endswith(" 2?"),
        "position": lambda q: q in STANDS,
        "color": lambda q: q in {"Is the circle red?", "Is the square blue?"},
        "commonsense_reasoning": lambda q: q in {"Can the red thing roll?", "Does the blue thing have corners?"},
    }[category]
    assert expected(yes)
    assert not expected(no)


@pytest.mark.parametrize(
    ("sign", "yes"),
    [
        (Sign("sum", ("3+4=",), "red"), "Is the answer to the sum in the image 7?"),
        (Sign("french", ("NOIR",), "red"), "Is the French word in the image black in English?"),
        (Sign("word", ("KABO",), "red"), "Is the word in the image KABO?"),
        (Sign("number", ("1999",), "red"), "Is the number in the image 1999?"),
    ],
)
def test_pairs_about_signs(sign: Sign, yes: str) -> None:
    for number in range(20):
        asked = questions.pair(random.Random(number), sign, "train")
        assert asked is not None
        assert asked[1] == yes != asked[2]


def test_open_questions_have_the_true_answer_and_other_wrong_ones() -> None:
    expected = {
        "What colour is the circle?": "red",
        "What colour is the square?": "blue",
        "What shape is the red thing?": "circle",
        "What shape is the blue thing?": "square",
        "How many shapes are there?": "2",
        "Is the circle large or small?": "large",
        "Is the square large or small?": "small",
    }
    answers = {}
    for number in range(200):
        asked = questions.about(random.Random(number), SCENE, "train")
        assert asked.answer not in asked.wrong
        answers[asked.question] = asked.answer
    assert answers == expected


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (
            Form((("NAME", "KURT"), ("ROOM", "123"))),
            {
                "What is the name mentioned in the document?": "KURT",
                "What is the room mentioned in the document?": "123",
            },
        ),
        (
            NumberTable((("BUS", (12, 34)),)),
            {"What is the pcs of bus in the table?": "12", "What is the eur of bus in the table?": "34"},
        ),
        (
            Chart((("BUS", 12), ("CAR", 98)), True),
            {"What is the number of bus in the chart?": "12", "What is the number of car in the chart?": "98"},
        ),
    ],
)
def test_entries_are_looked_up(shown: Form | NumberTable | Chart, expected: dict[str, str]) -> None:
    asked = [questions.looked_up(random.Random(number), shown) for number in range(40)]
    assert {question.question: question.answer for question in asked} == expected


def test_chinese_questions_ask_the_same() -> None:
    answers = {
        asked.question: asked.answer for n in range(100) for asked in [questions.in_chinese(random.Random(n), SCENE)]
    }
    assert answers == {
        "图中有几个图形？": "2",
        "图中圆形是什么颜色？": "红色",
        "图中方形是什么颜色？": "蓝色",
        "图中红色的是什么形状？": "圆形",
        "图中蓝色的是什么形状？": "方形",
    }


def test_questions_without_an_image_can_be_answered() -> None:
    for number in range(50):
        asked = questions.without_image(random.Random(number), "test")
        sort = asked.question.removeprefix("Which of these is a ").rstrip("?")
        names = {"colour": set(content.COLOURS), "shape": set(content.KINDS)}
        right = names.get(sort, {label.lower() for label in content.LABELS})
        assert asked.answer in right
        assert not right & set(asked.wrong)


def test_a_question_without_an_image_is_of_one_split() -> None:
    """In any order of its wrong options."""
    asked: dict[content.Split, set[tuple[str, frozenset[str]]]] = {"train": set(), "test": set()}
    for split, seen in asked.items():
        drawn_questions = [questions.without_image(random.Random(f"{split}/{number}"), split) for number in range(2000)]
        seen.update((question.answer, frozenset(question.wrong)) for question in drawn_questions)
    assert min(map(len, asked.values())) > 100
    assert not asked["train"] & asked["test"]
