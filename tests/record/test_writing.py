"""Files that are written whole or not at all: a full disk, a read-only one or an interruption leaves what was there."""

from __future__ import annotations

import ast
import os
import re
import resource
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lmms_prune
from lmms_prune.cli import app
from lmms_prune.record.files import WriteError, write
from lmms_prune.terminal.drawing import pyplot, save

PACKAGE = Path(lmms_prune.__file__).parent
# What writes line by line as the lines come, and folders that appear when they are complete.
STREAMS = {"record/files.py", "harness/journal.py", "sweep/worker.py", "demo/processes.py", "reproduce/runner.py"}
FOLDERS = {"demo/benchmarks.py", "demo/checkpoints.py", "demo/training/__main__.py", "demo/training/loop.py"}


def writing(tree: ast.AST) -> Iterator[str]:
    """The calls of a module that write into a file under its own name."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        given = [ast.unparse(one) for one in node.args] + [
            f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords
        ]
        modes = [one for one in given if re.fullmatch(r"(mode=)?['\"][rbt]*[wax+][rwaxbt+]*['\"]", one)]
        to_memory = bool(given) and given[0] == "stream"
        table = re.fullmatch(r"to_(csv|json|excel|parquet|html|latex|pickle)|savefig", name)
        if (
            name in ("write_text", "write_bytes")
            or (name == "open" and modes)
            or (table and node.args and not to_memory)
            or ast.unparse(node.func) in ("json.dump", "numpy.save", "np.save", "np.savez")
        ):
            yield ast.unparse(node)


def test_files_are_written_in_one_place() -> None:
    calls = {
        str(path.relative_to(PACKAGE)): list(writing(ast.parse(path.read_text(encoding="utf-8"))))
        for path in PACKAGE.rglob("*.py")
    }
    assert {path: found for path, found in calls.items() if found and path not in STREAMS | FOLDERS} == {}


@pytest.mark.parametrize(
    "line",
    [
        "path.write_text(text)",
        "path.write_bytes(data)",
        "figure.savefig(path, dpi=130)",
        "frame.to_csv(path, index=False)",
        "frame.to_parquet(path)",
        "open(path, 'w')",
        "path.open('a', encoding='utf-8')",
        "open(path, mode='wb')",
        "json.dump(value, file)",
    ],
)
def test_the_rule_sees_what_it_forbids(line: str) -> None:
    assert list(writing(ast.parse(line)))


@contextmanager
def little_room(size: int) -> Iterator[None]:
    """No file can be longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [None, "what was there"])
@pytest.mark.parametrize("size", [0, 1, 999])
def test_without_room_what_was_there_stays(tmp_path: Path, size: int, before: str | None) -> None:
    path = tmp_path / "below" / "a.txt"
    if before is not None:
        write(path, before)
    with little_room(size), pytest.raises(WriteError) as caught:
        write(path, "x" * 1000)
    assert str(caught.value) == f"{path} cannot be written: File too large."
    assert {file.name: file.read_text("utf-8") for file in path.parent.iterdir()} == (
        {} if before is None else {"a.txt": before}
    )
    write(path, "é" * 1000)
    assert path.read_bytes() == "é".encode() * 1000


def test_an_interruption_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "a.txt"
    write(path, "before")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(path, "after")
    assert [(file.name, file.read_text("utf-8")) for file in tmp_path.iterdir()] == [("a.txt", "before")]


KILLED = """
import os, sys
from pathlib import Path
from lmms_prune.record import files
os.fsync = lambda _: os.kill(os.getpid(), 9)
files.write(Path(sys.argv[1]), "after")
"""


def test_a_kill_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before", encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert done.returncode == -9
    assert path.read_text("utf-8") == "before"
    assert [
        file.name for file in tmp_path.iterdir() if not re.fullmatch(r"a\.txt|\.[0-9a-f]+\.partial", file.name)
    ] == []


def test_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    real.write_text("before", encoding="utf-8")
    real.chmod(0o640)
    link.symlink_to(real)
    write(link, "after")
    assert link.is_symlink()
    assert real.read_text("utf-8") == "after"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=f"{tmp_path} cannot be written: Is a directory"):
        write(tmp_path, "")
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"a\.txt cannot be written: (Not a directory|File exists)"):
        write(tmp_path / "file" / "a.txt", "")


@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("piped", [True, False])
def test_what_is_open_already_is_written_into(tmp_path: Path, name: str, piped: bool) -> None:
    code = f"from pathlib import Path; from lmms_prune.record.files import write; write(Path({name!r}), 'text')"
    command = [sys.executable, "-c", code]
    if piped:
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == "text"
        return
    with open(tmp_path / "a", "wb") as stream:
        subprocess.run(command, check=True, stdout=stream)
        assert os.fstat(stream.fileno()).st_size == 4
    assert (tmp_path / "a").read_text("utf-8") == "text"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_a_picture_is_drawn_whole_or_not_at_all(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    for room in (100, None):
        figure, _ = pyplot.subplots()
        if room is None:
            save(figure, path)
            assert path.stat().st_size > 1000
        else:
            with little_room(room), pytest.raises(WriteError, match=f"{path} cannot be written"):
                save(figure, path)
            assert list(tmp_path.iterdir()) == []
        assert not pyplot.get_fignums()


COMMANDS = {
    "configs": ["configs", "--out", "{}/configs"],
    "csv": ["leaderboard", "--published", "--format", "csv", "--out", "{}/a.csv"],
    "page": ["leaderboard", "--published", "--format", "html", "--out", "{}/a.html"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_ends_with_the_files_name(tmp_path: Path, name: str) -> None:
    line = [part.format(tmp_path) for part in COMMANDS[name]]
    with little_room(100):
        done = CliRunner().invoke(app, line)
    assert done.exit_code == 2
    assert re.search(rf"^lmms-prune: {tmp_path}/\S+ cannot be written: File too large\.$", done.output, re.MULTILINE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert CliRunner().invoke(app, line).exit_code == 0
