"""The demo data: checkpoints that load and use the image, and benchmarks that `datasets` reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from built import BUILDERS, Checkpoint, Mirror
from datasets import get_dataset_config_names, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_prune.demo.benchmarks import TASKS, build_mirror
from lmms_prune.demo.checkpoints import build_llava, build_qwen2_5_vl
from lmms_prune.demo.content import scene
from lmms_prune.demo.folders import new_folder
from lmms_prune.demo.language import ANSWERS
from lmms_prune.demo.pictures import draw
from lmms_prune.demo.tables import seeded

QUESTION = "What colour is the square?\nAnswer the question using a single word or phrase."
SPLITS = (
    ("lmms-lab-encoder/MME", None, ["test"]),
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", ["test"]),
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", ["test"]),
    ("lmms-lab-encoder/POPE", None, ["test"]),
    ("lmms-lab-encoder/POPE", "Full", ["adversarial", "popular", "random"]),
    ("lmms-lab-encoder/textvqa", None, ["validation", "test"]),
    ("lmms-lab-encoder/MMBench", "en", ["dev", "test"]),
    ("lmms-lab-encoder/MMBench", "cn", ["dev", "test"]),
    ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", ["testdev"]),
    ("lmms-lab-encoder/DocVQA", "DocVQA", ["validation", "test"]),
    ("lmms-lab-encoder/DocVQA", "InfographicVQA", ["validation", "test"]),
    ("echo840/OCRBench", None, ["test"]),
)


@pytest.fixture(scope="module", params=sorted(BUILDERS))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def loaded(family: str, checkpoint: Checkpoint):
    folder = checkpoint(family)
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def _inputs(processor, image, question: str = QUESTION):
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return processor(images=[image], text=[text], return_tensors="pt")


def _pictures(count: int) -> list:
    rngs = [seeded(0, "test", str(number)) for number in range(count)]
    return [draw(rng, scene(rng, "test", 2)).image.resize((336, 224)) for rng in rngs]


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


# LLaVA-NeXT: the base's 16 patches, and of two by two tiles the 6 x 8 that show the image, each row with a newline token.
VISUAL = {"llava": 64, "qwen3_vl": 70, "llava_next": 16 + 6 * (8 + 1)}


def test_one_visual_token_per_patch_or_merged_patch(family, loaded):
    model, processor = loaded
    ids = _inputs(processor, _pictures(1)[0])["input_ids"]
    assert int((ids == model.config.image_token_id).sum()) == VISUAL.get(family, 12 * 8)


def test_first_logits_depend_on_image_and_question(loaded):
    model, processor = loaded
    shown, other = _pictures(2)
    with torch.no_grad():
        first = model(**_inputs(processor, shown)).logits[0, -1]
        other_image = model(**_inputs(processor, other)).logits[0, -1]
        other_question = model(**_inputs(processor, shown, "Is there a star in the image?")).logits[0, -1]
    assert (first - other_image).abs().max() > 0.1
    assert (first - other_question).abs().max() > 0.1


def test_answers_are_short_scorable_and_various(loaded):
    model, processor = loaded
    answers = set()
    for image in _pictures(8):
        inputs = _inputs(processor, image)
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
        words = [processor.tokenizer.decode([token]) for token in output[:-1].tolist()]
        assert output[-1] == processor.tokenizer.eos_token_id
        assert 1 <= len(words) <= 8
        assert set(words) <= set(ANSWERS)
        answers.add("".join(words))
    assert len(answers) > 1


def test_same_seed_same_weights_and_the_global_random_state_is_untouched(family, checkpoint, tmp_path):
    before = torch.random.get_rng_state()
    again = BUILDERS[family](tmp_path / "again")
    other = BUILDERS[family](tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert _weights(again) == _weights(checkpoint(family)) != _weights(other)


def test_dtype_and_layers_are_the_requested_ones(family, tmp_path):
    folder = BUILDERS[family](tmp_path / "half", layers=2, dtype=torch.bfloat16)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.text_config.num_hidden_layers == 2


def test_qwen_has_windows_and_three_rotary_sections(tmp_path):
    config = AutoModelForImageTextToText.from_pretrained(build_qwen2_5_vl(tmp_path / "qwen")).config
    assert list(config.vision_config.fullatt_block_indexes) == [1, 3]
    assert sum(config.text_config.rope_parameters["mrope_section"]) == 64 // 4 // 2


def test_llava_size_and_template(tmp_path):
    folder = build_llava(tmp_path / "llava", image_size=336, layers=1, template="json")
    assert not (folder / "chat_template.jinja").exists()
    processor = AutoProcessor.from_pretrained(folder)
    ids = _inputs(processor, _pictures(1)[0])["input_ids"]
    assert int((ids == processor.image_token_id).sum()) == 576


@pytest.mark.parametrize(
    ("builder", "settings"),
    [
        (build_llava, {"image_size": 100}),
        (build_llava, {"hidden": 65}),
        (build_llava, {"template": "yaml"}),
        (build_qwen2_5_vl, {"hidden": 72}),
        (build_qwen2_5_vl, {"kv_heads": 3}),
        (build_qwen2_5_vl, {"depth": 1}),
        (build_mirror, {"rows": 5}),
        (build_mirror, {"rows": 2}),
    ],
)
def test_wrong_sizes_are_named_and_leave_nothing(builder, settings, tmp_path):
    with pytest.raises(ValueError, match=next(iter(settings))):
        builder(tmp_path / "folder", **settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("builder", [build_llava, build_qwen2_5_vl, build_mirror])
def test_an_existing_folder_is_refused(builder, tmp_path):
    with pytest.raises(FileExistsError, match=str(tmp_path)):
        builder(tmp_path)


def test_an_interrupted_build_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_folder_made_meanwhile_is_kept(tmp_path):
    target = tmp_path / "folder"
    with pytest.raises(FileExistsError), new_folder(target) as partial:
        (partial / "file").write_text("mine")
        target.mkdir()
        (target / "file").write_text("theirs")
    assert (target / "file").read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(("name", "config", "splits"), SPLITS)
def test_mirror_is_read_under_the_harness_names(name, config, splits, mirror: Mirror, monkeypatch, tmp_path):
    monkeypatch.chdir(mirror())
    data = load_dataset(name, config, cache_dir=str(tmp_path))
    assert {split: len(data[split]) for split in data} == dict.fromkeys(splits, 4)


def test_mirror_rows_have_the_fields_that_scorers_need(mirror, monkeypatch, tmp_path):
    monkeypatch.chdir(mirror())

    def rows(name: str, config: str | None, split: str) -> list[dict]:
        return list(load_dataset(name, config, split=split, cache_dir=str(tmp_path)))

    mme = rows("lmms-lab-encoder/MME", None, "test")
    assert [row["answer"] for row in mme] == ["Yes", "No"] * 2
    assert mme[0]["question_id"] == mme[1]["question_id"] != mme[2]["question_id"]
    mixed = rows("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL", "test")
    assert [row["image"] is None for row in mixed] == [False, True] * 2
    twins = rows("lmms-lab-encoder/MMBench", "cn", "dev")
    assert twins[1]["index"] == twins[0]["index"] + 1_000_000
    assert twins[0][twins[0]["answer"]] == twins[1][twins[1]["answer"]]
    images = {row["id"] for row in rows("lmms-lab-encoder/GQA", "testdev_balanced_images", "testdev")}
    asked = rows("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev")
    assert {row["imageId"] for row in asked} == images
    assert all(row["answers"] for row in rows("lmms-lab-encoder/DocVQA", "DocVQA", "validation"))


def test_mirror_is_deterministic_and_names_files_by_content(mirror, tmp_path):
    def names(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}

    assert names(build_mirror(tmp_path / "again")) == names(mirror())
    assert not names(build_mirror(tmp_path / "other", seed=1)) & names(mirror())


def test_one_task_per_benchmark(mirror):
    assert len(set(TASKS)) == len(TASKS) == 10
    assert sorted(get_dataset_config_names(str(mirror() / "lmms-lab-encoder/DocVQA"))) == ["DocVQA", "InfographicVQA"]
