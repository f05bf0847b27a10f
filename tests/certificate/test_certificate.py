"""The matrix is complete, a covering choice of its cells passes, and every check detects a defect."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from typer.testing import CliRunner

from lmms_prune.certificate.case import Case
from lmms_prune.certificate.cells import (
    ATTENTIONS,
    BATCHES,
    DTYPES,
    FEWEST_LAYERS,
    POSITIONS,
    STAGE_LAYERS,
    STAGES,
    Cell,
    covering,
    enumerate_cells,
    impossible,
    schedule,
)
from lmms_prune.certificate.checks import CHECKS
from lmms_prune.certificate.models import Models, random_checkpoints
from lmms_prune.certificate.runner import Certificate, certify, examine
from lmms_prune.cli import app
from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES
from lmms_prune.schedule import Schedule


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Models]]:
    with random_checkpoints() as folders:
        yield {family: Models(folder, "cpu") for family, folder in folders.items()}


def test_every_cell_is_run_or_has_a_reason() -> None:
    cells = list(enumerate_cells(tuple(FAMILIES)))
    axes = (FAMILIES, DTYPES, ATTENTIONS, POSITIONS, METHODS, STAGE_LAYERS, STAGES, BATCHES)
    product = 1
    for axis in axes:
        product *= len(axis)
    assert len(set(cells)) == len(cells) == product
    certificate = Certificate()
    possible = certificate.possible(cells)
    assert len(possible) + sum(certificate.skipped.values()) == len(cells)
    possible_methods = {cell.method for cell in possible}
    assert possible_methods == {name for name, spec in METHODS.items() if spec.ready}


@pytest.mark.parametrize("layers", [FEWEST_LAYERS, 5, 28, 32])
def test_a_cells_schedule_has_the_method_at_its_place(layers: int) -> None:
    layer_of = {"0": 0, "1": 1, "middle": layers // 2, "last": layers - 1}
    cells = [cell for cell in enumerate_cells(tuple(FAMILIES), dtypes=["float32"]) if not impossible(cell)]
    seen: dict[tuple, Schedule] = {}
    for cell in cells:
        key = (cell.method, cell.stage_layer, cell.stages)
        if key in seen:
            continue
        cell_schedule = seen[key] = schedule(cell, layers)
        cell_schedule.check(layers, [36, 9])
        assert Schedule.parse(str(cell_schedule)) == cell_schedule
        assert len(cell_schedule.stages) == cell.stages
        assert cell.method in [
            stage.method for stage in cell_schedule.stages if stage.layer == layer_of[cell.stage_layer]
        ]


def test_a_covering_choice_covers_all_pairs() -> None:
    def pairs(cell: Cell) -> set:
        return set(combinations([(field.name, getattr(cell, field.name)) for field in fields(cell)], 2))

    cells = Certificate().possible(enumerate_cells(tuple(FAMILIES), ["vtw", "dart", "downsample", "pool"]))
    chosen = covering(cells)
    assert set().union(*map(pairs, chosen)) == set().union(*map(pairs, cells))
    assert len(chosen) < len(cells) / 20


@pytest.mark.slow
def test_a_covering_choice_of_cells_holds(models: dict[str, Models]) -> None:
    certificate = Certificate()
    cells = covering(certificate.possible(enumerate_cells(tuple(FAMILIES))))
    certify(cells, models, certificate)
    assert certificate.failures == []
    assert sum(certificate.cells.values()) == len(cells)
    # Only the known exceptions are skipped; every other check was really made and passed.
    singles = sum(cell.batch == "1" for cell in cells)
    dropping = sum(METHODS[cell.method].drops_all for cell in cells)
    passed = Counter[str]()
    for counts in certificate.passed.values():
        passed.update(counts)
    expected = dict.fromkeys(CHECKS, len(cells)) | dict.fromkeys(("alone", "permuted"), len(cells) - singles)
    assert dict(passed) == expected | {"keep-all": len(cells) - dropping}


def case_of(models: dict[str, Models], text: str, family: str = "llava", positions: str = "original") -> Case:
    return Case(models[family].get("float32", "sdpa"), Schedule.parse(text), positions)


def failing(case: Case, batch: str = "ragged") -> set[str]:
    return {result.check for result in examine(case, batch) if result.reason}


class TestADefectShows:
    """Each check fails if the property that it tests is violated."""

    def test_a_mask_that_is_left_out(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("prefill", "segment"):
            monkeypatch.setattr(f"lmms_prune.pruning.{module}.attention_mask", lambda *_: None)
        assert {"reference", "alone"} <= failing(case_of(models, "random@1:0.5"))

    def test_rotary_tables_of_other_tokens(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        def first_ones(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            return table[..., : index.shape[1], :].expand(*table.shape[:-3], len(index), -1, -1)

        monkeypatch.setattr("lmms_prune.pruning.prefill.gather_rotary", first_ones)
        assert "reference" in failing(case_of(models, "pool@2:0.5"))

    def test_positions_that_skip_one(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        from lmms_prune.pruning.segment import Segment

        original = Segment.begin_step

        def begin_step(self: Segment, *arguments: Any) -> None:
            longer = _longer(self)
            original(longer, *arguments)
            self.decode_mask, self.decode_rotary = longer.decode_mask, longer.decode_rotary

        monkeypatch.setattr(Segment, "begin_step", begin_step)
        assert {"reference", "positions"} <= failing(case_of(models, "random@1:0.5", positions="compact"))

    def test_another_order(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        import lmms_prune.pruning.layout
        from lmms_prune.pruning.ragged import Packing, pack

        def reversed_pack(keep: torch.Tensor, lengths: list[int], pad: Any) -> Packing:
            packing = pack(keep, lengths, pad)
            if pad == "right":
                return packing
            return Packing(packing.index.flip(1), packing.valid, packing.moved, packing.padded)

        monkeypatch.setattr(lmms_prune.pruning.layout, "pack", reversed_pack)
        assert "order" in failing(case_of(models, "random@1:0.5"), "1")

    def test_a_cache_that_is_not_the_trace(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lmms_prune.pruning.prefill.crop_caches", lambda *_: None)
        assert "cache" in failing(case_of(models, "mustdrop@2:0.5"))

    def test_keeping_all_that_changes_something(
        self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lmms_prune.pruning.prefill import Prefill

        monkeypatch.setattr(Prefill, "_act", lambda self, acting, state, segment, original: (state.hidden + 1, segment))
        assert "keep-all" in failing(case_of(models, "random@1:0.5"))

    def test_draws_that_depend_on_the_batch(self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch) -> None:
        from lmms_prune.methods.view import TokenView

        def by_request_index(self: TokenView) -> torch.Tensor:
            torch.manual_seed(0)
            return torch.rand(self.valid.shape, dtype=torch.float64)

        monkeypatch.setattr(TokenView, "uniform", by_request_index)
        assert failing(case_of(models, "random@1:0.5"), "3") == {"alone", "permuted"}

    def test_a_trace_that_claims_pruning_which_did_not_happen(
        self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from lmms_prune.pruning.prefill import Prefill

        monkeypatch.setattr(Prefill, "_act", lambda self, acting, state, segment, original: (state.hidden, segment))
        assert "pruned" in failing(case_of(models, "random@1:0.5"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_merges_otherwise(models: dict[str, Models], monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """It fails in float32. In bfloat16 rounding may be the cause, so it is counted and compared with the reference."""
    from lmms_prune.methods.tome import ToMe

    original = ToMe.rewrite

    def alone_otherwise(self: ToMe, view: Any, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, index = original(self, view, keep)
        if len(hidden) == 1:
            hidden = hidden.clone()
            first_kept, second_kept = (int(column) for column in keep[0].nonzero()[:2])
            hidden[0, first_kept] = hidden[0, second_kept]
        return hidden, index

    monkeypatch.setattr(ToMe, "rewrite", alone_otherwise)
    case = Case(models["llava"].get(dtype, "sdpa"), Schedule.parse("tome@0:0.5"), "original")
    results = {result.check: result for result in examine(case, "3")}
    assert not results["reference"].reason
    assert bool(results["alone"].reason) == (dtype == "float32")
    assert bool(results["alone"].note) == (dtype == "bfloat16")


def _longer(segment: Any) -> Any:
    segment.lengths = segment.lengths + 1
    return segment


class TestDoctor:
    """The command ``lmms-prune doctor``."""

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])

    def test_a_checkpoint_of_the_users(self, models: dict[str, Models]) -> None:
        checkpoint = models["qwen2_5_vl"].checkpoint
        done = self.run("--model", checkpoint, "--methods", "blind", "--attention", "sdpa", "--json")
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout.splitlines()[-1])
        assert report["failures"] == []
        assert report["cells"] == report["methods"]["blind"]["cells"] == report["possible_cells"] == len(BATCHES)
        reasons = {entry["reason"]: entry["cells"] for entry in report["not_run"]}
        assert sum(reasons.values()) + report["cells"] == len(POSITIONS) * len(STAGE_LAYERS) * len(STAGES) * len(
            BATCHES
        )
        assert any("M-RoPE" in reason for reason in reasons)
        # By default a checkpoint runs in its own dtype only.
        assert "the types float16, bfloat16" in report["not_certified"]

    def test_nothing_run_is_nothing_certified(self, models: dict[str, Models], tmp_path: Path) -> None:
        folder = tmp_path / "made[" / "b]"  # must not be read as terminal markup
        shutil.copytree(models["llava"].checkpoint, folder)
        done = self.run("--model", str(folder), "--methods", "glimpseprune")
        assert done.exit_code == 1
        assert "made[/b]" in "".join(done.output.split())
        assert "not certified: none of the cells can be run" in done.output

    def test_a_model_whose_own_logits_are_not_finite(self, models: dict[str, Models], tmp_path: Path) -> None:
        """Otherwise the tolerance would be infinite and every check would pass."""
        folder = tmp_path / "made"
        shutil.copytree(models["llava"].checkpoint, folder)
        weights = load_file(folder / "model.safetensors")
        next(weight for name, weight in weights.items() if "layers.3.mlp" in name).fill_(torch.inf)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        done = self.run("--model", str(folder), "--methods", "random", "--attention", "sdpa")
        assert done.exit_code == 2
        assert "the unpruned model's own logits are not finite in float32" in done.output

    def test_a_failure_is_shown_and_ends_with_1(
        self, models: dict[str, Models], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("prefill", "segment"):
            monkeypatch.setattr(f"lmms_prune.pruning.{module}.attention_mask", lambda *_: None)
        done = self.run("--model", models["llava"].checkpoint, "--methods", "blind", "--attention", "eager")
        assert done.exit_code == 1
        assert "not certified: " in done.output
        assert "logits are off the masked reference by" in " ".join(done.output.split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--methods", "fastvv"), "'fastvv' is unknown. Did you mean 'fastv'?"),
            (("--dtype", "fp16"), "'fp16' is unknown"),
            (("--attention", "flash"), "'flash' is unknown"),
            (("--model", "/no/such/folder"), "is no checkpoint"),
        ],
    )
    def test_wrong_arguments_are_named(self, arguments: tuple[str, ...], message: str) -> None:
        done = self.run(*arguments)
        assert done.exit_code == 2
        assert message in done.output

    def test_another_architecture_is_named(self, tmp_path: Path) -> None:
        LlamaConfig().save_pretrained(tmp_path)
        done = self.run("--model", str(tmp_path))
        assert done.exit_code == 2
        assert "model type 'llama' has no image input" in done.output
