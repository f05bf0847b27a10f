"""``--config`` files through what ``lmms-prune check`` and ``sweep`` do with them: checked, or refused by their own errors."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_values import VALUES

from lmms_prune.configs.check import check
from lmms_prune.configs.runs import KEYS, read
from lmms_prune.errors import ConfigError
from lmms_prune.sweep.jobs import SweepError, plan

PLAIN: dict[str, Any] = {
    "model": "llava_pruned",
    "model_args": {"schedule": ["dart@2:252t", "random@20:38t"], "batch_size": 8},
    "tasks": "prune_llava",
    "log_samples": True,
    "output_path": "results",
    "limit": 4,
    "include_path": "task_configs",
}
# What YAML makes of a text that looks like something else, or cannot make anything of.
ODD = [
    "[",
    "{",
    "}",
    "]",
    ":",
    "-",
    "?",
    "|",
    ">",
    "&",
    "*",
    "!",
    "%",
    "@",
    "`",
    "#",
    "'",
    '"',
    "\\t",
    "\\n",
    "\\0",
    "~",
    "null",
    "yes",
    ".nan",
    ".inf",
    "-.inf",
    "1e999",
    "0x",
    "0o",
    "1_0",
    "1:30",
    "2001-13-45",
    "2001-01-01T99:00:00Z",
    "!!int",
    "!!float",
    "!!timestamp",
    "!!binary",
    "!!set",
    "!!omap",
    "!!pairs",
    "!!merge",
    "<<",
    "=",
    "&a",
    "*a",
    "!!python/name:os.system",
    "---",
    "...",
    "%YAML",
]
ODD += [
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!binary _",
    "<<: 3",
    "? [1]\n: 2\n",
    "[" * 400,
    "{a: " * 200,
    "9" * 5000,
    "&a [*a]",
]

fuzzed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.yaml"


def checked(path: Path, text: str | bytes) -> None:
    """Checks one file as the commands do; all that may be raised are their own errors."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    try:
        runs = read(path)
    except ConfigError:
        with pytest.raises(SweepError, match=re.escape(str(path))):
            plan([path], path.parent / "out")
        return
    problems = [problem for run in runs for problem in check(run).problems]
    assert all(isinstance(problem, str) and problem for problem in problems)
    try:
        jobs = plan([path], path.parent / "out")
    except SweepError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert str(path) in refusal
        return
    # A sweep has an output path of its own.
    assert all(problem.startswith(("log_samples:", "output_path:")) for problem in problems)
    for job in jobs:
        assert job.folder.resolve().parents[1] == path.parent / "out"
        assert job.partial.resolve().parent == path.parent / "out" / ".partial"


def edited(draw: Random, text: str) -> str:
    """After one to three edits."""
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice([0, 0, 1, 3, 10]))
        text = text[:start] + draw.choice([draw.choice(ODD), draw.choice(ODD), "", text[start:end] * 2]) + text[end:]
    return text


@fuzzed
@given(st.randoms(use_true_random=False))
def test_edited_files_are_checked_or_refused(path: Path, draw: Random) -> None:
    checked(path, edited(draw, "# budget: 192t\n" + yaml.safe_dump(PLAIN)))


@fuzzed
@given(
    st.dictionaries(st.sampled_from([*PLAIN, *sorted(KEYS)]) | st.text(max_size=4), VALUES, max_size=3), st.booleans()
)
def test_values_of_any_type_are_checked_or_refused(path: Path, values: dict[str, Any], listed: bool) -> None:
    run = {**PLAIN, **values}
    checked(path, yaml.safe_dump([run, PLAIN] if listed else run, allow_unicode=True))


@fuzzed
@given(st.binary(max_size=40) | st.text(max_size=40) | st.lists(st.sampled_from(ODD), max_size=6).map(" ".join))
def test_any_file_is_checked_or_refused(path: Path, content: bytes | str) -> None:
    checked(path, content)
