"""The demo's models are trained on prompts worded as lmms-eval's tasks word them."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import load_dataset

from lmms_prune.demo import prompts

MMBENCH = "lmms-lab-encoder/MMBench"


def _options(row: dict[str, Any]) -> list[str]:
    return [row[letter] for letter in "ABCD"]


def _mmbench(row: dict[str, Any], *, chinese: bool = False) -> str:
    # The English task leaves a hint out that is the text "nan"; the Chinese one prints it.
    hint = row["hint"] if chinese or row["hint"] != "nan" else ""
    return prompts.mmbench(row["question"], _options(row), hint, chinese=chinese)


def _plain(row: dict[str, Any]) -> str:
    return row["question"]


TASKS = {
    "mme": (
        ("lmms-lab-encoder/MME", None, "test"),
        lambda row: prompts.short(row["question"].removesuffix(" Please answer yes or no.")),
    ),
    "scienceqa_img": (
        ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG", "test"),
        lambda row: prompts.scienceqa(row["question"], row["choices"], row["hint"]),
    ),
    "pope": (("lmms-lab-encoder/POPE", None, "test"), lambda row: prompts.short(row["question"])),
    "textvqa_val": (
        ("lmms-lab-encoder/textvqa", None, "validation"),
        lambda row: prompts.textvqa(row["question"]),
    ),
    "mmbench_en_dev_static": ((MMBENCH, "en", "dev"), _mmbench),
    "mmbench_cn_dev_static": ((MMBENCH, "cn", "dev"), lambda row: _mmbench(row, chinese=True)),
    "gqa": (
        ("lmms-lab-encoder/GQA", "testdev_balanced_instructions", "testdev"),
        lambda row: prompts.short(row["question"]),
    ),
    "infovqa_val": (
        ("lmms-lab-encoder/DocVQA", "InfographicVQA", "validation"),
        lambda row: prompts.short(row["question"]),
    ),
    "docvqa_val": (("lmms-lab-encoder/DocVQA", "DocVQA", "validation"), lambda row: prompts.short(row["question"])),
    "ocrbench": (("echo840/OCRBench", None, "test"), _plain),
}


@pytest.mark.slow
def test_training_words_its_prompts_as_the_tasks_do(harness, monkeypatch, tmp_path):
    decode = harness.create("llava").processor.tokenizer.decode
    monkeypatch.chdir(harness.mirror)
    for task, ((name, config, split), worded) in TASKS.items():
        # Only what is asked matters here.
        run = harness.pruned("llava", [task], {"gen_kwargs": "max_new_tokens=1"})
        rows = load_dataset(name, config, split=split, cache_dir=str(tmp_path))
        asked = sorted(decode(call["input_ids"][0]).replace("<image>" * 64, "<image>") for call in run.calls)
        assert asked == sorted(f"<s>USER: <image>\n{worded(row)} ASSISTANT:" for row in rows), task
