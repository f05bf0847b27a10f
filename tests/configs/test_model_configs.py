"""The files in model_configs/ are the table's rows, and the table's rows are the paper's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from lmms_prune.configs.check import check
from lmms_prune.configs.render import render
from lmms_prune.configs.runs import read
from lmms_prune.configs.table import RANDOM_SEEDS, ROWS, TABLES, _scaled
from lmms_prune.methods.base import grid_within
from lmms_prune.models.architectures import architecture
from lmms_prune.schedule import Schedule
from lmms_prune.schedule.presets import PRESETS

FOLDER = Path(__file__).parents[2] / "model_configs"
FILES = sorted(FOLDER.glob("*"))

# arXiv 2512.07580, the rows of Table 2 at each of its two budgets, and of Table 1 at its one.
LLAVA = (
    *("pdrop", "sparsevlm", "vtw", "fastv", "dart", "divprune"),
    *("fastv+vtw", "dart+vtw", "divprune+vtw"),
    *(f"{name}+random-{seed}" for name in ("fastv", "dart", "divprune") for seed in range(3)),
)
QWEN = (
    *("dart", "divprune", "dart+vtw", "divprune+vtw"),
    *(f"{name}+random-{seed}" for name in ("dart", "divprune") for seed in range(3)),
)
# Visual tokens a layer that the exact counts of the authors' scripts and of the other methods' code give (32 layers, 576).
OURS = {"qwen2-vl-7b": 28, "qwen3-vl-8b": 36}
"""Models that the paper did not evaluate, with their layers."""
AVERAGES = {
    "192": {
        **{"dart+random-0": 192.0, "dart+vtw": 190.375, "divprune+random-0": 191.75, "divprune+vtw": 186.375},
        **{"sparsevlm": 206.5, "pdrop": 191.375, "vtw": 198.0, "dart": 189.75},
    },
    "064": {
        **{"dart+random-0": 63.75, "dart+vtw": 64.875, "divprune+random-0": 63.75, "divprune+vtw": 64.3125},
        **{"sparsevlm": 82.25, "pdrop": 63.875, "vtw": 72.0, "dart": 62.25},
    },
}


def test_every_row_of_both_tables_and_every_control_has_a_file() -> None:
    controls = ["control-downsample", "control-pool", *(f"control-random-{i}" for i in range(5)), "control-stride"]
    llava = [f"llava-1.5-7b_{budget}_{name}" for budget in ("192", "064") for name in (*LLAVA, *controls)]
    qwen = [f"qwen2.5-vl-7b_050pct_{name}" for name in (*QWEN, *controls)]
    qwen += [f"{model}_050pct_{name}" for model in OURS for name in (*QWEN, *controls)]
    tiles = [f"llava-v1.6-vicuna-7b_{b}pct_{n}" for b in ("033", "011") for n in (*LLAVA[3:], *controls)]
    tiles = [stem for stem in tiles if "downsample" not in stem]  # not defined for images in tiles
    unpruned_and_blind = ["llava-1.5-7b_576_unpruned", "llava-1.5-7b_000_control-blind"]
    whole = ("qwen2.5-vl-7b", *OURS, "llava-v1.6-vicuna-7b")
    unpruned_and_blind += [f"{model}_{row}" for model in whole for row in ("100pct_unpruned", "000pct_control-blind")]
    assert list(ROWS) == sorted([*llava, *qwen, *tiles, *unpruned_and_blind])
    assert [path.name for path in FILES] == sorted(f"{stem}.yaml" for stem in ROWS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_is_its_rows_rendering(path: Path) -> None:
    rendered = render(ROWS[path.stem], Path("model_configs"), "task_configs")
    assert path.read_text(encoding="utf-8") == rendered, "run `lmms-prune configs`"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_can_be_run_and_keeps_its_budget(path: Path) -> None:
    (run,) = read(path)
    checked = check(run)
    assert checked.problems == []
    assert checked.percent is not None
    row, table = ROWS[path.stem], TABLES[ROWS[path.stem].model]
    assert checked.arguments is not None
    assert (checked.arguments.schedule, checked.arguments.seed) == (Schedule.parse(row.text), row.seed)
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (settings["tasks"], settings["output_path"], settings["log_samples"]) == (
        table.tasks,
        f"results/{path.stem}",
        True,
    )


def test_the_exact_counts_give_the_published_averages() -> None:
    for budget, averages in AVERAGES.items():
        for name, average in averages.items():
            row = ROWS[f"llava-1.5-7b_{budget}_{name}"]
            assert Schedule.parse(row.text).avg_visual_tokens(32, [576]) == average, name


def test_a_row_whose_settings_the_paper_does_not_state_says_so() -> None:
    unstated = {stem for stem, row in ROWS.items() if "not stated by the paper" in row.settings}
    assert unstated == {f"llava-1.5-7b_{b}_{name}" for b in ("192", "064") for name in ("pdrop", "sparsevlm", "vtw")}
    # All others are presets that the paper or its authors' code print, but for the controls and other models' rows.
    for stem, row in ROWS.items():
        ours = row.control or TABLES[row.model].like
        assert ours or row.schedule in PRESETS or row.schedule == "none", stem


@pytest.mark.parametrize(("model", "depth"), OURS.items())
def test_schedules_for_a_model_that_the_paper_did_not_evaluate_say_so(model: str, depth: int) -> None:
    rows = {row.name: row for row in ROWS.values() if row.model == model and row.name in QWEN}
    assert set(rows) == set(QWEN)
    for name, row in rows.items():
        printed = Schedule.parse(PRESETS[f"{name.rstrip('-012')}-50pct"]).stages
        layers = [stage.layer for stage in Schedule.parse(row.text).stages]
        assert layers == [round(stage.layer * depth / 28) for stage in printed], "Qwen2.5-VL-7B has 28 layers"
        assert [stage.keep for stage in Schedule.parse(row.text).stages] == [stage.keep for stage in printed]
        text = (FOLDER / f"{row.stem}.yaml").read_text(encoding="utf-8")
        comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
        assert "this project's row, not arXiv 2512.07580's" in comments
        assert "not the paper's, which did not evaluate this model: Table 4's" in comments


def test_llava_next_has_the_shares_of_llavas_rows_with_the_padding_that_papers_keep() -> None:
    rows = [row for row in ROWS.values() if row.model == "llava-v1.6-vicuna-7b"]
    for row in rows:
        settings = yaml.safe_load((FOLDER / f"{row.stem}.yaml").read_text(encoding="utf-8"))
        assert settings["model_args"]["unpad"] is False
        if not row.control and row.name != "unpruned":
            tokens = {"33%": "192", "11%": "64"}[row.budget]
            assert Schedule.parse(row.text) == Schedule.parse(PRESETS[f"{row.name.rstrip('-012')}-{tokens}"])
            assert "not the paper's, which did not evaluate this model: Table 5's" in row.settings


def test_layers_are_scaled_to_another_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = architecture("qwen2-vl-7b")
    monkeypatch.setattr(
        "lmms_prune.configs.table.architecture",
        lambda model: replace(sizes, layers=36) if model == "qwen2-vl-7b" else architecture(model),
    )
    row = _scaled(TABLES["qwen2-vl-7b"], "dart+vtw")
    assert row.text == "dart@3:0.49,vtw@33"
    assert "its layers scaled from 28 to 36" in row.settings


def test_llavas_dart_is_the_one_of_the_authors_scripts_and_the_file_says_so() -> None:
    """The default order of DART's pivots keeps other tokens than the authors' code; LLaVA's rows stand for that code."""
    rows = [row for row in ROWS.values() if row.name.startswith("dart")]
    assert len(rows) == 35
    for row in rows:
        first = Schedule.parse(row.text).stages[0]
        is_scripts = row.model == "llava-1.5-7b"
        assert first.options == ((("order", "reference"),) if is_scripts else ()), row.stem
        assert ("order=reference" in row.settings) == is_scripts, row.stem


def test_a_row_that_draws_at_random_has_three_seeds_and_they_are_one_row_of_the_leaderboard() -> None:
    drawn = [row for row in ROWS.values() if "random" in row.text and not row.control]
    assert len(drawn) == 3 * (8 + 2 + 2 + 6)  # the paper's, and ours for Qwen2-VL, Qwen3-VL and LLaVA-NeXT
    by_row: dict[tuple[str, str, str], list[int]] = {}
    for row in drawn:
        by_row.setdefault((row.model, row.budget, row.text), []).append(row.seed)
        assert row.name.endswith(f"+random-{row.seed}")
        assert "seeds 0 to 2 are 3 files" in row.settings
    assert list(by_row.values()) == [[0, 1, 2]] * 18
    # Files of one row differ in seed, name and output only, so that the leaderboard pools them: mean ± sd.
    texts = [FOLDER / f"llava-1.5-7b_064_dart+random-{seed}.yaml" for seed in range(3)]
    settings = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in texts]
    for read_settings in settings:
        del read_settings["output_path"], read_settings["model_args"]["seed"]
    assert settings[0] == settings[1] == settings[2]


def test_llava_is_evaluated_as_the_paper_did() -> None:
    for path in FILES:
        arguments = yaml.safe_load(path.read_text(encoding="utf-8"))["model_args"]
        own = {name: arguments.get(name) for name in ("positions", "prompt", "image_aspect")}
        llava = {"positions": "compact", "prompt": "vicuna", "image_aspect": "pad"}
        assert own == (llava if path.stem.startswith("llava-1.5") else dict.fromkeys(own)), path


def test_controls_meet_the_budget_of_the_rows_they_are_compared_with() -> None:
    """Pooling and downsampling keep whole grids, so their actual budget follows from their own rule."""
    side = 24
    for stem, row in ROWS.items():
        if not row.control or row.model != "llava-1.5-7b" or row.name == "blind":
            continue
        (stage,) = Schedule.parse(row.text).stages
        (asked,) = stage.requested([side * side])
        rows, columns = grid_within(side, side, asked) if stage.spec.at_most else (asked, 1)
        assert rows * columns == asked, stem
        assert abs(asked - int(row.budget[:-1])) <= 0.05 * asked
    seeds = [row.seed for row in ROWS.values() if row.name.startswith("random-")]
    assert seeds == (len(TABLES) + 2) * list(RANDOM_SEEDS), "LLaVA and LLaVA-NeXT have two budgets"
