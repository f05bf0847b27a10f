"""The text of --model_args: what is one argument and what is another."""

from __future__ import annotations

import pytest

from lmms_prune.harness.argument_text import ArgumentError, comma_text, extended, split
from lmms_prune.harness.arguments import ModelArguments
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


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("{}", {}),
        (
            ' {"schedule": "x@2:0.4,y@9:0.1", "pretrained": "a=b, c"} ',
            {"schedule": "x@2:0.4,y@9:0.1", "pretrained": "a=b, c"},
        ),
        ('{"seed": 3, "use_cache": true, "revision": null, "x": 1e3}', {"seed": "3", "use_cache": "true", "x": "1e3"}),
        (
            '{"schedule": ["x@2:0.4", {"method": "y", "layer": 9, "keep": 0.1, "order": "b"}]}',
            {"schedule": "x@2:0.4,y@9:0.1;order=b"},
        ),
        ('{"system_prompt": "It\'s \\"so\\",\\na = 1"}', {"system_prompt": 'It\'s "so",\na = 1'}),
    ],
)
def test_a_json_text_is_split_like_pairs(text: str, values: dict[str, str]) -> None:
    assert split(text) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schedule": "dart@2:0.44" "seed": 1}',
            "model_args: this is no JSON: Expecting ',' delimiter.\n"
            '    {"schedule": "dart@2:0.44" "seed": 1}\n'
            "                               ^",
        ),
        (
            '{\n  "seed": 1,\n  "dtype": float32\n}',
            'model_args: this is no JSON: Expecting value.\n      "dtype": float32\n               ^',
        ),
        ("{schedule: x}", "property name enclosed in double quotes.\n    {schedule: x}\n     ^"),
        ('{"seed": 1}, batch_size=4', 'this is no JSON: Extra data.\n    {"seed": 1}, batch_size=4\n               ^'),
        ('{"seed": 1, "seed": 2}', "'seed' is given twice."),
        ('{"pretrained": ["a"]}', "pretrained is a list; only a schedule may be a list."),
        ('{"pretrained": {"a": 1}}', "pretrained is an object; only a schedule may be a list."),
        ('{"a": ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_json_text_is_refused_with_the_place(text: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        split(text)
    assert message in str(caught.value)


def test_both_spellings_have_one_identity() -> None:
    pairs = "pretrained=./folder,schedule=dart@2:0.44,random@20:0.07,use_cache=true,seed=3"
    text = '{"pretrained": "./folder", "schedule": "dart@2:0.44,random@20:0.07", "use_cache": true, "seed": 3}'
    read = [ModelArguments.read(spelling, None, LLAVA) for spelling in (pairs, text)]
    assert read[0] == read[1]
    assert read[0].settings() == read[1].settings()
    assert comma_text(split(text)) == pairs


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pretrained": "a,b", "seed": "1"}, 'pretrained="a,b",seed=1'),
        ({"pretrained": 'a,"b'}, "pretrained='a,\"b'"),
        ({"system_prompt": "a, 'b', \"c\", d = 1"}, '{"system_prompt": "a, \'b\', \\"c\\", d = 1"}'),
    ],
)
def test_pairs_are_quoted_where_they_need_it_and_json_where_nothing_else_does(
    values: dict[str, str], text: str
) -> None:
    assert comma_text(values) == text
    assert split(text) == values


def test_a_text_is_extended_in_its_own_spelling() -> None:
    assert extended("seed=1, ", {"schedule": "a@1:1,b@2:1"}) == "seed=1,schedule=a@1:1,b@2:1"
    assert extended("", {"seed": 1}) == "seed=1"
    assert split(extended('{"pretrained": "a,b"}', {"journal": "x"})) == {"pretrained": "a,b", "journal": "x"}
    with pytest.raises(ArgumentError, match="'seed' is given twice"):
        extended('{"seed": 1}', {"seed": 2})


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
