"""What a user should know before an evaluation answers anything: results that will not do, and how to get those that do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from os.path import isdir
from typing import Any

from huggingface_hub import get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from loguru import logger

from lmms_prune.compat.lmms_eval import evaluation_options, resolved_options, saved_below, under_the_command
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.harness.tasks import HUB_LOGIN, UNSCORED, single_tasks, split_pairs

_OPTIONS = ("tasks", "limit", "offset", "log_samples", "evaluation_tracker")


def say_at_start() -> None:
    """Log each notice about the evaluation that is being set up, once in a process."""
    options = evaluation_options(_OPTIONS)
    for notice in notices(options, is_command=under_the_command()):
        _say(notice)


def notices(options: Mapping[str, Any], *, is_command: bool) -> Iterator[str]:
    """Yield what the evaluation's results will lack, with the way out.

    Args:
        options: options of the evaluation by lmms-eval's names; empty outside an evaluation.
        is_command: whether lmms-eval's command runs, which saves results only if told so.
    """
    tracker = options.get("evaluation_tracker")
    if is_command and options:
        if tracker is None or saved_below(tracker) is None:
            yield (
                "Nothing of this evaluation will be saved: `lmms-prune leaderboard` will have nothing to read. Add "
                "--output_path results --log_samples."
            )
        elif not options.get("log_samples"):
            yield (
                "No samples will be logged: the leaderboard will have neither intervals nor tests, and no changed answers to "
                "show. Add --log_samples."
            )
    names = _names(options)
    for name in names:
        if name in UNSCORED:
            yield (
                f"--tasks {name}: it contains a test split, whose answers only the benchmark's own server knows: it is answered, "
                f"but gets no score here. For a score use {UNSCORED[name]}."
            )
    if needing := [name for name in single_tasks(",".join(names)) if _needs_login(name)]:
        yield (
            f"The tasks {', '.join(needing)} ask the Hugging Face hub for a login, though their data are public, and there is none "
            "here: run `hf auth login`, or set HF_TOKEN."
        )


def refuse_split_pairs() -> None:
    """Refuse --limit and --offset that would cut a pair of questions, which ends the scorer after everything is answered.

    Before the weights are loaded a share is not yet a number of documents; when the requests are answered it is.

    Raises:
        ArgumentError: names the option and even numbers.
    """
    options, resolved = evaluation_options(_OPTIONS), resolved_options(("limit", "offset"))
    asked, final = options.get("limit"), {**options, **resolved}
    message = split_pairs(final.get("limit"), final.get("offset"), single_tasks(",".join(_names(options))))
    if message:
        is_share = resolved.get("limit") not in (None, asked)
        raise ArgumentError(
            f"--limit {asked} is {final['limit']} documents: --{message}" if is_share else f"--{message}"
        )


def _names(options: Mapping[str, Any]) -> list[str]:
    """Return the names of tasks and groups; tasks that are objects have none here."""
    return [name for name in options.get("tasks") or () if isinstance(name, str)]


def _needs_login(task: str) -> bool:
    """Tell whether a task's data must be asked for with a token that is not there."""
    data = HUB_LOGIN.get(task)
    # A folder of that name in the working directory takes the hub's place.
    return data is not None and not HF_HUB_OFFLINE and not isdir(data) and get_token() is None


@cache
def _say(notice: str) -> None:
    logger.warning(notice)
