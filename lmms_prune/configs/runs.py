"""Reads ``--config`` files as lmms-eval does: a mapping of its options, or a list of such mappings."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from os.path import isdir, lexists
from pathlib import Path
from typing import Any

from lmms_prune.configs.budget import Claim, ClaimError, claims
from lmms_prune.errors import ConfigError, did_you_mean
from lmms_prune.models import MODEL_NAMES
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
"""The keys that lmms-eval 0.7.3 accepts. They are listed here because importing its parser takes seconds; a test compares."""


@dataclass(frozen=True)
class Run:
    """One run of a file.

    Args:
        path: the file.
        number: the run's number in the file, from 1; 0 if the file holds only one mapping.
        settings: lmms-eval's options.
        claim: the budget claimed by the file's comment; None without one.
    """

    path: Path
    number: int
    settings: dict[str, Any]
    claim: Claim | None

    @property
    def name(self) -> str:
        """The run's name: its file's stem, with the number if the file lists runs."""
        return f"{self.path.stem}-{self.number}" if self.number else self.path.stem

    def __str__(self) -> str:
        return f"{self.path}, run {self.number}" if self.number else str(self.path)


def files(paths: Iterable[Path]) -> list[Path]:
    """The YAML files that `paths` name; a folder is replaced by its files. Without duplicates.

    Raises:
        ConfigError: a path does not exist, or a folder has no YAML files.
    """
    yamls: dict[Path, None] = {}
    for path in paths:
        if not lexists(path):
            raise ConfigError(f"{path}: there is no such file or folder.")
        inside = sorted([*path.glob("*.yaml"), *path.glob("*.yml")]) if isdir(path) else [path]
        if not inside:
            raise ConfigError(f"{path}: this folder holds no .yaml files.")
        yamls |= dict.fromkeys(inside)
    return list(yamls)


def read(path: Path) -> list[Run]:
    """The runs of one file.

    Raises:
        ConfigError: the file is not readable, not YAML, or neither a mapping nor a list of mappings.
    """
    try:
        text = read_text(path)
        content, budgets = read_yaml(text), claims(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    except ClaimError as error:
        raise ConfigError(str(error)) from None
    except YamlError as error:
        raise ConfigError(f"is not YAML: {error}") from None
    is_list = isinstance(content, list)
    runs = content if is_list else [content]
    if not runs or not all(isinstance(run, dict) for run in runs):
        kind = "nothing" if content in (None, []) else type(content).__name__
        raise ConfigError(f"holds {kind}; lmms-eval takes a mapping such as 'model: NAME', or a list of them.")
    for key in (key for run in runs for key in run if not isinstance(key, str)):
        raise ConfigError(f"has the key {key!r}, which is not a text; quote it.")
    if len(budgets) not in (0, len(runs)):
        raise ConfigError(
            f"has {len(budgets)} comments '# budget: …' for {len(runs)} runs; give one for each run, in order."
        )
    return [
        Run(path, i + 1 if is_list else 0, settings, budgets[i] if budgets else None) for i, settings in enumerate(runs)
    ]


_MODEL_KEY = re.compile(r"""(?:^|[{,-])[ \t]*["']?model["']?[ \t]*:[ \t]*["']?([\w.-]+)""", re.MULTILINE)


def is_ours(path: Path) -> bool:
    """Tell whether a YAML file is a configuration for this package's models, or nearly one.

    It need not be readable as YAML: a file with a mistake must not pass for another program's.
    """
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError):
        return False
    return any(get_close_matches(name, MODEL_NAMES, cutoff=0.8) for name in _MODEL_KEY.findall(text))


def unknown_keys(run: Run) -> list[str]:
    """A message for each key that lmms-eval does not accept."""
    return [f"unknown key '{key}'.{did_you_mean(str(key), sorted(KEYS))}" for key in run.settings if key not in KEYS]
