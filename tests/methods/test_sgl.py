"""SGL against eager attention of whole answers; the guide as the model itself and as a second checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import slow
import torch
from built import Checkpoint
from observed import (
    FAMILIES,
    LAYERS,
    ImageSpan,
    Tiny,
    assert_agree,
    eager_attentions,
    image_spans,
    kept,
)
from torch import Tensor

from lmms_prune import prune
from lmms_prune.certificate.tiny import Prompt
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.guide import answer_attention
from lmms_prune.pruning.layout import Layout

TOKENS = 6


@pytest.fixture(scope="module")
def guides(checkpoint: Checkpoint) -> dict[str, Path]:
    """Guides with half the layers and other weights."""
    return {family: checkpoint(family, layers=LAYERS // 2, seed=5) for family in FAMILIES}


def sums_of(model: Any, inputs: dict[str, Tensor], new_tokens: int, last_visual: bool) -> list[Tensor]:
    """`answer_attention`, image by image without padding."""
    layout = Layout.of(ModelParts.of(model), inputs, None, None)
    sums = answer_attention(model, inputs, layout, new_tokens, last_visual)
    return [row[:size] for row, size in zip(sums, layout.sizes, strict=True)]


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """The numbers of equal keys, group by group."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def lengths(tiny: Tiny, rows: Sequence[Prompt]) -> list[int]:
    return [tiny.batch([row])["input_ids"].shape[1] for row in rows]


def answered(tiny: Tiny, rows: Sequence[Prompt]) -> list[list[int]]:
    """The greedy answer to each prompt, but for its last token, which is never fed back; nothing is padded."""
    model, found = tiny.model(), [[]] * len(rows)
    eos = model.generation_config.eos_token_id
    ends = {eos} if isinstance(eos, int) else set(eos)
    for group in alike(lengths(tiny, rows)):
        inputs = tiny.batch([rows[number] for number in group])
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        for number, ids in zip(group, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            ended = [span for span, token in enumerate(ids) if token in ends]
            found[number] = ids[: ended[0] if ended else -1]
    return found


def looked(tiny: Tiny, rows: Sequence[Prompt]) -> list[tuple[Tensor, ImageSpan]]:
    """For each prompt with its answer, eager attention (L, L), the mean over layers and heads; nothing is padded."""
    answers, found = answered(tiny, rows), {}
    for group in alike([*zip(lengths(tiny, rows), map(len, answers), strict=True)]):
        longer = tiny.batch([rows[number] for number in group])
        fed = torch.tensor([answers[number] for number in group], dtype=torch.long)
        longer["input_ids"] = torch.cat([longer["input_ids"], fed], dim=1)
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        if "mm_token_type_ids" in longer:
            longer["mm_token_type_ids"] = torch.cat([longer["mm_token_type_ids"], torch.zeros_like(fed)], dim=1)
        weights = torch.cat(eager_attentions(tiny, longer, torch.float64), dim=1).mean(1)
        there = image_spans(longer["input_ids"], longer["attention_mask"], tiny.model().config.image_token_id)
        found |= {number: (weights[span.row], span) for number, span in zip(group, there, strict=True)}
    return [found[number] for number in range(len(rows))]


def slow_sgl(weights: Tensor, span: ImageSpan, keep: float, reference: bool = False) -> tuple[set[int], float]:
    queries = ([span.visual[-1]] if reference else []) + span.text
    scores = dict(enumerate(weights[queries][:, span.visual].mean(0).tolist()))
    order, count = slow.best_first(scores), round(keep * len(scores))
    margin = scores[order[count - 1]] - scores[order[count]]
    return set(order[:count]), margin


@pytest.fixture(scope="module")
def requested(
    all_tiny: dict[str, Tiny], full: bool
) -> Callable[[str], tuple[list[Prompt], list[tuple[Tensor, ImageSpan]]]]:
    """For a family, 200 random prompts (56 without --full), and the attention of each answer."""

    @cache
    def of(family: str) -> tuple[list[Prompt], list[tuple[Tensor, ImageSpan]]]:
        tiny, rng = all_tiny[family], random.Random(3)
        rows = [tiny.row(rng) for _ in range(200 if full else 56)]
        return rows, looked(tiny, rows)

    return of


@pytest.mark.slow
@pytest.mark.parametrize("reference", [False, True])
def test_equals_slow_reference(tiny: Tiny, requested: Callable, reference: bool) -> None:
    rows, looks = requested(tiny.family)
    amount = len(rows) // 4 if reference else len(rows)
    got, want = [], []
    for start in range(0, amount, 25):
        end = min(start + 25, amount)
        text = f"sgl@2:0.3;new_tokens={TOKENS}" + (";reference=true" if reference else "")
        trace, _ = tiny.run(tiny.batch(rows[start:end]), text)
        got += kept(trace)
        want += [slow_sgl(*look, 0.3, reference) for look in looks[start:end]]
    assert len(got) == amount
    assert_agree(got, want)


def test_a_few_equal_the_slow_reference(tiny: Tiny) -> None:
    rng = random.Random(4)
    rows = [tiny.row(rng) for _ in range(5)]
    trace, _ = tiny.run(tiny.batch(rows), f"sgl@0:0.4;new_tokens={TOKENS}")
    assert_agree(kept(trace), [slow_sgl(*look, 0.4) for look in looked(tiny, rows)])


def test_answers_of_different_lengths_count_to_their_end(tiny: Tiny) -> None:
    """A row whose answer ends early is fed padding while the others go on; that padding must not count."""
    rng = random.Random(8)
    rows = [tiny.row(rng, words=words) for words in (1, 3, 5, 9, 12, 15, 17, 20)]
    model = tiny.model()
    with torch.no_grad():
        ends = {len(answer) for answer in answered(tiny, rows)}
        together = sums_of(model, tiny.batch(rows), TOKENS, False)
        alone = [sums_of(model, tiny.batch([row]), TOKENS, False)[0] for row in rows]
    assert len(ends) > 1, "the answers differ in length, or the case is not tried"
    for batched, single in zip(together, alone, strict=True):
        torch.testing.assert_close(batched, single)


def test_by_hand(all_tiny: dict[str, Tiny]) -> None:
    """With one answer token, nothing is fed back: the sums are those of the prompt's rows. Sums over all keys are 1."""
    tiny = all_tiny["llava"]
    inputs = tiny.batch([tiny.row(random.Random(1))])
    [sums] = sums_of(tiny.model(), inputs, 1, False)
    attentions = eager_attentions(tiny, inputs, torch.float64)
    [span] = image_spans(inputs["input_ids"], inputs["attention_mask"], tiny.model().config.image_token_id)
    first, last = span.visual[0], span.visual[-1] + 1
    want = sum(layer[0, :, span.text, first:last].sum((0, 1)) for layer in attentions)
    assert isinstance(want, Tensor)
    torch.testing.assert_close(sums, want, atol=1e-4, rtol=0)
    rows = len(span.text) * len(attentions) * attentions[0].shape[1]
    assert 0 < float(sums.sum()) < rows
    [more] = sums_of(tiny.model(), inputs, 1, True)
    own = sum(layer[0, :, last - 1, first:last].sum(0) for layer in attentions)
    torch.testing.assert_close(more - sums, own, atol=1e-4, rtol=0)


def test_an_auxiliary_model_guides(tiny: Tiny, guides: dict[str, Path]) -> None:
    """The ranking is the guide's own, at any layer of the guided model; the guided model's own would differ."""
    rng = random.Random(9)
    inputs = tiny.batch([tiny.row(rng, images=images) for images in (1, 2, 0, 1)])
    small = Tiny.load(tiny.family, guides[tiny.family]).model()
    sums = sums_of(small, inputs, TOKENS, False)
    want = [set(x.argsort(descending=True, stable=True)[: round(0.3 * len(x))].tolist()) for x in sums]
    chosen = []
    for layer in (0, 3, 7):
        text = f"sgl@{layer}:0.3;guide={guides[tiny.family]};new_tokens={TOKENS}"
        chosen.append(kept(tiny.run(inputs, text)[0]))
    assert chosen == [want] * 3
    assert kept(tiny.run(inputs, f"sgl@3:0.3;new_tokens={TOKENS}")[0]) != want


def test_guidance_does_not_change_the_guided_model(tiny: Tiny) -> None:
    """Guiding itself, the model runs inside its own prefill: answer, cache and positions are those of the mask alone."""
    rng = random.Random(10)
    inputs, model = tiny.batch([tiny.row(rng) for _ in range(3)]), tiny.model()
    with torch.no_grad():
        with prune(model, f"sgl@2:0.3;new_tokens={TOKENS}") as trace:
            guided = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        again = {tuple(sorted(tokens)) for row in trace.rows for tokens in row.indices(0)}
        assert len(trace.rows) == 3, "the guide's own run leaves no trace"
        scores = sums_of(model, inputs, TOKENS, False)
        want = {tuple(sorted(x.argsort(descending=True)[: round(0.3 * len(x))].tolist())) for x in scores}
        assert again == want
        with prune(model, f"sgl@2:0.3;new_tokens={TOKENS}"):
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
    assert torch.isfinite(logits).all()
    assert guided.shape[1] > inputs["input_ids"].shape[1]


def test_guides_that_cannot_be_used(
    all_tiny: dict[str, Tiny], guides: dict[str, Path], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    llava, qwen = all_tiny["llava"], all_tiny["qwen2_5_vl"]

    def attempt(tiny: Tiny, guide: object, match: str) -> None:
        with pytest.raises(UnsupportedModelError, match=match), prune(tiny.model(), f"sgl@2:0.3;guide={guide}"):
            pytest.fail("the error comes before anything runs")

    attempt(llava, tmp_path / "nowhere", r"guide=.*nowhere cannot be loaded")
    attempt(llava, guides["qwen2_5_vl"], "model_type is qwen2_5_vl, the model's llava")
    attempt(qwen, guides["llava"], "does not read the model's prompts")
    larger = checkpoint("llava", layers=2, image_size=168)
    attempt(llava, larger, "another grid of visual tokens: its image_size differs")
