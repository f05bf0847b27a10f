"""``lmms-prune export``: the JSON of a schedule, its schema, and reading it back."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import lmms_prune
from lmms_prune import Schedule, ScheduleError
from lmms_prune.cli import app
from lmms_prune.configs.export import as_text, exported, schedule_of
from lmms_prune.efficiency.estimate import estimate
from lmms_prune.errors import ConfigError
from lmms_prune.methods import METHODS
from lmms_prune.models.architectures import PUBLISHED, architecture
from lmms_prune.schedule import PromptSizes

SCHEMA = json.loads((Path(lmms_prune.__file__).parent / "configs" / "export.schema.json").read_text(encoding="utf-8"))
CHECKER = jsonschema.Draft202012Validator(SCHEMA)


def run(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["export", *words])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    CHECKER.validate(document)
    return document


def test_the_papers_hybrid() -> None:
    document = run("dart@2:0.44;order=reference,random@20:0.07", "--model", "llava-1.5-7b", "--tokens", "576")
    (image,) = document["images"]
    assert document["stages"] == [
        {
            "method": "dart",
            "layer": 2,
            "keep": "0.44",
            "per": "image",
            "options": {"order": "reference"},
            "at_most": False,
        },
        {"method": "random", "layer": 20, "keep": "0.07", "per": "image", "options": {}, "at_most": False},
    ]
    assert image["kept_tokens"] == [252, 40]
    assert image["layer_visual_tokens"] == [576] * 2 + [252] * 18 + [40] * 12
    assert image["avg_visual_tokens"] == 192.75
    # 2 x 32 heads of 128 values in 16 bits.
    assert document["model"]["kv_bytes_per_token"] == 2 * 32 * 128 * 2
    assert image["layer_visual_kv_bytes"] == [16384 * count for count in image["layer_cached_visual_tokens"]]
    whole = estimate(architecture("llava-1.5-7b"), Schedule("dart@2:0.44;order=reference,random@20:0.07"), 576, 0)
    assert sum(image["layer_visual_kv_bytes"]) == whole.kv_bytes


@pytest.mark.parametrize("model", sorted(PUBLISHED))
def test_every_model_and_several_sizes(model: str) -> None:
    sizes = architecture(model)
    document = run("random@2:0.5", "--model", model, "--tokens", "576", "--tokens", "100", "--tokens", "576")
    assert [image["visual_tokens"] for image in document["images"]] == [576, 100]
    assert [len(image["layer_visual_tokens"]) for image in document["images"]] == [sizes.layers] * 2
    assert document["model"]["model_type"] == sizes.family.model_type


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_methods_example_is_read_back(name: str) -> None:
    example = Schedule(METHODS[name].example)
    if example.unknown is None:
        assert schedule_of(run(METHODS[name].example)) == example


def test_what_is_not_a_share_of_the_image() -> None:
    assert run("none")["stages"] == []
    assert schedule_of(run("none")) == Schedule()
    document = run("dart@2:?,budget=192t", "--model", "llava-1.5-7b")
    assert document["schedule"] == "dart@2:164t"
    assert document["stages"][0]["keep"] == "164t"
    assert run("mustdrop@3")["stages"][0] | {"options": {}} == {
        "method": "mustdrop", "layer": 3, "keep": "adaptive", "per": "image", "options": {}, "at_most": True
    }  # fmt: skip
    assert run("vtw@3", "--layers", "5", "--tokens", "7")["images"][0]["layer_visual_tokens"] == [7, 7, 7, 0, 0]
    tiles = run("dart@2:0.25;per=tile", "--model", "llava-v1.6-vicuna-7b", "--tokens", "1728")
    assert tiles["stages"][0]["per"] == "tile"
    assert tiles["images"][0]["kept_tokens"] == [3 * 148]
    # MustDrop crops the caches before its layer, so that they hold fewer tokens than entered.
    cropped = run("mustdrop@4:0.25", "--tokens", "100")["images"][0]
    assert cropped["layer_cached_visual_tokens"] != cropped["layer_visual_tokens"]


@given(st.randoms(use_true_random=False))
def test_any_schedule_is_read_back_from_its_stages(draw: Random) -> None:
    names = [name for name, spec in METHODS.items() if spec.lowest_layer <= 2 and spec.highest_layer is None]
    layers = sorted(draw.sample(range(2, 12), 3))
    keeps = sorted((draw.randrange(1, 9999) for _ in layers), reverse=True)
    stages = []
    for layer, keep in zip(layers, keeps, strict=True):
        spec = METHODS[draw.choice([name for name in names if not METHODS[name].drops_all])]
        stages.append(f"{spec.name}@{layer}:{keep / 10000:.4f}")
    try:
        schedule = Schedule(",".join(stages))
        document = exported(schedule, PromptSizes(12, 576), [576, 64], "original", None, "1.0")
    except ScheduleError:
        return
    CHECKER.validate(document)
    assert schedule_of(json.loads(as_text(document))) == schedule
    assert json.loads(as_text(document)) == document


def test_another_version_and_other_stages_are_refused() -> None:
    document = run("dart@2:0.44")
    with pytest.raises(ConfigError, match=r"version 2: only 'lmms-prune\.schedule', version 1"):
        schedule_of({**document, "version": 2})
    with pytest.raises(ConfigError, match=r"stages are those of 'dart@2:0\.44', but schedule is 'dart@2:0\.5'"):
        schedule_of({**document, "schedule": "dart@2:0.5"})
    assert not CHECKER.is_valid({**document, "version": 2})
    assert not CHECKER.is_valid({**document, "images": []})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("dart@2:?",), "the '?' of stage 1 needs a budget"),
        (("dartt@2:0.5",), "unknown method 'dartt' in stage 1. Did you mean 'dart'?"),
        (("dart@2:0.5", "--positions", "compakt"), "--positions compakt is not possible. Did you mean 'compact'?"),
        (("dart@2:0.5", "--positions", "compact", "--model", "qwen2.5-vl-7b"), "has M-RoPE"),
        (("dart@2:0.5", "--model", "gpt"), "unknown architecture 'gpt'"),
        (("dart@2:0.5", "--model", "llava-1.5-7b", "--layers", "3"), "has 32 decoder layers; leave --layers out"),
        (("dart@40:0.5",), "layer 40 in stage 1 is beyond the model, whose layers are 0 to 31"),
        (("dart@2:0.5,random@9:200t", "--tokens", "576", "--tokens", "100"), "keeps 100 of the 50 tokens"),
        (("downsample@0:0.25", "--model", "llava-v1.6-vicuna-7b"), "not defined for LLaVA-NeXT"),
        (("dart@2:0.5", "--out", "/nowhere/x.json"), "there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_exported_is_refused(words: tuple[str, ...], message: str) -> None:
    result = CliRunner().invoke(app, ["export", *words])
    assert result.exit_code == 2
    assert message in result.output
    assert result.stdout == ""


def test_a_file_gets_what_the_terminal_gets(tmp_path: Path) -> None:
    out = tmp_path / "schedule.json"
    written = CliRunner().invoke(app, ["export", "dart@2:0.44", "--out", str(out)])
    printed = CliRunner().invoke(app, ["export", "dart@2:0.44"])
    assert (written.exit_code, written.output) == (0, "")
    assert out.read_text(encoding="utf-8") == printed.stdout


def test_the_page_shows_what_is_exported() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    shown = json.loads(page.partition("```json\n")[2].partition("```")[0])
    document = run("dart@2:0.44,random@20:0.07", "--model", "llava-1.5-7b", "--tokens", "576")
    images = shown.pop("images")
    assert {name: document[name] for name in shown} == shown
    assert {name: document["images"][0][name] for name in images[0]} == images[0]
