"""What a notebook prints and draws of a schedule and of a trace."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable
from html.parser import HTMLParser
from io import BytesIO
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Family, noise

from lmms_prune import Schedule, Trace, prune
from lmms_prune.information.show import ShownComparison
from lmms_prune.pruning.trace import RowTrace


class Page(HTMLParser):
    """The tags and the text of a page; every tag that is opened must be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.open += [tag] if tag not in ("br", "img") else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize(
    "text",
    ["none", "dart@2:0.44,random@20:0.07", "dart@3:252t;order=reference", "dart@2:?", "my file.py:Mine@2:0.3;alpha=2"],
)
def test_a_printed_schedule_can_be_pasted(text: str) -> None:
    schedule = Schedule.parse(text)
    assert eval(repr(schedule), {"Schedule": Schedule}) == schedule
    assert repr(schedule) == f"Schedule({text!r})"


def test_a_schedule_is_made_of_its_text() -> None:
    assert Schedule("sparsevlm-64") == Schedule.parse("sparsevlm-64")
    with pytest.raises(ValueError, match=r"unknown method 'fastvv' in stage 1\. Did you mean 'fastv'"):
        Schedule("fastvv@2:0.25")


def test_the_table_of_a_schedule() -> None:
    page = Page(Schedule("dart@2:0.44;order=reference,fastv@5:0.1,mustdrop@7,vtw@20")._repr_html_())
    assert page.tags.count("tr") == 5
    for cell in ("0.44 of the tokens", "order=reference", "as many as the method decides", "nothing", "20"):
        assert cell in page.text
    assert "252 tokens" in Page(Schedule("dart@2:252t")._repr_html_()).text
    assert "solved from a budget" in Page(Schedule("dart@2:?;per=tile")._repr_html_()).text
    assert "prunes nothing" in Page(Schedule()._repr_html_()).text


def test_what_a_path_or_a_sample_is_called_is_no_markup() -> None:
    schedule = Schedule("<b>x.py:Mine@2:0.3")
    rows = [RowTrace("<script>", 3, [4]), RowTrace("&amp;", 3, [4])]
    for shown in (schedule._repr_html_(), Trace(schedule, rows)._repr_html_()):
        page = Page(shown)
        assert not {"b", "script"} & set(page.tags)
        assert "<b>x.py" in page.text
    assert "&amp;: 4 visual" in page.text


def test_a_trace_that_is_not_complete_is_shown_as_far_as_it_goes() -> None:
    schedule = Schedule("dart@1:0.5,fastv@2:0.25")
    mask = torch.tensor([True, False, True, False])
    rows = [
        RowTrace("empty", 3, []),
        RowTrace("entered", 3, [4], visual=[4]),
        RowTrace("one stage", 3, [4], kept=[[2]], visual=[4, 2], masks=[[mask]], grids=[[(2, 2)]]),
        RowTrace("no mask", 3, [4], kept=[[2]], grids=[[(2, 2)]]),
        RowTrace("another grid", 3, [4], kept=[[2]], masks=[[mask]], grids=[[(3, 2)]]),
        RowTrace("no grid", 3, [4], kept=[[2]], masks=[[mask]], grids=[[]]),
    ]
    for count in range(len(rows) + 1):
        trace = Trace(schedule, rows[:count])
        assert Page(trace._repr_html_()).tags.count("svg") == (1 if count > 2 else 0)
        assert "\n" not in repr(trace)
    assert repr(Trace(schedule)) == "Trace('dart@1:0.5,fastv@2:0.25': no prompt has run yet)"
    assert repr(rows[2]) == "RowTrace('one stage': 4 visual and 3 text tokens; kept 2; 3 visual tokens per layer)"
    assert "… and 2 more rows" in Page(trace._repr_html_()).text


def test_a_comparison_is_drawn_on_its_images() -> None:
    """Every stage's drawing is white where tokens were dropped, and the words around it are no markup."""
    kept = np.array([[True, False], [False, True]])
    image = Image.new("RGB", (56, 56), (200, 0, 0))
    trace = RowTrace("shown", 3, [4], kept=[[2]], visual=[4, 2])
    schedule = Schedule("dart@1:0.5")
    shown = ShownComparison("<i>?", schedule, [image, image], [[kept, ~kept]], "<b>", "a & b", trace)
    page = shown._repr_html_()
    assert not {"i", "script"} & set(Page(page).tags)
    assert Page(page).tags.count("b") == 2
    for text in ("<i>?", "unpruned: a & b", "pruned: <b>", "dart@1:0.5", "2 of 4"):
        assert text in Page(page).text
    pictures = [Image.open(BytesIO(b64decode(data))) for data in re.findall(r"base64,([^\"]+)", page)]
    corners = [[picture.getpixel(place)[1] > 128 for place in ((5, 5), (50, 5))] for picture in pictures]
    assert corners == [[False, False], [False, True], [False, False], [True, False]]
    assert repr(shown).startswith("ShownComparison('dart@1:0.5': unpruned 'a & b', pruned '<b>'; 4 visual")


def squares(svg: str) -> set[tuple[int, int]]:
    """The row and column of each token that a drawing shows as kept."""
    path = svg.rpartition(' d="')[2].partition('"')[0]
    runs = [tuple(map(int, run)) for run in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path)]
    return {(row, column + step) for column, row, length in runs for step in range(length)}


@pytest.mark.parametrize("name", ["llava", "next", "qwen"])
def test_the_kept_tokens_are_drawn_in_their_grids(name: str, loaded: Callable[..., Family]) -> None:
    """Two images in one prompt; of images in tiles, base and canvas beside each other."""
    family = loaded(name, torch.float32)
    draw = Random(3)
    sizes = [(draw.randrange(60, 200), draw.randrange(60, 200)) for _ in range(2)]
    inputs = family.inputs(["What?"], [[noise(number, *size) for number, size in enumerate(sizes)]])
    with prune(family.model, "dart@1:0.5,random@2:0.2") as trace, torch.no_grad():
        family.model(**inputs)
    (row,) = trace.rows
    drawings = re.findall(r"<svg.*?</svg>", trace._repr_html_())
    assert len(drawings) == 2 * sum(map(len, row.grids))
    for image, grids in enumerate(row.grids):
        for stage in range(2):
            start = 0
            for rows, columns in grids:
                mask = row.masks[stage][image][start : start + rows * columns].view(rows, columns)
                expected = {tuple(place) for place in mask.nonzero().tolist()}
                assert expected in [squares(drawing) for drawing in drawings]
                start += rows * columns
    kept = ", ".join(str(sum(images)) for images in row.kept)
    assert f"kept {kept};" in repr(trace)
