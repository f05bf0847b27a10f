"""The commands that load a checkpoint, as processes, with an adapter: all load as an evaluation does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import save_adapter, save_merged
from built import Checkpoint, Mirror
from forking import Forking
from peft import LoraConfig

from lmms_prune.certificate.cells import FEWEST_LAYERS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(checkpoint: Checkpoint) -> Path:
    return checkpoint("llava")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "lora", config)


@pytest.fixture
def run(mirror: Mirror, forking: Forking) -> Callable[..., str]:
    def call(*command: object, code: int = 0) -> str:
        done = forking.run(*map(str, command), cwd=mirror(rows=12))
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return call


def options(base: Path, adapter: Path | None) -> list[str]:
    arguments = "device=cpu,dtype=float32" + (f",peft={adapter}" if adapter else "")
    return ["--model", str(base), "--model-args", arguments]


def test_doctor(run: Callable[..., str], checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = checkpoint("llava", layers=FEWEST_LAYERS)
    adapter = save_adapter(base, tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj", "k_proj", "down_proj"]))
    command = ["lmms-prune", "doctor", "--model", base, "--model-args", f"peft={adapter}", "--device", "cpu"]
    printed = json.loads(run(*command, "--methods", "fastv", "--attention", "sdpa", "--dtype", "float32", "--json"))
    assert printed["title"] == f"certificate of {base} with peft={adapter}"
    assert printed["failures"] == []
    assert printed["cells"]
    assert "the command has the option --dtype for it" in run(
        *("lmms-prune", "doctor", "--model", base, "--model-args", "dtype=float32"), code=2
    )
    assert "give --model too" in run("lmms-prune", "doctor", "--model-args", f"peft={adapter}", code=2)
    assert "without a task, only revision, device_map" in run(
        *("lmms-prune", "doctor", "--model", base, "--model-args", "prompt=vicuna"), code=2
    )


def test_bench(run: Callable[..., str], base: Path, adapter: Path) -> None:
    command = ["lmms-prune", "bench", "dart@2:0.5", "--model", base, "--new-tokens", "2", "--repeats", "2", "--json"]
    printed = json.loads(run(*command, "--model-args", f"peft={adapter}"))
    assert f"peft={adapter}" in printed["model"]
    documents = json.loads(run(*command, "--model-args", f"peft={adapter}", "--tasks", "pope", "--limit", "1"))
    assert documents["model"]
    error = run("lmms-prune", "bench", "--arch", "llava-1.5-7b", "--model-args", "peft=x", code=2)
    assert "bench --model-args peft=…: it is about a checkpoint" in error


def test_show(run: Callable[..., str], base: Path, adapter: Path, tmp_path: Path) -> None:
    """The answer is that of the merged checkpoint, and not that of the base."""
    merged = save_merged(base, adapter, tmp_path / "merged")
    image = Path(__file__).parents[1] / "docs" / "form.png"
    outputs = []
    for name, (checkpoint, lora) in {"lora": (base, adapter), "merged": (merged, None), "base": (base, None)}.items():
        command = ["lmms-prune", "show", image, *options(checkpoint, lora), "--question", "What is the city?"]
        run(*command, "--schedule", "dart@2:0.5", "--out", tmp_path / f"{name}.png")
        outputs.append((tmp_path / f"{name}.png").read_bytes())
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_information(run: Callable[..., str], base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "information"
    command = ["lmms-prune", "information", *options(base, adapter), "--tasks", "pope", "--limit", "1", "--out", out]
    run(*command)
    settings = json.loads((out / "information.json").read_text())["settings"]
    assert settings["peft"] == str(adapter)
    # What was measured with one adapter is not continued without it.
    error = run(*[options(base, None)[3] if word == command[5] else word for word in command], code=2)
    assert f"holds measurements with setting peft '{adapter}', not None; give another --out." in " ".join(error.split())


def test_calibrate(run: Callable[..., str], forking: Forking, base: Path, adapter: Path, tmp_path: Path) -> None:
    command = [
        "lmms-prune",
        "calibrate",
        *options(base, adapter),
        "--tasks",
        "pope",
        "--budget",
        "0.5",
        "--methods",
        "dart",
    ]
    command += ["--limit", "2", "--out", tmp_path / "out", "--json", "--launch", forking.launch]
    printed = json.loads(run(*command).strip().splitlines()[-1])
    run("lmms-prune", "check", printed["yaml"])
    assert f"peft={adapter}" in Path(printed["yaml"]).read_text()
    model, arguments = "llava_pruned", f"pretrained={base},{options(base, adapter)[3]}"
    line = ("--tasks", "pope", "--limit", "2", "--output_path", tmp_path / "auto")
    run("lmms-eval", "--model", model, "--model_args", f"{arguments},schedule=auto,budget=0.5", *line)
    [results] = [path for path in (tmp_path / "auto").rglob("*_results.json")]
    recorded = json.loads(results.read_text())["config"]["batch_sizes"][0]
    assert recorded["schedule"] == printed["schedule"]
    assert recorded["settings"]["peft_sha256"]
    # The base has no calibration of its own.
    text = f"pretrained={base},{options(base, None)[3]}"
    assert "was not yet calibrated" in run(
        *("lmms-eval", "--model", model, "--model_args", f"{text},schedule=auto,budget=0.5", "--tasks", "pope"), code=2
    )
