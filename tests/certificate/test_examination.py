"""`lmms-prune doctor --installation`: each check with a healthy and with a broken input, and the command as a process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lmms_prune.certificate import examination, libraries, trial
from lmms_prune.certificate.libraries import cuda, flash_attention, imported, print_checks, printed
from lmms_prune.certificate.trial import judged, refused, two_documents
from lmms_prune.cli import app
from lmms_prune.compat.versions import VERSIONS
from lmms_prune.demo import processes
from lmms_prune.demo.models import DemoError
from lmms_prune.harness.failures import Failure
from lmms_prune.harness.installation import InstallationCheck

LIBRARIES = [f"import of {name}" for name in ("torch", "transformers", "lmms-eval")]
CHECKS = [*VERSIONS, "models in lmms-eval", *LIBRARIES, "CUDA", "FlashAttention", "evaluation of two documents"]


# What libraries can do wrong.


def test_libraries_that_are_installed_have_what_is_relied_on() -> None:
    assert [(check.what, check.state) for check in imported()] == [(what, "ok") for what in LIBRARIES]


@pytest.mark.parametrize("broken", range(3))
def test_a_library_that_cannot_be_imported_is_named_and_hides_those_that_need_it(
    broken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ("torch", "transformers", "lmms_eval.__main__")[broken]

    def fails(name: str) -> ModuleType:
        if name == module:
            raise OSError("lib.so: cannot open shared object file")
        return importlib.import_module(name)

    monkeypatch.setattr(libraries, "import_module", fails)
    checks = list(imported())
    assert [check.state for check in checks] == ["ok"] * broken + ["failed"] * (3 - broken)
    assert checks[broken].detail == "OSError: lib.so: cannot open shared object file"
    assert checks[broken].fix.startswith("pip install --force-reinstall --no-deps")
    for check in checks[broken + 1 :]:
        assert check.detail.startswith("cannot be examined without ")
        assert check.fix == ""


def test_a_name_that_moved_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states: hidden_states)
    check = list(imported())[1]
    assert (check.what, check.state) == ("import of transformers", "failed")
    assert "LlamaDecoderLayer.forward has no 'position_embeddings' among its parameters any more" in check.detail
    assert check.fix == f"pip install --force-reinstall --no-deps transformers=={_version('transformers')}"


def _version(name: str) -> str:
    from importlib.metadata import version

    return version(name)


def fake_torch(error: Exception | None = None, built: str | None = "13.0", total: float = 64**3) -> Any:
    """A torch with two devices that multiply, or fail with `error`."""

    def init() -> None:
        if error is not None:
            raise error

    class Ones:
        def __matmul__(self, other: Ones) -> Any:
            return SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: total))

    devices = SimpleNamespace(init=init, device_count=lambda: 2, get_device_name=lambda device: "H")
    version = SimpleNamespace(cuda=built)
    fake = SimpleNamespace(cuda=devices, version=version, __version__="2.0", bfloat16=None)
    fake.ones = lambda *shape, device, dtype: Ones()
    return fake


@pytest.mark.parametrize(
    ("fake", "state", "detail"),
    [
        (fake_torch(), "ok", "2 × H, CUDA 13.0"),
        (
            fake_torch(RuntimeError("Found no NVIDIA driver on your system. Please see x.")),
            "not there",
            "Found no NVIDIA",
        ),
        (fake_torch(RuntimeError("No CUDA GPUs are available")), "not there", "No CUDA GPUs are available"),
        (
            fake_torch(RuntimeError("The NVIDIA driver is too old (found 1). Please")),
            "failed",
            "The NVIDIA driver is too",
        ),
        (fake_torch(total=64**3 - 1), "failed", "cuda:0: a product of ones is 262143, not 262144"),
        (fake_torch(built=None), "not there", "torch 2.0 is built without CUDA"),
    ],
)
def test_cuda(fake: Any, state: str, detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setattr(libraries, "_gpus", lambda: "")
    check = cuda()
    assert check.state == state
    assert check.detail.startswith(detail)
    assert bool(check.fix) == (state == "failed")


def test_a_torch_without_cuda_beside_a_gpu_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H200'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "torch", fake_torch(built=None))
    check = cuda()
    assert check.detail == "torch 2.0 is built without CUDA, though there is GPU 0: NVIDIA H200"
    assert check.fix == f"pip install --force-reinstall 'torch{VERSIONS['torch']}' torchvision"
    program.write_text("#!/bin/sh\necho no driver\nexit 9\n", encoding="utf-8")
    assert cuda().state == "not there"


def test_this_machines_cuda_is_told() -> None:
    assert cuda().state == ("ok" if torch.cuda.is_available() else "not there")


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InstallationCheck]:
    """Makes the check with a FlashAttention that computes by `function`, on the CPU in the place of a device."""
    draw = torch.randn

    def check(function: Any, device: bool = True) -> InstallationCheck:
        monkeypatch.setattr(libraries, "version", lambda name: "2.8")
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=function))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: device)
        monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: draw(*shape, dtype=dtype))
        return flash_attention()

    return check


def right(query: Any, key: Any, value: Any, causal: bool) -> Any:
    heads = [x.transpose(1, 2).float() for x in (query, key, value)]
    return torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=causal).transpose(1, 2).to(query.dtype)


def test_flash_attention_is_held_against_torch(flash: Callable[..., InstallationCheck]) -> None:
    assert flash(right) == InstallationCheck("FlashAttention", "ok", "2.8")
    wrong = flash(lambda query, key, value, causal: right(query, key, value, False))
    assert (wrong.state, "off those of torch" in wrong.detail) == ("failed", True)
    assert flash(lambda query, key, value, causal: torch.full_like(query, float("nan"))).state == "failed"
    assert flash(right, device=False).state == "not there"


def test_a_flash_attention_that_fails_is_named_with_the_command(flash: Callable[..., InstallationCheck]) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("undefined symbol: _ZN3c10")

    check = flash(fails)
    assert (check.state, check.detail) == ("failed", "2.8: RuntimeError: undefined symbol: _ZN3c10")
    assert check.fix == "pip install --force-reinstall --no-deps --no-build-isolation flash-attn==2.8"


def test_checks_are_read_back_from_what_a_process_prints(capsys: pytest.CaptureFixture[str]) -> None:
    print_checks.cache_clear()
    print_checks()
    print_checks()
    checks = printed("INFO begins\n" + capsys.readouterr().out)
    assert [check.what for check in checks] == [*LIBRARIES, "CUDA", "FlashAttention"]


def test_a_library_that_ends_the_process_leaves_what_was_known() -> None:
    line = libraries._PRINTED + json.dumps({"what": "import of torch", "state": "ok", "detail": ""})
    code = f"import os; print({line!r}, flush=True); os.write(2, b'one\\nFatal error\\n'); os._exit(9)"
    before, end = libraries.libraries([sys.executable, "-c", code])
    assert before == InstallationCheck("import of torch", "ok", "", "")
    assert end.state == "failed"
    assert end.detail.endswith("ended with exit code 9: Fatal error")


# What an evaluation can do wrong.


def results(answered: float = 1.0, kept: float = 155 / 3, documents: int = 2) -> dict[str, Any]:
    task = "lmms_prune_two_documents"
    run = {"settings": {"pretrained": "x"}, "averages": {"avg_visual_tokens": kept}}
    scores, counts = {task: {"answered,none": answered}}, {task: {"effective": documents}}
    return {"results": scores, "n-samples": counts, "config": {"batch_sizes": [run]}}


@pytest.mark.parametrize(
    ("given", "state"),
    [
        (results(), "ok"),
        (results(answered=0.5), "failed"),
        (results(documents=1), "failed"),
        (results(kept=144.0), "failed"),
    ],
)
def test_results_are_held_against_the_schedule(given: dict[str, Any], state: str) -> None:
    check = judged(given, 155 / 3, 7.2)
    assert check.state == state
    assert ("2 and 51.67 were to be expected" in check.detail) == (state == "failed")


def test_the_host_is_at_fault_for_what_is_not_ours() -> None:
    host = refused(Failure("ModuleNotFoundError: No module named 'x'", False, "environment"))
    assert host.detail == "lmms-eval itself fails: ModuleNotFoundError: No module named 'x'"
    assert "lmms" in host.fix
    assert refused(Failure("", False, "run")).detail == "lmms-eval itself fails: it printed nothing"
    assert refused(Failure("torch 1.0 is installed", True, "environment")).detail == "torch 1.0 is installed"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a program in the place of lmms-eval's command."""

    def put(text: str) -> None:
        program = tmp_path / "lmms-eval"
        program.write_text(f"#!{sys.executable}\n{text}\n", encoding="utf-8")
        program.chmod(0o755)
        monkeypatch.setattr(processes, "_program", lambda: str(program))

    return put


def test_a_host_that_cannot_run_is_named_with_its_last_words(host: Callable[[str], None]) -> None:
    host("import no_such_module")
    assert [check.detail for check in two_documents()] == [
        "lmms-eval itself fails: ModuleNotFoundError: No module named 'no_such_module'"
    ]


def test_what_was_examined_before_a_failure_is_kept(host: Callable[[str], None]) -> None:
    line = libraries._PRINTED + json.dumps({"what": "CUDA", "state": "not there", "detail": "none"})
    host(f"print({line!r}); print('ValueError: bad')")
    examined, evaluation = two_documents()
    assert examined == InstallationCheck("CUDA", "not there", "none")
    assert evaluation.detail == "lmms-eval itself fails: ValueError: bad"


def test_a_host_without_its_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_program", lambda: str(tmp_path / "lmms-eval"))
    [check] = two_documents()
    assert check.detail.startswith("lmms-eval itself cannot be started: ")


def test_what_cannot_be_tried_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(model: object) -> Path:
        raise DemoError("the demo's model lacks config.json")

    with monkeypatch.context() as patched:
        patched.setattr("lmms_prune.demo.models.weights", gone)
        assert [check.detail for check in two_documents()] == ["the demo's model lacks config.json"]
    monkeypatch.setitem(sys.modules, "lmms_prune.demo.models", None)
    [check] = two_documents()
    assert (check.state, check.detail.startswith("cannot be started: ")) == ("failed", True)


# The command.


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs the command with checks that need no process."""

    failing = [InstallationCheck("import of torch", "failed", "no", "pip x")]

    def run(
        evaluation: InstallationCheck,
        *options: str,
        looked_at: list[InstallationCheck] | None = None,
        found: list[InstallationCheck] = failing,
    ) -> Any:
        monkeypatch.setattr(examination, "models_found", lambda: InstallationCheck("models", "ok", "both"))
        monkeypatch.setattr(examination, "two_documents", lambda: [*(looked_at or []), evaluation])
        monkeypatch.setattr(examination, "libraries", lambda: found)
        return CliRunner().invoke(app, ["doctor", "--installation", *options])

    return run


def test_beside_an_unsupported_version_nothing_is_tried(
    checked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every model would be refused, after ten seconds of imports."""
    wrong = InstallationCheck(
        "torch", "failed", "9.0 is installed, which is not supported; use one of <9", "pip install 'torch<9'"
    )
    monkeypatch.setattr(examination, "versions", lambda: iter([InstallationCheck("numpy", "ok", "2.0"), wrong]))
    done = checked(
        InstallationCheck("evaluation", "ok", "2 answered"),
        "--json",
        found=[InstallationCheck("import of torch", "ok", "")],
    )
    assert done.exit_code == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["commands"] == ["pip install 'torch<9'"]
    assert [check["what"] for check in record["checks"]] == [
        *("numpy", "torch", "models", "import of torch", "evaluation of two documents")
    ]
    assert "is not tried" in record["checks"][-1]["detail"]


def test_a_healthy_installation_exits_with_0(checked: Callable[..., Any]) -> None:
    done = checked(
        InstallationCheck("evaluation", "ok", "2 [answered]"),
        looked_at=[InstallationCheck("CUDA", "not there", "none")],
    )
    assert done.exit_code == 0
    assert "2 [answered]" in done.stdout
    assert "To fix it" not in done.stdout


def test_the_libraries_are_looked_at_where_the_evaluation_did_not(checked: Callable[..., Any]) -> None:
    done = checked(InstallationCheck("evaluation", "failed", "bad", "pip y"), "--json")
    assert done.exit_code == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["failed"], record["commands"]) == (2, ["pip x"])  # the cause is fixed first
    assert [check["what"] for check in record["checks"]][-2:] == ["import of torch", "evaluation"]
    alone = checked(
        InstallationCheck("evaluation", "failed", "bad", "pip y"), looked_at=[InstallationCheck("CUDA", "ok", "")]
    )
    assert alone.stdout.endswith("To fix it:\n  pip y\n")


@pytest.mark.parametrize("option", [["--model", "x"], ["--full"], ["--attention", "eager"], ["--methods", "dart"]])
def test_it_examines_no_checkpoint(option: list[str]) -> None:
    done = CliRunner().invoke(app, ["doctor", "--installation", *option])
    assert done.exit_code == 2
    assert "--installation examines no checkpoint" in done.stderr


def doctor(folder: Path) -> tuple[int, dict[str, Any]]:
    """The command as a process, with `folder` first on Python's path."""
    path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    command = [str(Path(sys.executable).with_name("lmms-prune")), "doctor", "--installation", "--json"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_this_installation_is_healthy(tmp_path: Path) -> None:
    code, record = doctor(tmp_path)
    assert (code, record["failed"], record["commands"]) == (0, 0, [])
    assert [check["what"] for check in record["checks"]] == CHECKS


OTHERS = {"transformers": "5.40.0", "filelock": "4.3.1"}


@pytest.mark.slow
def test_unsupported_versions_are_named_with_their_ranges_and_commands(tmp_path: Path) -> None:
    for name, installed in OTHERS.items():
        metadata = tmp_path / f"{name}-{installed}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed}\n", "utf-8")
    code, record = doctor(tmp_path)
    assert code == 1
    checks = {check["what"]: check for check in record["checks"]}
    assert list(checks) == CHECKS
    refused = ["is not tried, as every model is refused."]
    commands = []
    for name in (name for name in VERSIONS if name in OTHERS):
        wrong = f"{OTHERS[name]} is installed, which is not supported; use one of {VERSIONS[name]}"
        assert (checks[name]["state"], checks[name]["detail"]) == ("failed", wrong)
        commands.append(f"pip install '{name}{VERSIONS[name]}'")
        refused.append(f"{name} {wrong}: {commands[-1]}")
    assert record["failed"] == len(OTHERS) + 1
    assert record["commands"] == commands
    # That lmms-eval then exits with such words: tests/compat/test_versions.py.
    assert checks["evaluation of two documents"]["detail"] == "\n".join(refused)


@pytest.mark.parametrize(
    "library", ["torch", *(pytest.param(name, marks=pytest.mark.slow) for name in ("transformers", "lmms_eval"))]
)
def test_it_works_where_a_library_cannot_be_imported(library: str, tmp_path: Path) -> None:
    (tmp_path / library).mkdir()
    (tmp_path / library / "__init__.py").write_text("raise ImportError('lib.so: no such file')", encoding="utf-8")
    code, record = doctor(tmp_path)
    assert code == 1
    checks = {check["what"]: check for check in record["checks"]}
    assert list(checks) == CHECKS
    assert "ImportError: lib.so: no such file" in checks[f"import of {library.replace('_', '-')}"]["detail"]
    evaluation = checks["evaluation of two documents"]["detail"]
    assert evaluation == "lmms-eval itself fails: ImportError: lib.so: no such file"
    assert len(record["commands"]) == 1


def test_the_trial_needs_no_other_schedule_than_the_models_take() -> None:
    trial._SCHEDULE.check(12, [144])
