"""The work of a step before it runs, in FLOPs, and GPU hours at a stated rate."""

from __future__ import annotations

from collections.abc import Iterable

from lmms_prune.efficiency.cost import decode_flops, prefill_flops
from lmms_prune.efficiency.estimate import TEXT_TOKENS, estimate
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import Schedule

RATE = 50.0
"""TFLOP/s that a GPU sustains in whole evaluations, if no other rate is stated: a sixth of an A100's 312 in 16 bits."""
ANSWER = 8  # tokens of an answer
BLOCK = 2  # side of a unit of information, as the commands have it
DOCUMENTS = {
    **{"MME": 2374, "SQA": 2017, "POPE": 9000, "TextVQA": 5000, "MMB": 4329, "MMB-CN": 4329, "GQA": 12578},
    **{"InfoVQA": 2801, "DocVQA": 5349, "OCRBench": 1000, "OCRVQA": 100037},
}
"""Documents of the public sets; only the estimate reads them."""


def assumptions(rate: float) -> str:
    """What an estimate assumes, in a sentence."""
    return (
        f"Estimated from FLOPs (vision encoder, decoder, {ANSWER} answer tokens, {TEXT_TOKENS} text tokens a prompt) at {rate:g} "
        "TFLOP/s sustained on one GPU (--rate changes it). Loading, decoding images and scoring are not included."
    )


def document_flops(sizes: Architecture, schedule: Schedule) -> float:
    """FLOPs of one document's answer under a schedule."""
    cost = estimate(sizes, schedule, sizes.example_tokens, TEXT_TOKENS)
    cached = [count + TEXT_TOKENS for count in cost.visual]
    return float(cost.flops + cost.encoder_flops + decode_flops(sizes, cached, ANSWER))


def schedules_flops(sizes: Architecture, schedules: Iterable[str], documents: int) -> float:
    """FLOPs of evaluating every schedule on so many documents; of an oracle, those of random at the same stage."""
    texts = [text.partition(";of=")[0].replace("information@", "random@") for text in schedules]
    return documents * sum(document_flops(sizes, Schedule.parse(text)) for text in texts)


def information_flops(sizes: Architecture, documents: int, block: int) -> float:
    """FLOPs of measuring the information of every unit, of side `block`, at every layer of so many documents.

    At a layer, each unit runs alone with the text through the deeper layers, and so does the text without any.
    """
    units = -(-sizes.example_tokens // block**2) + 1
    tail = prefill_flops(sizes, [TEXT_TOKENS + block**2])
    output = prefill_flops(sizes, [])
    per_layer = tail - output
    runs = sum(units * (per_layer * (sizes.layers - layer) + output) for layer in range(sizes.layers))
    return documents * float(runs + document_flops(sizes, Schedule()))


def gpu_hours(flops: float, rate: float) -> float:
    """Hours of one GPU at `rate` TFLOP/s."""
    return flops / (rate * 1e12) / 3600
