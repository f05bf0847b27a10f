"""Training pictures with several questions each, and what stands at each visual token.

All questions about a picture share one sequence: each attends to the picture and to itself alone, and stands at the
positions that it would have alone. So a picture passes the decoder once for all of them, and training sees what
inference sees.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from lmms_prune.demo import content, prompts, questions
from lmms_prune.demo.content import COLOURS, KINDS, SYMBOLS, Content, Scene, Sign, Split
from lmms_prune.demo.pictures import Picture, draw
from lmms_prune.demo.training.families import Family

# The dense labels of a visual token; 0 is "nothing of that sort".
LABELS = {
    "kind": ("", *KINDS, "board", "bar"),
    "colour": ("", *COLOURS),
    "letter": ("", *SYMBOLS),
}
# Signs have few letters, white ones on colours, at any place and of several sizes: the tower needs many.
MIX = {"scene": 0.4, "sign": 0.26, "form": 0.16, "grid": 0.07, "chart": 0.11}
TOWER_MIX = {"scene": 0.2, "sign": 0.55, "form": 0.12, "grid": 0.04, "chart": 0.09}
_SIGNS = ("word", "word", "words", "letters", "number", "sum", "french")


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

    def to(self, device: torch.device) -> Batch:
        """The same on `device`."""

        def moved(value: object) -> object:
            if isinstance(value, dict):
                return {name: tensor.to(device) for name, tensor in value.items()}
            return value.to(device) if isinstance(value, Tensor) else value

        return Batch(**{name: moved(value) for name, value in vars(self).items()})  # type: ignore[arg-type]


class Prompted(NamedTuple):
    """A prompt and its answer; `sort` says what is asked, for the training's own accounts."""

    prompt: str
    answer: str
    sort: str


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
            rows[-1] = (None, [_choice(rng, questions.without_image(rng)) for _ in range(self.each)])
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
            return Prompted("What is written in the image?", questions.read_out(shown).answer, f"read {shown.kind}")
        asked = questions.about(rng, shown, split)
        sort = "attribute" if asked.category == "attribute_recognition" else f"read {shown.kind}"
        # OCRBench asks the same without a word on how to answer.
        return Prompted(asked.question if roll < 0.72 else prompts.textvqa(asked.question), asked.answer, sort)
    if roll < 0.12:
        read = questions.read_out(shown)
        return Prompted(read.question, read.answer, "read all")
    asked = questions.looked_up(rng, shown)
    if roll < 0.22:
        return _choice(rng, asked)
    return Prompted(asked.question if roll < 0.32 else prompts.short(asked.question), asked.answer, asked.category)


def ask_shape(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """A colour or a shape of a scene, without a word on how to answer: the shortest way to learn to look."""
    assert isinstance(shown, Scene)
    asked = questions.attribute(rng, shown)
    return Prompted(asked.question, asked.answer, "attribute")


def ask_openly(rng: random.Random, shown: Content, split: Split) -> Prompted:
    """A question that the picture answers in a word; one in six can be answered with yes or no.

    A word says more than yes or a letter, and its question is shorter, most of all without a word on how to answer:
    what a decoder learns to look at comes from these. The others are learned quickly once it looks.
    """
    plain = rng.random() < 0.75
    if isinstance(shown, Scene):
        if rng.random() < 0.17:
            asked, sort = questions.present(rng, shown, rng.random() < 0.5, "random"), "yes/no random"
        else:
            asked, sort = questions.about(rng, shown, split), "attribute"
        return Prompted(asked.question if plain else prompts.short(asked.question), asked.answer, sort)
    if isinstance(shown, Sign):
        asked = questions.about(rng, shown, split)
        sort = "attribute" if asked.category == "attribute_recognition" else f"read {shown.kind}"
        if rng.random() < 0.5:
            return Prompted("What is written in the image?", questions.read_out(shown).answer, f"read {shown.kind}")
        return Prompted(asked.question if plain else prompts.textvqa(asked.question), asked.answer, sort)
    if rng.random() < 0.1:
        read = questions.read_out(shown)
        return Prompted(read.question, read.answer, "read all")
    asked = questions.looked_up(rng, shown)
    return Prompted(asked.question if plain else prompts.short(asked.question), asked.answer, asked.category)


def _ask_scene(rng: random.Random, shown: Scene, split: Split) -> Prompted:
    roll, truth = rng.random(), rng.random() < 0.5
    if roll < 0.25 and (both := questions.pair(rng, shown, split)):
        return _yes_or_no(rng, both)
    if roll < 0.42:
        category = rng.choice(("random", "popular", "adversarial", "adversarial"))
        asked = questions.present(rng, shown, truth, category)
        return Prompted(prompts.short(asked.question), asked.answer, f"yes/no {category}")
    if roll < 0.52 and (relation := questions.relation(rng, shown, truth)):
        return Prompted(prompts.short(relation.question), relation.answer, "yes/no position")
    if roll < 0.72:
        asked = questions.about(rng, shown, split)
        return Prompted(prompts.short(asked.question), asked.answer, "attribute")
    if roll < 0.86:
        return _choice(rng, questions.about(rng, shown, split))
    return _choice(rng, questions.in_chinese(rng, shown), chinese=True)


def _yes_or_no(rng: random.Random, pair: questions.Pair) -> Prompted:
    truth = rng.random() < 0.5
    return Prompted(prompts.short(pair.yes if truth else pair.no), "yes" if truth else "no", f"yes/no {pair.category}")


def _choice(rng: random.Random, asked: questions.Asked, *, chinese: bool = False) -> Prompted:
    wrong = [text for text in dict.fromkeys(asked.wrong) if text != asked.answer][: rng.randint(1, 3)]
    options = rng.sample([asked.answer, *wrong], 1 + len(wrong))
    letter = "ABCD"[options.index(asked.answer)]
    if chinese:
        prompt = prompts.mmbench(asked.question, options, rng.choice(("请看图。", "nan")), chinese=True)
        return Prompted(prompt, letter, "choice chinese")
    form = rng.choice((prompts.scienceqa, prompts.mmbench))
    return Prompted(form(asked.question, options, rng.choice(("Look at the picture.", ""))), letter, "choice")


STAGES = {
    "tower": (TOWER_MIX, ask),
    "shapes": ({"scene": 1.0}, ask_shape),
    "open": (MIX, ask_openly),
    "questions": (MIX, ask),
}


def dense_labels(family: Family, picture: Picture) -> dict[str, Int[Tensor, " V"]]:
    """What stands at each visual token of a picture: a letter at its centre's token, a shape wherever its box is."""
    rows, columns = family.grid(picture.image.size)
    made = {name: torch.zeros(rows, columns, dtype=torch.long) for name in LABELS}
    for mark in picture.marks:
        left, top, right, bottom = family.to_grid(picture.image.size, mark.box)
        if mark.letter:
            made["letter"][int((top + bottom) / 2), int((left + right) / 2)] = LABELS["letter"].index(mark.letter)
            continue
        # A token is the shape's if its middle lies within the shape's box; the smallest shape has one at least.
        across = [c for c in range(columns) if left <= c + 0.5 <= right] or [int((left + right) / 2)]
        down = [r for r in range(rows) if top <= r + 0.5 <= bottom] or [int((top + bottom) / 2)]
        for name, text in (("kind", mark.kind), ("colour", mark.colour)):
            made[name][down[0] : down[-1] + 1, across[0] : across[-1] + 1] = LABELS[name].index(text)
    return {name: labels.flatten() for name, labels in made.items()}


def collate(family: Family, rows: list[tuple[Picture | None, list[Prompted]]]) -> Batch:
    """One sequence a row, padded on the right."""
    pictures = [picture for picture, _ in rows if picture is not None]
    labels = [dense_labels(family, picture) for picture in pictures]
    packed = [_pack(family, picture, asked) for picture, asked in rows]
    longest = max(len(row.ids) for row in packed)
    segment = torch.full((len(rows), longest), -1)
    ids = torch.full((len(rows), longest), family.tokenizer.pad_token_id)
    positions = torch.zeros((3, len(rows), longest), dtype=torch.long)
    ask_, target, weight, answers = [], [], [], 0
    owner: list[int] = []
    for number, row in enumerate(packed):
        ids[number, : len(row.ids)] = torch.tensor(row.ids)
        segment[number, : len(row.ids)] = torch.tensor(row.segments)
        positions[:, number, : len(row.ids)] = torch.tensor(row.positions).T
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
    )


@dataclass
class _Packed:
    ids: list[int]
    segments: list[int]  # 0 for what all questions share, then 1, 2, … for each question
    positions: list[tuple[int, int, int]]
    answers: list[list[int]]  # the places of each answer's tokens


def _pack(family: Family, picture: Picture | None, asked: list[Prompted]) -> _Packed:
    ids, positions = family.prefix(None if picture is None else picture.image.size)
    packed = _Packed(list(ids), [0] * len(ids), list(positions), [])
    start = 1 + max((max(place) for place in positions), default=-1)
    for number, (prompt, answer, _) in enumerate(asked, 1):
        question = family.question(prompt, with_image=picture is not None)
        said = [*family.tokenizer.encode(answer, add_special_tokens=False), family.tokenizer.eos_token_id]
        first = len(packed.ids) + len(question)
        packed.answers.append(list(range(first, first + len(said))))
        packed.ids += [*question, *said]
        packed.segments += [number] * len(question + said)
        packed.positions += [(start + n,) * 3 for n in range(len(question + said))]
    return packed
