"""The paper's printed values, and its Acc and Rel computed from them by the code that computes ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmms_prune.configs.runs import read
from lmms_prune.efficiency.cost import kv_bytes, prefill_flops
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.tasks import own_groups
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.formats import FORMATS
from lmms_prune.leaderboard.published import PublishedCost, match, match_cost, published, published_costs
from lmms_prune.leaderboard.reproduced import published_table
from lmms_prune.leaderboard.rows import TableRow
from lmms_prune.models import MODEL_NAMES
from lmms_prune.models.architectures import architecture
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

ROWS = [row for model in published_table().models for row in model.rows]
# The printed scores of this row give 91.352, of which the table makes 91.3: the paper computed it from more digits.
EXCEPTIONS = {("LLaVA-1.5-7B", "DART+VTW", "64"): 91.352}


def test_there_are_thirty_pruned_rows_and_two_baselines() -> None:
    assert len(published()) == 32
    assert sum(row.name == "unpruned" for row in published()) == 2


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.published.model} {row.label} {row.published.budget}")
def test_rel_is_reproduced_to_the_printed_digit(row: TableRow) -> None:
    printed = row.published
    assert printed is not None
    assert row.rel is not None
    if (value := EXCEPTIONS.get((printed.model, printed.name, printed.budget))) is not None:
        assert row.rel == pytest.approx(value, abs=0.001)
        assert round(row.rel, 1) != printed.rel
    else:
        assert round(row.rel, 1) == printed.rel


@pytest.mark.parametrize("row", [row for row in ROWS if row.published.acc], ids=lambda row: row.label)
def test_acc_is_reproduced_to_the_printed_digit(row: TableRow) -> None:
    assert row.acc is not None
    assert round(row.acc, 1) == row.published.acc


def test_seven_rows_have_an_acc() -> None:
    assert sum(row.published.acc is not None for row in ROWS) == 7


@pytest.mark.parametrize(
    ("model", "schedule", "name", "budget"),
    [
        ("llava-hf/llava-1.5-7b-hf", "dart@2:0.44,random@20:0.07", "DART+Random", "192"),
        ("/models/LLaVA-1.5-7B", PRESETS["dart+random-192-release"], "DART+Random", "192"),
        ("llava-hf/llava-1.5-7b-hf", PRESETS["sparsevlm-64"], "SparseVLM", "64"),
        ("llava-hf/llava-1.5-7b-hf", "vtw@4", "VTW", "64"),
        # Options are no reason to leave the row out: that they differ is said (`protocol`).
        ("llava-hf/llava-1.5-7b-hf", "dart@2:252t,random@20:38t", "DART+Random", "192"),
        ("llava-hf/llava-1.5-7b-hf", "none", "unpruned", ""),
        ("Qwen/Qwen2.5-VL-7B-Instruct", PRESETS["divprune+vtw-50pct"], "DivPrune+VTW", "50pct"),
    ],
)
def test_a_row_is_known_by_model_and_schedule(model: str, schedule: str, name: str, budget: str) -> None:
    row = match(model, schedule)
    assert row is not None
    assert (row.name, row.budget) == (name, budget)


def test_the_protocol_is_that_of_the_files_in_model_configs() -> None:
    folder, groups = Path(__file__).parents[2] / "model_configs", own_groups()
    for path in sorted(folder.glob("*.yaml")):
        (run,) = read(path)
        arguments = ModelArguments.read(run.settings["model_args"], None, MODEL_NAMES[run.settings["model"]])
        row = match(arguments.pretrained, str(arguments.schedule))
        if row is None:
            # Controls, and rows for a model that the paper did not evaluate.
            assert "control" in path.stem or path.stem.startswith(
                ("qwen2-vl-7b", "qwen3-vl-8b", "llava-v1.6-vicuna-7b")
            )
            continue
        settings = arguments.settings()
        names = {"positions", "system_prompt", "chat_template"} | (
            {"prompt", "image_aspect"} if row.table == 2 else {"min_pixels", "max_pixels"}
        )
        assert row.protocol.settings == {name: settings[name] for name in names}, path
        tasks = groups[run.settings["tasks"]]
        assert row.protocol.tasks == {TASKS[task].name: task for task in tasks}, path
        assert set(row.protocol.tasks) == set(row.scores)
        for stage in arguments.schedule.stages:
            assert stage.options == row.protocol.options(stage.method), path


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("llava-hf/llava-1.5-13b-hf", "dart@2:0.44,random@20:0.07"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "dart@2:0.44,random@20:0.07"),
        ("llava-hf/llava-1.5-7b-hf", "dart@2:0.45,random@20:0.07"),
        ("llava-hf/llava-1.5-7b-hf", None),
        ("llava-hf/llava-1.5-7b-hf", "of_a_later_version@2:0.4"),
    ],
)
def test_another_model_or_schedule_is_not_known(model: str, schedule: str | None) -> None:
    assert match(model, schedule) is None


def test_the_printed_tables_come_out_in_every_format() -> None:
    for name, form in FORMATS.items():
        text = form(published_table(), False)
        assert "DART+Random" in text, name
        assert "98.2" in text or "98.16" in text, name


def test_what_the_papers_text_says_against_its_tables_is_named_beside_the_misprint() -> None:
    (notes,) = [model.notes for model in published_table().models if model.model == "LLaVA-1.5-7B"]
    assert len(notes) == 3
    assert notes[0].startswith("The paper prints a Rel of 91.3 for DART+VTW 64")
    # Table 3: unpruned, and DART+Random at 64 tokens; milliseconds.
    for before, after, share in ((127.4, 47.1, "-63.0 %"), (272.4, 162.2, "-40.5 %")):
        assert f"{100 * (after / before - 1):.1f} %" == share
        assert f"{before} to {after} ms" in notes[1]
        assert share in notes[1]
    assert "73.0 %" in notes[1]
    mme = [row.scores["MME"] for row in published() if row.table == 2]
    assert not {round(100 * score / mme[0], 1) for score in mme} & {96.4, 68.6}
    assert "96.4 with 68.6 on MME" in notes[2]


def test_groups_take_the_benchmarks_apart() -> None:
    for row in ROWS:
        assert row.published is not None
        counts = {group: sum(TASKS[task].group == group for task in row.cells) for group in row.groups}
        assert sum(counts.values()) == len(row.cells)
        assert row.rel == pytest.approx(
            sum(mean.rel * counts[group] for group, mean in row.groups.items() if mean.rel) / len(row.cells)
        )


def test_the_best_of_a_budget_is_bold() -> None:
    """Table 2 prints DivPrune's 87.6 for POPE and DART+Random's Rel of 98.2 in bold."""
    text = FORMATS["markdown"](published_table(), False)
    (line,) = [one for one in text.splitlines() if one.startswith("| `DART+Random`") and "98.2" in one]
    assert "**98.2**" in line
    (line,) = [one for one in text.splitlines() if one.startswith("| `DivPrune`") and "87.6" in one]
    assert "**87.6**" in line


def test_the_nine_rows_of_table_3_are_those_that_the_costs_are_checked_against() -> None:
    """`tests/efficiency/test_cost.py` holds FLOPs and cache of the schedules within 1 % of the printed ones."""
    checked = json.loads((Path(__file__).parents[1] / "paper_table3.json").read_text(encoding="utf-8"))["rows"]
    by_name = {row["name"]: row for row in checked}
    assert len(published_costs()) == len(by_name) == 9
    for row in published_costs():
        other = by_name["LLaVA-1.5-7B" if row.name == "unpruned" else row.label]
        assert (row.tflops, row.mib) == (other["tflops"], other["mib"])
    unpruned = next(row for row in published() if row.model == "LLaVA-1.5-7B" and row.name == "unpruned")
    assert published_costs()[0].acc == unpruned.scores["TextVQA"]


@pytest.mark.parametrize("row", published_costs(), ids=lambda row: row.label)
def test_the_costs_that_table_3_prints_follow_from_its_schedules(row: PublishedCost) -> None:
    """FastV acted at layer 4, and DART kept 172 and 36; DART+VTW 192 alone is off by more than 1 %, by 1.1 %."""
    model = architecture("llava-1.5-7b")
    lengths = [116.4 + n for n in Schedule.parse(row.schedule).layer_counts(32, [576])]
    assert prefill_flops(model, lengths, logits=0) / 1e12 == pytest.approx(row.tflops, rel=0.011)
    assert sum(kv_bytes(model, lengths)) / 2**20 == pytest.approx(row.mib, rel=0.01)


@pytest.mark.parametrize("name", [row.label for row in published_costs() if row.budget])
def test_the_accuracy_of_table_3_is_table_2s(name: str) -> None:
    row = next(row for row in published_costs() if row.label == name)
    same = next(r for r in published() if (r.model, r.name, r.budget) == (row.model, row.name, row.budget))
    assert row.acc == same.scores["TextVQA"]


@pytest.mark.parametrize(
    ("model", "schedule", "label"),
    [
        ("llava-hf/llava-1.5-7b-hf", PRESETS["dart-192-measured"], "DART 192"),
        ("llava-hf/llava-1.5-7b-hf", PRESETS["dart-192"], "DART 192"),
        ("llava-hf/llava-1.5-7b-hf", PRESETS["fastv-64-measured"], "FastV 64"),
        ("llava-hf/llava-1.5-7b-hf", "none", "unpruned"),
        ("llava-hf/llava-1.5-7b-hf", PRESETS["divprune-64"], None),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "none", None),
        ("llava-hf/llava-1.5-13b-hf", PRESETS["dart-192-measured"], None),
    ],
)
def test_a_cost_is_known_by_model_and_schedule(model: str, schedule: str, label: str | None) -> None:
    row = match_cost(model, schedule)
    assert (row and row.label) == label


def test_published_prints_table_3_too() -> None:
    text = FORMATS["markdown"](published_table(), False)
    assert "| `DART+Random 64` | 64 | 2.36 | 90.1 | 47.1 | 162.2 | 53.4 |" in text
    assert json.loads(FORMATS["json"](published_table(), False))["published_costs"][0]["latency_ms"] == 272.4
