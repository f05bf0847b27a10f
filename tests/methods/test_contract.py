"""What every method owes: a mask of the planned size over tokens that are there, whatever else is in the batch."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable
from decimal import Decimal
from importlib import import_module
from pathlib import Path

import pytest
import torch
from observed import FAMILIES, LAYERS, Tiny, observe
from torch import Tensor

import lmms_prune.methods
from lmms_prune import Schedule, ScheduleError, Stage, prune
from lmms_prune.certificate import contract
from lmms_prune.certificate.contract import Tried
from lmms_prune.certificate.tiny import Mixed, mixed_rows
from lmms_prune.demo.checkpoints import build_llava
from lmms_prune.errors import OptionError, PruningError
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.base import Method, ScoreMethod
from lmms_prune.methods.view import TokenView

ALL = list(METHODS.values())
# What needs trained weights or measurements cannot be tried without them; its own tests do.
SPECS = [spec for spec in ALL if spec.ready]
KEEPING = [spec for spec in SPECS if not spec.drops_all]
# What a method cannot do without, beyond its keep, when it is tried on random weights.
OPTIONS = {spec.name: dict(Schedule.parse(spec.example).stages[0].options) for spec in SPECS}
# Options under which a method reads more than it does by default; where they cannot be had, it says so.
VARIANTS: dict[str, tuple[dict[str, object], ...]] = {
    "tome": ({"metric": "keys"}, {"place": "encoder"}),
    "folder": ({"variant": "full"},),
    "cdpruner": ({"clip": "/no/such/folder"},),
}
# Methods whose answer the seed decides.
SEEDED = {"random"}
by_name = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
by_row = pytest.mark.parametrize("spec", ALL, ids=lambda spec: spec.name)
by_keeping_name = pytest.mark.parametrize("spec", KEEPING, ids=lambda spec: spec.name)


def some_layers(spec: MethodSpec) -> list[int]:
    return sorted({at(spec, n) for n in (0, 3, LAYERS - 1)})


def layers_of(specs: list[MethodSpec]) -> pytest.MarkDecorator:
    """Each method at its lowest layer, in the middle and at the last layer, as far as it can act there."""
    cases = [(spec, layer) for spec in specs for layer in some_layers(spec)]
    return pytest.mark.parametrize(("spec", "layer"), cases, ids=[f"{spec.name}@{layer}" for spec, layer in cases])


def shared_out(name: str, specs: list[MethodSpec], values: Callable[[MethodSpec], list]) -> pytest.MarkDecorator:
    """Each method with each of its values and with each family, but not each value with both families.

    What one family does with a value of `name` and the other does not is for the certificate, whose matrix is the whole
    product (``lmms-prune doctor --full``) and of which tests/certificate runs every pair.
    """
    cases = []
    for number, spec in enumerate(specs):
        found = values(spec)
        found = found * 2 if len(found) == 1 else found
        cases += [(spec, value, FAMILIES[(number + turn) % 2]) for turn, value in enumerate(found)]
    ids = [f"{spec.name}-{value}-{family}" for spec, value, family in cases]
    return pytest.mark.parametrize(("spec", name, "tiny"), cases, ids=ids, indirect=["tiny"])


def at(spec: MethodSpec, layer: int) -> int:
    """`layer`, or the nearest one at which the method can act."""
    return max(spec.lowest_layer, min(layer, LAYERS - 1 if spec.highest_layer is None else spec.highest_layer))


def stage(spec: MethodSpec, layer: int, keep: str = "0.4") -> str:
    options = "".join(f";{name}={value}" for name, value in OPTIONS.get(spec.name, {}).items())
    return f"{spec.name}@{at(spec, layer)}" + ("" if spec.drops_all else f":{keep}") + options


def rows_in_turn(rows: list) -> list[str]:
    return [question for _, question in rows]


def tried(spec: MethodSpec) -> Tried:
    return Tried(spec, OPTIONS.get(spec.name, {}), VARIANTS.get(spec.name, ()), spec.name in SEEDED)


class Families(dict[str, Mixed]):
    """The mixed rows of each family, batched where a test asks for them."""

    def __init__(self, all_tiny: dict[str, Tiny]):
        super().__init__()
        self.all_tiny = all_tiny

    def __missing__(self, family: str) -> Mixed:
        return self.setdefault(family, Mixed(self.all_tiny[family]))


@pytest.fixture(scope="module")
def all_mixed(all_tiny: dict[str, Tiny]) -> Families:
    return Families(all_tiny)


@pytest.fixture
def mixed(tiny: Tiny, all_mixed: Families) -> Mixed:
    return all_mixed[tiny.family]


# -- the checks that `lmms-prune test-method` runs too, each with every method of the table --------------------------------


@layers_of(SPECS)
def test_select_marks_the_budget_of_valid_tokens(mixed: Mixed, spec: MethodSpec, layer: int) -> None:
    assert len(mixed.view(layer).counts) == 5
    contract.marks_the_budget(mixed, tried(spec), layer)


@layers_of(SPECS)
def test_select_and_rewrite_leave_the_view_as_it_was(mixed: Mixed, spec: MethodSpec, layer: int) -> None:
    assert len(contract._tensors(mixed.view(layer))) >= 10
    contract.leaves_the_view(mixed, tried(spec), layer)


@shared_out("layer", SPECS, some_layers)
def test_keeps_what_was_planned(mixed: Mixed, spec: MethodSpec, layer: int) -> None:
    contract.keeps_what_was_planned(mixed, tried(spec), layer)


@by_name
def test_half_precision_is_finite(mixed: Mixed, spec: MethodSpec) -> None:
    contract.half_precision_is_finite(mixed, tried(spec))


@shared_out("deeper", SPECS, lambda spec: [0, 4])
def test_batch_does_not_matter(mixed: Mixed, spec: MethodSpec, deeper: int) -> None:
    contract.batch_does_not_matter(mixed, tried(spec), at(spec, spec.lowest_layer + deeper))


@by_keeping_name
def test_seed(mixed: Mixed, spec: MethodSpec) -> None:
    contract.seed_decides(mixed, tried(spec))


@by_name
def test_flops_of_methods_are_counted(mixed: Mixed, spec: MethodSpec) -> None:
    contract.flops_are_counted(mixed, tried(spec))


@shared_out("keep", KEEPING, lambda spec: [Decimal(1), 1000])
def test_keeping_all_is_bit_identical_to_no_pruning(mixed: Mixed, spec: MethodSpec, keep: Decimal | int) -> None:
    """DART's own quota would ask for more than there is."""
    contract.keeping_all_changes_nothing(mixed, tried(spec), keep)


@by_keeping_name
def test_a_count_is_distributed_among_images(mixed: Mixed, spec: MethodSpec) -> None:
    contract.a_count_is_distributed(mixed, tried(spec))


def test_a_small_image_among_large_ones(all_mixed: Families) -> None:
    assert not all_mixed["qwen2_5_vl"].tiny.fixed
    for spec in KEEPING:
        contract.a_small_image_among_large_ones(all_mixed["qwen2_5_vl"], tried(spec))


@by_name
def test_a_batch_without_any_image(mixed: Mixed, spec: MethodSpec) -> None:
    contract.a_batch_without_any_image(mixed, tried(spec))


@by_name
def test_reads_what_the_table_says(mixed: Mixed, spec: MethodSpec) -> None:
    contract.reads_what_it_declares(mixed, tried(spec))


PUBLISHED = {
    "dart@2:252t,random@20:38t": 192.0,
    "dart@1:60t,random@20:27t": 63.75,
    "dart@2:260t,vtw@21": 190.375,
    "dart@1:60t,vtw@26": 64.875,
    "divprune@0:284t,random@20:38t": 191.75,
    "divprune@0:98t,vtw@21": 64.3125,
    "fastv@3:152t": 191.75,
    "fitprune-70": 187.875,
    "fitprune-90": 72.84375,
    "swiftvlm-192": 192.0,
    "nuwa-64": 64.0,
    "nuwa-192": 192.0,
    "vscan-64": 64.0,
    "vscan-128": 128.0,
    "vscan-192": 192.0,
}


def test_published_averages_are_executed(tmp_path: Path) -> None:
    """A LLaVA of the published depth and image size: 32 layers, 576 tokens."""
    tiny = Tiny.load("llava", build_llava(tmp_path / "deep", layers=32, image_size=336, hidden=16, heads=2))
    inputs = tiny.batch([tiny.row(random.Random(0))], torch.float32)
    for schedule, average in PUBLISHED.items():
        trace, _ = tiny.run(inputs, schedule, dtype=torch.float32)
        assert trace.avg_visual_tokens == average
        [row] = trace.rows
        assert sum(length - row.text_tokens for length in row.computed) == average * 32


# -- the table ---------------------------------------------------------------------------------------------------------


@by_row
def test_table_names_the_class(spec: MethodSpec) -> None:
    assert METHODS[spec.name] is spec
    module = import_module(f"lmms_prune.methods.{spec.name}")
    method = getattr(module, spec.class_name)
    assert issubclass(method, Method)
    assert method.__module__ == f"lmms_prune.methods.{spec.name}"
    assert method.__name__.lower() == spec.name
    assert method.paper == spec.paper
    assert spec.paper.startswith("https://arxiv.org/abs/")
    assert spec.kind in ("importance", "diversity", "hybrid", "merging", "control", "oracle")
    assert type(spec.build({})) is method


VALUES = {bool: ("true", "false"), int: ("1", "3", "128"), float: ("0.001", "0.5", "2"), str: ("some text",)}


@by_row
def test_table_names_the_options(spec: MethodSpec) -> None:
    method = getattr(import_module(f"lmms_prune.methods.{spec.name}"), spec.class_name)
    fields = {field.name: field.default for field in dataclasses.fields(method)}
    assert {option.name: option.default for option in spec.options} == fields
    for option in spec.options:
        values = VALUES.get(type(option.default), ()) if not option.choices else option.choices
        values = (
            [value for value in values if option._within(float(value))]
            if type(option.default) in (int, float)
            else values
        )
        assert values
        for value in values:
            # The example may name the option already.
            base = re.sub(rf";{option.name}=[^;]*", "", spec.example)
            [stands] = Schedule.parse(spec.example).stages
            layers = (stands.layer, spec.lowest_layer, 1)
            layer = next(n for n in layers if not spec.refuses(n, {option.name: option.read(value)}))
            written = f"{base.replace(f'@{stands.layer}', f'@{layer}')};{option.name}={value}"
            [parsed] = Schedule.parse(written).stages
            built = spec.build(dict(parsed.options))
            assert getattr(built, option.name) == option.read(value)
        free_text = isinstance(option.default, str) and not option.choices
        with pytest.raises(OptionError, match=option.name):
            option.read("" if free_text else "nonsense")
        if option.low is not None:
            with pytest.raises(OptionError, match=f"from {option.low:g}"):
                option.read(str(option.low - 1))


def test_table_holds_all_modules() -> None:
    [folder] = lmms_prune.methods.__path__
    files = {file.stem for file in Path(folder).glob("*.py")} - {"__init__", "base", "own", "reference", "spec", "view"}
    assert files == set(METHODS)


@by_row
def test_example_and_lowest_layer(spec: MethodSpec) -> None:
    [parsed] = Schedule.parse(spec.example).stages
    assert str(parsed) == spec.example
    assert parsed.layer >= spec.lowest_layer
    keep = 0 if spec.drops_all else 5
    Schedule((Stage(spec.name, spec.lowest_layer, keep, parsed.options),))
    if spec.highest_layer is not None:
        with pytest.raises(ScheduleError, match="the layers at which it can act"):
            Schedule((Stage(spec.name, spec.highest_layer + 1, keep, parsed.options),))
    if spec.lowest_layer:
        with pytest.raises(ScheduleError, match=f"its lowest layer is {spec.lowest_layer}"):
            Schedule((Stage(spec.name, spec.lowest_layer - 1, keep, parsed.options),))
        with pytest.raises(ScheduleError, match="lowest layer"):
            Schedule.parse(spec.example.replace(f"@{parsed.layer}", f"@{spec.lowest_layer - 1}"))


# -- methods of other kinds, through the real hooks --------------------------------------------------------------------


class Merging(Method):
    """Keeps the first tokens of an image, to each of which it adds the mean of the dropped ones."""

    paper = "https://arxiv.org"

    def select(self, view: TokenView, budget: Tensor) -> Tensor:
        return view.valid & (view.index < budget[:, None])

    def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        dropped = (view.valid & ~keep)[..., None]
        mean = (view.hidden * dropped).sum(1, keepdim=True) / dropped.sum(1, keepdim=True).clamp(min=1)
        return torch.where(keep[..., None], view.hidden + mean, view.hidden), view.index


class Doubling(Merging):
    """Multiplies all tokens by two, dropped ones or not."""

    def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        return view.hidden * 2, view.index


def entering(tiny: Tiny, inputs: dict[str, Tensor], schedule: str, layer: int) -> Tensor:
    """What really enters a layer of the pruned model: a hook that comes after the pruning one."""
    seen: list[Tensor] = []
    model = tiny.model()
    with torch.no_grad(), prune(model, schedule):
        module = model.model.language_model.layers[layer]
        handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            model(**inputs)
        finally:
            handle.remove()
    return seen[0]


@pytest.mark.parametrize("layer", [0, 1, 5])
def test_rewritten_tokens_enter_the_next_layers(tiny: Tiny, register: Callable[..., None], layer: int) -> None:
    """Kept tokens have the rewritten states; text, other images and other rows are unchanged."""
    register(Merging, reads=("hidden",), rewrites=True)
    seen = observe(tiny, tiny.batch(mixed_rows(tiny)))
    hidden = entering(tiny, seen.inputs, f"merging@{layer}:0.5", layer)
    for b, states in enumerate(seen.hidden[layer]):
        expected, gone = states.clone(), set(range(int((seen.inputs["attention_mask"][b] == 0).sum())))
        for span in seen.spans:
            if span.row == b:
                columns = [span.pad + column for column in span.visual]
                half = round(0.5 * len(columns))
                expected[columns[:half]] += states[columns[half:]].mean(0)
                gone.update(columns[half:])
        stays = [column for column in range(len(states)) if column not in gone]
        torch.testing.assert_close(hidden[b, -len(stays) :], expected[stays], atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, 3])
def test_rewriting_does_not_leak_into_earlier_layers(tiny: Tiny, register: Callable[..., None], layer: int) -> None:
    """The tokens before the stage are the caller's tensors: written to, they would spoil other layers' inputs."""
    register(Doubling, reads=("hidden",), rewrites=True)
    inputs = tiny.batch(mixed_rows(tiny))
    seen: list[Tensor] = []
    module = tiny.model().model.language_model.layers[layer]
    # This hook comes before the pruning one and holds the very tensor that the stage is given.
    handle = module.register_forward_pre_hook(lambda module, args: seen.extend((args[0], args[0].clone())))
    try:
        tiny.run(inputs, f"doubling@{layer}:0.5")
    finally:
        handle.remove()
    assert torch.equal(seen[0], seen[1])


def test_an_image_that_keeps_all_is_not_rewritten(all_tiny: dict[str, Tiny], register: Callable[..., None]) -> None:
    """Alone it is unchanged, and so it must be in a batch with a pruned image."""
    register(Doubling, reads=("hidden",), rewrites=True)
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(2)
    small, large = ([tiny.image(rng, (2, 2))], "is it red"), ([tiny.image(rng, (6, 6))], "is it blue")
    alone = entering(tiny, tiny.batch([small]), "doubling@2:20t", 2)[0]
    beside = entering(tiny, tiny.batch([small, large]), "doubling@2:20t", 2)[0]
    torch.testing.assert_close(beside[-len(alone) :], alone, atol=1e-5, rtol=0)


class Reversing(Merging):
    """Keeps the first tokens in reverse order."""

    def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
        turned = torch.where(keep, keep.sum(1, keepdim=True) - 1 - view.index, view.index)
        return view.hidden.gather(1, turned[..., None].expand_as(view.hidden)), turned


@pytest.mark.parametrize("layer", [0, 3])
def test_reordered_tokens_keep_their_positions(tiny: Tiny, register: Callable[..., None], layer: int) -> None:
    """States, rotary tables and the trace's indices are in the new order, which the next stage reads."""
    register(Reversing, reads=("hidden",), rewrites=True)
    register(KeepHalf)
    row = tiny.row(random.Random(5), images=1)
    seen = observe(tiny, tiny.batch([row]))
    [span] = seen.spans
    tables: list[Tensor] = []
    states: list[Tensor] = []
    model = tiny.model()

    def look(module: object, args: tuple, kwargs: dict) -> None:
        states.append(args[0][0])
        tables.append(kwargs["position_embeddings"][1].expand(1, -1, -1)[0])

    with torch.no_grad():
        handles = [model.model.language_model.layers[layer].register_forward_pre_hook(look, with_kwargs=True)]
        model(**seen.inputs)
        handles.pop().remove()
        with prune(model, f"reversing@{layer}:0.5,keephalf@{layer + 2}:0.25") as trace:
            handles.append(model.model.language_model.layers[layer].register_forward_pre_hook(look, with_kwargs=True))
            model(**seen.inputs)
            handles.pop().remove()
    half = round(0.5 * len(span.visual))
    first = span.visual[0]
    order = [*range(first), *reversed(span.visual[:half]), *range(first + len(span.visual), span.length)]
    torch.testing.assert_close(tables[1], tables[0][order])
    torch.testing.assert_close(states[1], seen.hidden[layer][0][order])
    assert trace.rows[0].indices(0) == [list(range(half))]
    quarter = round(0.25 * len(span.visual))
    assert trace.rows[0].indices(1) == [list(range(half - quarter, half))], "the first that stand there now"


class KeepHalf(ScoreMethod):
    """Keeps the first tokens."""

    paper = "https://arxiv.org"

    def score(self, view: TokenView) -> Tensor:
        return -torch.arange(view.valid.shape[1]).double().expand(view.valid.shape)


class Positional(ScoreMethod):
    """Scores that repeat: 0, 1, 2, 0, 1, 2, … over the raster; the padding's are the highest."""

    paper = "https://arxiv.org"

    def score(self, view: TokenView) -> Tensor:
        return torch.where(view.valid, (view.index % 3).double(), 9.0)


def test_score_method(tiny: Tiny, register: Callable[..., None]) -> None:
    """The highest scores stay, ties go to the lower raster index, padding never counts."""
    register(Positional)
    trace, _ = tiny.run(tiny.batch(mixed_rows(tiny)), "positional@1:0.5")
    for row in trace.rows:
        for size, tokens in zip(row.images, map(set, row.indices(0)), strict=True):
            best = sorted(range(size), key=lambda raster: (-(raster % 3), raster))
            assert tokens == set(best[: round(0.5 * size)])


def test_memory_lives_for_one_prefill(tiny: Tiny, register: Callable[..., None]) -> None:
    """A method can hand on state from stage to stage, but not to the next prompt."""
    found: list[list[int]] = []

    class Recalling(Merging):
        def select(self, view: TokenView, budget: Tensor) -> Tensor:
            found.append([*(view.remembered(list) or [])])
            view.remember([*found[-1], view.layer])
            return super().select(view, budget)

        def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
            return view.hidden

    register(Recalling)
    inputs = tiny.batch(mixed_rows(tiny))
    for _ in range(2):
        tiny.run(inputs, "recalling@1:0.6,recalling@3:0.4")
    assert found == [[], [1], [], [1]]


def test_a_carry_lives_for_one_stage(tiny: Tiny, register: Callable[..., None]) -> None:
    """`rewrite` reads what `select` of the same stage has left, of the class that it names, and nothing else."""
    carried: list[object] = []

    class Carrying(Merging):
        def select(self, view: TokenView, budget: Tensor) -> Tensor:
            carried.append(view.carry)
            view.carry = f"of layer {view.layer}"
            return super().select(view, budget)

        def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
            carried.append(view.carried(str))
            return view.carried(int if view.layer == 3 else str) and (view.hidden, view.index)

    register(Carrying, reads=("hidden",), rewrites=True)
    with pytest.raises(PruningError, match=r"`rewrite` reads a int, but `select` left 'of layer 3' in `view\.carry`"):
        tiny.run(tiny.batch(mixed_rows(tiny)), "carrying@1:0.6,carrying@3:0.4")
    assert carried == [None, "of layer 1", None, "of layer 3"]


def run_wrong(tiny: Tiny, register: Callable[..., None], spoil: Callable[[TokenView, Tensor], Tensor]) -> None:
    class Wrong(Merging):
        def select(self, view: TokenView, budget: Tensor) -> Tensor:
            return spoil(view, super().select(view, budget))

        def rewrite(self, view: TokenView, keep: Tensor) -> tuple[Tensor, Tensor]:
            return view.hidden, view.index

    register(Wrong)
    with pytest.raises(PruningError, match="a method kept another number of tokens"):
        tiny.run(tiny.batch(mixed_rows(tiny)), "wrong@1:0.5")


def test_a_wrong_number_is_caught(tiny: Tiny, register: Callable[..., None]) -> None:
    run_wrong(
        tiny,
        register,
        lambda view, mask: mask | (view.valid & (view.index == view.index.new_tensor(view.counts)[:, None] - 1)),
    )
    run_wrong(tiny, register, lambda view, mask: mask & (view.index != 0))


def test_keeping_a_token_that_is_not_present_is_caught(
    all_tiny: dict[str, Tiny], register: Callable[..., None]
) -> None:
    """The right number, but with one padding entry of the smallest image."""

    def spoil(view: TokenView, mask: Tensor) -> Tensor:
        short = view.counts.index(min(view.counts))
        mask[short, 0], mask[short, -1] = False, True
        return mask

    run_wrong(all_tiny["qwen2_5_vl"], register, spoil)
