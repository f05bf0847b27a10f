"""`lmms-prune check`: the messages for wrong files, without torch."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.configs.budget import Claim, ClaimError, claims
from lmms_prune.configs.check import check
from lmms_prune.configs.command_line import parser, run_of
from lmms_prune.configs.runs import KEYS, files, read
from lmms_prune.errors import ConfigError
from lmms_prune.harness.tasks import task_configs

PROGRAM = Path(sys.executable).with_name("lmms-prune")
ROOT = Path(__file__).parents[2]
TINY = ROOT / "lmms_prune/demo/weights/tiny-llava"
GOOD = """\
# budget: 192t
model: llava_pruned
model_args:
  schedule: [dart@2:252t, random@20:38t]
  batch_size: 8
tasks: prune_llava
log_samples: true
output_path: results/a
"""


def written(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems(folder: Path, text: str) -> list[str]:
    (run,) = read(written(folder, text))
    return check(run).problems


def test_a_good_file_has_no_problems_and_its_numbers(tmp_path: Path) -> None:
    (run,) = read(written(tmp_path, GOOD))
    checked = check(run)
    assert (checked.problems, checked.notes) == ([], [])
    assert str(checked.schedule) == "dart@2:252t,random@20:38t"
    assert checked.percent == pytest.approx(100 * 192 / 576)
    assert run.name == "a"
    assert str(run.claim) == "192t"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tasks:", "task:", "unknown key 'task'. Did you mean 'tasks'?"),
        (
            "llava_pruned",
            "llava_prunned",
            "model: 'llava_prunned' is not one of this package's models. Did you mean 'llava_pruned'?",
        ),
        ("schedule:", "schedul:", "model_args: unknown argument 'schedul'. Did you mean 'schedule'?"),
        ("dart@2", "drat@2", "unknown method 'drat' in stage 1. Did you mean 'dart'?"),
        ("random@20", "random@32", "layer 32 in stage 2 is beyond the model, whose layers are 0 to 31."),
        ("38t", "380t", "keeps never grow: stage 2 keeps 380t, stage 1 only 252t."),
        ("[dart@2:252t, random@20:38t]", "dart@2:?", "the '?' of stage 1 needs a budget"),
        ("dart@2:252t", "fastv@0:252t", "fastv"),
        ("llava_pruned", "qwen2_5_vl_pruned", "so claim a share, such as 50%."),
        ("252t", "200t", "budget: it claims 192t, but the schedule keeps 165t (-14.1%, the tolerance is 5%)."),
        ("192t", "192t, really 193t", "budget: it says 'really 193t', but the schedule keeps 192t."),
        ("  batch_size: 8", "  batch_size: 8\nbatch_size: 4", "batch_size=8 contradicts --batch_size 4; say it once."),
        ("  batch_size: 8", "  batch_size: 0", "batch_size=0 must be a whole number of at least 1"),
        ("  batch_size: 8", "  min_pixels: 8", "unknown argument 'min_pixels'. It is for another model family."),
        ("  batch_size: 8", "  use_cache: false", "use_cache=false prunes anew at every generated token"),
        ("results/a", "results/a,b", "output_path: 'results/a,b' must be a text without commas"),
        ("output_path: results/a", "", "log_samples: needs an output_path."),
        ("output_path: results/a", "output_path: r\nlimit: -3", "limit: -3 must be a number of documents"),
        ("output_path: results/a", "output_path: r\nlimit: 0", "limit: 0 must be a number of documents"),
        ("output_path: results/a", "output_path: r\nlimit: .nan", "limit: nan must be a number of documents"),
        ("output_path: results/a", "output_path: r\nnum_fewshot: 2", "--num_fewshot 2: lmms-eval shows no examples"),
        ("output_path: results/a", "output_path: r\nsystem_instruction: Hi.", "use --model_args system_prompt=…"),
        ("output_path: results/a", "output_path: r\napply_chat_template: true", "applied anyway; leave it out"),
        ("output_path: results/a", "output_path: r\nlimit: 3", "limit: 3 cuts one of MME's pairs of questions"),
        ("output_path: results/a", "output_path: r\noffset: 1", "offset: 1 cuts one of MME's pairs of questions"),
        ("  batch_size: 8", "  pretrained: ./no/llava", "pretrained=./no/llava: there is no such folder."),
        ("prune_llava", "prune_lava", "tasks: 'prune_lava' is not known. Did you mean 'prune_llava'?"),
        (
            "prune_llava",
            "mme,textvqa",
            "tasks: 'textvqa' contains a test split, which cannot be scored locally. Use textvqa_",
        ),
        ("tasks: prune_llava", "tasks: [mme, pope]", "tasks: ['mme', 'pope'] must be a text of names with commas"),
        (
            "schedule: [dart@2:252t, random@20:38t]",
            "schedule: dart@2:252t\n  pretrained: Qwen/Qwen2.5-VL-7B-Instruct",
            "pretrained=Qwen/Qwen2.5-VL-7B-Instruct is a qwen2.5-vl-7b, which llava_pruned cannot load.",
        ),
    ],
)
def test_each_mistake_is_named_with_its_fix(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in GOOD
    listed = problems(tmp_path, GOOD.replace(old, new))
    assert any(message in problem for problem in listed), listed


def test_all_mistakes_of_a_file_are_reported_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("tasks: prune_llava", "task: mme").replace("dart@2", "drat@2").replace("results/a", "a,b")
    assert len(problems(tmp_path, text)) == 4


def test_positions_cannot_be_renumbered_on_qwen(tmp_path: Path) -> None:
    text = "model: qwen2_5_vl_pruned\nmodel_args: schedule=dart@2:0.5,positions=compact\ntasks: prune_qwen\n"
    (problem,) = problems(tmp_path, text)
    assert "M-RoPE; use positions=original" in problem


def test_layers_are_those_of_a_local_checkpoint(tmp_path: Path) -> None:
    text = f"# budget: 50%\nmodel: llava_pruned\nmodel_args: pretrained={TINY},schedule=random@12:0.1\ntasks: pope\n"
    (problem,) = problems(tmp_path, text)
    assert "layer 12 in stage 1 is beyond the model, whose layers are 0 to 11" in problem
    (run,) = read(written(tmp_path, text.replace("random@12:0.1", "random@1:?,budget=0.5")))
    checked = check(run)
    assert checked.problems == []
    assert checked.percent is not None
    assert 49 < checked.percent <= 50


def test_a_task_folder_that_lmms_eval_would_not_find_is_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of the repository name it from there; elsewhere lmms-eval says only that it finds no such tasks."""
    path = ROOT / "model_configs" / "llava-1.5-7b_192_dart.yaml"
    monkeypatch.chdir(ROOT)
    assert CliRunner().invoke(app, ["check", str(path)]).exit_code == 0
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["check", str(path)])
    assert done.exit_code == 2
    assert "include_path: there is no folder task_configs below the working directory" in done.stderr
    assert f"Start it in {ROOT}, or write include_path: {ROOT / 'task_configs'}" in done.stderr
    (problem,) = problems(tmp_path, GOOD + "include_path: of/mine\n")
    assert problem.endswith(f"write include_path: {task_configs()}")


def test_what_cannot_be_checked_is_noted(tmp_path: Path) -> None:
    text = "model: llava_pruned\nmodel_args: pretrained=me/my-llava,schedule=vtw@90\ntasks: mme,my_task\n"
    (run,) = read(written(tmp_path, text))
    checked = check(run)
    assert checked.problems == []
    assert checked.notes == [
        "tasks not checked: my_task",
        "layers and budget not checked: the sizes of me/my-llava are not known here",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [a\n", "is not YAML: line 2, column 1"),
        ("model: a\nmodel: b\n", "is not YAML: line 2, column 1: the key 'model' is given twice."),
        ("!!set ab", "is not YAML: line 1, column 1: expected a mapping node"),
        ("model_args: {seed: 1, seed: 2}\n", "the key 'seed' is given twice"),
        ("", "holds nothing; lmms-eval takes a mapping"),
        ("- 3\n", "holds list; lmms-eval takes a mapping"),
        ("# budget: 192\nmodel: a\n", "'# budget: 192' is not understood; write '# budget: 192t'"),
        ("# budget: 192t, really 50%\nmodel: a\n", "is not understood"),
        ("# budget: 64t\n- model: a\n- model: b\n", "has 1 comments '# budget: …' for 2 runs"),
        ("a: !!python/object:os.system {}\n", "is not YAML: line 1"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        read(written(tmp_path, text))
    assert message in str(caught.value)


def test_a_list_of_runs_is_checked_run_by_run(tmp_path: Path) -> None:
    text = """\
# budget: 192t
- {model: llava_pruned, model_args: schedule=vtw@11, tasks: mme}
# budget: 64t, really 72t
- {model: llava_pruned, model_args: schedule=vtw@4, tasks: mme}
"""
    runs = read(written(tmp_path, text))
    assert [(run.name, str(run.claim)) for run in runs] == [("a-1", "192t"), ("a-2", "64t, really 72t")]
    assert [check(run).problems for run in runs] == [[], []]


def test_a_method_that_may_keep_less_is_checked_against_an_upper_bound(tmp_path: Path) -> None:
    text = GOOD.replace("[dart@2:252t, random@20:38t]", "pool@0:196t")
    assert problems(tmp_path, text) == []
    assert problems(tmp_path, text.replace("192t", "192t, really 169t")) == []
    assert "keeps 196t" in problems(tmp_path, text.replace("192t", "192t, really 200t"))[0]
    # An upper bound below the claim surely misses it.
    assert "claims 300t" in problems(tmp_path, text.replace("192t", "300t"))[0]


def test_claims_are_read_as_they_are_written() -> None:
    for text in ("192t", "64t, really 82.25t", "50%, really 49.17%", "0t, really 0t"):
        (claim,) = claims(f"model: a\n  # budget: {text}\n")
        assert str(claim) == text
    with pytest.raises(ClaimError):
        Claim(claims("# budget: 0t")[0].amount, "t").check(claims("# budget: 1t")[0].amount, False)


def test_folders_stand_for_their_files(tmp_path: Path) -> None:
    first, second = written(tmp_path, GOOD), written(tmp_path, GOOD, "b.yml")
    assert files([second, tmp_path]) == [second, first]
    with pytest.raises(ConfigError, match=r"nowhere: there is no such file"):
        files([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: this folder holds no \.yaml files"):
        files([tmp_path / "empty"])


def command(*options: str | Path) -> Result:
    return CliRunner().invoke(app, list(map(str, options)))


def test_the_command_names_files_and_exits_with_2(tmp_path: Path) -> None:
    good, bad = written(tmp_path, GOOD), written(tmp_path, GOOD.replace("dart@2", "drat@2"), "b.yaml")
    done = command("check", good, bad, "--json")
    assert done.exit_code == 2
    assert f"{bad}: schedule: unknown method 'drat'" in done.stderr
    assert str(good) not in done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["files"], record["wrong"]) == (2, 1)
    assert [run["problems"] == [] for run in record["runs"]] == [True, False]
    done = command("check", good)
    assert done.exit_code == 0
    assert "dart@2:252t,random@20:38t; 33.3% of the visual tokens a layer" in done.stdout


def test_the_hook_of_pre_commit_runs(tmp_path: Path) -> None:
    """Run the hook as pre-commit does: its entry, with the files that its pattern matches."""
    (hook,) = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    program, *options = hook["entry"].split()
    assert program == PROGRAM.name
    # pre-commit gives it every YAML file, wherever it lies and whatever it is for.
    assert (hook["types"], "files" in hook) == (["yaml"], False)
    (tmp_path / "experiments").mkdir()
    other = written(tmp_path, "on: push\njobs: {a: {steps: [{run: lmms-eval --model llava_pruned}]}}\n", "ci.yml")
    stock = written(tmp_path, "model: llava_hf\ntasks: mme\n", "stock.yaml")
    for text, code in (
        (GOOD, 0),
        (GOOD.replace("dart@2", "drat@2"), 2),
        (GOOD.replace("llava_pruned", "llava_prunned"), 2),
        ("- {model: qwen2_5_vl_pruned, tasks: [mme]}", 2),
        (GOOD + "tasks: [", 2),
    ):
        line = [PROGRAM, *options, *map(str, (written(tmp_path / "experiments", text, "a.yaml"), other, stock))]
        assert subprocess.run(line, capture_output=True, check=False, cwd=ROOT).returncode == code, text
    assert subprocess.run([PROGRAM, *options, str(other)], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
def test_the_keys_are_those_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.__main__ import parse_eval_args

    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    parser, _ = parse_eval_args()
    # It also accepts "env", which is not one of its options.
    assert {action.dest for action in parser._actions} | {"env"} == KEYS


@pytest.mark.slow
def test_the_options_of_a_command_line_are_those_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their spellings; those that take no value; and numbers where `check` reads numbers."""
    from lmms_eval.__main__ import parse_eval_args

    monkeypatch.setattr(sys, "argv", ["lmms-eval"])
    theirs, _ = parse_eval_args()

    def described(options: Any) -> dict[str, tuple[str, bool]]:
        actions = [action for action in options._actions if action.dest != "help"]
        return {name: (action.dest, action.nargs == 0) for action in actions for name in action.option_strings}

    assert described(parser()) == described(theirs)
    types = {action.dest: action.type for action in theirs._actions}
    assert (types["limit"], types["offset"]) == (float, int)


def test_the_readmes_first_command_passes() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (written,) = re.findall(r"```bash\n(lmms-eval --model llava_pruned [^`]*)```", readme)
    words = shlex.split(written.replace("\\\n", " "))
    checked = check(run_of(words))
    assert (checked.problems, checked.notes) == ([], [])
    assert checked.percent == pytest.approx(33.46, abs=0.01)
    done = subprocess.run([PROGRAM, "check", "--", *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lmms-eval: dart@2:0.44,random@20:0.07; 33.5% of the visual tokens a layer")


def test_a_command_line_is_the_same_run_as_its_file(tmp_path: Path) -> None:
    words = ["--model", "llava_pruned", "--model_args", "schedule=dart@2:252t,batch_size=8", "--tasks", "mme,pope"]
    (run,) = read(
        written(tmp_path, "{model: llava_pruned, model_args: 'schedule=dart@2:252t,batch_size=8', tasks: 'mme,pope'}")
    )
    of_words = run_of(["accelerate", "launch", "--num_processes", "4", "-m", "lmms_eval", "eval", *words])
    assert of_words.settings == run.settings
    assert run_of(["env/bin/lmms-eval", "-b", "4", "-x", "--limit=8"]).settings == {
        "batch_size": "4",
        "predict_only": True,
        "limit": 8.0,
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "lmms-eval --model llava_pruned --log_sample",
            "lmms-eval has no option --log_sample. Did you mean '--log_samples'?",
        ),
        ("lmms-eval --model", "argument --model: expected one argument."),
        ("lmms-eval --limit some", "argument --limit: invalid float value: 'some'."),
        ("lmms-eval --config a.yaml", "--config a.yaml: check the file itself: lmms-prune check a.yaml"),
        ("lmms-eval --model llava_prunned --tasks mme", "Did you mean 'llava_pruned'?"),
        ("lmms-eval --model llava_pruned --tasks mme --model_args schedule=drat@2:0.4", "Did you mean 'dart'?"),
        ("lmms-eval --model llava_pruned --tasks textvqa", "contains a test split, which cannot be scored locally"),
        ("lmms-eval --model llava_pruned --tasks mme --log_samples", "log_samples: needs an output_path."),
        ("lmms-eval", "tasks: None must be a text of names"),
    ],
)
def test_mistakes_of_a_command_line_are_named(line: str, message: str) -> None:
    done = CliRunner().invoke(app, ["check", "--", *line.split()])
    assert done.exit_code == 2
    assert message in " ".join(done.stderr.split())
    assert done.stderr.startswith("lmms-eval: ")
