"""Methods of one's own: named by a text, imported only where a model is pruned, held to what their class declares."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from observed import Tiny, kept
from torch import Tensor
from typer.testing import CliRunner

from lmms_prune import Schedule, ScheduleError, prune, stage
from lmms_prune.certificate.contract import failures
from lmms_prune.certificate.tiny import mixed_rows
from lmms_prune.cli import app
from lmms_prune.errors import PruningError
from lmms_prune.methods import reference
from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.dart import DART
from lmms_prune.methods.view import TokenView
from lmms_prune.pruning.block import bound
from lmms_prune.pruning.trace import Trace

HEAD = """
from dataclasses import dataclass, field
from typing import ClassVar
import torch
from lmms_prune.methods.base import Method, ScoreMethod
"""
LONGEST = '''
@dataclass(frozen=True)
class Longest(ScoreMethod):
    """Keeps the longest hidden states."""
    reads: ClassVar[tuple[str, ...]] = ("hidden",)
    power: float = field(default=2.0, metadata={"low": 0.5})
    count: int = 3
    flag: bool = False
    text: str = "abc"
    def score(self, view):
        return view.hidden.norm(p=self.power, dim=-1)
'''


@dataclass(frozen=True)
class Shortest(ScoreMethod):
    """The shortest hidden states; a class of this test's module."""

    reads: ClassVar[tuple[str, ...]] = ("hidden",)
    power: float = 2.0

    def score(self, view: TokenView) -> Tensor:
        return -view.hidden.norm(p=self.power, dim=-1)


def method_file(folder: Path, body: str = LONGEST, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(HEAD + body, encoding="utf-8")
    return path


def one_method(score: str, declared: str = "", base: str = "ScoreMethod", name: str = "score") -> str:
    arguments = "self, view" if name == "score" else "self, view, budget"
    return f"class Mine({base}):\n    {declared or 'reads = ()'}\n    def {name}({arguments}):\n        {score}\n"


def run(tiny: Tiny, schedule: Any, **options: Any) -> Trace:
    return tiny.run(tiny.batch(mixed_rows(tiny)), schedule, **options)[0]


# -- the text ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "mine.py:Longest@2:0.3",
        "mine.py@2:0.3",
        "a folder/é-1.2/mine.py:Longest@2:12t;flag=true;power=3.0",
        "/tmp/mine.py:Longest@2",
        "package.module:Longest@2:?",
        "mine.py:Longest@2:0.3,random@5:0.1",
    ],
)
def test_a_text_reads_back_as_itself_and_needs_no_file(text: str) -> None:
    schedule = Schedule.parse(text)
    assert str(schedule) == text
    assert Schedule.parse(str(schedule)) == schedule
    assert schedule.stages[0].spec.own
    assert schedule.stages[0].at_most, "before its code has run, its plan is an upper bound"
    assert "/" not in str(schedule.portable).partition(":")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b.py:M@2:0.3", "its path has no comma, semicolon or @"),
        ("a@b.py:M@2:0.3", "must not have an @"),
        ("a;b.py:M@2:0.3", "its path has no comma"),
        ("a=b.py:M@2:0.3", "has '=', which a schedule text cannot hold"),
        ("a[1].py:M@2:0.3", "has '\\[', which a schedule text cannot hold"),
        ("a\nb.py:M@2:0.3", "which a schedule text cannot hold"),
        ("mine.py:2M@2:0.3", "'2M' is no name of a class"),
        ("mine.txt:M@2:0.3:4", "neither a ratio"),
        ("a-b:M@2:0.3", "neither a file that ends in .py nor a module"),
        ("mine.py:M@2:0.3;a b=3", "is no name of an option"),
        ("mine.py:M@2:0.3;power=1;power=2", "twice"),
        ("mine.py:M@two:0.3", "must be a whole number"),
        ("rnadom@2:0.3", "Did you mean 'random'"),
    ],
)
def test_a_text_that_cannot_be_written_back_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


MARKER = "open({!r}, 'w').close()\n"
READERS = """
import sys
from lmms_prune import Schedule
from lmms_prune.cli import app
text, config, results = sys.argv[1:]
Schedule.parse(text).check(8)
for words in (["check", config], ["schedule", text, "--model", "llava-1.5-7b"], ["leaderboard", results, "--no-cache"],
              ["gate", results, "--no-cache", "--min-rel", "0", "--no-verify"]):
    try:
        app(words)
    except SystemExit as end:
        assert not end.code, words
assert "torch" not in sys.modules
try:
    app(["verify", results])  # of rows that are made up
except SystemExit as end:
    assert end.code == 1
"""


@pytest.mark.parametrize("form", ["{file}:Mine@2:0.3", "{file}@2:0.3;x=1", "stranger_module:Mine@2:0.3"])
def test_what_only_reads_a_schedule_imports_nothing_of_it(tmp_path: Path, form: str) -> None:
    """`check`, `schedule`, `leaderboard`, `gate` and `verify`, on files of strangers; where a model is pruned, the code does run."""
    sys.path.append(str(Path(__file__).parents[1] / "leaderboard"))
    from written import write_run

    mark, file = tmp_path / "mark", tmp_path / "stranger_module.py"
    file.write_text(MARKER.format(str(mark)), encoding="utf-8")
    text = form.format(file=file)
    config, results = tmp_path / "a.yaml", tmp_path / "results"
    config.write_text(f"model: llava_pruned\nmodel_args: {{schedule: '{text}'}}\ntasks: pope\n", encoding="utf-8")
    for name, schedule, values in (("a", "none", [1.0, 1.0]), ("b", text, [1.0, 0.0])):
        write_run(results / name, {"gqa": values}, schedule, tokens=33)
    words = [sys.executable, "-c", READERS, text, config, results]
    # The module can be imported from here, so that not importing it is a choice.
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would run; its options and layers are not checked here" in done.stdout.replace("\n", " ")
    assert not mark.exists()
    with pytest.raises(ScheduleError, match=r"holds no method|raises when it is imported"):
        bound(Schedule.parse(f"{file}@2:0.3"))
    assert mark.exists()


def test_check_names_a_file_that_is_not_there(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("model: llava_pruned\nmodel_args: {schedule: 'no.py:M@2:0.3'}\ntasks: pope\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["check", str(config)])
    assert done.exit_code == 2
    assert "there is no file no.py below" in done.output


# -- importing ---------------------------------------------------------------------------------------------------------


def test_a_file_a_module_and_an_object_prune_alike(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = method_file(tmp_path, name="longest_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    import longest_module  # type: ignore[import-not-found]

    given = [
        f"{path}:Longest@2:0.3;power=3",
        f"{path}@2:0.3;power=3.0;count=3",
        "longest_module:Longest@2:0.3;power=3.0",
        [stage(longest_module.Longest(power=3.0), 2, 0.3)],
        stage(longest_module.Longest(power=3.0), 2, Decimal("0.3")),
    ]
    traces = [run(tiny, schedule) for schedule in given]
    assert all(kept(trace) == kept(traces[0]) for trace in traces)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for trace in traces:
        assert Schedule.parse(str(trace.schedule)) == trace.schedule
        assert str(trace.schedule).endswith("@2:0.3;power=3.0"), "defaults are left out, values are written one way"
        assert trace.schedule.stages[0].spec.sha256 == digest
        assert trace.schedule.sources.endswith(f"={digest}")
    assert kept(run(tiny, [stage(Shortest(), 2, 0.3), "random@4:0.1"])) != kept(traces[0])
    assert str(Schedule.parse([stage(Shortest(power=4.0), 2, 12), "random@4:5t"])) == (
        "test_own:Shortest@2:12t;power=4.0,random@4:5t"
    )


def test_an_object_of_a_built_in_method_is_that_method(tiny: Tiny) -> None:
    made = stage(DART(order="reference"), 2, 0.4)
    assert made == Schedule.parse("dart@2:0.4;order=reference").stages[0]
    assert kept(run(tiny, [made])) == kept(run(tiny, "dart@2:0.4;order=reference"))
    assert stage("random", 2, "12t") == Schedule.parse("random@2:12t").stages[0]
    assert stage("vtw", 2) == Schedule.parse("vtw@2").stages[0]
    with pytest.raises(ScheduleError, match="does not say how much"):
        stage("random", 2)


def test_an_edited_file_is_read_anew(tmp_path: Path) -> None:
    """Also within the second in which a .pyc of the old text would count as current."""
    path = method_file(tmp_path)
    text = f"{path}@2:0.3"
    old = bound(Schedule.parse(text)).stages[0].spec
    path.write_text(path.read_text("utf-8").replace("default=2.0", "default=4.0"), encoding="utf-8")
    new = bound(Schedule.parse(text)).stages[0].spec
    assert (old.options[0].default, new.options[0].default) == (2.0, 4.0)
    assert old.sha256 != new.sha256
    assert not list(tmp_path.rglob("*.pyc"))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("1 / 0\n", r"mine\.py raises when it is imported: ZeroDivisionError: division by zero \(line 6\)"),
        ("def\n", r"raises when it is imported: SyntaxError: .* \(line 6\)"),
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys; sys.exit(3)\n", "raises when it is imported: SystemExit: 3"),
        ("@dataclass\nclass A(ScoreMethod):\n    x: int = 1\n", "cannot inherit non-frozen dataclass"),
        ("class A:\n    pass\n", "holds no method: no class in it is a ScoreMethod or a Method"),
        (
            one_method("return 1").replace("Mine", "A") + one_method("return 1").replace("Mine", "B"),
            r"holds 2 methods; name one: .*mine\.py:A or .*mine\.py:B",
        ),
        ("class Mine(ScoreMethod):\n    pass\n", "lacks `score`"),
        (one_method("return 1", "reads = ('atention',)"), "'atention', which is no signal. Did you mean 'attention'"),
        (one_method("return 1", "reads = ('answer',)"), "'answer', which is no signal"),
        (one_method("return 1", "reads = 'hidden'"), r"write a tuple of words"),
        (one_method("return 1", "lowest_layer = -1"), "lowest_layer=-1; allowed are whole numbers from 0"),
        (one_method("return 1", "alpha: float = 1.0"), r"write @dataclass\(frozen=True\) above the class"),
        ("@dataclass(frozen=True)\n" + one_method("return 1", "alpha: float"), "needs a flag, a number or a text"),
        ("@dataclass(frozen=True)\n" + one_method("return 1", "keep: float = 1.0"), "no option can be called 'keep'"),
        (
            "@dataclass(frozen=True)\n" + one_method("return 1", "x: float = field(default=1.0, metadata={'low': 2})"),
            "its own default is refused: option x=1.0: allowed are numbers from 2",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_its_reason(tmp_path: Path, body: str, message: str) -> None:
    path = method_file(tmp_path, body)
    with pytest.raises(ScheduleError, match=message) as raised:
        bound(Schedule.parse(f"random@1:0.5,{path}@2:0.3"))
    assert "stage 2: " in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{path}:Longst@2:0.3", "has no class 'Longst'. Did you mean 'Longest'"),
        ("{path}:dataclass@2:0.3", "is no method: it must be a subclass"),
        ("{path}:ScoreMethod@2:0.3", "lacks `score` and `select`|lacks `score`"),
        ("{path}:Longest@2:0.3;pwer=2", "has no option 'pwer'. Did you mean 'power'"),
        ("{path}:Longest@2:0.3;power=0.1", "option power=0.1: allowed are numbers from 0.5"),
        ("{path}:Longest@2:0.3;count=1.5", "option count=1.5: allowed are whole numbers"),
        ("{path}:Longest@2:0.3;flag=yes", "allowed are true and false"),
        ("{path}:Longest@2", "has no count rule of its own; say how much it keeps"),
        ("/nowhere/mine.py:Longest@2:0.3", "/nowhere/mine.py: there is no such file"),
        ("no_such_package.x:M@2:0.3", "Is it installed"),
        ("lmms_prune.methods.dart:DART@2:0.4", "is the built-in method 'dart'; write 'dart@2:0.44'"),
    ],
)
def test_a_stage_that_the_class_cannot_do_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        bound(Schedule.parse(text.format(path=method_file(tmp_path))))


def test_a_layer_that_the_class_refuses_is_pointed_at(tmp_path: Path) -> None:
    path = method_file(tmp_path, one_method("return 1", "highest_layer = 1"))
    with pytest.raises(ScheduleError, match=r"mine\.py cannot act at layer 2: the layers at which it can act: 0 to 1"):
        bound(Schedule.parse(f"random@1:0.5,{path}@2:0.3"))


def test_an_option_that_no_text_can_hold_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"Shortest.power is a Tensor; allowed are flags, numbers and texts"):
        stage(Shortest(power=torch.ones(1)), 2, 0.3)  # type: ignore[arg-type]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Entry points of packages that are not installed."""
    names: dict[str, str] = {}

    def entry_points(group: str) -> list[SimpleNamespace]:
        assert group == "lmms_prune.methods"
        return [SimpleNamespace(name=name, value=value) for name, value in names.items()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    reference.entry_points.cache_clear()
    yield names
    reference.entry_points.cache_clear()


def test_an_entry_point_stands_for_its_class(tiny: Tiny, installed: dict[str, str]) -> None:
    """What is recorded is the class, which a machine without the package can read too."""
    installed["shortest"] = "test_own:Shortest"
    assert str(Schedule.parse("shortest@2:0.3;power=3")) == "test_own:Shortest@2:0.3;power=3"
    assert kept(run(tiny, "shortest@2:0.3")) == kept(run(tiny, [stage(Shortest(), 2, 0.3)]))
    with pytest.raises(ScheduleError, match="Did you mean 'shortest'"):
        Schedule.parse("shrtest@2:0.3")


def test_a_name_of_a_built_in_method_cannot_be_taken(installed: dict[str, str]) -> None:
    installed["dart"] = "test_own:Shortest"
    with pytest.raises(
        ScheduleError, match=r"'dart' is a built-in method, and an installed package names its test_own"
    ):
        bound(Schedule.parse("dart@2:0.3"))
    assert bound(Schedule.parse("fastv@2:0.3"))


# -- what it returns and reads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (one_method("return view.hidden.sum(-1)"), r"reads hidden states, but declares only nothing: add 'hidden'"),
        (one_method("return view.attention(view.last).mean((1, 2))"), "add 'attention' to the class's `reads`"),
        (one_method("return view.attention(view.last, ahead=True).mean((1, 2))"), "add 'attention ahead'"),
        (one_method("return view.keys(view.visual).sum(-1)"), "add 'keys'"),
        (one_method("return view.values(view.visual).sum((1, 3))"), "add 'values'"),
        (one_method("return view.visual_embeddings.sum(-1)"), "add 'embeddings'"),
        (one_method("return view.encoder.features.sum(-1)"), "add 'encoder'"),
        (one_method("view.grids"), "add 'grid'"),
        (one_method("view.question()"), "add 'question'"),
        (one_method("return view.rotary_means()[0]"), "add 'positions'"),
        (
            one_method("return view.index"),
            r"`score` returned a tensor of int64 of shape .*; allowed is a tensor of floats",
        ),
        (one_method("return view.uniform()[:, :3]"), r"of shape \(5, 3\); allowed is .* of shape \(5, \d+\)"),
        (one_method("return None"), "`score` returned a NoneType"),
        (
            one_method("return view.uniform()", base="Method", name="select"),
            r"`select` returned a tensor of float\d+ of shape .*; allowed is a tensor of bool of shape \(5, \d+\)",
        ),
        (
            one_method("return view.valid[:2]", base="Method", name="select"),
            r"`select` returned a tensor of bool of shape \(2, \d+\); allowed is a tensor of bool of shape \(5, \d+\)",
        ),
        (
            one_method("return view.valid", base="Method", name="select"),
            r"marked \d+, .* tokens of an image; its budget allows",
        ),
        (one_method("return ~view.valid | True", base="Method", name="select"), r"another number of tokens"),
        (one_method("return view.uniform() / 0"), r"the scores of .* are not all finite"),
        (
            one_method("return view.valid & False", base="Method", name="select")
            + "    def rewrite(self, view, keep):\n        return view.index\n",
            r"`rewrite` returned a tensor of int64 .*; allowed is a pair",
        ),
        (
            one_method("return view.valid & False", "reads = ('hidden',)", base="Method", name="select")
            + "    def rewrite(self, view, keep):\n        return view.hidden[:, :2], view.index\n",
            r"as hidden states; allowed are floats of shape \(5, \d+, 'D'\)",
        ),
    ],
)
def test_what_it_does_wrong_is_named_with_the_stage(
    all_tiny: dict[str, Tiny], tmp_path: Path, body: str, message: str
) -> None:
    tiny = all_tiny["qwen2_5_vl"]
    path = method_file(tmp_path, body)
    rows = mixed_rows(tiny)
    with pytest.raises(PruningError, match=message) as raised:
        tiny.run(tiny.batch(rows), f"random@1:0.9,{path}@2:0.3", questions=[question for _, question in rows])
    assert f"stage 2 ('{path}@2:0.3')" in str(raised.value)


def test_fewer_tokens_and_a_count_of_its_own_are_allowed_where_declared(tiny: Tiny, tmp_path: Path) -> None:
    half = "return view.valid & (2 * view.index < budget[:, None].to(view.valid.device))"
    path = method_file(tmp_path, one_method(half, "at_most = adaptive = True", base="Method", name="select"))
    for text in (f"{path}@2:0.5", f"{path}@2"):
        trace = run(tiny, text)
        assert trace.schedule.at_most
        for row in trace.rows:
            share = 0.25 if ":0.5" in text else 0.5
            assert all(n == pytest.approx(share * size, abs=1) for n, size in zip(row.kept[0], row.images, strict=True))
    assert not run(tiny, f"{method_file(tmp_path, name='exact.py')}@2:0.5").schedule.at_most


# -- the commands ------------------------------------------------------------------------------------------------------


def test_a_new_method_keeps_the_contract_and_tests_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["new-method", "my_idea"])
    assert done.exit_code == 0, done.output
    assert "lmms-prune test-method my_idea.py" in done.output
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_my_idea.py"]
    tested = subprocess.run(words, capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout
    assert "2 passed" in tested.stdout


def test_a_method_that_breaks_the_contract_fails_its_test(tmp_path: Path) -> None:
    """One that looks at the whole batch, changes what it is given, declares too much, and draws from torch's generator."""
    body = one_method("return torch.rand(view.valid.shape) + view.hidden.mean()", "reads = ('hidden', 'keys')")
    path = method_file(tmp_path, body)
    done = CliRunner().invoke(app, ["test-method", str(path), "--json"])
    assert done.exit_code == 1
    report = json.loads(done.output.splitlines()[-1])
    problems = {check["check"]: check["problem"] for check in report["checks"] if check["problem"]}
    assert report["failed"] == len([check for check in report["checks"] if check["problem"]])
    assert len(report["checks"]) == 24
    assert set(problems) == {"leaves the view", "batch does not matter", "reads what it declares", "seed decides"}
    assert "write reads = ('hidden',)" in problems["reads what it declares"]
    assert "keep no state" in problems["leaves the view"]
    assert "draw by `view.uniform()` only" in problems["seed decides"]


def test_what_a_methods_code_raises_is_named_with_its_line(tmp_path: Path) -> None:
    path = method_file(tmp_path, one_method("return {}['x']"))
    first = failures(str(path))[0]
    assert f"it raises KeyError: 'x' ({path}, line 9)" in first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["new-method", "dart"], "a method of this name is built in; choose another name"),
        (["new-method", "My-Idea"], "allowed are small letters, digits and _"),
        (["new-method", "class"], "allowed are small letters"),
        (["new-method", "my_idea", "--out", "/nowhere"], "--out /nowhere: there is no such folder"),
        (["test-method", "no.py"], "no.py: there is no such file"),
        (["test-method", "dart"], "neither a file that ends in .py nor a module"),
    ],
)
def test_commands_refuse_in_words(words: list[str], message: str) -> None:
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert message in done.output


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "test_my_idea.py").write_text("mine", encoding="utf-8")
    done = CliRunner().invoke(app, ["new-method", "my_idea", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "test_my_idea.py exists; it is not overwritten" in done.output
    assert (tmp_path / "test_my_idea.py").read_text("utf-8") == "mine"
    assert not (tmp_path / "my_idea.py").exists()


def test_prune_needs_a_class_that_says_what_it_reads(tiny: Tiny, tmp_path: Path) -> None:
    """Attention of the layer before cannot be had at layer 0, whatever the class's lowest layer says."""
    path = method_file(tmp_path, one_method("return view.uniform()", "reads = ('attention',)"))
    with (
        pytest.raises(ScheduleError, match="it reads attention rows of the layer before, so its lowest layer is 1"),
        prune(tiny.model(), f"{path}@0:0.3"),
    ):
        pass
