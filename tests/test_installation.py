"""What is looked at before any run: each check with a healthy and with a broken input."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.compat.versions import VERSIONS
from lmms_prune.harness import installation
from lmms_prune.harness.installation import (
    InstallationCheck,
    InstallationError,
    fixing_command,
    models_found,
    refuse_broken,
    reinstall,
    versions,
)
from lmms_prune.models import MODEL_NAMES

NAMES = list(MODEL_NAMES)


def printed(text: str) -> list[str]:
    return [sys.executable, "-c", f"print({text!r})"]


def test_tested_versions_are_fine() -> None:
    checks = list(versions())
    assert [(check.what, check.state) for check in checks] == [(name, "ok") for name in VERSIONS]
    assert all(version(check.what).startswith(check.detail.split()[0]) for check in checks)


def test_other_versions_and_none_at_all_are_told_with_the_command() -> None:
    other, none = versions({"torch": ">=99,<100", "no-such-package": ">=1"})
    assert other == InstallationCheck(
        "torch",
        "failed",
        f"{version('torch')} is installed, which is not supported; use one of >=99,<100",
        "pip install 'torch>=99,<100'",
    )
    assert none == InstallationCheck(
        "no-such-package", "failed", "is not installed; use one of >=1", "pip install 'no-such-package>=1'"
    )


def test_lmms_eval_finds_the_models() -> None:
    assert models_found() == InstallationCheck("models in lmms-eval", "ok", " and ".join(NAMES))


def test_models_that_lmms_eval_does_not_find_are_named() -> None:
    warning = "; import sys; sys.stderr.write('WARNING a\\nWARNING Failed to load model entry-point manifests: x')"
    check = models_found(
        [sys.executable, "-c", f"print('INFO'); print({json.dumps(['llava', *NAMES[:1], *NAMES[2:]])!r}){warning}"]
    )
    assert check.state == "failed"
    assert check.detail.startswith(f"lmms-eval does not find {NAMES[1]}: WARNING Failed to load model entry-point")
    assert check.fix.startswith("pip install --force-reinstall --no-deps ")
    assert models_found(printed("[]")).detail == f"lmms-eval does not find {' and '.join(NAMES)}"


def test_a_host_that_cannot_be_imported_is_named_with_its_last_words() -> None:
    check = models_found([sys.executable, "-c", "import no_such_module"])
    assert check.detail == "lmms-eval itself fails: ModuleNotFoundError: No module named 'no_such_module'"
    assert "lmms" in check.fix
    assert models_found([sys.executable, "-c", "raise SystemExit(3)"]).detail.endswith("exit code 3")


def test_a_host_without_its_command_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "LMMS_EVAL", tmp_path / "lmms-eval")
    assert models_found().detail == f"there is no {tmp_path / 'lmms-eval'}, lmms-eval's command"


def test_a_host_that_does_not_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_SECONDS", 0.2)
    check = models_found([sys.executable, "-c", "import time; time.sleep(60)"])
    assert (check.state, "does not list its models" in check.detail) == ("failed", True)


def distribution(folder: Path, name: str, *requirements: str, origin: object = None) -> None:
    metadata = folder / f"{name}-1.5.dist-info"
    metadata.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.5", *(f"Requires-Dist: {x}" for x in requirements)]
    (metadata / "METADATA").write_text("\n".join([*lines, ""]), encoding="utf-8")
    if origin is not None:
        (metadata / "direct_url.json").write_text(json.dumps(origin), encoding="utf-8")


@pytest.mark.parametrize(
    ("requirements", "origin", "expected"),
    [
        (["pytest>=1", "absent>=2; extra == 'x'"], None, "--force-reinstall --no-deps host==1.5"),
        (["pytest>=1", "absent>=2", "torch[x]<0.1"], None, "'absent>=2' 'torch<0.1'"),
        ([], {"url": "file:///a", "dir_info": {}}, "--force-reinstall --no-deps 'file:///a'"),
        ([], {"url": "file:///a", "dir_info": {"editable": True}}, "--force-reinstall --no-deps -e 'file:///a'"),
        ([], {"url": "https://a/b", "vcs_info": {"vcs": "git"}}, "--force-reinstall --no-deps 'git+https://a/b'"),
    ],
)
def test_the_command_brings_what_is_missing_or_the_package_anew(
    requirements: list[str], origin: object, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "host", *requirements, origin=origin)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert reinstall("host") == f"pip install {expected}"


@pytest.mark.parametrize(
    ("error", "package"),
    [
        ("ModuleNotFoundError: No module named 'filelock._api'", "filelock"),
        ("ImportError: cannot import name 'x' from 'filelock' (/a/filelock/__init__.py)", "filelock"),
        ("cannot import name 'x' from partially initialized module 'yaml.nodes' (most likely …)", "pyyaml"),
        ("ModuleNotFoundError: No module named 'no_such_module'", "lmms-eval"),
        ("OSError: lib.so", "lmms-eval"),
    ],
)
def test_an_error_that_names_a_module_is_mended_in_its_package(error: str, package: str) -> None:
    expected = f"pip install --force-reinstall --no-deps {package}=={version(package)}"
    assert fixing_command(error, "lmms-eval") == expected


def test_what_is_not_installed_is_installed_in_a_version_that_will_do(tmp_path: Path) -> None:
    assert reinstall("no-such-package") == "pip install 'no-such-package'"


def test_all_that_is_wrong_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_broken()
    broken = [InstallationCheck("torch", "failed", "is old", "pip install new"), InstallationCheck("x", "ok", "")]
    monkeypatch.setattr(installation, "versions", lambda: iter(broken))
    monkeypatch.setattr(installation, "models_found", lambda: InstallationCheck("models", "failed", "none"))
    with pytest.raises(InstallationError) as error:
        refuse_broken()
    assert str(error.value).splitlines()[1:] == ["torch: is old: pip install new", "models: none", installation.DOCTOR]


@pytest.mark.parametrize("command", ["demo", "sweep"])
def test_nothing_is_begun_in_a_broken_installation(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        installation, "versions", lambda: iter([InstallationCheck("torch", "failed", "is old", "pip install new")])
    )
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "a.yaml"
    config.write_text("model: llava_pruned\nmodel_args: {schedule: none}\ntasks: pope\n", encoding="utf-8")
    words = {"demo": ["--out", "out"], "sweep": [str(config), "--out", "out"]}[command]
    done = CliRunner().invoke(app, [command, *words])
    assert done.exit_code == 2
    expected = ["lmms-prune: no run can go well in this environment.", "torch: is old: pip install new"]
    assert done.stderr.splitlines() == [*expected, installation.DOCTOR]
    assert not (tmp_path / "out").exists()


def test_it_looks_without_a_heavy_import() -> None:
    code = (
        "import sys; from lmms_prune.harness.installation import refuse_broken; refuse_broken(); "
        "print({'torch', 'transformers', 'lmms_eval', 'datasets'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
