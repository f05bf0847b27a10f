"""The chain of `lmms-prune reproduce`: its items, scaled rows, steps, estimate, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from built import Checkpoint
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.configs.table import ROWS
from lmms_prune.efficiency.cost import prefill_flops
from lmms_prune.efficiency.estimate import TEXT_TOKENS
from lmms_prune.models.architectures import architecture
from lmms_prune.reproduce.chain import ChainOptions, ModelPlan, arithmetic_steps, plan_model
from lmms_prune.reproduce.estimate import document_flops, gpu_hours, information_flops
from lmms_prune.reproduce.items import ITEMS, ReproduceError, chosen_items
from lmms_prune.reproduce.models import StudiedModel, studied_models
from lmms_prune.reproduce.rows import table_rows
from lmms_prune.schedule import Schedule


def called(*words: str):
    """The command in this process, at a width at which no message is broken."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["reproduce", *words])


def planned(model: str, items: str, out: Path = Path("/out"), **options) -> list[ModelPlan]:
    chosen = tuple(chosen_items(items.split(",")))
    studied = [one for one in studied_models(model, "") if any(one.makes(item) for item in chosen)]
    return [plan_model(one, out, ChainOptions(chosen, **options)) for one in studied]


def average(model: StudiedModel, schedule: Schedule) -> float:
    """The share of the visual tokens that a schedule keeps, on average over the layers."""
    tokens = model.sizes.example_tokens
    return float(schedule.avg_visual_tokens(model.sizes.layers, [tokens])) / tokens


def test_rows_of_the_papers_models_are_those_of_the_configurations() -> None:
    for model in studied_models("llava,qwen", ""):
        written = {row.text for row in ROWS.values() if row.model == model.table.model and not row.control}
        plans = table_rows(model, 3)
        assert {str(Schedule.parse(text)) for text in written} == {str(plan.schedule) for plan in plans}
        randoms = [plan for plan in plans if plan.printed.name.endswith("Random")]
        assert {plan.seed for plan in randoms} == {0, 1, 2}
        assert {plan.seed for plan in plans if plan not in randoms} == {0}


def test_rows_of_the_demo_are_scaled_in_depth_and_equal_in_budget() -> None:
    for model in studied_models("demo", ""):
        assert model.sizes.layers == 12
        plans = table_rows(model, 1)
        printed = {(plan.printed.name, plan.printed.budget) for plan in plans}
        assert len(printed) == len(plans) == (25 if model.number == 2 else 7)
        for plan in plans:
            layers = [stage.layer for stage in plan.schedule.stages]
            of, paper = model.reference.layers, table_layers(model, plan.printed.name, plan.printed.budget)
            for own, theirs, stage in zip(layers, paper, plan.schedule.stages, strict=True):
                assert own == max(round(theirs * 12 / of), stage.spec.lowest_layer)
        for budget in {plan.printed.budget for plan in plans} - {""}:
            solved = [
                plan
                for plan in plans
                if plan.printed.budget == budget and plan.printed.name not in ("PDrop", "SparseVLM", "VTW")
            ]
            shares = [average(model, plan.schedule) for plan in solved]
            assert len(shares) >= 6
            # DART keeps 8 n + 4 tokens, of at most 144.
            assert max(shares) - min(shares) < 0.025, budget


def table_layers(model: StudiedModel, name: str, budget: str) -> list[int]:
    """The layers of a row as the paper has them, from the unscaled model."""
    (unscaled,) = (one for one in studied_models("llava,qwen", "") if one.number == model.number)
    plan = next(p for p in table_rows(unscaled, 1) if (p.printed.name, p.printed.budget) == (name, budget))
    return [stage.layer for stage in plan.schedule.stages]


def test_items_share_their_steps() -> None:
    llava, qwen = planned("llava,qwen", "all")
    names = [step.name.removeprefix(f"{llava.model.name}-") for step in llava.steps]
    assert names == ["table", "leaderboard", "bench", "information", "methods", "horizon", "oracle"]
    by_name = dict(zip(names, llava.steps, strict=True))
    assert by_name["table"].items == ("table2", "table3")
    assert by_name["information"].items == ("fig5", "fig7")
    # One folder of measured information serves every step that needs it.
    folders = [
        step.words[step.words.index("--information") + 1] for step in llava.steps if "--information" in step.words
    ]
    assert (
        folders
        == [str(llava.information)] * 2
        == [by_name["information"].words[by_name["information"].words.index("--out") + 1]] * 2
    )
    assert {item for plan in (llava, qwen) for step in plan.steps for item in step.items} == set(ITEMS)


def test_table3_alone_evaluates_only_its_rows_on_textvqa() -> None:
    (plan,) = planned("llava", "table3")
    sweep = plan.steps[0]
    assert sweep.words[sweep.words.index("--tasks") + 1] == "prune_textvqa_ocr"
    files = [word for word in sweep.words if word.endswith(".yaml")]
    assert len(files) == 13 == sweep.pieces  # 9 rows, of which two draw at random, with three seeds
    assert "unpruned" in files[0]
    assert len(list(arithmetic_steps(list(plan.items)))) == 9


def test_pieces_count_every_evaluation_once() -> None:
    (plan,) = planned("llava", "fig1,fig8,fig6")
    by_name = {step.name.rpartition("-")[2]: step for step in plan.steps}
    removed = 33  # unpruned, and withdrawn at each of 32 layers
    single = 2 * (2 * 32 + 2 * 31)  # random and DivPrune at all layers, FastV and DART from layer 1 on; two keeps
    assert by_name["methods"].pieces == removed + single
    # TextVQA's are there by then; information of four benchmarks is new.
    assert by_name["horizon"].pieces == 3 * removed + 4 * 200
    assert by_name["oracle"].pieces == 2 * (removed + 2 * 2 * 32)


def test_estimates_follow_from_flops() -> None:
    sizes = architecture("llava-1.5-7b")
    unpruned, pruned = (document_flops(sizes, Schedule.parse(text)) for text in ("none", "dart@2:0.29"))
    assert pruned < unpruned
    assert unpruned == pytest.approx(prefill_flops(sizes, [576 + TEXT_TOKENS] * 32), rel=0.1)
    # 145 sequences of text and four tokens run through the layers from each layer on: 528 layers in all.
    layer = prefill_flops(sizes, [TEXT_TOKENS + 4]) - prefill_flops(sizes, [])
    assert information_flops(sizes, 3, 2) == pytest.approx(3 * (145 * 528 * layer + unpruned), rel=0.02)
    assert gpu_hours(3.6e15, 1.0) == 1.0
    (few,), (many,) = planned("llava", "table2", limit=10), planned("llava", "table2")
    assert few.steps[0].flops * 100 < many.steps[0].flops


def test_a_dry_run_writes_a_chain_that_the_commands_take(tmp_path: Path) -> None:
    """Also for models that are not here: nothing is loaded. Every command's words are read by the command itself."""
    result = called("all", "--out", str(tmp_path), "--dry-run", "--json", "--rate", "100")
    assert result.exit_code == 0, result.output
    record = json.loads(result.output.splitlines()[-1])
    assert record["gpu_hours"] == pytest.approx(sum(step["gpu_hours"] for step in record["steps"]))
    assert 10 < record["gpu_hours"] < 1000
    assert "100 TFLOP/s" in record["assumptions"]
    group = typer.main.get_command(app)
    for step in record["steps"]:
        program, name, *words = shlex.split(step["command"])
        assert program == "lmms-prune"
        group.commands[name].make_context(name, list(words))
    script = (tmp_path / "reproduce.sh").read_text(encoding="utf-8")
    lines = [line for line in script.splitlines() if line.startswith("lmms-prune")]
    assert lines[:-1] == [step["command"] for step in record["steps"]]
    assert lines[-1].endswith("--report-only")
    table = called("all", "--out", str(tmp_path), "--dry-run")
    assert "GPU hours" in table.output
    assert "llava-1.5-7b-methods" in table.output
    assert not list(tmp_path.glob("steps"))


def test_every_written_configuration_passes_the_check(tmp_path: Path) -> None:
    assert called("table1", "table2", "--models", "demo", "--out", str(tmp_path), "--dry-run").exit_code == 0
    configs = sorted(tmp_path.glob("*/configs/*.yaml"))
    assert len(configs) == 32
    result = CliRunner().invoke(app, ["check", *map(str, configs)])
    assert result.exit_code == 0, result.output


BAD = (
    (("fig4", "--models", "demo"), "there is no item 'fig4'"),
    (("tabel1", "--models", "demo"), "Did you mean 'table1'?"),
    (("fig1", "--models", "gpt-4"), "--models gpt-4: write demo, llava, qwen or a checkpoint's folder"),
    (("fig1", "--models", "demo,llava"), "start two commands"),
    (("fig1", "--models", "qwen"), "fig1: not about --models qwen; give llava"),
    (("fig1", "--models", "demo", "--limit", "3"), "cuts one of MME's pairs"),
    (("fig1", "--models", "demo", "--methods", "fastvv"), "Did you mean 'fastv'?"),
    (("fig1", "--models", "demo", "--keeps", "1.5"), "--keeps 1.5"),
    (("fig1", "--models", "demo", "--shard", "3/2"), "--shard 3/2"),
    (("fig1", "--models", "demo", "--shard", "1/2", "--cluster", "local"), "use one of them"),
    (("fig1", "--models", "demo", "--dry-run", "--report-only"), "--dry-run and --report-only"),
    (("table5", "--models", "demo"), "Tables 4 and 5 are the schedules of Tables 1 and 2"),
    (("fig1", "--models", "demo", "--methods", " "), "--methods ' ' names nothing"),
    (("fig1", "--models", "demo", "--keeps", ""), "--keeps '' names nothing"),
    (("fig1", "--models", "demo", "--tasks", ","), "--tasks ',' names nothing"),
    (("fig1", "--models", "demo", "--cluster", "pbs", "--dry-run"), "--cluster pbs: write slurm or local"),
    (("fig1", "--models", "demo", "--cluster-option", "a=b", "--dry-run"), "it belongs to --cluster"),
    (("fig1", "--models", "demo", "--model-args", "schedule=none", "--dry-run"), "the items decide what is pruned"),
    (("fig1", "--models", "llava", "--model-args", "pretrained=a/b", "--dry-run"), "--models names the checkpoint"),
    (("fig1", "--models", "llava", "--model-args", "dtipe=float32", "--dry-run"), "Did you mean 'dtype'?"),
    (("fig1", "--models", "llava", "--model-args", "min_pixels=9", "--dry-run"), "It is for another model family"),
    (("fig1", "--models", "demo", "--report-only"), "holds no steps, so nothing has run there yet"),
)


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message for _, message in BAD])
def test_what_cannot_be_made_is_refused_at_once(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = called(*words, "--out", str(tmp_path))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not list(tmp_path.glob("steps"))


def test_random_is_among_the_methods_of_the_figures() -> None:
    """Every claim about methods is a comparison with it."""
    (plan,) = planned("llava", "fig1", methods="dart;order=reference, fastv")
    assert plan.methods == ["random", "dart;order=reference", "fastv"]
    (step,) = plan.steps
    assert step.words[step.words.index("--methods") + 1] == "random,dart;order=reference,fastv"
    (plan,) = planned("llava", "fig1", methods="dart,random")
    assert plan.methods == ["random", "dart"]


def test_a_model_without_the_layers_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llava", layers=3)
    result = called("fig1", "--models", str(folder), "--out", str(tmp_path), "--dry-run")
    assert result.exit_code == 2
    assert "fig1: " in result.output
    assert "has 3 decoder layers" in result.output
    assert "at least 6" in result.output


def test_a_task_whose_scores_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    """Whether it has a score of each document is asked of its first document."""
    result = called("fig1", "--models", "demo", "--tasks", "textcaps_val", "--out", str(tmp_path))
    assert result.exit_code == 2
    assert "the data of textcaps_val cannot be read" in result.output


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("not a folder", encoding="utf-8")
    for words in (("--models", "demo"), ("--models", "llava")):
        result = called("fig1", *words, "--out", str(taken / "below"), "--dry-run")
        assert result.exit_code == 2, result.output
        assert f"{taken / 'below'} cannot be written" in result.output


def test_an_unknown_item_names_all() -> None:
    with pytest.raises(ReproduceError, match="table1, table2, table3, fig1, fig2, fig5"):
        chosen_items(["fig3"])


class _ClusterJob:
    """A job that has ended, with or without an error."""

    def __init__(self, error: Exception | None) -> None:
        self._error = error
        self.paths = SimpleNamespace(stderr="/jobs/1_log.err")

    def done(self) -> bool:
        return True

    def exception(self) -> Exception | None:
        return self._error


@pytest.mark.parametrize("error", [None, RuntimeError("out of memory")], ids=["all well", "one fails"])
def test_parts_on_a_cluster(error: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is this command with --shard; a failed part ends the command before anything is collected."""
    submitted: list[list[str]] = []
    ran: list[str] = []

    def submit(command: list[str]) -> _ClusterJob:
        submitted.append(command)
        return _ClusterJob(error if len(submitted) == 2 else None)

    monkeypatch.setattr("lmms_prune.sweep.cluster.submitter", lambda *args: submit)
    monkeypatch.setattr("lmms_prune.reproduce.commands._run", lambda *args: ran.append("collected") or {})
    words = ("fig10", "--models", "demo", "--quick", "--limit", "6", "--methods", "random,dart", "--out", str(tmp_path))
    result = called(*words, "--cluster", "slurm", "--parts", "3", "--json")
    assert [command[-2:] for command in submitted] == [["--shard", f"{part}/3"] for part in (1, 2, 3)]
    for command in submitted:
        assert command[1:3] == ["reproduce", "fig10"]
        assert called(*command[2:-2], "--dry-run", "--json").exit_code == 0
        assert {"--quick", "--limit", "6", "--methods", "random,dart"} <= set(command)
    assert result.exit_code == (2 if error else 0), result.output
    assert ran == ([] if error else ["collected"])
    assert ("part 2/3 failed; log: /jobs/1_log.err" in result.output) == bool(error)
