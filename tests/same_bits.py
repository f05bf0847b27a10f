"""Whether two checkouts prune alike to the last bit: run it once on each, and compare the files.

    PYTHONPATH=OLD python tests/same_bits.py old.json
    PYTHONPATH=NEW python tests/same_bits.py new.json
    python tests/same_bits.py old.json new.json

Every method that needs no trained weights or measurements, alone and in schedules of several stages, with the demo's models
and batches of 1 and 5 rows of different lengths: the bits of four steps' logits, the tokens, the kept tokens, and how many were
changed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GRIDS = ((12, 12), (10, 14), (8, 12), (12, 10))
SEVERAL = (
    "dart@2:0.44,random@8:0.07",
    "dart@2:0.44,random@8:0.07|compact",
    "sparsevlm@2:0.5,sparsevlm@5:0.3,sparsevlm@8:0.15",
    "pdrop@3:0.5,pdrop@6:0.25",
    "divprune@0:0.5,swiftvlm@3:0.4,swiftvlm@6:0.2",
    "random@1:1",
    "vtw@6",
)


def ragged(model: Any, rows: int, any_size: bool) -> dict[str, Tensor]:
    from lmms_prune.bench.models import random_inputs

    parts = [random_inputs(model, 1, GRIDS[i % 4] if any_size else None, 40 - 3 * i) for i in range(rows)]
    longest = max(part["input_ids"].shape[1] for part in parts)
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")

    def left(name: str, x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (longest - x.shape[1], 0)) if name in by_token else x

    return {name: torch.cat([left(name, part[name]) for part in parts]) for name in parts[0]}


def schedules(model_type: str) -> Iterator[str]:
    from lmms_prune.methods import METHODS
    from lmms_prune.schedule import Schedule

    yield from (text for text in SEVERAL if model_type == "llava" or "compact" not in text)
    for spec in METHODS.values():
        if not spec.ready:
            continue
        options = dict(Schedule.parse(spec.example).stages[0].options)
        written = "".join(f";{name}={value}" for name, value in options.items())
        for layer in sorted({spec.lowest_layer, 4 if spec.highest_layer is None else spec.highest_layer}):
            yield f"{spec.name}@{layer}{'' if spec.drops_all else ':0.3'}{written}"


def digests() -> dict[str, list]:
    from transformers import AutoModelForImageTextToText

    import lmms_prune

    found = {}
    weights = Path(lmms_prune.__file__).with_name("demo") / "weights"
    for folder in sorted(file.parent for file in weights.glob("*/config.json")):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        for rows in (1, 5):
            inputs = ragged(model, rows, model.config.model_type != "llava")
            for text in schedules(model.config.model_type):
                schedule, _, positions = text.partition("|")
                settings = {"positions": positions or "original", "questions": ["what"] * rows}
                with torch.no_grad(), lmms_prune.prune(model, schedule, **settings) as trace:
                    answer = model.generate(
                        **inputs,
                        max_new_tokens=4,
                        min_new_tokens=4,
                        do_sample=False,
                        pad_token_id=0,
                        return_dict_in_generate=True,
                        output_logits=True,
                    )
                bits = torch.stack(list(answer.logits)).numpy().tobytes() + answer.sequences.numpy().tobytes()
                kept = [[row.indices(stage) for stage in range(len(row.masks))] for row in trace.rows]
                changed = [row.recycled for row in trace.rows]
                found[f"{folder.name}, {rows} rows, {text}"] = [hashlib.sha1(bits).hexdigest(), kept, changed]
    return found


def main(files: list[Path]) -> int:
    torch.set_num_threads(1)
    if len(files) == 1:
        files[0].write_text(json.dumps(digests()), encoding="utf-8")
        return 0
    old, new = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            before, after = old.get(name), new.get(name)
            kept = "missing" if None in (before, after) else "other bits" if before[1:] == after[1:] else "other tokens"
            print(f"{kept}: {name}")
    same = sum(old.get(name) == new[name] for name in new)
    print(f"{same} of {len({*old, *new})} alike")
    return int(same < len({*old, *new}))


if __name__ == "__main__":
    sys.exit(main([Path(name) for name in sys.argv[1:]]))
