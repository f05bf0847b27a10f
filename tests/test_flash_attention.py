"""FlashAttention's own path: unpadding, cumulative lengths and kept positions run through the real code of transformers.

Where flash_attn is installed with a GPU, these tests run it; elsewhere its stand-in (flash_stand_in.py) runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from flash_stand_in import (
    ALL,
    HALVES,
    KERNEL,
    Call,
    Flash,
    WrongCallError,
    flash_attn_2,
    pad_input,
    unpad_input,
)
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import modeling_flash_attention_utils as library

from lmms_prune.certificate.case import Case, off
from lmms_prune.certificate.cells import STAGE_LAYERS, Cell, covering, enumerate_cells, impossible, schedule
from lmms_prune.certificate.checks import CHECKS
from lmms_prune.certificate.models import Models, random_checkpoints
from lmms_prune.certificate.observe import Observed, generate, observe
from lmms_prune.certificate.prompts import BATCHES, batch
from lmms_prune.certificate.runner import Certificate, certify, examine
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.information.measure import measure
from lmms_prune.methods import METHODS
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.segment import DecodeMasks, Segment
from lmms_prune.schedule import Schedule

FAMILIES = ("llava", "qwen2_5_vl")
# Their layers call the kernel as the layers of those two do: each method is tried on one of them.
OTHERS = ("qwen2_vl", "qwen3_vl", "llava_next")
FLASH = KERNEL[2]
READY = tuple(name for name, spec in METHODS.items() if spec.ready)
# With options of which a random model drops some images' tokens.
ADAPTIVE = {
    "hivtp": "hivtp@0",
    "mustdrop": "mustdrop@1;theta_g=0.05;theta_i=0.05",
    "todre": "todre@1;tau=0.5",
    "ivcprune": "ivcprune@1",
    "prumerge": "prumerge@0;variant=plain;no_class=received",
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}
"""Relative distance of logits between kernels; wrong masks give 0.2 to 1 in float32."""


@pytest.fixture(scope="module")
def folders_by_family() -> Iterator[dict[str, str]]:
    with random_checkpoints() as folders:
        yield folders


@pytest.fixture(scope="module")
def models(flash: Flash, folders_by_family: dict[str, str]) -> dict[str, Models]:
    return {family: Models(folder, flash.device) for family, folder in folders_by_family.items()}


@pytest.fixture(params=FAMILIES)
def loader(request: pytest.FixtureRequest, models: dict[str, Models]) -> Models:
    return models[request.param]


class TestTheFunctions:
    """The stand-in and the real functions compute what torch's attention does, row by row."""

    @pytest.fixture
    def precise(self, flash: Flash) -> dict[str, Any]:
        return {"device": flash.device, "dtype": torch.bfloat16 if flash.real else torch.float32}

    @staticmethod
    def expected(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
        """Attention of (S, H, D) to (K, H or fewer, D), by torch."""
        # Aligned to the bottom right: the last query sees all keys.
        mask = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q)) if causal else None
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
        # A query that sees no key: FlashAttention answers zeros.
        seen = torch.ones(q.shape[2], 1, dtype=torch.bool, device=q.device) if mask is None else mask.any(1)[:, None]
        return torch.where(seen, out[0].nan_to_num(), 0).transpose(0, 1)

    @pytest.mark.parametrize("seed", range(12))
    def test_a_batch(self, flash: Flash, precise: dict[str, Any], seed: int) -> None:
        import flash_attn

        draw = torch.Generator().manual_seed(seed)
        rows, queries, keys, group, kv_heads = (int(torch.randint(1, 7, (), generator=draw)) for _ in range(5))
        keys = max(queries, keys) if flash.real else keys
        shapes = ((rows, queries, group * kv_heads, 16), *((rows, keys, kv_heads, 16),) * 2)
        q, k, v = (torch.randn(shape, generator=draw).to(**precise) for shape in shapes)
        causal, scale = bool(seed % 2), None if seed % 3 else 0.3
        out = flash_attn.flash_attn_func(q, k, v, causal=causal, softmax_scale=scale)
        expected = torch.stack([self.expected(*row, causal, scale) for row in zip(q, k, v, strict=True)])
        tolerance = {"rtol": 0.02, "atol": 0.02} if flash.real else {}
        torch.testing.assert_close(out, expected, **tolerance)

    @pytest.mark.parametrize("seed", range(12))
    def test_packed_sequences(self, flash: Flash, precise: dict[str, Any], seed: int) -> None:
        import flash_attn

        draw = torch.Generator().manual_seed(seed)
        keys = torch.randint(1, 9, (1 + seed % 4,), generator=draw).tolist()
        # As in a prefill, as in a decode step, and of other lengths.
        queries = keys if seed % 3 == 0 else [1] * len(keys) if seed % 3 == 1 else [max(1, n - 2) for n in keys]
        heads = (4, 2) if seed % 2 else (2, 2)
        shapes = ((sum(queries), heads[0], 16), *((sum(keys), heads[1], 16),) * 2)
        q, k, v = (torch.randn(shape, generator=draw).to(**precise) for shape in shapes)
        ends = [pad(torch.tensor(n), (1, 0)).cumsum(0, dtype=torch.int32).to(flash.device) for n in (queries, keys)]
        causal = seed % 5 > 0
        out = flash_attn.flash_attn_varlen_func(q, k, v, *ends, max(queries), max(keys), causal=causal)
        parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
        expected = torch.cat([self.expected(*part, causal, None) for part in parts])
        tolerance = {"rtol": 0.02, "atol": 0.02} if flash.real else {}
        torch.testing.assert_close(out, expected, **tolerance)

    def test_padding_and_unpadding(self) -> None:
        mask = torch.tensor([[False, True, True], [True, True, True], [False, False, True]])
        x = torch.randn(3, 3, 2, 4)
        packed, columns, ends, longest, counts = unpad_input(x, mask)
        assert (ends.tolist(), ends.dtype, longest, counts.tolist()) == ([0, 2, 5, 6], torch.int32, 3, [2, 3, 1])
        assert torch.equal(pad_input(packed, columns, 3, 3), x * mask[..., None, None])


class TestWrongCalls:
    """The stand-in refuses what a kernel would read garbage for."""

    GOOD = {"cu_seqlens_q": [0, 3, 5], "cu_seqlens_k": [0, 3, 5], "max_seqlen_q": 3, "max_seqlen_k": 3}

    def call(self, dtypes: tuple[torch.dtype, ...] = ALL, **changed: Any) -> Tensor:
        arguments = {**{name: torch.randn(5, 2, 8) for name in "qkv"}, **self.GOOD, "causal": True, **changed}
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if isinstance(arguments[name], list):
                arguments[name] = torch.tensor(arguments[name], dtype=torch.int32)
        return flash_attn_2(dtypes)["flash_attn"].flash_attn_varlen_func(**arguments)

    def test_the_right_call_passes(self) -> None:
        assert self.call().shape == (5, 2, 8)
        assert self.call(max_seqlen_q=torch.tensor(3)).shape == (5, 2, 8)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"cu_seqlens_q": torch.tensor([0, 3, 5])}, "int64, not torch.int32"),
            ({"cu_seqlens_k": [0, 3, 4]}, "ends with 4, but there are 5 tokens"),
            ({"cu_seqlens_k": [1, 3, 5]}, "begins with 1"),
            ({"cu_seqlens_q": [0, 4, 3, 5]}, "decreases"),
            ({"cu_seqlens_q": [0, 5], "max_seqlen_q": 5}, "1 sequences of q for 2 of k"),
            ({"max_seqlen_q": 2}, "max_seqlen_q is 2, but the longest has 3"),
            ({"max_seqlen_k": 5}, "max_seqlen_k is 5, but the longest has 3"),
            ({"max_seqlen_k": 3.0}, "not an integer"),
            ({"k": torch.randn(5, 2, 16)}, "k has the shape"),
            ({"q": torch.randn(5, 3, 8)}, "3 heads of q for 2 of k"),
            ({"q": torch.randn(1, 5, 2, 8)}, "4 dimensions, not 3"),
            ({"q": torch.randn(5, 2, 8, dtype=torch.float64)}, "k is torch.float32, but q"),
            ({"q": torch.randn(8, 2, 5).transpose(0, 2)}, "contiguous in its last dimension"),
            ({"dropout_p": 0.1}, "dropout_p=0.1 is not implemented"),
            ({"window_size": (4, 4)}, "window_size"),
            ({"softcap": 30.0}, "softcap"),
            ({"alibi_slopes": torch.ones(2)}, "alibi_slopes"),
            ({"block_table": torch.zeros(1)}, "block_table"),
        ],
    )
    def test_a_wrong_call_is_refused(self, changed: dict[str, Any], message: str) -> None:
        with pytest.raises(WrongCallError, match=message):
            self.call(**changed)

    def test_as_the_real_one_it_takes_halves_alone(self) -> None:
        with pytest.raises(WrongCallError, match="float32"):
            self.call(HALVES)
        halves = {name: torch.randn(5, 2, 8, dtype=torch.bfloat16) for name in "qkv"}
        assert self.call(HALVES, **halves).dtype == torch.bfloat16

    def test_two_tokens_in_one_column(self) -> None:
        with pytest.raises(WrongCallError, match="one column"):
            pad_input(torch.randn(2, 4), torch.tensor([1, 1]), 1, 3)


@pytest.mark.slow
def test_a_covering_choice_of_cells_holds(flash: Flash, models: dict[str, Models], full: bool) -> None:
    """The certificate: reference, keep-all, row = batch, decode steps, both position policies, every method."""
    # At layer 0 no layer is left with the library's own mask; deeper stages are all alike to the kernel.
    layers = STAGE_LAYERS if full else ("0", "middle")
    for dtypes in [(dtype,) for dtype in flash.dtypes] if full else [flash.dtypes]:
        certificate = Certificate()
        possible = certificate.possible(enumerate_cells(FAMILIES, dtypes=dtypes, attentions=(FLASH,)))
        cells = covering(cell for cell in possible if cell.stage_layer in layers)
        certify(cells, models, certificate)
        assert certificate.failures == []
        assert sum(certificate.cells.values()) == len(cells) > len(READY)
        assert {cell.method for cell in cells} == set(READY)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda mask: None,
        lambda mask: torch.ones_like(mask) if mask is not None else None,
        # transformers then cuts the keys to the mask's length, without a word.
        lambda mask: mask[:, :-1] if mask is not None and mask.shape[1] > 100 else mask,
    ],
    ids=["none", "without padding", "a key short"],
)
def test_a_wrong_mask_is_noticed(
    flash: Flash, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    case = Case(models["llava"].get(flash.dtypes[0], FLASH), Schedule.parse("random@0:0.6,divprune@2:0.5"), "original")
    assert case.subject.noise < 0.1
    right = DecodeMasks.at
    monkeypatch.setattr(DecodeMasks, "at", lambda self, step: wrong(right(self, step)))
    reference = examine(case, "ragged", {"reference": CHECKS["reference"]})
    assert "off the masked reference" in reference[0].reason


@pytest.mark.parametrize("text", ADAPTIVE.values(), ids=ADAPTIVE)
def test_methods_that_decide_their_own_counts(flash: Flash, loader: Models, text: str) -> None:
    case = Case(loader.get(flash.dtypes[0], FLASH), Schedule.parse(text), "original")
    kept = [
        (n, size)
        for row in case.run(BATCHES["ragged"]).trace.rows
        for n, size in zip(row.kept[0], row.images, strict=True)
    ]
    assert any(n < size for n, size in kept)
    # A row may keep all of its tokens here.
    checks = {name: check for name, check in CHECKS.items() if name != "pruned"}
    assert [result for result in examine(case, "ragged", checks) if result.reason] == []


def test_all_of_them_are_tried() -> None:
    assert set(ADAPTIVE) == {name for name in READY if METHODS[name].keep == "optional"}


def schedules() -> Iterator[tuple[str, str, str]]:
    """Family, method, and a schedule of the method between two others, or at the only layer where it can stand."""
    rewriting = [name for name in READY if METHODS[name].rewrites]
    turns = [*product(FAMILIES, READY), *zip(cycle(OTHERS), READY), *product(OTHERS[1:], rewriting)]
    for family, method in dict.fromkeys(turns):
        for place in ("middle", "1", "0"):
            cell = Cell(family, "float32", "sdpa", "original", method, place, 3, "ragged")
            if METHODS[method].drops_all:
                cell = Cell(family, "float32", "sdpa", "original", method, place, 1, "ragged")
            if not impossible(cell):
                yield family, method, str(schedule(cell, 4))
                break


def test_each_method_is_tried_on_another_family() -> None:
    """What rewrites tokens is, where it is defined, tried on both that have more than tokens to keep in step."""
    tried = {(family, method) for family, method, _ in schedules() if family in OTHERS}
    assert {method for _, method in tried} == set(READY)
    rewriting = {name for name in READY if METHODS[name].rewrites}
    assert {method for family, method in tried if family == "qwen3_vl"} >= rewriting
    assert {method for family, method in tried if family == "llava_next"} >= rewriting - {"downsample", "mustdrop"}


@pytest.mark.parametrize(("family", "method", "text"), list(schedules()), ids=lambda value: value.replace(",", " "))
def test_pruned_as_with_torchs_attention(
    flash: Flash, models: dict[str, Models], family: str, method: str, text: str
) -> None:
    """Tokens, kept visual tokens and logits."""
    runs = {}
    for kernel in ("sdpa", FLASH):
        model = models[family].get(flash.dtypes[0], kernel).model
        runs[kernel] = observe(model, BATCHES["ragged"], Schedule.parse(text), "original", 4)
    same_run(runs[FLASH], runs["sdpa"], flash)


def same_run(run: Observed, expected: Observed, flash: Flash) -> None:
    pairs = list(zip(run.trace.rows, expected.trace.rows, strict=True))
    for row, other in pairs:
        assert (row.kept, row.visual, row.cached) == (other.kept, other.visual, other.cached)
    same_tokens = all(
        torch.equal(mask, another)
        for row, other in pairs
        for masks, others in zip(row.masks, other.masks, strict=True)
        for mask, another in zip(masks, others, strict=True)
    )
    if flash.real and not same_tokens:
        return  # In 16 bits rounding decides which of two tokens is kept; the certificate compares each with its own.
    assert same_tokens
    assert off(run.logits, expected.logits) < TOLERANCE[flash.dtypes[0]]
    if not flash.real:
        assert torch.equal(run.logits.argmax(-1), expected.logits.argmax(-1))


@pytest.mark.core
class TestWhatReachesTheKernel:
    """The sequences that FlashAttention is given are the kept tokens, without padding."""

    SCHEDULE = "random@0:0.7,divprune@2:0.4"

    def run(self, flash: Flash, loader: Models, name: str, steps: int = 3) -> tuple[Observed, list[list[Call]]]:
        """A generation, and the decoder's calls in its prefill and in each decode step."""
        model, first = loader.get(flash.dtypes[0], FLASH).model, len(flash.calls)
        seen = observe(model, BATCHES[name], Schedule.parse(self.SCHEDULE), "original", steps)
        calls, layers = flash.since(first, causal=True), len(ModelParts.of(model).layers)
        assert len(calls) == layers * steps
        return seen, [calls[start : start + layers] for start in range(0, len(calls), layers)]

    @pytest.mark.parametrize("name", ["1", "3", "ragged"])
    def test_the_sequences_are_the_kept_tokens(self, flash: Flash, loader: Models, name: str) -> None:
        seen, (prefill, *steps) = self.run(flash, loader, name)
        for layer, call in enumerate(prefill):
            tokens = tuple(row.text_tokens + row.visual[layer] for row in seen.trace.rows)
            assert (call.queries, call.keys) == (tokens, tokens)
            for number, step in enumerate(steps, 1):
                assert step[layer].queries == (1,) * len(tokens)
                assert step[layer].keys == tuple(length + number for length in tokens)

    @pytest.mark.parametrize(("name", "padded"), [("1", False), ("3", False), ("ragged", True)])
    def test_nothing_is_unpadded_where_nothing_is_padded(
        self, flash: Flash, loader: Models, name: str, padded: bool
    ) -> None:
        """Gaps in kept positions are not taken for packed sequences either, which would be found here."""
        _, forwards = self.run(flash, loader, name)
        assert {call.packed for calls in forwards for call in calls} == {padded}

    def test_positions_that_a_hook_passes_on_are_taken_for_packed_sequences(
        self, flash: Flash, loader: Models, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What the test above is there to find: a stage that leaves ``position_ids`` in a layer's arguments."""
        original = Segment.prefill_arguments

        def with_positions(self: Segment, device: torch.device) -> dict:
            return {**original(self, device), "position_ids": self.origin}

        monkeypatch.setattr(Segment, "prefill_arguments", with_positions)
        _, (prefill, *_) = self.run(flash, loader, "1")
        assert {call.packed for call in prefill} == {True}

    def test_packed_sequences_would_not_see_each_other(self) -> None:
        """Positions that begin again split a row; kept positions do not begin again, but have gaps."""
        for positions, lengths in (([0, 1, 2, 0, 1], [3, 2]), ([0, 1, 5, 6, 9], [5])):
            ids = torch.tensor([positions])
            assert bool(library._is_packed_sequence(ids, 1))
            (ends, _), _ = library.prepare_fa_kwargs_from_position_ids(ids)
            assert ends.diff().tolist() == lengths


class TestTheVisionEncoder:
    """Its blocks run FlashAttention too: Qwen2.5-VL's on windows, packed."""

    def test_the_windows_are_packed(self, flash: Flash, models: dict[str, Models]) -> None:
        model, first = models["qwen2_5_vl"].get(flash.dtypes[0], FLASH).model, len(flash.calls)
        inputs = batch(model, BATCHES["ragged"])
        with torch.no_grad():
            model(**inputs)
        calls, vision = flash.since(first, causal=False), model.config.vision_config
        assert len(calls) == vision.depth
        patches = tuple(inputs["image_grid_thw"].prod(1).tolist())
        for block, call in enumerate(calls):
            assert call.packed
            assert sum(call.queries) == sum(patches)
            if block in vision.fullatt_block_indexes:
                assert call.queries == patches
            else:
                assert max(call.queries) <= (vision.window_size // vision.patch_size) ** 2 < max(patches)

    def test_the_images_of_clip_are_a_batch(self, flash: Flash, models: dict[str, Models]) -> None:
        model, first = models["llava"].get(flash.dtypes[0], FLASH).model, len(flash.calls)
        with torch.no_grad():
            model(**batch(model, BATCHES["ragged"]))
        calls = flash.since(first, causal=False)
        assert calls
        assert all(not call.packed and len(call.queries) == 3 for call in calls)

    def test_its_features_are_those_of_torchs_attention(self, flash: Flash, loader: Models) -> None:
        """Noticed here, for the certificate's reference has the encoder of the run that it judges."""
        features = []
        for kernel in ("sdpa", FLASH):
            model = loader.get(flash.dtypes[0], kernel).model
            parts, seen = ModelParts.of(model), []
            handle = parts.decoder.register_forward_pre_hook(
                lambda module, args, kwargs, seen=seen: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
            )
            with torch.no_grad():
                model(**batch(model, BATCHES["ragged"]))
            handle.remove()
            features.append(seen[0].flatten(0, 1))
        assert off(features[1], features[0]) < TOLERANCE[flash.dtypes[0]]


def test_the_reference_leaves_the_kernel_as_it_was(flash: Flash, loader: Models) -> None:
    subject = loader.get(flash.dtypes[0], FLASH)
    case, first = Case(subject, Schedule.parse("random@1:0.5"), "original"), len(flash.calls)
    case.run(BATCHES["1"])
    before = len(flash.since(first, causal=True))
    case.reference(BATCHES["1"], 0)
    assert len(flash.since(first, causal=True)) == before
    with torch.inference_mode():
        generate(subject.model, BATCHES["1"], 2)
    assert len(flash.since(first, causal=True)) > before


def test_measuring_information_needs_other_masks_and_says_so(flash: Flash, loader: Models) -> None:
    model = loader.get(flash.dtypes[0], FLASH).model
    with pytest.raises(UnsupportedModelError, match="use attn_implementation=sdpa"):
        measure(model, batch(model, BATCHES["1"]), 5, [1])
