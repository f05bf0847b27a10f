"""The general contract of a method: a mask of the planned size over tokens that are there, whatever else is in the batch.

Each check tries one method, built-in or one's own, on one tiny model, and says by a `ContractError` what came and what was
allowed. The package's own tests and ``lmms-prune test-method`` run the same checks.
"""

from __future__ import annotations

import dataclasses
import random
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from decimal import Decimal
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from lmms_prune.certificate.tiny import LAYERS, ORDER, Mixed, Tiny, mixed_rows, questions_of
from lmms_prune.demo.checkpoints import BUILDERS
from lmms_prune.errors import PruningError, ScheduleError, UnsupportedModelError
from lmms_prune.methods.base import Method
from lmms_prune.methods.own import load
from lmms_prune.methods.spec import MethodSpec, print_option
from lmms_prune.methods.view import TokenView
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.returned import checked_mask, checked_rewrite
from lmms_prune.pruning.trace import RowTrace, Trace
from lmms_prune.schedule import Schedule, Stage
from lmms_prune.schedule.stage import Keep

_KEEP = Decimal("0.4")
# Two families that differ in all that a family decides: with and without M-RoPE, a class token, images of one size.
KINDS_OF_MODELS = tuple(BUILDERS)[:2]
_PACKAGE = Path(__file__).parents[1]


class ContractError(Exception):
    """A method breaks its contract; the message says what came and what is allowed."""


def require(holds: bool, message: str) -> None:
    """Raise `ContractError` with `message` unless `holds`."""
    if not holds:
        raise ContractError(message)


@dataclass(frozen=True)
class Tried:
    """A method on trial.

    Args:
        spec: its row; that of a method of one's own with its class.
        options: options without which it cannot be tried.
        variants: options under which it reads more than it does by default; where they cannot be had, it says so.
        draws: whether the seed decides what it keeps; None: not known.
    """

    spec: MethodSpec
    options: Mapping[str, object] = field(default_factory=dict)
    variants: Sequence[Mapping[str, object]] = ()
    draws: bool | None = None

    @property
    def layers(self) -> list[int]:
        """Its lowest layer, one in the middle and the last, as far as it can act there."""
        return sorted({self.at(layer) for layer in (0, 3, LAYERS - 1)})

    def at(self, layer: int) -> int:
        """`layer`, or the nearest one at which the method can act."""
        highest = LAYERS - 1 if self.spec.highest_layer is None else self.spec.highest_layer
        return max(self.spec.lowest_layer, min(layer, highest))

    def schedule(self, layer: int, keep: Keep = _KEEP) -> Schedule:
        """The method as the only stage, at `layer` or the nearest possible one."""
        own = self.spec if self.spec.own else None
        options = tuple((name, print_option(v) if own else v) for name, v in self.options.items())
        return Schedule((Stage(self.spec.name, self.at(layer), 0 if self.spec.drops_all else keep, options, row=own),))

    def build(self, options: Mapping[str, object] | None = None) -> Method:
        """The method object."""
        return self.spec.build(self.options if options is None else options)

    def select(self, method: Method, view: TokenView, budget: Sequence[int]) -> Tensor:
        """The mask over a view; a method of one's own may read only what it declares."""
        with view.read_by(self.spec.reads if self.spec.own else None):
            return checked_mask(method.select(view, torch.tensor(list(budget))), view)

    def rewrite(self, method: Method, view: TokenView, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `rewrite` makes of a view, if the method has one."""
        if not self.spec.rewrites:
            return method.rewrite(view, mask)
        with view.read_by(self.spec.reads if self.spec.own else None):
            return checked_rewrite(method.rewrite(view, mask), view)

    def planned(self, requested: int, size: int) -> int:
        """Tokens that the row says are kept of `size`."""
        if self.spec.drops_all:
            return 0
        return size if requested >= size else min(size, self.spec.count(requested, size, self.options))

    def fits(self, kept: Sequence[int], planned: Sequence[int]) -> bool:
        """Whether the kept tokens of each image are as planned."""
        if self.spec.at_most:
            return all(n <= most for n, most in zip(kept, planned, strict=True))
        return list(kept) == list(planned)


# -- select, by itself -----------------------------------------------------------------------------------------------------


def marks_the_budget(mixed: Mixed, tried: Tried, layer: int) -> None:
    """`select` marks as many valid tokens of each image as its budget says."""
    view = mixed.view(layer)
    rng, method = random.Random(layer), tried.build()
    requested = [[0] * len(view.counts)]
    if not tried.spec.drops_all:
        drawn = [[rng.randint(0, count) for count in view.counts] for _ in range(5)]
        requested += [list(view.counts), [1] * len(view.counts), *drawn]
    for numbers in requested:
        budget = [tried.planned(n, size) for n, size in zip(numbers, view.counts, strict=True)]
        mask = tried.select(method, view, budget)
        require(not bool((mask & ~view.valid).any()), f"layer {layer}: `select` marked padding; allowed: `view.valid`.")
        # All that are present is also what a method with a count rule of its own is given where the stage has no keep.
        adaptive = tried.spec.keep == "optional"
        for n, most, count in zip(mask.sum(1).tolist(), budget, view.counts, strict=True):
            fewer = tried.spec.at_most or (adaptive and most == count)
            require(
                n <= most if fewer else n == most,
                f"layer {layer}: `select` marked {n} of an image's {count} tokens; its budget allows "
                f"{'at most' if fewer else 'exactly'} {most}.",
            )


def leaves_the_view(mixed: Mixed, tried: Tried, layer: int) -> None:
    """`select` and `rewrite` change nothing that they are given, and the same view gives the same answer."""
    view = mixed.view(layer)
    before = {name: tensor.clone() for name, tensor in _tensors(view).items()}
    hidden, counts, seeds = view.hidden.clone(), list(view.counts), list(view.seeds)
    method = tried.build()
    budget = torch.tensor([tried.planned(count // 2, count) for count in counts])
    requested = budget.clone()
    with view.read_by(tried.spec.reads if tried.spec.own else None):
        mask = checked_mask(method.select(view, budget), view)
    require(
        torch.equal(budget, requested), f"layer {layer}: `select` changed the budgets that it was given; copy them."
    )
    rewritten, index = tried.rewrite(method, view, mask)
    if not tried.spec.rewrites:
        require(rewritten is view.hidden and index is view.index, "`rewrite` changes tokens, but the row denies it.")
    changed = [name for name, tensor in _tensors(view).items() if not torch.equal(before[name], tensor)]
    changed += [] if torch.equal(view.hidden, hidden) else ["view.hidden"]
    require(not changed, f"layer {layer}: the method changed {', '.join(changed)} in place; work on a copy.")
    require((list(view.counts), list(view.seeds)) == (counts, seeds), "the method changed the view's counts or seeds.")
    again = tried.select(method, view, requested.tolist())
    require(torch.equal(again, mask), f"layer {layer}: the same view gave another mask the second time; keep no state.")


def _tensors(value: object, name: str = "view") -> dict[str, Tensor]:
    """All tensors of a view, by their path."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in _tensors(part, f"{name}[{i}]").items()}
    if dataclasses.is_dataclass(value) and type(value).__name__ in ("TokenView", "Tokens", "LayerInput"):
        parts = [(item.name, getattr(value, item.name)) for item in dataclasses.fields(value)]
        return {k: v for item, part in parts for k, v in _tensors(part, f"{name}.{item}").items()}
    return {}


def reads_what_it_declares(mixed: Mixed, tried: Tried) -> None:
    """At some layer or stage it reads all that its row says, and nothing else.

    A method may read the encoder at layer 0 and attention at a deeper stage, or another thing at its second stage.
    """
    layers = tried.layers
    views = [mixed.view(layer) for layer in layers]
    if len(layers) > 1 and not tried.spec.drops_all:
        views.append(mixed.captured(layers[-1], tried.schedule(0).stages))
    method = tried.build()
    for view in views:
        if tried.spec.keep == "optional":
            tried.select(method, view, view.counts)
        _read(tried, method, view)
    first = set(views[0].read_words)
    for options in tried.variants:
        for view in views:
            with suppress(UnsupportedModelError):
                _read(tried, tried.build(options), view)
    read = set().union(*(view.read_words for view in views))
    # The encoder asks for the grids by itself, and pixels are read through it; a guide has a view of its own.
    implied = {"grid", "pixels"} if "encoder" in read else set()
    implied |= {"encoder", "attention ahead", "pixels"} if "guide" in read else set()
    declared, observed = set(tried.spec.reads) - implied, read - implied
    require(
        observed == declared,
        f"it reads {_words(observed)}, but declares {_words(declared)}; write reads = {tuple(sorted(observed))!r}.",
    )
    before = bool({"attention", "keys", "values"} & first)
    require((tried.spec.lowest_layer >= 1) == before or tried.spec.own, "its lowest layer contradicts what it reads.")


def _read(tried: Tried, method: Method, view: TokenView) -> None:
    """Let a method choose four tokens of each image, and rewrite them if it does that."""
    mask = tried.select(method, view, [tried.planned(4, size) for size in view.counts])
    if tried.spec.rewrites:
        tried.rewrite(method, view, mask)


def _words(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "nothing"


# -- complete runs through prune ---------------------------------------------------------------------------------------------


def keeps_what_was_planned(mixed: Mixed, tried: Tried, layer: int) -> None:
    """A run keeps as many tokens of each image as planned, each once, and removes the others from all later layers."""
    schedule = tried.schedule(layer)
    trace, logits = mixed.tiny.run(mixed.inputs, schedule, questions=mixed.questions)
    require(bool(torch.isfinite(logits).all()), f"layer {layer}: the logits of the pruned model are not finite.")
    require([len(row.images) for row in trace.rows] == [1, 2, 0, 1, 1], "the trace has other images than the batch.")
    for row in trace.rows:
        _row_as_planned(tried, schedule, row, layer)


def _row_as_planned(tried: Tried, schedule: Schedule, row: RowTrace, layer: int) -> None:
    [kept], [planned] = row.kept, schedule.plan(row.images)
    require(tried.fits(kept, planned), f"layer {layer}: {kept} tokens of the images were kept; planned were {planned}.")
    require([len(image) for image in row.indices(0)] == kept, "the trace's masks and counts differ.")
    expected = [sum(row.images)] * layer + [sum(kept)] * (LAYERS - layer)
    require(row.visual == expected, f"the layers computed {row.visual} tokens; allowed are {expected}.")
    for image, size in zip(row.indices(0), row.images, strict=True):
        require(len(image) == len(set(image)) and all(0 <= token < size for token in image), "a token is kept twice.")
        # The ratio holds for each image by itself, whatever the others' sizes are.
        most = tried.planned(round(0.4 * size), size)
        require(tried.spec.at_most or len(image) == most, f"{len(image)} tokens of {size} are kept; allowed is {most}.")


def half_precision_is_finite(mixed: Mixed, tried: Tried) -> None:
    """In the types of real checkpoints the counts are kept and nothing overflows or becomes not-a-number."""
    rows = mixed_rows(mixed.tiny, seed=3)
    inputs, schedule = mixed.tiny.batch(rows, torch.bfloat16), tried.schedule(3)
    trace, logits = mixed.tiny.run(inputs, schedule, dtype=torch.bfloat16, questions=questions_of(rows))
    require(bool(torch.isfinite(logits).all()), "in bfloat16 the logits of the pruned model are not finite.")
    for row in trace.rows:
        [kept], [planned] = row.kept, schedule.plan(row.images)
        require(tried.fits(kept, planned), f"in bfloat16 {kept} tokens were kept; planned were {planned}.")


def batch_does_not_matter(mixed: Mixed, tried: Tried, layer: int) -> None:
    """Permuted rows, each row alone, and more padding: the same tokens of each image and the same logits."""
    names, questions, schedule = list("abcde"), mixed.questions, tried.schedule(layer)
    run = partial(mixed.tiny.run, schedule=schedule)
    trace, logits = run(mixed.numbered, samples=names, questions=questions)
    tokens = [row.indices(0) for row in trace.rows]
    require([row.sample for row in trace.rows] == names, "the trace names other samples than the batch.")

    turned = [questions[i] for i in ORDER]
    permuted, moved = run(mixed.permuted, samples=[names[i] for i in ORDER], questions=turned)
    _same("in another order of the batch", permuted, [tokens[i] for i in ORDER], moved, logits[ORDER])
    for i in (0, 1, 2):
        alone, single = run(mixed.alone[i], samples=[names[i]], questions=[questions[i]])
        _same("alone in its batch", alone, [tokens[i]], single[0], logits[i])
    question, longer = mixed.longer
    padded, wide = run(longer, samples=[*names, "f"], questions=[*questions, question])
    _same("with more padding", replace(padded, rows=padded.rows[:5]), tokens, wide[:5], logits)


def _same(how: str, trace: Trace, tokens: list[list[list[int]]], logits: Tensor, expected: Tensor) -> None:
    require(
        [row.indices(0) for row in trace.rows] == tokens,
        f"{how}, an image keeps other tokens: the method must treat every image by itself, its padding aside.",
    )
    require(torch.allclose(logits, expected, atol=1e-5, rtol=0), f"{how}, the same tokens give other logits.")


def seed_decides(mixed: Mixed, tried: Tried) -> None:
    """The same seed keeps the same tokens; another one does so too, unless the method draws at random."""
    run = partial(mixed.tiny.run, mixed.inputs, tried.schedule(3), questions=mixed.questions)
    first, again, other = (_kept(run(seed=seed)[0]) for seed in (0, 0, 1))
    require(first == again, "the same seed keeps other tokens the second time; draw by `view.uniform()` only.")
    if tried.draws is not None:
        differ = [a != b for a, b in zip(first, other, strict=True)]
        require(all(differ) if tried.draws else not any(differ), "another seed does not do what it should.")


def _kept(trace: Trace) -> list[set[int]]:
    return [set(image) for row in trace.rows for image in row.indices(0)]


def flops_are_counted(mixed: Mixed, tried: Tried) -> None:
    """Every operation of the method has a rule, or is known to multiply nothing."""
    with torch.inference_mode():
        trace, _ = mixed.tiny.run(mixed.inputs, tried.schedule(3), questions=mixed.questions, count_selection=True)
    counted = [row.selection_flops or 0 for row in trace.rows]
    require(sum(counted) >= 0, "a negative number of FLOPs was counted.")
    require(tried.spec.kind != "diversity" or counted[0] > 0, "no FLOPs were counted of a method that compares tokens.")


def keeping_all_changes_nothing(mixed: Mixed, tried: Tried, keep: Keep) -> None:
    """A stage that keeps every token gives, bit for bit, the logits of the unpruned model."""
    model = mixed.tiny.model(torch.float32)
    for layer in (tried.spec.lowest_layer, 4):
        with torch.no_grad(), prune(model, tried.schedule(layer, keep)) as trace:
            logits = model(**mixed.single).logits
        require(torch.equal(logits, mixed.plain), f"layer {layer}: keeping all tokens changes the logits.")
        require(all(row.visual == [sum(row.images)] * LAYERS for row in trace.rows), "keeping all tokens dropped some.")


def a_count_is_distributed(mixed: Mixed, tried: Tried) -> None:
    """A number of tokens is shared out among a prompt's images in proportion to their tokens."""
    tiny, rng = mixed.tiny, random.Random(1)
    sizes = ((6, 8), (4, 4))
    # Images of 6 x 8 and 4 x 4 tokens have 48 and 16: of 40 they get 30 and 10; 41 would be 30.75 and 10.25, and the
    # larger remainder gets the odd token. Of two equal images the first one does.
    rules = {40: ((20, 64), (20, 64)), 41: ((21, 64), (20, 64))}
    if not tiny.fixed:
        rules = {40: ((30, 48), (10, 16)), 41: ((31, 48), (10, 16))}
    for count, rule in rules.items():
        images = [tiny.image(rng, size) for size in sizes]
        inputs = tiny.batch([(images, "is it red")])
        trace, _ = tiny.run(inputs, tried.schedule(2, count), questions=["is it red"])
        kept = [len(image) for image in trace.rows[0].indices(0)]
        wanted = [tried.planned(requested, size) for requested, size in rule]
        require(tried.fits(kept, wanted), f"of {count} tokens, two images kept {kept}; allowed are {wanted}.")


def a_small_image_among_large_ones(mixed: Mixed, tried: Tried) -> None:
    """An image that keeps all of its tokens is in a batch with one that does not."""
    tiny, rng = mixed.tiny, random.Random(2)
    if tiny.fixed:
        return
    rows = [([tiny.image(rng, (2, 2))], "is it red"), ([tiny.image(rng, (6, 6))], "is it blue")]
    trace, _ = tiny.run(tiny.batch(rows), tried.schedule(2, 20), questions=questions_of(rows))
    small, large = (len(tokens) for tokens in _kept(trace))
    most = tried.planned(20, 36)
    require(small == 4, f"an image of 4 tokens kept {small}; a stage that keeps 20 must keep them all.")
    require(tried.spec.at_most or large == most, f"an image of 36 tokens kept {large}; allowed is {most}.")


def a_batch_without_any_image(mixed: Mixed, tried: Tried) -> None:
    """Prompts without an image run as on the unpruned model."""
    tiny, rng = mixed.tiny, random.Random(3)
    inputs = tiny.batch([tiny.row(rng, images=0) for _ in range(2)])
    trace, logits = tiny.run(inputs, tried.schedule(3))
    with torch.no_grad():
        plain = tiny.model()(**inputs, logits_to_keep=1).logits[:, -1]
    require(torch.equal(logits, plain), "without an image, the pruned model gives other logits.")
    require([row.images for row in trace.rows] == [[], []], "the trace has images that the batch has not.")


# -- all of them -------------------------------------------------------------------------------------------------------------

Check = Callable[[], None]


def checks_of(mixed: Mixed, tried: Tried) -> dict[str, list[Check]]:
    """Every check of a method on one model, by what it shows, each at every layer or keep that it is tried at."""
    at_layers = (marks_the_budget, leaves_the_view, keeps_what_was_planned)
    batches = sorted({tried.at(tried.spec.lowest_layer + deeper) for deeper in (0, 4)})
    once = (
        *(reads_what_it_declares, half_precision_is_finite, seed_decides, flops_are_counted),
        *(a_count_is_distributed, a_small_image_among_large_ones, a_batch_without_any_image),
    )
    checks: dict[str, list[Check]] = {_name(c): [partial(c, mixed, tried, n) for n in tried.layers] for c in at_layers}
    checks[_name(batch_does_not_matter)] = [partial(batch_does_not_matter, mixed, tried, n) for n in batches]
    keeps: tuple[Keep, ...] = (Decimal(1), 1000)
    checks[_name(keeping_all_changes_nothing)] = [partial(keeping_all_changes_nothing, mixed, tried, k) for k in keeps]
    return checks | {_name(check): [partial(check, mixed, tried)] for check in once}


def _name(check: Callable[..., None]) -> str:
    return check.__name__.replace("_", " ")


@dataclass(frozen=True)
class ContractOutcome:
    """What came of one check on one model.

    Args:
        model: the family's title.
        what: what the check shows.
        problem: why it failed; "" if it passed.
    """

    model: str
    what: str
    problem: str = ""


def outcomes(name: str) -> Iterator[ContractOutcome]:
    """Try a method of one's own, as a schedule text names it, on a small random model of each kind of family.

    Raises:
        OwnMethodError: its file cannot be used.
    """
    tried = Tried(load(name))
    with TemporaryDirectory() as root:
        for family in KINDS_OF_MODELS:
            mixed = Mixed(Tiny.load(family, BUILDERS[family](Path(root) / family, layers=LAYERS)))
            for what, tries in checks_of(mixed, tried).items():
                yield ContractOutcome(mixed.tiny.parts.family.title, what, next(filter(None, map(_problem, tries)), ""))


def failures(name: str) -> list[str]:
    """Why a method of one's own breaks the contract, one line for each check that failed; empty if it holds."""
    return [f"{outcome.model}, {outcome.what}: {outcome.problem}" for outcome in outcomes(name) if outcome.problem]


def _problem(check: Check) -> str:
    try:
        check()
    except (ContractError, PruningError, ScheduleError) as error:
        return str(error)
    except Exception as error:
        # Anything that the author's code raises; the last line of it that is not this package's is where to look.
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not Path(f.filename).is_relative_to(_PACKAGE)]
        author_frames = [frame for frame in frames if "site-packages" not in frame.filename]
        where = f" ({author_frames[-1].filename}, line {author_frames[-1].lineno})" if author_frames else ""
        return f"it raises {type(error).__name__}: {error}{where}"
    return ""
