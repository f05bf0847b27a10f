"""The parts of ``lmms-prune bench --suite``: each is a command of this package, run as a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from lmms_prune.demo.models import MODELS, WEIGHTS
from lmms_prune.models.family import Family

SCHEDULES = tuple(f"{name}-{budget}" for budget in (192, 64) for name in ("dart", "dart+vtw", "dart+random"))
SMALL_SCHEDULES = ("dart@1:0.25", "dart@1:0.25,random@8:0.05", "vtw@6")


@dataclass(frozen=True)
class Part:
    """One measurement of the suite.

    Args:
        name: by which it is chosen, skipped and found in the JSON.
        kind: what its JSON holds, so how it is shown: a key of `lmms_prune.bench.sections.KINDS`.
        title: what it measures, in words.
        seconds: a guess of how long it takes, with imports and weights; by it a part is begun or skipped. None was measured
            on a GPU, and the page says so.
        words: the words of its command after ``lmms-prune``; its last line of output is JSON.
        absent: why this machine cannot run it; "" if it can.
    """

    name: str
    kind: str
    title: str
    seconds: float
    words: tuple[str, ...]
    absent: str = ""


def suite_parts(device: str, small: bool) -> list[Part]:
    """Return all parts, the most valuable first. A new measurement is one more row here.

    Only the doctor tries every family. The others are measured on those of the demo, which has trained models of them;
    ``lmms-prune bench --arch`` measures any.

    Args:
        device: "cuda", "cuda:N", or with `small` "cpu".
        small: the demo's models in place of 7B shapes, and short runs: the same parts in about eight minutes on a CPU.
    """
    families = [model.family for model in MODELS]
    first, *others = families
    large, larger = (2, 3) if small else (8, 16)
    return [
        *_doctor(device, small),
        *(_schedules(family, large, device, small) for family in families),
        _schedules(first, larger, device, small),
        _selection(first, large, device, small),
        *(_schedules(family, 1, device, small) for family in families),
        _throughput(first, device, small),
        *(_information(family, device, small) for family in families),
        *(_schedules(family, larger, device, small) for family in others),
        *(_selection(family, large, device, small) for family in others),
        _compiled(first, device, small),
        *(_throughput(family, device, small) for family in others),
    ]


def _doctor(device: str, small: bool) -> Iterator[Part]:
    words: tuple[str, ...] = ("doctor", "--device", device, "--json")
    if small:
        words = (*words, "--methods", "random,dart")
    yield Part(
        "doctor-sdpa", "doctor", "the certificate's covering cells with SDPA", 60.0, (*words, "--attention", "sdpa")
    )
    absent = ""
    if not device.startswith("cuda"):
        absent = "FlashAttention needs a GPU"
    elif find_spec("flash_attn") is None:
        absent = "flash-attn is not installed: pip install 'lmms-prune[flash]'"
    flash = (*words, "--attention", "flash_attention_2", "--dtype", "bfloat16")
    yield Part("doctor-flash", "doctor", "the certificate's covering cells with FlashAttention 2", 45.0, flash, absent)


def _schedules(family: Family, batch: int, device: str, small: bool) -> Part:
    schedules = SMALL_SCHEDULES if small else SCHEDULES
    repeats, new_tokens = ("3", "8") if small else ("5", "16")
    words: tuple[str, ...] = (
        "bench",
        *schedules,
        *_model(family, small),
        "--device",
        device,
        "--batch-size",
        str(batch),
    )
    words = (*words, "--new-tokens", new_tokens, "--repeats", repeats, "--json")
    title = f"{family.title}: realised speed-up of {len(schedules)} schedules at batch {batch}"
    return Part(f"schedules-{family.model_type}-{batch}", "schedules", title, 15.0 if small else 40.0, words)


def _compiled(family: Family, device: str, small: bool) -> Part:
    """The host's time in a decode step is largest relative to the device's at batch 1."""
    part = _schedules(family, 1, device, small)
    title = f"{part.title}, norms and MLPs compiled by torch.compile"
    return Part(f"compiled-{family.model_type}-1", "schedules", title, 70.0, (*part.words, "--compile"))


def _selection(family: Family, batch: int, device: str, small: bool) -> Part:
    words: tuple[str, ...] = (
        "bench-methods",
        "--batch-size",
        str(batch),
        "--device",
        device,
        "--repeats",
        "3" if small else "5",
        "--json",
    )
    words = (*words, *(("--model", _weights(family), "--grid", "12x12") if small else ("--family", family.model_type)))
    title = f"{family.title}: every method's selection at batch {batch}"
    return Part(f"selection-{family.model_type}", "selection", title, 25.0, words)


def _throughput(family: Family, device: str, small: bool) -> Part:
    words: tuple[str, ...] = (
        "bench-throughput",
        "--demo",
        "--wrapper",
        family.model_name,
        "--device",
        device,
        "--json",
    )
    words = (
        *words,
        "--schedule",
        "divprune@0:0.11",
        "--limit",
        "96" if small else "32",
        "--repeats",
        "1" if small else "2",
    )
    title = f"{family.title}: samples per second through lmms-eval, the demo's model and data"
    return Part(f"throughput-{family.model_type}", "throughput", title, 120.0 if small else 100.0, words)


def _information(family: Family, device: str, small: bool) -> Part:
    words: tuple[str, ...] = ("bench-information", *_model(family, small), "--device", device, "--json")
    words = (*words, "--block", "3" if small else "2", "--repeats", "2" if small else "3")
    title = f"{family.title}: information of all visual tokens at all layers"
    return Part(f"information-{family.model_type}", "information", title, 15.0 if small else 40.0, words)


def _model(family: Family, small: bool) -> Sequence[str]:
    if small:
        return "--model", _weights(family), "--dtype", "float32", "--grid", "12x12"
    return "--arch", family.published_default


def _weights(family: Family) -> str:
    model = next(model for model in MODELS if model.family is family)
    return str(WEIGHTS / model.folder)
