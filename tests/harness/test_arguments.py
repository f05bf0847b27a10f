"""The text of --model_args: what is one argument and what is another."""

from __future__ import annotations

import pytest

from lmms_prune.harness.arguments import ModelArguments, split
from lmms_prune.models.llava import LLAVA


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("a=1", {"a": "1"}),
        ("a=1,", {"a": "1"}),
        (" a = 1 , b = 2 ", {"a": "1", "b": "2"}),
        ("schedule=x@2:0.4,y@9:0.1,seed=3", {"schedule": "x@2:0.4,y@9:0.1", "seed": "3"}),
        (
            "seed=3,schedule=x@2:0.4;order=a,y@9:0.1;order=b",
            {"seed": "3", "schedule": "x@2:0.4;order=a,y@9:0.1;order=b"},
        ),
        ('schedule="x@2:0.4,y@9:0.1",seed=3', {"schedule": "x@2:0.4,y@9:0.1", "seed": "3"}),
        ("schedule=[x@2:0.4, y@9:0.1], seed=3", {"schedule": "[x@2:0.4, y@9:0.1]", "seed": "3"}),
        (
            "system_prompt=Don't guess, please,schedule=x@2:0.4,chat_template=/home/o'neil/x.jinja",
            {"system_prompt": "Don't guess, please", "schedule": "x@2:0.4", "chat_template": "/home/o'neil/x.jinja"},
        ),
        ("system_prompt='a=1, b=2',seed=3", {"system_prompt": "a=1, b=2", "seed": "3"}),
        ('schedule= "x@2:0.4,y@9:0.1" ,seed=3', {"schedule": "x@2:0.4,y@9:0.1", "seed": "3"}),
        ("schedule=none,,seed=3,", {"schedule": "none", "seed": "3"}),
        ("pretrained=/a=b/c,seed=3", {"pretrained": "/a=b/c", "seed": "3"}),
    ],
)
def test_split(text: str, values: dict[str, str]) -> None:
    assert split(text) == values


def test_the_identity_holds_what_a_file_says(harness, tmp_path) -> None:
    """Two runs with another text in the same file must not share the answers of a cache."""
    file = tmp_path / "system.txt"
    texts = []
    for text in ("Be brief.", "Be long."):
        file.write_text(text)
        texts.append(repr(harness.create("llava", system_prompt=str(file))))
    assert texts[0] != texts[1]
    assert "Be long." in texts[1]


def test_defaults_give_way_and_the_command_line_joins_in() -> None:
    read = ModelArguments.read("seed=1", {"batch_size": "4", "device": "cpu"}, LLAVA)
    assert (read.seed, read.batch_size, read.device, read.pretrained) == (1, 4, "cpu", LLAVA.checkpoint)
    # 1 is what the harness passes on when nobody asked for a batch size.
    assert ModelArguments.read("batch_size=8", {"batch_size": 1}, LLAVA).batch_size == 8
