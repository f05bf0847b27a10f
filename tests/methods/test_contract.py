"""What every method owes: a mask of the planned size over tokens that are there, whatever else is in the batch."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from observed import FAMILIES, LAYERS, Tiny, kept, load_tiny, observe
from torch import Tensor

import lmms_prune.methods
from lmms_prune import Schedule, ScheduleError, Stage, prune
from lmms_prune.demo.checkpoints import build_llava
from lmms_prune.errors import OptionError, PruningError, UnsupportedModelError
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.base import Method, ScoreMethod
from lmms_prune.methods.shared.memory import Memory
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


def planned(spec: MethodSpec, requested: int, size: int) -> int:
    """Tokens that the row in METHODS says are kept of `size`."""
    if spec.drops_all:
        return 0
    return size if requested >= size else min(size, spec.count(requested, size, OPTIONS.get(spec.name, {})))


def rows_in_turn(rows: list) -> list[str]:
    return [question for _, question in rows]


def mixed_rows(tiny: Tiny, seed: int = 0) -> list:
    """Rows of different lengths: one image, two, none, and one with a long question."""
    rng = random.Random(seed)
    return [tiny.row(rng, images=n, words=words) for n, words in ((1, 3), (2, 8), (0, 5), (1, 25), (1, 1))]


def numbered(tiny: Tiny, rows: list) -> dict[str, Tensor]:
    """A batch with the position ids that `generate` gives LLaVA.

    Without them its padding counts as positions, and DART's key norms, taken after the rotation, depend on these.
    """
    inputs = tiny.batch(rows)
    if tiny.family == "llava":
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


@dataclasses.dataclass
class Mixed:
    """The mixed rows of a family, batched once: all rows, with the positions of `generate`, permuted, alone, and with a longer row."""

    rows: list
    questions: list[str]
    inputs: dict[str, Tensor]
    numbered: dict[str, Tensor]
    permuted: dict[str, Tensor]
    alone: list[dict[str, Tensor]]
    longer: tuple[str, dict[str, Tensor]]
    single: dict[str, Tensor]
    plain: Tensor
    views: dict[int, TokenView]


ORDER = [3, 1, 4, 0, 2]


@pytest.fixture(scope="module")
def all_mixed(all_tiny: dict[str, Tiny]) -> dict[str, Mixed]:
    all_rows = {}
    for family, tiny in all_tiny.items():
        rows, longer = mixed_rows(tiny), tiny.row(random.Random(9), words=60)
        single = tiny.batch(rows, torch.float32)
        with torch.no_grad():
            plain = tiny.model(torch.float32)(**single).logits
        all_rows[family] = Mixed(
            rows=rows,
            questions=rows_in_turn(rows),
            inputs=tiny.batch(rows),
            numbered=numbered(tiny, rows),
            permuted=numbered(tiny, [rows[i] for i in ORDER]),
            alone=[numbered(tiny, [row]) for row in rows],
            longer=(longer[1], numbered(tiny, [*rows, longer])),
            single=single,
            plain=plain,
            views={},
        )
    return all_rows


@pytest.fixture
def mixed(tiny: Tiny, all_mixed: dict[str, Mixed]) -> Mixed:
    return all_mixed[tiny.family]


@pytest.fixture
def view_at(tiny: Tiny, mixed: Mixed, capture_view: Callable[..., TokenView]) -> Callable[[int], TokenView]:
    """The view of the mixed rows at a layer: captured once, and new for each test but for the tensors in it."""

    def at(layer: int) -> TokenView:
        if layer not in mixed.views:
            mixed.views[layer] = capture_view(tiny, mixed.inputs, layer)
        return dataclasses.replace(mixed.views[layer], memory=Memory())

    return at


def tensors(value: object, name: str = "view") -> dict[str, Tensor]:
    """All tensors of a view, by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in tensors(part, f"{name}[{i}]").items()}
    if dataclasses.is_dataclass(value) and type(value).__name__ in ("TokenView", "Tokens", "LayerInput"):
        parts = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return {k: v for field, part in parts for k, v in tensors(part, f"{name}.{field}").items()}
    return {}


# -- select, by itself -------------------------------------------------------------------------------------------------


@layers_of(SPECS)
def test_select_marks_the_budget_of_valid_tokens(
    view_at: Callable[[int], TokenView], spec: MethodSpec, layer: int
) -> None:
    view = view_at(layer)
    assert len(view.counts) == 5
    rng, method = random.Random(layer), spec.build(OPTIONS.get(spec.name, {}))
    requested = [[0] * 5]
    if not spec.drops_all:
        requested += [list(view.counts), [1] * 5, *([rng.randint(0, count) for count in view.counts] for _ in range(5))]
    for numbers in requested:
        budget = [planned(spec, n, size) for n, size in zip(numbers, view.counts, strict=True)]
        mask = method.select(view, torch.tensor(budget))
        assert mask.dtype == torch.bool
        assert mask.shape == view.valid.shape
        assert not (mask & ~view.valid).any()
        marked = mask.sum(1).tolist()
        # All that are present is also what a method with a count rule of its own is given where the stage has no keep.
        own = [spec.keep == "optional" and most == count for most, count in zip(budget, view.counts, strict=True)]
        loose = [spec.at_most or decides for decides in own]
        pairs = zip(marked, budget, loose, strict=True)
        assert all(n <= most if fewer else n == most for n, most, fewer in pairs)


@layers_of(SPECS)
def test_select_and_rewrite_leave_the_view_as_it_was(
    view_at: Callable[[int], TokenView], spec: MethodSpec, layer: int
) -> None:
    view = view_at(layer)
    hidden = view.hidden.clone()
    before = {name: tensor.clone() for name, tensor in tensors(view).items()}
    assert len(before) >= 10
    counts, seeds = list(view.counts), list(view.seeds)
    method = spec.build(OPTIONS.get(spec.name, {}))
    budget = torch.tensor([planned(spec, count // 2, count) for count in counts])
    requested = budget.clone()
    mask = method.select(view, budget)
    assert torch.equal(budget, requested)
    rewritten, index = method.rewrite(view, mask)
    if not spec.rewrites:
        assert rewritten is view.hidden
        assert index is view.index
    after = tensors(view)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(view.hidden, hidden)
    assert (list(view.counts), list(view.seeds)) == (counts, seeds)
    assert torch.equal(method.select(view, budget), mask), "the same view gives the same answer"


# -- complete runs through prune ----------------------------------------------------------------------------------------


@shared_out("layer", SPECS, some_layers)
def test_keeps_what_was_planned(tiny: Tiny, mixed: Mixed, spec: MethodSpec, layer: int) -> None:
    schedule = Schedule.parse(stage(spec, layer))
    trace, logits = tiny.run(mixed.inputs, schedule, questions=mixed.questions)
    assert torch.isfinite(logits).all()
    assert [len(row.images) for row in trace.rows] == [1, 2, 0, 1, 1]
    for row in trace.rows:
        [kept_now], [most] = row.kept, schedule.plan(row.images)
        assert all(n <= m for n, m in zip(kept_now, most, strict=True)) if spec.at_most else kept_now == most
        assert [len(image) for image in row.indices(0)] == kept_now
        assert row.visual == [sum(row.images)] * layer + [sum(kept_now)] * (LAYERS - layer)
        for image, size in zip(row.indices(0), row.images, strict=True):
            assert len(image) == len(set(image))
            assert all(0 <= token < size for token in image)
            # The ratio holds for each image by itself, whatever the others' sizes are.
            assert spec.at_most or len(image) == planned(spec, round(0.4 * size), size)


@by_name
def test_half_precision_is_finite(tiny: Tiny, spec: MethodSpec) -> None:
    """In the types of real checkpoints the counts are kept and nothing overflows or becomes not-a-number."""
    rows = mixed_rows(tiny, seed=3)
    inputs = tiny.batch(rows, torch.bfloat16)
    schedule = Schedule.parse(stage(spec, 3))
    trace, logits = tiny.run(inputs, schedule, dtype=torch.bfloat16, questions=rows_in_turn(rows))
    assert torch.isfinite(logits).all()
    for row in trace.rows:
        [kept_now], [most] = row.kept, schedule.plan(row.images)
        assert all(n <= m for n, m in zip(kept_now, most, strict=True)) if spec.at_most else kept_now == most


@shared_out("deeper", SPECS, lambda spec: [0, 4])
def test_batch_does_not_matter(tiny: Tiny, mixed: Mixed, spec: MethodSpec, deeper: int) -> None:
    """Permuted rows, each row alone, and more padding: the same tokens of each image and the same logits."""
    names, questions, text = list("abcde"), mixed.questions, stage(spec, spec.lowest_layer + deeper)
    trace, logits = tiny.run(mixed.numbered, text, samples=names, questions=questions)
    tokens = [row.indices(0) for row in trace.rows]
    assert [row.sample for row in trace.rows] == names

    turned = {"samples": [names[i] for i in ORDER], "questions": [questions[i] for i in ORDER]}
    permuted, moved = tiny.run(mixed.permuted, text, **turned)
    assert [row.indices(0) for row in permuted.rows] == [tokens[i] for i in ORDER]
    torch.testing.assert_close(moved, logits[ORDER], atol=1e-5, rtol=0)

    for i in (0, 1, 2):
        alone, single = tiny.run(mixed.alone[i], text, samples=[names[i]], questions=[questions[i]])
        assert [row.indices(0) for row in alone.rows] == [tokens[i]]
        torch.testing.assert_close(single[0], logits[i], atol=1e-5, rtol=0)

    question, longer = mixed.longer
    padded, wide = tiny.run(longer, text, samples=[*names, "f"], questions=[*questions, question])
    assert [row.indices(0) for row in padded.rows[:5]] == tokens
    torch.testing.assert_close(wide[:5], logits, atol=1e-5, rtol=0)


@by_keeping_name
def test_seed(tiny: Tiny, mixed: Mixed, spec: MethodSpec) -> None:
    text = stage(spec, 3)
    first, again, other = (
        kept(tiny.run(mixed.inputs, text, seed=seed, questions=mixed.questions)[0]) for seed in (0, 0, 1)
    )
    assert first == again
    if spec.name in SEEDED:
        assert all(a != b for a, b in zip(first, other, strict=True))
    else:
        assert first == other


@by_name
def test_flops_of_methods_are_counted(tiny: Tiny, mixed: Mixed, spec: MethodSpec) -> None:
    """Every operation of every method has a rule, or is known to multiply nothing."""
    with torch.inference_mode():
        trace, _ = tiny.run(mixed.inputs, stage(spec, 3), questions=mixed.questions, count_selection=True)
    assert sum(row.selection_flops for row in trace.rows) >= 0
    assert spec.kind != "diversity" or trace.rows[0].selection_flops > 0


@shared_out("keep", KEEPING, lambda spec: ["1", "1000t"])
def test_keeping_all_is_bit_identical_to_no_pruning(tiny: Tiny, mixed: Mixed, spec: MethodSpec, keep: str) -> None:
    """DART's own quota would ask for more than there is."""
    with torch.no_grad():
        for layer in (spec.lowest_layer, 4):
            with prune(tiny.model(torch.float32), stage(spec, layer, keep)) as trace:
                assert torch.equal(tiny.model(torch.float32)(**mixed.single).logits, mixed.plain)
            assert [row.visual for row in trace.rows] == [[sum(row.images)] * LAYERS for row in trace.rows]


@by_keeping_name
def test_a_count_is_distributed_among_images(all_tiny: dict[str, Tiny], spec: MethodSpec) -> None:
    rng, llava, qwen = random.Random(1), all_tiny["llava"], all_tiny["qwen2_5_vl"]

    def counts(tiny: Tiny, images: list, count: int) -> list[int]:
        trace, _ = tiny.run(tiny.batch([(images, "is it red")]), stage(spec, 2, f"{count}t"), questions=["is it red"])
        return [len(image) for image in trace.rows[0].indices(0)]

    def check(tiny: Tiny, images: list, count: int, rule: list[tuple[int, int]]) -> None:
        wanted = [planned(spec, requested, size) for requested, size in rule]
        got = counts(tiny, images, count)
        assert all(n <= m for n, m in zip(got, wanted, strict=True)) if spec.at_most else got == wanted

    check(llava, [llava.image(rng), llava.image(rng)], 40, [(20, 64), (20, 64)])
    # The odd token goes to the first of two equal images.
    check(llava, [llava.image(rng), llava.image(rng)], 41, [(21, 64), (20, 64)])
    # Of 40 tokens, images of 6 x 8 and 4 x 4 tokens have 48 and 16 of the 64: 30 and 10.
    check(qwen, [qwen.image(rng, (6, 8)), qwen.image(rng, (4, 4))], 40, [(30, 48), (10, 16)])
    # 41 would be 30.75 and 10.25: the larger remainder gets the odd token.
    check(qwen, [qwen.image(rng, (6, 8)), qwen.image(rng, (4, 4))], 41, [(31, 48), (10, 16)])


def test_a_small_image_among_large_ones(all_tiny: dict[str, Tiny]) -> None:
    """An image that keeps all of its tokens is in a batch with one that does not."""
    tiny, rng = all_tiny["qwen2_5_vl"], random.Random(2)
    rows = [([tiny.image(rng, (2, 2))], "is it red"), ([tiny.image(rng, (6, 6))], "is it blue")]
    for spec in KEEPING:
        trace, _ = tiny.run(tiny.batch(rows), stage(spec, 2, "20t"), questions=rows_in_turn(rows))
        small, large = (len(tokens) for tokens in kept(trace))
        assert small == 4
        assert spec.at_most or large == planned(spec, 20, 36)


@by_name
def test_a_batch_without_any_image(tiny: Tiny, spec: MethodSpec) -> None:
    rng = random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=0) for _ in range(2)])
    trace, logits = tiny.run(inputs, stage(spec, 3))
    with torch.no_grad():
        plain = tiny.model()(**inputs, logits_to_keep=1).logits[:, -1]
    assert torch.equal(logits, plain)
    assert [row.images for row in trace.rows] == [[], []]


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
    tiny = load_tiny("llava", build_llava(tmp_path / "deep", layers=32, image_size=336, hidden=16, heads=2))
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
    files = {file.stem for file in Path(folder).glob("*.py")} - {"__init__", "base", "spec", "view"}
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


READS = {
    "attention": {"attention"},
    "attention ahead": {"attention ahead", "attention_to"},
    "keys": {"keys"},
    "values": {"values"},
    "positions": {"rotary_means"},
    "hidden": {"hidden", "normed"},
    "embeddings": {"visual_embeddings", "text_embeddings"},
    "encoder": {"encoder"},
    "grid": {"grids"},
    "question": {"question"},
    "guide": {"guided"},
}


@by_name
def test_reads_what_the_table_says(
    tiny: Tiny,
    mixed: Mixed,
    view_at: Callable[[int], TokenView],
    capture_view: Callable[..., TokenView],
    monkeypatch: pytest.MonkeyPatch,
    spec: MethodSpec,
) -> None:
    """At some layer or stage it reads all that its row says; its lowest layer follows from what it reads there.

    A method may read the encoder at layer 0 and attention at a deeper stage, or another thing at its second stage.
    """
    layers = some_layers(spec)
    views = [view_at(layer) for layer in layers]
    if len(layers) > 1 and not spec.drops_all:
        views.append(capture_view(tiny, mixed.inputs, layers[-1], f"{stage(spec, 0)},", questions=mixed.questions))
    read: set[str] = set()
    for name in ("attention", "attention_to", "keys", "values", "rotary_means", "normed", "question", "guided"):
        real = getattr(TokenView, name)

        def call(self: TokenView, *args: object, _name: str = name, _real: Callable = real, **named: object) -> object:
            read.add("attention ahead" if named.get("ahead") else _name)
            return _real(self, *args, **named)

        monkeypatch.setattr(TokenView, name, call)
    for name in ("hidden", "visual_embeddings", "text_embeddings", "encoder", "grids"):
        real = getattr(TokenView, name)
        real = real.func if hasattr(real, "func") else real.fget

        def get(self: TokenView, _name: str = name, _real: Callable = real) -> object:
            read.add(_name)
            return _real(self)

        monkeypatch.setattr(TokenView, name, property(get))
    method = spec.build(OPTIONS.get(spec.name, {}))
    for number, view in enumerate(views):
        if spec.keep == "optional":
            method.select(view, torch.tensor(list(view.counts)))
        mask = method.select(view, torch.tensor([planned(spec, 4, size) for size in view.counts]))
        if spec.rewrites:
            method.rewrite(view, mask)
        if number == 0:
            assert (spec.lowest_layer >= 1) == bool({"attention", "keys", "values"} & read)
    for options in VARIANTS.get(spec.name, ()):
        for view in views:
            with contextlib.suppress(UnsupportedModelError):
                variant = spec.build(options)
                mask = variant.select(view, torch.tensor([planned(spec, 4, size) for size in view.counts]))
                variant.rewrite(view, mask)
    # The encoder asks for the grids by itself, and pixels are read through it; a guide has a view of its own.
    implied = {"grid", "pixels"} if "encoder" in read else set()
    implied |= {"encoder", "attention ahead", "pixels"} if "guided" in read else set()
    found = {kind for kind, names in READS.items() if names & read}
    assert found - implied == set(spec.reads) - implied


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
