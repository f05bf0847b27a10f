"""Measurements after kill -9, a full disk and a damaged file: nothing is lost, repeated, or misread."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest
from forking import Forking

from lmms_prune.demo.run import MODELS, weights
from lmms_prune.record.information import InformationError, Store

ROWS = pd.DataFrame({"sample": ["pope/test/0"], "p_k": [0.5], "p_text": [0.25]})


def test_a_full_disk_leaves_out_a_sample_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(tmp_path, {})
    store.write("pope/test/0", ROWS)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(InformationError, match=r"1\.parquet cannot be written: No space left on device"):
            store.write("pope/test/1", ROWS)
    assert store.samples() == ["pope/test/0"]
    assert [path.name for path in (tmp_path / "pope" / "test").iterdir()] == ["0.parquet"]


@pytest.mark.parametrize("size", [0, 3, 200])
def test_a_damaged_file_is_named(size: int, tmp_path: Path) -> None:
    store = Store.open(tmp_path, {})
    store.write("pope/test/0", ROWS)
    os.truncate(store.path("pope/test/0"), size)
    with pytest.raises(InformationError, match=r"0\.parquet is damaged .*; remove it and measure the sample again"):
        store.read()


def test_a_file_of_other_columns_is_named(tmp_path: Path) -> None:
    store = Store.open(tmp_path, {})
    store.write("pope/test/0", ROWS.rename(columns={"p_k": "p"}))
    with pytest.raises(InformationError, match=r"0\.parquet lacks p_k or p_text; remove it"):
        store.read()


@pytest.mark.slow
def test_a_killed_and_restarted_run_gives_the_same_result(data: Path, forking: Forking, tmp_path: Path) -> None:
    arguments = ["--model", str(weights(MODELS[0])), "--model-args", "device=cpu,dtype=float32"]
    command = ["lmms-prune", "information", *arguments, "--tasks", "pope", "--limit", "4", "--layers", "0,11"]
    command += ["--block", "4", "--pictures", "1", "--out"]

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    forking.run(*command, tmp_path / "whole", cwd=data, check=True)
    again = tmp_path / "again"
    line = forking.program(*command, again)
    with subprocess.Popen(line, cwd=data, env=forking.environment, stdout=-3, stderr=-3) as process:
        while not list(again.rglob("*.parquet")):
            assert process.poll() is None
            time.sleep(0.002)
        process.terminate()  # which kills it, see forks/client.py
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in again.rglob("*.parquet")}
    assert 0 < len(before) < 4
    forking.run(*command, again, cwd=data, check=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    # The killed process may have left a partial file in the folder.
    left = {path: content for path, content in contents(again).items() if not path.endswith(".partial")}
    assert left == contents(tmp_path / "whole")
    assert {Path(path).suffix for path in left} == {".json", ".parquet", ".csv", ".png", ".svg"}
