"""Every private name of another library that this package relies on is there, and one that moves is named in one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from forking import Forking

import lmms_prune
from lmms_prune.compat.installed import LIBRARIES, moved_names
from lmms_prune.compat.names import Library, MovedNameError, PrivateNames

PACKAGE = Path(lmms_prune.__file__).parent
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.core


def test_every_name_is_there() -> None:
    assert moved_names() == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.package)
def test_a_table_names_the_file_to_fix(library: Library) -> None:
    assert (PACKAGE.parent / library.file).is_file()
    assert all(row.names and row.why and row.since for row in library.names)


@pytest.mark.parametrize("name", ["_parameters", "_buffers", "_forward_pre_hooks"])
def test_a_name_that_only_instances_have_is_held(name: str) -> None:
    class Moved:
        def __init__(self) -> None:
            self.__dict__ = {key: value for key, value in torch.nn.Identity().__dict__.items() if key != name}

    [library] = [library for library in LIBRARIES if library.package == "torch"]
    [line] = replace(library, build=lambda _: Moved()).moved()
    assert f"has no '{name}' among its attributes any more" in line
    assert "Fix lmms_prune/compat/torch.py" in line


@dataclass
class Held:
    """What the table's rows below are held against."""

    kept: int = 0

    def call(self, first: int, second: int = 0) -> int:
        total = first + second
        return total


@pytest.mark.parametrize(
    ("owner", "kind", "names", "moved"),
    [
        ("Held.call", "parameters", ("second", "first"), []),
        ("Held.call", "leading parameters", ("first", "second"), []),
        ("Held.call", "leading parameters", ("second",), ["second"]),
        ("Held.call", "parameters", ("third|second",), []),
        ("Held.call", "parameters", ("third|fourth", "fifth"), ["third|fourth", "fifth"]),
        ("Held.call", "locals", ("total",), []),
        ("Held.call", "locals", ("sum",), ["sum"]),
        ("Held", "fields", ("kept", "call"), ["call"]),
        ("Held", "attributes", ("call", "kept", "gone"), ["gone"]),
        ("Gone.call", "attributes", ("first",), ["Gone"]),
    ],
)
def test_a_moved_name_is_reported(owner: str, kind: str, names: tuple[str, ...], moved: list[str]) -> None:
    rows = (PrivateNames(f"{__name__}:{owner}", kind, names, "1.0", "this test"),)  # type: ignore[arg-type]
    library = Library("pytest", "lmms_prune/compat/pytest.py", rows, build=lambda _: sys.modules[__name__])
    lines = list(library.moved())
    assert len(lines) == len(moved)
    for line, name in zip(lines, moved, strict=True):
        assert f"'{name}'" in line
        assert "needed for this test. Fix lmms_prune/compat/pytest.py." in line


# Names that have moved, or are most likely to: no file outside compat may contain them.
_ONLY_IN_COMPAT = {"past_key_values", "flop_registry", "_forward_pre_hooks", "_getframe", "f_locals"}
_ONLY_IN_COMPAT |= {"_parameters", "_buffers", "causal_lower_right"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_moving_names_are_used_in_one_file(path: Path) -> None:
    if path.parent.name == "compat":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    words = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg}
    words |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not words & _ONLY_IN_COMPAT


MOVED = """
import sys

import pytest

def forward(self, hidden_states, attention_mask=None, position_ids=None, cache=None, use_cache=False, rotary=None):
    raise TypeError("never called")

class Moved:
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self):
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
        LlamaDecoderLayer.forward = forward

# The server has imported the package, which jaxtyping, named in pyproject.toml, would have to see first.
options = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings=", "tests/test_hooks.py"]
sys.exit(pytest.main(options, plugins=[Moved()]))
"""


@pytest.mark.parametrize("name", ["LlavaPruned", "Qwen25VlPruned"])
def test_a_model_whose_libraries_moved_a_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When lmms-eval requests the model's class, so before any weights are loaded."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from lmms_prune.harness import plugin

    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, hidden_states: hidden_states)
    with pytest.raises(MovedNameError, match=r"LlamaDecoderLayer\.forward has no 'position_embeddings'"):
        getattr(plugin, name)


def test_looking_for_names_draws_no_random_number() -> None:
    """lmms-eval has set its seeds by then."""
    before = torch.get_rng_state()
    moved_names()
    assert torch.equal(before, torch.get_rng_state())


def test_a_library_that_moved_one_more_name_ends_the_tests_with_one_line(forking: Forking, tmp_path: Path) -> None:
    """As if transformers had renamed `position_embeddings`: no test runs, and none fails for a reason of its own."""
    script = tmp_path / "moved.py"
    script.write_text(MOVED, encoding="utf-8")
    command = [*forking.prefix, str(script)]
    run = subprocess.run(command, cwd=ROOT, env=forking.environment, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    [line] = [line for line in run.stdout.splitlines() if "any more" in line]
    assert "LlamaDecoderLayer.forward has no 'position_embeddings'" in line
    assert "Fix lmms_prune/compat/transformers.py" in line
    assert "passed" not in run.stdout
    assert "failed" not in run.stdout
