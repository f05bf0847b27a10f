"""A schedule as JSON, for serving plugins: its stages, and the tokens and cache bytes of each layer. Free of torch.

`export.schema.json` beside this file is its schema. A change that a reader must know of raises VERSION.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_prune.efficiency.cost import kv_bytes
from lmms_prune.errors import ConfigError
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import ADAPTIVE, PromptSizes, Schedule, Stage
from lmms_prune.schedule.stage import print_keep

FORMAT, VERSION = "lmms-prune.schedule", 1


def exported(
    schedule: Schedule,
    prompt: PromptSizes,
    tokens: Sequence[int],
    positions: str,
    model: Architecture | None,
    package: str,
) -> dict[str, Any]:
    """The document of a schedule.

    Args:
        schedule: every ``?`` solved.
        prompt: the model's depth and tiles.
        tokens: visual tokens of the images to count for, each alone in its prompt.
        positions: "original" or "compact".
        model: the model's sizes; None if only its depth is known.
        package: the version of this package.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "package": f"lmms-prune {package}",
        "schedule": str(schedule.portable),
        "positions": positions,
        "layers": prompt.layers,
        "model": None if model is None else _model(model),
        "stages": [_stage(stage) for stage in schedule.portable.stages],
        "images": [_image(schedule, prompt, count, model) for count in tokens],
    }


def schedule_of(document: Mapping[str, Any]) -> Schedule:
    """The schedule of an exported document, read from its stages.

    Raises:
        ConfigError: another format or version, or stages that are not those of the document's schedule text.
        ScheduleError: a stage that is wrong.
    """
    stated = (document.get("format"), document.get("version"))
    if stated != (FORMAT, VERSION):
        raise ConfigError(
            f"format {stated[0]!r}, version {stated[1]!r}: only {FORMAT!r}, version {VERSION}, can be read."
        )
    schedule = Schedule.parse([_text(stage) for stage in document["stages"]] or "none")
    if str(schedule) != document["schedule"]:
        raise ConfigError(
            f"the stages are those of '{schedule}', but schedule is '{document['schedule']}'; export it again."
        )
    return schedule


def as_text(document: Mapping[str, Any]) -> str:
    """The document as it is written: lists of numbers on one line."""
    lines: list[str] = []
    for line in json.dumps(document, indent=1, ensure_ascii=False).splitlines():
        number = line.strip().rstrip(",").lstrip("-").replace(".", "", 1)
        if lines and (number.isdigit() or (line.strip() in ("]", "],") and lines[-1][-1].isdigit())):
            lines[-1] += ("" if lines[-1].endswith("[") or line.strip()[0] == "]" else " ") + line.strip()
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def _model(model: Architecture) -> dict[str, Any]:
    (token,) = kv_bytes(model, [1])
    return {
        "name": model.name,
        "model_type": model.family.model_type,
        "bytes_per_number": model.bytes_per_number,
        "kv_bytes_per_token": token,
    }


def _stage(stage: Stage) -> dict[str, Any]:
    keep = ADAPTIVE if stage.keep == ADAPTIVE else print_keep(stage.keep)
    pairs = (option.split("=", 1) for option in str(stage).split(";")[1:])
    options = {name: value for name, value in pairs if name != "per"}
    return {
        "method": stage.method,
        "layer": stage.layer,
        "keep": "none" if stage.spec.drops_all else keep,
        "per": stage.per,
        "options": options,
        "at_most": stage.at_most,
    }


def _text(stage: Mapping[str, Any]) -> str:
    """The text of an exported stage."""
    keep = "" if stage["keep"] in ("none", ADAPTIVE) else f":{stage['keep']}"
    options = dict(stage["options"]) | ({} if stage["per"] == "image" else {"per": stage["per"]})
    return f"{stage['method']}@{stage['layer']}{keep}" + "".join(f";{name}={value}" for name, value in options.items())


def _image(schedule: Schedule, prompt: PromptSizes, tokens: int, model: Architecture | None) -> dict[str, Any]:
    """Counts for a prompt with one image of `tokens` visual tokens; text tokens are not among them."""
    tiles = prompt.tiles(tokens)
    cached = schedule.cached_counts(prompt.layers, [tokens], tiles)
    return {
        "visual_tokens": tokens,
        "kept_tokens": [sum(images) for images in schedule.plan([tokens], tiles)],
        "layer_visual_tokens": schedule.layer_counts(prompt.layers, [tokens], tiles),
        "avg_visual_tokens": float(schedule.avg_visual_tokens(prompt.layers, [tokens], tiles)),
        "layer_cached_visual_tokens": cached,
        "layer_visual_kv_bytes": None if model is None else kv_bytes(model, cached),
    }
