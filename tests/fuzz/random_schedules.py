"""Random schedules on random batches against the masked reference: ``python tests/fuzz/random_schedules.py --cases 20000``.

A case is one schedule of methods that only drop tokens, on a batch of one to four rows; one of the rows, drawn at random,
is compared in the prefill and in every decode step with the reference that removes nothing and masks what was dropped.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))

from built import Built, Checkpoint
from masked_reference import dropped_columns, masked_logits
from tiny import Family, load, noise

from lmms_prune import Schedule, Stage, prune
from lmms_prune.methods import METHODS

LAYERS, STEPS, ROWS = 4, 3, 24
# sgl writes an answer with the guide, and CDPruner's own CLIP is not at hand.
OPTIONS = {"sgl": (("new_tokens", 2),), "cdpruner": (("clip", "embeddings"),)}
METHODS_THAT_DROP = [spec for spec in METHODS.values() if spec.ready and not spec.rewrites and not spec.crops_cache]
QUESTIONS = ["yes or no", "What colour is it? Answer with a single word.", "Which one, A or B?", "a"]
SIDES = (28, 56, 84, 112)


def rows(family: Family, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows as the processor makes them: no image, one or two, of several sizes, with questions of several lengths."""
    draw, made = Random(seed), []
    for number in range(ROWS):
        many = draw.choice([0, 1, 1, 1, 2])
        images = [noise(100 * number + i, draw.choice(SIDES), draw.choice(SIDES)) for i in range(many)]
        made.append(family.inputs([draw.choice(QUESTIONS)], [images]))
    return made


def batch(chosen: Sequence[dict[str, Tensor]], padding: int) -> dict[str, Tensor]:
    """Rows as one left-padded batch."""
    longest = max(row["input_ids"].shape[1] for row in chosen)
    fill = {"input_ids": padding, "attention_mask": 0, "mm_token_type_ids": 0}
    joined = {}
    for name in dict.fromkeys(name for row in chosen for name in row):
        parts = [row[name] for row in chosen if name in row]
        if name in fill:
            parts = [torch.nn.functional.pad(one, (longest - one.shape[1], 0), value=fill[name]) for one in parts]
        joined[name] = torch.cat(parts)
    return joined


def schedule(draw: Random) -> Schedule:
    """One to three stages at any layers, in ratios or in tokens, as little as nothing and as much as all."""
    layers = sorted(draw.sample(range(LAYERS), draw.choice([1, 2, 2, 3])))
    in_tokens, stages = draw.random() < 0.3, []
    amounts = sorted((draw.choice([0, 3, *[draw.randrange(1, 100)] * 6, 100]) for _ in layers), reverse=True)
    for layer, amount in zip(layers, amounts, strict=True):
        able = [
            m
            for m in METHODS_THAT_DROP
            if m.lowest_layer <= layer <= (LAYERS if m.highest_layer is None else m.highest_layer)
        ]
        spec = draw.choice(able)
        keep = amount if in_tokens else Decimal(amount) / 100
        stages.append(Stage(spec.name, layer, 0 if spec.drops_all else keep, OPTIONS.get(spec.name, ())))
        if spec.drops_all:
            break
    return Schedule(tuple(stages))


def differs(family: Family, pool: Sequence[dict[str, Tensor]], draw: Random) -> tuple[str, float, bool]:
    """One case: what it was, the largest difference of a logit from the reference, and whether something was dropped."""
    plan, compact = schedule(draw), family.name == "llava" and draw.random() < 0.3
    chosen = [draw.choice(pool) for _ in range(draw.choice([1, 2, 3, 4]))]
    inputs = batch(chosen, family.processor.tokenizer.pad_token_id)
    with prune(family.model, plan, seed=draw.randrange(100), positions="compact" if compact else "original") as trace:
        output = family.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
            return_dict_in_generate=True,
            output_logits=True,
            # A generated image token would make the reference look for an image.
            suppress_tokens=[family.model.config.image_token_id],
            begin_suppress_tokens=None,
        )
    place = draw.randrange(len(chosen))
    record, alone = trace.rows[place], chosen[place]
    drops = {
        stage.layer: dropped_columns(
            alone["input_ids"][0].tolist(), family.model.config.image_token_id, record.images, masks
        )
        for stage, masks in zip(plan.stages, record.masks, strict=True)
    }
    generated = output.sequences[place, inputs["input_ids"].shape[1] :]
    expected = masked_logits(family.model, alone, generated, drops, compact).float()
    found = torch.stack([logits[place] for logits in output.logits]).float()
    name = f"{family.name} {plan} {'compact' if compact else 'original'}, row {place} of {len(chosen)}"
    return name, float((found - expected).abs().max()), any(drops.values())


def families(checkpoint: Checkpoint) -> list[Family]:
    """A tiny model of each family in float64, in which rounding decides nothing."""
    names = {"llava": "llava", "qwen": "qwen2_5_vl"}
    return [load(name, checkpoint(family, layers=LAYERS), torch.float64, "sdpa") for name, family in names.items()]


TOLERANCE = 1e-5  # generate() hands out logits in float32


def compare(families: Sequence[Family], cases: int, seed: int) -> tuple[list[str], int, float]:
    """What failed, in how many cases something was dropped, and the largest difference seen."""
    pools, draw, failed, dropped, largest = [rows(one) for one in families], Random(seed), [], 0, 0.0
    for case in range(cases):
        place = case % len(families)
        try:
            name, off, some = differs(families[place], pools[place], draw)
        except Exception:  # a crash is a finding like any other
            failed.append(f"case {case}: {traceback.format_exc(limit=-3)}")
            continue
        dropped, largest = dropped + some, max(largest, off)
        if not off <= TOLERANCE:
            failed.append(f"case {case}: {name}: off by {off:.2g}")
    return failed, dropped, largest


def main(arguments: Sequence[str] | None = None) -> None:
    """Raises SystemExit(1) if a case differs, or crashes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.process_time()
    with TemporaryDirectory() as folder:
        failed, dropped, largest = compare(families(Built(Path(folder)).checkpoint), options.cases, options.seed)
    for one in failed[:10]:
        print(one)
    print(
        f"{options.cases:,} cases, seed {options.seed}, {len(METHODS_THAT_DROP)} methods: in {dropped:,} the row "
        f"that is compared lost tokens; largest difference of a logit {largest:.1e}, {len(failed)} failures; "
        f"{time.process_time() - start:.0f} s of one processor"
    )
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
