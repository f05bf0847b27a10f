"""Why a run failed, and which others will fail alike: from logs as lmms-eval, launchers and our own errors leave them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmms_prune.compat.versions import UnsupportedVersionError
from lmms_prune.harness import arguments
from lmms_prune.harness.arguments import ArgumentError, CheckpointError, ModelArguments, plain_errors
from lmms_prune.harness.failures import Failure, read_failure, read_log

# As lmms-eval 0.7.3 printed them, with filelock 4 and with a task that needs a package.
OF_THE_HOST = """
2026-11-29 INFO | Running generate_until requests
Traceback (most recent call last):
  File "/env/site-packages/lmms_eval/__main__.py", line 581, in cli_evaluate
    results, samples = cli_evaluate_single(args)
  File "/env/site-packages/lmms_eval/evaluator.py", line 102, in _enable_reentrant_filelocks
    import filelock._api as filelock_api
ModuleNotFoundError: No module named 'filelock._api'
2026-11-29 ERROR | lmms_eval.__main__:cli_evaluate:614 - Error during evaluation: No module named 'filelock._api'. Please set …
"""
OF_A_TASK = """
Traceback (most recent call last):
  File "/env/site-packages/lmms_eval/__main__.py", line 581, in cli_evaluate
    results, samples = cli_evaluate_single(args)
  File "/env/site-packages/lmms_eval/tasks/ocrbench_v2/utils.py", line 3, in <module>
    import apted
ModuleNotFoundError: No module named 'apted'
"""
OF_A_TASKS_FUNCTION = """
Traceback (most recent call last):
  File "/env/site-packages/lmms_eval/utils.py", line 961, in import_function
    module = importlib.import_module(module_name)
ImportError: Failed to import function 'picture' from module 'gone'.
"""


@pytest.mark.parametrize(
    ("text", "reason", "scope"),
    [
        (OF_THE_HOST, "ModuleNotFoundError: No module named 'filelock._api'", "environment"),
        (OF_A_TASK, "ModuleNotFoundError: No module named 'apted'", "run"),
        (OF_A_TASKS_FUNCTION, "ImportError: Failed to import function 'picture' from module 'gone'.", "run"),
        ("INFO begins\nValueError: Tasks not found: a\n", "ValueError: Tasks not found: a", "run"),
        ("INFO begins\nKilled\n", "Killed", "run"),
        ("\n", "", "run"),
    ],
)
def test_a_failure_that_is_not_ours(text: str, reason: str, scope: str) -> None:
    assert read_failure(text) == Failure(reason, False, scope)  # type: ignore[arg-type]


def test_what_ends_a_process_before_it_comes_to_a_run_ends_all(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Traceback (most recent call last):\nAttributeError: module 'numpy' has no attribute 'x'\n", "utf-8")
    assert read_log(log).scope == "run"
    assert read_log(log, before_any_run=True).scope == "environment"


@pytest.mark.parametrize(
    ("error", "scope", "expected"),
    [
        (ArgumentError("seed=a: a number\n  is wanted"), "run", "run"),
        (CheckpointError("pretrained=a is no checkpoint"), "run", "checkpoint"),
        (UnsupportedVersionError("torch 1.0 is installed"), "environment", "environment"),
    ],
)
def test_our_own_error_says_which_runs_share_it(
    error: Exception, scope: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments, "under_the_command", lambda: True)
    with pytest.raises(SystemExit) as ended, plain_errors(UnsupportedVersionError, scope=scope):  # type: ignore[arg-type]
        raise error
    assert ended.value.code == 2
    assert read_failure("INFO begins\n" + capsys.readouterr().err) == Failure(str(error), True, expected)  # type: ignore[arg-type]


def test_a_missing_checkpoint_is_all_its_runs_matter() -> None:
    from lmms_prune.harness.loading import any_config

    with pytest.raises(CheckpointError, match="pretrained=/no/such/folder is no checkpoint"):
        any_config(ModelArguments(pretrained="/no/such/folder"))
