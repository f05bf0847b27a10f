"""Ways of running a model that pruning would spoil: each is refused by name, and none outlives its block."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from test_hooks import QUESTIONS, hook_count, mixed_batch
from tiny import Family, noise
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.utils.generic import TransformersKwargs

from lmms_prune import prune
from lmms_prune.compat.transformers import CACHE_NAMES, filled_cache, with_cache
from lmms_prune.errors import PruningError
from lmms_prune.pruning.calls import FORWARD, GENERATE
from lmms_prune.pruning.decode import next_position

PLAIN = {"do_sample": False, "max_new_tokens": 3, "min_new_tokens": 3}


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def prompt(family: Family) -> dict[str, Tensor]:
    return family.inputs([QUESTIONS[0]], [[noise(1)]])


# -- the tables --------------------------------------------------------------------------------------------------------


def arguments_of(function: Callable) -> set[str]:
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds} - {"self"}


@pytest.mark.parametrize(
    "model", [LlavaForConditionalGeneration, LlavaModel, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel]
)
def test_the_table_knows_every_argument_of_forward(model: type) -> None:
    assert (
        sorted(n for n in arguments_of(model.forward) | TransformersKwargs.__optional_keys__ if not FORWARD.knows(n))
        == []
    )


@pytest.mark.parametrize("model", [LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration])
def test_the_table_knows_every_argument_of_generate(model: type) -> None:
    arguments = arguments_of(model.generate) | arguments_of(model.forward) | set(vars(GenerationConfig()))
    assert sorted(name for name in arguments if not GENERATE.knows(name)) == []


@pytest.mark.parametrize("table", [FORWARD, GENERATE], ids=lambda table: table.name)
def test_an_argument_is_listed_once_per_table(table) -> None:
    assert len(table.supported | table.irrelevant | set(table.refused)) == sum(
        map(len, (table.supported, table.irrelevant, table.refused))
    )
    assert set(CACHE_NAMES) <= table.supported


@pytest.mark.parametrize("name", [*sorted(FORWARD.refused), "nonsense"])
def test_forward_refuses_by_name(loaded, name: str) -> None:
    family = loaded("qwen")
    with (
        pytest.raises(PruningError, match=rf"^forward: {name} is not supported while pruning: .+\.$"),
        prune(family.model, "random@2:0.5") as trace,
    ):
        family.model(**prompt(family), **{name: object()})
    assert trace.rows == []


@pytest.mark.parametrize("name", [*sorted(GENERATE.refused), "nonsense"])
@pytest.mark.parametrize("source", ["argument", "configuration"])
def test_generate_refuses_by_name(loaded, name: str, source: str) -> None:
    family = loaded("llava")
    configuration = GenerationConfig(**PLAIN)
    setattr(configuration, name, object())
    arguments = {name: object()} if source == "argument" else {"generation_config": configuration}
    with (
        pytest.raises(PruningError, match=rf"^generate: {name} is not supported while pruning: .+\.$"),
        prune(family.model, "random@2:0.5") as trace,
    ):
        family.model.generate(**prompt(family), **arguments)
    assert trace.rows == []


def test_settings_of_the_checkpoint_are_refused_too(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not an entry that the library itself does not know, and not what the call itself takes back."""
    monkeypatch.setattr(family.model.generation_config, "num_beams", 3)
    monkeypatch.setattr(family.model.generation_config, "max_window_size", 6144, raising=False)
    with pytest.raises(PruningError, match="num_beams=3"), prune(family.model, "random@2:0.5"):
        family.model.generate(**prompt(family), **PLAIN)
    with prune(family.model, "random@2:0.5") as trace:
        family.model.generate(**prompt(family), **PLAIN, num_beams=1)
    assert len(trace.rows) == 1


HARMLESS = {"num_beams": 1, "use_cache": True, "cache_implementation": "dynamic", "prefill_chunk_size": None}
HARMLESS |= {"guidance_scale": 1.0, "logits_to_keep": 1, "is_assistant": False, "vision_feature_layer": -2}


def test_values_without_effect_are_not_refused(loaded) -> None:
    family = loaded("llava")
    with prune(family.model, "random@2:0.5"):
        plain = family.model.generate(**prompt(family), **PLAIN)
        assert torch.equal(family.model.generate(**prompt(family), **PLAIN, **HARMLESS), plain)


def test_a_chunked_prefill_is_not_mistaken_for_a_prefill_and_a_step(family: Family) -> None:
    inputs = prompt(family)
    length = inputs["input_ids"].shape[1]
    for size in (1, 7, length - 1, length):
        with pytest.raises(PruningError, match=f"prefill_chunk_size={size}"), prune(family.model, "fastv@2:0.5"):
            family.model.generate(**inputs, **PLAIN, prefill_chunk_size=size)


def test_videos_that_were_encoded_beforehand(loaded) -> None:
    family = loaded("qwen")
    with pytest.raises(PruningError, match="video input"), prune(family.model, "random@2:0.5"):
        family.model(**{**prompt(family), "pixel_values": None}, mm_encoder_outputs={"video": object()})


def test_the_last_logits_may_be_requested_by_number(family: Family) -> None:
    inputs = prompt(family)
    with prune(family.model, "random@0:0.5", samples=["a"]):
        full = family.model(**inputs).logits
        torch.testing.assert_close(family.model(**inputs, logits_to_keep=3).logits, full[:, -3:])


@pytest.mark.parametrize("fails", [False, True])
def test_the_models_own_generate_is_restored(family: Family, fails: bool) -> None:
    assert "generate" not in vars(family.model)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), prune(family.model, "random@2:0.5"):
        assert inspect.signature(family.model.generate) == inspect.signature(
            type(family.model).generate.__get__(family.model)
        )
        family.model.generate(**prompt(family), **PLAIN)
        if fails:
            raise ZeroDivisionError
    assert "generate" not in vars(family.model)


def test_a_replaced_generate_is_restored(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    def replacement(**options: Any) -> Any:
        return type(family.model).generate(family.model, **options)

    monkeypatch.setattr(family.model, "generate", replacement, raising=False)
    with prune(family.model, "random@2:0.5") as trace:
        family.model.generate(**prompt(family), **PLAIN)
        with pytest.raises(PruningError, match="num_beams=2"):
            family.model.generate(**prompt(family), **PLAIN, num_beams=2)
    assert family.model.generate is replacement
    assert len(trace.rows) == 1


@pytest.mark.parametrize("deleted", [False, True])
def test_a_generate_set_inside_the_block_is_not_removed(family: Family, deleted: bool) -> None:
    before = hook_count(family.model)
    try:
        with prune(family.model, "random@2:0.5"):
            family.model(**prompt(family))
            family.model.generate = print
            if deleted:
                del family.model.generate
        assert vars(family.model).get("generate") is (None if deleted else print)
    finally:
        vars(family.model).pop("generate", None)
    assert hook_count(family.model) == before


def test_hidden_states_and_attentions_are_those_of_the_kept_tokens(loaded) -> None:
    family = loaded("llava", torch.float32, "eager")
    with prune(family.model, "random@3:0.5") as trace:
        output = family.model(**prompt(family), output_hidden_states=True, output_attentions=True)
    assert [x.shape[-1] for x in output.attentions] == trace.rows[0].computed
    # The first is the embedding; each other one leaves a layer, the last by way of the final norm.
    assert [x.shape[1] for x in output.hidden_states][1:] == trace.rows[0].computed


def test_arguments_that_generate_passes_to_forward_are_known(family: Family) -> None:
    """Arguments that the library passes on by its own doing, such as the tokenizer of stop strings."""
    tokenizer = family.processor.tokenizer
    options = {
        "stop_strings": ["\x00never"],
        "tokenizer": tokenizer,
        "synced_gpus": False,
        "top_k": 5,
        "use_cache": True,
    }
    with prune(family.model, "random@2:0.5"):
        plain = family.model.generate(**prompt(family), **PLAIN)
        assert torch.equal(family.model.generate(**prompt(family), **PLAIN, **options), plain)


# -- caches and copies -------------------------------------------------------------------------------------------------


def step(family: Family, cache: Any, **more: Any) -> Tensor:
    return family.model(input_ids=torch.tensor([[7]]), **with_cache(family.model, cache), **more).logits


@pytest.mark.parametrize("schedule", ["random@0:0.5", "random@2:0.5", "vtw@7", "random@2:0.5,vtw@5"])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("other", ["none", "random@0:0.5", None])
def test_a_pruned_cache_is_refused_outside_its_block(
    family: Family, schedule: str, copied: bool, other: str | None
) -> None:
    """Nor in another block, whether it prunes or not; neither is a copy of it."""
    with prune(family.model, schedule):
        cache = filled_cache(family.model(**prompt(family), use_cache=True))
        assert torch.isfinite(step(family, cache)).all()
        cache = copy.deepcopy(cache) if copied else cache
    message = "not filled inside" if other == "random@0:0.5" else "filled inside a prune block"
    with pytest.raises(PruningError, match=message), prune(family.model, other) if other else nullcontext():
        step(family, cache)
    with pytest.raises(PruningError, match=message), prune(family.model, other) if other else nullcontext():
        family.model.generate(input_ids=prompt(family)["input_ids"], **with_cache(family.model, cache), **PLAIN)


def test_a_cache_from_generate_is_refused_outside(family: Family) -> None:
    with prune(family.model, "random@0:0.5"):
        output = family.model.generate(**prompt(family), **PLAIN, return_dict_in_generate=True)
    with pytest.raises(PruningError, match="filled inside a prune block"):
        step(family, filled_cache(output))


def test_a_cache_of_a_failed_prefill_is_refused_outside(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    cache = DynamicCache(config=family.model.config.text_config)
    monkeypatch.setattr("lmms_prune.methods.dart.DART.select", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), prune(family.model, "random@1:0.5,dart@3:0.2"):
        family.model(**prompt(family), **with_cache(family.model, cache))
    with pytest.raises(PruningError, match="filled inside a prune block"):
        step(family, cache)


def test_a_cache_from_which_nothing_was_dropped_is_like_any_other(family: Family) -> None:
    inputs = prompt(family)
    plain = filled_cache(family.model(**inputs, use_cache=True))
    with prune(family.model, "random@2:1"):
        cache = filled_cache(family.model(**inputs, use_cache=True))
        with pytest.raises(PruningError, match="the cache's crop"):
            cache.crop(-1)
    assert torch.equal(step(family, cache), step(family, plain))
    before = cache.get_seq_length()
    cache.crop(-1)
    assert cache.get_seq_length() == before - 1
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys[:, :, :-1])


@pytest.mark.parametrize("schedule", ["random@2:0.5", "sgl@3:0.4;guide=self", "random@2:1"])
def test_a_cache_is_freed_without_the_collector(loaded, schedule: str) -> None:
    family = loaded("llava")
    gc.collect()
    gc.disable()
    try:
        with prune(family.model, schedule):
            cache = filled_cache(family.model(**prompt(family), use_cache=True))
        alive = weakref.ref(cache)
        assert alive() is not None
        del cache
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("schedule", ["none", "random@2:0.5", "fastervlm@0:0.5"])
def test_a_model_is_not_copied_with_its_hooks(family: Family, schedule: str) -> None:
    before = hook_count(family.model)
    with prune(family.model, schedule):
        family.model(**prompt(family))
        with pytest.raises(PruningError, match="copy or save it outside the block"):
            copy.deepcopy(family.model)
        with pytest.raises(PruningError, match="copy or save it outside the block"):
            copy.deepcopy(family.model.model.language_model.layers[3]) if schedule != "none" else copy.deepcopy(
                family.model
            )
    assert hook_count(copy.deepcopy(family.model)) == before


# -- layers ------------------------------------------------------------------------------------------------------------


@contextmanager
def swapped(family: Family, layer: int, module: nn.Module) -> Iterator[None]:
    layers = family.model.model.language_model.layers
    old, layers[layer] = layers[layer], module
    try:
        yield
    finally:
        layers[layer] = old


@pytest.mark.parametrize("when", ["before the prompt", "before a step"])
@pytest.mark.parametrize("layer", [0, 3])
def test_a_layer_that_is_replaced_inside_the_block(family: Family, when: str, layer: int) -> None:
    other = copy.deepcopy(family.model.model.language_model.layers[layer])
    with pytest.raises(PruningError, match="layers were replaced"), prune(family.model, "random@2:0.5"):
        if when == "before the prompt":
            with swapped(family, layer, other):
                family.model(**prompt(family))
        cache = filled_cache(family.model(**prompt(family), use_cache=True))
        with swapped(family, layer, other):
            step(family, cache)


def test_a_layer_that_is_skipped_in_a_step(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PruningError, match="7 of 8 decoder layers ran"), prune(family.model, "random@2:0.5"):
        cache = filled_cache(family.model(**prompt(family), use_cache=True))
        layer = family.model.model.language_model.layers[7]
        monkeypatch.setattr(
            type(layer), "__call__", lambda self, x, **more: x if self is layer else nn.Module.__call__(self, x, **more)
        )
        step(family, cache)


def test_a_layer_that_is_called_by_itself(family: Family) -> None:
    with pytest.raises(PruningError, match="by itself"), prune(family.model, "random@2:0.5"):
        family.model.model.language_model.layers[3](torch.zeros(1, 2, 64, dtype=torch.float64))


# -- where a prompt ends -----------------------------------------------------------------------------------------------


def columns(inputs: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    """The prompt's columns from `first` up to `last`."""
    sequences = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: x[:, first:last] if name in sequences else x for name, x in inputs.items()}


def ending_in_image(family: Family, text: bool = True) -> dict[str, Tensor]:
    """A prompt up to the last visual token of its image, with the text before it or without."""
    inputs = prompt(family)
    visual = (inputs["input_ids"][0] == family.model.config.image_token_id).nonzero().flatten().tolist()
    return columns(inputs, 0 if text else visual[0], visual[-1] + 1)


def batched(family: Family) -> dict[str, Tensor]:
    """A whole prompt and, left-padded, the one that ends in its image."""
    full, short = prompt(family), ending_in_image(family)
    gap = full["input_ids"].shape[1] - short["input_ids"].shape[1]
    return {
        name: torch.cat([x, nn.functional.pad(short[name], (gap, 0)) if short[name].shape != x.shape else short[name]])
        for name, x in full.items()
    }


def loop(family: Family, inputs: dict[str, Tensor], schedule: str | None, **more: Any) -> Tensor:
    """Logits of a hand-written loop, which gives nothing but token and cache."""
    logits = []
    with prune(family.model, schedule) if schedule else nullcontext():
        output = family.model(**inputs, use_cache=True)
        for _ in range(4):
            logits.append(output.logits[:, -1])
            output = family.model(
                input_ids=torch.tensor([[7]]), **with_cache(family.model, filled_cache(output)), **more
            )
    return torch.stack(logits)


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("more", [{}, {"position_ids": torch.tensor([[90]])}], ids=["", "with positions"])
def test_keeping_all_of_a_prompt_that_ends_in_its_image_changes_nothing(family: Family, text: bool, more: dict) -> None:
    """M-RoPE's channels differ there, and its largest position is not the last token's."""
    inputs = ending_in_image(family, text)
    assert torch.equal(loop(family, inputs, "random@1:1", **more), loop(family, inputs, None, **more))


def test_generate_is_unchanged_for_a_prompt_that_ends_in_its_image(family: Family) -> None:
    options = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    plain = family.model.generate(**ending_in_image(family), **options)
    with prune(family.model, "random@1:1"):
        kept = family.model.generate(**ending_in_image(family), **options)
    assert torch.equal(torch.stack(kept.logits), torch.stack(plain.logits))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        (None, [[4]]),
        (torch.tensor([[0, 1, 2, 3]]), [[4], [4]]),
        (torch.tensor([[1, 1, 0, 1], [0, 1, 2, 3]]), [[2], [4]]),
        # The image's rows end before its columns do; the values in the padding do not matter.
        (torch.tensor([[[9, 9, 0, 1]] * 2, [[9, 9, 0, 1]] * 2, [[9, 9, 0, 5]] * 2]), [[6], [10]]),
        (torch.tensor([[[0, 1, 2, 30]] * 2, [[0, 0, 1, 1]] * 2, [[0, 0, 2, 1]] * 2, [[0, 0, 1, 1]] * 2]), [[3], [3]]),
    ],
)
def test_the_next_position_is_the_largest_and_one_more(positions: Tensor | None, expected: list[list[int]]) -> None:
    present = torch.tensor([[False, False, True, True], [True] * 4])
    assert next_position(positions, present).tolist() == expected


@pytest.mark.parametrize("schedule", ["random@0:0.5", "random@3:0.5"])
def test_a_loop_without_positions_continues_at_the_end_of_each_row(family: Family, schedule: str) -> None:
    inputs = mixed_batch(family)
    options = {**PLAIN, "return_dict_in_generate": True, "output_logits": True}
    with prune(family.model, schedule):
        expected = family.model.generate(**inputs, **options)
        new = expected.sequences[:, -3:]
        mask = inputs["attention_mask"]
        more = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if family.name == "llava" else {}
        output = family.model(**inputs, use_cache=True, **more)
        for number in range(3):
            torch.testing.assert_close(output.logits[:, -1].float(), expected.logits[number], atol=1e-5, rtol=1e-6)
            mask = nn.functional.pad(mask, (0, 1), value=1)
            cache = with_cache(family.model, filled_cache(output))
            output = family.model(input_ids=new[:, number, None], attention_mask=mask, **cache)


@pytest.mark.parametrize(
    "schedule", ["vtw@0", "vtw@4", "random@2:0.5", "keeplast@2:0.5", "mustdrop@3", "random@1:1,vtw@6"]
)
def test_a_prompt_whose_last_token_may_be_dropped_is_refused(family: Family, schedule: str) -> None:
    for inputs in (ending_in_image(family), ending_in_image(family, text=False)):
        with (
            pytest.raises(PruningError, match=r"^sample a: the prompt ends in an image"),
            prune(family.model, schedule, samples=["a"]),
        ):
            family.model(**inputs)
    with (
        pytest.raises(PruningError, match=r"^sample b: the prompt ends in an image"),
        prune(family.model, schedule, samples=["a", "b"]) as trace,
    ):
        family.model(**batched(family))
    assert trace.rows == []


def test_a_prompt_that_ends_in_a_kept_image(loaded) -> None:
    """An image of so few tokens keeps them all."""
    family = loaded("qwen")
    with prune(family.model, "random@2:20t") as trace:
        family.model(**batched(family))
    assert [row.kept for row in trace.rows] == [[[16]], [[16]]]


def test_a_cache_whose_prompt_was_refused_is_free_after_the_block(family: Family) -> None:
    """The refusal comes before anything is pruned, so that the cache is like any other once the block has ended."""
    inputs = family.inputs(["what is this?"], [[noise(0)]])
    cache = DynamicCache(config=family.model.config)
    with (
        pytest.raises(PruningError, match="samples were named"),
        prune(family.model, "random@1:0.5", samples=["a"] * 3),
    ):
        family.model(**inputs, **with_cache(family.model, cache))
    cache.crop(0)
