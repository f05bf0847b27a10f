"""Packs: the same bytes back, read as folders are; cut, altered and foreign ones are refused by name."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from forking import Forking
from honest import RUNS, change_samples, copied, results_file
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.board.merging import INDEX
from lmms_prune.leaderboard.results import read_results
from lmms_prune.record.bitmaps import encode
from lmms_prune.record.packing import write_documents, write_pack
from lmms_prune.record.packs import DOCUMENTS, FIELDS, SUFFIX, Manifest, PackError, content, manifest, members
from lmms_prune.record.skeletons import SplitError, dumped, joined, split

MANIFEST = Manifest("Group A", "2026-11-29", "0", "a/model", "none", (0,), {"gqa": "1"})
WORKFLOW = Path(__file__).parents[2] / "docs/board/verify.yml"


def call(*args: object):
    return CliRunner().invoke(app, [str(arg) for arg in args], env={"NO_COLOR": "1", "COLUMNS": "200"})


def tree(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Results and samples below a folder, by name."""
    for path in sorted(folder.rglob("2*")):
        if path.is_file() and path.parent.name != "submissions":
            yield path.name, path.read_bytes()


@pytest.fixture
def made_up(tmp_path: Path) -> Path:
    """Two rows with answers of this test."""
    values = {"gqa": [1.0] * 12 + [0.0] * 8, "pope": [1.0] * 6}
    write_run(tmp_path / "results" / "a", values)
    write_run(tmp_path / "results" / "b", {"gqa": [1.0] * 9 + [0.0] * 11, "pope": [0.0] * 6}, "dart@2:0.44", tokens=44)
    return tmp_path / "results"


@pytest.fixture
def board(made_up: Path, tmp_path: Path) -> Path:
    done = call("pack", made_up, "--out", tmp_path / "board", "--submitter", "Group A")
    assert done.exit_code == 0, done.output
    return tmp_path / "board"


def packs(board: Path) -> list[Path]:
    return sorted(board.glob(f"*{SUFFIX}"))


@pytest.mark.slow
def test_honest_runs_come_back_byte_for_byte_and_verify(honest: Path, forking: Forking, tmp_path: Path) -> None:
    """All scorers, both families; the leaderboard of the packs is that of the folders."""
    names = ("none", "divprune", "random", "random-1", "limited", "qwen-none", "qwen")
    folder = copied(honest, tmp_path / "results", *names)
    done = forking.run("lmms-prune", "pack", folder, "--out", tmp_path / "board", "--submitter", "Group A")
    assert done.returncode == 0, done.stderr
    assert len(packs(tmp_path / "board")) == len(names) - 1, "seeds are one row"
    # Names may repeat, as runs of one second do; what is compared are the bytes.
    assert sorted(data for _, data in tree(folder)) == sorted(_bytes(tmp_path / "board"))
    tables = [
        json.loads(call("leaderboard", where, "--format", "json", "--resamples", "200", "--no-cache").stdout)["models"]
        for where in (folder, tmp_path / "board")
    ]
    assert _numbers(tables[0]) == _numbers(tables[1])
    done = forking.run("lmms-prune", "verify", tmp_path / "board", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["submitted"].split(",")[0] for row in json.loads(done.stdout)["rows"]} == {"Group A"}


def _bytes(board: Path) -> list[bytes]:
    return [content(member) for pack in packs(board) for member in members(pack)]


def _numbers(models: list[dict[str, Any]]) -> list[Any]:
    return [
        (model["title"], row["label"], row["rel"], row["cost"], row["cells"], row["marks"])
        for model in models
        for budget in model["budgets"]
        for row in budget["rows"]
    ]


def test_leaderboard_page_and_gate_read_packs_as_folders(made_up: Path, board: Path, tmp_path: Path) -> None:
    for args in (["leaderboard", "--format", "csv"], ["gate", "--min-rel", "2", "--no-verify"]):
        outputs = [call(*args, where, "--resamples", "200", "--no-cache").stdout for where in (made_up, board)]
        assert outputs[0] == outputs[1] != ""
    assert call("leaderboard", packs(board)[1], packs(board)[0], "--resamples", "200").exit_code == 0
    done = call("leaderboard", board, "--format", "html", "--out", tmp_path / "page.html", "--resamples", "200")
    assert done.exit_code == 0, done.output
    [text] = re.findall(r'id="data">(.*?)</script>', (tmp_path / "page.html").read_text(encoding="utf-8"), re.DOTALL)
    shown = json.loads(text)
    assert shown["changes"]["cards"], "the changed answers are read from the packs"
    assert shown["submitters"] == ["Group A"]
    assert [row["submitters"] for row in shown["models"][0]["rows"]] == [["Group A"], ["Group A"]]
    files = [run for record in read_results([board]).records for run in record.sources]
    assert {(source.submitter, len(source.packed)) for source in files} == {("Group A", 10)}


def test_the_cache_takes_packs(board: Path) -> None:
    outputs = [call("leaderboard", board, "--format", "json", "--resamples", "200").stdout for _ in range(2)]
    assert outputs[0] == outputs[1]


LINES = (
    '{"doc_id": 0, "target": "a", "filtered_resps": "b", "token_counts": [null], "exact_match": 0.0, "input": "?"}',
    '{"doc_id": 1, "target": "ü\\n", "filtered_resps": "", "token_counts": [{"input_tokens": 3}], "x": {"score": 1, "q": [1, 2]}}',
    '{"doc_id":2,"target":"a","filtered_resps":"b","token_counts":[null]}',
    '{"doc_id": 3, "target": "a", "filtered_resps": ["b", "c"], "token_counts": [null]}',
    "no JSON at all",
    "",
    '{"doc_id": 4, "target": "a", "filtered_resps": "\\ud800", "token_counts": [null]}',
)


def test_a_pack_is_a_fraction_of_its_folder(tmp_path: Path) -> None:
    """Of 3000 questions with one random draw of 192 of 576 tokens, which no compression makes smaller than 65 bytes each."""
    draw, lines = np.random.default_rng(0), []
    for number in range(3000):
        mask = np.zeros(576, bool)
        mask[draw.choice(576, 192, replace=False)] = True
        counts = {name: 600 + number % 7 for name in FIELDS}
        counts |= {"avg_visual_tokens": 216.0, "kept_visual_tokens": [192], "recycled_visual_tokens": [0]}
        counts |= {"layer_visual_tokens": [576] * 2 + [192] * 30, "layer_kv_bytes": [9437184 + number % 7] * 32}
        counts |= {"visual_grids": [[24, 24]], "token_bitmaps": [[encode(mask.reshape(24, 24))]]}
        item = {"question_id": str(number), "score": float(number % 2), "prediction": "yes", "ground_truth": "yes"}
        logged = {"doc_id": number, "target": "yes", "filtered_resps": "yes", "token_counts": [counts]}
        text = f"Is there a thing of kind {number} in the image?"
        lines.append(dumped({**logged, "pope_accuracy": item, "input": text}) + "\n")
    data = "".join(lines).encode()
    path = tmp_path / f"a{SUFFIX}"
    write_documents(tmp_path, write_pack(path, MANIFEST, {"0/x.jsonl": data}))
    assert content(members(path)[0]) == data
    assert 65 < path.stat().st_size / 3000 < 95
    assert len(data) > 9 * path.stat().st_size


def test_what_is_not_a_sample_is_kept_as_it_is(tmp_path: Path) -> None:
    """Also another spelling of JSON, half a surrogate pair, and a last line without an end."""
    for end in ("\n", ""):
        data = "\n".join(LINES).encode() + end.encode() + b"\xff\xfe\n\r\n"
        folder = tmp_path / str(len(end))
        skeletons = write_pack(folder / f"a{SUFFIX}", MANIFEST, {"0/x.jsonl": data, "0/x_results.json": b"\x00\xff"})
        write_documents(folder, skeletons)
        assert [content(member) for member in members(folder / f"a{SUFFIX}")] == [data, b"\x00\xff"]
    assert len(skeletons) == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from(["doc_id", "target", "input", "exact_match", "resps", "anls", "x"])


@given(st.dictionaries(NAMES, JSON), st.text(max_size=8), JSON)
def test_a_line_that_is_split_is_joined_to_the_same_line(fields: dict[str, Any], answer: str, counts: Any) -> None:
    line = dumped({**fields, "filtered_resps": answer, "token_counts": counts})
    try:
        skeleton, same, same_counts, values = split(line)
    except SplitError:
        assert "\\u0000" in line or "\0" in line
        return
    assert dumped(joined(skeleton, same, same_counts, values)) == line
    assert same == answer


def test_a_pack_that_was_cut_or_altered_is_refused_by_name(board: Path, tmp_path: Path) -> None:
    pack = packs(board)[0]
    whole = pack.read_bytes()
    damages = {"cut": whole[:-200], "empty": b"", "another": b"PAR1" * 50}
    # A byte in the middle of the data, and one of the manifest.
    for name, place in (("altered", len(whole) // 3), ("manifest", whole.rindex(b"Group A"))):
        damages[name] = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    for name, data in damages.items():
        pack.write_bytes(data)
        commands = [["leaderboard", board], ["merge", board, "--out", tmp_path / name]]
        for command in [*commands, *([["verify", board]] if name == "altered" else [])]:
            done = call(*command, *(["--no-cache"] if command[0] != "merge" else []))
            assert done.exit_code in (1, 2), (name, command, done.output)
            assert pack.name in done.stderr, (name, command, done.stderr)
            assert any(word in done.stderr for word in ("altered", "cut")), done.stderr
            assert "Traceback" not in done.output
        assert not (tmp_path / name).exists(), "nothing was merged"


def test_without_its_documents_a_pack_says_what_is_missing(board: Path) -> None:
    (board / DOCUMENTS).unlink()
    done = call("leaderboard", board, "--no-cache", "--resamples", "200")
    assert done.exit_code == 1
    assert f"{DOCUMENTS} is missing: packs need the documents of their board beside them" in done.stderr.replace(
        "\n", " "
    )


def test_documents_that_were_altered_are_refused(board: Path) -> None:
    path = board / DOCUMENTS
    table = parquet.read_table(path)
    texts = [text.replace("gqa 3?", "gqa 4?") for text in table.column("skeleton").to_pylist()]
    parquet.write_table(table.set_column(1, "skeleton", pa.array(texts)), path)
    with pytest.raises(PackError, match=r"documents.parquet was altered: .*gqa 4\?.* has another hash"):
        content(next(member for member in members(packs(board)[0]) if "gqa" in member.name))


def test_a_pack_of_a_later_format_and_one_without_manifest(tmp_path: Path) -> None:
    write_pack(tmp_path / f"a{SUFFIX}", replace(MANIFEST, format=99), {"0/x": b""})
    with pytest.raises(PackError, match="of format 99; this version reads up to 1"):
        manifest(tmp_path / f"a{SUFFIX}")
    parquet.write_table(pa.table({"a": [1]}), tmp_path / f"b{SUFFIX}")
    with pytest.raises(PackError, match="without the manifest of a pack"):
        manifest(tmp_path / f"b{SUFFIX}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schedule": "dart@2:0.1"}, "its manifest states schedule dart@2:0.1, but it holds dart@2:0.44"),
        ({"model": "another/model"}, "its manifest states model another/model, but it holds "),
        ({"seeds": (0, 1)}, "its manifest states seeds 0 and 1, but it holds 0"),
        ({"tasks": {"gqa": ""}}, "its manifest states tasks gqa, but it holds gqa and pope"),
    ],
)
def test_a_pack_that_states_another_row_than_it_holds_is_refused(
    change: dict[str, Any], said: str, board: Path, tmp_path: Path
) -> None:
    [pack] = [path for path in packs(board) if "dart" in path.name]
    files = {path.relative_to(pack).as_posix(): content(path) for path in members(pack)}
    write_pack(pack, replace(manifest(pack), files=(), **change), files)
    done = call("leaderboard", board)
    assert done.exit_code == 1
    assert said in " ".join(done.stderr.split())
    done = call("merge", board, "--out", tmp_path / "merged")
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("line", ["no JSON", "[1, 2]", '{"a": 1}', '{"doc_id": "x"}', "[" * 100_000])
def test_a_pack_with_samples_that_are_none_is_no_row_of_a_board(line: str, board: Path, tmp_path: Path) -> None:
    [pack] = [path for path in packs(board) if "dart" in path.name]
    files = {path.relative_to(pack).as_posix(): content(path) for path in members(pack)}
    name = next(name for name in files if name.endswith("_samples_gqa.jsonl"))
    write_pack(pack, replace(manifest(pack), files=()), {**files, name: f"{line}\n".encode()})
    done = call("merge", board, "--out", tmp_path / "merged")
    assert done.exit_code == 2, done.output
    assert "no samples file of lmms-eval" in " ".join(done.stderr.split())


def test_a_pack_without_a_row_is_named(board: Path, tmp_path: Path) -> None:
    """A results file that is not lmms-eval's is left out of a folder, but a pack promises a row."""
    write_pack(board / f"empty{SUFFIX}", MANIFEST, {"0/1_results.json": b"{}"})
    done = call("leaderboard", board)
    assert done.exit_code == 1
    assert "its manifest states model a/model, but it holds nothing that can be read" in " ".join(done.stderr.split())


def test_five_groups_give_one_board_with_who_and_when(tmp_path: Path) -> None:
    """Each packs its own rows; the unpruned run of the first group is the baseline of all."""
    boards = []
    for number in range(5):
        results = tmp_path / f"results-{number}"
        if not number:
            write_run(results / "none", {"gqa": [1.0] * 20})
        # One of them evaluated with --limit: its documents are a part of the others'.
        values = [1.0] * (12 - number) + [0.0] * (8 + number)
        write_run(
            results / "a", {"gqa": values[:10] if number == 4 else values}, f"dart@2:0.4{number}", tokens=40 + number
        )
        boards.append(tmp_path / f"board-{number}")
        done = call("pack", results, "--out", boards[-1], "--submitter", f"Group {number}")
        assert done.exit_code == 0, done.output
    done = call("merge", *boards, "--out", tmp_path / "board")
    assert done.exit_code == 0, done.output
    assert "6 rows in" in done.stdout
    rows = json.loads((tmp_path / "board" / INDEX).read_text(encoding="utf-8"))["rows"]
    assert sorted(row["submitter"] for row in rows) == ["Group 0", *(f"Group {number}" for number in range(5))]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", row["packed"]) for row in rows)
    assert all(re.fullmatch(r"[0-9a-f]{64}", sha) for row in rows for sha in row["files"].values())
    said = json.loads(call("leaderboard", tmp_path / "board", "--format", "json", "--resamples", "200").stdout)
    [model] = said["models"]
    labels = [row["label"] for budget in model["budgets"] for row in budget["rows"]]
    assert sorted(labels) == ["dart@2:0.40", "dart@2:0.41", "dart@2:0.42", "dart@2:0.43", "dart@2:0.44", "none"]
    again = call("merge", tmp_path / "board", *boards[:2], "--out", tmp_path / "board")
    assert "6 rows in" in again.stdout, "the same packs again are the same rows"


@pytest.mark.parametrize("name", ["target", "input", "question_id"])
def test_boards_with_other_documents_are_refused(name: str, tmp_path: Path) -> None:
    def change(logged: dict[str, Any]) -> None:
        if name == "question_id":
            logged["pope_accuracy"][name] = "17"
        else:
            logged[name] = f"another {logged[name]}"

    for folder, schedule in (("a", "none"), ("b", "dart@2:0.44")):
        write_run(tmp_path / folder / "run", {"pope": [1.0] * 6}, schedule, tokens=44)
        if folder == "b":
            change_samples(tmp_path / folder, change)
        assert call("pack", tmp_path / folder, "--out", tmp_path / f"board-{folder}", "--submitter", "x").exit_code == 0
    done = call("merge", tmp_path / "board-a", tmp_path / "board-b", "--out", tmp_path / "board")
    assert done.exit_code == 2
    assert "have other documents: document " in done.stderr
    assert str(tmp_path / "board-b") in done.stderr
    assert not (tmp_path / "board").exists()


def test_bad_input_of_pack_and_merge(made_up: Path, tmp_path: Path) -> None:
    cases = (
        (["pack", made_up, "--out", tmp_path / "b", "--submitter", " "], "name who submits"),
        (["pack", tmp_path / "none", "--out", tmp_path / "b", "--submitter", "x"], "no such file or folder"),
        (["pack", made_up, "--out", results_file(made_up / "a"), "--submitter", "x"], "this is a file; name a folder"),
        (["merge", tmp_path / "none", "--out", tmp_path / "b"], "no such file or folder"),
        (["merge", made_up, "--out", tmp_path / "b"], "no packs here or below"),
    )
    for words, said in cases:
        done = call(*words)
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.stderr.split())
        assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_the_boards_workflow_verifies_and_makes_the_page(honest: Path, forking: Forking, tmp_path: Path) -> None:
    """Its own lines, on packs of two groups; and with a forged one, it stops before the page."""
    read = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))
    assert set(read[True]) == {"pull_request", "push"}  # YAML 1.1 reads the key `on` as true
    install, *scripts = [step["run"] for step in read["jobs"]["verify"]["steps"] if "run" in step]
    assert install == "pip install lmms-prune"
    assert read["jobs"]["publish"]["needs"] == "verify"

    def run(script: str) -> int:
        for line in script.strip().splitlines():
            word, *rest = shlex.split(line)
            if word == "mkdir":
                (tmp_path / rest[-1]).mkdir(exist_ok=True)
            else:
                done = forking.run(word, *rest, cwd=tmp_path)
                if done.returncode:
                    assert "CONTRADICTED" in done.stdout, done.stderr
                    return done.returncode
        return 0

    for group, names in (("a", ("none", "random")), ("b", ("divprune",))):
        folder = copied(honest, tmp_path / f"results-{group}", *names)
        done = forking.run("lmms-prune", "pack", folder, "--out", tmp_path / group, "--submitter", group)
        assert done.returncode == 0, done.stderr
    merge = ("lmms-prune", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "board")
    assert forking.run(*merge).returncode == 0
    assert [run(script) for script in scripts] == [0, 0]
    assert RUNS["divprune"].schedule in (tmp_path / "public/index.html").read_text(encoding="utf-8")

    def forge(logged: dict[str, Any]) -> None:
        logged["token_counts"][0]["avg_visual_tokens"] /= 4

    change_samples(tmp_path / "results-b", forge)
    shutil.rmtree(tmp_path / "b")
    done = forking.run("lmms-prune", "pack", tmp_path / "results-b", "--out", tmp_path / "b", "--submitter", "b")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "board")
    assert forking.run(*merge).returncode == 0
    assert run(scripts[0]) == 1
