"""Reading ``--config`` files as lmms-eval does: a mapping of its options, or a list of such mappings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

from lmms_prune.configs.budget import Claim, ClaimError, claims
from lmms_prune.errors import did_you_mean
from lmms_prune.record.files import read_text
from lmms_prune.record.yamls import YamlError, read_yaml

KEYS = frozenset(
    """
    agentic_trace_mode alpha apply_chat_template baseline batch_size cache_requests check_integrity config correlation device
    effect_size env fewshot_as_multiturn force_simple gen_kwargs help hf_hub_log_args include_path launcher_args limit
    log_samples log_samples_suffix max_batch_size max_tokens model model_args num_fewshot offset output_path power
    power_analysis predict_only process_docs_parallel process_with_media reasoning_tags repeats seed show_config std_a std_b
    swanlab_args swanlab_log_samples system_instruction tasks timezone trust_remote_code tui use_cache verbosity wandb_args
    wandb_log_samples write_out
    """.split()  # noqa: SIM905
)
"""The keys that lmms-eval 0.7.3 takes; importing its parser takes seconds, and a test holds them equal."""


class ConfigError(ValueError):
    """A file that is no configuration of lmms-eval."""


@dataclass(frozen=True)
class Run:
    """One run of a file.

    Args:
        path: the file.
        number: its place, from 1, where the file lists several runs; else 0.
        settings: lmms-eval's options.
        claim: the budget that the file's comment claims.
    """

    path: Path
    number: int
    settings: dict[str, Any]
    claim: Claim | None

    @property
    def name(self) -> str:
        """The run's name: its file's stem, with the number where there are several."""
        return f"{self.path.stem}-{self.number}" if self.number else self.path.stem

    def __str__(self) -> str:
        return f"{self.path}, run {self.number}" if self.number else str(self.path)


def files(paths: Iterable[Path]) -> list[Path]:
    """The YAML files among `paths`, folders replaced by what they hold, each once.

    Raises:
        ConfigError: a path that is not there, or a folder without YAML files.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if not lexists(path):
            raise ConfigError(f"{path}: there is no such file or folder.")
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if isdir(path) else [path]
        if not inside:
            raise ConfigError(f"{path}: this folder holds no .yaml files.")
        found |= dict.fromkeys(inside)
    return list(found)


def read(path: Path) -> list[Run]:
    """The runs of one file.

    Raises:
        ConfigError: not readable, no YAML, or neither a mapping nor a list of mappings.
    """
    try:
        text = read_text(path)
        content, budgets = read_yaml(text), claims(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except ClaimError as error:
        raise ConfigError(str(error)) from None
    except YamlError as error:
        raise ConfigError(f"is no YAML: {error}") from None
    many = isinstance(content, list)
    runs = content if many else [content]
    if not runs or not all(isinstance(run, dict) for run in runs):
        kind = "nothing" if content in (None, []) else type(content).__name__
        raise ConfigError(f"holds {kind}; lmms-eval takes a mapping such as 'model: NAME', or a list of them.")
    for key in (key for run in runs for key in run if not isinstance(key, str)):
        raise ConfigError(f"has the key {key!r}, which is no text; quote it.")
    if len(budgets) not in (0, len(runs)):
        raise ConfigError(
            f"has {len(budgets)} comments '# budget: …' for {len(runs)} runs; give one for each run, in order."
        )
    return [
        Run(path, i + 1 if many else 0, settings, budgets[i] if budgets else None) for i, settings in enumerate(runs)
    ]


def unknown_keys(run: Run) -> list[str]:
    """A message for each key that lmms-eval does not take."""
    return [f"unknown key '{key}'.{did_you_mean(str(key), sorted(KEYS))}" for key in run.settings if key not in KEYS]
