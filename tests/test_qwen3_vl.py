"""Qwen3-VL: what a decoder that adds encoder features between its layers, and norms queries and keys, asks of pruning.

Each trap of the architecture has a test that fails when it is stepped into. That answers are lmms-eval's own is
tests/harness/test_parity.py's; the matrix of all methods is the certificate's.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from flash_stand_in import KERNEL, Flash
from tiny import Family, noise
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lmms_prune import Schedule, prune
from lmms_prune.certificate.case import Case, Subject
from lmms_prune.certificate.checks import CHECKS
from lmms_prune.certificate.prompts import BATCHES
from lmms_prune.certificate.runner import examine
from lmms_prune.compat.transformers import filled_cache
from lmms_prune.efficiency.cost import kv_bytes
from lmms_prune.errors import PruningError
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.base import Method
from lmms_prune.methods.swiftvlm import SwiftVLM
from lmms_prune.methods.view import TokenView
from lmms_prune.models import FAMILIES
from lmms_prune.models.architectures import from_config
from lmms_prune.models.family import Family as FamilyContract
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.qwen3_vl import Qwen3VL
from lmms_prune.pruning.layout import Layout

ADDED = 3  # layers of the small model after which features are added
QUESTIONS, IMAGES = ["what is this?", "how many?"], [[noise(0, 160, 128)], [noise(1, 128, 192), noise(2, 96, 96)]]

pytestmark = pytest.mark.core


@pytest.fixture
def family(loaded: Callable[..., Family]) -> Family:
    return loaded("qwen3", torch.float32)


@pytest.fixture
def inputs(family: Family) -> dict[str, Tensor]:
    return family.inputs(QUESTIONS, IMAGES)


def reference(family: Family, schedule: str) -> str:
    """Why a schedule fails against the masked reference; "" if it does not."""
    case = Case(Subject(family.model, "float32"), Schedule.parse(schedule), "original")
    [result] = examine(case, "ragged", {"reference": CHECKS["reference"]})
    return result.reason


def entering(family: Family, inputs: dict[str, Tensor], layers: Sequence[int], schedule: str = "") -> list[dict]:
    """What enters the layers in a prefill, with rotary tables; before a stage of theirs acts."""
    seen: list[dict] = []

    def look(module: Any, args: tuple, kwargs: dict) -> None:
        seen.append({"hidden": args[0], "rotary": kwargs["position_embeddings"], "mask": kwargs["attention_mask"]})

    modules = ModelParts.of(family.model).layers
    handles = [modules[layer].register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        with torch.no_grad(), prune(family.model, schedule or Schedule()):
            family.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def features(family: Family, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        output = family.model.model.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
    return output.deepstack_features


def visual_columns(family: Family, inputs: dict[str, Tensor], row: int) -> list[int]:
    return (inputs["input_ids"][row] == family.model.config.image_token_id).nonzero()[:, 0].tolist()


# -- queries and keys ---------------------------------------------------------------------------------------------


def attention_of_layer_2(family: Family, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The last row of each head's attention: recomputed, and as the library's eager kernel has it."""
    [state] = entering(family, inputs, [2])
    parts = ModelParts.of(family.model)
    query, key = (project(2, state["hidden"], state["rotary"]) for project in (parts.queries, parts.keys))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (query[:, :, -1:] @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    present = inputs["attention_mask"].bool()[:, None, None]
    recomputed = scores.masked_fill(~present, -torch.inf).softmax(-1)
    family.model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = family.model(**inputs, output_attentions=True).attentions
    finally:
        family.model.set_attn_implementation("sdpa")
    return recomputed[:, :, 0], attentions[2][:, :, -1]


def test_recomputed_attention_is_the_layers_own(family: Family, inputs: dict[str, Tensor]) -> None:
    torch.testing.assert_close(*attention_of_layer_2(family, inputs), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("projection", ["query_projection", "key_projection"])
def test_without_a_norm_it_is_another(
    projection: str, family: Family, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else would fail: the trap is silent."""
    original = getattr(FamilyContract, projection)
    monkeypatch.setattr(Qwen3VL, projection, lambda self, layer: (original(self, layer)[0], None), raising=False)
    recomputed, expected = attention_of_layer_2(family, inputs)
    assert (recomputed - expected).abs().max() > 0.01


def test_recomputed_keys_and_values_are_those_that_the_layer_caches(family: Family, inputs: dict[str, Tensor]) -> None:
    [state] = entering(family, inputs, [2])
    parts = ModelParts.of(family.model)
    with torch.no_grad():
        layer = filled_cache(family.model(**inputs, use_cache=True)).layers[2]
    torch.testing.assert_close(parts.keys(2, state["hidden"], state["rotary"]), layer.keys)
    torch.testing.assert_close(parts.values(2, state["hidden"]), layer.values)


def test_heads_wider_than_their_share_of_the_hidden_state(family: Family) -> None:
    """The 4B model has 32 heads of 128 channels in 2,560: cost, cache and recomputed attention are of the heads' width."""
    config = copy.deepcopy(family.model.config)
    config.text_config.head_dim, config.text_config.rope_parameters["mrope_section"] = 24, [4, 4, 4]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=1.5 / weight[0].numel() ** 0.5)
    case = Case(Subject(model, "float32"), Schedule.parse("fastv@1:0.6,sparsevlm@2:0.4"), "original")
    assert [result for result in examine(case, "ragged") if result.reason] == []
    sizes = from_config(config.to_dict(), "wide")
    assert sizes.head_dim == 24
    row = case.run(BATCHES["ragged"]).trace.rows[0]
    keys = 2 * sizes.kv_heads * sizes.head_dim * sizes.bytes_per_number
    assert kv_bytes(sizes, row.cached) == [keys * length for length in row.cached]


# -- DeepStack -----------------------------------------------------------------------------------------------------

SCHEDULES = (
    "random@0:0.6",
    "random@1:0.7,dart@2:0.5,fastv@4:0.2",
    "divprune@0:0.5,vtw@2",
    "tome@0:0.6,tome@1:0.5,folder@2:0.3",
    "visionzip@0:0.6,swiftvlm@1:0.5,swiftvlm@2:0.3",
    "pool@1:0.5,sparsevlm@2:0.4",
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_certified_properties_hold_at_and_among_its_layers(family: Family, schedule: str) -> None:
    case = Case(Subject(family.model, "float32"), Schedule.parse(schedule), "original")
    assert [result for name in ("1", "ragged") for result in examine(case, name) if result.reason] == []


@pytest.mark.parametrize("schedule", ["random@0:0.6,divprune@2:0.3", "tome@1:0.5,random@5:0.1"])
def test_they_hold_with_flash_attention_too(loaded: Callable[..., Family], flash: Flash, schedule: str) -> None:
    dtype = flash.dtypes[0]
    model = loaded("qwen3", getattr(torch, dtype), "eager").model.to(flash.device)
    model.set_attn_implementation(KERNEL[2])
    try:
        case, first = Case(Subject(model, dtype), Schedule.parse(schedule), "original"), len(flash.calls)
        assert [result for name in ("1", "ragged") for result in examine(case, name) if result.reason] == []
        assert {call.packed for call in flash.since(first, causal=True)} == {False, True}
    finally:
        model.set_attn_implementation("eager")


def test_the_input_of_the_next_layer_holds_the_features(family: Family, inputs: dict[str, Tensor]) -> None:
    """Under pruning as without: a stage at layer 1 sees them, and a dropped token's are added to no other token."""
    before, after = entering(family, inputs, [0, 1])
    with torch.no_grad():
        plain = ModelParts.of(family.model).layers[0](
            before["hidden"], attention_mask=before["mask"], position_embeddings=before["rotary"]
        )
    added, first = features(family, inputs)[0], 0
    for row in range(2):
        columns = visual_columns(family, inputs, row)
        difference = (after["hidden"] - plain)[row, columns]
        torch.testing.assert_close(difference, added[first : first + len(columns)], atol=1e-4, rtol=1e-4)
        first += len(columns)


def test_a_mask_of_the_full_length_does_not_fit(
    family: Family, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder left to itself adds to the columns of the unpruned sequence."""
    monkeypatch.setattr(Qwen3VL, "between_layers", lambda self, kwargs: (kwargs, ()))
    with pytest.raises(IndexError), torch.no_grad(), prune(family.model, "random@1:0.5"):
        family.model(**inputs)


@pytest.mark.parametrize("schedule", ["random@0:0.6", "random@1:0.5,random@2:0.3"])
def test_features_of_other_tokens_are_noticed(family: Family, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layout, "_rows_of", lambda self, division, index: torch.arange(index.shape[1]).expand_as(index))
    assert "off the masked reference" in reference(family, schedule)


@pytest.mark.parametrize("schedule", ["tome@0:0.5", "pool@1:0.4", "vscan@0:0.5", "sparsevlm@2:0.5"])
def test_features_that_are_not_merged_with_their_tokens_are_noticed(
    family: Family, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reference(family, schedule) == ""
    monkeypatch.setattr(Layout, "with_rows", lambda self, extras, *rest: list(extras))
    assert "off the masked reference" in reference(family, schedule)


def test_pooled_tokens_get_the_mean_of_their_features(family: Family) -> None:
    """Layer 1 by hand: on the means of 2 x 2 tokens, to which the means of their features are added after it."""
    inputs = family.inputs(QUESTIONS[:1], [[noise(3, 128, 128)]])
    [state] = entering(family, inputs, [1])
    visual, grid = visual_columns(family, inputs, 0), 4
    assert len(visual) == grid**2
    cells = [[(2 * r + i) * grid + 2 * c + j for i in (0, 1) for j in (0, 1)] for r in (0, 1) for c in (0, 1)]
    hidden, (cos, sin) = state["hidden"][0], state["rotary"]
    before, behind = range(visual[0]), range(visual[-1] + 1, len(hidden))
    means = torch.stack([hidden[[visual[token] for token in cell]].mean(0) for cell in cells])
    sequence = torch.cat([hidden[before], means, hidden[behind]])
    # A cell has the position of its middle token: the lower right one of four.
    columns = [*before, *(visual[cell[-1]] for cell in cells), *behind]
    length = len(columns)
    mask = torch.zeros(1, 1, length, length).masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -1e30)
    with torch.no_grad():
        expected = ModelParts.of(family.model).layers[1](
            sequence[None], attention_mask=mask, position_embeddings=(cos[:, columns], sin[:, columns])
        )[0]
    added = features(family, inputs)[1]
    expected[len(before) : len(before) + 4] += torch.stack([added[cell].mean(0) for cell in cells])
    [pruned] = entering(family, inputs, [2], "pool@1:4t")
    torch.testing.assert_close(pruned["hidden"][0], expected, atol=1e-4, rtol=1e-4)


def test_a_restored_token_gets_its_own_features(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwiftVLM merges tokens at layer 1 and ranks them anew at layer 2, after which features are added once more."""
    inputs, rewritten = family.inputs(QUESTIONS[:1], [[noise(3, 320, 320)]]), {}
    original = SwiftVLM.rewrite

    def rewrite(self: SwiftVLM, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        rewritten[view.layer] = tokens, index = original(self, view, keep)
        rewritten[view.layer] = {
            int(i): state[view.hidden.shape[2] :]
            for state, i, kept in zip(tokens[0], index[0], keep[0], strict=True)
            if kept
        }
        return tokens, index

    monkeypatch.setattr(SwiftVLM, "rewrite", rewrite)
    with torch.no_grad(), prune(family.model, "swiftvlm@1:0.4,swiftvlm@2:0.3") as trace:
        family.model(**inputs)
    assert len(trace.rows[0].kept[0]) == 1
    restored, added = set(rewritten[2]) - set(rewritten[1]), features(family, inputs)[2]
    own = {index for index in rewritten[2] if torch.allclose(rewritten[2][index], added[index], atol=1e-6)}
    assert restored & own, "no token was restored"
    # One merged token for each 20 of the image, which alone gets a mean (a group may have one member).
    assert 0 < len(rewritten[2]) - len(own) <= 5


class Halving(Method):
    """Keeps the first half of each image and writes states of its own, without what is added to them."""

    paper = "https://arxiv.org"

    def select(self, view: TokenView, budget: Tensor) -> Tensor:
        return view.valid & (torch.arange(view.valid.shape[1]) < budget[:, None])

    def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        return view.hidden / 2, view.index


def test_a_method_that_forgets_the_features_is_refused_where_they_are_to_come(
    family: Family, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lmms_prune.methods.halving", module := ModuleType("lmms_prune.methods.halving"))
    setattr(module, Halving.__name__, Halving)
    row = {"reads": ("hidden",), "kind": "control", "paper": "https://arxiv.org", "example": "halving@1:0.5"}
    monkeypatch.setitem(
        METHODS, "halving", MethodSpec(name="halving", class_name=Halving.__name__, rewrites=True, **row)
    )
    for layer in range(ADDED):
        with (
            pytest.raises(PruningError, match=r"Qwen3-VL.*layer 3 or deeper.*with_additions"),
            torch.no_grad(),
            prune(family.model, f"halving@{layer}:0.5"),
        ):
            family.model(**inputs)
    with torch.no_grad(), prune(family.model, f"halving@{ADDED}:0.5"):
        family.model(**inputs)


def test_every_method_that_rewrites_tokens_takes_the_features_along(family: Family, inputs: dict[str, Tensor]) -> None:
    def lowest(spec: MethodSpec) -> str:
        options = dict(Schedule.parse(spec.example).stages[0].options)
        return f"{spec.name}@{spec.lowest_layer}:0.5" + "".join(f";{name}={value}" for name, value in options.items())

    schedules = [lowest(spec) for spec in METHODS.values() if spec.rewrites and spec.ready]
    assert len(schedules) > 8
    for schedule in schedules:
        with torch.no_grad(), prune(family.model, schedule, questions=QUESTIONS) as trace:
            family.model(**inputs)
        assert any(row.recycled[0] for row in trace.rows), schedule


# -- positions and pixels ------------------------------------------------------------------------------------------


def test_one_table_serves_three_interleaved_channels(family: Family) -> None:
    """Frequency i belongs to height or width where i mod 3 says so and the section is not full, otherwise to time."""
    parts = ModelParts.of(family.model)
    config = parts.decoder.config
    sections = config.rope_parameters["mrope_section"]
    positions = torch.tensor([[[3, 3, 3]], [[3, 4, 5]], [[3, 6, 9]]])
    cos, _ = parts.rotary(torch.zeros(1), positions)
    assert cos.shape == (1, 3, config.head_dim)
    frequencies = 1 / config.rope_parameters["rope_theta"] ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
    for i, frequency in enumerate(frequencies):
        channel = i % 3 if i % 3 and i < 3 * sections[i % 3] else 0
        expected = (positions[channel, 0] * frequency).cos()
        for half in (i, i + config.head_dim // 2):
            torch.testing.assert_close(cos[0, :, half], expected, atol=1e-5, rtol=1e-5)
    assert FAMILIES["qwen3_vl"].rotary_table(parts.decoder, cos) is cos
