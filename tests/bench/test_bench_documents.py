"""``lmms-prune bench --tasks``: real documents are timed, and the paper's Table 3 stands beside what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from built import Built, Mirror
from forking import Forking
from typer.testing import CliRunner

from lmms_prune.bench.documents import document_prompts, evaluated_model
from lmms_prune.bench.models import BenchError
from lmms_prune.bench.schedules import time_documents
from lmms_prune.cli import app
from lmms_prune.demo.checkpoints import build_llava
from lmms_prune.efficiency.cost import kv_bytes, prefill_flops
from lmms_prune.harness.documents import Document
from lmms_prune.models.architectures import architecture, from_config
from lmms_prune.schedule import Schedule

PAPER = ("fastv-192-measured", "dart-64-measured", "dart+random-192-release")


@pytest.fixture(scope="module")
def seven(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow model with the layers and the image tokens of LLaVA-1.5-7B, under its name."""
    folder = tmp_path_factory.mktemp("named") / "llava-1.5-7b"
    folder.symlink_to(built.folder("seven", build_llava, layers=32, image_size=336), target_is_directory=True)
    return folder


@pytest.mark.slow
def test_table_3_beside_the_paper(seven: Path, mirror: Mirror, forking: Forking) -> None:
    command = ["bench", *PAPER, "--model", str(seven), "--tasks", "textvqa_val", "--limit", "2", "--repeats", "2"]
    done = forking.run("lmms-prune", *command, "--json", cwd=mirror(rows=8))
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout.splitlines()[-1])
    assert [run["schedule"] for run in printed["runs"]] == ["none", *(str(Schedule.parse(name)) for name in PAPER)]
    assert {run["case"]["source"] for run in printed["runs"]} == {"2 documents of textvqa_val"}
    assert [(row["printed"]["name"], row["printed"]["budget"]) for row in printed["paper"]] == [
        *(("unpruned", ""), ("FastV", "192"), ("DART", "64"), ("DART+Random", "192"))
    ]
    model = architecture(str(seven))
    for run, row in zip(printed["runs"], printed["paper"], strict=True):
        lengths = [n + run["case"]["text_tokens"] for n in Schedule.parse(run["schedule"]).layer_counts(32, [576])]
        assert row["tokens"] == run["avg_visual_tokens"]
        # The number of text tokens is a rounded average.
        assert row["tflops"] == pytest.approx(prefill_flops(model, lengths) / 1e12, rel=0.01)
        assert row["mib"] == pytest.approx(sum(kv_bytes(model, lengths)) / 2**20, rel=0.01)
        assert row["cuda_ms"] == pytest.approx(1e3 * (run["parts"]["selection"] + run["parts"]["prefill"]))
        assert 0 < row["cuda_ms"] < row["latency_ms"] == 1e3 * run["seconds"]
        assert row["acc"] is None


@pytest.mark.slow
def test_the_table_has_the_accuracy_of_finished_evaluations(
    seven: Path, mirror: Mirror, forking: Forking, tmp_path: Path
) -> None:
    where: dict[str, Any] = {"cwd": mirror(rows=8)}
    arguments = f"pretrained={seven},dtype=float32,device=cpu,schedule={PAPER[1]}"
    evaluation = ["--model", "llava_pruned", "--model_args", arguments, "--tasks", "textvqa_val", "--limit", "2"]
    done = forking.run("lmms-eval", *evaluation, "--log_samples", "--output_path", str(tmp_path), **where)
    assert done.returncode == 0, done.stderr
    command = ["bench", PAPER[1], "--model", str(seven), "--tasks", "textvqa_val", "--limit", "1", "--repeats", "2"]
    done = forking.run("lmms-prune", *command, "--new-tokens", "1", "--results", str(tmp_path), "--json", **where)
    assert done.returncode == 0, done.stderr
    unpruned, dart = json.loads(done.stdout.splitlines()[-1])["paper"]
    [results] = tmp_path.rglob("*_results.json")
    score = json.loads(results.read_text())["results"]["textvqa_val"]["exact_match,none"]
    assert (unpruned["acc"], dart["acc"]) == (None, pytest.approx(100 * score))
    done = forking.run("lmms-prune", *command, "--new-tokens", "1", **where)
    assert "Table 3 of arXiv 2512.07580" in done.stdout
    assert "DART 64" in done.stdout
    assert "one A6000, batch 1" in done.stdout
    done = forking.run("lmms-prune", "leaderboard", str(tmp_path), "--format", "markdown", **where)
    assert "Table 3 of arXiv 2512.07580" in done.stdout, done.stdout + done.stderr
    [line] = [line for line in done.stdout.splitlines() if "| DART 64 |" in line and "2.44" in line]
    assert "| 70 | 64 |" in line  # measured, and nominal


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_answer_is_as_long_as_the_unpruned_models(
    built: Built, document_of: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = evaluated_model(str(built.checkpoint(family)), "fp32", "cpu", "seed=3")
    documents = [document_of("What is it?"), document_of("Which of the words on the sign is the longest?")]
    own = document_prompts(wrapper, documents, None)
    assert [prompt.options["samples"] for prompt in own] == [["drawn/test/0"], ["drawn/test/0"]]
    assert [prompt.options["seed"] for prompt in own] == [3, 3]
    assert all(1 <= prompt.new_tokens <= 5 for prompt in own)
    forced = document_prompts(wrapper, documents, 3)
    assert [prompt.new_tokens for prompt in forced] == [3, 3]
    none, pruned = time_documents(wrapper.model, [Schedule.parse("random@2:0.5")], forced, "two drawn ones", 2)
    assert str(none.case).startswith("two drawn ones, one at a time: on average ")
    assert none.case.new_tokens == 3
    sizes = from_config(wrapper.model.config.to_dict(), family).in_dtype("float32")
    counts = [prompt.inputs["input_ids"].shape[1] for prompt in forced]
    full = [prefill_flops(sizes, [count] * sizes.layers) for count in counts]
    assert none.prefill_tflops == pytest.approx(sum(full) / 2e12)
    assert pruned.prefill_tflops < none.prefill_tflops
    assert (
        pruned.kv_mib
        < none.kv_mib
        == pytest.approx(sum(sum(kv_bytes(sizes, [count] * sizes.layers)) for count in counts) / 2 / 2**20)
    )
    assert pruned.ideal_speedup > 1
    text = document_of("What?", image=False)
    with pytest.raises(BenchError, match="no document of them has an image"):
        document_prompts(wrapper, [text], None)
    assert torch.is_tensor(own[0].inputs["input_ids"])


@pytest.fixture
def document_of() -> Any:
    from PIL import Image

    def made(question: str, image: bool = True) -> Document:
        parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
        if image:
            parts.insert(0, {"type": "image", "url": Image.effect_noise((140, 112), 90).convert("RGB")})
        messages = [{"role": "user", "content": parts}]
        return Document("drawn", "test", 0, {}, "yes", messages, {"max_new_tokens": 5, "until": ["\n\n"]})

    return made


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--arch", "llava-1.5-7b", "--tasks", "pope"), "bench --arch llava-1.5-7b: with --tasks, a document needs"),
        (
            ("--model", "x", "--tasks", "pope", "--batch-size", "8"),
            "bench --batch-size 8: with --tasks, documents have their own",
        ),
        (("--model", "x", "--tasks", "pope", "--text-tokens", "8"), "bench --text-tokens 8: with --tasks"),
        (("--model", "x", "--limit", "8"), "bench --limit: it is about the documents of --tasks"),
        (("--model", "x", "--model-args", "seed=1"), "--model-args seed=…: without a task, only revision"),
        (("--model", "x", "--results", "."), "bench --results: it is about the documents of --tasks"),
        (("--model", "x", "--tasks", "pope", "--results", "nowhere"), "--results nowhere: no such file or folder."),
        (("--model", "x", "--tasks", "pope", "--model-args", "dtype=float32"), "has the option --dtype for it"),
        (("--model", "x", "--tasks", "pope"), "pretrained=x is no checkpoint"),
    ],
)
def test_bad_requests_are_refused(options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "vtw@4", *options])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
