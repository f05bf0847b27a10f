"""Asking for FlashAttention: where it is there, where it is not, and where it cannot compute.

These tests install the stand-in themselves, and only where they say so; see test_flash_attention.py for its own path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flash_stand_in import ALL, HALVES, KERNEL, flash_attention, is_installed
from typer.testing import CliRunner

from lmms_prune import prune
from lmms_prune.certificate.case import Case
from lmms_prune.certificate.models import Models, random_checkpoints
from lmms_prune.certificate.prompts import BATCHES, batch
from lmms_prune.certificate.runner import examine
from lmms_prune.cli import app
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.loading import load_model
from lmms_prune.models.kernels import KERNELS
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule import Schedule

FLASH = KERNEL[2]


@pytest.fixture(scope="module")
def folders_by_family() -> Iterator[dict[str, str]]:
    with random_checkpoints() as folders:
        yield folders


@pytest.mark.core
@pytest.mark.parametrize(("version", "dtypes"), [(2, HALVES), (3, ALL)], ids=["2 in bfloat16", "3 in float32"])
def test_both_packages_in_all_dtypes(
    folders_by_family: dict[str, str], version: int, dtypes: tuple[torch.dtype, ...]
) -> None:
    with flash_attention(version, dtypes) as calls:
        for folder in folders_by_family.values():
            subject = Models(folder, "cpu").get("float32" if dtypes == ALL else "bfloat16", KERNEL[version])
            case = Case(subject, Schedule.parse("divprune@0:0.7,random@2:0.3"), "original")
            assert [result for result in examine(case, "ragged") if result.reason] == []
    assert any(call.packed for call in calls)


class TestDoctor:
    """The command ``lmms-prune doctor --attention flash_attention_2``."""

    def run(self, folder: str, *arguments: str) -> Any:
        options = ("--model", folder, "--methods", "blind", "--attention", FLASH, "--device", "cpu")
        return CliRunner().invoke(app, ["doctor", *options, *arguments])

    def test_cells_run_in_the_dtypes_of_the_kernel(self, folders_by_family: dict[str, str]) -> None:
        with flash_attention(dtypes=HALVES) as calls:
            done = self.run(folders_by_family["llava"], "--dtype", "float32,bfloat16", "--json")
        assert done.exit_code == 0, done.output
        report = json.loads(done.stdout.splitlines()[-1])
        assert calls
        assert report["failures"] == []
        assert {(limit["dtype"], limit["attention"]) for limit in report["limits"]} == {("bfloat16", FLASH)}
        reasons = {entry["reason"] for entry in report["not_run"]}
        assert f"{FLASH} computes in float16 and bfloat16 only" in reasons
        assert "the attention kernels sdpa, eager, flash_attention_3" in report["not_certified"]

    def test_a_checkpoint_in_another_dtype_is_refused(self, folders_by_family: dict[str, str]) -> None:
        with flash_attention(dtypes=HALVES):
            done = self.run(folders_by_family["llava"])
        assert done.exit_code == 2
        assert "the model is in float32; use dtype=bfloat16, or sdpa in its place" in " ".join(done.output.split())

    @pytest.mark.skipif(is_installed(), reason="flash_attn is installed")
    def test_without_the_package_the_message_says_how_to_get_it(self, folders_by_family: dict[str, str]) -> None:
        done = self.run(folders_by_family["llava"], "--dtype", "bfloat16")
        assert done.exit_code == 2
        shown = " ".join(done.output.split())
        assert f"--attention {FLASH}: {FLASH} is not available here: " in shown
        assert "doesn't seem to be installed. " in shown
        assert "(pip install flash-attn --no-build-isolation); or use sdpa in its place." in shown

    def test_a_model_on_the_cpu_is_refused(
        self, folders_by_family: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = KERNELS[FLASH]
        with flash_attention(dtypes=HALVES):
            monkeypatch.setitem(KERNELS, FLASH, real)
            done = self.run(folders_by_family["llava"], "--dtype", "bfloat16")
            monkeypatch.undo()
        assert done.exit_code == 2
        assert "needs a GPU, but the model is on the CPU; use device=cuda" in " ".join(done.output.split())


class TestLoading:
    """The argument ``attn_implementation=flash_attention_2`` of an evaluation."""

    def load(self, folder: str, **more: str) -> Any:
        given = {"pretrained": folder, "schedule": "none", "attn_implementation": FLASH, "dtype": "bfloat16", **more}
        return load_model(ModelArguments.read(given), torch.device("cpu"))

    def test_it_loads(self, folders_by_family: dict[str, str]) -> None:
        with flash_attention(dtypes=HALVES) as calls:
            model = self.load(folders_by_family["llava"])
            with torch.no_grad(), prune(model, "random@1:0.5") as trace:
                model(**batch(model, BATCHES["1"]))
        assert calls
        assert trace.rows

    @pytest.mark.skipif(is_installed(), reason="flash_attn is installed")
    def test_without_the_package_the_checkpoint_is_not_blamed(self, folders_by_family: dict[str, str]) -> None:
        with pytest.raises(UnsupportedModelError, match=f"^{FLASH} is not available here: .* or use sdpa") as raised:
            self.load(folders_by_family["llava"])
        assert "pip install flash-attn --no-build-isolation" in str(raised.value)

    def test_a_dtype_in_which_it_does_not_compute(self, folders_by_family: dict[str, str]) -> None:
        with (
            flash_attention(dtypes=HALVES),
            pytest.raises(UnsupportedModelError, match=r"computes in float16 and bfloat16 only.* use dtype=bfloat16"),
        ):
            self.load(folders_by_family["llava"], dtype="float32")

    def test_a_kernel_of_the_hub_in_its_place_is_explained(self, folders_by_family: dict[str, str]) -> None:
        """transformers takes one, if its package `kernels` is installed and flash_attn is not."""
        model = self.load(folders_by_family["llava"], attn_implementation="sdpa")
        model.model.language_model.config._attn_implementation_internal = "kernels-community/flash-attn2"
        with pytest.raises(
            UnsupportedModelError, match=r"not supported.*it is not installed: .*pip install flash-attn"
        ):
            ModelParts.of(model)
