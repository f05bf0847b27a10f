"""Forged rows are refused with the reason; honest rows never are. Each forged row is a changed copy of an honest run."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forking import Forking
from honest import FEW, KEEP, RUNS, TASKS, change_results, change_samples, copied, relabel, results_file

from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.verify.checks import CHECKS
from lmms_prune.leaderboard.verify.draws import redrawable
from lmms_prune.leaderboard.verify.evidence import RecordedSample
from lmms_prune.leaderboard.verify.findings import NotRecordedError
from lmms_prune.leaderboard.verify.plan import executes
from lmms_prune.leaderboard.verify.rescoring import Rescoring
from lmms_prune.leaderboard.verify.verdicts import Verification, verification
from lmms_prune.methods import METHODS
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.record.bitmaps import decode, encode
from lmms_prune.schedule import Schedule

pytestmark = pytest.mark.slow
Verify = Callable[[Path], Verification]
DIVPRUNE, RANDOM = f"divprune@2:{KEEP}", f"random@2:{KEEP}"


@pytest.fixture(scope="module")
def rescoring() -> Rescoring:
    """The tasks' scorers, made once: reading lmms-eval's tasks takes seconds."""
    return Rescoring()


@pytest.fixture
def verify(rescoring: Rescoring) -> Verify:
    def run(*folders: Path) -> Verification:
        results = read_results(folders)
        return verification(results.records, results.problems, SamplesReader(), rescoring)

    return run


def reasons(verified: Verification, schedule: str, state: str = "contradicted") -> dict[str, list[str]]:
    """The findings of a row by check."""
    found: dict[str, list[str]] = {}
    for run in verified.runs:
        if run.run.schedule == schedule:
            for finding in run.findings:
                if finding.state == state:
                    found.setdefault(finding.check, []).append(finding.reason)
    return found


def test_honest_rows_hold(verify: Verify, honest: Path) -> None:
    """Both families, all scorers, seeds, a resumed run, a solved budget, --limit, adaptive keeps and cropped caches."""
    verified = verify(honest)
    assert verified.problems == ()
    assert {run.run.schedule: run.contradicted for run in verified.runs if run.contradicted} == {}
    assert len(verified.runs) == len(RUNS) - 1  # the resumed run is the same row twice
    resumed = json.loads(results_file(honest / "resumed-again").read_text(encoding="utf-8"))
    assert resumed["config"]["batch_sizes"][0]["resumed"] > 0
    for run in verified.runs:
        states = {(finding.check, finding.task): finding.state for finding in run.findings}
        unverified = [key for key, state in states.items() if state == "unverified"]
        assert [key for key in unverified if key != ("scores", "textvqa_val")] == [
            ("draws", task) for task in run.run.tasks if "pool" in (run.run.schedule or "")
        ]
        drawn = {task for check, task in states if check == "draws"}
        controls = any(name in str(run.run.schedule) for name in ("random", "stride", "keepfirst", "keeplast"))
        assert drawn == (set(run.run.tasks) if controls else set())
    assert reasons(verified, RANDOM, "holds")["draws"]


def test_a_row_of_a_method_of_ones_own_holds_and_runs_none_of_its_code(
    verify: Verify, honest: Path, tmp_path: Path
) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    relabel(folder / "divprune", DIVPRUNE, own := f"mine.py:Mine@2:{KEEP}", methods_sha256="mine.py:Mine=0123")
    verified = verify(folder)
    assert verified.problems == ()
    assert reasons(verified, own) == {}
    assert "draws" not in reasons(verified, own, "holds")


@pytest.mark.parametrize(
    ("schedule", "again"),
    [
        ("random@2:0.3", [True]),
        ("mine.py@2:0.3", [False]),
        ("a.b:C@2:0.3,random@8:0.1", [False, True]),
        ("dart@2:0.3", [False]),
        ("vtw@2", [False]),
    ],
)
def test_only_built_in_controls_are_drawn_again(schedule: str, again: list[bool]) -> None:
    assert list(map(redrawable, Schedule.parse(schedule).stages)) == again


@pytest.mark.parametrize(
    ("executed", "asked", "same"),
    [
        ("my_idea.py@1:0.4548", "/home/me/my_idea.py@1:?", True),
        ("my_idea.py:A@1:0.3;flag=true;power=3.0", "~/x/my_idea.py:A@1:0.30;power=3;flag=True;count=3", True),
        ("my_idea.py:A@1:0.3", "my_idea.py:B@1:0.3", False),
        ("my_idea.py@1:0.3", "x/another.py@1:0.3", False),
        ("my_idea.py@1:0.3", "my_idea.py@1:0.2", False),
        ("my_idea.py@1:0.3;power=3.0", "my_idea.py@1:0.3;power=2", False),
        ("my_idea.py@1:0.3;power=3.0", "my_idea.py@1:0.3", False),
        ("dart@2:0.3", "dart@2:0.3;order=stable", True),
        ("dart@2:0.3", "dart@2:0.3;order=reference", False),
    ],
)
def test_what_a_run_executes_of_its_command(executed: str, asked: str, same: bool) -> None:
    """Runs record a method's file without its folder, and options without defaults, which for strangers' files are not known."""
    assert executes(Schedule.parse(executed), Schedule.parse(asked)) == same


def test_every_check_is_said_to_prove_something_and_not_to_prove_something() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        assert check.proves
        assert check.cannot
        functions = (check.of_task, check.of_scores, check.of_results, check.of_rows)
        assert sum(function is not None for function in functions) == 1


def _average(logged: dict[str, Any]) -> None:
    logged["token_counts"][0]["avg_visual_tokens"] /= 4


def _layers(logged: dict[str, Any]) -> None:
    counts = logged["token_counts"][0]
    counts["layer_visual_tokens"] = [count // 4 for count in counts["layer_visual_tokens"]]
    counts["avg_visual_tokens"] = sum(counts["layer_visual_tokens"]) / len(counts["layer_visual_tokens"])


def _kept_too(logged: dict[str, Any]) -> None:
    _layers(logged)
    counts = logged["token_counts"][0]
    counts["kept_visual_tokens"] = [count // 4 for count in counts["kept_visual_tokens"]]
    counts["token_bitmaps"] = []


def _run_averages(content: dict[str, Any]) -> None:
    entry = content["config"]["batch_sizes"][0]
    for averages in (entry["averages"], *entry["tasks"].values()):
        averages["avg_visual_tokens"] /= 4


@pytest.mark.parametrize(
    ("change", "check", "said"),
    [
        (_average, "accounting", "but its layers have 74 on average"),
        (_layers, "plan", "layer 0 saw 36 visual tokens; by schedule divprune@2:0.4166667 and the tokens kept, 144"),
        (_kept_too, "plan", "layer 0 saw 36 visual tokens"),
    ],
)
def test_average_tokens_divided_by_four(
    change: Callable, check: str, said: str, verify: Verify, honest: Path, tmp_path: Path
) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_samples(folder / "divprune", change)
    found = reasons(verify(folder), DIVPRUNE)
    assert said in found[check][0]
    assert found["averages"], "the run's averages are still the honest ones"


def test_averages_of_the_run_alone_divided_by_four(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_results(folder / "divprune", _run_averages)
    found = reasons(verify(folder), DIVPRUNE)
    assert list(found) == ["averages"]
    assert found["averages"][0] == "the run's average avg_visual_tokens is 18.5, but its samples give 74"


def test_samples_of_a_run_with_other_stages_are_refused(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """The unpruned run's answers and tokens under the name of a control."""
    folder = copied(honest, tmp_path / "results", "none", "random")
    [taken] = (folder / "none").rglob("*_samples_gqa.jsonl")
    [forged] = (folder / "random").rglob("*_samples_gqa.jsonl")
    shutil.copy(taken, forged)
    assert "0 stages acted" in reasons(verify(folder), RANDOM)["plan"][0]


@pytest.mark.parametrize("name", ["kv_bytes", "prefill_flops", "decode_flops", "encoder_flops"])
def test_bytes_and_flops_divided_by_four(name: str, verify: Verify, honest: Path, tmp_path: Path) -> None:
    def change(logged: dict[str, Any]) -> None:
        counts = logged["token_counts"][0]
        counts[name] //= 4
        if name == "kv_bytes":
            counts["layer_kv_bytes"] = [size // 4 for size in counts["layer_kv_bytes"]]
            counts[name] = sum(counts["layer_kv_bytes"])

    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_samples(folder / "divprune", change)
    found = reasons(verify(folder), DIVPRUNE)
    assert "but its tokens take" in found["costs"][0]


def test_flops_of_a_checkpoint_whose_sizes_are_not_known(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """Its rows are compared with each other: no model has the FLOPs of one and a quarter of them in the other."""

    def quarter(logged: dict[str, Any]) -> None:
        for name in ("prefill_flops", "decode_flops"):
            logged["token_counts"][0][name] //= 4

    folder = copied(honest, tmp_path / "results", "none", "divprune", "random")
    for run in folder.iterdir():
        path = results_file(run)
        text = path.read_text(encoding="utf-8")
        path.write_text(
            text.replace(str(Path(ast.literal_eval(repr(_pretrained(run))))), "group/unknown"), encoding="utf-8"
        )
    honest_ones = verify(folder)
    assert not any(run.contradicted for run in honest_ones.runs)
    assert "the sizes of group/unknown are not known here" in reasons(honest_ones, DIVPRUNE, "unverified")["costs"][0]
    change_samples(folder / "divprune", quarter)
    verified = verify(folder)
    assert "its FLOPs are those of another model" in reasons(verified, DIVPRUNE)["sizes"][0]
    assert not reasons(verified, "none")
    assert not reasons(verified, RANDOM)


def _pretrained(run: Path) -> str:
    content = json.loads(results_file(run).read_text(encoding="utf-8"))
    return content["config"]["batch_sizes"][0]["settings"]["pretrained"]


def test_another_schedules_text(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_results(
        folder / "divprune",
        lambda content: content["config"]["batch_sizes"][0]["settings"].update(schedule="scope@2:0.1"),
    )
    found = reasons(verify(folder), "scope@2:0.1")
    assert f"the report names schedule {DIVPRUNE}, its settings scope@2:0.1" in found["settings"]
    assert f"the command asks for schedule {DIVPRUNE}, the record names scope@2:0.1" in found["settings"]
    assert "stage scope@2:0.1 kept 60 of 144 visual tokens; its plan is 14" in found["plan"][0]


def test_another_schedules_text_everywhere(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    relabel(folder / "divprune", DIVPRUNE, "scope@3:0.4166667")
    found = reasons(verify(folder), "scope@3:0.4166667")
    assert "settings" not in found
    assert "layer 2 saw 60 visual tokens; by schedule scope@3:0.4166667 and the tokens kept, 144" in found["plan"][0]


def test_another_command(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """The seed is in no sample, but the command has it."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_results(
        folder / "divprune", lambda content: content["config"]["batch_sizes"][0]["settings"].update(seed="5")
    )
    assert reasons(verify(folder), DIVPRUNE)["settings"] == ["the command says seed=0, the record 5"]


# What a forged right score looks like in each task's samples.
RIGHT: dict[str, Callable[[dict[str, Any]], None]] = {
    "gqa": lambda logged: logged.update(exact_match=1.0),
    "docvqa_val": lambda logged: logged.update(anls=1.0),
    "scienceqa": lambda logged: logged.update(exact_match=1.0),
    "mme": lambda logged: next(v for k, v in logged.items() if k.startswith("mme_")).update(score=1.0),
    "pope": lambda logged: [
        v.update(score=1.0, prediction=v["ground_truth"]) for k, v in logged.items() if "pope_" in k
    ],
    "mmbench_en_dev_static": lambda logged: logged["gpt_eval_score"].update(prediction=logged["target"]),
    "ocrbench": lambda logged: logged["ocrbench_accuracy"].update(score=1),
}


@pytest.mark.parametrize("task", RIGHT)
def test_forged_scores_beside_wrong_answers(task: str, verify: Verify, honest: Path, tmp_path: Path) -> None:
    """The scores of samples say right, the answers are wrong."""

    def forge(logged: dict[str, Any]) -> None:
        logged["filtered_resps"] = "wrong"
        RIGHT[task](logged)

    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_samples(folder / "divprune", forge, task)
    found = reasons(verify(folder), DIVPRUNE)
    assert "but the answer 'wrong' scores" in found["scores"][0]
    assert len(found["scores"]) == 1, "the other tasks hold"


def test_a_total_that_its_samples_do_not_give(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_results(folder / "divprune", lambda content: content["results"]["gqa"].update({"exact_match,none": 0.99}))
    assert "a score of 99.00; its samples give" in reasons(verify(folder), DIVPRUNE)["totals"][0]


def test_forty_copies_under_forty_names(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """Other methods with the same plan, and the same methods at keeps that are the same number of tokens."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    labels = []
    for spec in METHODS.values():
        if spec.count_text == "N" and spec.kind not in ("control", "oracle") and spec.highest_layer is None:
            labels.append(f"{spec.name}@2:{KEEP}")
    labels = [label for label in labels if label != DIVPRUNE]
    labels += [f"scope@2:{KEEP};alpha=1.{number:02d}" for number in range(1, 40 - len(labels))]
    for number, label in enumerate(labels):
        run = shutil.copytree(folder / "divprune", folder / f"later-{number}")
        relabel(run, DIVPRUNE, label)
    verified = verify(folder)
    assert len(verified.runs) == len(labels) + 2
    assert not reasons(verified, DIVPRUNE), "the original is honest"
    for label in labels:
        name = label.replace(".10", ".1").replace(".20", ".2").replace(".30", ".3")
        found = reasons(verified, label) or reasons(verified, name)
        # Options of the cheat's own do not help: what the method computed is the same, too.
        assert "copy under another schedule" in found["copies"][0], label


def test_a_copy_of_some_tasks_only(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    run = shutil.copytree(folder / "divprune", folder / "later")
    relabel(run, DIVPRUNE, f"scope@2:{KEEP}")
    for path in run.rglob("*_samples_*.jsonl"):
        if not path.stem.endswith("_gqa"):
            path.unlink()
    found = reasons(verify(folder), f"scope@2:{KEEP}")
    assert len(found["copies"]) == 1
    assert found["copies"][0].startswith("the same 4 answers as ")


def test_the_same_row_from_two_groups_is_no_copy(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """Also where one method has two seeds, or a keep that is the same number of tokens."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    for name, label, seed in (
        ("seed", DIVPRUNE, "7"),
        ("keep", "divprune@2:0.4167", "0"),
        ("count", "divprune@2:60t", "0"),
    ):
        run = shutil.copytree(folder / "divprune", folder / name)
        relabel(run, DIVPRUNE, label, seed=seed)
        path = results_file(run)
        path.write_text(path.read_text(encoding="utf-8").replace("seed=0", f"seed={seed}"), encoding="utf-8")
    assert [run.contradicted for run in verify(folder).runs] == [[]] * 5


def test_divprune_under_the_name_of_random(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    relabel(folder / "divprune", DIVPRUNE, RANDOM)
    found = reasons(verify(folder), RANDOM)
    assert list(found) == ["draws"]
    assert len(found["draws"]) == len(TASKS)
    assert (
        f"stage {RANDOM} kept other tokens in document 0 and 3 more documents than random chooses" in found["draws"][0]
    )


def test_a_seed_that_was_not_drawn_with(verify: Verify, honest: Path, tmp_path: Path) -> None:
    folder = copied(honest, tmp_path / "results", "none", "random")
    relabel(folder / "random", "seed=0", "seed=2", seed="2")
    found = reasons(verify(folder), RANDOM)
    assert list(found) == ["draws"]
    assert found["draws"][0].endswith("with seed 2")


def test_later_stages_of_controls_are_drawn_from_what_earlier_ones_kept(
    verify: Verify, honest: Path, tmp_path: Path
) -> None:
    schedule = RUNS["qwen"].schedule
    folder = copied(honest, tmp_path / "results", "qwen-none", "qwen")

    def shift(logged: dict[str, Any]) -> None:
        counts = logged["token_counts"][0]
        [grid], [text] = counts["visual_grids"], counts["token_bitmaps"][2]
        counts["token_bitmaps"][2] = [encode(np.roll(decode(text, tuple(grid)), 1, axis=1))]

    change_samples(folder / "qwen", shift, "gqa")
    found = reasons(verify(folder), schedule)
    assert "stage keeplast@7:0.1 kept other tokens" in found["draws"][0]


@pytest.mark.parametrize("name", ["target", "input"])
def test_other_documents_than_in_other_rows(name: str, verify: Verify, honest: Path, tmp_path: Path) -> None:
    def easier(logged: dict[str, Any]) -> None:
        logged[name] = "easy"
        if name == "target":
            logged.update(filtered_resps="easy", exact_match=1.0)

    folder = copied(honest, tmp_path / "results", "none", "divprune")
    change_samples(folder / "divprune", easier, "gqa")
    if name == "target":
        change_results(folder / "divprune", lambda content: content["results"]["gqa"].update({"exact_match,none": 1.0}))
    found = reasons(verify(folder), DIVPRUNE)
    kind = "target" if name == "target" else "question"
    assert list(found) == ["documents"]
    assert f"has another {kind} than in" in found["documents"][0]


def test_what_is_not_recorded_is_listed_as_not_verified(verify: Verify, honest: Path, tmp_path: Path) -> None:
    def strip(logged: dict[str, Any]) -> None:
        for name in ("layer_visual_tokens", "text_tokens", "layer_kv_bytes", "token_bitmaps"):
            logged["token_counts"][0].pop(name)

    folder = copied(honest, tmp_path / "results", "none", "random")
    change_samples(folder / "random", strip)
    verified = verify(folder)
    found = reasons(verified, RANDOM, "unverified")
    assert {"accounting", "plan", "costs", "draws"} <= set(found)
    assert found["draws"] == ["which tokens are kept is not recorded (4 of 4)"] * len(FEW)


def test_a_secret_in_the_settings_is_no_contradiction(verify: Verify, honest: Path, tmp_path: Path) -> None:
    """Reports are redacted, commands are not, or the other way round."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")
    for run in (folder / "none", folder / "divprune"):
        change_results(
            run,
            lambda content: content["config"]["batch_sizes"][0]["settings"].update(
                pretrained="https://[REDACTED]/tiny"
            ),
        )
    verified = verify(folder)
    assert not any(run.contradicted for run in verified.runs)
    assert "costs" in reasons(verified, DIVPRUNE, "unverified")


def test_the_commands_refuse_and_say_why(honest: Path, forking: Forking, tmp_path: Path, mirror: Callable) -> None:
    """`verify`, `leaderboard --strict` and `gate` as processes, with the benchmarks' data and without."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")

    def call(*words: object, code: int) -> str:
        done = forking.run("lmms-prune", *words, cwd=mirror())
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = json.loads(call("verify", folder, "--data", "--json", code=0).splitlines()[0])
    assert said["passed"]
    assert [row["unverified"] for row in said["rows"]] == [[], []], "the data have TextVQA's references"
    assert {check["name"] for check in said["checks"]} == {check.name for check in CHECKS}
    gate = ("gate", folder, "--min-rel", "2", "--resamples", "200")
    printed = call(*gate, code=1)
    assert "verified | every number | 2 are not" in printed
    assert "TextVQA: its scorer reads 'answers'" in printed
    assert "gate: passed" in call(*gate, "--data", code=0)
    assert "not verified (--no-verify)" in call(*gate, "--no-verify", code=0)
    change_samples(folder / "divprune", _average)
    printed = call("verify", folder, code=1)
    assert "REFUSED" in printed
    assert "CONTRADICTED accounting: GQA: document" in printed
    assert "What no check can verify:" in printed
    assert "accounting: GQA: document" in call("leaderboard", folder, "--strict", "--resamples", "200", code=1)
    assert "accounting: GQA: document" in call(*gate, "--data", code=1)


def test_the_data_refuse_what_samples_alone_cannot(
    honest: Path, forking: Forking, tmp_path: Path, mirror: Callable
) -> None:
    """Questions and references that were changed in all rows alike."""
    folder = copied(honest, tmp_path / "results", "none", "divprune")

    def easier(logged: dict[str, Any]) -> None:
        logged.update(target="easy", filtered_resps="easy", exact_match=1.0)

    for run in ("none", "divprune"):
        change_samples(folder / run, easier, "gqa")
        change_results(folder / run, lambda content: content["results"]["gqa"].update({"exact_match,none": 1.0}))
    done = forking.run("lmms-prune", "verify", folder, "--data", cwd=mirror())
    assert done.returncode == 1
    assert "scores: GQA: document" in done.stdout
    assert "its target is" in done.stdout
    done = forking.run("lmms-prune", "verify", folder, "--data", cwd=tmp_path)
    assert done.returncode == 2
    assert "Start the command where an evaluation finds them" in done.stderr


def in_tiles(images: int, newlines: int) -> RecordedSample:
    """Images of a base of 2 x 2 patches and a canvas of 2 x 3, whose first row of each is kept, and newline tokens."""
    grids = [(2, 2), (2, 3)] * images
    kept = [encode(np.arange(rows * columns).reshape(rows, columns) < columns) for rows, columns in grids]
    boxes = [(image, 0, 0, *grid) for image in range(images) for grid in ((2, 2), (2, 3))]
    entry = {
        "visual_tokens": 10 * images + newlines,
        "avg_visual_tokens": 1.0,
        "kv_bytes": 1,
        "visual_grids": grids,
        "grid_boxes": boxes,
        "kept_visual_tokens": [5 * images + newlines],
        "token_bitmaps": [kept],
    }
    return RecordedSample(0, {}, TokenAccounting.read(entry))


def test_an_image_in_tiles_is_its_base_and_then_its_canvas() -> None:
    sample = in_tiles(images=2, newlines=0)
    assert sample.images == [10, 10]
    row = [True, True, False, False, True, True, True, False, False, False]
    assert [mask.tolist() for mask in sample.masks[0]] == [row, row]


def test_newline_tokens_are_no_patches() -> None:
    sample = in_tiles(images=1, newlines=3)
    assert sample.images == [10]
    assert [sample.patches(n) for n in (13, 8, 0)] == [10, 5, 0]
    with pytest.raises(NotRecordedError, match="of which image the newline tokens are"):
        in_tiles(images=2, newlines=3).patches(8)
