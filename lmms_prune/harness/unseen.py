"""Guards against evaluation options whose texts lmms-eval does not show to chat models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lmms_prune.harness.arguments import ArgumentError

_NO_EXAMPLES = "lmms-eval shows no examples to chat models, which are given a document's own messages; leave it out"
UNSEEN = {
    "num_fewshot": _NO_EXAMPLES,
    "fewshot_as_multiturn": _NO_EXAMPLES,
    "system_instruction": "lmms-eval does not show it to chat models; use --model_args system_prompt=…",
    "apply_chat_template": "the checkpoint's chat template is applied anyway; leave it out",
}
"""Reasons for refusing each option: it has no effect, but the results would claim that it was in force."""


def refuse_unseen(options: Mapping[str, Any]) -> None:
    """Refuse options that would change nothing but still be written into the results.

    Args:
        options: options of the evaluation by lmms-eval's names; other options are ignored.

    Raises:
        ArgumentError: names the first refused option that is set.
    """
    for name, why in UNSEEN.items():
        if value := options.get(name):
            raise ArgumentError(f"--{name}{'' if value is True else f' {value}'}: {why}.")
