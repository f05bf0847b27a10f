"""Schedule texts: what is valid reads back as itself, and everything else is refused with a pointer into it."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from million import main
from schedule_texts import anything, mutated, read_or_refused, valid

from lmms_prune import Schedule, ScheduleError
from lmms_prune.schedule import PromptSizes


@given(st.randoms(use_true_random=False))
def test_every_valid_text_is_read_and_reads_back_as_itself(draw: Random) -> None:
    assert read_or_refused(valid(draw))


@settings(max_examples=300)
@pytest.mark.parametrize("texts", [mutated, anything])
@given(draw=st.randoms(use_true_random=False))
def test_any_other_text_is_read_or_refused_with_a_pointer_inside_it(
    texts: Callable[[Random], str], draw: Random
) -> None:
    read_or_refused(texts(draw))


@settings(max_examples=300)
@given(st.text())
def test_any_unicode_is_read_or_refused(text: str) -> None:
    read_or_refused(text)
    read_or_refused(f"dart@2:0.5;{text}")
    read_or_refused(f"dart@{text}:0.5")
    read_or_refused(f"dart@2:{text},random@9:0.1")


@given(st.text(max_size=12) | st.sampled_from(["1e999999999t", "1e-999999999", "9" * 5000, "nan", "-1t", "1/0"]))
def test_any_budget_is_solved_or_refused_at_once(budget: str) -> None:
    try:
        solved = Schedule.parse("dart@2:?").solve(budget, PromptSizes(8, 100))
    except ScheduleError:
        return
    assert solved.unknown is None


def test_the_command_counts_what_it_tried(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--cases", "3000", "--seed", "7"])
    said = capsys.readouterr().out
    assert "3,000 schedule texts, seed 7: " in said
    assert "0 failures" in said
