"""Batches of training pictures with several questions each, and dense labels of their visual tokens.

All questions about a picture share one sequence. Each question attends only to the picture and to itself, and has the
positions that it would have without the others. So a picture passes through the decoder once for all its questions, and
training computes the same as inference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from lmms_prune.demo import content, prompts, questions
from lmms_prune.demo.content import COLOURS, HEADS, KEYS, KINDS, SYMBOLS, Content, Scene, Sign, Split
from lmms_prune.demo.content import LABELS as ENTRIES
from lmms_prune.demo.pictures import ACROSS, DOWN, Mark, Picture, draw
from lmms_prune.demo.training.attention_targets import answer_marks, named_marks
from lmms_prune.demo.training.families import TrainingFamily

# The dense labels of a visual token; 0 means "nothing of that sort". A letter of a value also has its entry, its column
# and its number ("place") in the value or on the sign.
LABELS = {
    "kind": ("", *KINDS, "board", "bar"),
    "colour": ("", *COLOURS),
    "letter": ("", *SYMBOLS),
    "entry": ("", *KEYS, *ENTRIES),
    "column": ("", *HEADS),
    "place": ("", *(str(n) for n in range(1, 11))),
    "size": ("", "large", "small"),
    "across": ("", *filter(None, ACROSS)),
    "down": ("", *filter(None, DOWN)),
}
# Signs have few letters, white on colours, anywhere and of several sizes, so the vision encoder needs many of them.
MIX = {"scene": 0.28, "sign": 0.33, "form": 0.18, "grid": 0.09, "chart": 0.12}
ENCODER_MIX = {"scene": 0.3, "sign": 0.45, "form": 0.12, "grid": 0.04, "chart": 0.09}
# Scenes have the most sorts of questions; those that need a comparison take longest to learn.
QUESTIONS_MIX = {"scene": 0.5, "sign": 0.22, "form": 0.08, "grid": 0.09, "chart": 0.11}
COMPARE_MIX = {"scene": 0.6, "sign": 0.34, "form": 0.02, "grid": 0.02, "chart": 0.02}
_SIGNS = ("word", "word", "words", "letters", "number", "sum", "french")
_PAIRS = ("existence", *["count"] * 2, *["position"] * 5, *["color"] * 2, "commonsense_reasoning")


@dataclass
class Batch:
    """Some pictures with their questions.

    B rows, T columns of the longest sequence, V visual tokens of all images, A tokens of all answers, I images, C labels,
    G supervised tokens of a row.
    """

    pixels: dict[str, Tensor]
    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "..."]  # (B, T), or (3, B, T) with M-RoPE
    mask: Bool[Tensor, "B 1 T T"]
    is_image: Bool[Tensor, "B T"]
    asking: Int[Tensor, "A 2"]  # row and column of the token before each answer token, which predicts it
    target: Int[Tensor, " A"]
    weight: Float[Tensor, " A"]
    answer: Int[Tensor, " A"]  # index of the answer that the token belongs to
    sorts: list[str]  # for each answer, the sort of question
    labels: dict[str, Int[Tensor, " V"]]
    present: Float[Tensor, "I C"]  # for each image, whether it has each label anywhere
    supervised: Int[Tensor, "B G"]  # columns of the tokens with attention supervision, padded with 0
    targets: Bool[Tensor, "B G T"]  # the columns that each should attend to; none for padding
    in_question: Bool[Tensor, "B G"]  # whether the targets are words of the question instead of visual tokens

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`."""

        def moved(value: object) -> object:
            if isinstance(value, dict):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(**{name: moved(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class Prompted(NamedTuple):
    """A prompt and its answer.

    Args:
        prompt: the prompt's text.
        answer: the answer's text.
        sort: the sort of question, for the log.
        question: the prompt without options and instructions.
        part: the entry and the column of a page that contain the answer, see `answer_marks`.
        stated: the words of the question that yes or no depends on, or the right option's text.
        options: the options, each with its letter.
    """

    prompt: str
    answer: str
    sort: str
    question: str
    part: tuple[str, str] = ("", "")
    stated: str = ""
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: questions.Question, sort: str, prompt: str = "") -> Prompted:
        """An open question, worded as `prompt`, or unchanged if `prompt` is empty."""
        return cls(prompt or asked.question, asked.answer, sort, asked.question, asked.part)


class QuestionBatches(Dataset):
    """Batches of one stage. Batch n depends only on `seed`, stage, split and n, so a resumed training gets the same batches."""

    def __init__(
        self, family: TrainingFamily, seed: int, pictures: int, each: int, stage: str, split: Split = "train"
    ) -> None:
        self.family, self.seed, self.pictures, self.each = family, seed, pictures, each
        self.stage, self.split = stage, split

    def __getitem__(self, number: int) -> Batch:
        rng = random.Random(f"{self.seed}/{self.stage}/{self.split}/{number}")
        rows: list[tuple[Picture | None, list[Prompted]]] = []
        for _ in range(self.pictures):
            mix, question = STAGES[self.stage]
            picture = draw(rng, some_content(rng, self.split, mix))
            rows.append((picture, [question(rng, picture.content, self.split) for _ in range(self.each)]))
        if self.stage == "questions" and number % 4 == 0:
            rows[-1] = (None, [_choice(rng, questions.without_image(rng, self.split)) for _ in range(self.each)])
        return collate(self.family, rows)


def some_content(rng: random.Random, split: Split, mix: Mapping[str, float] = MIX) -> Content:
    """A random content of a picture; `mix` gives the share of each kind."""
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind == "sign":
        return content.sign(rng, split, rng.choice(_SIGNS))
    draws: dict[str, Callable[..., Content]] = {
        "scene": content.scene,
        "form": content.form,
        "grid": content.number_table,
        "chart": content.chart,
    }
    return draws[kind](rng, split)


def ask(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """A random question about a picture, worded as one of the benchmarks does."""
    if isinstance(shown, Scene):
        return _ask_scene(rng, shown, split)
    roll = rng.random()
    if isinstance(shown, Sign):
        if roll < 0.25 and (both := questions.pair(rng, shown, split)):
            return _yes_or_no(rng, both)
        if roll < 0.4:
            return _choice(rng, questions.about(rng, shown, split))
        if roll < 0.65:
            return _written(shown)
        asked = questions.about(rng, shown, split)
        # OCRBench asks the same without instructions on how to answer.
        return Prompted.of(asked, _sort(asked, shown), "" if roll < 0.72 else prompts.textvqa(asked.question))
    if roll < 0.12:
        return Prompted.of(questions.read_out(shown), "read all")
    asked = questions.looked_up(rng, shown)
    return Prompted.of(asked, asked.category, "" if roll < 0.22 else prompts.short(asked.question))


def ask_openly(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """A question whose answer is a word; one in six about scenes is a yes/no question.

    A word carries more information than yes or a letter, and its question is shorter, especially without instructions. So
    the decoder learns from these questions what to attend to. Afterwards it learns the other sorts quickly.
    """
    if isinstance(shown, Scene):
        if rng.random() < 0.17:
            category = rng.choice(("random", "adversarial"))
            asked = questions.present(rng, shown, rng.random() < 0.5, category)
            sort = f"yes/no {category}"
        else:
            asked = questions.about(rng, shown, split)
            sort = asked.category
    elif isinstance(shown, Sign):
        if rng.random() < 0.4:
            return _written(shown)
        asked = questions.about(rng, shown, split)
        sort = _sort(asked, shown)
    elif rng.random() < 0.05:
        asked, sort = questions.read_out(shown), "read all"
    else:
        asked = questions.looked_up(rng, shown)
        sort = asked.category
    worded = prompts.textvqa if isinstance(shown, Sign) else prompts.short
    return Prompted.of(asked, sort, "" if rng.random() < 0.75 else worded(asked.question))


def ask_to_compare(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """Mostly a question that compares a statement or options with the picture; the answer is yes, no or a letter.

    The decoder learns each sort of comparison suddenly, after some hundred steps with little else, and not at all if it is
    one of many sorts.
    """
    roll = rng.random()
    if isinstance(shown, Scene):
        if roll < 0.45 and (both := questions.pair(rng, shown, split, "position" if roll < 0.3 else "count")):
            return _yes_or_no(rng, both)
        if roll < 0.5:
            asked = questions.where(rng, shown)
            return Prompted.of(asked, asked.category, prompts.short(asked.question))
        if roll < 0.65:
            return _choice(rng, questions.about(rng, shown, split))
    if isinstance(shown, Sign):
        if roll < 0.4 and (both := questions.pair(rng, shown, split)):
            return _yes_or_no(rng, both)
        if roll < 0.75:
            return _choice(rng, questions.about(rng, shown, split))
    return ask(rng, shown, split)


def _sort(asked: questions.Question, shown: Sign) -> str:
    """The sort of a question about a sign, for the log."""
    return asked.category if asked.category == "attribute_recognition" else f"read {shown.kind}"


def _written(shown: Sign) -> Prompted:
    """OCRBench's question for a sign's text."""
    prompt = "What is written in the image?"
    return Prompted(prompt, questions.read_out(shown).answer, f"read {shown.kind}", prompt)


def _ask_scene(rng: random.Random, shown: Scene, split: Split) -> Prompted:
    roll, truth = rng.random(), rng.random() < 0.5
    if roll < 0.42 and (both := questions.pair(rng, shown, split, rng.choice(_PAIRS))):
        return _yes_or_no(rng, both)
    if roll < 0.54:
        category = rng.choice(("random", "popular", "adversarial", "adversarial"))
        asked = questions.present(rng, shown, truth, category)
        return Prompted.of(asked, f"yes/no {category}", prompts.short(asked.question))
    if roll < 0.68:
        asked = questions.where(rng, shown) if roll < 0.59 else questions.about(rng, shown, split)
        return Prompted.of(asked, asked.category, prompts.short(asked.question))
    if roll < 0.87:
        return _choice(rng, questions.about(rng, shown, split))
    return _choice(rng, questions.in_chinese(rng, shown), chinese=True)


def _yes_or_no(rng: random.Random, pair: questions.Pair) -> Prompted:
    """One question of a pair; its stated words are those that the other question does not have."""
    truth = rng.random() < 0.5
    question, other = (pair.yes, pair.no) if truth else (pair.no, pair.yes)
    words, others = (text.rstrip("?").split() for text in (question, other))
    stated = " ".join(word for word in words if word not in others)
    answer = "yes" if truth else "no"
    return Prompted(prompts.short(question), answer, f"yes/no {pair.category}", question, stated=stated)


def _choice(rng: random.Random, asked: questions.Question, *, chinese: bool = False) -> Prompted:
    wrong = [text for text in dict.fromkeys(asked.wrong) if text != asked.answer][: rng.randint(1, 3)]
    options = rng.sample([asked.answer, *wrong], 1 + len(wrong))
    letter = "ABCD"[options.index(asked.answer)]
    lines = tuple(f"{each}. {option}" for each, option in zip("ABCD", options, strict=False))
    right = f"{letter}. {asked.answer}"
    if chinese:
        prompt = prompts.mmbench(asked.question, options, rng.choice(("请看图。", "nan")), chinese=True)
        return Prompted(prompt, letter, "choice chinese", asked.question, stated=right, options=lines)
    form = rng.choice((prompts.scienceqa, prompts.mmbench))
    prompt = form(asked.question, options, rng.choice(("Look at the picture.", "")))
    return Prompted(prompt, letter, f"choice {asked.category}", asked.question, asked.part, right, lines)


STAGES = {
    "tower": (ENCODER_MIX, ask),  # the vision encoder; the names seed the random draws, so they stay
    "open": (MIX, ask_openly),
    "compare": (COMPARE_MIX, ask_to_compare),
    "questions": (QUESTIONS_MIX, ask),
}


def dense_labels(family: TrainingFamily, picture: Picture) -> dict[str, Int[Tensor, " V"]]:
    """The labels of each visual token: a letter labels the token at its centre, a shape all tokens in its box."""
    labels = {name: torch.zeros(family.grid(picture.image.size), dtype=torch.long) for name in LABELS}
    for mark in picture.marks:
        down, across = _tokens(family, picture, mark)
        for name in LABELS:
            if text := getattr(mark, name):
                labels[name][down, across] = LABELS[name].index(str(text))
    return {name: values.flatten() for name, values in labels.items()}


def _tokens(family: TrainingFamily, picture: Picture, mark: Mark) -> tuple[slice, slice]:
    """The grid rows and columns of a mark's visual tokens: at least one of each, also for the smallest shape."""
    rows, columns = family.grid(picture.image.size)
    left, top, right, bottom = family.to_grid(picture.image.size, mark.box)
    # A token belongs to a shape if its middle is inside the shape's box.
    across = [c for c in range(columns) if left <= c + 0.5 <= right] or [int((left + right) / 2)]
    down = [r for r in range(rows) if top <= r + 0.5 <= bottom] or [int((top + bottom) / 2)]
    return slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)


def collate(family: TrainingFamily, rows: list[tuple[Picture | None, list[Prompted]]]) -> Batch:
    """Combine pictures and questions into a batch, with one sequence per row, padded on the right."""
    pictures = [picture for picture, _ in rows if picture is not None]
    labels = [dense_labels(family, picture) for picture in pictures]
    packed = [_pack(family, picture, asked) for picture, asked in rows]
    longest = max(len(row.ids) for row in packed)
    most = max(1, *(len(row.supervised) for row in packed))
    supervised = torch.zeros((len(rows), most), dtype=torch.long)
    targets = torch.zeros((len(rows), most, longest), dtype=torch.bool)
    in_question = torch.zeros((len(rows), most), dtype=torch.bool)
    segment = torch.full((len(rows), longest), -1)
    ids = torch.full((len(rows), longest), family.tokenizer.pad_token_id)
    positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
    asking, target, weight, answers = [], [], [], 0
    owner: list[int] = []
    for number, row in enumerate(packed):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        segment[number, : len(row.ids)] = torch.tensor(row.segments)
        positions[:, number, : len(row.ids)] = torch.tensor(row.positions).T
        for entry, demand in enumerate(row.supervised):
            supervised[number, entry] = demand.column
            targets[number, entry, demand.targets] = True
            in_question[number, entry] = demand.in_question
        for columns in row.answers:
            answers += 1
            for column in columns:
                owner.append(answers - 1)
                asking.append((number, column - 1))
                target.append(row.ids[column])
                weight.append(1 / len(columns) ** 0.5)  # a long text counts more than a word, but less than its length
    # Causal, and a question sees only the shared part (segment 0) and itself.
    ordered = torch.arange(longest)
    mask = (ordered[:, None] >= ordered) & ((segment[:, None] == 0) | (segment[:, :, None] == segment[:, None]))
    mask |= torch.eye(longest, dtype=torch.bool)  # padding sees itself, so that its softmax is defined
    present = torch.stack(
        [torch.cat([torch.bincount(image[n], minlength=len(LABELS[n]))[1:] > 0 for n in LABELS]) for image in labels]
    )
    return Batch(
        pixels=family.pixels([picture.image for picture in pictures]),
        ids=ids,
        positions=family.position_ids(positions),
        mask=mask[:, None],
        is_image=ids == family.image_id,
        asking=torch.tensor(asking, dtype=torch.long).reshape(-1, 2),
        target=torch.tensor(target, dtype=torch.long),
        weight=torch.tensor(weight, dtype=torch.float),
        answer=torch.tensor(owner, dtype=torch.long),
        sorts=[prompted.sort for _, asked in rows for prompted in asked],
        labels={name: torch.cat([image[name] for image in labels]) for name in LABELS},
        present=present.float(),
        supervised=supervised,
        targets=targets,
        in_question=in_question,
    )


@dataclass
class _Packed:
    """One row: a picture's prefix, then all its questions with their answers."""

    ids: list[int]
    segments: list[int]  # 0 for the shared prefix, then 1, 2, … for each question
    positions: list[tuple[int, int, int]]
    answers: list[list[int]]  # the columns of each answer's tokens
    supervised: list[_Supervised]


class _Supervised(NamedTuple):
    """A token's column, the columns that it should attend to, and whether these are words of the question."""

    column: int
    targets: list[int]
    in_question: bool = False


def _pack(family: TrainingFamily, picture: Picture | None, asked: list[Prompted]) -> _Packed:
    """One row of a batch."""
    ids, positions = family.prefix(None if picture is None else picture.image.size)
    packed = _Packed(list(ids), [0] * len(ids), list(positions), [], [])
    # Every question starts at the position after the prefix.
    start = 1 + max((max(position) for position in positions), default=-1)
    for number, prompted in enumerate(asked, 1):
        question = family.question(prompted.prompt, with_image=picture is not None)
        answer = family.tokenizer.encode(prompted.answer, add_special_tokens=False)
        ended = [*answer, family.tokenizer.eos_token_id]
        first = len(packed.ids) + len(question)
        if picture is not None:
            packed.supervised += _supervised(family, picture, prompted, question, answer, len(packed.ids))
        packed.answers.append(list(range(first, first + len(ended))))
        packed.ids += [*question, *ended]
        packed.segments += [number] * len(question + ended)
        packed.positions += [(start + n,) * 3 for n in range(len(question + ended))]
    return packed


def _supervised(
    family: TrainingFamily, picture: Picture, prompted: Prompted, question: list[int], answer: list[int], start: int
) -> list[_Supervised]:
    """The attention supervision of one question, which starts in column `start`, and its answer.

    A word that names something should attend to it. The token that predicts an answer token should attend to the word and,
    separately, to where the answer is. These are two demands: attending to the word alone would satisfy a single one, but
    it cannot tell the letters of a value apart. The token that predicts yes, no or an option's letter should also attend
    to the question's statement or to the right option.
    """
    demands, words = [], []
    for name, marks in named_marks(picture, prompted.question, prompted.part).items():
        if marks and (index := _word(family, question, name)) is not None:
            words.append(start + index)
            demands.append(_Supervised(words[-1], _visual_columns(family, picture, marks)))
    readable = answer_marks(picture, prompted.question, prompted.part, [family.tokenizer.decode([t]) for t in answer])
    asking = start + len(question) - 1
    for n, marks in enumerate(readable):
        if marks:
            targets = (_visual_columns(family, picture, marks), words)
            demands += [_Supervised(asking + n, columns) for columns in targets if columns]
    stated = [start + index for index in _token_indices(family, question, prompted.stated)]
    if stated:
        demands.append(_Supervised(asking, stated, in_question=True))
    if prompted.sort.startswith("yes/no") and prompted.sort != "yes/no OCR" and readable[0]:
        # The statement is compared with the picture, and its own words are good tokens to do this in.
        demands += [_Supervised(column, _visual_columns(family, picture, readable[0])) for column in stated]
    letters = [mark for mark in picture.marks if mark.letter]
    for text in _compared(prompted, "".join(mark.letter for mark in letters)):
        # An option starts with its own letter, which is not on the sign.
        pairs = zip(_token_indices(family, question, text)[-len(_letters(text)) :], letters, strict=False)
        demands += [_Supervised(start + index, _visual_columns(family, picture, [mark])) for index, mark in pairs]
    return demands


def _word(family: TrainingFamily, question: list[int], name: str) -> int | None:
    """The index in a question of the word for a label, in English or Chinese; None if there is none."""
    chinese = questions.CHINESE.get(name)
    tokens = [family.word(name)] + ([family.tokenizer.convert_tokens_to_ids(chinese)] if chinese else [])
    return next((index for index, token in enumerate(question) if token in tokens), None)


def _compared(prompted: Prompted, written: str) -> tuple[str, ...]:
    """The texts in a prompt that must be compared with a sign's text, letter by letter."""
    if prompted.sort == "yes/no OCR":
        return (prompted.stated,)
    return prompted.options if written and _letters(prompted.stated) == written else ()


def _letters(text: str) -> str:
    """The letters of a text or an option, without spaces and the option's own letter."""
    return text.split(". ")[-1].replace(" ", "")


def _token_indices(family: TrainingFamily, question: list[int], text: str) -> list[int]:
    """The indices of the tokens of `text` in a question; none if `text` is empty."""
    if not text:
        return []
    texts = [family.tokenizer.decode([token]) for token in question]
    ends = list(accumulate(map(len, texts)))
    first = "".join(texts).find(text)
    last = first + len(text)
    spans = zip(texts, ends, strict=True)
    return [
        index for index, (token, end) in enumerate(spans) if first < end and end - len(token) < last and token.strip()
    ]


def _visual_columns(family: TrainingFamily, picture: Picture, marks: list[Mark]) -> list[int]:
    """The columns of the visual tokens of some marks."""
    start = family.prefix(picture.image.size)[0].index(family.image_id)
    rows, columns = family.grid(picture.image.size)
    marked = torch.zeros((rows, columns), dtype=torch.bool)
    for mark in marks:
        marked[_tokens(family, picture, mark)] = True
    return [start + index for index in marked.flatten().nonzero().flatten().tolist()]
