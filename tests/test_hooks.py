"""Cutting: the invariants that hold for every method, family, schedule and batch."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from forking import Forking
from masked_reference import dropped_columns, masked_logits
from tiny import LAYERS, Family, noise
from torch import nn
from transformers import DynamicCache, StaticCache

from lmms_prune import Schedule, prune
from lmms_prune.compat.transformers import cache_of, cached_lengths, filled_cache, with_cache
from lmms_prune.errors import PruningError, ScheduleError, UnsupportedModelError

STEPS = 16
QUESTIONS = ["What colour is it? Answer the question using a single word or phrase.", "yes or no", "Which one, A or B?"]
SCHEDULES = [
    "dart@2:0.44,random@5:0.07",
    "divprune@0:0.5,fastv@3:0.25,vtw@6",
    "random@0:0.3",
    "vtw@0",
    "fastv@1:0.4",
    "random@0:20t,dart@7:12t",
    "dart@1:0.6;native_count=false,divprune@4:0.2,random@7:0.1",
    "vtw@7",
    "fastervlm@0:0.6,pdrop@2:0.3,stride@5:0.1",
]
# These methods change kept tokens; the reference would have to know the new states, as the certificate's does.
REWRITING = ["pool@0:0.5,pool@3:0.2", "visionzip@0:0.5,random@4:0.2", "tome@2:0.4", "downsample@0:0.3,holov@2:0.2"]
KEEP_ALL = ["random@0:1", "divprune@0:1,dart@2:1.0,fastv@7:1", "dart@3:5000t"]


PREPARED: dict[tuple[str, torch.dtype], list[dict[str, torch.Tensor]]] = {}


def prepared(family: Family) -> list[dict[str, torch.Tensor]]:
    """The mixed batch and then its rows, each by itself: prepared once, and copied for each test."""
    key = (family.name, family.model.dtype)
    if key not in PREPARED:
        images = [[noise(1)], [noise(2, 140, 84), noise(3)], [], [noise(4, 84, 168)]]
        questions = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[2], QUESTIONS[1]]
        alone = [family.inputs([question], [row]) for question, row in zip(questions, images, strict=True)]
        PREPARED[key] = [family.inputs(questions, images), *alone]
    return [{name: tensor.clone() for name, tensor in inputs.items()} for inputs in PREPARED[key]]


def mixed_batch(family: Family) -> dict[str, torch.Tensor]:
    """Rows of different lengths: one image, two images, no image, one image of another size."""
    return prepared(family)[0]


def single_rows(family: Family) -> list[dict[str, torch.Tensor]]:
    """The rows of `mixed_batch`, each by itself."""
    return prepared(family)[1:]


def generate(family: Family, inputs: dict[str, torch.Tensor], steps: int = STEPS):
    return family.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        return_dict_in_generate=True,
        output_logits=True,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        sequence_bias=None,
        exponential_decay_length_penalty=None,
    )


def assert_same(logits: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to the float32 in which generate() hands out the logits of a float64 model."""
    torch.testing.assert_close(logits.float(), expected.float(), atol=tolerance, rtol=1e-6)


def hook_count(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._forward_hooks_with_kwargs)
        for module in model.modules()
    )


@pytest.fixture(scope="module")
def answered(loaded) -> Callable:
    """The mixed batch's answer and trace under a schedule, computed once for all tests that use it."""

    @cache
    def of(name: str, schedule: str, positions: str = "original"):
        family = loaded(name)
        with prune(family.model, schedule, positions=positions) as trace:
            return trace, generate(family, mixed_batch(family))

    return of


@pytest.fixture(scope="module")
def unpruned(loaded) -> Callable:
    """The mixed batch's answer without any hook, computed once."""
    return cache(lambda *kind: generate(loaded(*kind), mixed_batch(loaded(*kind))))


@pytest.mark.core
@pytest.mark.parametrize(("name", "positions"), [("llava", "original"), ("llava", "compact"), ("qwen", "original")])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pruned_equals_the_masked_reference(loaded, answered, name: str, schedule: str, positions: str) -> None:
    """In the prefill and in 16 decode steps, for every row of a ragged batch."""
    family = loaded(name)
    inputs = mixed_batch(family)
    trace, output = answered(name, schedule, positions)
    generated = output.sequences[:, inputs["input_ids"].shape[1] :]
    logits = torch.stack(output.logits, dim=1)
    layers = [stage.layer for stage in trace.schedule.stages]
    for row, alone in enumerate(single_rows(family)):
        record = trace.rows[row]
        ids = alone["input_ids"][0].tolist()
        drops = {
            layer: dropped_columns(ids, family.model.config.image_token_id, record.images, masks)
            for layer, masks in zip(layers, record.masks, strict=True)
        }
        expected = masked_logits(family.model, alone, generated[row], drops, positions == "compact")
        assert_same(logits[row], expected)
    assert any(any(mask.numel() > mask.sum() for mask in masks) for row in trace.rows for masks in row.masks)


@pytest.mark.core
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_a_row_in_a_batch_equals_the_single_row(loaded, name: str, schedule: str, attention: str) -> None:
    # The library's eager attention computes its softmax in float32, where its float64 mask overflows. Few steps: the
    # masked reference follows each row of a batch, alone, through all of them.
    steps = 4
    family = loaded(name, torch.float32 if attention == "eager" else torch.float64, attention)
    tolerance = 1e-3 if attention == "eager" else 1e-5
    with prune(family.model, schedule, seed=3) as trace:
        batch = generate(family, mixed_batch(family), steps)
    for row, alone in enumerate(single_rows(family)):
        with prune(family.model, schedule, seed=3) as single:
            output = generate(family, alone, steps)
        assert_same(output.logits[0][0], batch.logits[0][row], tolerance)
        assert output.sequences[0, -steps:].tolist() == batch.sequences[row, -steps:].tolist()
        stages = range(len(single.schedule.stages))
        assert [single.rows[0].indices(i) for i in stages] == [trace.rows[row].indices(i) for i in stages]


def test_permuting_rows_permutes_answers(family: Family) -> None:
    images = [[noise(seed, 112, 112)] for seed in range(4)]
    questions = [QUESTIONS[0]] * 4
    order = [2, 0, 3, 1]
    schedule = "random@0:0.5,dart@3:0.2"
    samples = ["a", "b", "c", "d"]
    with prune(family.model, schedule, samples=samples):
        straight = generate(family, family.inputs(questions, images))
    with prune(family.model, schedule, samples=[samples[i] for i in order]):
        shuffled = generate(family, family.inputs(questions, [images[i] for i in order]))
    for position, row in enumerate(order):
        assert_same(shuffled.logits[-1][position], straight.logits[-1][row])


@pytest.mark.core
@pytest.mark.parametrize("schedule", ["none", *KEEP_ALL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_keeping_all_is_bit_identical(
    loaded, unpruned, name: str, attention: str, dtype: torch.dtype, schedule: str
) -> None:
    plain, family = unpruned(name, dtype, attention), loaded(name, dtype, attention)
    with prune(family.model, schedule):
        pruned = generate(family, mixed_batch(family))
    assert torch.equal(plain.sequences, pruned.sequences)
    assert torch.equal(torch.stack(plain.logits), torch.stack(pruned.logits))


@pytest.mark.core
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_cache_equals_trace_equals_plan(family: Family, answered, schedule: str) -> None:
    """Dropped tokens are really removed from the cache, layer by layer."""
    inputs = mixed_batch(family)
    trace, output = answered(family.name, schedule)
    longest = [0] * LAYERS
    for row in trace.rows:
        assert row.visual == Schedule.parse(schedule).layer_counts(LAYERS, row.images)
        for layer in range(LAYERS):
            longest[layer] = max(longest[layer], row.text_tokens + row.visual[layer])
    held = [length - (STEPS - 1) for length in cached_lengths(filled_cache(output))]
    assert held == longest == trace.rows[0].computed
    assert min(held) < inputs["input_ids"].shape[1]


@pytest.mark.core
@pytest.mark.parametrize("schedule", ["random@0:0.3", "dart@2:0.4"])
def test_decode_without_position_ids_continues_where_the_prompt_ended(family: Family, schedule: str) -> None:
    """A hand-written loop gives the library nothing but the cache, whose first layer a stage at 0 has shortened."""
    inputs = family.inputs([QUESTIONS[0]], [[noise(7)]])
    with prune(family.model, schedule), torch.no_grad():
        expected = generate(family, inputs)
    with prune(family.model, schedule), torch.no_grad():
        cache = DynamicCache(config=family.model.config.text_config)
        output = family.model(**inputs, **with_cache(family.model, cache), use_cache=True)
        for step in range(STEPS):
            logits = output.logits[:, -1]
            assert_same(logits, expected.logits[step])
            output = family.model(
                input_ids=logits.argmax(-1, keepdim=True), **with_cache(family.model, cache), use_cache=True
            )


@pytest.mark.core
def test_no_hook_is_left(family: Family) -> None:
    before = hook_count(family.model)
    with prune(family.model, SCHEDULES[0]):
        assert hook_count(family.model) > before
        generate(family, mixed_batch(family))
    assert hook_count(family.model) == before


@pytest.mark.core
@pytest.mark.parametrize("raised_in", ["body", "method", "layer", "registration"])
def test_no_hook_is_left_after_an_exception(family: Family, monkeypatch: pytest.MonkeyPatch, raised_in: str) -> None:
    before = hook_count(family.model)
    target = family.model.model.language_model.layers[5]

    class BoomError(Exception):
        pass

    def boom(*args: object, **kwargs: object) -> None:
        raise BoomError

    if raised_in == "method":
        monkeypatch.setattr("lmms_prune.methods.dart.DART.select", boom)
    if raised_in == "layer":
        monkeypatch.setattr(target, "forward", boom)
    if raised_in == "registration":
        monkeypatch.setattr(target, "register_forward_pre_hook", boom)
    with pytest.raises(BoomError), prune(family.model, SCHEDULES[0]):
        if raised_in == "body":
            raise BoomError
        generate(family, mixed_batch(family))
    assert hook_count(family.model) == before
    monkeypatch.undo()
    with prune(family.model, SCHEDULES[0]):
        generate(family, mixed_batch(family))


def test_one_block_serves_several_prompts(family: Family) -> None:
    with prune(family.model, "random@2:0.5") as trace:
        for row in single_rows(family):
            generate(family, row)
    assert [row.images for row in trace.rows] == [row.images for row in batch_trace(family).rows]


def batch_trace(family: Family):
    with prune(family.model, "random@2:0.5") as trace:
        generate(family, mixed_batch(family))
    return trace


def test_a_batch_without_any_image_runs_unpruned(family: Family) -> None:
    inputs = family.inputs([QUESTIONS[0], QUESTIONS[1]], [[], []])
    plain = generate(family, inputs)
    with prune(family.model, SCHEDULES[0]) as trace:
        pruned = generate(family, inputs)
    assert torch.equal(torch.stack(plain.logits), torch.stack(pruned.logits))
    assert trace.avg_visual_tokens == 0.0


def test_the_empty_schedule_traces_the_unpruned_model(family: Family) -> None:
    with prune(family.model, "none") as trace:
        generate(family, mixed_batch(family))
    with prune(family.model, "random@0:1") as keep_all:
        generate(family, mixed_batch(family))
    assert trace.avg_visual_tokens == keep_all.avg_visual_tokens > 0
    for row, other in zip(trace.rows, keep_all.rows, strict=True):
        assert (row.sample, row.text_tokens, row.images) == (other.sample, other.text_tokens, other.images)
        assert (row.visual, row.computed) == (other.visual, other.computed)


def test_an_empty_trace_has_no_average(family: Family) -> None:
    with prune(family.model, "none") as trace, pytest.raises(ValueError, match="no prompt has run"):
        _ = trace.avg_visual_tokens


def test_the_empty_schedule_refuses_nothing(family: Family) -> None:
    inputs = family.inputs(QUESTIONS[:2], [[noise(1)], [noise(2)]])
    options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 3}
    plain = family.model.generate(**inputs, **options)
    with prune(family.model, "none"):
        assert torch.equal(family.model.generate(**inputs, **options), plain)


def test_the_empty_schedule_allows_chunked_prompts(loaded) -> None:
    """An image that is split between chunks is not recorded, rather than recorded wrongly."""
    family = loaded("llava")
    inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
    options = {"prefill_chunk_size": 16, "do_sample": False, "max_new_tokens": 3}
    plain = family.model.generate(**inputs, **options)
    with prune(family.model, "none") as trace:
        assert torch.equal(family.model.generate(**inputs, **options), plain)
    assert trace.rows == []


def test_a_list_of_stages_is_a_schedule(family: Family) -> None:
    with prune(family.model, ["random@1:0.5", "vtw@3"]) as trace:
        generate(family, mixed_batch(family))
    assert str(trace.schedule) == "random@1:0.5,vtw@3"


def test_several_answers_to_a_prompt_draw_equally(family: Family) -> None:
    inputs = family.inputs([QUESTIONS[0]], [[noise(9)]])
    with prune(family.model, "random@1:0.3", samples=["one"]) as trace:
        family.model.generate(**inputs, do_sample=True, num_return_sequences=3, max_new_tokens=2)
    assert len(trace.rows) == 3
    assert trace.rows[0].indices(0) == trace.rows[2].indices(0)


def test_works_with_gradients_on(family: Family) -> None:
    inputs = family.inputs([QUESTIONS[0]], [[noise(9)]])
    with prune(family.model, SCHEDULES[0]):
        output = family.model(**inputs)
    assert output.logits.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_other_dtypes_prune_as_planned(loaded, name: str, dtype: torch.dtype) -> None:
    family = loaded(name, dtype)
    with prune(family.model, SCHEDULES[1]) as trace:
        generate(family, mixed_batch(family))
    assert [sum(kept) for kept in trace.rows[0].kept] == [
        sum(kept) for kept in Schedule.parse(SCHEDULES[1]).plan(trace.rows[0].images)
    ]


class TestRefusals:
    """What would go wrong is refused with a message that says what to do."""

    def run(self, family: Family, match: str, call: Callable[[], object], **options) -> None:
        with pytest.raises(PruningError, match=match), prune(family.model, "random@2:0.5", **options):
            call()

    def test_beam_search(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        options = {"num_beams": 2, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        self.run(family, "num_beams=1", lambda: family.model.generate(**inputs, **options))

    def test_prompt_lookup(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        options = {"prompt_lookup_num_tokens": 2, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
        self.run(family, "assisted", lambda: family.model.generate(**inputs, **options))

    def test_static_cache(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        cache = StaticCache(config=family.model.config.text_config, max_cache_len=256)
        self.run(family, "StaticCache", lambda: family.model(**inputs, **with_cache(family.model, cache)))

    def test_right_padding(self, family: Family) -> None:
        family.processor.tokenizer.padding_side = "right"
        inputs = family.inputs(QUESTIONS[:2], [[noise(1)], [noise(2)]])
        family.processor.tokenizer.padding_side = "left"
        self.run(family, "padding_side = 'left'", lambda: family.model(**inputs))

    def test_embeddings_without_ids(self, family: Family) -> None:
        embeddings = torch.zeros(1, 5, family.model.config.text_config.hidden_size, dtype=torch.float64)
        self.run(family, "input_ids", lambda: family.model(inputs_embeds=embeddings))

    def test_a_continued_conversation(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])

        def two_turns() -> None:
            cache = filled_cache(family.model(**inputs, use_cache=True))
            family.model(input_ids=inputs["input_ids"][:, -3:], **with_cache(family.model, cache))

        self.run(family, "3 tokens at once", two_turns)

    def test_a_cache_from_before_the_block(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        cache = filled_cache(family.model(**inputs, use_cache=True))
        one = inputs["input_ids"][:, -1:]
        self.run(family, "not filled inside", lambda: family.model(input_ids=one, **with_cache(family.model, cache)))

    def test_a_wrong_number_of_samples(self, family: Family) -> None:
        inputs = family.inputs(QUESTIONS[:2], [[noise(1)], [noise(2)]])
        self.run(family, "3 samples were named", lambda: family.model(**inputs), samples=["a", "b", "c"])

    def test_a_block_in_which_nothing_ran(self, family: Family) -> None:
        self.run(family, "never acted", lambda: None)

    def test_layers_beyond_the_model(self, family: Family) -> None:
        with pytest.raises(ScheduleError, match="layers are 0 to 7"), prune(family.model, "random@8:0.5"):
            pass

    def test_counts_that_grow(self, loaded) -> None:
        with (
            pytest.raises(ScheduleError, match="stage 2 keeps 40 of the 32"),
            prune(loaded("llava").model, "random@1:0.5,random@2:40t"),
        ):
            pass

    def test_compact_is_refused_for_mrope(self, loaded) -> None:
        with (
            pytest.raises(UnsupportedModelError, match="M-RoPE"),
            prune(loaded("qwen").model, "random@1:0.5", positions="compact"),
        ):
            pass

    def test_generation_without_a_cache(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        options = {"use_cache": False, "do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
        self.run(family, "leave use_cache on", lambda: family.model.generate(**inputs, **options))

    def test_a_static_cache_by_name(self, family: Family) -> None:
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        options = {"cache_implementation": "static", "do_sample": False, "max_new_tokens": 4}
        self.run(family, "StaticCache", lambda: family.model.generate(**inputs, **options))

    def test_a_block_inside_a_block(self, family: Family) -> None:
        def nested() -> None:
            with prune(family.model, "random@3:0.5"):
                pass

        self.run(family, "one schedule", nested)

    def test_a_block_inside_an_empty_one(self, family: Family) -> None:
        with (
            pytest.raises(PruningError, match="one schedule"),
            prune(family.model, "none"),
            prune(family.model, "random@3:0.5"),
        ):
            pass

    def test_videos(self, loaded) -> None:
        family = loaded("qwen")
        inputs = family.inputs([QUESTIONS[0]], [[noise(1)]])
        grid = torch.ones(1, 3, dtype=torch.long)
        self.run(family, "video input", lambda: family.model.model(**inputs, video_grid_thw=grid))

    def test_unknown_positions(self, family: Family) -> None:
        with (
            pytest.raises(UnsupportedModelError, match="original or compact"),
            prune(family.model, "none", positions="keep"),
        ):
            pass

    def test_other_models(self) -> None:
        with pytest.raises(UnsupportedModelError, match="llava_pruned"), prune(nn.Linear(2, 2), "random@1:0.5"):
            pass


def test_a_method_that_keeps_another_number_is_caught(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_prune.methods.random.Random.select", lambda self, view, budget: view.valid)
    names = ["a", "b", "c", "d"]  # the third one has no image
    with (
        pytest.raises(PruningError, match=r"^sample a, b, d: a method kept another number"),
        prune(family.model, "random@2:0.5", samples=names),
    ):
        generate(family, mixed_batch(family))


def test_a_layer_that_ran_twice_is_caught(family: Family) -> None:
    """Its keys are in the cache twice, so that every later token would read them twice."""

    def again(module: nn.Module, args: tuple, kwargs: dict, output: torch.Tensor) -> None:
        cache = cache_of(kwargs).layers[3]
        cache.keys, cache.values = (torch.cat([states, states], 2) for states in (cache.keys, cache.values))

    handle = family.model.model.language_model.layers[3].register_forward_hook(again, with_kwargs=True)
    try:
        with (
            pytest.raises(PruningError, match=r"^samples a, b, c, d: the cache holds \[.*\] tokens, planned were \["),
            prune(family.model, "random@2:0.5", samples=["a", "b", "c", "d"]),
        ):
            generate(family, mixed_batch(family))
    finally:
        handle.remove()


# ``python -O`` would also compile all of torch and transformers without their assertions, for half a minute.
OPTIMISED = """
import sys
from importlib.machinery import PathFinder, SourceFileLoader

class Optimised(SourceFileLoader):
    def get_code(self, name):
        path = self.get_filename(name)
        return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("lmms_prune", "asserting"):
            spec = PathFinder.find_spec(name, path, target)
            spec.loader = Optimised(spec.loader.name, spec.loader.path)
            return spec

for name in [name for name in sys.modules if name.partition(".")[0] == "lmms_prune"]:
    del sys.modules[name]
sys.meta_path.insert(0, Finder())
sys.path.append(sys.argv[2])
import asserting
import torch
from tiny import load, noise
from lmms_prune import prune
from lmms_prune.methods.random import Random
from lmms_prune.errors import PruningError
family = load("llava", sys.argv[1], torch.float32, "sdpa")
Random.select = lambda self, view, budget: view.valid
try:
    with prune(family.model, "random@2:0.5", samples=["a"]):
        family.model.generate(**family.inputs(["?"], [[noise(1)]]), max_new_tokens=2)
except PruningError as error:
    print(error)
"""


@pytest.mark.slow
def test_checks_of_published_numbers_also_run_under_python_o(folders, forking: Forking, tmp_path: Path) -> None:
    """In a process that has the package as ``-O`` compiles it."""
    script = tmp_path / "optimised.py"
    script.write_text(OPTIMISED, encoding="utf-8")
    (tmp_path / "asserting.py").write_text("assert False, 'asserts are on'\n", encoding="utf-8")
    words = [str(script), str(folders["llava"]), str(Path(__file__).parent)]
    command, environment = [*forking.prefix, *words], forking.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.startswith("sample a: a method kept another number"), done.stderr[-2000:]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("schedule", REWRITING)
def test_merged_tokens_decode_as_one_long_prompt_would(family: Family, schedule: str, positions: str) -> None:
    """Step by step with a cache, or all at once with the generated tokens after the prompt: the same logits.

    These methods look at nothing but the image, so a longer prompt changes nothing of what they make of it.
    """
    if positions == "compact" and family.name != "llava":
        pytest.skip("compact positions are for one-dimensional ones")
    inputs = family.inputs([QUESTIONS[0]], [[noise(3, 84, 112)]])
    with torch.no_grad():
        with prune(family.model, schedule, positions=positions, samples=["one"]) as trace:
            output = family.model.generate(
                **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        ids = output.sequences
        assert ids.shape[1] > inputs["input_ids"].shape[1] + 1
        for step in range(ids.shape[1] - inputs["input_ids"].shape[1]):
            length = inputs["input_ids"].shape[1] + step
            longer = {**inputs, "input_ids": ids[:, :length], "attention_mask": torch.ones_like(ids[:, :length])}
            if "mm_token_type_ids" in inputs:
                longer["mm_token_type_ids"] = (ids[:, :length] == family.model.config.image_token_id).int()
            with prune(family.model, schedule, positions=positions, samples=["one"]) as again:
                logits = family.model(**longer).logits[:, -1]
            assert again.rows[0].indices(0) == trace.rows[0].indices(0)
            torch.testing.assert_close(logits, output.logits[step].to(logits.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize(
    "schedule",
    [
        "mustdrop@3:0.5,mustdrop@6:0.2",
        "random@1:0.8,mustdrop@4:0.3,vtw@7",
        "ivcprune@5:0.3",
        "divprune@0:0.8,random@2:0.5,ivcprune@4:0.2,vtw@6",
    ],
)
def test_caches_of_earlier_layers_are_cropped(family: Family, schedule: str, positions: str) -> None:
    """Generated tokens see only the tokens that the last cropping stage keeps; the prompt saw all.

    In the layers before it: MustDrop's from the layer before its first stage on, IVC-Prune's in all.
    """
    if positions == "compact" and family.name != "llava":
        pytest.skip("compact positions are for one-dimensional ones")
    inputs = mixed_batch(family)
    with prune(family.model, schedule, positions=positions) as trace:
        output = generate(family, inputs)
    parsed = Schedule.parse(schedule)
    cropping = [i for i, stage in enumerate(parsed.stages) if stage.method in ("mustdrop", "ivcprune")]
    last = parsed.stages[cropping[-1]].layer - 1
    first = 0 if "ivcprune" in schedule else parsed.stages[cropping[0]].layer - 1
    lengths = [length - STEPS + 1 for length in cached_lengths(filled_cache(output))]
    after = trace.rows[0].computed[last + 1]
    assert lengths == [after if first <= i <= last else n for i, n in enumerate(trace.rows[0].computed)]
    assert trace.rows[0].cached == lengths
    generated = output.sequences[:, -STEPS:]
    for row, alone in enumerate(single_rows(family)):
        ids, record = alone["input_ids"][0].tolist(), trace.rows[row]
        dropped = [
            dropped_columns(ids, family.model.config.image_token_id, record.images, masks) for masks in record.masks
        ]
        drops = {stage.layer: columns for stage, columns in zip(parsed.stages, dropped, strict=True)}
        cropped_columns = dict.fromkeys(range(first, last + 1), dropped[cropping[-1]])
        logits = torch.stack([step[row] for step in output.logits])
        expected = masked_logits(family.model, alone, generated[row], drops, positions == "compact", cropped_columns)
        assert_same(logits, expected)
        if record.images:
            plain = masked_logits(family.model, alone, generated[row], drops, positions == "compact")
            assert (logits[1:] - plain[1:]).abs().max() > 1e-3, (
                "cropping must change the logits, or the case is not tested"
            )


@pytest.mark.parametrize("schedule", ["visionzip@0:0.5,random@4:0.2", "sparsevlm@2:0.5,sparsevlm@5:0.2", "tome@2:0.4"])
def test_recycled_tokens_are_those_whose_states_were_changed(
    family: Family, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted by looking at the states before and after each writing."""
    from lmms_prune.pruning.layout import Layout

    original, seen = Layout.write, []

    def spy(self, hidden, division, visual, index):
        after = original(self, hidden, division, visual, index)
        seen.append(((hidden != after).any(-1).sum(1), len(self.traces)))
        return after

    monkeypatch.setattr(Layout, "write", spy)
    with torch.no_grad(), prune(family.model, schedule) as trace:
        family.model(**mixed_batch(family))
    stages = Schedule.parse(schedule).stages
    writing = [n for n, stage in enumerate(stages) if stage.spec.rewrites]
    assert len(seen) == len(writing)
    for row, traced in enumerate(trace.rows):
        assert [len(images) for images in traced.recycled] == [len(traced.images)] * len(stages)
        for n, recycled in enumerate(traced.recycled):
            assert all(0 <= some <= left for some, left in zip(recycled, traced.kept[n], strict=True))
            if n in writing:
                # A dropped token's state may be rewritten too; the kept ones are among the changed.
                assert sum(recycled) <= seen[writing.index(n)][0][row]
                assert not traced.images or sum(recycled) > 0
            else:
                assert sum(recycled) == 0


def test_one_sample_id_for_two_prompts_is_refused(family: Family) -> None:
    """Several answers to one prompt share its name; different prompts would share their random draws."""
    inputs = family.inputs(QUESTIONS[:2], [[noise(1)], [noise(2)]])
    with (
        pytest.raises(PruningError, match="1 samples were named for a batch of 2 rows, which are not 2 answers"),
        prune(family.model, "random@0:0.5", samples=["a"]),
    ):
        family.model.generate(**inputs, max_new_tokens=1)
    with prune(family.model, "random@0:0.5", samples=["a", "b"]) as trace:
        family.model.generate(**inputs, max_new_tokens=2, do_sample=True, num_return_sequences=2)
    assert [row.sample for row in trace.rows] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("schedule", ["sparsevlm@2:0.5", "fastv@2:0.5", "dart@2:0.5", "visionzip@0:0.5", "hivtp@2:0.4"])
def test_methods_also_run_under_autocast(loaded, schedule: str) -> None:
    family = loaded("llava", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), prune(family.model, schedule) as trace:
        family.model.generate(**family.inputs(QUESTIONS[:1], [[noise(1)]]), max_new_tokens=2, do_sample=False)
    assert trace.rows[0].visual[-1] < trace.rows[0].visual_tokens
