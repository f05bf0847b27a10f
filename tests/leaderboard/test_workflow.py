"""The workflow for CI in docs/leaderboard.md, by its own lines; and from a small sweep of both families to the page."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from built import Mirror
from forking import Forking
from written import write_run

from lmms_prune.record.bitmaps import decode

PAGE = Path(__file__).parents[2] / "docs/leaderboard.md"
WEIGHTS = Path(__file__).parents[2] / "lmms_prune/demo/weights"


def workflow() -> dict[Any, Any]:
    (text,) = re.findall(r"```yaml\n(# \.github/workflows/.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return yaml.safe_load(text)


def scripts() -> list[str]:
    """What its steps run, in order."""
    (job,) = workflow()["jobs"].values()
    return [step["run"] for step in job["steps"] if "run" in step]


@pytest.fixture
def run(forking: Forking, tmp_path: Path) -> Callable[[str, Path], subprocess.CompletedProcess[str]]:
    """One step, as a runner starts it; the programs are those of this environment."""
    path = os.pathsep.join(map(str, (forking.stand_ins, Path(sys.executable).parent, os.environ["PATH"])))
    environment = {**forking.environment, "PATH": path, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}

    def step(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-e", "-c", script]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    return step


def test_the_workflow_installs_sweeps_and_gates() -> None:
    read = workflow()
    # YAML 1.1 reads the key `on` as true.
    assert read[True] == "pull_request"
    (job,) = read["jobs"].values()
    assert all({"uses", "run"} & set(step) for step in job["steps"])
    install, sweep, gate = scripts()
    assert install.startswith("pip install")
    assert sweep.startswith("lmms-prune sweep")
    assert "lmms-prune gate" in gate


@pytest.mark.parametrize(("right", "code", "said"), [(160, 0, "gate: passed"), (100, 1, "gate: failed")])
def test_the_gates_step_fails_with_the_gate_and_leaves_a_summary(
    right: int, code: int, said: str, run: Callable, tmp_path: Path
) -> None:
    values = {"textvqa_val": [1.0] * 160 + [0.0] * 40}
    write_run(tmp_path / "results" / "a", values)
    values = {"textvqa_val": [1.0] * right + [0.0] * (200 - right)}
    write_run(tmp_path / "results" / "b", values, "dart@2:0.44", tokens=33)
    done = run(scripts()[2], tmp_path)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in (tmp_path / "summary.md").read_text(encoding="utf-8"), done.stderr
    assert said in done.stdout


@pytest.mark.slow
def test_from_a_small_sweep_of_both_families_to_the_page(
    run: Callable, mirror: Mirror, forking: Forking, tmp_path: Path
) -> None:
    """The workflow's own lines on the demo's data, then the page with images, read back and opened."""
    place = tmp_path / "repository"
    place.mkdir()
    for data in mirror().iterdir():
        if data.name != "results":  # where lmms-eval leaves what it would submit, in every run there
            (place / data.name).symlink_to(data)
    _write_configs(place / "model_configs" / "my_rows")
    _, sweep, gate = scripts()
    # What evaluates is forked, too.
    done = run(f"{sweep.strip()} --launch {shlex.quote(forking.launch)}", place)
    assert done.returncode == 0, done.stderr
    # So few tokens cost these models what they can read.
    assert run(gate, place).returncode == 1
    assert "gate: failed" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    page = place / "page.html"
    done = run("lmms-prune leaderboard results --format html --images --out page.html", place)
    assert done.returncode == 0, done.stderr
    (text,) = re.findall(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"), re.DOTALL)
    said = json.loads(text)
    assert [model["title"] for model in said["models"]] == ["tiny-llava", "tiny-qwen2.5-vl"]
    assert {one["model"] for one in said["changes"]["cards"]} == {0, 1}
    for one in said["changes"]["cards"]:
        document = said["changes"]["documents"][one["document"]]
        assert all(said["images"][number].startswith("data:image/webp;base64,") for number in document["images"])
        # TextVQA's samples hold no reference; the data do.
        assert document["reference"] != "answer"
        ((grid,), ((bitmap,),)) = one["grids"], one["bitmaps"]
        assert 0 < decode(bitmap, tuple(grid)).mean() < 0.2
    for model in said["models"]:
        (command,) = model["rows"][1]["commands"]
        assert command.endswith(f"--tasks textvqa_val,ocrbench --output_path results/{model['title']}-pruned")
    _open(page)


def _write_configs(folder: Path) -> None:
    folder.mkdir(parents=True)
    families = {
        "tiny-llava": ("llava_pruned", "image_aspect=pad"),
        "tiny-qwen2.5-vl": ("qwen2_5_vl_pruned", "min_pixels=3136,max_pixels=200704"),
    }
    for name, (model, arguments) in families.items():
        for row, schedule in (("unpruned", "none"), ("pruned", "random@1:0.1")):
            given = f"pretrained={WEIGHTS / name},schedule={schedule},dtype=float32,batch_size=4,{arguments}"
            settings = {"model": model, "model_args": given, "tasks": "ocrbench,textvqa_val"}
            (folder / f"{name}-{row}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


def _open(page: Path) -> None:
    """In a browser, where there is one: no error, and the images are pictures."""
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        return
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        opened.get(page.as_uri())
        opened.execute_script("document.getElementById('tab-changes').click()")
        opened.execute_script("document.querySelectorAll('img').forEach((one) => { one.loading = 'eager'; })")
        opened.execute_async_script(
            "Promise.all([...document.querySelectorAll('img')].map((one) => one.decode())).then(arguments[0])"
        )
        assert opened.execute_script("return document.querySelectorAll('.card img').length") > 0
        assert opened.get_log("browser") == []
    finally:
        opened.quit()
