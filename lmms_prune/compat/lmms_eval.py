"""Names of lmms-eval 0.7.3 that this package uses beyond the interface documented for models.

`LIBRARY` lists all of them. lmms-eval tells a model neither the folder of ``--use_cache``, nor the object that saves the
results, nor whether its own command runs; these are read from the frames of its functions.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from lmms_prune.compat.names import Library, PrivateNames


def under_the_command() -> bool:
    """Whether lmms-eval's command is running, rather than a caller of its Python interface."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__package__") == "lmms_eval" and frame.f_code.co_name.startswith("cli_evaluate"):
            return True
        frame = frame.f_back
    return False


def cache_in_use() -> Path | None:
    """The folder of ``--use_cache`` of the evaluation that is being set up; None without one."""
    folder = evaluation_options(("use_cache",)).get("use_cache")
    return None if folder is None else Path(folder).absolute()


def tracker_in_use() -> Any:
    """The object that will save the results of the evaluation that is being set up; None if they are not saved."""
    return evaluation_options(("evaluation_tracker",)).get("evaluation_tracker")


def saved_below(tracker: Any) -> Path | None:
    """The folder of ``--output_path``; None if results are not saved."""
    return Path(tracker.output_path) if tracker.output_path else None


def saved_file(tracker: Any, rest: str) -> Path:
    """A file that the tracker writes: `rest` is the part of its name after the time stamp of the run."""
    folder = Path(tracker.output_path, tracker.general_config_tracker.model_name_sanitized)
    stamp = getattr(tracker, "date_id", None)  # set only when the folder is made
    return folder if stamp is None else folder / f"{stamp}_{rest}"


def evaluation_options(names: tuple[str, ...]) -> dict[str, Any]:
    """Options of the running evaluation that the harness does not pass to models; empty outside an evaluation."""
    return _locals_of("simple_evaluate", names)


def resolved_options(names: tuple[str, ...]) -> dict[str, Any]:
    """Options of the evaluation while it asks the model: a share of the documents is then their number."""
    return _locals_of("evaluate", names)


def _locals_of(function: str, names: tuple[str, ...]) -> dict[str, Any]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "lmms_eval.evaluator" and frame.f_code.co_name == function:
            return {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        frame = frame.f_back
    return {}


_SINCE = "0.7.3"
RUN_FAILED = "Error during evaluation:"
"""The message that the command logs after the stack trace of a failed run, before it continues and exits with 0."""
_OF_A_TASK = re.compile(r"lmms_eval[/\\]tasks[/\\]\w+[/\\]|, in import_function\b")


def through_a_task(traceback: str) -> bool:
    """Whether a stack trace passes through a task's own file, or through the function that imports one."""
    return _OF_A_TASK.search(traceback) is not None


_DRAWN = "evaluating documents that were drawn at random"
_COMMAND = "running evaluations for a sweep, and ending a failed one with an exit code"
_SPELLED = "naming results and cached answers by --model_args as JSON"
_SAVED = "telling when results could not be saved"

LIBRARY = Library(
    "lmms-eval",
    "lmms_prune/compat/lmms_eval.py",
    (
        PrivateNames(
            "lmms_eval.__main__:", "attributes", ("TaskManager",), _SINCE, "reading the tasks' files once for a sweep"
        ),
        PrivateNames("lmms_eval.__main__:parse_eval_args", "attributes", ("__call__",), _SINCE, _COMMAND),
        PrivateNames("lmms_eval.__main__:cli_evaluate", "leading parameters", ("args",), _SINCE, _COMMAND),
        PrivateNames("lmms_eval.__main__:cli_evaluate_single", "leading parameters", ("args",), _SINCE, _COMMAND),
        PrivateNames(
            "lmms_eval.utils:create_iterator",
            "leading parameters",
            ("raw_iterator", "rank", "world_size", "limit", "offset"),
            _SINCE,
            _DRAWN,
        ),
        PrivateNames("lmms_eval.evaluator:", "attributes", ("create_iterator",), _SINCE, _DRAWN),
        PrivateNames(
            "lmms_eval.evaluator:simple_evaluate",
            "locals",
            ("use_cache",),
            _SINCE,
            "holding the response cache to its origin",
        ),
        PrivateNames("lmms_eval.evaluator:simple_evaluate", "locals", ("evaluation_tracker",), _SINCE, _SAVED),
        PrivateNames(
            "lmms_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_aggregated",
            "leading parameters",
            ("results", "samples", "datetime_str"),
            _SINCE,
            _SAVED,
        ),
        PrivateNames(
            "lmms_eval.loggers.evaluation_tracker:EvaluationTracker.save_results_samples",
            "leading parameters",
            ("task_name", "samples"),
            _SINCE,
            _SAVED,
        ),
        PrivateNames(
            "lmms_eval.loggers.evaluation_tracker:EvaluationTracker.__init__",
            "parameters",
            ("output_path",),
            _SINCE,
            _SAVED,
        ),
        PrivateNames(
            "lmms_eval.loggers.evaluation_tracker:GeneralConfigTracker",
            "attributes",
            ("model_name_sanitized",),
            _SINCE,
            _SAVED,
        ),
        PrivateNames(
            "lmms_eval.caching.response_cache:ResponseCache.create",
            "parameters",
            ("cache_root", "model_args"),
            _SINCE,
            _SPELLED,
        ),
        PrivateNames(
            "lmms_eval.loggers.evaluation_tracker:GeneralConfigTracker.log_experiment_args",
            "parameters",
            ("model_args",),
            _SINCE,
            _SPELLED,
        ),
        PrivateNames(
            "lmms_eval.evaluator:simple_evaluate",
            "locals",
            ("num_fewshot", "system_instruction", "apply_chat_template", "fewshot_as_multiturn"),
            _SINCE,
            "refusing options that a chat model never receives",
        ),
        PrivateNames(
            "lmms_eval.evaluator:simple_evaluate",
            "locals",
            ("tasks", "limit", "offset", "log_samples"),
            _SINCE,
            "saying at the start what the results will lack",
        ),
        PrivateNames(
            "lmms_eval.evaluator:evaluate",
            "locals",
            ("limit", "offset"),
            _SINCE,
            "refusing a --limit that cuts a pair of questions",
        ),
        PrivateNames(
            "lmms_eval.models.registry_v2:ModelManifest",
            "fields",
            ("model_id", "chat_class_path"),
            _SINCE,
            "offering the models",
        ),
        PrivateNames(
            "lmms_eval.api.instance:TokenCounts",
            "fields",
            ("input_tokens", "output_tokens"),
            _SINCE,
            "token accounting in the samples",
        ),
        PrivateNames(
            "lmms_eval.api.instance:TokenCounts", "attributes", ("to_dict",), _SINCE, "token accounting in the samples"
        ),
        PrivateNames("lmms_eval.api.instance:GenerationResult", "fields", ("text", "token_counts"), _SINCE, "answers"),
        PrivateNames("lmms_eval.api.instance:Instance", "attributes", ("args",), _SINCE, "reading requests"),
        PrivateNames(
            "lmms_eval.api.model:lmms.create_from_arg_string",
            "leading parameters",
            ("arg_string", "additional_config"),
            _SINCE,
            "making the models",
        ),
        PrivateNames(
            "lmms_eval.api.model:lmms", "attributes", ("rank", "world_size", "clean"), _SINCE, "several processes"
        ),
        PrivateNames("lmms_eval.protocol:ChatMessages", "attributes", ("to_hf_messages",), _SINCE, "prompts"),
        PrivateNames(
            "lmms_eval.models.model_utils.gen_metrics:log_metrics",
            "leading parameters",
            ("total_elapsed_time", "total_gen_tokens", "avg_speed", "additional_metrics"),
            _SINCE,
            "throughput in the results",
        ),
        PrivateNames(
            "lmms_eval.models.model_utils.progress:make_progress",
            "parameters",
            ("total", "desc", "disable"),
            _SINCE,
            "progress",
        ),
        PrivateNames(
            "lmms_eval.tasks:TaskManager.__init__",
            "parameters",
            ("verbosity", "include_path", "model_name"),
            _SINCE,
            "documents",
        ),
        PrivateNames(
            "lmms_eval.tasks:TaskManager",
            "attributes",
            ("_get_config",),
            _SINCE,
            "telling whether a task has one score for each document, before its data are loaded",
        ),
        PrivateNames(
            "lmms_eval.utils:import_function",
            "leading parameters",
            ("loader", "node"),
            _SINCE,
            "telling a task's imports from those that every run needs",
        ),
        PrivateNames(
            "lmms_eval.api.task:ConfigurableTask",
            "attributes",
            ("process_results", "_prepare_metric_and_aggregation"),
            _SINCE,
            "scoring answers again without the tasks' data",
        ),
        PrivateNames(
            "lmms_eval.api.task:TaskConfig", "fields", ("output_type", "doc_to_target"), _SINCE, "scoring again"
        ),
        PrivateNames("lmms_eval.tasks:get_task_dict", "attributes", ("__call__",), _SINCE, "documents"),
        PrivateNames(
            "lmms_eval.tasks.mmbench.en_utils:mmbench_evaluator",
            "attributes",
            ("eval_result",),
            _SINCE,
            "MMBench's own rules",
        ),
        PrivateNames(
            "lmms_eval.tasks._task_utils.vqa_eval_metric:EvalAIAnswerProcessor",
            "attributes",
            ("__call__",),
            _SINCE,
            "OCR-VQA's scores",
        ),
        PrivateNames(
            "lmms_eval.tasks.docvqa.utils:",
            "attributes",
            ("docvqa_doc_to_visual", "docvqa_doc_to_text"),
            _SINCE,
            "OCR-VQA's prompts",
        ),
        PrivateNames(
            "lmms_eval.tasks.pope.utils:pope_process_results",
            "leading parameters",
            ("doc", "results"),
            _SINCE,
            "POPE's scores",
        ),
    ),
)
