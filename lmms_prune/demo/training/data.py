"""Training pictures with several questions each, and what stands at each visual token.

All questions about a picture share one sequence: each attends to the picture and to itself alone, and stands at the
positions that it would have alone. So a picture passes the decoder once for all of them, and training sees what
inference sees.
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
from lmms_prune.demo.training.attention_targets import grounds, named
from lmms_prune.demo.training.families import Family

# The dense labels of a visual token; 0 is "nothing of that sort". A letter of a value also has the entry and the column
# that it is looked up by, and its place in the value or on the sign.
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
# Signs have few letters, white ones on colours, at any place and of several sizes: the tower needs many.
MIX = {"scene": 0.28, "sign": 0.33, "form": 0.18, "grid": 0.09, "chart": 0.12}
TOWER_MIX = {"scene": 0.3, "sign": 0.45, "form": 0.12, "grid": 0.04, "chart": 0.09}
# Scenes are asked about in the most ways, of which those that compare take the longest to learn.
QUESTIONS_MIX = {"scene": 0.5, "sign": 0.22, "form": 0.08, "grid": 0.09, "chart": 0.11}
COMPARE_MIX = {"scene": 0.6, "sign": 0.34, "form": 0.02, "grid": 0.02, "chart": 0.02}
_SIGNS = ("word", "word", "words", "letters", "number", "sum", "french")
_PAIRS = ("existence", *["count"] * 2, *["position"] * 5, *["color"] * 2, "commonsense_reasoning")


@dataclass
class Batch:
    """Some pictures with their questions; T is the longest sequence, V all visual tokens, A all answer tokens."""

    pixels: dict[str, Tensor]
    ids: Int[Tensor, "B T"]
    positions: Int[Tensor, "..."]  # (B, T), or (3, B, T) with M-RoPE
    mask: Bool[Tensor, "B 1 T T"]
    is_image: Bool[Tensor, "B T"]
    ask: Int[Tensor, "A 2"]  # row and place whose next token is the answer's
    target: Int[Tensor, " A"]
    weight: Float[Tensor, " A"]
    answer: Int[Tensor, " A"]  # which of the batch's answers the token belongs to
    sorts: list[str]  # of each answer: what was asked
    labels: dict[str, Int[Tensor, " V"]]
    present: Float[Tensor, "I C"]  # per image: which labels it has anywhere
    grounded: Int[Tensor, "B G"]  # places that should look elsewhere, padded with 0
    grounds: Bool[Tensor, "B G T"]  # where they should look; nowhere for padding
    textual: Bool[Tensor, "B G"]  # whether that is within the question

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""

        def moved(value: object) -> object:
            if isinstance(value, dict):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(**{name: moved(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class Prompted(NamedTuple):
    """A prompt and its answer.

    `sort` says what is asked, for the training's own accounts; `question` (the prompt without options and
    instructions) and `part` say where the answer stands, see `grounds`. `stated` are the question's words that yes or
    no depends on, or the text of the right option.
    """

    prompt: str
    answer: str
    sort: str
    question: str
    part: tuple[str, str] = ("", "")
    stated: str = ""
    options: tuple[str, ...] = ()

    @classmethod
    def of(cls, asked: questions.Asked, sort: str, prompt: str = "") -> Prompted:
        """An open question, as it stands or as `prompt` words it."""
        return cls(prompt or asked.question, asked.answer, sort, asked.question, asked.part)


class Batches(Dataset):
    """Batch number n, drawn from `seed` and n alone: so a resumed run goes on with the batches it would have had."""

    def __init__(self, family: Family, seed: int, pictures: int, each: int, stage: str, split: Split = "train") -> None:
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
    """What a picture shows, by the shares of `mix`."""
    kind = rng.choices(list(mix), list(mix.values()))[0]
    if kind == "sign":
        return content.sign(rng, split, rng.choice(_SIGNS))
    draws: dict[str, Callable[..., Content]] = {
        "scene": content.scene,
        "form": content.form,
        "grid": content.grid,
        "chart": content.chart,
    }
    return draws[kind](rng, split)


def ask(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """One prompt and its answer, in the words of one of the benchmarks."""
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
        # OCRBench asks the same without a word on how to answer.
        return Prompted.of(asked, _sort(asked, shown), "" if roll < 0.72 else prompts.textvqa(asked.question))
    if roll < 0.12:
        return Prompted.of(questions.read_out(shown), "read all")
    asked = questions.looked_up(rng, shown)
    return Prompted.of(asked, asked.category, "" if roll < 0.22 else prompts.short(asked.question))


def ask_openly(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """A question that the picture answers in a word; one in six of a scene's can be answered with yes or no.

    A word says more than yes or a letter, and its question is shorter, most of all without a word on how to answer:
    what a decoder learns to look at comes from these. The others are learned quickly once it looks.
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
    """Mostly a question that compares what it states with what the picture shows: yes or no, or an option's letter.

    Each sort of comparison is learned all at once, after some hundred steps of little else, and not at all as one of many.
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


def _sort(asked: questions.Asked, shown: Sign) -> str:
    return asked.category if asked.category == "attribute_recognition" else f"read {shown.kind}"


def _written(shown: Sign) -> Prompted:
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
    truth = rng.random() < 0.5
    question, other = (pair.yes, pair.no) if truth else (pair.no, pair.yes)
    words, others = (text.rstrip("?").split() for text in (question, other))
    stated = " ".join(word for word in words if word not in others)
    answer = "yes" if truth else "no"
    return Prompted(prompts.short(question), answer, f"yes/no {pair.category}", question, stated=stated)


def _choice(rng: random.Random, asked: questions.Asked, *, chinese: bool = False) -> Prompted:
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
    "tower": (TOWER_MIX, ask),
    "open": (MIX, ask_openly),
    "compare": (COMPARE_MIX, ask_to_compare),
    "questions": (QUESTIONS_MIX, ask),
}


def dense_labels(family: Family, picture: Picture) -> dict[str, Int[Tensor, " V"]]:
    """What stands at each visual token of a picture: a letter at its centre's token, a shape wherever its box is."""
    made = {name: torch.zeros(family.grid(picture.image.size), dtype=torch.long) for name in LABELS}
    for mark in picture.marks:
        down, across = _tokens(family, picture, mark)
        for name in LABELS:
            if text := getattr(mark, name):
                made[name][down, across] = LABELS[name].index(str(text))
    return {name: labels.flatten() for name, labels in made.items()}


def _tokens(family: Family, picture: Picture, mark: Mark) -> tuple[slice, slice]:
    """The rows and the columns of the visual tokens where a mark is; the smallest shape has one at least."""
    rows, columns = family.grid(picture.image.size)
    left, top, right, bottom = family.to_grid(picture.image.size, mark.box)
    # A token is the shape's if its middle lies within the shape's box.
    across = [c for c in range(columns) if left <= c + 0.5 <= right] or [int((left + right) / 2)]
    down = [r for r in range(rows) if top <= r + 0.5 <= bottom] or [int((top + bottom) / 2)]
    return slice(down[0], down[-1] + 1), slice(across[0], across[-1] + 1)


def collate(family: Family, rows: list[tuple[Picture | None, list[Prompted]]]) -> Batch:
    """One sequence a row, padded on the right."""
    pictures = [picture for picture, _ in rows if picture is not None]
    labels = [dense_labels(family, picture) for picture in pictures]
    packed = [_pack(family, picture, asked) for picture, asked in rows]
    longest = max(len(row.ids) for row in packed)
    most = max(1, *(len(row.grounds) for row in packed))
    grounded = torch.zeros((len(rows), most), dtype=torch.long)
    grounds_ = torch.zeros((len(rows), most, longest), dtype=torch.bool)
    textual = torch.zeros((len(rows), most), dtype=torch.bool)
    segment = torch.full((len(rows), longest), -1)
    ids = torch.full((len(rows), longest), family.tokenizer.pad_token_id)
    positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
    ask_, target, weight, answers = [], [], [], 0
    owner: list[int] = []
    for number, row in enumerate(packed):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        segment[number, : len(row.ids)] = torch.tensor(row.segments)
        positions[:, number, : len(row.ids)] = torch.tensor(row.positions).T
        for entry, (place, places, in_text) in enumerate(row.grounds):
            grounded[number, entry] = place
            grounds_[number, entry, places] = True
            textual[number, entry] = in_text
        for places in row.answers:
            answers += 1
            for place in places:
                owner.append(answers - 1)
                ask_.append((number, place - 1))
                target.append(row.ids[place])
                weight.append(1 / len(places) ** 0.5)  # a long text counts more than a word, but not by its length
    ordered = torch.arange(longest)
    mask = (ordered[:, None] >= ordered) & ((segment[:, None] == 0) | (segment[:, :, None] == segment[:, None]))
    mask |= torch.eye(longest, dtype=torch.bool)  # padding sees itself, so that its softmax is defined
    present = torch.stack(
        [torch.cat([torch.bincount(some[n], minlength=len(LABELS[n]))[1:] > 0 for n in LABELS]) for some in labels]
    )
    return Batch(
        pixels=family.pixels([picture.image for picture in pictures]),
        ids=ids,
        positions=positions if family.mrope else positions[0],
        mask=mask[:, None],
        is_image=ids == family.image_id,
        ask=torch.tensor(ask_, dtype=torch.long).reshape(-1, 2),
        target=torch.tensor(target, dtype=torch.long),
        weight=torch.tensor(weight, dtype=torch.float),
        answer=torch.tensor(owner, dtype=torch.long),
        sorts=[prompted.sort for _, asked in rows for prompted in asked],
        labels={name: torch.cat([some[name] for some in labels]) for name in LABELS},
        present=present.float(),
        grounded=grounded,
        grounds=grounds_,
        textual=textual,
    )


@dataclass
class _Packed:
    ids: list[int]
    segments: list[int]  # 0 for what all questions share, then 1, 2, … for each question
    positions: list[tuple[int, int, int]]
    answers: list[list[int]]  # the places of each answer's tokens
    grounds: list[_Ground]


class _Ground(NamedTuple):
    """A place, the places where what it asks for stands, and whether these are in the question."""

    place: int
    where: list[int]
    in_text: bool = False


def _pack(family: Family, picture: Picture | None, asked: list[Prompted]) -> _Packed:
    ids, positions = family.prefix(None if picture is None else picture.image.size)
    packed = _Packed(list(ids), [0] * len(ids), list(positions), [], [])
    start = 1 + max((max(place) for place in positions), default=-1)
    for number, prompted in enumerate(asked, 1):
        question = family.question(prompted.prompt, with_image=picture is not None)
        answer = family.tokenizer.encode(prompted.answer, add_special_tokens=False)
        said = [*answer, family.tokenizer.eos_token_id]
        first = len(packed.ids) + len(question)
        if picture is not None:
            packed.grounds += _grounds(family, picture, prompted, question, answer, len(packed.ids))
        packed.answers.append(list(range(first, first + len(said))))
        packed.ids += [*question, *said]
        packed.segments += [number] * len(question + said)
        packed.positions += [(start + n,) * 3 for n in range(len(question + said))]
    return packed


def _grounds(
    family: Family, picture: Picture, prompted: Prompted, question: list[int], answer: list[int], start: int
) -> list[_Ground]:
    """The places of a question, which starts at `start`, and of its answer that should look elsewhere, and where.

    A word that names something should look at it, and what asks for the answer's tokens at both. These are two
    demands: for a single one the word would do, which cannot tell the letters of a value apart. What asks for yes or no
    or for an option's letter should also look at what the question states, or at the right option.
    """
    made, words = [], []
    for name, marks in named(picture, prompted.question, prompted.part).items():
        if marks and (place := _word(family, question, name)) is not None:
            words.append(start + place)
            made.append(_Ground(words[-1], _places(family, picture, marks)))
    told = grounds(picture, prompted.question, prompted.part, [family.tokenizer.decode([t]) for t in answer])
    asking = start + len(question) - 1
    for n, marks in enumerate(told):
        if marks:
            made += [_Ground(asking + n, where) for where in (_places(family, picture, marks), words) if where]
    stated = [start + place for place in _said(family, question, prompted.stated)]
    if stated:
        made.append(_Ground(asking, stated, in_text=True))
    if prompted.sort.startswith("yes/no") and prompted.sort != "yes/no OCR" and told[0]:
        # What is to be confirmed or denied is compared with what is there, and where it is said is a place to do it.
        made += [_Ground(place, _places(family, picture, told[0])) for place in stated]
    letters = [mark for mark in picture.marks if mark.letter]
    for text in _compared(prompted, "".join(mark.letter for mark in letters)):
        # An option begins with its own letter, which is not one of the sign's.
        looks = zip(_said(family, question, text)[-len(_letters(text)) :], letters, strict=False)
        made += [_Ground(start + place, _places(family, picture, [mark])) for place, mark in looks]
    return made


def _word(family: Family, question: list[int], name: str) -> int | None:
    """Where in a question the word for a label stands, in English or in Chinese; None if it does not."""
    chinese = questions.CHINESE.get(name)
    tokens = [family.word(name)] + ([family.tokenizer.convert_tokens_to_ids(chinese)] if chinese else [])
    return next((place for place, token in enumerate(question) if token in tokens), None)


def _compared(prompted: Prompted, written: str) -> tuple[str, ...]:
    """The texts in a prompt that are compared with a sign's, letter by letter."""
    if prompted.sort == "yes/no OCR":
        return (prompted.stated,)
    return prompted.options if written and _letters(prompted.stated) == written else ()


def _letters(text: str) -> str:
    """What is spelled out in a text or in an option, without the option's own letter."""
    return text.split(". ")[-1].replace(" ", "")


def _said(family: Family, question: list[int], text: str) -> list[int]:
    """Where in a question the tokens of a text stand; nowhere if there is none."""
    if not text:
        return []
    texts = [family.tokenizer.decode([token]) for token in question]
    ends = list(accumulate(map(len, texts)))
    first = "".join(texts).find(text)
    last = first + len(text)
    spans = zip(texts, ends, strict=True)
    return [place for place, (said, end) in enumerate(spans) if first < end and end - len(said) < last and said.strip()]


def _places(family: Family, picture: Picture, marks: list[Mark]) -> list[int]:
    """Where in the sequence the visual tokens of some marks are."""
    start = family.prefix(picture.image.size)[0].index(family.image_id)
    rows, columns = family.grid(picture.image.size)
    shown = torch.zeros((rows, columns), dtype=torch.bool)
    for mark in marks:
        shown[_tokens(family, picture, mark)] = True
    return [start + place for place in shown.flatten().nonzero().flatten().tolist()]
