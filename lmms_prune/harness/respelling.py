"""--model_args as JSON: lmms-eval names the folder of results and the answers of its response cache as it does for pairs.

lmms-eval looks for "pretrained=" in the text, and keys its response cache by the text. Both would take two spellings of one
run for two runs.
"""

from __future__ import annotations

from typing import Any

from lmms_eval.caching.response_cache import ResponseCache

from lmms_prune.harness.argument_text import comma_text, is_json, split


def respell(tracker: Any, model_args: Any, cached: bool) -> None:
    """Let the evaluation that is being set up name its results and its cached answers by the pairs that a JSON text states.

    Args:
        tracker: lmms-eval's `EvaluationTracker`; None if results are not saved by the command.
        model_args: the text or mapping after ``--model_args``; one that is no JSON text is left as it is.
        cached: whether the evaluation uses a response cache.
    """
    if not isinstance(model_args, str) or not is_json(model_args):
        return
    text = comma_text(split(model_args))
    if tracker is not None:
        general = tracker.general_config_tracker
        log = general.log_experiment_args
        general.log_experiment_args = lambda **options: log(**{**options, "model_args": text})
    if not cached:
        return
    create = ResponseCache.create

    def create_respelled(cache_root: str, **options: Any) -> ResponseCache:
        ResponseCache.create = create
        return create(cache_root, **{**options, "model_args": text})

    ResponseCache.create = create_respelled
