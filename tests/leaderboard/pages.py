"""Leaderboards for pages: generated results, with texts and images that a test decides."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written import write_run

from lmms_prune.leaderboard.page import pictures
from lmms_prune.leaderboard.page.pictures import Wanted
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.rows import Leaderboard
from lmms_prune.leaderboard.table import leaderboard

SCHEDULES = {"none": 100.0, "dart@2:0.44,random@3:0.07": 33.0, "random@2:0.33": 33.0, "vtw@2": 50.0, "blind@0": 0.0}
HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 2</script>",
    '"onerror="window.hacked = 3" <img src=x onerror=\'window.hacked = 4\'>',
    "<!--<script>{{ 7 * 7 }} \u2028 \ud83d",
)


def board(folder: Path) -> Leaderboard:
    """What stands below `folder`."""
    return leaderboard(read_results([folder]), resamples=200)


def write_small(folder: Path) -> None:
    """Two models with five rows each, which lose more answers the fewer tokens they keep; GQA's texts are hostile."""
    for model in ("/models/tiny-llava", "/models/other-llava"):
        for number, (schedule, tokens) in enumerate(SCHEDULES.items()):
            place = folder / Path(model).name / str(number)
            # MME's images have two questions each.
            values = {task: [float(i >= 2 * number) for i in range(12)] for task in ("gqa", "mme")}
            write_run(place, values, schedule, tokens=tokens, model=model)
            (samples,) = place.rglob("*_samples_gqa.jsonl")
            rewrite(samples, dict(enumerate(HOSTILE)))


def rewrite(samples: Path, texts: Mapping[int, str]) -> None:
    """Put texts into question, reference and answer of some documents."""
    lines = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
    for said in lines:
        if (text := texts.get(said["doc_id"])) is not None:
            said |= {"input": f"question {text}", "target": f"target {text}", "filtered_resps": f"answer {text}"}
    samples.write_text("".join(json.dumps(said) + "\n" for said in lines), encoding="utf-8")


def give_images(monkeypatch: pytest.MonkeyPatch, side: int = 448) -> None:
    """Noise, which compresses worst, where the benchmarks' data would be read."""

    def read(wanted: Collection[Wanted], include: Path | None) -> dict[Wanted, tuple[list[bytes], str | None]]:
        chance = np.random.default_rng(0)
        pixels = chance.integers(0, 256, (8, side, side, 3), dtype=np.uint8)
        images = [pictures._encoded(Image.fromarray(one)) for one in pixels]
        return {one: ([images[one.doc_id % 8]], None) for one in wanted}

    monkeypatch.setattr(pictures, "_read", read)
