"""Training: questions in one sequence equal separate ones, and an interrupted run resumes unchanged."""

from __future__ import annotations

import json
import random
from collections import Counter
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partialmethod
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from lmms_prune.demo import content, prompts
from lmms_prune.demo.checkpoints import Sizes
from lmms_prune.demo.content import Chart, Content, Form, NumberTable, Scene, Sign, Thing
from lmms_prune.demo.models import WEIGHTS
from lmms_prune.demo.pictures import draw
from lmms_prune.demo.training.__main__ import SIZES, export, main
from lmms_prune.demo.training.attention_supervision import AttentionSupervision, supervise_attention
from lmms_prune.demo.training.attention_targets import answer_marks, named_marks
from lmms_prune.demo.training.data import (
    LABELS,
    Prompted,
    QuestionBatches,
    ask,
    ask_to_compare,
    collate,
    dense_labels,
    some_content,
)
from lmms_prune.demo.training.families import TrainingFamily, TrainingLlava, new_family, take_encoder
from lmms_prune.demo.training.loop import Trainer, TrainingStage

COMMAND = typer.Typer()
COMMAND.command()(main)
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "intermediate": 48, "vision_hidden": 32, "vision_intermediate": 48}
KV_HEADS = {"llava": 2, "qwen2_5_vl": 1}
SECTIONS = {"llava": (), "qwen2_5_vl": (2, *[1] * 6)}
STAGES = [
    TrainingStage("tower", 3, 3, 0, 1e-2),
    TrainingStage("open", 1, 2, 3, 0.0, 1e-2, attention=1.0),
    TrainingStage("compare", 1, 2, 3, 0.0, 1e-2, attention=0.3, stated=0.3),
    TrainingStage("questions", 4, 2, 3, 1e-2, 1e-2, attention=0.1),
]


def small(name: str) -> TrainingFamily:
    """A fresh copy of an untrained small model. Drawing one takes seconds, because it trains a tokenizer."""
    return deepcopy(_drawn(name))


@lru_cache(maxsize=2)
def _drawn(name: str) -> TrainingFamily:
    sizes: Sizes = replace(SIZES[name], **SMALL, kv_heads=KV_HEADS[name], mrope_section=SECTIONS[name])
    rng = random.Random(0)
    prompted = [ask(rng, some_content(rng, "train"), "train") for _ in range(300)]
    return new_family(
        name, sizes, [text for question in prompted for text in (question.prompt, question.answer)], seed=0
    )


@pytest.fixture(params=sorted(SIZES))
def family(request: pytest.FixtureRequest) -> TrainingFamily:
    return small(request.param)


def _plain(prompt: str, answer: str) -> Prompted:
    return Prompted(prompt, answer, "", prompt)


def trainer(family: TrainingFamily, folder: Path) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(family, folder, STAGES, seed=0, device=torch.device("cpu"))


def test_questions_in_one_sequence_equal_separate_ones(family: TrainingFamily, tmp_path: Path) -> None:
    """The logits of every answer token equal those of a plain forward pass over the processor's prompt."""
    rng = random.Random(1)
    rows = []
    for draws in (content.scene, content.form, content.chart):
        picture = draw(rng, draws(rng, "train"))
        rows.append((picture, [ask(rng, picture.content, "train") for _ in range(3)]))
    rows.append((None, [_plain("Which of these is a colour?", "red"), _plain("And a shape?", "star")]))
    batch = collate(family, rows)
    family.model.eval()
    with torch.no_grad():
        packed = trainer(family, tmp_path / "run").logits(batch, family.features(batch.pixels)[0])
    answer = 0
    for picture, asked in rows:
        for prompted in asked:
            text = family._rendered(prompted.prompt, with_image=picture is not None) + prompted.answer
            images = None
            if picture is not None:
                images = [picture.image]
                if isinstance(family, TrainingLlava):
                    from lmms_prune.models.images import pad_to_square

                    images = [pad_to_square(picture.image, family.processor.image_processor.image_mean)]
            inputs = family.processor(text=[text], images=images, return_tensors="pt")
            tokens = family.tokenizer.encode(prompted.answer, add_special_tokens=False)
            with torch.no_grad():
                alone = family.model(**inputs).logits[0, -len(tokens) - 1 :]
            mine = packed[batch.answer == answer]
            assert batch.target[batch.answer == answer].tolist() == [*tokens, family.tokenizer.eos_token_id]
            torch.testing.assert_close(mine, alone, atol=2e-4, rtol=1e-4)
            answer += 1
    assert answer == len(batch.sorts)


def test_labels_are_at_their_tokens(family: TrainingFamily) -> None:
    """Letters label one token each, from left to right; a shape labels tokens in its own cell."""
    picture = draw(random.Random(0), SIGN)
    rows, columns = family.grid(picture.image.size)
    letters = dense_labels(family, picture)["letter"].reshape(rows, columns)
    assert "".join(LABELS["letter"][label] for label in letters[letters > 0].tolist()) == "KABO"
    picture = draw(random.Random(0), Scene((Thing("star", "blue", True, 2, 0),)))
    rows, columns = family.grid(picture.image.size)
    labels = {name: some.reshape(rows, columns) for name, some in dense_labels(family, picture).items()}
    assert labels["letter"].sum() == 0
    for name, text in (("kind", "star"), ("colour", "blue")):
        there = labels[name] > 0
        assert set(labels[name][there].tolist()) == {LABELS[name].index(text)}
        assert there.nonzero()[:, 0].max() < rows / 2
        assert there.nonzero()[:, 1].min() >= columns / 2


PAGE = Form((("NAME", "KURT"), ("ROOM", "512")))
TABLE = NumberTable((("BUS", (12, 34)), ("JET", (56, 78))))


@pytest.mark.parametrize(
    ("content", "question", "part", "answer", "expected"),
    [
        (
            Sign("words", ("KABO", "RI"), "red"),
            "What is written on the sign?",
            ("", ""),
            "KABO RI",
            [*"KABO", "", *"RI"],
        ),
        (Sign("sum", ("3+4=",), "red"), "What is the sum?", ("", ""), "7", ["3+4="]),
        (PAGE, "What is the room mentioned in the document?", ("ROOM", ""), "512", [*"512"]),
        (TABLE, "What is the eur of jet in the table?", ("JET", "EUR"), "78", [*"78"]),
        (TABLE, "What is the pcs of jet in the table?", ("JET", "PCS"), "B", ["56"]),
        (Chart((("CAR", 41), ("VAN", 52), ("JET", 63)), False), "What is the …", ("VAN", ""), "52", [*"52"]),
        (PAGE, "Read all the text.", ("", ""), "NAME KURT", ["NAMEKURTROOM512"] * 9),  # not all of it: no order
    ],
)
def test_an_answer_is_read_from_its_letters(
    content: Content, question: str, part: tuple[str, str], answer: str, expected: list[str]
) -> None:
    picture = draw(random.Random(0), content)
    token_marks = answer_marks(picture, question, part, list(answer) if len(answer) > 1 else [answer])
    assert ["".join(mark.letter for mark in marks) for marks in token_marks] == expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What colour is the star?", {"star": ["blue star"]}),
        ("Is there a red star in the image?", {"red": ["red cross"], "star": ["blue star"]}),
        ("图中红色的是什么形状？", {"red": ["red cross"]}),
        ("Is there a circle in the image?", {"circle": []}),
        ("How many shapes are there?", {}),
    ],
)
def test_words_of_a_question_name_shapes(question: str, expected: dict[str, list[str]]) -> None:
    picture = draw(random.Random(0), Scene((Thing("star", "blue", True, 2, 0), Thing("cross", "red", False, 0, 1))))
    named = named_marks(picture, question, ("", ""))
    assert {name: [f"{m.colour} {m.kind}" for m in marks] for name, marks in named.items()} == expected
    shapes = [f"{mark.colour} {mark.kind}" for mark in answer_marks(picture, question, ("", ""), ["x"])[0]]
    assert shapes == (
        [thing for things in expected.values() for thing in things] if expected else ["blue star", "red cross"]
    )


def test_a_predicting_token_attends_to_the_letter_and_to_the_word(family: TrainingFamily) -> None:
    """The word "room" attends to the value's visual tokens; each token that predicts a digit, to that digit and to "room"."""
    picture = draw(random.Random(0), PAGE)
    question = "What is the room mentioned in the document?"
    batch = collate(family, [(picture, [Prompted(question, "512", "form", question, ("ROOM", ""))])])
    start = batch.is_image[0].nonzero()[0].item()
    letters = dense_labels(family, picture)["letter"].tolist()
    shown = [start + letters.index(LABELS["letter"].index(digit)) for digit in "512"]
    word = batch.ids[0].tolist().index(family.word("ROOM"))
    looks = [
        (place, where.nonzero().flatten().tolist())
        for place, where in zip(batch.supervised[0].tolist(), batch.targets[0], strict=True)
    ]
    expected = [(word, sorted(shown))]
    for place, digit in zip(batch.asking[:3, 1].tolist(), shown, strict=True):
        expected += [(place, [digit]), (place, [word])]
    assert looks == expected


STAR = "What colour is the star?"
CHOICE = prompts.scienceqa(STAR, ["red", "blue", "green"], "Look at the picture.")
CHINESE_STAR = "图中星形是什么颜色？"
CHINESE_CHOICE = prompts.mmbench(CHINESE_STAR, ["红色", "蓝色"], "请看图。", chinese=True)


@pytest.mark.parametrize(
    ("prompted", "word", "stated"),
    [
        (Prompted(CHOICE, "B", "choice", STAR, stated="B. blue"), "star", "B. blue"),
        (Prompted(CHINESE_CHOICE, "B", "choice chinese", CHINESE_STAR, stated="B. 蓝色"), "星形", "B.蓝色"),
        (Prompted("Is the star blue?", "yes", "yes/no color", "Is the star blue?", stated="blue"), "star", "blue"),
        (Prompted("Is the star red?", "no", "yes/no color", "Is the star red?", stated="red"), "star", "red"),
        (Prompted(STAR, "blue", "attribute_recognition", STAR), "star", ""),
    ],
)
def test_a_predicting_token_attends_to_what_the_question_states(
    family: TrainingFamily, prompted: Prompted, word: str, stated: str
) -> None:
    """It attends to the right option with its letter or to the statement, and to the word for the shape."""
    picture = draw(random.Random(0), Scene((Thing("star", "blue", True, 2, 0),)))
    batch = collate(family, [(picture, [prompted])])
    asking = batch.asking[0, 1].item()
    looks = [
        (family.tokenizer.decode(batch.ids[0][targets]).strip(), in_question)
        for column, targets, in_question in zip(
            batch.supervised[0].tolist(), batch.targets[0], batch.in_question[0].tolist(), strict=True
        )
        if column == asking and targets.any() and not batch.is_image[0][targets].any()
    ]
    words = [text.replace(". ", ".") if text[0] in "AB" and "星" in word else text for text, _ in looks if text]
    assert words[0].split()[0] == word
    assert [text for text, in_question in looks if in_question] == ([stated] if stated else [])


@pytest.mark.parametrize(("truth", "answer"), [(True, "yes"), (False, "no")])
def test_a_pair_states_what_differs(truth: bool, answer: str) -> None:
    """The stated words are those that the pair's other question does not have."""
    scene, sorts = Scene((Thing("star", "blue", True, 2, 0), Thing("cross", "red", False, 0, 1))), set()
    for seed in range(200):
        asked = ask(random.Random(seed), scene, "train")
        if asked.sort in ("yes/no color", "yes/no count") and asked.answer == answer:
            sorts.add(asked.sort)
            assert asked.question.rstrip("?").split()[-1] == asked.stated
            assert (asked.stated in ("blue", "red", "2")) >= truth
    assert sorts == {"yes/no color", "yes/no count"}


SIGN = Sign("word", ("KABO",), "red")
WORDS = ("A. KULO", "B. KABO")


@pytest.mark.parametrize(
    ("prompted", "spelled"),
    [
        (Prompted(ASKED := "Is the word in the image KULO?", "no", "yes/no OCR", ASKED, stated="KULO"), "KULO"),
        (
            Prompted("Which?\nA. KULO\nB. KABO\n", "B", "choice", "Which?", stated="B. KABO", options=WORDS),
            "KULOKABO",
        ),
        # A colour is not spelled.
        (Prompted("Which?\nA. red\nB. blue\n", "A", "choice", "", stated="A. red", options=("A. red", "B. blue")), ""),
    ],
)
def test_the_letters_of_a_stated_word_attend_to_those_of_the_sign(
    family: TrainingFamily, prompted: Prompted, spelled: str
) -> None:
    picture = draw(random.Random(0), SIGN)
    batch = collate(family, [(picture, [prompted])])
    start = batch.is_image[0].nonzero()[0].item()
    letters = dense_labels(family, picture)["letter"].tolist()
    shown = [start + letters.index(LABELS["letter"].index(letter)) for letter in "KABO"]
    looks = [
        (place, family.tokenizer.decode([batch.ids[0][place]]).strip(), where.nonzero().flatten().tolist())
        for place, where in zip(batch.supervised[0].tolist(), batch.targets[0], strict=True)
        if place != batch.asking[0, 1].item() and where.any()
    ]
    looks = sorted(look for look in looks if look[1].isupper())
    assert [letter for _, letter, _ in looks] == list(spelled)
    assert [columns for _, _, columns in looks] == [[column] for column in shown] * (len(spelled) // 4)


@pytest.mark.parametrize(
    ("shown", "shares"),
    [
        (
            Scene((Thing("star", "blue", True, 2, 0), Thing("cross", "red", False, 0, 1))),
            {"position": 1.5, "count": 1.5},
        ),
        (SIGN, {"OCR": 1.4}),
    ],
)
def test_the_stage_of_comparisons_compares_more(shown: Content, shares: dict[str, float]) -> None:
    """It compares more often than the stage with all sorts, by the given factor."""
    comparing, mixed = (
        Counter(form(random.Random(seed), shown, "train").sort for seed in range(2000))
        for form in (ask_to_compare, ask)
    )
    for sort, times in shares.items():
        assert comparing[f"yes/no {sort}"] > times * mixed[f"yes/no {sort}"] > 0


def test_a_choice_knows_all_its_options() -> None:
    count = 0
    for seed in range(60):
        asked = ask(random.Random(seed), SIGN, "train")
        if asked.sort.startswith("choice"):
            count += 1
            assert asked.stated in asked.options
            assert [line for line in asked.prompt.splitlines() if line[1:3] == ". "] == list(asked.options)
    assert count


def test_attention_supervision_measures_attention(family: TrainingFamily) -> None:
    """Shares equal those computed from the library's attention matrices, and collecting them changes no logits."""
    rng = random.Random(3)
    rows = [(draw(rng, shown), [ask(rng, shown, "train") for _ in range(9)]) for shown in (SIGN, TABLE)]
    batch = collate(family, rows)
    runner = Trainer.__new__(Trainer)
    runner.family = family
    with torch.no_grad():
        features = family.features(batch.pixels)[0]
        plain = runner.logits(batch, features)
        supervise_attention(family.decoder)
        supervision = AttentionSupervision(batch.supervised, batch.targets)
        with supervision.collecting():
            assert torch.equal(runner.logits(batch, features), plain)
        family.decoder.config._attn_implementation = "eager"
        embedded = family.model.get_input_embeddings()(batch.ids)
        out = family.decoder(
            inputs_embeds=embedded.masked_scatter(batch.is_image[..., None], features),
            attention_mask=torch.zeros_like(batch.mask, dtype=torch.float).masked_fill(~batch.mask, -1e9),
            position_ids=batch.positions,
            output_attentions=True,
            use_cache=False,
        )
    for share, weights in zip(supervision.shares, out.attentions, strict=True):
        for row in range(2):
            expected = (weights[row][:, batch.supervised[row]] * batch.targets[row]).sum(-1)
            torch.testing.assert_close(share[row], expected, atol=1e-5, rtol=1e-4)
    shares, with_target = torch.cat(supervision.shares, 1).mean(1), batch.targets.any(-1)
    for among in (batch.in_question, ~batch.in_question):
        assert supervision.loss(among).item() == pytest.approx(-shares[with_target & among].log().mean().item())
    assert supervision.loss(torch.zeros_like(with_target)).item() == 0


def test_a_word_starts_with_one_embedding_with_and_without_a_space() -> None:
    family = small("llava")
    embedding = family.model.get_input_embeddings().weight
    count = 0
    for word in (*content.COLOURS, *content.KINDS):
        alone, after = (family.tokenizer.encode(text, add_special_tokens=False) for text in (word, f" {word}"))
        if len(alone) == len(after) == 1:
            count += 1
            assert alone != after
            assert torch.equal(embedding[alone[0]], embedding[after[0]])
    assert count


def test_capitals_and_digits_are_spelled(family: TrainingFamily) -> None:
    tokens = family.tokenizer.encode("KABO 1999", add_special_tokens=False)
    assert [
        family.tokenizer.decode([token]).strip() for token in tokens if family.tokenizer.decode([token]).strip()
    ] == [*"KABO1999"]


def test_a_batch_depends_on_its_number_alone(family: TrainingFamily) -> None:
    batches = [QuestionBatches(family, 0, 2, 2, "questions") for _ in range(2)]
    first, same = batches[0][5], [batches[1][n] for n in (3, 5)][1]
    assert first.ids.equal(same.ids)
    assert first.pixels["pixel_values"].equal(same.pixels["pixel_values"])
    assert not first.ids.equal(QuestionBatches(family, 0, 2, 2, "questions", "test")[5].ids)


@pytest.mark.parametrize("name", sorted(SIZES))
def test_an_interrupted_training_resumes_unchanged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Drawing forty batches of held-out pictures would take most of the time.
    monkeypatch.setattr(Trainer, "_evaluate", partialmethod(Trainer._evaluate, batches=6))
    uninterrupted = small(name)
    assert trainer(uninterrupted, tmp_path / "whole").run(None, 0)
    parted = small(name)
    rounds = 0
    while not trainer(parted, tmp_path / "parted").run(0.0, 0):  # one step each time
        rounds += 1
        parted = small(name)
    assert rounds >= 5
    for (key, one), two in zip(
        uninterrupted.model.state_dict().items(), parted.model.state_dict().values(), strict=True
    ):
        assert torch.equal(one, two), key
    held_out = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert "patch letter" in held_out[0]["held out"]
    assert "form" in held_out[-1]["held out"]


def test_training_lowers_the_loss(family: TrainingFamily, tmp_path: Path) -> None:
    """One repeated batch can be memorised completely."""
    runner = trainer(family, tmp_path / "run")
    runner.stage = len(STAGES) - 1
    runner.optimizer = runner._optimizer()
    for group in runner.optimizer.param_groups:
        group["lr"] = 1e-2
    batch = QuestionBatches(family, 0, 2, 2, "questions")[1]
    losses = [runner._learn(STAGES[-1], batch)["loss"] for _ in range(25)]
    assert losses[-1] < losses[0] / 3


def test_each_stage_trains_its_own_part(family: TrainingFamily, tmp_path: Path) -> None:
    """The first trains the vision encoder and the projector, the next ones the decoder, the last everything."""
    for number, stage in enumerate(STAGES):
        before = {name: value.clone() for name, value in family.model.state_dict().items()}
        runner = trainer(family, tmp_path / stage.name)
        runner.stage, runner.step = number, 1
        runner.optimizer = runner._optimizer()
        runner._set_rates(stage)
        runner._learn(stage, QuestionBatches(family, 0, 2, stage.each, stage.name)[1])
        changed = {name for name, value in family.model.state_dict().items() if not value.equal(before[name])}
        encoder = {name for name in changed if "vision_tower" in name or "visual" in name or "projector" in name}
        assert bool(encoder) == (stage.encoder_rate > 0)
        assert bool(changed - encoder) == (stage.rate > 0)


def test_a_training_with_other_settings_is_refused(family: TrainingFamily, tmp_path: Path) -> None:
    runner = trainer(family, tmp_path / "run")
    runner._save()
    faster = [*STAGES[:-1], replace(STAGES[-1], rate=0.5)]
    with pytest.raises(
        ValueError, match=r"other settings: origin was  and is elsewhere; questions\.rate was 0\.01 and is 0\.5$"
    ):
        Trainer(family, tmp_path / "run", faster, seed=0, device=torch.device("cpu"), origin="elsewhere")
    with pytest.raises(ValueError, match=r"other settings: open\.name was open and is None"):
        Trainer(family, tmp_path / "run", STAGES[:1], seed=0, device=torch.device("cpu"))


def test_a_damaged_state_is_named(family: TrainingFamily, tmp_path: Path) -> None:
    runner = trainer(family, tmp_path / "run")
    runner._save()
    runner.state.write_bytes(runner.state.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"state\.pt is damaged: delete it to begin anew"):
        trainer(family, tmp_path / "run")


def test_a_stopped_training_saves_its_state(family: TrainingFamily, tmp_path: Path) -> None:
    runner = trainer(family, tmp_path / "run")
    runner.stop()
    assert not runner.run(None, 0)
    assert trainer(family, tmp_path / "run").step == 1


def test_another_vision_encoder_is_refused(tmp_path: Path) -> None:
    export(small("llava"), tmp_path / "model")
    with pytest.raises(ValueError, match="is not one of qwen2_5_vl in this size: it has "):
        take_encoder(small("qwen2_5_vl"), tmp_path / "model")
    before = small("llava")
    take_encoder(before, tmp_path / "model")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lava"], "family 'lava' is unknown"),
        (["qwen2_5_vl", "--start", str(WEIGHTS / "tiny-llava")], "holds a llava"),
        (["llava", "--start", "/nowhere"], "does not exist"),
        (["llava", "--rate", "-1"], "Invalid value for '--rate': Input should be greater"),
        (["llava", "--minutes", "-3"], "Invalid value for '--minutes': Input should be greater"),
    ],
)
def test_a_mistake_in_the_training_command_is_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(COMMAND, [arguments[0], str(tmp_path / "run"), *arguments[1:]])
    assert done.exit_code == 2
    assert message in " ".join(done.output.replace("│", " ").split())


def test_the_training_command_reports_its_step_and_resumes(tmp_path: Path) -> None:
    steps = ["--encoder-steps", "1", "--open-steps", "1", "--compare-steps", "1", "--steps", "1"]
    begin = ["--start", str(WEIGHTS / "tiny-llava"), "--pictures", "2", "--questions", "1"]
    command = ["llava", str(tmp_path / "run"), *steps, *begin]
    stopped = CliRunner().invoke(COMMAND, [*command, "--minutes", "0"])
    assert stopped.exit_code == 0, stopped.output
    assert "stopped in stage 1 at step 1; the same command resumes" in stopped.output
    other = CliRunner().invoke(COMMAND, [*command, "--rate", "0.5"])
    assert other.exit_code == 2
    assert "tower.tower_rate was 0.0015 and is 0.75" in other.output
    (tmp_path / "file").touch()
    blocked = CliRunner().invoke(COMMAND, ["llava", str(tmp_path / "file"), *begin])
    assert blocked.exit_code == 2
    assert "file" in blocked.output


def test_an_exported_model_is_read_by_the_library(family: TrainingFamily, tmp_path: Path) -> None:
    export(family, tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.bfloat16
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[text], images=[draw(random.Random(0), Form((("NAME", "KURT"),))).image], return_tensors="pt"
    )
    ids = model.generate(**inputs.to(torch.bfloat16), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]
