"""What is meant for others tells of nobody's machine: names relative to the results, and checkpoints by their folders' names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.formats import FORMATS
from lmms_prune.leaderboard.records import Source
from lmms_prune.leaderboard.sharing import PathNames, unique_names

RIGHT = {"gqa": [1.0] * 8 + [0.0] * 4}
WORSE = {"gqa": [1.0] * 6 + [0.0] * 6}
HOME = "/home/some one/models"  # a path may have spaces
ORACLE = "information@2:0.3;of=/home/someone/measured"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two checkpoints of one name, a schedule that names a folder, a template's file, and all that is a problem."""
    folder = tmp_path / "somebody's results"
    for number, model in enumerate((f"{HOME}/tiny-llava", "/data/tiny-llava")):
        for name, tasks, schedule in (
            ("none", RIGHT, "none"),
            ("dart", WORSE, "dart@2:0.3"),
            ("oracle", RIGHT, ORACLE),
        ):
            settings = {"chat_template": f"/home/someone/{name}.jinja"}
            write_run(folder / f"{name}{number}", tasks, schedule, tokens=30, model=model, settings=settings)
    # The same settings with another score, a file that is damaged, samples that are, and no baseline.
    write_run(folder / "again", {"gqa": [1.0] * 12}, "dart@2:0.3", tokens=30, model="/data/tiny-llava",
              settings={"chat_template": "/home/someone/dart.jinja"}, date="20260102_000000")  # fmt: skip
    write_run(folder / "damaged", RIGHT, "vtw@2").write_text("[1, 2]")
    path = write_run(folder / "cut", RIGHT, "stride@0:0.5", model=f"{HOME}/other")
    next(path.parent.glob("*.jsonl")).write_text("{}")
    return folder


def call(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def absolute(text: str) -> list[str]:
    """Absolute paths in what was printed, but JSON's own escapes, HTML's ends of tags, and digests in base 64."""
    text = re.sub(r"'sha256-[\w+/=]+'", "", text)
    text = re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    return re.findall(r"(?<![\w.~/<:])/[\w.-]+[^\s\"]*", text)


@pytest.mark.parametrize("form", FORMATS)
def test_no_format_tells_a_path(results: Path, form: str) -> None:
    done = call("leaderboard", results, "--format", form, "--details", "--resamples", 200)
    assert done.exit_code == 1  # there are problems
    assert str(results) in done.stderr
    assert absolute(done.stdout) == []
    for secret in ("some one", "someone", "/data", str(results.parent)):
        assert secret not in done.stdout
    assert "models/tiny-llava" in done.stdout
    assert "data/tiny-llava" in done.stdout
    assert "information@2:0.3;of=measured" in done.stdout.replace("\\_", "_") or form == "csv"
    kept = call("leaderboard", results, "--format", form, "--details", "--resamples", 200, "--keep-paths")
    if form not in ("markdown", "table", "latex", "csv"):
        assert f"{HOME}/tiny-llava" in kept.stdout
        assert str(results).replace("'", "\\u0027" if form == "html" else "'") in kept.stdout
    assert "information@2:0.3;of=/home/someone/measured" in kept.stdout.replace("\\_", "_")


def test_the_gates_summary_tells_none_either(results: Path) -> None:
    done = call("gate", results, "--no-verify", "--min-rel", 90, "--schedule", ORACLE, "--resamples", 200)
    assert absolute(done.stdout) == []
    assert "someone" not in done.stdout
    assert "`information@2:0.3;of=measured`" in done.stdout  # it was found by its full text
    assert "* FAIL: damaged/models__x/20260101_000000_results.json: damaged: " in done.stdout
    assert f"lmms-prune: {results}/damaged/models__x/20260101_000000_results.json: damaged: " in done.stderr
    kept = call("gate", results, "--no-verify", "--min-rel", 90, "--resamples", 200, "--keep-paths")
    assert f"* FAIL: {results}/damaged/models__x/20260101_000000_results.json: damaged: " in kept.stdout


def test_names_in_json_lead_from_the_results_folder(results: Path) -> None:
    said = json.loads(call("leaderboard", results, "--format", "json", "--resamples", 200).stdout)
    runs = [run for model in said["models"] for part in model["budgets"] for row in part["rows"] for run in row["runs"]]
    assert len(runs) > 5
    for run in runs:
        for file in run["files"]:
            assert (results / file["path"]).is_file()
            output = file["command"].partition(" --output_path ")[2].split()[0]
            assert (results / output).is_dir()
        assert all((results / path).is_file() for path in run["samples"].values())
        assert run["settings"]["pretrained"] in ("models/tiny-llava", "data/tiny-llava", "other")
    assert {model["title"] for model in said["models"]} == {"models/tiny-llava", "data/tiny-llava", "other"}


@pytest.mark.parametrize(
    ("text", "shared"),
    [
        ("/data/r/a/b.json", "a/b.json"),
        ("in /data/r/a/b.json: broken", "in a/b.json: broken"),
        ("/data/r", "r"),
        ("/data/rest/x", "x"),
        ("information@2:0.3;of=/home/me/m,vtw@3", "information@2:0.3;of=m,vtw@3"),
        ("/home/me/a:/home/me/b", "a:b"),
        ("2 samples/s, and/or 1/2 of https://a.org/b and ./c/d or ../e", None),
        ("system_prompt: Look at /etc/x closely; its baseline: none", "system_prompt: Look at x closely; its baseline: none"),
        ("/models/my model is a folder", "my model is a folder"),
        ("org/name", None),
    ],
)  # fmt: skip
def test_paths_become_names_and_nothing_else_does(text: str, shared: str | None) -> None:
    assert PathNames([Path("/data/r")], ["/models/my model", "org/name"]).shared(text) == (
        text if shared is None else shared
    )


def test_several_results_folders_are_told_apart() -> None:
    names = PathNames([Path("/x/new/results"), Path("/x/old/results"), Path("here")], [])
    assert names.shared([Path("/x/new/results/a"), Path("/x/old/results/a"), Path("here/a")]) == [
        Path("new/results/a"),
        Path("old/results/a"),
        Path("here/a"),
    ]


def test_names_are_as_short_as_they_can_be() -> None:
    paths = ["/a/b/c", "/x/b/c", "/b/d/", "/c"]
    assert unique_names(paths) == dict(zip(paths, ("a/b/c", "x/b/c", "d", "c"), strict=True))
    assert unique_names(["/a", "/a/"]) == {"/a": "a", "/a/": "a"}


@pytest.mark.parametrize(
    ("command", "shared"),
    [
        (
            "lmms-eval --include_path ../../tasks --output_path ./out/a",
            "lmms-eval --include_path tasks --output_path a",
        ),
        (
            "lmms-eval --model_args pretrained=~/models/tiny,x=file:///home/me/y",
            "lmms-eval --model_args pretrained=tiny,x=y",
        ),
        ("lmms-eval --model_args pretrained=org/name,guide=../g", "lmms-eval --model_args pretrained=org/name,guide=g"),
    ],
)
def test_a_command_has_no_path_of_one_machine(command: str, shared: str) -> None:
    source = Source(Path("/data/r/a.json"), "20260101_000000", command, {})
    assert PathNames([Path("/data/r")], []).shared(source).command == shared
