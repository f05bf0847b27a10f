"""What a run's answers depend on: each of it makes another run, and nothing else does."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from importlib.metadata import version

import pytest

from lmms_prune.harness import fingerprint
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.record.run import Provenance
from lmms_prune.schedule import Schedule

EXECUTED = Provenance({"torch": "1"}, code="1-dirty", device="cpu (x86_64)", attention="sdpa", dtype="float32")


@pytest.fixture
def arguments(tmp_path):
    """A checkpoint of two files, and a method that reads measurements from a folder of folders."""
    for name in ("checkpoint/config.json", "checkpoint/model.safetensors", "worth/pope/test/0.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    schedule = Schedule.parse(f"information@3:0.5;of={tmp_path / 'worth'}")
    return ModelArguments(str(tmp_path / "checkpoint"), schedule, chat_template="{{ messages }}" * 100)


def digest(arguments, commit=None, **executed):
    return fingerprint.digest(fingerprint.made_from(arguments, replace(EXECUTED, **executed), commit))


CHANGES = {
    "schedule": Schedule.parse("dart@2:0.44"),
    "positions": "compact",
    "seed": 1,
    "batch_size": 2,
    "revision": "other",
    "prompt": "vicuna",
    "image_aspect": "pad",
    "max_pixels": 5,
    "system_prompt": "Look closely.",
    "chat_template": "{{ message }}",
}


def test_every_argument_that_can_change_an_answer_counts(arguments):
    changed = {name: digest(replace(arguments, **{name: value})) for name, value in CHANGES.items()}
    assert len({digest(arguments), *changed.values()}) == 1 + len(CHANGES)
    assert digest(arguments) == digest(replace(arguments, journal="here")) == digest(replace(arguments, budget="0.5"))


def test_what_was_executed_counts_and_what_says_it_again_does_not(arguments):
    changed = [digest(arguments, **{name: "other"}) for name in ("device", "attention", "dtype")]
    assert len({digest(arguments), digest(arguments, "a1b2"), *changed}) == 5
    # What was executed stands for what was asked: "auto" may be the very same.
    assert digest(replace(arguments, dtype="float32")) == digest(arguments)
    # A commit changes with every note in a README; the code's own digest stands for it.
    assert digest(arguments, code="2") == digest(arguments)


@pytest.mark.parametrize("file", ["checkpoint/model.safetensors", "worth/pope/test/0.parquet"])
def test_files_that_are_named_count_by_size_and_time(file, arguments, tmp_path):
    before = digest(arguments)
    os.utime(tmp_path / file, ns=(1, 1))
    touched = digest(arguments)
    (tmp_path / file).write_text("more")
    os.utime(tmp_path / file, ns=(1, 1))
    assert len({before, touched, digest(arguments)}) == 3
    # What lies below a checkpoint is another one.
    before = digest(arguments)
    shutil.copytree(tmp_path / "worth", tmp_path / "checkpoint" / "older")
    assert digest(arguments) == before


def test_code_and_versions_count(arguments, monkeypatch):
    before = digest(arguments)
    monkeypatch.setattr(fingerprint, "code", lambda: "another")
    code = digest(arguments)
    monkeypatch.setattr(fingerprint, "versions", lambda: {"transformers": "5.0"})
    assert len({before, code, digest(arguments)}) == 3


def test_versions_are_those_that_are_installed():
    assert fingerprint.versions()["transformers"] == version("transformers")
    assert {"lmms-prune", "lmms-eval", "torch"} <= set(fingerprint.versions())
