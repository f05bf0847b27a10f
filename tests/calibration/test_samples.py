"""Files of samples: both forms, and one message for everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import noise

from lmms_prune.calibration.data import SearchError, read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    noise(0).save(tmp_path / "a.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def write(folder: Path, *entries: Any, as_list: bool = False) -> Path:
    file = folder / "data.json"
    file.write_text(json.dumps(entries) if as_list else "\n".join(map(json.dumps, entries)), "utf-8")
    return file


GOOD = {"image": "a.png", "question": "what?"}


@pytest.mark.parametrize("as_list", [False, True])
def test_both_forms(folder: Path, as_list: bool) -> None:
    turns = [
        {"from": "human", "value": "Who?\n<image>"},
        {"from": "gpt", "value": "x"},
        {"from": "human", "value": "y"},
    ]
    file = write(folder, GOOD, {"id": 3, "image": "a.png", "conversations": turns}, as_list=as_list)
    samples = read_samples(file)
    assert [sample.question for sample in samples] == ["what?", "Who?"]
    assert [sample.picture().mode for sample in samples] == ["RGB", "RGB"]
    assert samples[1].origin == f"{file}, {'entry' if as_list else 'line'} 2"


def test_limit_and_folder_of_images(folder: Path) -> None:
    (folder / "elsewhere").mkdir()
    file = folder / "elsewhere" / "data.jsonl"
    file.write_text("\n\n".join([json.dumps(GOOD)] * 3) + "\nnot json", "utf-8")
    assert len(read_samples(file, folder, limit=3)) == 3
    with pytest.raises(SearchError, match=r"elsewhere/a\.png does not exist; --images FOLDER says"):
        read_samples(file)
    with pytest.raises(SearchError, match="line 6: not JSON"):
        read_samples(file, folder)
    with pytest.raises(SearchError, match=r"--images .*nowhere is not a folder"):
        read_samples(file, folder / "nowhere")


HUMAN = {"from": "human", "value": "<image>\nx"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (["a"], r'\["a"\] is not a JSON object; an entry is \{"image"'),
        ({"question": "x"}, "'image' is missing, there is 'question'; an entry is"),
        ({}, "'image' is missing, there is nothing;"),
        (
            {"image": "a.png", "qustion": "x"},
            "'question' or 'conversations' is missing, there is 'image', 'qustion'; an entry",
        ),
        ({**GOOD, "conversations": [HUMAN]}, "'question' and 'conversations' are both given; give one"),
        ({"image": ["a.png"], "question": "x"}, r"'image' is \[\"a\.png\"\]; it must be a file's name"),
        ({"image": "", "question": "x"}, "'image' is \"\"; it must be a file's name"),
        ({"image": "a.png", "question": None}, "'question' is null; it must be a text"),
        ({"image": "b.png", "question": "x"}, r"'image' .*b\.png does not exist"),
        ({"image": "a.png", "conversations": "x"}, "'conversations' has no turn"),
        ({"image": "a.png", "conversations": [{"from": "gpt", "value": "x"}]}, "'conversations' has no turn"),
        ({"image": "a.png", "conversations": [{"from": "human"}]}, "'conversations' has no turn"),
        (
            {"image": "a.png", "conversations": [{"from": "human", "value": "<image><image>"}]},
            "'conversations' shows 2 images; a sample has one",
        ),
    ],
)
@pytest.mark.parametrize("as_list", [False, True])
def test_broken_entries(folder: Path, entry: Any, message: str, as_list: bool) -> None:
    file = write(folder, GOOD, entry, as_list=as_list)
    with pytest.raises(SearchError, match=message) as error:
        read_samples(file)
    assert str(error.value).startswith(f"{file}, {'entry' if as_list else 'line'} 2: ")


@pytest.mark.parametrize("name", ["broken.png", "text.png"])
@pytest.mark.parametrize("lenient", [False, True])
def test_a_file_that_is_not_an_image(folder: Path, name: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncated images are refused even though the harness makes Pillow accept them."""
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", lenient)
    [sample] = read_samples(write(folder, {"image": name, "question": "x"}))
    with pytest.raises(SearchError, match=f"line 1: 'image' .*{name} cannot be read as an image"):
        sample.picture()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no sample; an entry is"),
        (b"[]", "holds no sample; an entry is"),
        (b'[\n{"image": }]', "line 2: not JSON: Expecting value"),
        (b"{'image': 1}", "line 1: not JSON: Expecting property name"),
        (b"\xff\xfe", "cannot be read: 'utf-8' codec"),
    ],
)
def test_broken_files(folder: Path, content: bytes, message: str) -> None:
    file = folder / "data.jsonl"
    file.write_bytes(content)
    with pytest.raises(SearchError, match=message):
        read_samples(file)
    with pytest.raises(SearchError, match=r"none\.json cannot be read: No such file"):
        read_samples(folder / "none.json")
