"""Reads a command line of lmms-eval as a run, as a ``--config`` file would hold it. lmms-eval itself is not imported."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

from lmms_prune.configs.runs import KEYS, Run
from lmms_prune.errors import ConfigError, did_you_mean

PROGRAMS = ("lmms-eval", "lmms_eval")
"""The program, and the module of ``python -m`` and of launchers."""
FLAGS = frozenset(
    """
    apply_chat_template check_integrity fewshot_as_multiturn force_simple log_samples power_analysis predict_only
    process_with_media show_config swanlab_log_samples trust_remote_code tui wandb_log_samples write_out
    """.split()  # noqa: SIM905
)
"""The keys of options that take no value."""
# Options that are not called by their key alone.
SPELLINGS = {
    "batch_size": ("--batch_size", "-b"),
    "effect_size": ("--effect-size",),
    "power_analysis": ("--power-analysis",),
    "predict_only": ("--predict_only", "-x"),
    "process_docs_parallel": ("--process-docs-parallel", "--process_docs_parallel"),
    "repeats": ("-n", "--repeats", "--num_samples"),
    "std_a": ("--std-a",),
    "std_b": ("--std-b",),
    "use_cache": ("--use_cache", "-c"),
    "write_out": ("--write_out", "-w"),
}
# What `check` reads as a number; it reads all other values as texts, or not at all.
_NUMBERS: dict[str, type[float]] = {"limit": float, "offset": int}


def is_command(words: Sequence[str]) -> bool:
    """Tell whether some words are a command line of lmms-eval."""
    return any(PurePath(word).name in PROGRAMS for word in words)


def run_of(words: Sequence[str]) -> Run:
    """Return the run of a command line of lmms-eval; words before the program's name are those of a launcher.

    Raises:
        ConfigError: an option that lmms-eval does not have, one without its value, or ``--config``.
    """
    start = next(number for number, word in enumerate(words) if PurePath(word).name in PROGRAMS) + 1
    start += words[start : start + 1] == ["eval"]
    parsed, unknown = parser().parse_known_args(list(words[start:]))
    if unknown:
        known = [f"--{key}" for key in KEYS]
        raise ConfigError(f"lmms-eval has no option {unknown[0]}.{did_you_mean(unknown[0], known)}")
    settings: dict[str, Any] = vars(parsed)
    if "config" in settings:
        raise ConfigError(
            f"--config {settings['config']}: check the file itself: lmms-prune check {settings['config']}"
        )
    return Run(Path("lmms-eval"), 0, settings, None)


def parser() -> ArgumentParser:
    """Return a parser of lmms-eval's options; what is not given has no value."""
    options = _OptionParser(prog="lmms-eval", add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for key in sorted(KEYS - {"env", "help"}):
        names = SPELLINGS.get(key, (f"--{key}",))
        if key in FLAGS:
            options.add_argument(*names, dest=key, action="store_true")
        else:
            options.add_argument(*names, dest=key, type=_NUMBERS.get(key, str))
    return options


class _OptionParser(ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}.")
