"""Samples files are read once, in processes and from a cache, and nothing that is printed shows which."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import write_small
from typer.testing import CliRunner
from written import line, write_run

import lmms_prune
from lmms_prune.cli import app
from lmms_prune.leaderboard import cache, reader, samples
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.cache import CODE, SUFFIX, Cache, cache_folder
from lmms_prune.leaderboard.encoding import decoded, encoded
from lmms_prune.leaderboard.page.render import html
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.samples import ChangedError, Samples, SamplesError, Stamp, read_samples
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.record.files import PARTIAL, FileError, WriteError

GQA = TASKS["gqa"]


def call(*args: object) -> Any:
    plain = {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "80"}
    return CliRunner().invoke(app, [str(one) for one in args], env=plain)


@pytest.fixture(autouse=True)
def _settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has just written is kept at once."""
    monkeypatch.setattr(reader, "SETTLED", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The samples files that this process has read as a whole."""
    read: list[Path] = []

    def counted(path: Path, benchmark: Any) -> Samples:
        read.append(path)
        return read_samples(path, benchmark)

    monkeypatch.setattr(reader, "read_samples", counted)
    return read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_small(tmp_path / "results")
    return tmp_path / "results"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*_samples_*.jsonl"))


def same(one: Samples, other: Samples) -> bool:
    pairs = [(getattr(one, item.name), getattr(other, item.name)) for item in fields(Samples)]
    arrays = [pair for pair in pairs if isinstance(pair[0], np.ndarray)]
    assert all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in arrays)
    return [a for a, _ in pairs if not isinstance(a, np.ndarray)] == [
        b for _, b in pairs if not isinstance(b, np.ndarray)
    ]


FORMS = ("table", "json", "csv", "html")


@pytest.mark.parametrize("form", FORMS)
def test_a_call_reads_each_file_once_and_the_next_reads_none(form: str, folder: Path, reads: list[Path]) -> None:
    args = ("leaderboard", folder, "--format", form, "--resamples", 200)
    first = call(*args)
    assert sorted(reads) == files(folder)
    reads.clear()
    second = call(*args)
    assert reads == []
    without = call(*args, "--no-cache")
    assert sorted(reads) == files(folder)
    assert first.exit_code == second.exit_code == without.exit_code == 0, first.output
    assert first.stdout_bytes == second.stdout_bytes == without.stdout_bytes


def test_the_gate_uses_what_the_table_has_read(folder: Path, reads: list[Path]) -> None:
    table = call("leaderboard", folder, "--resamples", 200)
    assert table.exit_code == 0
    reads.clear()
    judged = [
        call("gate", folder, "--min-rel", 50, "--resamples", 200, "--no-verify", *more).stdout
        for more in ((), ("--no-cache",))
    ]
    assert judged[0] == judged[1]
    assert sorted(reads) == files(folder)  # of the second call


def test_processes_read_what_this_one_reads(folder: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also errors: a process hands back the one that reading has raised."""
    broken, missing, pipe = files(folder)[0], files(folder)[1], files(folder)[2]
    broken.write_text("{}\n", encoding="utf-8")
    for path in (missing, pipe):
        path.unlink()
    os.mkfifo(pipe)
    missing.symlink_to("nowhere")
    args = ("leaderboard", folder, "--format", "html", "--resamples", 200, "--no-cache")
    alone = call(*args)
    assert sorted(reads) == files(folder)
    reads.clear()
    monkeypatch.setattr(reader, "FEW", 0)
    monkeypatch.setattr(reader, "processors", lambda: 2)
    pooled = call(*args)
    assert reads == []
    assert pooled.exit_code == alone.exit_code == 1
    assert pooled.stdout_bytes == alone.stdout_bytes
    assert pooled.stderr == alone.stderr
    assert f"{pipe}: a named pipe, not a file" in pooled.stderr


def test_few_and_small_files_start_no_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "ProcessPoolExecutor", None)
    monkeypatch.setattr(reader, "processors", lambda: 8)
    assert call("leaderboard", folder, "--resamples", 200).exit_code == 0
    big = SamplesReader(workers=8)
    monkeypatch.setattr(reader, "FEW", 0)
    big.read(files(folder)[0], GQA)  # a single file
    with pytest.raises(TypeError):
        SamplesReader(workers=8).read_all((path, GQA) for path in files(folder))


def test_where_no_process_can_start_this_one_reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Iterator[Any]:
        yield (paths[0], GQA), outcome
        raise reader.BrokenProcessPool

    paths = sorted(folder.rglob("*_samples_gqa.jsonl"), key=lambda path: -path.stat().st_size)
    outcome = read_samples(paths[0], GQA)
    monkeypatch.setattr(reader, "FEW", 0)
    monkeypatch.setattr(reader, "_in_pool", broken)
    pooled = SamplesReader(workers=2)
    pooled.read_all((path, GQA) for path in paths)
    assert all(same(pooled.read(path, GQA), read_samples(path, GQA)) for path in paths)


PARENT = """
import sys, time
from pathlib import Path
from lmms_prune.leaderboard import reader
def slow(path, benchmark, cache):
    import os
    Path(str(path) + ".pid").write_text(str(os.getpid()))
    time.sleep(60)
if __name__ == "__main__":
    reader._outcome = slow
    list(reader._in_pool([(Path(name), None) for name in sys.argv[1:]], None, 2))
"""


def _ended(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc")
def test_no_process_outlives_a_killed_command(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT, encoding="utf-8")
    jobs = [tmp_path / "a", tmp_path / "b"]
    parent = subprocess.Popen([sys.executable, script, *jobs])
    notes = [Path(f"{job}.pid") for job in jobs]
    until = time.monotonic() + 60
    while not all(note.exists() and note.read_text() for note in notes):
        assert time.monotonic() < until
        time.sleep(0.05)
    workers = [int(note.read_text()) for note in notes]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and not all(map(_ended, workers)):
        time.sleep(0.05)
    left = [number for number in workers if not _ended(number)]
    for number in left:
        os.kill(number, signal.SIGKILL)
    assert left == []


def changed(path: Path) -> str:
    """The same size, and another answer to the first line's question."""
    text = path.read_text(encoding="utf-8")
    other = text.replace('"exact_match": 1.0', '"exact_match": 0.0', 1)
    assert len(other) == len(text)
    assert other != text
    return other


def rewritten(path: Path) -> None:
    path.write_text(changed(path), encoding="utf-8")


def rewritten_with_its_old_time(path: Path) -> None:
    before = path.stat()
    time.sleep(0.02)  # the file system's clock may tick in hundredths
    path.write_text(changed(path), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced_by_one_of_the_same_time(path: Path) -> None:
    before, other = path.stat(), path.with_name("other")
    other.write_text(changed(path), encoding="utf-8")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


def only_a_later_time(path: Path) -> None:
    before = path.stat()
    path.write_text(changed(path), encoding="utf-8")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))


@pytest.mark.parametrize(
    "change", [rewritten, rewritten_with_its_old_time, replaced_by_one_of_the_same_time, only_a_later_time]
)
def test_a_changed_file_is_read_again(change: Any, tmp_path: Path, reads: list[Path]) -> None:
    path = write_run(tmp_path / "run", {"gqa": [1.0, 1.0, 0.0]}).with_name("20260101_000000_samples_gqa.jsonl")
    kept = Cache(tmp_path / "cache")
    assert SamplesReader(kept).read(path, GQA).score == pytest.approx(200 / 3)
    assert SamplesReader(kept).read(path, GQA).score == pytest.approx(200 / 3)
    assert len(reads) == 1
    change(path)
    for _ in range(2):
        assert SamplesReader(kept).read(path, GQA).score == pytest.approx(100 / 3)
    assert len(reads) == 2
    assert len(list(kept.folder.iterdir())) == 1  # the later state has taken the place of the earlier


def test_a_file_that_was_written_just_now_is_not_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written again within one tick of a clock, it would have the same time."""
    monkeypatch.setattr(reader, "SETTLED", 10**9)
    path = write_run(tmp_path / "run", {"gqa": [1.0, 0.0]}).with_name("20260101_000000_samples_gqa.jsonl")
    kept = Cache(tmp_path / "cache")
    SamplesReader(kept).read(path, GQA)
    assert not kept.folder.exists()
    time.sleep(1.1)
    SamplesReader(kept).read(path, GQA)
    SamplesReader(kept).read(path, GQA)
    assert len(reads) == 2


def test_a_file_that_grows_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(line("gqa", 0, 1, 5), encoding="utf-8")

    def growing(path: Path, benchmark: Any) -> Samples:
        read = read_samples(path, benchmark)
        path.write_text(line("gqa", 0, 1, 5) + line("gqa", 1, 1, 5), encoding="utf-8")
        return read

    monkeypatch.setattr(reader, "read_samples", growing)
    kept = Cache(tmp_path / "cache")
    assert SamplesReader(kept).read(path, GQA).logged == 1
    assert not kept.folder.exists()


def entries() -> list[Path]:
    folder = cache.cache_folder()
    assert folder is not None
    return sorted(folder.glob(f"*{SUFFIX}"))


def flipped_bit(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "one bit": flipped_bit,
    "other content": lambda data: b"not ours\n" * 9,
    "whole, but not ours": lambda data: cache._checksum(memoryview(b"{}\n")) + b"{}\n",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_ignored_and_written_again(damage: str, folder: Path, reads: list[Path]) -> None:
    args = ("leaderboard", folder, "--format", "json", "--resamples", 200)
    first, whole = call(*args).stdout, {path: path.read_bytes() for path in entries()}
    for path, data in whole.items():
        path.write_bytes(DAMAGES[damage](data))
    reads.clear()
    done = call(*args)
    assert (done.exit_code, done.stdout, done.stderr) == (0, first, "")
    assert sorted(reads) == files(folder)
    assert {path: path.read_bytes() for path in entries()} == whole


def test_another_version_of_the_code_reads_again(
    folder: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("leaderboard", folder, "--resamples", 200)
    count = len(entries())
    monkeypatch.setattr(reader, "code_version", lambda: "another")
    reads.clear()
    call("leaderboard", folder, "--resamples", 200)
    assert sorted(reads) == files(folder)
    assert len([path for path in entries() if b"another" in path.read_bytes()]) == len(files(folder)) < count
    monkeypatch.setattr(reader, "code_version", lambda: None)  # installed without its source
    reads.clear()
    assert call("leaderboard", folder, "--resamples", 200).exit_code == 0
    assert sorted(reads) == files(folder)


def test_the_version_covers_all_code_that_decides_what_is_kept() -> None:
    package = Path(lmms_prune.__file__).parent
    seen: set[str] = set()
    left = ["leaderboard/reader.py"]
    while left:
        name = left.pop()
        if name in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((package / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lmms_prune."):
                left.append("/".join((node.module or "").split(".")[1:]) + ".py")
    assert sorted(seen) == sorted(CODE)


def test_a_digest_of_the_version_changes_with_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(lmms_prune.__file__).parent
    for name in CODE:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((package / name).read_bytes())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "leaderboard/cache.py"))
    version = cache.code_version.__wrapped__
    before = version()
    assert before == cache.code_version()
    with (tmp_path / "leaderboard/mmbench.py").open("a", encoding="utf-8") as stream:
        stream.write("#\n")
    assert version() != before
    (tmp_path / "record/files.py").unlink()
    assert version() is None


class _Full:
    """A disk without room."""

    def __call__(self, path: Path, content: bytes) -> None:
        raise WriteError(path, OSError(errno.ENOSPC, "No space left on device"))


@pytest.mark.parametrize("kind", ["full", "a file", "below a file", "a folder for each entry", "without a home"])
def test_a_cache_that_cannot_be_used_is_only_slower(
    kind: str, folder: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "cache"
    expected = call("leaderboard", folder, "--format", "json", "--resamples", 200, "--no-cache").stdout
    if kind == "full":
        monkeypatch.setattr(cache, "write", _Full())
    elif kind == "a folder for each entry":
        monkeypatch.setattr(Cache, "_path", lambda self, name: place)
        place.mkdir()
    elif "file" in kind:
        place.write_text("x")
        place = place / "cache" if kind == "below a file" else place
    monkeypatch.setattr(cache, "cache_folder", lambda: None if kind == "without a home" else place)
    for _ in range(2):
        reads.clear()
        done = call("leaderboard", folder, "--format", "json", "--resamples", 200)
        assert (done.exit_code, done.stdout, done.stderr) == (0, expected, "")
        assert sorted(reads) == files(folder)


def test_a_folder_that_may_only_be_read_still_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(tmp_path)
    kept.store("a", b"content")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(cache.os, "utime", refused)
    content = kept.load("a")
    assert content is not None
    assert bytes(content) == b"content"


def test_the_cache_is_bounded_and_keeps_what_was_used_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 5000)
    kept = Cache(tmp_path)
    for number in range(6):
        kept.store(f"e{number}", bytes(900))
        os.utime(tmp_path / f"e{number}{SUFFIX}", (number, number))
    kept.load("e0")
    kept.store("too large", bytes(2000))
    (tmp_path / f".left{PARTIAL}").write_bytes(b"x")
    os.utime(tmp_path / f".left{PARTIAL}", (0, 0))
    (tmp_path / f".now{PARTIAL}").write_bytes(b"x")
    (tmp_path / "somebody's").write_bytes(bytes(9000))
    kept.prune()
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {*(f"e{n}{SUFFIX}" for n in (0, 2, 3, 4, 5)), f".now{PARTIAL}", "somebody's"}


def test_reading_prunes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "LIMIT", 20_000)
    assert call("leaderboard", folder, "--resamples", 200).exit_code == 0
    assert entries()
    assert sum(path.stat().st_size for path in entries()) <= 20_000


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("platformdirs", "none"):
        if name == "none":
            monkeypatch.setitem(sys.modules, "platformdirs", None)
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        if sys.platform == "linux":
            assert cache_folder() == tmp_path / ".cache" / "lmms-prune"


@pytest.mark.parametrize(
    ("task", "values"),
    [
        ("gqa", [1.0]),
        ("gqa", [0.0, 1.0] * 200),
        ("mme", [1.0, 0.0] * 6),
        ("pope", [1.0, 0.0, 1.0]),
        ("mmbench_en_dev", [1.0] * 4),
    ],
)
@pytest.mark.parametrize("ours", [True, False])
def test_samples_are_the_same_after_encoding(task: str, values: list[float], ours: bool, tmp_path: Path) -> None:
    path = write_run(tmp_path, {task: values}, ours=ours).with_name(f"20260101_000000_samples_{task}.jsonl")
    read = read_samples(path, TASKS[task])
    content = memoryview(encoded(read, "1"))
    again = decoded(content, read.stamp, "1")
    assert again is not None
    assert same(read, again)
    assert decoded(content, read.stamp, "2") is None
    assert decoded(content, read.stamp._replace(changed=0), "1") is None


def test_an_answer_has_one_hash_in_all_processes() -> None:
    """Python's own hash would make a row that another process has read agree with nothing."""
    code = "from lmms_prune.leaderboard.samples import _hashed; print(_hashed('yes'), _hashed('\\ud83d'))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


@pytest.mark.parametrize(
    "error", [FileError(Path("a"), "a folder, not a file"), WriteError(Path("a"), OSError(errno.ENOSPC, "No space"))]
)
def test_errors_survive_the_way_from_another_process(error: OSError) -> None:
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.strerror) == (type(error), str(error), error.strerror)


def test_a_file_that_changes_between_table_and_page_ends_the_command(folder: Path) -> None:
    """Its lines are no longer where they were."""
    reading = SamplesReader()
    board = leaderboard(read_results([folder]), resamples=200, reader=reading)
    for path in folder.rglob("*_samples_gqa.jsonl"):
        path.write_text("\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ChangedError, match=r"changed while the leaderboard read it\. Run the command again"):
        html(board, reader=reading)


def test_that_end_is_plain(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples.Stamp, "of", classmethod(lambda cls, status: Stamp(time.perf_counter_ns(), 0, 0, 0)))
    done = call("leaderboard", folder, "--format", "html", "--resamples", 200)
    assert done.exit_code == 2
    assert "changed while the leaderboard read it" in done.stderr
    assert "Traceback" not in done.output


def test_an_error_is_raised_each_time(tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n", encoding="utf-8")
    once = SamplesReader()
    for _ in range(2):
        with pytest.raises(SamplesError, match="line 1"):
            once.read(path, GQA)
    assert reads == [path]


def test_lines_are_found_behind_empty_ones_and_wide_letters(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    wide = json.dumps({**json.loads(line("gqa", 7, 1, 5)), "input": "問い？"}, ensure_ascii=False)
    text = f"\r\n{wide}\r\n  \n" + line("gqa", 3, 1, 5).rstrip()
    path.write_bytes(text.encode())
    read = read_samples(path, GQA)
    assert [samples.line_at(path, read, number)["input"] for number in (3, 7)] == ["gqa 3?", "問い？"]
