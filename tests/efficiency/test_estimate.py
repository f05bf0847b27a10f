"""What a schedule will cost, and schedules that fit a budget of cost."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.efficiency.estimate import estimate, prompt_sizes
from lmms_prune.errors import ScheduleError
from lmms_prune.models import FAMILIES, Family
from lmms_prune.models.architectures import PUBLISHED, architecture, of_checkpoint
from lmms_prune.schedule import PromptSizes, Schedule
from lmms_prune.schedule.budgets import MIB

LLAVA = architecture("llava-1.5-7b")
SIZES = prompt_sizes(LLAVA, text_tokens=64)
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "120"}


def call(*args: str):
    return CliRunner().invoke(app, ["schedule", *args], env=PLAIN)


def estimate_json(*args: str) -> dict:
    result = call(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output.strip().splitlines()[-1])


def test_the_papers_rows_on_the_command_line() -> None:
    """Table 3 of arXiv 2512.07580: DART+Random at 192 tokens."""
    shown = estimate_json("dart@2:252t,random@20:38t", "--model", "llava-1.5-7b", "--text-tokens", "116.4")
    assert shown["avg_visual_tokens"] == 192
    assert shown["tflops"] == pytest.approx(4.06, rel=0.01)
    assert shown["kv_mib"] == pytest.approx(154.2, rel=0.01)
    assert shown["share_flops"] == pytest.approx(4.06 / 9.22, rel=0.01)
    assert shown["layer_visual_tokens"] == [576] * 2 + [252] * 18 + [38] * 12


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_default_checkpoint_has_a_named_architecture(family: Family) -> None:
    assert architecture(family.published_default).family is family
    assert of_checkpoint(family.checkpoint) == architecture(family.published_default)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_hub_name_of_known_sizes_is_taken(family: Family) -> None:
    by_hub = estimate_json("none", "--model", family.checkpoint)
    by_name = estimate_json("none", "--model", family.published_default)
    assert by_hub.pop("model") == family.checkpoint
    assert by_name.pop("model") == family.published_default
    assert by_hub == by_name


@pytest.mark.parametrize("name", ["someone/unknown-7b", "folder/qwen2.5-vl-7b/config.json", "./qwen2.5-vl-7b/x"])
def test_a_name_that_is_none_of_the_hubs_is_refused(name: str) -> None:
    result = call("none", "--model", name)
    assert result.exit_code == 2
    assert "unknown architecture" in result.output


def test_the_total_has_the_encoder_and_bounds_the_speed_up() -> None:
    """All visual tokens dropped at layer 0 leave the encoder: what the decoder's share alone hides."""
    shown = estimate_json("vtw@0", "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    whole = estimate_json("none", "--model", "Qwen/Qwen2.5-VL-7B-Instruct")
    assert shown["total_tflops"] == pytest.approx(shown["tflops"] + shown["encoder_tflops"])
    assert shown["share_total"] == pytest.approx(shown["total_tflops"] / whole["total_tflops"])
    assert shown["best_speedup"] == pytest.approx(1 / shown["share_total"])
    assert shown["share_flops"] < 0.06 < 0.25 < shown["share_total"]
    assert "as fast by FLOPs" in call("vtw@0", "--model", "Qwen/Qwen2.5-VL-7B-Instruct").output


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_empty_schedule_costs_100_percent(name: str) -> None:
    shown = estimate_json("none", "--model", name)
    assert shown["share_flops"] == shown["share_kv"] == 1
    tokens = {"llava-1.5": 576, "llava-v1.6": 2880, "qwen2.5-vl": 1280, "qwen2-vl": 768, "qwen3-vl": 980}
    assert shown["visual_tokens"] == tokens["-".join(name.split("-")[:2])]
    assert estimate_json("vtw@0", "--model", name)["share_kv"] == pytest.approx(64 / (64 + shown["visual_tokens"]))


@pytest.mark.parametrize(
    "text", ["dart@2:?,random@20:38t", "divprune@0:?", "fastv@3:?,vtw@25", "divprune@0:0.5,random@9:?"]
)
@pytest.mark.parametrize("budget", ["flops=40%", "flops=3.5T", "kv=40%", "kv=130MiB"])
def test_a_budget_of_cost_is_met_by_the_largest_number_of_tokens(text: str, budget: str) -> None:
    """One more token, or with DART one more that counts, would be too much."""
    read = Schedule.parse(text)
    solution = read.solve(budget, SIZES)
    index = read.unknown
    assert index is not None
    unpruned = estimate(LLAVA, Schedule(()), 576, 64)

    def cost(schedule: Schedule) -> float:
        one = estimate(LLAVA, schedule, 576, 64)
        return one.flops if budget.startswith("flops") else one.kv_bytes

    total = unpruned.flops if budget.startswith("flops") else unpruned.kv_bytes
    limit = {"flops=40%": 0.4 * total, "flops=3.5T": 3.5e12, "kv=40%": 0.4 * total, "kv=130MiB": 130 * MIB}[budget]
    kept = solution.plan([576])[index][0]
    above = 576 if index == 0 else solution.plan([576])[index - 1][0]
    assert cost(solution) <= limit
    more = [Schedule.parse(text.replace("?", f"{n}t")) for n in range(kept + 1, above + 1)]
    larger = [one for one in more if one.plan([576])[index][0] > kept]
    assert not larger or cost(larger[0]) > limit


@settings(deadline=None)
@given(st.integers(0, 31), st.integers(1, 576), st.integers(0, 300))
def test_cost_is_monotonic_in_the_keep(layer: int, kept: int, text: int) -> None:
    one, two = (estimate(LLAVA, Schedule.parse(f"random@{layer}:{n}t"), 576, text) for n in (kept - 1, kept))
    assert one.flops < two.flops
    assert one.kv_bytes < two.kv_bytes


def test_a_quota_below_the_next_stages_count_is_no_solution() -> None:
    """DART keeps 36 of 38 requested tokens; a schedule with 36 before 38 would be refused."""
    solution = Schedule.parse("dart@2:?,random@20:38t").solve("72t", SIZES)
    assert solution.plan([576]) == [[36], [36]]
    assert Schedule.parse(str(solution)) == solution


def test_cropped_caches_are_counted_as_cropped() -> None:
    """IVC-Prune at layer 16 of 32: half the tokens in every cache, three quarters of them computed; MustDrop from layer 15 on."""
    llava = architecture("llava-1.5-7b")
    for text, average, cached in (
        ("ivcprune@16:0.5", Fraction(3, 4), Fraction(1, 2)),
        ("mustdrop@16:0.5", Fraction(3, 4), Fraction(15 + 17 * Fraction(1, 2), 32)),
        ("random@16:0.5", Fraction(3, 4), Fraction(3, 4)),
    ):
        schedule = Schedule.parse(text)
        assert schedule.avg_visual_tokens(32, [576]) == average * 576
        assert Fraction(sum(schedule.cached_counts(32, [576])), 32) == cached * 576
        full, one = (estimate(llava, each, 576, 0).kv_bytes for each in (Schedule(()), schedule))
        assert Fraction(one, full) == cached
    # Of a cache alone, so that a budget below half of the cache can be met.
    solved = Schedule.parse("ivcprune@16:?").solve("kv=20%", prompt_sizes(llava, text_tokens=0))
    assert solved.stages[0].keep == 115
    with pytest.raises(ScheduleError, match=r"cannot be met: the smallest possible is"):
        Schedule.parse("ivcprune@16:?").solve("kv=5%", prompt_sizes(llava, text_tokens=64))


def test_tokens_and_ratios_are_solved_as_without_a_model() -> None:
    read = Schedule.parse("dart@2:?,random@20:38t")
    for budget in ("192t", "0.4"):
        assert read.solve(budget, SIZES) == read.solve(budget, PromptSizes(32, 576))
    assert Fraction(192) == read.solve("192t", SIZES).avg_visual_tokens(32, [576])


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            "kv=10MiB",
            r"kv=10MiB cannot be met: layers 0 to 1 alone take 20MiB; the smallest possible is 66\.88MiB, the ",
        ),
        ("kv=300MiB", r"kv=300MiB cannot be met: the smallest possible is 66\.88MiB, the largest 219\.1MiB"),
        ("flops=1%", r"flops=1% cannot be met: layers 0 to 1 alone take 6\.25%; the smallest"),
        ("kv=100", "write kv=30% or kv=100MiB"),
        ("flops=100MiB", "write flops=30% or flops=2.5T"),
        ("memory=3GiB", "'memory' is not known; use flops=, kv= or ttft@"),
    ],
)
def test_budgets_that_cannot_be_met(budget: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse("dart@2:?,random@20:38t").solve(budget, SIZES)


@pytest.mark.parametrize("unit", ["flops=%", "flops=G", "kv=%", "kv=MiB", "t", ""])
@pytest.mark.parametrize("text", ["dart@2:?", "dart@2:?,random@20:38t"])
def test_the_reported_bounds_are_possible(text: str, unit: str) -> None:
    """The bounds of the message are taken as they are printed."""
    kind, unit = re.fullmatch("(.*=|)(.*)", unit).groups()
    with pytest.raises(ScheduleError) as error:
        Schedule.parse(text).solve(f"{kind}0.001{unit}", SIZES)
    bounds = re.search(rf"smallest possible is (.+){unit}, the largest (.+){unit}\.\n", str(error.value))
    for amount in bounds.groups():
        Schedule.parse(text).solve(f"{kind}{float(amount):f}{unit}", SIZES)
    with pytest.raises(ScheduleError, match="cannot be met: layers 0 to 1 alone"):
        Schedule.parse(text).solve(f"{kind}{0.98 * float(bounds[1]):f}{unit}", SIZES)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["dart@2:?", "--budget", "kv=100MiB"], "needs a model"),
        (["dart@2:0.5", "--model", "llava"], "unknown architecture 'llava'"),
        (["dart@2:0.5", "--model", "llava-1.5-7b", "--layers", "28"], "has 32 decoder layers"),
        (["dart@30:0.5", "--model", "qwen2.5-vl-7b"], "layers are 0 to 27"),
        (["dart@2:0.5", "--model", "llava-1.5-7b", "--text-tokens", "inf"], "--text-tokens"),
    ],
)
def test_errors_exit_with_2_and_one_message(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_the_curve_falls_where_a_stage_acts() -> None:
    output = call("random@8:0.5,vtw@16", "--model", "llava-1.5-7b").output
    (top,) = [line for line in output.splitlines() if line.startswith("   576 ")]
    assert top[7:] == "█" * 16 + " " * len(top[7 + 16 :])
    (bottom,) = [line for line in output.splitlines() if line.startswith("    96 ")]
    assert bottom[7:].rstrip() == "█" * 32


@pytest.mark.parametrize(("layers", "columns"), [(36, 72), (40, 40), (80, 40)])
def test_the_curve_of_a_deep_model_stays_on_the_line(tmp_path: Path, layers: int, columns: int) -> None:
    """Of a terminal of 80 columns, 7 of them for the scale."""
    text = {"num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    call = ["schedule", f"vtw@{layers // 2}", "--model", str(tmp_path)]
    output = CliRunner().invoke(app, call, env={**PLAIN, "COLUMNS": "80"}).output
    curve = [line[7:].rstrip() for line in output.splitlines() if "█" in line]
    assert curve == ["█" * (columns // 2)] * 6
    assert max(map(len, output.splitlines())) <= 80


def test_a_small_models_cost_is_not_rounded_to_zero(tmp_path: Path) -> None:
    text = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 99}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": text}))
    output = call("none", "--model", str(tmp_path), "--visual-tokens", "9").output
    # The line begins with the folder's name, whose length decides where it is broken.
    assert "prefill of the decoder 0.01 GFLOPs" in " ".join(output.split())


def test_a_folders_name_is_printed_unchanged(tmp_path: Path) -> None:
    """Brackets in it are no markup."""
    folder = tmp_path / "m[b]x[" / "b]y"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"num_hidden_layers": 4}}))
    output = call("none", "--model", str(folder)).output
    # A long path is broken at the console's width, wherever that falls.
    assert "/m[b]x[/b]y,64texttokens" in "".join(output.split())


@pytest.mark.parametrize("budget", ["flops=40%", "kv=40%", "kv=30MiB", "flops=9T"])
def test_where_images_differ_a_budget_of_cost_gives_a_ratio(budget: str) -> None:
    """So that it means the same for every image; it holds for the family's example."""
    model = architecture("qwen2.5-vl-7b")
    sizes = prompt_sizes(model)
    (early, late) = Schedule.parse("divprune@0:?,random@20:0.07").solve(budget, sizes).stages
    assert isinstance(early.keep, Decimal)
    assert str(late) == "random@20:0.07"
    kind, amount = budget.split("=")
    costs = {
        n: sizes.costs[kind](Schedule((replace(early, keep=n), late)).layer_counts(28, [model.example_tokens]))
        for n in (Decimal(1), early.keep, early.keep + Decimal("0.001"))
    }
    unpruned = sizes.costs[kind]([model.example_tokens] * 28)
    limit = {"40%": 0.4 * unpruned, "30MiB": 30 * MIB, "9T": 9e12}[amount]
    assert costs[early.keep] <= limit < costs[early.keep + Decimal("0.001")]


def test_a_budget_of_cost_needs_the_models_sizes() -> None:
    with pytest.raises(ScheduleError, match=r"budget 'flops=40%': a budget of cost needs a model"):
        Schedule.parse("dart@2:?").solve("flops=40%", PromptSizes(32, 576))


def test_every_spelling_is_read_by_one_reader() -> None:
    expected = Schedule.parse("dart@2:0.44;order=reference,random@20:38t")
    mapping = {"method": "dart", "layer": 2, "keep": 0.44, "order": "reference"}
    for spelling in (
        "[dart@2:0.44;order=reference, 'random@20:38t']",
        ["dart@2:0.44;order=reference", "random@20:38t"],
        [mapping, {"method": "random", "layer": 20, "keep": "38t"}],
        [mapping, "random@20:38t"],
        expected,
    ):
        assert Schedule.parse(spelling) == expected
    assert Schedule.parse(mapping) == Schedule.parse("dart@2:0.44;order=reference")
    assert Schedule.parse("dart@2:?,random@20:38t,budget=192t", SIZES) == Schedule.parse("dart@2:252t,random@20:38t")
    assert Schedule.parse("dart@2:?,budget=flops=40%", SIZES) == Schedule.parse("dart@2:?").solve("flops=40%", SIZES)
    with pytest.raises(ScheduleError, match=r"budget=0\.5: a budget can be solved only where the model is known"):
        Schedule.parse("dart@2:?,budget=0.5")
    with pytest.raises(ScheduleError, match="lacks its method or its layer"):
        Schedule.parse([{"method": "dart", "keep": 0.4}])
    with pytest.raises(ScheduleError, match="3 is neither a text nor a list of stages"):
        Schedule.parse(3)
