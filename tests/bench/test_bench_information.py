"""``lmms-prune bench-information``: what is counted; how fast it is, no test says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmms_prune.cli import app


@pytest.mark.parametrize(("name", "grid", "units"), [("llava", "24x24", 16), ("qwen", "5x3", 6)])
def test_every_unit_at_every_layer_counts(folders: dict[str, Path], name: str, grid: str, units: int) -> None:
    """Blocks of two by two; a LLaVA of these tests has images of 8 x 8 visual tokens, and odd sides clip blocks."""
    command = ["bench-information", "--model", str(folders[name]), "--block", "2", "--repeats", "1", "--json"]
    found = CliRunner().invoke(app, [*command, "--grid", grid, "--text-tokens", "20"])
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout.strip().splitlines()[-1])
    assert (said["units"], said["layers"], len(said["run_seconds"])) == (units, 8, 8)
    assert said["runs_seconds"] == pytest.approx(units * sum(said["run_seconds"]))
    assert said["ratio"] == pytest.approx(said["runs_seconds"] / said["seconds"])
    assert min(said["seconds"], *said["run_seconds"]) > 0


def test_a_block_larger_than_the_image_is_refused(folders: dict[str, Path]) -> None:
    found = CliRunner().invoke(app, ["bench-information", "--model", str(folders["llava"]), "--block", "99"])
    assert found.exit_code == 2
    assert "has no block of 99 x 99" in found.output
