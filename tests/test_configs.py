"""What is written down twice is the same in both places."""

from __future__ import annotations

from lmms_prune.harness.models import MODELS
from lmms_prune.models import FAMILIES


def test_every_family_has_its_wrapper() -> None:
    assert {name: kind.family for name, kind in MODELS.items()} == {
        family.model_name: family for family in FAMILIES.values()
    }
