"""What a schedule takes on a GPU: an estimate by arithmetic, and beside it what ``bench`` measured on that card."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmms_prune.efficiency.estimate import on_gpu
from lmms_prune.efficiency.roofline import FILLED, Gpu
from lmms_prune.models.architectures import published_in
from lmms_prune.models.sizes import Architecture
from lmms_prune.record.files import read_text
from lmms_prune.schedule import Schedule

GIB = 2**30


class MeasuredTimesError(ValueError):
    """A file holds no times of ``bench``; the message names it."""


@dataclass(frozen=True)
class Prompts:
    """The prompts of an estimate: `batch` of them, each with one image; `new_tokens` are those of an answer."""

    visual_tokens: int
    text_tokens: float
    batch: int
    new_tokens: int


def assumptions(sizes: Architecture, gpu: Gpu, prompts: Prompts) -> str:
    """Return in one paragraph what the estimate assumes."""
    return (
        f"An estimate, not a measurement: each part takes its FLOPs at {gpu.flops / 1e12:g} TFLOP/s (16 bit, dense) or its bytes at "
        f"{gpu.bandwidth / 1e12:g} TB/s, whichever is longer ({gpu.source}). Attention is counted over all pairs; not counted are "
        f"kernel launches, what attention reads and writes, the methods' selection, the processor, and in memory the vision encoder's "
        f"activations. {sizes.name} in 16 bit, batch {prompts.batch}, {prompts.new_tokens} new tokens; the largest batch fills {FILLED:.0%} of the memory."
    )


def estimated(sizes: Architecture, parsed: Schedule, gpu: Gpu, prompts: Prompts) -> dict[str, Any]:
    """Return the estimate of the schedule and of the unpruned model, for ``--json``."""
    halved = sizes.in_dtype("bfloat16")
    rows = {}
    for name, schedule in (("schedule", parsed), ("unpruned", Schedule(()))):
        least = on_gpu(
            halved, schedule, prompts.visual_tokens, prompts.text_tokens, gpu, prompts.batch, prompts.new_tokens
        )
        rows[name] = {
            "first_token_ms": 1000 * least.first_token,
            "encoder_ms": 1000 * least.encoder,
            "token_ms": 1000 * least.per_token,
            "peak_gib": least.peak / GIB,
            "largest_batch": least.largest_batch,
        }
    about = {"gpu": gpu.name, "batch": prompts.batch, "new_tokens": prompts.new_tokens}
    bound = " The schedule may keep fewer tokens; the estimate is of the most that it keeps." if parsed.at_most else ""
    return {**about, **rows, "assumptions": assumptions(sizes, gpu, prompts) + bound}


def lines(estimate: Mapping[str, Any], gpu: Gpu) -> Iterator[str]:
    """Yield the estimate as text."""
    pruned, unpruned = estimate["schedule"], estimate["unpruned"]
    shares = {name: unpruned[name] / pruned[name] for name in ("first_token_ms", "token_ms")}
    yield (
        f"Estimate for {gpu.title}: first token {pruned['first_token_ms']:.2f} ms (unpruned {unpruned['first_token_ms']:.2f}, "
        f"{shares['first_token_ms']:.2f}x; of it the vision encoder {pruned['encoder_ms']:.2f}), each further token "
        f"{pruned['token_ms']:.2f} ms ({unpruned['token_ms']:.2f}, {shares['token_ms']:.2f}x), peak memory "
        f"{pruned['peak_gib']:.2f} GiB ({unpruned['peak_gib']:.2f}), largest batch at most {_batch(pruned)} ({_batch(unpruned)})."
    )
    yield estimate["assumptions"]


def _batch(row: Mapping[str, Any]) -> str:
    return str(row["largest_batch"]) if row["largest_batch"] else "none: it does not fit"


def kept_measurements() -> list[Path]:
    """Return the files of docs/speed in a checkout of this package; none of an installed wheel."""
    return sorted((Path(__file__).parents[2] / "docs" / "speed").glob("*.json"))


def measured(files: Sequence[Path], named: Path | None, sizes: Architecture, parsed: Schedule, gpu: Gpu) -> list[str]:
    """Return what ``bench`` measured of a schedule, or of the unpruned model, on a card, a line each.

    Args:
        files: files that may hold measurements of other kinds.
        named: a file that the user named.
        sizes, parsed, gpu: the model, the schedule and the card.

    Raises:
        MeasuredTimesError: the named file holds no times of ``bench`` with the card's name.
    """
    printed = []
    for path in dict.fromkeys([*files, *([named] if named else [])]):
        outputs = _outputs(path, path == named)
        if path == named and not outputs:
            raise MeasuredTimesError(
                f"--bench {path}: it names no card; give the output of `lmms-prune bench … --json` on a GPU, or of `bench --suite`."
            )
        for card, output in outputs:
            title = str(output["model"])
            name = published_in(sizes.name) or sizes.name
            same = (
                name.lower() in title.lower() and "decoder layers" not in title
            )  # of cut models no time is comparable
            if gpu.is_named(card) and same:
                texts = {str(parsed): "", "none": "unpruned: "}
                runs = [run for run in output["runs"] if run["schedule"] in texts]
                printed += [f"{texts[run['schedule']]}{_run(run)} on {card} (bench, {path.name})" for run in runs]
    return printed


def _outputs(path: Path, named: bool) -> list[tuple[str, Mapping[str, Any]]]:
    """Return each output of ``bench`` in a file with the card's name; none for a file of another kind that was not named."""
    try:
        text = read_text(path).strip()
        try:
            content = json.loads(text)
        except ValueError:
            content = json.loads(text.splitlines()[-1])
        if "facts" in content:
            card = str(content["facts"]["card"])
            results = [part.get("result") or {} for part in content["parts"].values()]
        else:
            card, results = str(content.get("card", "")), [content]
        outputs = [(card, output) for output in results if card and "runs" in output and "model" in output]
        for _, output in outputs:
            for run in output["runs"]:
                _run(run)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if not named:
            return []
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise MeasuredTimesError(
            f"--bench {path}: this is no output of `lmms-prune bench … --json` ({reason})."
        ) from None
    return outputs


def _run(run: Mapping[str, Any]) -> str:
    """Return one measured run as text."""
    case, parts = run["case"], run["parts"]
    first = sum(float(parts[name]) for name in ("tower", "selection", "prefill"))
    texts = [f"first token {1000 * first:.2f} ms"]
    if case["new_tokens"] > 1:
        texts.append(f"each further token {1000 * float(parts['decode']) / (case['new_tokens'] - 1):.2f} ms")
    if run["peak_bytes"] is not None:
        texts.append(f"peak memory {run['peak_bytes'] / GIB:.2f} GiB")
    return f"{', '.join(texts)} (batch {case['batch']}, {case['text_tokens']} text tokens)"
