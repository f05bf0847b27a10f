"""Fourteen defects found in peers, each put into a copy of the package: the tests that are to catch it must fail.

    python tests/mutants.py            # all; exits with 1 if one is not caught
    python tests/mutants.py 5 11       # some
    python tests/mutants.py --table    # the defects and their tests, as Markdown

No part of the ordinary suite, for it takes minutes; `tests/test_mutants.py` holds the patches against the sources.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "lmms_prune"


@dataclass(frozen=True)
class Mutant:
    """One defect.

    Args:
        defect: in words.
        file: of the package, where it is put.
        old, new: the source text that is replaced, and by what.
        tests: any of them must fail.
    """

    defect: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


REFERENCE = "tests/test_hooks.py::test_pruned_equals_the_masked_reference"
MUTANTS = (
    Mutant(
        "decode positions restart after pruning at layer 0",
        "pruning/decode.py",
        'kwargs = {**kwargs, "position_ids": self.prefill.next_position + (self.steps - 1)}',
        "kwargs = dict(kwargs)",
        ("tests/test_hooks.py::test_decode_without_position_ids_continues_where_the_prompt_ended",),
    ),
    Mutant(
        "a second stage reads the features of the first",
        "pruning/prefill.py",
        "        return layout.view(\n            block.parts,\n            state,",
        "        first = self.__dict__.setdefault('first', state.hidden)\n"
        "        stale = replace(state, hidden=gather(first, layout.origin))\n"
        "        return layout.view(\n            block.parts,\n            stale,",
        ("tests/methods/test_view.py::test_a_later_stage_reads_what_its_own_layer_is_given",),
    ),
    Mutant(
        "speed-up figures are computed from the schedule",
        "bench/schedules.py",
        "[row.text_tokens + visual for visual in row.visual]",
        "[row.text_tokens + visual for visual in schedule.layer_counts(sizes.layers, row.images)]",
        ("tests/bench/test_bench.py::test_a_speed_up_is_of_what_ran_and_not_of_the_schedule",),
    ),
    Mutant(
        "an attribute lookup turns the layer count into 0",
        "models/sizes.py",
        'layers=text["num_hidden_layers"]',
        'layers=text.get("n_layer", 0)',
        (
            "tests/efficiency/test_cost.py::test_a_checkpoint_folder_and_its_config_file_are_read",
            "tests/efficiency/test_cost.py::test_the_named_architectures_are_the_published_ones",
        ),
    ),
    Mutant(
        "a layer is run twice, so that its keys are cached twice",
        "pruning/prefill.py",
        "        if acting := self.block.stages.get(layer):\n",
        "        if self.before is not None and cache is not None and segment is None:\n"
        "            self.block.guide.running = True\n"
        "            self.block.parts.layers[layer - 1](self.before.hidden, **kwargs)\n"
        "            self.block.guide.running = False\n"
        "        if acting := self.block.stages.get(layer):\n",
        ("tests/test_hooks.py::test_cache_equals_trace_equals_plan",),
    ),
    Mutant(
        "a misspelt retention setting is silently at its default",
        "methods/spec.py",
        "raise OptionError(f\"{self.name} has no option '{name}'. {hint}\")",
        "return next((option.default for option in self.options), None)",
        ("tests/test_schedule.py::test_wrong_texts_are_refused_and_pointed_at",),
    ),
    Mutant(
        "scores are sorted the wrong way",
        "methods/base.py",
        "score.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)",
        "score.masked_fill(~candidates, torch.inf).argsort(dim=1, descending=False, stable=True)",
        ("tests/methods/test_fastv.py::test_by_hand",),
    ),
    Mutant(
        "timers are around the wrong call",
        "bench/spans.py",
        "stages = [parts.layers[stage.layer] for stage in schedule.stages]\n        last",
        "stages = [parts.layers[stage.layer + 1] for stage in schedule.stages]\n        last",
        ("tests/bench/test_bench.py::test_time_is_put_down_to_the_part_that_took_it",),
    ),
    Mutant(
        "kept tokens are gathered in another order",
        "pruning/ragged.py",
        "moved = keep.cumsum(1) - 1",
        "moved = keep.sum(1, keepdim=True) - keep.cumsum(1)",
        ("tests/test_ragged.py::test_pack_keeps_order_and_pads_one_side", REFERENCE),
    ),
    Mutant(
        "benchmarks run with the cache off",
        "bench/schedules.py",
        "        do_sample=False,\n        temperature=None,",
        "        do_sample=False,\n        use_cache=case.new_tokens < 2,\n        temperature=None,",
        ("tests/bench/test_bench.py::test_what_was_measured_is_what_ran",),
    ),
    Mutant(
        "the first token is right and later ones are wrong",
        "pruning/segment.py",
        "ahead = pad(self._valid, (0, 2 * max(step, 32)), value=True)",
        "ahead = torch.ones_like(pad(self._valid, (0, 2 * max(step, 32))))",
        (REFERENCE,),
    ),
    Mutant(
        "the image's start and length are hard-coded",
        "models/family.py",
        "spans.append((start, size))",
        "spans.append((5, size))",
        ("tests/test_families.py::test_runs_of_visual_tokens_are_split_into_images", REFERENCE),
    ),
    Mutant(
        "random draws are not seeded",
        "methods/view.py",
        "torch.rand(count, generator=generator, dtype=torch.float64)",
        "torch.rand(count, dtype=torch.float64)",
        ("tests/methods/test_random.py::test_what_decides_a_draw",),
    ),
    Mutant(
        "state is left after an exception",
        "models/hooked.py",
        "    finally:\n        for handle in kept:\n            handle.remove()",
        "    except ZeroDivisionError:\n        pass\n    for handle in kept:\n        handle.remove()",
        ("tests/test_hooks.py::test_no_hook_is_left_after_an_exception",),
    ),
)


def mutated(mutant: Mutant, folder: Path) -> None:
    """Write a copy of the package with the defect to `folder`."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "weights"))
    path = folder / PACKAGE.name / mutant.file
    path.write_text(path.read_text(encoding="utf-8").replace(mutant.old, mutant.new), encoding="utf-8")


def failures(tests: tuple[str, ...], package: Path) -> str:
    """What pytest says of `tests` with the package that lies in `package`, nothing if all pass.

    Anything but a failed test ends the program.
    """
    environment = {**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", "import lmms_prune; print(lmms_prune.__file__)"],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        cwd=package,
    )
    assert found.stdout.startswith(str(package)), f"tests would run on {found.stdout}"
    command = [str(Path(sys.executable).with_name("pytest")), "-q", "-x", *tests]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    if done.returncode not in (0, 1):
        sys.exit(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return "" if done.returncode == 0 else done.stdout


def table() -> str:
    """The defects and the tests that catch them, as Markdown."""
    lines = ["| | defect | caught by |", "|---|---|---|"]
    for number, mutant in enumerate(MUTANTS, 1):
        tests = ", ".join(f"`{test.removeprefix('tests/')}`" for test in mutant.tests)
        lines.append(f"| {number} | {mutant.defect} | {tests} |")
    return "\n".join(lines)


def main() -> None:
    """Try the mutants that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", type=int, choices=[*range(1, len(MUTANTS) + 1), []])
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        print(table())
        return
    numbers = asked.numbers or range(1, len(MUTANTS) + 1)
    everything = tuple(dict.fromkeys(test for number in numbers for test in MUTANTS[number - 1].tests))
    if said := failures(everything, ROOT):
        sys.exit(f"the tests fail without any defect:\n{said[-3000:]}")
    caught = 0
    for number in numbers:
        mutant = MUTANTS[number - 1]
        with tempfile.TemporaryDirectory() as folder:
            mutated(mutant, Path(folder))
            said = failures(mutant.tests, Path(folder))
        caught += bool(said)
        print(f"{number:2}  {'caught' if said else 'NOT CAUGHT'}  {mutant.defect}", flush=True)
        why = next((line[1:].strip() for line in said.splitlines() if line.startswith("E  ")), "")
        print(f"    {why[:110]}", flush=True)
    print(f"{caught} of {len(numbers)} mutants caught")
    sys.exit(caught < len(numbers))


if __name__ == "__main__":
    main()
