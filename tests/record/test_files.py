"""Files that are not what their names say: each is named and refused, and none makes a command wait."""

from __future__ import annotations

import json
import os
import signal
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import datasets
import pytest
from PIL import Image
from typer.testing import CliRunner

from lmms_prune.calibration.data import SearchError, read_samples
from lmms_prune.cli import app
from lmms_prune.configs.runs import read
from lmms_prune.errors import ConfigError
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.samples import read_samples as read_answers
from lmms_prune.record.files import FileError, find, read_image, read_text
from lmms_prune.record.information import InformationError, Store

KINDS = ("a named pipe", "a socket", "a folder", "a device", "Too many levels of symbolic links", "No such file")


def make(path: Path, kind: str) -> Path:
    """Something at `path` that is no regular file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        os.mknod(path, stat.S_IFSOCK)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.symlink_to(path if kind.startswith("Too many") else "nowhere")
    return path


@pytest.fixture(autouse=True)
def _no_command_waits() -> Iterator[None]:
    """Whoever opens a pipe waits for its other end for ever."""

    def ended(number: int, frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, ended)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def store(path: Path) -> object:
    known = Store(path.parents[2])
    return known._lines(known.samples()[0])


# What reads a file that a user or another program has named: the file's name in a folder, and the reader.
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": ("a.txt", read_text),
    "image": ("a.png", read_image),
    "config": ("a.yaml", read),
    "samples": ("20260101_000000_samples_gqa.jsonl", lambda path: read_answers(path, TASKS["gqa"])),
    "calibration": ("data.jsonl", read_samples),
    "information": ("gqa/test/0.parquet", store),
    "information's settings": ("information.json", lambda path: Store(path.parent).settings()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_by_its_kind(tmp_path: Path, reader: str, kind: str) -> None:
    name, call = READERS[reader]
    path = make(tmp_path / name, kind)
    with pytest.raises((OSError, ConfigError, SearchError, InformationError), match=kind):
        call(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibrations_image_is_refused_with_its_line(tmp_path: Path, kind: str) -> None:
    make(tmp_path / "a.png", kind)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": "a.png", "question": "what?"}), encoding="utf-8")
    what = "does not exist" if kind == "No such file" else kind
    with pytest.raises(SearchError, match=f"line 1: 'image' .*a.png.*{what}"):
        read_samples(data)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x_results.json", "20260101_000000_results.json"])
def test_whatever_is_called_results_is_named(tmp_path: Path, name: str, kind: str) -> None:
    path = make(tmp_path / "run" / name, kind)
    for paths in ([tmp_path], [path]):
        if paths == [path] and kind == "a folder":  # which may hold results
            continue
        (problem,) = read_results(paths).problems
        assert problem.path == str(path)
        assert kind in problem.message
    for command in (["leaderboard", tmp_path], ["gate", tmp_path, "--min-rel", 90]):
        done = CliRunner().invoke(app, [str(word) for word in command])
        assert done.exit_code == 1
        assert f"{path}: " in done.stderr
        assert kind in done.stderr


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "No such file"])
def test_a_journals_file_is_refused_by_its_kind(tmp_path: Path, kind: str) -> None:
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.harness.fingerprint import digest
    from lmms_prune.harness.journal import Journal

    run = {"schedule": "none"}
    path = make(tmp_path / digest(run) / "0.jsonl", kind)
    with pytest.raises(ArgumentError, match=f"journal={tmp_path}: {path}: {kind}"):
        Journal(str(tmp_path), run, ())


def png(width: int, height: int) -> bytes:
    """A file of 57 bytes that says it is so large."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    about = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", about) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def cut(path: Path) -> None:
    Image.effect_noise((200, 200), 50).save(path)
    path.write_bytes(path.read_bytes()[:-2000])


def turned_with_a_width_of_letters(path: Path) -> None:
    """A JPEG whose EXIF says that it is turned, and of the width nothing that Pillow can write again."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "x" * 20
    Image.new("RGB", (5, 3)).save(path, "JPEG", exif=exif)
    path.write_bytes(path.read_bytes().replace(b"\x01\x0f\x00\x02", b"\x01\x00\x00\x02"))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "huge": (lambda path: path.write_bytes(png(30_000, 30_000)), "900000000 pixels"),
    "no image": (lambda path: path.write_text("no image", encoding="utf-8"), "cannot identify image file"),
    "cut short": (cut, "truncated"),
    "damaged": (lambda path: path.write_bytes(png(10, 10)[:-20] + b"x" * 20), "Truncated File Read"),
    "wrong EXIF": (turned_with_a_width_of_letters, "required argument is not an integer"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_show_refuses_what_is_no_image(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.png"
    write, message = BROKEN[kind]
    write(path)
    command = ["show", path, "--question", "what?", "--schedule", "none", "--out", tmp_path / "b.png"]
    done = CliRunner().invoke(app, [str(word) for word in command])
    assert done.exit_code == 2, done.output
    assert f"lmms-prune: {path} cannot be read as an image: " in done.stderr
    assert message in done.stderr
    with pytest.raises(OSError, match=message):
        read_image(path)


def drawn(mode: str) -> Image.Image:
    image = Image.new("RGBA", (5, 3), (200, 10, 30, 255))
    image.paste((0, 0, 255, 0), (0, 0, 2, 2))
    return image.quantize(4) if mode == "P" else image.convert(mode)


def oriented(turn: int) -> dict[str, Any]:
    exif = Image.Exif()
    exif[0x0112] = turn
    return {"exif": exif}


ODD_IMAGES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{f"turned {turn}": ("a.jpg", "RGB", oriented(turn)) for turn in range(1, 9)},
    "turned PNG": ("a.png", "RGBA", oriented(6)),
    "turned TIFF": ("a.tiff", "RGB", oriented(8)),
    "turned WebP": ("a.webp", "RGBA", oriented(3) | {"lossless": True}),
    "transparent": ("a.png", "RGBA", {}),
    "transparent palette": ("a.png", "P", {}),
    "printer's colours": ("a.jpg", "CMYK", {}),
    "16 bits": ("a.png", "I;16", {}),
    "black and white": ("a.png", "1", {}),
    "animation": ("a.gif", "P", {"save_all": True, "append_images": [Image.new("RGB", (5, 3), "green")]}),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_an_image_is_read_as_evaluations_see_it(kind: str, tmp_path: Path) -> None:
    """Upright, its first frame, in its own mode: each family makes RGB of it in its own way."""
    name, mode, options = ODD_IMAGES[kind]
    drawn(mode if mode != "I;16" else "I").convert(mode).save(tmp_path / name, **options)
    image = read_image(tmp_path / name)
    expected = datasets.Image().decode_example({"path": None, "bytes": (tmp_path / name).read_bytes()})
    assert (image.mode, image.size) == (expected.mode, expected.size)
    assert image.tobytes() == expected.tobytes()
    assert image.convert("RGBA").tobytes() == expected.convert("RGBA").tobytes()
    assert image.size == ((3, 5) if options.get("exif", {}).get(0x0112, 1) >= 5 else (5, 3))


def test_links_to_folders_are_followed_and_a_loop_of_them_ends(tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / ".partial").mkdir()
    (tmp_path / "elsewhere").mkdir()
    for folder in ("runs/a", "runs/.partial", "elsewhere"):
        (tmp_path / folder / "x.txt").touch()
    (tmp_path / "runs" / "a" / "loop").symlink_to(tmp_path / "runs")
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "elsewhere")
    errors: list[OSError] = []
    runs = tmp_path / "runs"
    assert find(runs, "*.txt", errors.append) == [runs / "a" / "x.txt", runs / "b" / "x.txt"]
    assert not errors


def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root reads every folder, so that the system's own call has to refuse."""
    closed, scan = tmp_path / "closed", os.scandir
    closed.mkdir()

    def scandir(path: str | Path) -> object:
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    errors: list[OSError] = []
    assert find(tmp_path, "*", errors.append) == [closed]
    assert [error.filename for error in errors] == [str(closed)]
    (problem,) = read_results([tmp_path]).problems
    assert (problem.path, problem.message) == (str(closed), "Permission denied; what is below is left out.")


def test_a_file_taken_for_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    (problem,) = read_results([tmp_path / "a" / "b"]).problems
    assert (problem.path, problem.message) == (str(tmp_path / "a" / "b"), "Not a directory.")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", [["check"], ["sweep", "--dry-run"]])
def test_a_configuration_that_is_no_file_is_named(tmp_path: Path, command: list[str], kind: str) -> None:
    path = make(tmp_path / "configs" / "a.yaml", kind)
    for named in (path, path.parent):
        done = CliRunner().invoke(app, [*command, str(named)])
        assert done.exit_code == 2
        if named == path and kind == "a folder":
            assert f"{path}: this folder holds no .yaml files." in done.output
        else:
            assert f"{path}: cannot be read: {kind}" in done.output


def test_the_errors_say_what_a_name_stands_for(tmp_path: Path) -> None:
    with pytest.raises(FileError) as caught:
        read_text(tmp_path)
    assert (caught.value.strerror, caught.value.filename) == ("a folder, not a file", str(tmp_path))
