"""The benchmark of schedules: its accounts are exact, its parts add up, and it runs as a process."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from rich.console import Console
from tiny import LAYERS, Family
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from lmms_prune.bench.clock import Clock
from lmms_prune.bench.gains import BreakEven, break_even
from lmms_prune.bench.models import BenchError, fits, given_model, random_inputs, random_model
from lmms_prune.bench.report import chart, described, tables
from lmms_prune.bench.schedules import ScheduleTiming, Workload, _generate, time_schedules
from lmms_prune.bench.selection import selection_model, time_selection
from lmms_prune.bench.spans import PARTS, Marks
from lmms_prune.cli import app
from lmms_prune.compat.torch import forgotten_rules
from lmms_prune.efficiency.cost import peak_bytes
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.methods.dart import DART
from lmms_prune.models.architectures import PUBLISHED, architecture, from_config
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule

GRIDS = {"llava": None, "qwen": (6, 5)}
HYBRID = Schedule.parse("dart@2:0.5,random@5:0.1")


@pytest.fixture(params=sorted(GRIDS))
def family(request: pytest.FixtureRequest, loaded: Callable[..., Family]) -> Family:
    return loaded(request.param, torch.float32)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_random_models_have_the_named_sizes(name: str) -> None:
    made = random_model(name, None, torch.device("meta"), torch.bfloat16)
    assert from_config(made.config.to_dict(), name) == architecture(name)
    short = random_model(name, 3, torch.device("meta"), torch.bfloat16)
    assert from_config(short.config.to_dict(), name) == replace(architecture(name), layers=3)
    assert len(short.model.language_model.layers) == 3
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}


def test_flops_are_those_that_torch_counts(family: Family) -> None:
    """Of a whole generation, selection included: two independent counts."""
    case = Workload(2, 21, 3)
    whole, pruned = time_schedules(family.model, [HYBRID], [case], GRIDS[family.name], 1)
    inputs = random_inputs(family.model, 2, GRIDS[family.name], 21)
    counted = []
    for schedule in (Schedule(()), HYBRID):
        with (
            torch.inference_mode(),
            prune(family.model, schedule),
            FlopCounterMode(display=False, custom_mapping=forgotten_rules()) as counter,
        ):
            _generate(family.model, inputs, case)
        counted.append(counter.get_total_flops())
    assert whole.selection_flops == 0
    assert pruned.selection_flops > 0
    assert pruned.ideal_speedup == pytest.approx(counted[0] / (counted[1] - pruned.selection_flops), rel=1e-12)


def test_what_was_measured_is_what_ran(family: Family) -> None:
    cases = [Workload(1, 12, 1), Workload(3, 12, 4)]
    keep_all = Schedule.parse("random@1:1.0")
    measured = time_schedules(family.model, [HYBRID, keep_all], cases, GRIDS[family.name], 3)
    assert [(one.schedule, one.case) for one in measured] == [
        (name, case) for case in cases for name in ("none", str(HYBRID), str(keep_all))
    ]
    visual = 64 if family.name == "llava" else 30
    for one in measured:
        ulp = math.ulp(one.seconds)  # quantiles are interpolated, also between equal values
        assert one.low - 2 * ulp <= one.seconds <= one.high + 2 * ulp
        (whole,) = (other for other in measured if (other.schedule, other.case) == ("none", one.case))
        assert one.realised_speedup == pytest.approx(whole.seconds / one.seconds)
        assert one.realised_fraction == pytest.approx(one.realised_speedup / one.ideal_speedup)
        ulp = math.ulp(one.realised_speedup)
        assert one.realised_low - 2 * ulp <= one.realised_speedup <= one.realised_high + 2 * ulp
        assert one is not whole or one.realised_low == one.realised_high == 1
        assert one.peak_bytes is None
        assert (one.parts["selection"] > 0) == (one.schedule != "none")
        assert one.parts["encoder"] > 0
        if one.schedule == str(HYBRID):
            assert one.avg_visual_tokens == HYBRID.avg_visual_tokens(LAYERS, [visual])
            assert one.ideal_speedup > 1
        else:
            assert one.avg_visual_tokens == visual
            assert one.ideal_speedup == 1.0
    assert not family.model.model.language_model.layers[2]._forward_pre_hooks


def test_a_speed_up_is_of_what_ran_and_not_of_the_schedule(loaded: Callable[..., Family]) -> None:
    """Half of 6 x 5 tokens are 15, but the largest grid of that shape with as many has 4 x 3."""
    family, pooled = loaded("qwen", torch.float32), Schedule.parse("pool@2:0.5")
    case = Workload(1, 21, 3)
    _, measured = time_schedules(family.model, [pooled], [case], (6, 5), 1)
    assert measured.avg_visual_tokens == (2 * 30 + (LAYERS - 2) * 12) / LAYERS < pooled.avg_visual_tokens(LAYERS, [30])
    counted, inputs = [], random_inputs(family.model, 1, (6, 5), 21)
    for schedule in (Schedule(()), pooled):
        with (
            torch.inference_mode(),
            prune(family.model, schedule),
            FlopCounterMode(display=False, custom_mapping=forgotten_rules()) as counter,
        ):
            _generate(family.model, inputs, case)
        counted.append(counter.get_total_flops())
    assert measured.ideal_speedup == pytest.approx(counted[0] / (counted[1] - measured.selection_flops), rel=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_time_is_put_down_to_the_part_that_took_it(
    loaded: Callable[..., Family], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """One part is made slow; it is that part which is slow in the account."""
    family, clock = loaded("llava", torch.float32), Clock(torch.device("cpu"))
    model = family.model.model
    places = {
        "encoder": model.vision_tower,
        "selection": DART,
        "prefill": model.language_model.layers[4],
        "decode": model.language_model.layers[4],
    }
    name = "select" if part == "selection" else "forward"
    original = getattr(places[part], name)

    def slow(*args: Any, **kwargs: Any) -> Any:
        if part not in ("prefill", "decode") or (args[0].shape[1] == 1) == (part == "decode"):
            end = time.process_time() + 0.4
            while time.process_time() < end:  # on a CPU, only computing counts
                pass
        return original(*args, **kwargs)

    monkeypatch.setattr(places[part], name, slow)
    marks, inputs = Marks(clock), random_inputs(family.model, 2, None, 9)
    with torch.inference_mode(), marks.around(family.model, Schedule.parse("dart@2:0.5")):
        start = clock.mark()
        _generate(family.model, inputs, Workload(2, 9, 2))
        end = clock.mark()
    parts = marks.parts(start, end)
    assert parts[part] >= 0.4
    assert max(parts, key=lambda one: parts[one]) == part, parts


def test_the_unpruned_model_is_timed_without_hooks(loaded: Callable[..., Family]) -> None:
    """But for those that mark the times of the encoder and of the first token; a schedule has its own in the decoder."""
    model = loaded("llava", torch.float32).model
    watched = [model.model, model.model.language_model, *model.model.language_model.layers]
    hooks, inputs = {}, random_inputs(model, 1, None, 9)
    for text in ("none", "random@2:1.0"):
        with torch.inference_mode(), Marks(Clock(torch.device("cpu"))).around(model, Schedule.parse(text)):
            _generate(model, inputs, Workload(1, 9, 1))
            hooks[text] = sum(len(module._forward_pre_hooks) for module in watched)
    assert hooks == {"none": 0, "random@2:1.0": 2 + LAYERS + 2}  # two of them mark the stage's time


def test_the_parts_add_up_to_the_whole(family: Family) -> None:
    clock = Clock(torch.device("cpu"))
    marks, case = Marks(clock), Workload(2, 9, 3)
    inputs = random_inputs(family.model, 2, GRIDS[family.name], 9)
    with torch.inference_mode(), marks.around(family.model, HYBRID):
        start = clock.mark()
        _generate(family.model, inputs, case)
        end = clock.mark()
    parts = marks.parts(start, end)
    assert tuple(parts) == PARTS
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(end - start)
    assert [len(span) for span in (*marks.encoder, *marks.selection)] == [2, 2, 2]


@pytest.mark.parametrize("text", ["downsample@0:0.3", "sgl@3:0.3;new_tokens=2"])
def test_what_a_method_runs_again_is_time_of_its_stage(family: Family, text: str) -> None:
    """The encoder on a smaller image, or the model as its own guide."""
    clock = Clock(torch.device("cpu"))
    marks, inputs = Marks(clock), random_inputs(family.model, 2, GRIDS[family.name], 9)
    with torch.inference_mode(), marks.around(family.model, Schedule.parse(text)):
        start = clock.mark()
        _generate(family.model, inputs, Workload(2, 9, 3))
        end = clock.mark()
    (encoder,), (stage,) = marks.encoder, marks.selection
    assert start < encoder[0] < encoder[1] < stage[0] < stage[1] < marks.first_token < end
    assert sum(marks.parts(start, end).values()) == pytest.approx(end - start)


def made(schedule: str, new_tokens: int, seconds: float, batch: int = 1) -> ScheduleTiming:
    parts = dict.fromkeys(PARTS, seconds / len(PARTS))
    case = Workload(batch, 60, new_tokens)
    return ScheduleTiming(
        schedule, case, seconds, seconds, seconds, parts, 1.25, 1.0, 0.9, 1.1, 0.8, 0, 576.0, None, 2**30
    )


@pytest.mark.parametrize(
    ("start", "slope", "gain", "length", "shown"),
    [
        (0.5, 0.02, "until", 225.0, "to 225"),  # 1 + 0.02 n = 1.1 (0.5 + 0.02 n)
        (0.5, 0.01, "always", None, "always"),
        (0.99, 0.02, "never", None, "never"),
        (1.2, 0.01, "from", 0.32 / 0.009, "from 36"),  # 1 + 0.02 n = 1.1 (1.2 + 0.01 n)
        (0.915, 0.01, "always", None, "always"),  # less at no new token, which no answer has
    ],
)
def test_where_the_gain_ends(start: float, slope: float, gain: str, length: float | None, shown: str) -> None:
    whole = [made("none", n, 1 + 0.02 * n) for n in (1, 32, 128)]
    pruned = [made("x", n, start + slope * n) for n in (1, 32, 128)]
    end = break_even(pruned, whole)
    assert (end.gain, end.new_tokens, str(end)) == (gain, length and pytest.approx(length), shown)
    assert break_even(pruned[:1], whole[:1]) == BreakEven("unknown")
    assert str(BreakEven("unknown")) == "-"


def test_the_report_of_a_measurement(tmp_path: Path) -> None:
    runs = [made(name, n, 0.1 * n, batch) for batch in (1, 8) for n in (1, 4) for name in ("none", "vtw@4")]
    assert len(tables(runs, "title", "cpu")) == 4
    narrow = Console(width=80, record=True, file=StringIO())
    both = [made(name, n, 1000.0 * n) for n in (1, 9) for name in ("none", "downsample@0:0.25")]
    narrow.print(*tables(both, "title", "cpu"))
    shown = narrow.export_text()
    assert "…" not in shown  # a long name goes on in the next line
    for text in ("1.25x", "1.00x", "80%", "never"):
        assert text in shown
    assert [set(end.items()) >= {("gain", "never"), ("new_tokens", None)} for end in described(runs)["break_even"]] == [
        True,
        True,
    ]
    assert {end["batch"] for end in described(runs)["break_even"]} == {1, 8}
    assert json.loads(json.dumps(described(runs)))["runs"][0]["schedule"] == "none"
    chart(runs, tmp_path / "times.png", "title", "cpu")
    with Image.open(tmp_path / "times.png") as image:
        assert min(image.size) > 300


def test_images_of_another_size_are_refused(loaded: Callable[..., Family]) -> None:
    with pytest.raises(BenchError, match="8 x 8 visual tokens, not 3 x 4"):
        random_inputs(loaded("llava").model, 1, (3, 4), 8)
    with pytest.raises(BenchError, match="rows and columns"):
        random_inputs(loaded("qwen").model, 1, None, 8)


def test_a_case_that_does_not_fit_is_named(loaded: Callable[..., Family], monkeypatch: pytest.MonkeyPatch) -> None:
    family = loaded("llava", torch.float32)

    def scarce(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(type(family.model), "generate", scarce)
    with pytest.raises(
        BenchError, match="out of memory at batch 2, 9 text and 3 new tokens; use a smaller --batch-size"
    ):
        time_schedules(family.model, [HYBRID], [Workload(2, 9, 3)], None, 2)


def test_memory_that_this_machine_lacks_is_said_and_other_errors_pass() -> None:
    with (
        pytest.raises(BenchError, match="out of memory at batch 1; use less or another --device"),
        fits("at batch 1", "less"),
    ):
        torch.empty(2**60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="another error"), fits("at batch 1", "less"):
        raise RuntimeError("another error")


@pytest.mark.parametrize(("asked", "dtype"), [("bf16", torch.bfloat16), ("float32", torch.float32)])
def test_types_may_be_written_short(folders: dict[str, Path], asked: str, dtype: torch.dtype) -> None:
    assert given_model(str(folders["llava"]), None, None, asked, "cpu").model.dtype == dtype


def test_a_model_in_tiles_is_timed_with_its_padding(folders: dict[str, Path]) -> None:
    """``--model_args unpad=false`` is the model that an evaluation with it has: what is timed has its tokens."""
    for model_args, tokens in (("", 16 + 4 * 4 + 4), ("unpad=false", 48)):
        model = given_model(str(folders["next"]), None, None, "float32", "cpu", model_args).model
        inputs = random_inputs(model, 1, (4, 3), 12)
        assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == tokens
        with torch.no_grad(), prune(model, "random@1:0.5") as trace:
            model.generate(**inputs, max_new_tokens=1, pad_token_id=0)
        assert trace.rows[0].visual_tokens == tokens
    with pytest.raises(ArgumentError, match=r"unpad=False is for another model family; .* is a LLaVA-1\.5"):
        given_model(str(folders["llava"]), None, None, "float32", "cpu", "unpad=false")


def test_random_weights_in_tiles_are_timed_with_their_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--arch … --model_args unpad=false``: five tiles of 24 x 24 patches; other arguments are refused."""
    monkeypatch.setattr(
        "lmms_prune.bench.models.random_model",
        lambda name, layers, device, dtype: random_model(name, layers, torch.device("meta"), dtype),
    )
    for model_args, tokens in (("", 2880 + 48), ("unpad=false", 2880)):
        made = given_model(None, "llava-v1.6-vicuna-7b", 2, "float32", "cpu", model_args)
        assert random_inputs(made.model, 1, (48, 48), 12)["input_ids"].shape[1] == tokens + 12
    assert "2 decoder layers of random weights, unpad=false" in made.title
    with pytest.raises(ArgumentError, match=r"unpad=False is for another model family; llava-1.5-7b is a LLaVA-1\.5"):
        given_model(None, "llava-1.5-7b", 2, "float32", "cpu", "unpad=false")


def test_selections_that_need_one_grid_are_refused_on_tiles(folders: dict[str, Path]) -> None:
    subject = selection_model("llava_next", str(folders["next"]), (4, 3), "cpu")
    with pytest.raises(BenchError, match=r"in tiles.*of which pool need one grid: leave these out"):
        time_selection(subject, ["dart", "pool"], 1, 0.5, 1)
    assert [timing.method for timing in time_selection(subject, ["dart"], 1, 0.5, 1)[1]] == ["dart"]


LLAVA = ("bench", "--arch", "llava-1.5-7b")


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ((*LLAVA, "--plot", "nowhere/x.png"), "there is no folder nowhere"),
        ((*LLAVA, "random@2:20t,random@20:0.5"), "keeps 288 of the 20 tokens"),
        (("bench", "--model", ".", "dart@20:0.5"), "layers are 0 to 7"),
        (("bench", "--model", ".", "dart@2:?"), "needs a budget"),
        (("bench-methods", "--methods", "random", "--device", "cuda:99"), "CUDA devices"),
        (("bench-methods", "--methods", "random", "--device", "gpu"), "use cpu, cuda or cuda:N"),
        (
            ("bench-methods", "--methods", "random,glimpseprune", "--model", "."),
            "glimpseprune: it needs trained weights",
        ),
        (("bench-methods", "--methods", "", "--model", "."), "--methods : unknown method"),
    ],
)
def test_what_cannot_be_is_said_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path], command: tuple[str, ...], said: str
) -> None:
    """The checkpoint has a config.json alone."""
    shutil.copy(folders["llava"] / "config.json", tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2, result.output
    assert said in result.stderr


def test_the_command_prints_json_and_draws_a_plot(folders: dict[str, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            "bench",
            "vtw@4",
            "--model",
            str(folders["qwen"]),
            "--grid",
            "4x6",
            "--batch-size",
            "1,2",
            "--new-tokens",
            "1,3",
            "--repeats",
            "2",
            "--plot",
            str(tmp_path / "times.svg"),
            "--json",
        ],
    )
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.splitlines()[-1])
    assert [(run["schedule"], run["case"]["batch"], run["case"]["new_tokens"]) for run in said["runs"]] == [
        (name, batch, new) for batch in (1, 2) for new in (1, 3) for name in ("none", "vtw@4")
    ]
    assert {run["avg_visual_tokens"] for run in said["runs"]} == {24.0, 12.0}
    assert [end["batch"] for end in said["break_even"]] == [1, 2]
    drawn = ElementTree.parse(tmp_path / "times.svg").getroot()
    assert drawn.tag.endswith("svg")
    # A panel for each of the four cases: matplotlib numbers its axes.
    assert all(run["realised_fraction"] > 0 for run in said["runs"])
    panels = [group.get("id") for group in drawn.iter() if str(group.get("id")).startswith("axes_")]
    assert panels == [f"axes_{number}" for number in range(1, 5)]


def test_what_was_measured_is_told_where_the_plot_cannot_be_written(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "times.svg").mkdir()
    given = ["--model", str(folders["qwen"]), "--grid", "4x6", "--new-tokens", "1", "--repeats", "2", "--json"]
    done = CliRunner().invoke(app, ["bench", "vtw@4", *given, "--plot", str(tmp_path / "times.svg")])
    assert done.exit_code == 2
    assert done.stderr.endswith(f"lmms-prune: {tmp_path}/times.svg cannot be written: Is a directory.\n")
    assert [run["schedule"] for run in json.loads(done.stdout.splitlines()[-1])["runs"]] == ["none", "vtw@4"]


def test_the_memory_that_the_docs_state_is_what_is_computed() -> None:
    """Weights of a model without values, and peaks at batch 16 with 60 text tokens and 31 decode steps."""
    page = (Path(__file__).parents[2] / "docs" / "speed.md").read_text(encoding="utf-8")
    for title, name in (("LLaVA-1.5-7B", "llava-1.5-7b"), ("Qwen2.5-VL-7B", "qwen2.5-vl-7b")):
        sizes = architecture(name)
        model = random_model(name, None, torch.device("meta"), torch.bfloat16)
        weights = sum(parameter.numel() * 2 for parameter in model.parameters())
        cells = [weights]
        for text in ("none", "dart@2:0.44,random@20:0.07"):
            lengths = [count + 60 for count in Schedule.parse(text).layer_counts(sizes.layers, [576])]
            cells.append(weights + int(peak_bytes(sizes, [lengths] * 16, 31)))
        row = " | ".join(f"{cell / 2**30:.1f} GiB" for cell in cells)
        assert f"| {title} | {row} |" in page
