"""A run that was interrupted goes on from its journal, and ends as if it had not been; other runs take nothing from it."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from functools import wraps
from pathlib import Path

import pytest
import torch
from test_faults import _unpadded
from test_generation import LONG, _answer, _doc, _plain, _requests

SCHEDULE = "dart@2:0.44,random@5:0.07"
DOCS = [_doc("Say " + "word " * length, "red", *["blue"] * (length % 2)) for length in (1, 5, 3, 4, 2, 6, 2)]
LATER = {**LONG, "max_new_tokens": 11}


@pytest.fixture
def rows(monkeypatch):
    """The rows of every generate(); before the call of number `stop` the process is as good as gone."""
    from transformers import GenerationMixin

    original = GenerationMixin.generate

    class Rows(list):
        stop: int | None = None

    seen = Rows()

    @wraps(GenerationMixin.generate)
    def spy(self, **kwargs):
        if seen.stop == len(seen):
            raise KeyboardInterrupt
        seen.append(len(kwargs["input_ids"]))
        return original(self, **kwargs)

    monkeypatch.setattr(GenerationMixin, "generate", spy)
    return seen


def asked(model):
    return [*_requests(model, DOCS, LONG), *_requests(model, DOCS, LATER)[:3]]


def averages(model):
    """What the results say of a run, without its times and without what it did not do itself."""
    return {
        name: value
        for name, value in model.batch_sizes["run"].items()
        if name not in ("resumed", "other_load", "peak_memory")
    }


@pytest.mark.parametrize(("batch_size", "stops"), [(2, (1, 0, 2)), ("auto", (1,))])
def test_a_resumed_run_ends_as_an_uninterrupted_one(batch_size, stops, harness, family, rows, tmp_path):
    given = {"schedule": SCHEDULE, "batch_size": batch_size}
    whole = harness.create(family, **given)
    expected = _plain(whole.generate_until(asked(whole)))
    generated, done = list(rows), 0
    for stop in stops:
        rows.clear()
        rows.stop = stop
        model = harness.create(family, **given, journal=str(tmp_path))
        with pytest.raises(KeyboardInterrupt):
            model.generate_until(asked(model))
        # Batch by batch as it would have been, and none of them twice.
        assert rows == generated[done : done + stop]
        done += stop
    rows.clear()
    rows.stop = None
    model = harness.create(family, **given, journal=str(tmp_path))
    assert _plain(model.generate_until(asked(model))) == expected
    assert rows == generated[done:]
    assert averages(model) == averages(whole)
    assert model.batch_sizes["run"]["resumed"] == sum(generated[:done]) > 0 == whole.batch_sizes["run"]["resumed"]


def test_seconds_are_those_of_the_generation_whenever_it_was(harness, tmp_path, monkeypatch):
    """A run that generates nothing any more says how long its answers took, not that they took no time."""
    seen = []
    monkeypatch.setattr("lmms_prune.harness.pruned.log_metrics", lambda *args: seen.append(args))
    for _ in range(2):
        _answer(harness.create("llava", batch_size=2, journal=str(tmp_path)), DOCS, LONG)
    (first, *rest), (again, *others) = seen
    assert first == pytest.approx(again) != 0
    assert rest[0] == others[0]
    assert rest[2] == others[2]


def test_other_runs_take_nothing_from_a_journal(harness, rows, tmp_path, monkeypatch):
    def generated(docs=DOCS[:2], options=LONG, schedule=SCHEDULE):
        rows.clear()
        model = harness.create("llava", schedule=schedule, journal=str(tmp_path), batch_size=2)
        assert len(_answer(model, docs, options)) == 2
        return sum(rows)

    assert [generated(), generated()] == [2, 0]
    assert generated(schedule="dart@2:0.44,random@5:0.08") == 2
    # The same place in the same task, with another question, another image or other options.
    assert generated([_doc("Say what?", "red", "blue"), DOCS[1]]) == 1
    assert generated([_doc(DOCS[0]["text"], "red", "green"), DOCS[1]]) == 1
    assert generated(options=LATER) == 2
    with monkeypatch.context() as patch:
        patch.setattr("lmms_prune.harness.fingerprint.code", lambda: "another")
        assert generated() == 2
    assert generated() == 0


def test_another_number_of_processes_goes_on(harness, rows, tmp_path):
    """Samples are known by their documents: what two processes have done is done for one, in whatever batches."""
    given = {"schedule": SCHEDULE, "batch_size": 2, "journal": str(tmp_path)}
    for rank in range(2):
        model = harness.create("llava", **given)
        rows.clear()
        rows.stop = 1
        with pytest.raises(KeyboardInterrupt):
            model.generate_until(_requests(model, DOCS, LONG)[rank::2])
    rows.clear()
    rows.stop = None
    model = harness.create("llava", **given)
    whole = harness.create("llava", schedule=SCHEDULE)
    assert _unpadded(_answer(model, DOCS, LONG)) == _unpadded(_answer(whole, DOCS, LONG))
    assert sum(rows) == len(DOCS) - 4 + len(DOCS)
    assert model.batch_sizes["run"]["resumed"] == 4


def test_what_was_cut_short_is_answered_again(harness, rows, tmp_path):
    """Wherever a line was cut, and where a byte of it is another, the batch counts as not done."""
    model = harness.create("llava", batch_size=4, journal=str(tmp_path))
    expected = _plain(_answer(model, DOCS, LONG))
    [file] = tmp_path.rglob("*.jsonl")
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    cuts = {whole[:-1]: 3, whole[: first + 1]: 3, whole[:first]: 3, whole[: first - 1]: 7, b"": 7}
    turned = whole.replace(b'"text": "', b'"text": "x', 1)
    for content, again in {**cuts, turned: 4}.items():
        for path in tmp_path.rglob("*.jsonl"):
            path.unlink()
        file.write_bytes(content)
        rows.clear()
        model = harness.create("llava", batch_size=4, journal=str(tmp_path))
        assert _plain(_answer(model, DOCS, LONG)) == expected
        assert sum(rows) == again, content[-40:]


@pytest.mark.parametrize("fails", ["open", "write", "fsync"])
def test_a_full_disk_ends_the_run_and_loses_nothing(fails, harness, rows, tmp_path, monkeypatch):
    from lmms_prune.harness.journal import JournalError

    def full(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(file, mode="r", *args, _open=open, **options):
        return full() if set(mode) & set("wax+") else _open(file, mode, *args, **options)

    model = harness.create("llava", batch_size=2, journal=str(tmp_path))
    with monkeypatch.context() as patch:
        original, calls = os.fsync, []

        def late(*args):
            calls.append(args)
            return full() if len(calls) > 2 else original(*args)

        if fails == "fsync":
            patch.setattr(os, "fsync", late)
        elif fails == "write":
            patch.setattr("lmms_prune.harness.journal._line", full)
        else:
            patch.setattr("builtins.open", opened)
        with pytest.raises(JournalError, match=r"\.jsonl cannot be written: No space left on device"):
            _answer(model, DOCS, LONG)
    written = 2 if fails == "fsync" else 0
    rows.clear()
    model = harness.create("llava", batch_size=2, journal=str(tmp_path))
    assert _unpadded(_answer(model, DOCS, LONG)) == _unpadded(_answer(harness.create("llava"), DOCS, LONG))
    # What was written before, but not said to be on the disk, may count or not.
    assert len(DOCS) - written - 2 <= sum(rows) - len(DOCS) <= len(DOCS) - written


def test_a_folder_that_is_none_is_told_before_anything_is_loaded(harness, tmp_path, monkeypatch):
    from lmms_prune.harness.arguments import ArgumentError

    monkeypatch.setattr("lmms_prune.harness.pruned.load_model", None)
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ArgumentError, match=rf"journal={name} cannot be made: .*; name a folder"):
            harness.create("llava", journal=str(name))


def test_sampled_answers_are_drawn_again(harness, rows, tmp_path):
    """The stream of torch's generator is then that of an uninterrupted run."""
    model = harness.create("llava", journal=str(tmp_path))
    drawn = {**LONG, "temperature": 3.0}

    def run():
        torch.manual_seed(0)
        rows.clear()
        return _plain(model.generate_until([*_requests(model, DOCS[:2], LONG), *_requests(model, DOCS[:2], drawn)]))

    first = run()
    model = harness.create("llava", journal=str(tmp_path))
    assert run() == first
    assert sum(rows) == 2


def test_the_same_asked_twice_is_answered_twice(harness, rows, tmp_path):
    model = harness.create("llava", journal=str(tmp_path))
    requests = _requests(model, DOCS[:1], LONG) * 2
    model.generate_until(requests)
    assert sum(rows) == 2
    model = harness.create("llava", journal=str(tmp_path))
    requests = _requests(model, DOCS[:1], LONG) * 2
    model.generate_until([*requests, requests[0]])
    assert sum(rows) == 3


def test_a_journal_is_no_part_of_what_a_run_is(harness, tmp_path):
    plain, kept = harness.create("llava"), harness.create("llava", journal=str(tmp_path))
    assert repr(plain) == repr(kept)
    assert plain.batch_sizes == kept.batch_sizes


@pytest.mark.slow
def test_killed_and_started_again_it_leaves_the_same_files(harness, tmp_path):
    """kill -9 after some batches, twice; then the samples, the scores and the averages are those of a whole run."""
    tasks = ("pope", "textvqa_val", "docvqa_val", "ocrbench", "mme")
    model, text = "llava_pruned", harness.text("llava", schedule=SCHEDULE, batch_size=2)
    whole = harness.fork("--model", model, "--model_args", text, "--tasks", ",".join(tasks))
    kept, out = tmp_path / "journal", tmp_path / "out"
    options = ("--model", model, "--model_args", f"{text},journal={kept}", "--tasks", ",".join(tasks))
    line = [*harness.forking.prefix, *harness.line(("lmms-eval",), options, out)]
    for _ in range(2):
        before = len(entries(kept))
        environment = harness.forking.environment
        with subprocess.Popen(line, cwd=harness.mirror, env=environment, stdout=-3, stderr=-3) as process:
            while len(entries(kept)) < before + 2:
                assert process.poll() is None
                time.sleep(0.002)
            process.terminate()  # which kills it, see forks/client.py
        assert process.returncode == -signal.SIGKILL
    before = len(entries(kept))
    run = harness.fork(*options, output=out)
    assert run.results is not None, run.stderr[-3000:]
    assert run.samples == whole.samples
    assert run.metrics == whole.metrics
    assert run.recorded.pop("resumed") == before < sum(len(found) for found in run.samples.values())
    assert whole.recorded.pop("resumed") == 0
    for one in (run, whole):
        assert 0 <= one.recorded.pop("other_load") <= 1  # of other programs
        assert one.recorded.pop("peak_memory") > 2**20
    assert run.recorded == whole.recorded
    keys = entries(kept)
    assert len(keys) == len(set(keys)) == sum(len(found) for found in run.samples.values())


def entries(folder: Path) -> list[str]:
    """The keys of all samples in a journal's complete lines."""
    lines = [line for path in folder.rglob("*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [entry["key"] for line in lines if line.endswith(b"\n") for entry in json.loads(line.split(b" ", 1)[1])]


def test_no_file_of_ours_holds_a_secret(harness, rows, tmp_path, monkeypatch):
    """Neither the journal, nor the cache's stamps, nor what the results say; an answer with one in it is answered again."""
    secret = "correct horse battery"
    monkeypatch.setenv("SOME_PASSWORD", secret)
    token = "hf_" + "x1" * 17
    prompt = f"The password is {secret}, the token {token}."
    given = {"schedule": SCHEDULE, "system_prompt": prompt, "batch_size": 2}

    def files(folder: Path) -> str:
        return "".join(path.read_text("utf-8") for path in folder.rglob("*.json*"))

    def answered() -> list:
        model = harness.create("llava", **given, journal=str(tmp_path / "journal"))
        assert secret not in repr(model.batch_sizes)
        recorded = model.batch_sizes["run"]["settings"]
        assert recorded["system_prompt"] == "The password is [REDACTED], the token [REDACTED]."
        decode = model.decode
        # Batches of two: the second one holds a secret in one of its answers.
        count = iter(range(99))
        model.decode = lambda ids: f"It is {secret}." if next(count) == 2 else decode(ids)
        rows.clear()
        return _answer(model, DOCS[:4], LONG)

    first = answered()
    assert [secret in answer.text for answer in first].count(True) == 1
    assert sum(rows) == 4
    kept = files(tmp_path / "journal")
    assert "The password is [REDACTED], the token [REDACTED]." in kept
    assert not [text for text in (secret, token) if text in kept]
    assert len(entries(tmp_path / "journal")) == 3
    answered()
    assert sum(rows) == 1
    arguments = {"pretrained": str(harness.checkpoints["llava"]), **given}
    assert harness.evaluate("llava_pruned", ["pope"], arguments, use_cache=str(tmp_path / "cache")).calls
    stamps = files(tmp_path / "cache")
    assert "The password is [REDACTED], the token [REDACTED]." in stamps
    assert not [text for text in (secret, token) if text in stamps]
