"""lmms-eval's response cache never mixes two runs, and a model object can be used again."""

from __future__ import annotations

import copy
import json
import os
import shutil

import pytest

TASKS = ("pope", "docvqa_val")
BASE = {"schedule": "dart@2:0.44,random@5:0.07", "seed": 0, "positions": "original"}
OTHERS = {
    "schedule": {"schedule": "dart@2:0.44,random@5:0.08"},
    "method": {"schedule": "dart@2:0.44,fastv@5:0.07"},
    "option": {"schedule": "dart@2:0.44;native_count=false,random@5:0.07"},
    "unpruned": {"schedule": "none"},
    "seed": {"seed": 1},
    "positions": {"positions": "compact"},
}


def _given(harness, change):
    return {"pretrained": str(harness.checkpoints["llava"]), **BASE, **change}


@pytest.mark.parametrize("as_object", [False, True], ids=["arguments", "object"])
def test_an_identical_run_is_answered_from_the_cache(as_object, harness, family, tmp_path):
    def run():
        arguments = {**BASE, "pretrained": str(harness.checkpoints[family])}
        cache = {"use_cache": str(tmp_path)}
        if as_object:
            return harness.evaluate(harness.create(family, arguments), TASKS, **cache)
        return harness.evaluate(harness.models[family], TASKS, arguments, **cache)

    first, second = run(), run()
    assert len(first.calls) == 8
    assert second.calls == []
    assert second.answers == first.answers
    assert second.metrics == first.metrics


def test_pairs_and_json_share_the_answers_of_a_cache(harness, tmp_path):
    path = harness.checkpoints["llava"]
    pairs = f"schedule={BASE['schedule']},pretrained={path}"
    as_json = json.dumps({"schedule": BASE["schedule"], "pretrained": str(path)})
    first, second = (
        harness.evaluate("llava_pruned", ["pope"], text, use_cache=str(tmp_path)) for text in (as_json, pairs)
    )
    assert len(first.calls) == 4
    assert second.calls == []
    assert second.answers == first.answers


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("as_object", [False, True], ids=["arguments", "object"])
def test_another_run_does_not_share_the_cache(as_object, change, harness, tmp_path):
    for number, arguments in enumerate((_given(harness, {}), _given(harness, change))):
        cache = {"use_cache": str(tmp_path)}
        if as_object:
            run = harness.evaluate(harness.create("llava", arguments), ["pope"], **cache)
        else:
            run = harness.evaluate("llava_pruned", ["pope"], arguments, **cache)
        assert len(run.calls) == 4, f"run {number} took answers from the cache"


@pytest.mark.parametrize("change", ["code", "versions", "checkpoint"])
def test_answers_of_other_code_or_another_checkpoint_are_not_given_out(change, harness, tmp_path, monkeypatch):
    """lmms-eval sees no difference: the same arguments are refused by name, a model object is another one."""
    from lmms_prune.harness.arguments import ArgumentError

    folder, cache = tmp_path / "checkpoint", {"use_cache": str(tmp_path / "cache")}
    shutil.copytree(harness.checkpoints["llava"], folder)
    # As the command gives them, which lmms-eval itself cannot take apart, and as a mapping.
    given = {
        "text": f"pretrained={folder},schedule=dart@2:0.44,vtw@5",
        "mapping": {**BASE, "pretrained": str(folder)},
    }
    for arguments in given.values():
        assert len(harness.evaluate("llava_pruned", ["pope"], arguments, **cache).calls) == 4
    assert harness.evaluate(harness.create("llava", given["mapping"]), ["pope"], **cache).calls
    if change == "code":
        monkeypatch.setattr("lmms_prune.harness.fingerprint.code", lambda: "another")
    elif change == "versions":
        monkeypatch.setattr("lmms_prune.harness.fingerprint.versions", lambda: {"torch": "1.0"})
    else:
        os.utime(folder / "model.safetensors", ns=(1, 1))
    name = {"code": "code", "versions": "torch", "checkpoint": "files"}[change]
    for arguments in given.values():
        with pytest.raises(ArgumentError, match=rf"--use_cache \S+cache holds answers .*{name}.*use a new folder"):
            harness.evaluate("llava_pruned", ["pope"], arguments, **cache)
    fresh = {"use_cache": str(tmp_path / "fresh")}
    assert len(harness.evaluate("llava_pruned", ["pope"], given["text"], **fresh).calls) == 4
    assert len(harness.evaluate(harness.create("llava", given["mapping"]), ["pope"], **cache).calls) == 4


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b'{"a": 1}', b"\xff"])
def test_a_cache_that_no_longer_says_what_it_is_made_from_is_refused(content, tmp_path):
    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.harness.response_cache import hold_to

    hold_to(tmp_path, "llava_pruned", "schedule=vtw@2", {"code": "a"})
    hold_to(tmp_path, "llava_pruned", "schedule=vtw@2", {"code": "a"})
    (tmp_path / "lmms-prune.json").write_bytes(content)
    with pytest.raises(ArgumentError, match=r"lmms-prune\.json is broken, .*; use a new folder"):
        hold_to(tmp_path, "llava_pruned", "schedule=vtw@2", {"code": "a"})


@pytest.mark.parametrize(("one", "other"), [("007", "7"), ("1e3", "1000.0"), ("True", "true"), ("0.50", "0.5")])
def test_names_that_lmms_eval_takes_for_one_number_are_told_apart(one, other, tmp_path):
    from lmms_eval.utils import simple_parse_args_string

    from lmms_prune.harness.arguments import ArgumentError
    from lmms_prune.harness.response_cache import hold_to

    texts = [f"pretrained={name}" for name in (one, other)]
    assert simple_parse_args_string(texts[0]) == simple_parse_args_string(texts[1])
    for model in ("llava_pruned", "qwen2_5_vl_pruned"):
        hold_to(tmp_path, model, texts[0], {"pretrained": one})
    with pytest.raises(ArgumentError, match=f"another pretrained .pretrained: {one}, now {other}"):
        hold_to(tmp_path, "llava_pruned", texts[1], {"pretrained": other})


def test_a_budget_shares_with_the_schedule_it_solves_to_and_with_no_other(harness):
    solved = harness.create("llava", schedule="dart@2:?", budget="24t")
    schedule = str(solved.arguments.schedule)
    assert repr(solved) == repr(harness.create("llava", schedule=schedule))
    assert repr(solved) != repr(harness.create("llava", schedule="dart@2:?", budget="40t"))


def test_repr_is_the_runs_identity(harness):
    path = str(harness.checkpoints["llava"])
    text = repr(harness.create("llava", schedule="vtw@5", seed=7, positions="compact"))
    assert text.startswith("LlavaPruned(")
    for part in (f"pretrained={path}", "schedule=vtw@5", "seed=7", "positions=compact"):
        assert part in text
    changes = ({"prompt": "vicuna"}, {"image_aspect": "pad"}, {"dtype": "bfloat16"}, {"system_prompt": "Hello."})
    assert len({repr(harness.create("llava", **change)) for change in ({}, *changes)}) == len(changes) + 1


def test_the_same_object_can_be_evaluated_twice(harness, family):
    model = harness.create(family, schedule=BASE["schedule"])
    first, second = (harness.evaluate(model, TASKS) for _ in range(2))
    assert len(first.calls) == len(second.calls) == 8
    assert second.answers == first.answers
    assert second.accounting == first.accounting
    assert second.metrics == first.metrics
    for run in (first, second):
        assert 0 <= run.recorded.pop("other_load") <= 1  # of other programs
        assert run.recorded.pop("peak_memory") > 2**20
    assert second.recorded == first.recorded


def test_generation_options_are_not_changed(harness, family, monkeypatch):
    model = harness.create(family, schedule="vtw@3")
    original, seen = model.generate_until, []

    def watched(requests):
        before = [copy.deepcopy(request.args[2]) for request in requests]
        answers = original(requests)
        seen.extend(zip(before, [request.args[2] for request in requests], strict=True))
        return answers

    monkeypatch.setattr(model, "generate_until", watched)
    harness.evaluate(model, ("textvqa_val", *TASKS))
    assert len(seen) == 12
    assert all(before == after for before, after in seen)
