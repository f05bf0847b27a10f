"""--model_args and calibrations: whatever is given is read, or refused by one of our own errors."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_values import PIECES, VALUES, changed
from schedule_texts import mutated, valid

from lmms_prune import Schedule, ScheduleError
from lmms_prune.harness.arguments import ArgumentError, ModelArguments
from lmms_prune.harness.calibrations import StoredCalibrationError, kept_schedule
from lmms_prune.models import MODEL_NAMES
from lmms_prune.models.architectures import PUBLISHED, architecture
from lmms_prune.models.sizes import ArchitectureError

NAMES = list(ModelArguments.__dataclass_fields__)
# Values that each argument takes.
TAKEN: dict[str, st.SearchStrategy[str]] = {
    "pretrained": st.sampled_from(["me/model", "./folder", "a=b", "x" * 300]),
    "positions": st.sampled_from(["original", "compact"]),
    "seed": st.integers(0, 10**9).map(str),
    "batch_size": st.sampled_from(["1", "8", "auto"]),
    "dtype": st.sampled_from(["auto", "float32", "float16", "bfloat16"]),
    "trust_remote_code": st.sampled_from(["true", "False"]),
    "system_prompt": st.sampled_from(["Be brief, be right.", "One, two = three"]),
    "attn_implementation": st.sampled_from(["sdpa", "eager"]),
}
WRAPPER = st.sampled_from(list(MODEL_NAMES.values()))


def read(wrapper: Any, given: Any, additional: Any = None) -> ModelArguments | None:
    """What is read; None where it is refused as it should be."""
    try:
        arguments = ModelArguments.read(given, additional, wrapper)
    except (ArgumentError, ScheduleError):
        return None
    try:
        arguments.refuse_combinations(wrapper)
    except ArgumentError:
        return None
    return arguments


@st.composite
def texts(draw: st.DrawFn) -> str:
    """Arguments with values that may be anything, with letters of the form between them."""
    pieces = []
    for _ in range(draw(st.integers(0, 5))):
        name = draw(st.sampled_from([*NAMES, "schedul", ""]) | st.text(max_size=8))
        value = draw(st.sampled_from(PIECES) | st.text(max_size=12) | st.randoms(use_true_random=False).map(mutated))
        pieces.append(draw(st.sampled_from([f"{name}={value}", name, value, f" {name} = {value} "])))
    return draw(st.sampled_from([",", ", ", ""])).join(pieces)


@settings(max_examples=500)
@given(WRAPPER, texts() | st.text())
def test_any_text_is_read_or_refused(wrapper: Any, text: str) -> None:
    read(wrapper, text)


@settings(max_examples=300)
@given(
    WRAPPER, st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5) | st.integers(), VALUES, max_size=4) | VALUES
)
def test_any_mapping_is_read_or_refused(wrapper: Any, mapping: Any) -> None:
    read(wrapper, mapping, {"batch_size": 1, "device": None})


@given(WRAPPER, st.fixed_dictionaries({}, optional=TAKEN), st.randoms(use_true_random=False))
def test_a_text_says_what_the_same_mapping_says(wrapper: Any, taken: dict[str, str], draw: Random) -> None:
    schedule = " ".join(valid(draw).split())
    arguments = {**taken, "schedule": schedule}
    names = draw.sample(list(arguments), len(arguments))
    # A prompt may hold "name =" behind a comma, which unquoted would begin another argument.
    marks = {"system_prompt": '"'}
    text = ",".join(f"{name}={marks.get(name, '')}{arguments[name]}{marks.get(name, '')}" for name in names)
    by_mapping, by_text = (ModelArguments.read(given, None, wrapper) for given in (arguments, text))
    assert by_text == by_mapping
    assert by_text.schedule == Schedule.parse(schedule)
    assert by_text.trust_remote_code is (taken.get("trust_remote_code") == "true")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "config.json"


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.randoms(use_true_random=False), name=st.sampled_from(sorted(PUBLISHED)))
def test_any_config_json_is_read_or_refused_with_its_path(config: Path, draw: Random, name: str) -> None:
    said = changed(draw, PUBLISHED[name])
    for _ in range(draw.randrange(3)):
        said = changed(draw, said)
    text = json.dumps(said)
    config.write_text(text[: draw.randrange(len(text) + 1)] if draw.random() < 0.1 else text, encoding="utf-8")
    try:
        sizes = architecture(str(config))
    except ArchitectureError as error:
        refusal = str(error)
    else:
        assert sizes.layers > 0
        return
    assert str(config) in refusal


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b'{"schedule": 3}', b"{}", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_calibration_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "found.json"
    path.write_bytes(content)
    with pytest.raises(StoredCalibrationError, match=r"found\.json"):
        kept_schedule(path)
