"""`lmms-prune reproduce all --models demo` through the real command: the whole chain, its page, and what goes on afterwards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmms_prune.demo.models import MODELS
from lmms_prune.reproduce.items import ITEMS

pytestmark = pytest.mark.slow
PROGRAM = str(Path(sys.executable).with_name("lmms-prune"))
CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
WORDS = ("all", "--models", "demo", "--quick")


def reproduce(environment: dict[str, str], out: Path, *words: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON and messages of the command."""
    command = [PROGRAM, "reproduce", *words, "--out", str(out), "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return done.returncode, json.loads(lines[-1]) if lines else {}, done.stderr


@pytest.fixture(scope="module")
def whole(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything, once. First as two parts, which share the work; then what collects them."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, record, messages = reproduce(environment, out, "fig10", "--models", "demo", "--quick", "--shard", "1/2")
    assert (code, record) == (0, {"shard": "1/2", "failed": []}), messages
    ready = len(list(out.glob("tiny-qwen2.5-vl/horizon/runs/*/*/sweep.json")))
    assert ready >= 30
    code, record, messages = reproduce(environment, out, *WORDS)
    assert code == 0, messages
    assert (record["missing"], record["failed"]) == ([], [])
    assert record["claims"]["reproduced"] > 10
    return out


def test_every_item_has_its_claims_with_their_marks(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    for name, item in ITEMS.items():
        (section,) = re.findall(rf'<section id="{name}">.*?</section>', page, re.DOTALL)
        assert item.title in section
        assert section.count('<td class="text"><span class="mark ') >= 1
        assert ('<img src="data:image/' in section) == (item.kind not in ("scores", "costs")), name
        assert "Missing:" not in section
    # What no run of the demo can show is said, not claimed.
    assert "the printed numbers are of Qwen2.5-VL-7B, not of this model" in page
    assert "do not differ in capacity" in page
    assert "It is no evidence about 7B models" in page


def test_the_page_is_one_file_without_this_machines_folders(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert str(whole) not in page
    assert len(page) < 2_000_000


def test_printed_numbers_stand_in_the_tables(whole: Path) -> None:
    page = (whole / "report.html").read_text(encoding="utf-8")
    for number in ("96.9", "98.2", "2302", "346.2", "183.6"):
        assert f"<small>{number}</small>" in page
    # Table 3's FLOPs follow from arithmetic, whatever model is timed.
    assert re.search(
        r"4\.05 TFLOPs, 154\.2 MiB; printed 4\.06 TFLOPs, 154\.2 MiB|4\.06 TFLOPs, 154\.2 MiB; printed", page
    )


def test_measurements_are_shared_by_the_items(whole: Path) -> None:
    """Figures 5 to 8 read one folder of measured information."""
    for model in MODELS:
        stores = {path.parent for path in (whole / model.folder).rglob("information.json")}
        assert stores == {whole / model.folder / "information"}


def test_the_same_command_does_nothing_twice(whole: Path, environment: dict[str, str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.suffix in (".parquet", ".jsonl")}
    code, record, messages = reproduce(environment, whole, *WORDS)
    assert code == 0, messages
    assert record["missing"] == []
    steps = [line for line in messages.splitlines() if re.match(r"[\w.+-]+: ", line)]
    assert len(steps) == 9 + 13
    assert {line.partition(": ")[2] for line in steps} == {"is there"}
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_report_over_half_finished_runs_names_what_is_missing(
    whole: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    shutil.copytree(whole, half, ignore=shutil.ignore_patterns("mirror-*"))
    for step in ("tiny-llava-table", "tiny-qwen2.5-vl-information"):
        shutil.rmtree(half / "steps" / step)
    hybrid = next((half / "tiny-llava" / "table").glob("*DART+Random*"))
    shutil.rmtree(hybrid)
    shutil.rmtree(half / "tiny-qwen2.5-vl" / "information")
    code, record, messages = reproduce(environment, half, *WORDS, "--report-only")
    assert code == 0, messages
    assert {"tiny-llava-table", "tiny-qwen2.5-vl-information"} <= set(record["missing"])
    assert record["claims"]["not run"] > 4
    page = (half / "report.html").read_text(encoding="utf-8")
    assert re.search(r"tiny-llava-table: not run; \d+ of \d+ runs are there", page)
    (figure,) = re.findall(r'<section id="fig12">.*?</section>', page, re.DOTALL)
    assert "Missing: tiny-qwen2.5-vl-information" in figure
    assert "nothing is measured" in figure
    # The half that is there still counts.
    (table,) = re.findall(r'<section id="table2">.*?</section>', page, re.DOTALL)
    assert "reproduced" in table
    assert ">DivPrune 192<" in table


def test_a_step_that_fails_is_named_with_its_log_and_the_others_run(
    environment: dict[str, str], tmp_path: Path
) -> None:
    """Without a card: evaluating on cuda fails, the arithmetic of Table 3 does not, and the page is made."""
    words = (
        "table3",
        "--models",
        str(MODELS_FOLDER),
        "--model-args",
        "dtype=float32,device=cuda:7",
        "--limit",
        "2",
        "--quick",
    )
    code, record, messages = reproduce(environment, tmp_path, *words)
    assert code == 1
    assert record["failed"] == ["tiny-llava-table", "tiny-llava-bench"]
    assert f"log: {tmp_path}/steps/tiny-llava-table/log.txt" in messages
    assert "schedule-FastV-64: done" in messages
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "tiny-llava-leaderboard: not run; it needs tiny-llava-table, which is not finished" in page
    assert '<span class="mark reproduced">reproduced</span>' in page


MODELS_FOLDER = Path(__file__).parents[2] / "lmms_prune" / "demo" / "weights" / "tiny-llava"


@pytest.fixture(scope="module")
def driver() -> Iterator:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install -e '.[dev]'")
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here: apt-get install chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield started
    started.quit()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_fits_phone_and_desk(driver, whole: Path, width: int, dark: bool) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    driver.get((whole / "report.html").as_uri())
    assert driver.execute_script("return document.documentElement.scrollWidth") <= width
    background, text = driver.execute_script(
        "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color].map(c => c.match(/[\\d.]+/g).map(Number))"
    )
    assert (sum(background[:3]) < sum(text[:3])) == dark
    images = driver.execute_script("return [...document.images].map(i => [i.loading = 'eager', i.alt])")
    assert all(alt for _, alt in images)
    assert driver.get_log("browser") == []
