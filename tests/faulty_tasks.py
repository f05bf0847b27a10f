"""A benchmark of the demo's under another name, whose functions do what a test wants of them."""

from __future__ import annotations

from pathlib import Path

TASK = """task: {name}
dataset_path: lmms-lab-encoder/POPE
test_split: test
output_type: generate_until
doc_to_visual: !function functions_of_{name}.images
doc_to_text: !function functions_of_{name}.question
doc_to_target: answer
generation_kwargs:
  max_new_tokens: 2
process_results: !function functions_of_{name}.scores
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
FUNCTIONS = """
import os, signal, subprocess, sys

def images(doc):
    return [doc["image"].convert("RGB")]

def question(doc):
    return "Is it?"

def scores(doc, results):
    return {"exact_match": 1.0}
"""


def write_task(folder: Path, name: str, functions: str = "") -> None:
    """Write a task for ``--include_path``; `functions` may replace images, question and scores."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(TASK.format(name=name), encoding="utf-8")
    (folder / f"functions_of_{name}.py").write_text(FUNCTIONS + functions, encoding="utf-8")
