"""Every method on a pretended GPU: how often the host waits, how many kernels are launched, how large its tensors are.

Counted are the lines of ``lmms_prune/methods`` and ``models``; the mechanism around a stage takes 65 to 90 more. An image has 576
tokens here, or up to 576 where a batch is ragged: then it has six sizes of image.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

from lmms_prune.bench.models import ragged_inputs
from lmms_prune.bench.pretended import PretendedGpu, PretendedTensor
from lmms_prune.bench.waits import Counted, Work, count
from lmms_prune.methods import METHODS
from lmms_prune.methods.shared.greedy.products import MOST_STORED
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule import Schedule

SIDE, BATCH = 24, 8
OWN = ("lmms_prune/methods/", "lmms_prune/models/")
MOST = 200
# As its documentation says, the order of a Python set has to be found on the host.
WAITS = {"dart@2:0.3;order=reference": 1}
OPTIONS = (
    *WAITS,
    "visionzip@0:0.3;merge=mean",
    "holov@0:0.3;order=reference",
    "sparsevlm@2:0.3;version=v2.0",
    "hivtp@0",
    "mustdrop@0",
    "mustdrop@2",
    "todre@2",
    "tome@1:0.3;metric=keys",
    "vflowopt@0:0.3;alpha=0.5",
    "swiftvlm@1:0.5,swiftvlm@2:0.3",
    "tome@1:0.02",
    "folder@1:0.02",
)
INSIDE_CLIP = ("tome@0:0.3;place=encoder", "folder@0:0.3;variant=full", "folder@0:0.02;variant=full")
# Methods that run blocks of CLIP again.
RERUN = ("mustdrop@0", "mustdrop@0:0.3", "downsample@0:0.3", *INSIDE_CLIP)
DEEP = 24


@cache
def model_of(family: str, side: int, blocks: int = 4) -> Any:
    text: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 600, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    if family == "llava":
        vision: dict[str, Any] = {
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": blocks,
        }
        vision |= {"num_attention_heads": 2, "image_size": 14 * side, "patch_size": 14, "projection_dim": 32}
        text["model_type"] = "llama"
        config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=599)
        return LlavaForConditionalGeneration(config).eval()
    text["rope_parameters"] = {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 3, 3]}
    vision = {"depth": blocks, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"fullatt_block_indexes": [1, 3]}
    special = {"image_token_id": 599, "video_token_id": 598, "vision_start_token_id": 597, "vision_end_token_id": 596}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **special)
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def inputs_of(family: str, batch: int, side: int = SIDE) -> dict[str, Tensor]:
    """Rows of different texts, and of different images where the family allows."""
    return ragged_inputs(model_of(family, side), batch, None if family == "llava" else (side, side), 40)


def schedules(family: str) -> Iterator[str]:
    for spec in METHODS.values():
        # Those need measured files, a second model's answer, or trained weights.
        if not spec.ready or spec.trained or spec.name in ("information", "sgl"):
            continue
        options = dict(Schedule.parse(spec.example).stages[0].options)
        written = "".join(f";{name}={value}" for name, value in options.items())
        layers = {spec.lowest_layer, 1 if spec.highest_layer is None else spec.highest_layer}
        yield from (f"{spec.name}@{layer}{'' if spec.drops_all else ':0.3'}{written}" for layer in sorted(layers))
    yield from OPTIONS
    yield from INSIDE_CLIP if family == "llava" else ()


def counted(family: str, schedule: str, batch: int, side: int = SIDE, blocks: int = 4, **options: Any) -> Counted:
    inputs, model = inputs_of(family, batch, side), model_of(family, side, blocks)
    return count(model, inputs, schedule, questions=["what"] * batch, count_selection=False, **options)


def own(work: Work) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    launches = {line: launched for line, launched in work.lines.items() if line.startswith(OWN)}
    return launches, {key: waited for key, waited in work.waits.items() if key[1].startswith(OWN)}


@pytest.mark.parametrize(
    ("family", "schedule"), [(family, schedule) for family in ("llava", "qwen2_5_vl") for schedule in schedules(family)]
)
def test_no_waits_and_few_launches(family: str, schedule: str, full: bool) -> None:
    for batch in (1, BATCH) if full else (BATCH,):
        found = counted(family, schedule, batch)
        assert found.stages
        for layer, work in found.stages.items():
            launches, waits = own(work)
            listed = "\n".join(
                f"{number} {line}" for line, number in sorted(launches.items(), key=lambda item: -item[1])
            )
            assert sum(waits.values()) <= WAITS.get(schedule, 0), f"layer {layer}, batch {batch}: {waits}"
            assert sum(launches.values()) < MOST, f"layer {layer}, batch {batch}: {sum(launches.values())}\n{listed}"


def block_launches() -> int:
    """Kernel launches of one block of CLIP, as the library runs it."""
    block = ModelParts.of(model_of("llava", SIDE, DEEP)).encoder_blocks[0]
    gpu = PretendedGpu()
    with gpu.placed(block), gpu.running(), torch.no_grad():
        block(PretendedTensor(torch.randn(1, SIDE**2 + 1, 32)), None)
    return gpu.launches[""]


@pytest.mark.parametrize("schedule", RERUN)
def test_a_deep_encoder_that_runs_again_takes_few_launches_of_ours(schedule: str) -> None:
    """CLIP of 24 blocks, as LLaVA-1.5-7B's: the model's own operations are counted apart, and there are no more of them."""
    stages = {
        (batch, blocks): counted("llava", schedule, batch, blocks=blocks, new_tokens=2).stages[0]
        for batch, blocks in ((1, DEEP), (3, DEEP), (1, 4))
    }
    shallow, deep = stages[1, 4], stages[1, DEEP]
    further = DEEP - 4
    per_block = (sum(own(deep)[0].values()) - sum(own(shallow)[0].values())) / further
    for (batch, blocks), work in stages.items():
        launches = sum(own(work)[0].values())
        assert 0 < launches < MOST, f"{blocks} blocks, batch {batch}: {launches}, {per_block} for each further block"
        assert not own(work)[1]
    # FOLDER runs the selected block alone.
    runs_again = 0 if schedule.startswith("folder") else further
    assert deep.rerun - shallow.rerun == runs_again * block_launches()
    assert deep.rerun > 0


@pytest.mark.parametrize("schedule", ["divprune@0:2t", "todre@0:2t", "cdpruner@0:2t;clip=embeddings", "dart@1:0.1"])
def test_no_matrix_of_all_pairs_of_a_large_image(schedule: str) -> None:
    """An image of 65 × 65 tokens is larger than those whose products of all pairs are stored."""
    side = 65
    assert side**2 > MOST_STORED
    found = counted("llava", schedule, 1, side)
    # In the coarsest type in which products are compared.
    assert found.largest < 4 * side**4
    for work in found.stages.values():
        assert sum(own(work)[0].values()) < MOST


def test_the_large_image_of_vispruner() -> None:
    """Its passes are hundreds there, and what they look at is a matter of each token's nearest others."""
    found = counted("llava", "vispruner@0:0.3", 1, 65)
    assert found.largest < 4 * 65**4
    for work in found.stages.values():
        launches, waits = own(work)
        assert sum(launches.values()) < MOST
        assert not waits
