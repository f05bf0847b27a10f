"""``lmms-prune bench --suite``: it stops in time, loses nothing, goes on where it stopped, and runs as a process."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import typer
from typer.testing import CliRunner

from lmms_prune.bench import parts as parts_module
from lmms_prune.bench import suite_command
from lmms_prune.bench.page import plot
from lmms_prune.bench.parts import Part, suite_parts
from lmms_prune.bench.sections import KINDS
from lmms_prune.bench.suite import Suite, SuiteError, run_suite
from lmms_prune.cli import app
from lmms_prune.demo.models import MODELS

FACTS = {"card": "Some Card, 80 GiB", "torch": "2.10", "lmms-prune": "0.2.0 abc"}
INFORMATION = {"model": "m, float32", "units": 4, "layers": 2, "seconds": 1.0, "runs_seconds": 8.0, "ratio": 8.0}
INFORMATION |= {"low": 5.0, "high": 9.0, "marks": ["wide"]}
PRINTS = f"import json; print('hello'); print(json.dumps({INFORMATION}))"


def part(name: str, code: str, seconds: float = 0.0, absent: str = "") -> Part:
    return Part(name, "information", f"about {name}", seconds, ("-c", code), absent)


def ended(file: Path) -> bool:
    """Whether the process of that number runs no more; nobody may have collected its exit code."""
    number = int(file.read_text(encoding="utf-8"))
    return not psutil.pid_exists(number) or psutil.Process(number).status() == psutil.STATUS_ZOMBIE


def run(folder: Path, parts: Sequence[Part], minutes: float = 1.0, secrets: Sequence[str] = ()) -> dict[str, dict]:
    """Run parts, and return what is on disk of each."""
    suite = Suite.of(folder, FACTS, False, secrets)
    run_suite(suite, parts, minutes, lambda line: None, [sys.executable])
    return json.loads((folder / "suite-some-card.json").read_text(encoding="utf-8"))["parts"]


def test_what_is_measured_is_on_a_page_and_in_a_json(tmp_path: Path) -> None:
    found = run(tmp_path / "new", [part("quick", PRINTS, 7.0), part("other", PRINTS, absent="needs <b> a GPU")])
    assert (found["quick"]["state"], found["quick"]["result"]) == ("done", INFORMATION)
    assert found["quick"]["date"].startswith("20")
    assert 0 <= found["quick"]["other_load"] <= 1
    assert (found["other"]["state"], found["other"]["error"]) == ("absent", "needs <b> a GPU")
    page = (tmp_path / "new" / "suite-some-card.html").read_text(encoding="utf-8")
    for text in ("Some Card, 80 GiB", "0.2.0 abc", "8.0x~", "5.0–9.0", "wider than ±20%", "other: absent"):
        assert text in page
    # Times for which parts are planned are guesses, and called so.
    assert found["quick"]["guessed"] == 7
    assert '<th scope="col">guessed</th>' in page
    assert "<td>7</td>" in page
    assert "needs &lt;b&gt; a GPU" in page
    assert "<script" not in page
    assert "http" not in page.replace('http-equiv="Content-Security-Policy"', "")


def test_the_time_is_kept_and_what_was_not_run_is_named(tmp_path: Path) -> None:
    """A running part is stopped with all that it has started; a part that is too long is not begun."""
    child = "import time; time.sleep(300)"
    slow = (
        "import pathlib, subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
        "time.sleep(300)"
    )
    start = time.monotonic()
    found = run(tmp_path, [part("long", PRINTS, 100.0), part("slow", slow), part("next", PRINTS, 1.0)], 4 / 60)
    assert time.monotonic() - start < 20
    assert {name: outcome["state"] for name, outcome in found.items()} == {
        "long": "skipped",
        "slow": "stopped",
        "next": "skipped",
    }
    assert "needs about 100 s by a guess" in found["long"]["error"]
    assert ended(tmp_path / "pid")
    page = (tmp_path / "suite-some-card.html").read_text(encoding="utf-8")
    assert all(f"{name}: {outcome['state']}" in page for name, outcome in found.items())


def test_a_part_that_fails_stops_no_other(tmp_path: Path) -> None:
    failing = f"import sys; print('token-1234 in {parts_module.WEIGHTS}/x', file=sys.stderr); sys.exit(3)"
    failures = "import json, sys; print(json.dumps({'failures': ['a cell'], 'limits': [], 'cells': 1, 'seconds': 1}));"
    doctor = Part("doctor", "doctor", "cells", 0.0, ("-c", f"{failures} sys.exit(1)"))
    found = run(
        tmp_path, [part("bad", failing), part("mute", "pass"), doctor, part("good", PRINTS)], secrets=["token-1234"]
    )
    states = {name: outcome["state"] for name, outcome in found.items()}
    assert states == {"bad": "failed", "mute": "failed", "doctor": "failed", "good": "done"}
    assert found["bad"]["error"].startswith("exit code 3: ")
    assert found["bad"]["error"].endswith(" in lmms_prune/demo/weights/x")
    assert "printed no JSON" in found["mute"]["error"]
    assert found["doctor"]["error"] == "exit code 1: 1 checks failed, the first: a cell"
    assert found["doctor"]["result"]["failures"] == ["a cell"]
    assert "token-1234" not in "".join(path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_a_second_call_goes_on(tmp_path: Path) -> None:
    """What is done is not run again; what was stopped, skipped or failed is."""
    log = tmp_path / "log"
    logs = f"open({str(log)!r}, 'a').write('{{}} '); {PRINTS}"
    first = [part("a", logs.replace("{}", "a", 1)), part("b", "import sys; sys.exit(1)"), part("c", PRINTS, 1000.0)]
    before = run(tmp_path, first)
    assert [outcome["state"] for outcome in before.values()] == ["done", "failed", "skipped"]
    second = [part("a", "boom"), part("b", logs.replace("{}", "b", 1)), part("c", logs.replace("{}", "c", 1))]
    after = run(tmp_path, [*second, part("d", PRINTS)])
    assert [outcome["state"] for outcome in after.values()] == ["done"] * 4
    assert after["a"] == before["a"]
    assert log.read_text(encoding="utf-8").split() == ["a", "b", "c"]


def test_an_interruption_loses_nothing(tmp_path: Path) -> None:
    """By SIGTERM, as clusters end jobs; the running part is ended, too."""
    slow = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); time.sleep(300)"
    code = (
        "import sys\nfrom pathlib import Path\nfrom lmms_prune.bench.parts import Part\n"
        "from lmms_prune.bench.suite import Suite, run_suite\n"
        "from lmms_prune.terminal.console import ended_by_sigterm\n"
        f"suite = Suite.of(Path({str(tmp_path)!r}), {FACTS}, False)\n"
        f"parts = [Part('a', 'information', 'a', 0.0, ('-c', {PRINTS!r})), Part('b', 'information', 'b', 0.0, ('-c', {slow!r}))]\n"
        "with ended_by_sigterm():\n    run_suite(suite, parts, 5.0, print, [sys.executable])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8"):
        assert time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert ended(tmp_path / "pid")
    found = run(tmp_path, [part("a", "boom"), part("b", PRINTS)])
    assert [outcome["state"] for outcome in found.values()] == ["done", "done"]


def test_results_of_another_machine_or_commit_are_not_added_to(tmp_path: Path) -> None:
    run(tmp_path, [part("a", PRINTS)])
    with pytest.raises(SuiteError, match=r"measured with torch 2\.10, and now it is 2\.11; give another --out"):
        Suite.of(tmp_path, {**FACTS, "torch": "2.11"}, False)
    assert Suite.of(tmp_path, {**FACTS, "card": "Other, 40 GiB"}, False).outcomes == {}
    assert Suite.of(tmp_path, FACTS, True).outcomes == {}
    for damaged in ("{", "[]", '{"parts": {"a": {"x": 1}}}', '{"parts": {}}'):
        (tmp_path / "suite-some-card.json").write_text(damaged, encoding="utf-8")
        with pytest.raises(SuiteError, match="cannot be added to"):
            Suite.of(tmp_path, FACTS, False)


@pytest.mark.parametrize(("device", "small"), [("cpu", True), ("cuda", True), ("cuda", False)])
def test_every_part_is_a_command_that_exists(device: str, small: bool) -> None:
    """Its words are parsed, nothing is run."""
    group = typer.main.get_command(app)
    parts = suite_parts(device, small)
    assert len({part.name for part in parts}) == len(parts)
    assert {part.kind for part in parts} == set(KINDS)
    for part in parts:
        command, *words = part.words
        context = group.commands[command].make_context(command, list(words))  # type: ignore[attr-defined]
        assert context.params["device"] == device
        assert context.params["as_json"]
        assert part.seconds > 0
    names = [part.name for part in parts]
    for family in (model.family.model_type for model in MODELS):
        for batch in (1, 2, 3) if small else (1, 8, 16):
            assert f"schedules-{family}-{batch}" in names


def test_the_whole_suite_is_planned_for_about_ten_minutes() -> None:
    """But for the two last parts, which another call adds."""
    parts = suite_parts("cuda", False)
    assert sum(part.seconds for part in parts[:-2]) < 600 < sum(part.seconds for part in parts) < 13 * 60


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--suite", "--batch-size", "8"], "bench --batch-size: --suite has schedules, models and sizes of its own"),
        (["--suite", "vtw@4"], "bench SCHEDULES: --suite has"),
        (["--small"], "bench --small: it is an option of --suite"),
        (["--minutes", "3"], "bench --minutes: it is an option of --suite"),
        (["--suite", "--device", "cpu"], "add --small"),
        (["--suite", "--minutes", "inf"], "less than or equal to 10000"),
        (["--suite", "--small", "--device", "cpu", "--parts", ""], "bench --parts : unknown. Known: compiled-llava-1"),
        (["--suite", "--small", "--device", "cpu", "--parts", "doctr-sdpa"], "Did you mean 'doctor-sdpa'?"),
        (["--suite", "--device", "cuda:99"], "--device cpu --small tries everything at reduced size"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path: Path, words: list[str], said: str) -> None:
    result = CliRunner().invoke(
        app, ["bench", *words, *(["--out", str(tmp_path / "out")] if "--suite" in words else [])]
    )
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_exits_with_1_if_a_part_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so by name; skipped parts are no failure."""
    failing = Part("selection-bad", "selection", "bad", 0.0, ("bench-methods", "--methods", "nothing", "--json"))
    late = Part("late", "selection", "late", 1e6, ("bench-methods", "--json"))
    monkeypatch.setattr(parts_module, "suite_parts", lambda device, small: [failing, late])
    monkeypatch.setattr(suite_command, "_facts", lambda device: FACTS)
    command = ["bench", "--suite", "--small", "--device", "cpu", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1, result.output
    parts = json.loads(result.stdout.splitlines()[-1])["parts"]
    assert parts["selection-bad"]["state"] == "failed"
    assert "--methods nothing: unknown method." in parts["selection-bad"]["error"]
    assert parts["late"]["state"] == "skipped"
    result = CliRunner().invoke(app, [*command, "--parts", "late"])
    assert result.exit_code == 0, result.output


def test_a_very_wide_interval_does_not_hide_the_other_bars() -> None:
    bars = [{"group": "g", "ideal": 2.0, "realised": 1.5, "low": 1.4, "high": high} for high in (1.6, 500.0)]
    ((_, placed),) = plot(bars)
    assert placed[0]["at"]["ideal"] > 40
    assert placed[1]["at"]["high"] == 100


@pytest.mark.slow
def test_the_suite_runs_as_a_process(tmp_path: Path, environment: dict[str, str]) -> None:
    """At reduced size on the CPU, by the same commands as on a GPU; a second call adds the other parts."""
    program = Path(sys.executable).with_name("lmms-prune")
    command = [str(program), "bench", "--suite", "--small", "--device", "cpu", "--minutes", "8", "--out", str(tmp_path)]
    names = ["doctor-sdpa", "doctor-flash", "selection-llava", "schedules-qwen2_5_vl-2", "information-llava"]
    done: subprocess.CompletedProcess[str] | None = None
    for chosen in (names[:2], names):
        words = [*command, "--parts", ",".join(chosen)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert done is not None
    assert "doctor-sdpa: is there" in done.stderr
    content = json.loads((tmp_path / "suite-cpu-small.json").read_text(encoding="utf-8"))
    states = {name: part["state"] for name, part in content["parts"].items()}
    assert states == {name: "absent" if name == "doctor-flash" else "done" for name in names}
    assert {"card", "torch", "transformers", "lmms-prune", "machine"} <= set(content["facts"])
    (unpruned, *pruned) = content["parts"]["schedules-qwen2_5_vl-2"]["result"]["runs"]
    assert all(run["predicted_peak_bytes"] <= unpruned["predicted_peak_bytes"] for run in pruned)
    page = (tmp_path / "suite-cpu-small.html").read_text(encoding="utf-8")
    for title in ("Certificate", "Speed-up", "Selection", "Information", "FlashAttention needs a GPU"):
        assert title in page
    assert str(Path.home()) not in page


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_give_the_same_tokens(folders: dict[str, Path]) -> None:
    import torch

    from lmms_prune.bench.models import compile_layers, given_model, random_inputs
    from lmms_prune.pruning.hooks import prune
    from lmms_prune.schedule import Schedule

    model = given_model(str(folders["llava"]), None, None, "float32", "cpu").model
    inputs = random_inputs(model, 2, None, 12)

    def tokens() -> list[torch.Tensor]:
        answers = []
        for text in ("none", "dart@2:0.5,random@5:0.1"):
            with torch.inference_mode(), prune(model, Schedule.parse(text)):
                answers.append(model.generate(**inputs, max_new_tokens=6, do_sample=False, pad_token_id=0))
        return answers

    before = tokens()
    compile_layers(model)
    for eager, compiled in zip(before, tokens(), strict=True):
        assert torch.equal(eager, compiled)
