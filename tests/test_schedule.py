"""The schedule text: reading, printing, checking, solving, counting."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmms_prune import Schedule, ScheduleError, Stage
from lmms_prune.schedule import PromptSizes, share
from lmms_prune.schedule.presets import PRESETS


@st.composite
def texts(draw: st.DrawFn) -> str:
    """The text of any valid schedule of up to five stages."""
    layers = sorted(draw(st.lists(st.integers(1, 40), unique=True, max_size=4)))
    in_tokens = draw(st.booleans())
    amounts = sorted(draw(st.lists(st.integers(0, 1000), min_size=len(layers), max_size=len(layers))), reverse=True)
    stages = []
    for layer, amount in zip(layers, amounts, strict=True):
        method = draw(st.sampled_from(["random", "fastv", "dart", "divprune"]))
        options = draw(st.sampled_from(["", ";order=reference", ";native_count=false"])) if method == "dart" else ""
        stages.append(f"{method}@{layer}:{f'{amount}t' if in_tokens else amount / 1000}{options}")
    return ",".join([*stages, "vtw@41"] if draw(st.booleans()) else stages) or "none"


@given(texts())
def test_parse_of_print_is_the_schedule(text: str) -> None:
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule


@given(st.text(alphabet="abdefrstvw@:;,=.?0123456789 t", max_size=40))
def test_any_text_is_read_or_refused_with_a_schedule_error(text: str) -> None:
    try:
        schedule = Schedule.parse(text)
    except ScheduleError:
        return
    assert Schedule.parse(str(schedule)) == schedule


@given(texts(), st.lists(st.integers(1, 900), min_size=1, max_size=4))
def test_counts_never_grow_and_never_exceed_an_image(text: str, images: list[int]) -> None:
    schedule = Schedule.parse(text)
    present = images
    for kept in schedule.plan(images):
        assert all(0 <= now <= before for now, before in zip(kept, present, strict=True))
        present = kept
    counts = schedule.layer_counts(48, images)
    assert counts == sorted(counts, reverse=True)
    assert schedule.avg_visual_tokens(48, images) * 48 == sum(counts)


@given(st.integers(0, 500), st.lists(st.integers(0, 300), min_size=1, max_size=6))
def test_a_count_is_shared_out_in_proportion(total: int, sizes: list[int]) -> None:
    total = min(total, sum(sizes))
    shares = share(total, sizes)
    assert sum(shares) == total
    for got, size in zip(shares, sizes, strict=True):
        exact = total * size / sum(sizes) if sum(sizes) else 0
        assert got <= size
        assert abs(got - exact) < 1


def test_largest_remainders_come_first() -> None:
    assert share(10, [3, 3, 3]) == [4, 3, 3]
    assert share(5, [1, 6, 3]) == [1, 3, 1]  # exact shares 0.5, 3, 1.5: one token over, the tie goes to the first


@pytest.mark.parametrize(
    ("text", "average"),
    [
        ("dart@2:252t,random@20:38t", 192.0),
        ("dart@1:60t,random@20:27t", 63.75),
        ("dart@2:260t,vtw@21", 190.375),
        ("dart@1:60t,vtw@26", 64.875),
        ("divprune@0:284t,random@20:38t", 191.75),
        ("divprune@0:96t,random@20:10t", 63.75),
        ("divprune@0:284t,vtw@21", 186.375),
        ("divprune@0:284t,vtw@20", 177.5),
        ("divprune@0:98t,vtw@21", 64.3125),
        ("none", 576.0),
        ("vtw@11", 198.0),
        ("vtw@4", 72.0),
    ],
)
def test_released_counts_give_the_published_averages(text: str, average: float) -> None:
    """The counts of arXiv 2512.07580's release, on 32 layers and 576 tokens."""
    assert Schedule.parse(text).avg_visual_tokens(32, [576]) == average


@pytest.mark.parametrize(
    ("text", "average"),
    [
        ("divprune@0:0.33", 190.1),
        ("divprune@0:0.49,random@20:0.07", 191.5),
        ("divprune@0:0.49,vtw@21:0", 185.2),
        ("fastv@3:0.26", 189.7),
        ("fastv@3:0.41,random@20:0.06", 192.4),
        ("fastv@3:0.41,vtw@21", 186.8),
        ("fastv@3:0.02", 64.4),
        ("divprune@0:0.11", 63.4),
        ("fastv@2:0.06,random@20:0.03", 61.9),
        ("divprune@0:0.17,random@20:0.02", 65.5),
    ],
)
def test_table_5_ratios_give_its_averages(text: str, average: float) -> None:
    """Ratios resolve to integer counts, so the averages of exact ratios are met to half a token."""
    assert float(Schedule.parse(text).avg_visual_tokens(32, [576])) == pytest.approx(average, abs=0.6)


@pytest.mark.parametrize(
    ("ratio", "tokens", "kept"),
    [("0.5", 577, 288), ("0.5", 579, 290), ("0.07", 150, 10), ("0.145", 100, 14), ("1", 7, 7), ("0", 7, 0)],
)
def test_ratios_round_half_to_even_exactly(ratio: str, tokens: int, kept: int) -> None:
    """Decimal, not binary: 0.07 of 150 is exactly 10.5, which a float would round up."""
    assert Schedule.parse(f"random@1:{ratio}").plan([tokens]) == [[kept]]


@pytest.mark.parametrize(
    ("requested", "kept"),
    [(192, 196), (128, 132), (64, 68), (252, 252), (7, 4), (1, 4), (0, 0), (575, 572), (576, 576)],
)
def test_dart_keeps_its_native_count(requested: int, kept: int) -> None:
    assert Schedule.parse(f"dart@2:{requested}t").plan([576]) == [[kept]]
    assert Schedule.parse(f"dart@2:{requested}t;native_count=false").plan([576]) == [[requested]]


def test_several_images_keep_the_ratio_each_or_share_the_count() -> None:
    assert Schedule.parse("random@1:0.5").plan([100, 61]) == [[50, 30]]
    assert Schedule.parse("random@1:80t").plan([100, 60]) == [[50, 30]]
    assert Schedule.parse("random@1:900t").plan([100, 60]) == [[100, 60]]


@pytest.mark.parametrize(
    ("text", "budget", "layers", "tokens", "solved"),
    [
        ("dart@2:?,random@20:38t", "192t", 32, 576, "dart@2:252t,random@20:38t"),
        ("dart@1:60t,random@20:?", "63.75t", 32, 576, "dart@1:60t,random@20:27t"),
        ("divprune@0:?", "192t", 32, 576, "divprune@0:192t"),
        ("fastv@3:?", "192t", 32, 576, "fastv@3:152t"),
        # The ratios next to the unknown resolve to 173 and 40 tokens, rounded up and down.
        ("random@2:0.3,fastv@20:?", "198t", 32, 576, "random@2:0.3,fastv@20:172t"),
        # DART's own count may exceed the requested count, but the solved keep not above the stage before.
        ("dart@2:50t,dart@5:?", "84.75t", 32, 576, "dart@2:50t,dart@5:50t"),
        ("random@2:?,fastv@20:0.07", "73.5t", 32, 576, "random@2:40t,fastv@20:0.07"),
        ("fastv@3:?", "64t", 32, 576, "fastv@3:11t"),
        ("dart@2:?", "192t", 32, 576, "dart@2:164t"),
        ("divprune@0:?", "0.5", 28, None, "divprune@0:0.5"),
        # A ratio budget gives a ratio also where all images have one size: a row may hold several.
        ("divprune@0:?", "0.5", 32, 576, "divprune@0:0.5"),
        ("random@2:?,random@20:0.07", "0.3333", 32, 576, "random@2:0.434"),
        ("divprune@0:?,random@25:0.25", 0.5, 28, None, "divprune@0:0.53"),
    ],
)
def test_a_budget_solves_the_unknown(text: str, budget: str, layers: int, tokens: int | None, solved: str) -> None:
    solution = Schedule.parse(text).solve(budget, PromptSizes(layers, tokens))
    assert str(solution).startswith(solved)
    limit = float(str(budget).rstrip("t")) * (1 if str(budget).endswith("t") else (tokens or 10_000))
    assert solution.avg_visual_tokens(layers, [tokens or 10_000]) <= limit


@given(st.integers(3, 36), st.integers(8, 2000), st.floats(0.2, 1), st.booleans())
def test_a_solved_budget_is_the_largest_within_it(layers: int, tokens: int, ratio: float, in_tokens: bool) -> None:
    budget = f"{ratio * tokens:.2f}t" if in_tokens else f"{ratio:.4f}"
    limit = Fraction(budget[:-1]) if in_tokens else Fraction(budget) * tokens
    try:
        [stage] = Schedule.parse("random@1:?").solve(budget, PromptSizes(layers, tokens)).stages
    except ScheduleError:
        # One layer sees every token before the stage, so less than that cannot be had.
        assert Fraction(tokens, layers) > limit
        return
    assert isinstance(stage.keep, int if in_tokens else Decimal)
    assert Schedule((stage,)).avg_visual_tokens(layers, [tokens]) <= limit
    more = stage.keep + (1 if in_tokens else Decimal("0.0001"))
    if more <= (tokens if in_tokens else 1):
        assert Schedule((Stage("random", 1, more),)).avg_visual_tokens(layers, [tokens]) > limit


def test_every_preset_is_a_schedule() -> None:
    for name, text in PRESETS.items():
        assert Schedule.parse(name) == Schedule.parse(text)
        Schedule.parse(name).check(28 if name.endswith("pct") else 32, [576])
    assert str(Schedule.parse("dart+random-192")) == "dart@2:0.44,random@20:0.07"


def test_equivalent_forms_of_a_schedule() -> None:
    assert Schedule.parse("vtw@21:0") == Schedule.parse("vtw@21") == Schedule.parse(" vtw@21:0.0 ")
    assert Schedule.parse("dart@2:0.50") == Schedule.parse("dart@2:.5") == Schedule((Stage("dart", 2, Decimal("0.5")),))
    assert Schedule.parse(["dart@2:0.44", "random@20:0.07"]) == Schedule.parse("dart@2:0.44, random@20:0.07")
    assert Schedule.parse("none") == Schedule.parse("None ") == Schedule.parse(["none"]) == Schedule()
    assert str(Schedule.parse("dart@2:-0")) == "dart@2:0"
    assert Schedule.parse("dart@2:0.4;order=stable") == Schedule.parse("dart@2:0.4")
    assert str(Schedule.parse("dart@2:0.4;order=reference;native_count=false")) == (
        "dart@2:0.4;native_count=false;order=reference"
    )


@pytest.mark.parametrize(
    ("text", "message", "pointed"),
    [
        ("divprune@0:0.5,fastvv@2:0.25", "unknown method 'fastvv' in stage 2. Did you mean 'fastv'?", "fastvv"),
        ("zzz@2:0.25", "Known: ", "zzz"),
        ("fastv@0:0.5", "fastv cannot act at layer 0", "fastv@0:0.5"),
        ("dart@0:0.5", "its lowest layer is 1", "dart@0:0.5"),
        ("dart@2:1.5", "must lie in [0, 1]; a number of tokens ends in 't'", "dart@2:1.5"),
        ("dart@2:252", "must lie in [0, 1]; for a number of tokens write '252t'", "dart@2:252"),
        ("DART@2:0.5", "Did you mean 'dart'?", "DART"),
        ("dart@2:٥t", "neither a ratio", "٥t"),
        ("dart@2:0.٥", "neither a ratio", "0.٥"),
        ("dart@2:-0.5", "cannot be negative", "dart@2:-0.5"),
        ("dart@5:0.5,random@3:0.1", "layers must increase", "random@3:0.1"),
        ("dart@5:0.5,random@5:0.1", "layers must increase", "random@5:0.1"),
        ("dart@2:0.2,random@9:0.5", "keeps never grow", "random@9:0.5"),
        ("dart@2:20t,random@9:50t", "keeps never grow", "random@9:50t"),
        ("dart@2", "does not say how much dart keeps", None),
        ("dart@two:0.5", "the layer 'two' in stage 1 must be a whole number", "two"),
        ("dart@:0.5", "the layer ''", None),
        ("dart@2:abc", "neither a ratio (0.44), a count (252t) nor '?'", "abc"),
        ("dart@2:nan", "neither a ratio", "nan"),
        ("dart@2:", "neither a ratio", None),
        ("dart@2:0.5;ordr=stable", "Did you mean 'order'?", "ordr=stable"),
        ("dart@2:0.5;order=x", "allowed are stable and reference", "order=x"),
        ("dart@2:0.5;order", "has no value", "order"),
        ("random@2:0.5;a=1", "Its options: none", "a=1"),
        ("vtw@3:0.5", "vtw drops every visual token and takes no keep", "0.5"),
        ("vtw@3:?", "there is nothing to solve", "?"),
        ("dart@2:0.5,,random@9:0.1", "a stage looks like", None),
        ("dart", "A method needs a layer: e.g. 'dart@2:0.44'", "dart"),
        ("dart+randon-192", "Did you mean 'dart+random-192'?", "dart+randon-192"),
    ],
)
def test_wrong_texts_are_refused_and_pointed_at(text: str, message: str, pointed: str | None) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text)
    error_text = str(caught.value)
    assert message in error_text
    _, shown, marks = error_text.splitlines()
    if pointed is not None:
        start, end = marks.index("^"), marks.rindex("^") + 1
        assert shown[start:end] == pointed


@pytest.mark.parametrize("text", ["", "  ", [], [""], None, 3, [3]])
def test_values_that_are_no_schedule_are_refused(text: Any) -> None:
    """An empty text, such as an unset shell variable gives, must not run the unpruned model."""
    with pytest.raises(ScheduleError, match=r"write 'none' to prune nothing|neither a text nor a list"):
        Schedule.parse(text)


def test_a_former_spelling_of_an_option_is_read_and_not_written() -> None:
    """Results of earlier versions record it."""
    schedule = Schedule.parse("tome@0:0.3;place=tower")
    assert str(schedule) == "tome@0:0.3;place=encoder"
    assert schedule == Schedule.parse(str(schedule))
    with pytest.raises(ScheduleError, match=r"option place=towers: allowed are stage and encoder\."):
        Schedule.parse("tome@0:0.3;place=towers")


def test_a_repeated_option_is_refused() -> None:
    with pytest.raises(ScheduleError, match="names the option 'order' twice"):
        Schedule.parse("dart@2:0.4;order=reference;order=stable")


def test_the_error_is_shown_as_designed() -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse("divprune@0:0.5,fastvv@2:0.25")
    assert str(caught.value) == (
        "schedule: unknown method 'fastvv' in stage 2. Did you mean 'fastv'?\n"
        "    divprune@0:0.5,fastvv@2:0.25\n"
        "                   ^^^^^^"
    )


@pytest.mark.parametrize(
    ("text", "budget", "tokens", "message"),
    [
        (
            "dart@2:?",
            "20t",
            576,
            "20t cannot be met: layers 0 to 1 alone average 36t; the smallest possible is 36t, the largest 576t.",
        ),
        ("dart@1:?", "0", 576, "0 cannot be met: layer 0 alone averages 0.0312; the smallest possible is 0.0313,"),
        # A budget that is too large: what comes before is not to blame.
        (
            "divprune@0:0.5,random@20:?",
            "0.9",
            576,
            "0.9 cannot be met: the smallest possible is 0.3125, the largest 0.5.",
        ),
        ("dart@2:0.5", "192t", 576, "exactly one '?'"),
        ("dart@2:?,random@9:?", "192t", 576, "exactly one '?'"),
        ("dart@2:?", "2", 576, "for tokens write '2t'"),
        ("dart@2:?", "many", 576, "neither tokens ('192t') nor a ratio"),
        ("dart@2:?", "flops=30%", 576, "a budget of cost needs a model"),
        ("dart@2:?", "192t", None, "images differ in size"),
    ],
)
def test_wrong_budgets_are_refused(text: str, budget: str, tokens: int | None, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        Schedule.parse(text).solve(budget, PromptSizes(32, tokens))
    assert message in str(caught.value)


def test_check_against_a_model() -> None:
    with pytest.raises(ScheduleError, match="layer 32 in stage 1 is beyond the model, whose layers are 0 to 31"):
        Schedule.parse("random@32:0.5").check(32)
    with pytest.raises(ScheduleError, match="needs a budget"):
        Schedule.parse("random@3:?").check(32)
    with pytest.raises(ScheduleError, match="stage 2 keeps 60 of the 58 tokens"):
        Schedule.parse("random@3:0.1,random@5:60t").check(32, [576])
    with pytest.raises(ScheduleError, match="stages 1 and 2 mix a ratio and a number of tokens"):
        Schedule.parse("random@3:0.1,random@5:60t").check(32)
    Schedule.parse("random@3:0.1,vtw@5").check(32)
    Schedule.parse("random@3:1,random@5:60t").check(32)
    Schedule.parse("dart@2:0.44,random@5:0.44").check(32, [576])


@pytest.mark.parametrize(
    ("text", "images", "idle"),
    [
        ("dart@2:640t", [144], ["dart@2:640t"]),
        ("dart@2:640t", [144, 640], []),  # shared out in proportion: both lose some
        ("random@2:144t", [144], ["random@2:144t"]),
        ("random@2:143t", [144], []),
        ("random@2:0.999", [144], ["random@2:0.999"]),  # rounds to all
        ("random@2:0.5,random@5:0.5", [144], ["random@5:0.5"]),
        ("random@2:200t,random@5:100t", [144], ["random@2:200t"]),
        ("random@1:1.0", [144], []),  # requests all: a control
        ("todre@2,random@5:0.1", [144], []),  # decides by itself how many
        ("random@2:0.5", [], []),
    ],
)
def test_idle_stages_are_found(text: str, images: list[int], idle: list[str]) -> None:
    assert [str(stage) for stage in Schedule.parse(text).idle(images)] == idle


@pytest.mark.parametrize(("text", "all_kept"), [("random@1:1.0,dart@2:1", True), ("random@1:1.0,dart@2:0.5", False)])
def test_a_keep_all_control_is_distinguished_from_a_mistake(text: str, all_kept: bool) -> None:
    assert Schedule.parse(text).keeps_all == all_kept
