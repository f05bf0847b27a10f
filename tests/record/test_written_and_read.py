"""Records are read as they were written: by this version, and by versions of before, whose files lie in ``old/``."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.flips import flips, read_answers
from lmms_prune.leaderboard.formats import described
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.record.accounting import OLD_NAMES, TokenAccounting, TokenTotals
from lmms_prune.record.averages import TaskAverages
from lmms_prune.record.bitmaps import decode
from lmms_prune.record.information import InformationError, Store
from lmms_prune.record.results import ResultsError, read_results_file
from lmms_prune.record.run import RunReport, read_settings, settings_text

OLD = Path(__file__).with_name("old")
"""Evaluations of the demo's LLaVA on three questions, written by the last version that had the old names."""
MERGED = OLD / "tome@2-0.4" / "20261129_120001_results.json"


def old_report() -> RunReport:
    content = read_results_file(MERGED)
    assert content is not None
    report = RunReport.of_results(content)
    assert report is not None
    return report


def old_samples(results: Path) -> list[dict[str, Any]]:
    path = results.with_name(results.name.replace("_results.json", "_samples_gqa.jsonl"))
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_old_report_is_read_under_the_new_names() -> None:
    report = old_report()
    assert (report.schedule, report.settings["pretrained"]) == ("tome@2:0.4", "weights/tiny-llava")
    assert (report.settings["image_aspect"], report.settings["chat_template"]) == ("pad", "None")
    assert report.provenance.versions["lmms-eval"] == "0.7.3"
    assert (report.provenance.code, report.provenance.commit) == ("a828e313cc6dc728", None)
    assert (report.circumstances.batch_size, report.circumstances.largest_batch) == (8, 8)
    assert 0 <= (report.circumstances.other_load or 0) <= 1
    averages, task = report.averages, report.tasks["gqa"]
    assert averages is not None
    assert averages.avg_visual_tokens == pytest.approx((2 * 144 + 10 * 58) / 12)
    assert averages.encoder_tflops == task.encoder_tflops == 0.000274991616
    # Records of before have no original tokens of a task: those of the first layer stand for them.
    assert (task.original_visual_tokens, task.samples, task.with_image) == (144, 3, 3)
    assert report.facts["batch_size"] == "8"
    assert {"device", "attention", "dtype", "torch", "machine", "threads", "processes"} <= set(report.facts)


def test_old_token_accounting_is_read_under_the_new_names() -> None:
    entry = old_samples(MERGED)[0]["token_counts"][0]
    assert {"tower_flops", "kept_places"} <= set(entry)
    accounting = TokenAccounting.read(entry)
    assert accounting is not None
    assert accounting.encoder_flops == entry["tower_flops"] > 0
    [[bitmap]] = accounting.token_bitmaps
    assert [bitmap] == entry["kept_places"][0]
    assert int(decode(bitmap, accounting.visual_grids[0]).sum()) == accounting.kept_visual_tokens[0] == 58
    assert not accounting.unpruned


def written_anew(folder: Path) -> Path:
    """A copy of the old files, as this version writes them."""
    for path in Path(copytree(OLD, folder)).glob("*/*"):
        if path.suffix == ".json":
            content = json.loads(path.read_text("utf-8"))
            report = RunReport.of_results(content)
            assert report is not None
            content["config"]["batch_sizes"] = [report.to_dict()]
            path.write_text(json.dumps(content), "utf-8")
        else:
            lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for line in lines:
                accounting = TokenAccounting.read(line["token_counts"][0])
                assert accounting is not None
                line["token_counts"] = [accounting.to_dict()]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


@pytest.mark.parametrize("samples", [True, False])
def test_a_table_of_old_files_is_that_of_the_same_files_written_anew(tmp_path: Path, samples: bool) -> None:
    boards = []
    for folder in (Path(copytree(OLD, tmp_path / "a" / "results")), written_anew(tmp_path / "b" / "results")):
        text = "".join(path.read_text("utf-8") for path in folder.glob("*/*"))
        assert any(f'"{name}"' in text for name in (*OLD_NAMES.values(), "identity")) == (folder.parts[-2] == "a")
        if not samples:
            for path in folder.glob("*/*.jsonl"):
                path.unlink()
        found = described(leaderboard(read_results([folder]), resamples=200))
        boards.append(json.loads(json.dumps(found).replace(str(folder), "")))
    assert boards[0] == boards[1]
    assert boards[0]["problems"] == []
    rows = {row["label"]: row for budget in boards[0]["models"][0]["budgets"] for row in budget["rows"]}
    assert rows["tome@2:0.4"]["cost"]["avg_visual_tokens"] == pytest.approx((2 * 144 + 10 * 58) / 12)
    assert rows["tome@2:0.4"]["cost"]["encoder_tflops"] == pytest.approx(0.000274991616)


def test_old_bitmaps_are_drawn(tmp_path: Path) -> None:
    """In the answers that changed; here the unpruned one is made wrong."""
    folder = Path(copytree(OLD, tmp_path / "results"))
    before = next((folder / "none").glob("*.jsonl"))
    before.write_text(before.read_text("utf-8").replace('"exact_match": 1.0', '"exact_match": 0.0', 1), "utf-8")
    after = MERGED.with_name(MERGED.name.replace("_results.json", "_samples_gqa.jsonl"))
    [flip] = flips(*(read_answers(path, TASKS["gqa"]) for path in (before, after)))
    assert flip.grids == ((12, 12),)
    assert int(decode(flip.bitmaps[0][0], flip.grids[0]).sum()) == flip.kept[0] == 58


def test_what_is_written_is_read_back_and_has_no_old_name() -> None:
    report = replace(old_report(), resumed=2, cut_images=1, beyond_positions=3, unpruned_samples=4)
    entry = json.loads(json.dumps(report.to_dict()))
    assert RunReport.read(entry) == report
    names = {*entry, *entry["averages"], *entry["tasks"]["gqa"]}
    accounting = TokenAccounting.read(old_samples(MERGED)[1]["token_counts"][0])
    assert accounting is not None
    entry = json.loads(json.dumps(accounting.to_dict()))
    assert TokenAccounting.read(entry) == accounting
    assert not {*names, *entry} & {*OLD_NAMES.values(), "identity"}


def test_a_large_count_is_read_exactly() -> None:
    entry = {"visual_tokens": 1, "avg_visual_tokens": 1.0, "kv_bytes": 2**53 + 1, "prefill_flops": 10**17 + 1}
    accounting = TokenAccounting.read(entry)
    assert accounting is not None
    assert (accounting.kv_bytes, accounting.prefill_flops) == (2**53 + 1, 10**17 + 1)


@pytest.mark.parametrize("entry", [None, {}, {"input_tokens": 3, "output_tokens": 1, "reasoning_tokens": None}])
def test_what_another_model_counts_is_no_token_accounting(entry: dict[str, Any] | None) -> None:
    assert TokenAccounting.read(entry) is None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"kv_bytes": -1}, ValueError, "kv_bytes: -1, but must be finite and at least 0"),
        ({"tower_flops": float("nan")}, ValueError, "encoder_flops: nan"),
        ({"visual_tokens": "144"}, TypeError, "visual_tokens: '144' is not a number"),
        ({"visual_tokens": None}, KeyError, "visual_tokens"),
        ({"layer_visual_tokens": [144, 10**400]}, ValueError, "layer_visual_tokens: a count is negative or too large"),
        ({"kept_visual_tokens": [-5]}, ValueError, "kept_visual_tokens: a count is negative"),
        ({"visual_grids": [[2**63, 1]]}, ValueError, "visual_grids: a count is negative or too large"),
        ({"layer_kv_bytes": [float("nan")]}, ValueError, "NaN"),
    ],
)
def test_a_count_that_cannot_be_is_named(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    entry = {**old_samples(MERGED)[0]["token_counts"][0], **changed}
    with pytest.raises(error, match=message):
        TokenAccounting.read(entry)


def test_settings_in_one_text_may_end_with_a_template_that_looks_like_settings() -> None:
    settings = {"pretrained": "a=b", "seed": "3", "chat_template": "{{ x }}, seed=9, other=1"}
    assert read_settings({"settings": settings}) == settings
    read = read_settings({"identity": settings_text(settings)})
    assert (read["pretrained"], read["seed"]) == ("a=b", "3")


@pytest.mark.parametrize("entry", [{"settings": {"seed": "1"}}, {"settings": 3}, {"identity": "seed=1"}])
def test_settings_that_name_no_checkpoint_are_damaged(entry: dict[str, Any]) -> None:
    with pytest.raises(ResultsError, match=r"damaged: its (settings are|identity is) "):
        read_settings(entry)


def test_measurements_whose_settings_are_one_text_go_on(tmp_path: Path) -> None:
    settings = {"pretrained": "weights", "schedule": "none", "seed": "0", "system_prompt": "Be brief, style=plain, x=1"}
    Store.open(tmp_path, {"model": "m", "identity": settings_text(settings), "layers": [0]})
    (tmp_path / "0.parquet").touch()
    Store.open(tmp_path, {"model": "m", "settings": settings, "layers": [0]})
    with pytest.raises(
        InformationError, match=r"holds measurements with setting seed '0', not '1'; give another --out"
    ):
        Store.open(tmp_path, {"model": "m", "settings": {**settings, "seed": "1"}, "layers": [0]})
    about = tmp_path / "information.json"
    about.write_text(json.dumps({"model": "m", "identity": "schedule=none", "layers": [0]}))
    with pytest.raises(InformationError, match=r"information\.json: damaged: its identity is 'schedule=none'"):
        Store.open(tmp_path, {"model": "m", "settings": settings, "layers": [0]})


def test_a_tasks_sums_are_those_of_its_samples() -> None:
    """Also where some samples have no image, of which all averages of visual tokens leave them out."""
    pictured = TokenAccounting.read(old_samples(MERGED)[0]["token_counts"][0])
    assert pictured is not None
    nothing = {"visual_tokens": 0, "avg_visual_tokens": 0.0, "layer_visual_tokens": (0,) * 12}
    some = [pictured, replace(pictured, recycled_visual_tokens=(0,), encoder_flops=0, **nothing)]
    task = TaskAverages.of_task(some, [1000, 1000], [10, 10])
    assert (task.samples, task.with_image, task.avg_visual_tokens) == (2, 1, pictured.avg_visual_tokens)
    sums, expected = task.totals, TokenTotals.of(some)
    for name in vars(expected):
        assert getattr(sums, name) == pytest.approx(getattr(expected, name)), name


def test_without_padding_the_share_of_padding_is_zero() -> None:
    """Means of three samples' tokens are rounded, and their sum was at times above what was executed."""
    pictured = TokenAccounting.read(old_samples(MERGED)[0]["token_counts"][0])
    assert pictured is not None
    shares = []
    for text in range(60, 90):
        visual = [tuple((layer * (text + more)) % 50 for layer in range(12)) for more in (0, 7, 9)]
        samples = [replace(pictured, text_tokens=text + len(v) % 5, layer_visual_tokens=v) for v in visual]
        samples[0] = replace(samples[0], text_tokens=text)
        executed = [sample.text_tokens * 12 + sum(sample.layer_visual_tokens) for sample in samples]
        shares.append(TaskAverages.of_task(samples, executed, [10] * 3).padding)
    assert shares == [0] * 30
