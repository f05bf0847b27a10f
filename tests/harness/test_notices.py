"""What is said at the start of an evaluation whose results will not do, and how it is said only then."""

from __future__ import annotations

import pytest

from lmms_prune.demo.models import MODELS, weights
from lmms_prune.harness import notices as module
from lmms_prune.harness.notices import notices

LLAVA = f"pretrained={weights(MODELS[0])},dtype=float32,schedule=dart@1:0.44,batch_size=4"
NOTHING_SAVED = "Nothing of this evaluation will be saved"
NO_SAMPLES = "No samples will be logged"


class Tracker:
    def __init__(self, output_path: str | None) -> None:
        self.output_path = output_path


def said(is_command: bool = True, **options: object) -> list[str]:
    return list(notices({"tasks": ["textvqa_val"], "limit": None, **options}, is_command=is_command))


def test_results_that_are_saved_with_samples_need_no_notice() -> None:
    assert said(evaluation_tracker=Tracker("results"), log_samples=True) == []


def test_what_is_not_saved_is_named_with_the_option() -> None:
    (notice,) = said(evaluation_tracker=Tracker(None), log_samples=False)
    assert notice.startswith(NOTHING_SAVED)
    assert notice.endswith("Add --output_path results --log_samples.")
    (notice,) = said(evaluation_tracker=Tracker("results"), log_samples=False)
    assert notice.startswith(NO_SAMPLES)
    assert notice.endswith("Add --log_samples.")
    # A caller in Python gets the results as an object, and outside an evaluation there is nothing to say.
    assert said(False, evaluation_tracker=None, log_samples=True) == []
    assert list(notices({}, is_command=True)) == []


@pytest.mark.parametrize(
    ("task", "instead"),
    [
        ("textvqa", "textvqa_val or prune_textvqa_ocr"),
        ("docvqa_test", "docvqa_val"),
        ("mmbench_cn", "prune_mmbench_cn"),
    ],
)
def test_a_test_split_is_named_with_the_task_that_has_a_score(task: str, instead: str, monkeypatch) -> None:
    monkeypatch.setattr(module, "get_token", lambda: "some")
    (notice,) = said(False, tasks=["mme", task, object()])
    assert notice.startswith(f"--tasks {task}: it contains a test split")
    assert notice.endswith(f"For a score use {instead}.")


def test_a_missing_login_is_named_before_the_hub_refuses(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "get_token", lambda: None)
    (notice,) = said(False, tasks=["prune_llava"])
    assert notice.startswith("The tasks mme, scienceqa_img, gqa ask the Hugging Face hub for a login")
    assert "`hf auth login`" in notice
    # Folders in the place of the hub's data, a token, and work without the hub need none.
    (tmp_path / "lmms-lab-encoder" / "GQA").mkdir(parents=True)
    assert said(False, tasks=["gqa", "prune_pope"]) == []
    (notice,) = said(False, tasks=["gqa", "mme"])
    assert notice.startswith("The tasks mme ask")
    monkeypatch.setattr(module, "HF_HUB_OFFLINE", True)
    assert said(False, tasks=["mme"]) == []
    monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(module, "get_token", lambda: "some")
    assert said(False, tasks=["mme"]) == []


def test_the_command_says_once_that_nothing_will_be_saved_and_answers(harness) -> None:
    """The real command, as a newcomer types it; the notice comes before the first answer."""
    line = ("--model", "llava_pruned", "--model_args", LLAVA, "--tasks", "textvqa")
    folder = harness.new_folder()  # the file for the benchmark's server goes to the working directory
    for data in harness.mirror.iterdir():
        (folder / data.name).symlink_to(data)
    run = harness.fork(*line, output_in_config=True, cwd=folder)
    assert run.returncode == 0, run.stderr[-3000:]
    # lmms-eval's log goes to stdout.
    assert run.stdout.count(NOTHING_SAVED) == 1
    assert run.stdout.count("--tasks textvqa: it contains a test split") == 1
    assert run.stdout.index(NOTHING_SAVED) < run.stdout.index("Running generate_until requests")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--limit", "3"), "lmms-prune: error: --limit 3 cuts one of MME's pairs of questions"),
        (("--limit", "0.6"), "lmms-prune: error: --limit 0.6 is 3 documents: --limit 3 cuts one of MME's pairs"),
        (("--limit", "2", "--offset", "1"), "lmms-prune: error: --offset 1 cuts one of MME's pairs"),
    ],
)
def test_half_a_pair_ends_the_command_before_anything_is_answered(options, message, harness) -> None:
    """lmms-eval's scorer of MME refuses it at the end, and exits with 0; the results of all tasks are then lost."""
    run = harness.fork("--model", "llava_pruned", "--model_args", LLAVA, "--tasks", "mme,pope", *options)
    assert run.returncode == 2, run.stderr[-3000:]
    assert message in run.stderr
    assert "Model Responding" not in run.stderr
    assert run.results is None


def test_an_even_number_of_questions_is_answered(harness) -> None:
    run = harness.fork(
        "--model", "llava_pruned", "--model_args", LLAVA, "--tasks", "mme", "--limit", "2", "--offset", "2"
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.samples["mme"]) == 2
    assert NO_SAMPLES not in run.stdout
    assert NOTHING_SAVED not in run.stdout
