"""lmms-eval as a process and in this process, on tiny checkpoints and local benchmarks, without network."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from built import UNLIKE, Checkpoint, Mirror
from forking import Forking

from lmms_prune.models import FAMILIES

MODELS = {model_type: family.model_name for model_type, family in FAMILIES.items()}
TASK_FOLDERS = ("mme", "scienceqa", "pope", "textvqa", "mmbench", "gqa", "infovqa", "docvqa", "ocrbench")
CONFIGS = Path(__file__).parents[2] / "task_configs"


@dataclass
class Run:
    """What one evaluation left behind, whether it was a process or a call; samples are in the order of doc_id."""

    results: dict[str, Any] | None
    samples: dict[str, list[dict[str, Any]]]
    returncode: int | None = None
    stdout: str = ""
    stderr: str = ""
    folder: Path | None = None
    calls: list[dict[str, Any]] = field(default_factory=list)

    @property
    def answers(self) -> dict[str, list[str]]:
        # Without the space before the first word, which the harness takes off when it writes the samples file.
        return {task: [_only(row["filtered_resps"]).strip() for row in rows] for task, rows in self.samples.items()}

    @property
    def accounting(self) -> dict[str, list[dict[str, Any]]]:
        return {task: [_only(row["token_counts"]) for row in rows] for task, rows in self.samples.items()}

    @property
    def recorded(self) -> dict[str, Any]:
        """What the model wrote into the results: schedule, versions, device."""
        assert self.results is not None, self.stderr[-3000:]
        return self.results["config"]["batch_sizes"][0]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        assert self.results is not None, self.stderr[-3000:]
        return self.results["results"]


def _only(values: Any) -> Any:
    """The harness writes a list of one answer in memory and the answer itself into the samples file."""
    return values[0] if isinstance(values, list) and len(values) == 1 else values


def read_run(folder: Path, process: subprocess.CompletedProcess[str] | None = None) -> Run:
    """The newest results below `folder`, judged by content: submissions are called *_results.json too."""
    found = [(path, json.loads(path.read_text("utf-8"))) for path in sorted(folder.rglob("*_results.json"))]
    results = [(path, read) for path, read in found if "config" in read]
    samples: dict[str, list[dict[str, Any]]] = {}
    for path, _ in results[-1:]:
        stamp = path.name.removesuffix("_results.json")
        for file in sorted(path.parent.glob(f"{stamp}_samples_*.jsonl")):
            rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            samples[file.stem.split("_samples_")[1]] = sorted(rows, key=lambda row: row["doc_id"])
    outcome = (process.returncode, process.stdout, process.stderr) if process else (None, "", "")
    return Run(results[-1][1] if results else None, samples, *outcome, folder=folder)


class Harness:
    """lmms-eval with everything it needs: `run` starts a process, `fork` forks one, `evaluate` stays in this one."""

    def __init__(self, checkpoints: dict[str, Path], mirror: Path, forking: Forking, scratch: Path):
        from lmms_prune.harness.loading import shared_weights

        self.checkpoints, self.mirror, self.forking, self.scratch = checkpoints, mirror, forking, scratch
        self.models, self.configs = MODELS, CONFIGS
        self._manager: Any = None
        self._folders = 0
        # Runs of `evaluate` share weights, as those of a sweep do; models of `create` have their own.
        self._sharing, self._weights = copy_context(), ExitStack()
        self._sharing.run(self._weights.enter_context, shared_weights())

    def text(self, family: str, **arguments: Any) -> str:
        """--model_args for the family's checkpoint."""
        values = {"pretrained": self.checkpoints[family], **arguments}
        return ",".join(f"{name}={value}" for name, value in values.items())

    def new_folder(self) -> Path:
        """An empty folder of its own."""
        self._folders += 1
        folder = self.scratch / str(self._folders)
        folder.mkdir()
        return folder

    def copied_mirror(self, repository: str, pattern: str) -> tuple[Path, Path]:
        """A copy of the benchmarks to be damaged, and the file to damage: the repository's first that fits `pattern`.

        The file has a name of its own, in its README too: `datasets` recognises a folder by its README alone, and would
        else take the rows from its cache.
        """
        folder = self.new_folder() / "mirror"
        shutil.copytree(self.mirror, folder)
        file = next((folder / repository).rglob(pattern))
        renamed = file.with_name(f"{file.stem}-{uuid.uuid4().hex}{file.suffix}")
        readme = folder / repository / "README.md"
        text = readme.read_text("utf-8")
        assert file.name in text
        readme.write_text(text.replace(file.name, renamed.name), "utf-8")
        return folder, file.rename(renamed)

    def run(
        self,
        *args: str,
        command: Sequence[str] = ("lmms-eval",),
        cwd: Path | None = None,
        output: Path | None = None,
        output_in_config: bool = False,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Run:
        """Start a real lmms-eval; the first word of `command` is a program beside the interpreter."""
        folder = output or self.new_folder()
        line = self.line(command, args, None if output_in_config else folder)
        process = subprocess.run(
            [*prefix, *line],
            cwd=cwd or self.mirror,
            env=environment or self.forking.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return read_run(folder, process)

    def fork(self, *args: str, **options: Any) -> Run:
        """As `run`, in a forked process: ten seconds of imports are done once for all of them."""
        return self.run(*args, prefix=self.forking.prefix, **options)

    def close(self) -> None:
        """Let the weights go."""
        self._sharing.run(self._weights.close)

    @staticmethod
    def line(command: Sequence[str], args: Sequence[str], output: Path | None) -> list[str]:
        program, *rest = command
        line = [str(Path(sys.executable).parent / program), *rest, *map(str, args)]
        return line if output is None else [*line, "--output_path", str(output), "--log_samples"]

    def run_config(
        self, runs: Mapping[str, Mapping[str, Any]], command: Sequence[str] = ("lmms-eval",)
    ) -> dict[str, Run]:
        """One process for several evaluations, by a --config file; a run is its keys in that file."""
        file = self.new_folder() / "runs.yaml"
        folders = {name: self.new_folder() for name in runs}
        listed = [{**run, "log_samples": True, "output_path": str(folders[name])} for name, run in runs.items()]
        file.write_text(yaml.safe_dump(listed), "utf-8")
        process = self.fork("--config", str(file), command=command, output_in_config=True)
        read = {name: read_run(folder) for name, folder in folders.items()}
        return {
            name: replace(run, returncode=process.returncode, stdout=process.stdout, stderr=process.stderr)
            for name, run in read.items()
        }

    def create(self, family: str, given: str | Mapping[str, Any] | None = None, **arguments: Any) -> Any:
        """The family's model as lmms-eval creates it; a dict of arguments, or `given` as it is."""
        from lmms_eval.models import get_model

        if given is None:
            given = {"pretrained": str(self.checkpoints[family]), **arguments}
        return get_model(MODELS[family]).create_from_arg_string(given, {"batch_size": None, "device": None})

    def evaluate(self, model: Any, tasks: Sequence[str], model_args: Any = None, **options: Any) -> Run:
        """lmms-eval's Python entry on the local benchmarks; `calls` holds the inputs of every generate()."""
        import lmms_eval.tasks
        from lmms_eval.evaluator import simple_evaluate
        from transformers import GenerationMixin

        if self._manager is None:
            # Reading all two thousand tasks takes longer than a test; these folders hold the ones in use.
            ours = [str(Path(lmms_eval.tasks.__file__).with_name(name)) for name in TASK_FOLDERS]
            self._manager = lmms_eval.tasks.TaskManager("ERROR", [*ours, str(CONFIGS)], include_defaults=False)
        original, calls = GenerationMixin.generate, []

        @wraps(original)
        def spy(model: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(kwargs)
            return original(model, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.mirror)
            patch.setattr(GenerationMixin, "generate", spy)
            # The harness asks for its commit several times a run, and collects all that lies about after it.
            patch.setattr("lmms_eval.utils._git_output", self._no_checkout)
            patch.setattr(gc, "collect", lambda *_: 0)
            results = self._sharing.run(
                simple_evaluate,
                model=model,
                model_args=model_args,
                tasks=list(tasks),
                task_manager=self._manager,
                bootstrap_iters=0,
                verbosity="ERROR",
                **options,
            )
        samples = {
            task: sorted(rows, key=lambda row: row["doc_id"]) for task, rows in results.pop("samples").items() if rows
        }
        return Run(results, samples, calls=calls)

    @staticmethod
    def _no_checkout(*_: str) -> str:
        raise FileNotFoundError("git")

    def pruned(self, family: str, tasks: Sequence[str], options: Mapping[str, Any] | None = None, **arguments: Any):
        """`evaluate` with the family's pruned model, arguments as a dict."""
        given = {"pretrained": str(self.checkpoints[family]), **arguments}
        return self.evaluate(MODELS[family], tasks, given, **(options or {}))


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, mirror: Mirror, forking: Forking):
    import datasets
    from huggingface_hub import constants

    # As in tests/conftest.py, for what these tests use besides.
    for module in ("lmms_eval.evaluator", "lmms_prune.harness.models"):
        import_module(module)
    gc.freeze()
    cache = str(Path(forking.environment["HF_HOME"]) / "datasets")
    with pytest.MonkeyPatch.context() as patch:
        # Both libraries have read the environment by now, so their own settings are what must change.
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", cache)
        checkpoints = {family: checkpoint(family) for family in MODELS}
        harness = Harness(checkpoints, mirror(), forking, tmp_path_factory.mktemp("harness"))
        yield harness
        harness.close()


# Of a session's scope, pytest would run all modules with one family and then all again, and make their fixtures twice.
@pytest.fixture(scope="module", params=UNLIKE)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
