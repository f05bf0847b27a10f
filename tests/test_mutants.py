"""The mutants' patches fit the sources, and the tests that they name exist."""

from __future__ import annotations

import pytest
from mutants import MUTANTS, PACKAGE, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.defect)
def test_a_mutant_can_be_made_and_its_tests_exist(mutant: Mutant) -> None:
    assert (PACKAGE / mutant.file).read_text(encoding="utf-8").count(mutant.old) == 1
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_there_are_fourteen() -> None:
    assert len(MUTANTS) == 14
