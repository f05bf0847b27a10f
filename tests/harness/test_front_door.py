"""Every way in which a schedule reaches the model gives the same run, on every benchmark."""

from __future__ import annotations

import json
import math
import re
import shlex

import pytest

from lmms_prune.demo.benchmarks import TASKS
from lmms_prune.models import FAMILIES

SCHEDULE = "dart@2:0.44,random@5:0.07"
SEED = 3
THREE_STAGES = "fastervlm@0:0.5,fastv@3:0.25,random@5:0.05"
# One number at least per benchmark; mmbench's and textvqa's "submission" is a file, not a number.
METRICS = {
    "mme": ("mme_perception_score", "mme_cognition_score"),
    "scienceqa_img": ("exact_match",),
    "scienceqa": ("exact_match",),
    "pope": ("pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio"),
    "textvqa_val": ("exact_match",),
    "mmbench_en_dev_static": ("gpt_eval_score",),
    "mmbench_cn_dev_static": ("gpt_eval_score",),
    "gqa": ("exact_match",),
    "infovqa_val": ("anls",),
    "docvqa_val": ("anls",),
    "ocrbench": ("ocrbench_accuracy",),
}
ALL = (*TASKS, "scienceqa")
# As one names them: a group for its only member that has answers.
NAMED = tuple("textvqa" if task == "textvqa_val" else task for task in ALL)

pytestmark = pytest.mark.core


def _numbers(run) -> dict[str, list[float]]:
    numbers = {task: [run.metrics[task][f"{name},none"] for name in METRICS[task]] for task in ALL}
    for task, values in numbers.items():
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in values), (task, values)
    return {task: [float(value) for value in values] for task, values in numbers.items()}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """Every family: each is a model of lmms-eval's command."""
    return request.param


@pytest.fixture(scope="module")
def reference(harness):
    return harness.pruned("llava", ["textvqa"], schedule=SCHEDULE, seed=SEED)


@pytest.fixture(scope="module")
def everything(harness, family):
    return harness.pruned(family, NAMED, schedule=SCHEDULE, seed=SEED)


@pytest.fixture(scope="module")
def commands(harness):
    """Some spellings and two ways to start the command, each with every benchmark of one family."""
    names = ("llava", "llava_next", "qwen2_5_vl", "qwen2_vl", "qwen3_vl")
    llava, tiles, qwen, qwen2, qwen3 = (harness.checkpoints[family] for family in names)
    spelled = {
        "llava": (f"schedule={SCHEDULE},seed={SEED},pretrained={llava}", ("lmms-eval",)),
        "qwen2_5_vl": (f'pretrained={qwen},seed={SEED},schedule="{SCHEDULE}"', ("lmms-eval", "eval")),
        "qwen2_vl": (f"seed={SEED},pretrained={qwen2},schedule={SCHEDULE}", ("lmms-eval",)),
        "qwen3_vl": (f"schedule={SCHEDULE},pretrained={qwen3},seed={SEED}", ("lmms-eval",)),
        "llava_next": (f"unpad=true,pretrained={tiles},schedule={SCHEDULE},seed={SEED}", ("lmms-eval",)),
    }
    tasks = ("--tasks", ",".join(NAMED), "--include_path", str(harness.configs))
    return {
        family: harness.fork("--model", harness.models[family], "--model_args", text, *tasks, command=command)
        for family, (text, command) in spelled.items()
    }


@pytest.fixture(scope="module")
def configured(harness):
    """Several evaluations in one process: three spellings in a --config file, and a schedule of three stages."""
    path = harness.checkpoints["llava"]
    given = {
        "text": f"pretrained={path},schedule={SCHEDULE},seed={SEED}",
        "mapping": {"pretrained": str(path), "schedule": SCHEDULE, "seed": SEED},
        "list": {"pretrained": str(path), "schedule": SCHEDULE.split(","), "seed": SEED},
    }
    runs = {name: {"model": "llava_pruned", "model_args": args, "tasks": "textvqa"} for name, args in given.items()}
    for family, model in harness.models.items():
        text = harness.text(family, schedule=THREE_STAGES, batch_size=2)
        runs[f"three stages, {family}"] = {"model": model, "model_args": text, "tasks": "pope"}
    return harness.run_config(runs)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["text", "mapping", "list"])
def test_every_spelling_in_a_config_gives_the_same_run(spelling, configured, reference):
    run = configured[spelling]
    assert run.results is not None, run.stderr[-3000:]
    assert run.recorded["schedule"] == SCHEDULE
    assert run.recorded["settings"]["seed"] == str(SEED)
    assert set(run.answers) == {"textvqa_val", "textvqa_test"}
    assert run.answers == reference.answers
    assert run.accounting == reference.accounting


@pytest.mark.slow
def test_three_stages_are_recorded_as_executed(family, configured):
    run = configured[f"three stages, {family}"]
    assert run.returncode == 0
    assert run.results is not None, run.stderr[-3000:]
    assert run.recorded["schedule"] == THREE_STAGES


@pytest.mark.parametrize(
    "given",
    [
        "schedule={S},seed=3,pretrained={P}",
        "pretrained={P},seed=3,schedule={S}",
        "pretrained={P},seed=3,schedule='{S}'",
        "pretrained={P}, schedule=[{S}], seed=3",
        '{{"seed": 3, "pretrained": "{P}", "schedule": "{S}"}}',
        {"schedule": "{S}", "seed": "3"},
        {"schedule": ["dart@2:0.44", "random@5:0.07"], "seed": 3},
    ],
    ids=str,
)
def test_python_entry_takes_text_and_mapping(given, harness, reference):
    path = str(harness.checkpoints["llava"])
    if isinstance(given, str):
        given = given.format(S=SCHEDULE, P=path)
    else:
        given = {name: v.format(S=SCHEDULE) if isinstance(v, str) else v for name, v in given.items()}
        given["pretrained"] = path
    run = harness.evaluate("llava_pruned", ["textvqa"], given)
    assert run.recorded["schedule"] == SCHEDULE
    assert run.answers == reference.answers
    assert run.accounting == reference.accounting


def test_a_model_object_gives_the_same_run(harness, reference):
    model = harness.create("llava", schedule=SCHEDULE, seed=SEED)
    run = harness.evaluate(model, ["textvqa"])
    assert run.recorded["schedule"] == SCHEDULE
    assert run.answers == reference.answers


def test_schedule_and_seed_reach_the_model(harness, reference):
    unpruned = harness.pruned("llava", ["textvqa"])
    assert unpruned.recorded["schedule"] == "none"
    assert unpruned.answers != reference.answers
    # The seed is seen where random draws decide alone.
    first, again, other = (
        harness.pruned("llava", ["pope", "ocrbench"], schedule="random@0:0.3", seed=seed) for seed in (0, 0, 1)
    )
    assert first.answers == again.answers != other.answers


def test_all_benchmarks_have_numbers(everything):
    numbers = _numbers(everything)
    assert set(numbers) == {*TASKS, "scienceqa"} == set(METRICS)
    assert any(value > 0 for values in numbers.values() for value in values), "no answer was right on any benchmark"
    assert all(len(rows) == 4 for rows in everything.answers.values())
    assert all(isinstance(answer, str) and answer for rows in everything.answers.values() for answer in rows)


@pytest.mark.slow
def test_all_benchmarks_on_the_command_line(family, commands, everything):
    """Wherever the schedule stands among the arguments; with the seed between it and the rest, see test_ranks."""
    run = commands[family]
    assert run.results is not None, run.stderr[-3000:]
    assert run.recorded["schedule"] == SCHEDULE
    assert run.recorded["settings"]["seed"] == str(SEED)
    assert _numbers(run) == _numbers(everything)
    assert run.answers == everything.answers
    assert run.accounting == everything.accounting


def test_models_are_found_by_name():
    from lmms_eval.models import list_available_models

    assert {"llava_pruned", "qwen2_5_vl_pruned"} <= set(list_available_models())


@pytest.mark.slow
def test_the_front_door_verbatim(harness):
    """The README's first command, word for word; its default checkpoint and data are folders of those names here."""
    # Nor is anything else of the tests about it.
    environment = {name: value for name, value in harness.forking.environment.items() if name != "PYTHONPATH"}
    from lmms_prune.demo.checkpoints import build_llava

    folder = harness.new_folder()
    for data in harness.mirror.iterdir():
        if data.name != "results":  # where lmms-eval leaves what it would submit, in every run there
            (folder / data.name).symlink_to(data)
    (folder / "llava-hf").mkdir()
    build_llava(folder / "llava-hf" / "llava-1.5-7b-hf", layers=24)
    readme = (harness.configs.parent / "README.md").read_text("utf-8")
    (written,) = re.findall(r"```bash\n(lmms-eval --model llava_pruned [^`]*)```", readme)
    program, *command = shlex.split(written.replace("\\\n", " "))
    assert command[-2:] == ["--output_path", "results"]
    # As it stands: its results are where the README says, so that the leaderboard can read them.
    run = harness.run(*command, command=(program,), cwd=folder, output=folder / "results", output_in_config=True,
                      environment=environment)  # fmt: skip
    assert set(run.answers) == {"textvqa_val"}
    assert run.results is not None, run.stderr[-3000:]
    assert run.recorded["schedule"] == "dart@2:0.44,random@20:0.07"
    assert run.recorded["settings"]["pretrained"] == "llava-hf/llava-1.5-7b-hf"
    [counts] = {tuple(row["kept_visual_tokens"]) for rows in run.accounting.values() for row in rows}
    assert counts == (28, 4)
    done = harness.forking.run("lmms-prune", "leaderboard", folder / "results", "--format", "json", "--no-cache")
    [model] = json.loads(done.stdout)["models"]
    [row] = [row for budget in model["budgets"] for row in budget["rows"]]
    assert row["label"] == "dart@2:0.44,random@20:0.07"
    assert "no unpruned run" in done.stderr, done.stderr
