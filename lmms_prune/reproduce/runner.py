"""Runs a chain: finished steps are skipped, a failing one does not stop those that do not need it."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from threading import Event, Thread
from typing import Any, Literal

from lmms_prune.harness import fingerprint
from lmms_prune.record.files import WriteError, make_folder, read_text, write
from lmms_prune.record.redaction import redacted, redacted_lines
from lmms_prune.reproduce.chain import Step

RECORD, LOG, OUTPUT = "record.json", "log.txt", "output.json"
State = Literal["done", "failed", "stopped", "not run"]
# Parts that no step's result depends on; the demo's data have a digest of their own in their folder's name.
_ASIDE = ("calibration", "certificate", "cli", "demo", "reproduce", "terminal")
_POLL_SECONDS = 2.0
_GRACE = 15.0  # seconds between asking a step to end and ending it
_TAIL = 400  # characters of a failure's last words that are shown
PROGRAM = (str(Path(sys.executable).with_name("lmms-prune")),)


@dataclass(frozen=True)
class StepRecord:
    """What became of a step, as its folder records it.

    Args:
        state: "done", "failed" (with a reason), "stopped" by an interruption, or "not run".
        command: the command, with its part; OUT is the folder of everything.
        made_from: versions and code.
        seconds, date: how long it ran, and when it ended.
        reason: why it failed, or was not run.
    """

    state: State
    command: str = ""
    made_from: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    date: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Surroundings:
    """Where and how the steps' processes run.

    Args:
        out: the folder of everything.
        folder: the working folder of the commands; None for this process's.
        environment: their environment; None to inherit this one's.
        launch: launcher of evaluating and measuring processes, for the steps that take one.
        shard: the part of the work ("3/8"); only divisible steps then run.
        secrets: values that no file may contain.
        program: the command line before a step's words.
    """

    out: Path
    folder: Path | None = None
    environment: Mapping[str, str] | None = None
    launch: str = ""
    shard: str | None = None
    secrets: Collection[str] = ()
    program: Sequence[str] = PROGRAM

    def words(self, step: Step) -> list[str]:
        """The step's words, with launcher and part."""
        words = list(step.words)
        if step.divisible:
            words += ["--launch", self.launch] if self.launch else []
            words += ["--shard", self.shard] if self.shard else []
        return words

    def step_folder(self, step: Step) -> Path:
        """The folder of a step's record; that of a part is another one."""
        name = step.name if self.shard is None else f"{step.name}-{self.shard.replace('/', '-of-')}"
        return self.out / "steps" / name

    def command(self, step: Step) -> str:
        """What a record compares: the command without its launcher and without the folder's place, which change no result."""
        words = [word.replace(str(self.out), "OUT") for word in step.words]
        return shlex.join(["lmms-prune", *words]) + (f" --shard {self.shard}" if self.shard and step.divisible else "")


def made_from() -> dict[str, str]:
    """What a step's results depend on besides its command."""
    return {"code": fingerprint.code(_ASIDE), **fingerprint.versions()}


def read_record(folder: Path) -> StepRecord:
    """The record in a step's folder; "not run" if there is none."""
    try:
        return StepRecord(**json.loads(read_text(folder / RECORD)))
    except (OSError, ValueError, TypeError):
        return StepRecord("not run")


def is_finished(step: Step, around: Surroundings) -> bool:
    """Whether a step was finished by the same command and code, and its results are still there."""
    record = read_record(around.step_folder(step))
    return (
        record.state == "done"
        and record.command == redacted(around.command(step), around.secrets)
        and dict(record.made_from) == made_from()
        and (step.folder is None or step.folder.is_dir())
    )


@dataclass
class ChainProgress:
    """What a display is told: counts of finished pieces by step, and lines."""

    steps: Sequence[Step]
    say: Callable[[str], None]
    moved: Callable[[int, int, str], None]
    finished: dict[str, int] = field(default_factory=dict)
    running: set[str] = field(default_factory=set)

    def update(self) -> None:
        """Show the share of the pieces that are there."""
        total = sum(max(1, step.pieces) for step in self.steps)
        self.moved(sum(self.finished.values()), total, ", ".join(sorted(self.running)))


def run_chain(
    steps: Sequence[Step], around: Surroundings, progress: ChainProgress, lanes: int
) -> dict[str, StepRecord]:
    """Run all steps that are not finished, lane by lane, and return every step's record.

    Args:
        steps: the chain, in order.
        around: where they run.
        progress: is told what happens.
        lanes: how many lanes run at a time.

    Raises:
        WriteError: the folder of a step cannot be written.
    """
    ended = Event()
    records: dict[str, StepRecord] = {}
    by_lane: dict[str, list[Step]] = {}
    for step in steps:
        by_lane.setdefault(step.lane, []).append(step)

    def run_lane(own: Sequence[Step]) -> None:
        for step in own:
            if not ended.is_set():
                records[step.name] = _outcome(step, around, progress, records, ended)

    with ThreadPoolExecutor(max(1, lanes)) as pool:
        futures = [pool.submit(run_lane, own) for own in by_lane.values()]
        try:
            while wait(futures, timeout=_POLL_SECONDS).not_done:
                for step in steps:
                    if step.name in progress.running:
                        progress.finished[step.name] = min(max(0, step.pieces - 1), step.finished_pieces())
                progress.update()
        except BaseException:
            ended.set()
            raise
    for future in futures:
        future.result()
    return records


def _outcome(
    step: Step, around: Surroundings, progress: ChainProgress, records: Mapping[str, StepRecord], ended: Event
) -> StepRecord:
    """Run one step unless it is finished, or needs one that failed."""
    folder = around.step_folder(step)
    if around.shard is not None and not step.divisible:
        return StepRecord("not run", reason="a part of the work runs only what --shard divides")
    failed = [name for name in step.needs if records.get(name, StepRecord("not run")).state != "done"]
    if failed:
        record = StepRecord("not run", reason=f"it needs {failed[0]}, which is not finished")
        write(folder / RECORD, json.dumps(asdict(record), indent=1))
        progress.say(f"{step.name}: not run: {record.reason}")
        return record
    waits = lambda: progress.say(f"{step.name}: another process runs it; waits until that has ended")  # noqa: E731
    with _locked(folder, ended, waits) as lock:
        if lock is None:
            return StepRecord("stopped")
        if is_finished(step, around):
            progress.finished[step.name] = max(1, step.pieces)
            progress.say(f"{step.name}: is there")
            return read_record(folder)
        progress.running.add(step.name)
        progress.say(f"{step.name}: started")
        record = _run(step, around, folder, ended, lock)
        progress.running.discard(step.name)
    progress.finished[step.name] = max(1, step.pieces) if record.state == "done" else step.finished_pieces()
    progress.say(
        f"{step.name}: {record.state} after {record.seconds:.0f} s"
        + (f"\n  {record.reason}\n  log: {folder / LOG}" if record.reason else "")
    )
    return record


@contextmanager
def _locked(folder: Path, ended: Event, waits: Callable[[], None]) -> Iterator[int | None]:
    """Lock a step's folder, and yield the lock's file descriptor; None if the chain has ended before it was free.

    The step's process inherits the descriptor, and with it the lock: also if this process is killed, nobody else runs the
    step until its process has ended.
    """
    path = folder.with_name(f".{folder.name}.lock")
    make_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise WriteError(path, error) from error
    try:
        is_first = True
        while not ended.is_set():
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if is_first:
                    waits()
                is_first = False
                ended.wait(_POLL_SECONDS)
            except OSError as error:
                raise WriteError(path, error) from error
            else:
                yield descriptor
                return
        yield None
    finally:
        os.close(descriptor)


def _run(step: Step, around: Surroundings, folder: Path, ended: Event, lock: int) -> StepRecord:
    """Run a step's command, with its log and its output in its folder, and record what became of it.

    Args:
        step, around, folder: what runs, and where.
        ended: whether the chain was interrupted.
        lock: the descriptor that holds the folder's lock.
    """
    make_folder(folder)
    for name in (RECORD, OUTPUT):
        (folder / name).unlink(missing_ok=True)
    start, output = time.monotonic(), bytearray()
    pipe = subprocess.PIPE
    # A session of its own, so that whatever it has started is ended with it.
    process = subprocess.Popen(
        [*around.program, *around.words(step)],
        stdout=pipe,
        stderr=pipe,
        cwd=around.folder,
        env=None if around.environment is None else dict(around.environment),
        start_new_session=True,
        pass_fds=(lock,),
    )
    readers = [
        Thread(target=_keep_output, args=(process, output), daemon=True),
        Thread(target=_keep_log, args=(process, folder / LOG, around.secrets), daemon=True),
    ]
    for reader in readers:
        reader.start()
    code = None
    while code is None and not ended.is_set():
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(_POLL_SECONDS / 4)
    _end(process)
    for reader, stream in zip(readers, (process.stdout, process.stderr), strict=True):
        reader.join(_GRACE)
        if stream is not None and not reader.is_alive():
            stream.close()
    text = redacted(output.decode("utf-8", "replace"), around.secrets)
    result = _last_json(text)
    if result is not None:
        write(folder / OUTPUT, json.dumps(result, indent=1))
    state: State = "stopped" if code is None else "done" if code == 0 else "failed"
    record = StepRecord(
        state,
        redacted(around.command(step), around.secrets),
        made_from(),
        time.monotonic() - start,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        f"exit code {code}: {_last_words(folder / LOG)}" if state == "failed" else "",
    )
    write(folder / RECORD, json.dumps(asdict(record), indent=1))
    return record


def _keep_output(process: subprocess.Popen[bytes], output: bytearray) -> None:
    stream = process.stdout
    assert stream is not None
    while block := stream.read(65536):
        output += block


def _keep_log(process: subprocess.Popen[bytes], path: Path, secrets: Collection[str]) -> None:
    """Write a process's messages to its log without secrets, so that the log can be followed."""
    stream = process.stderr
    assert stream is not None
    with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
        for line in redacted_lines(iter(stream.readline, b""), secrets):
            file.write(line)
            file.flush()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it has started: ask first, so that what is half done stays whole.

    Of a command that was started in the background, the processes ignore SIGINT: hence SIGTERM after it.
    """
    for number, patience in ((signal.SIGINT, _GRACE), (signal.SIGTERM, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _last_json(text: str) -> Any:
    """The JSON object in the last line, if there is one."""
    with suppress(ValueError, IndexError):
        return json.loads(text.strip().splitlines()[-1])
    return None


def _last_words(log: Path) -> str:
    """The end of a log."""
    with suppress(OSError):
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return "\n  ".join(lines)[-_TAIL:] or "it printed nothing"
    return "it left no log"
