"""Random schedule texts: valid ones, mutated ones and any text at all; and what must hold of each.

The generators draw from a `random.Random`, so that hypothesis can drive and shrink them (`st.randoms`), and so that
`million.py` can make a million of them in minutes.
"""

from __future__ import annotations

from random import Random

from lmms_prune import Schedule, ScheduleError
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.spec import Option, unread_spec
from lmms_prune.schedule.presets import PRESETS

LAYERS = 48
SPACES = ("", "", "", "", " ", "  ", "\t", "\n", "\u00a0")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789./_-+@:=?% éß漢😀"
NUMBERS = [
    "0",
    "1",
    "-0",
    "-1",
    "00",
    "1.",
    ".5",
    "0.5",
    "1e-1",
    "1e-28",
    "1e-29",
    "1e28",
    "1e999999",
    "1e-999999",
    "1e9999999999",
    "nan",
    "inf",
    "-inf",
    "sNaN",
    "٣",
    "²",
    "1_0",
    "0x1",
    "0,5",
    "?",
    "t",
    "1t",
    "-1t",
    "1.5t",
    "1e3t",
    "٣t",
    "99999999999999999999999999999t",
    "9" * 5000,
    "9" * 5000 + "t",
    "0." + "3" * 5000,
]
ODD = [
    *",;:@=?. \t\n\r\x00\x1b\u2028\u200b\u0301\ud800\uffff\U0010ffff",
    "'",
    '"',
    "[",
    "]",
    "{",
    "}",
    "\\",
    "none",
    "auto",
]


OWN_METHODS = [
    "my_idea.py",
    "my_idea.py:MyIdea",
    "../a b/é漢-1.2.py:M_2",
    "/ü/~x.py",
    "package.module:Class",
    "m:C",
    "__main__:C",
]
"""Methods of one's own, none of which exists: a text is read without looking."""
OWN_SPECS = list(map(unread_spec, OWN_METHODS))


def valid(draw: Random) -> str:
    """Any text that the grammar allows: all methods, options, units, spellings, presets and spaces."""
    if draw.random() < 0.05:
        return draw.choice(["none", "None", " NONE ", *PRESETS])
    in_tokens = draw.random() < 0.5
    layers = sorted(draw.sample(range(LAYERS), draw.choice([1, 1, 2, 2, 3, 5])))
    amounts = sorted((draw.randrange(1001) for _ in layers), reverse=True)
    stages, dropped = [], False
    for layer, amount in zip(layers, amounts, strict=True):
        spec = draw.choice([spec for spec in METHODS.values() if _stands(spec, layer)])
        if draw.random() < 0.1:
            spec = draw.choice(OWN_SPECS)
        dropped |= spec.drops_all
        text = _stage(draw, spec, layer, 0 if dropped else amount, in_tokens)
        stages.append(draw.choice(SPACES) + text + draw.choice(SPACES))
    return ",".join(stages)


def _stage(draw: Random, spec: MethodSpec, layer: int, amount: int, in_tokens: bool) -> str:
    keep = f":{amount}t" if in_tokens else ":" + _ratio(draw, amount)
    if draw.random() < 0.05:
        keep = ":?"
    if spec.drops_all:
        keep = draw.choice(["", ":0", ":0t", ":-0.0", ":0e5"])
    if spec.keep == "optional" and draw.random() < 0.5:
        keep = ""
    options = {option.name: value for option in spec.options if (value := _value(draw, option)) is not None}
    read = {name: spec.option(name, text.strip()) for name, text in options.items()}
    if spec.refuses(layer, read):
        options = {"of": "worth"} if spec.kind == "oracle" else {}
    if spec.own and draw.random() < 0.5:
        options = {"power": _ratio(draw, amount), "some_text": draw.choice(["a b", "x=y", "ß@:", "true"])}
    names = draw.sample(list(options), len(options))
    return f"{spec.name}@{layer}{keep}" + "".join(f";{name}={options[name]}" for name in names)


def _stands(spec: MethodSpec, layer: int) -> bool:
    return spec.lowest_layer <= layer <= (LAYERS if spec.highest_layer is None else spec.highest_layer)


def _ratio(draw: Random, thousandths: int) -> str:
    forms = [f"{thousandths / 1000}", f"{thousandths}e-3", f"{thousandths / 1000:.6f}", f"+{thousandths / 1000:.3f}"]
    return draw.choice(forms)


def _value(draw: Random, option: Option) -> str | None:
    """A value that the option takes, in some spelling; None to leave it out."""
    if draw.random() < 0.4:
        return None
    if option.choices:
        return draw.choice([str.lower, str.upper])(draw.choice(option.choices))
    if isinstance(option.default, bool):
        return draw.choice(["true", "False", "TRUE"])
    if isinstance(option.default, str):
        text = "".join(draw.choice(LETTERS) for _ in range(draw.randrange(1, 9)))
        return text if text.strip() else "x"
    low, high = (0 if option.low is None else option.low), (1000 if option.high is None else option.high)
    if isinstance(option.default, int):
        return str(draw.randint(int(low), int(high)))
    return draw.choice(["{}", "{:.3f}", " {:e}"]).format(draw.uniform(low, high))


def mutated(draw: Random) -> str:
    """A valid text after one to four edits; it may still be valid."""
    text = valid(draw)
    for _ in range(draw.randint(1, 4)):
        start = draw.randrange(len(text) + 1)
        end = min(len(text), start + draw.choice([0, 0, 1, 1, 2, 5, 20]))
        piece = draw.choice([draw.choice(ODD), draw.choice(NUMBERS), draw.choice(LETTERS), text[start:end] * 2, ""])
        text = text[:start] + piece + text[end:]
        if draw.random() < 0.05:
            text = text + draw.choice(",;") + valid(draw)
    return text


def anything(draw: Random) -> str:
    """Letters of the grammar, of any script, and none; up to sixty of them."""
    some = [
        "my.py",
        "m:C",
        ".py:",
        "dart",
        "random",
        "vtw",
        "sgl",
        "@",
        "@2",
        ":0.5",
        ":5t",
        ";order=",
        ",",
        *ODD,
        *NUMBERS[:-3],
    ]
    return "".join(
        draw.choice(some) if draw.random() < 0.7 else chr(draw.randrange(0x110000)) for _ in range(draw.randrange(20))
    )


def read_or_refused(text: str) -> bool:
    """Whether the text was read; fails unless it reads back as itself or is refused with a pointer inside it."""
    try:
        schedule = Schedule.parse(text)
    except ScheduleError as error:
        _points(error, text)
        return False
    printed = str(schedule)
    again = Schedule.parse(printed)
    assert again == schedule, (text, printed)
    assert str(again) == printed, (text, printed)
    return True


def _points(error: ScheduleError, text: str) -> None:
    said = str(error).splitlines()
    assert said[0].startswith("schedule: "), text
    if error.span is None:
        assert not text.strip(), text
        return
    (start, end), shown = error.span, error.text
    # Only where something is missing at the end may the pointer stand behind the last letter.
    assert 0 <= start <= end <= len(shown), (text, error.span)
    assert start < len(shown) or start == end, (text, error.span)
    assert len(said) == 3, text
    assert said[1] == "    " + "".join(letter if letter.isprintable() else "\ufffd" for letter in shown), text
    assert said[2] == " " * (4 + start) + "^" * max(1, end - start), text
