"""LLaVA-NeXT through lmms-eval: the padding of tiles as an argument that is recorded, and drawings of images in tiles."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from lmms_prune.errors import ScheduleError
from lmms_prune.harness.arguments import ArgumentError
from lmms_prune.information.show import compare, draw_comparison
from lmms_prune.leaderboard.flips import Flip, _check_boxes
from lmms_prune.leaderboard.page.changes import Change, _card
from lmms_prune.leaderboard.page.pictures import Wanted
from lmms_prune.record.accounting import TokenAccounting
from lmms_prune.schedule import Schedule

TASK = "docvqa_val"


def test_the_padding_is_part_of_a_runs_identity_and_no_run_changes_another(harness) -> None:
    """Runs of one process share weights: the model of unpad=false is another."""
    cut, kept, again = (
        harness.pruned("llava_next", [TASK], schedule="random@2:0.5", **given)
        for given in ({}, {"unpad": "false"}, {"unpad": True})
    )
    assert [run.recorded["settings"]["unpad"] for run in (cut, kept, again)] == ["True", "False", "True"]
    assert again.accounting == cut.accounting
    for with_newlines, padded in zip(cut.accounting[TASK], kept.accounting[TASK], strict=True):
        assert padded["visual_tokens"] in (48, 64, 80)
        base, canvas = padded["visual_grids"]
        assert base == [4, 4]
        assert padded["visual_tokens"] == 16 + canvas[0] * canvas[1]
        # The image's part of the canvas is what unpadding leaves of it; its rows end with newline tokens.
        _, (image, _, _, *shown) = padded["grid_boxes"]
        assert [image, shown] == [0, with_newlines["visual_grids"][1]]
        assert with_newlines["visual_tokens"] == 16 + shown[0] * (shown[1] + 1)
        assert padded["encoder_flops"] == with_newlines["encoder_flops"]


@pytest.mark.parametrize(
    ("family", "argument"), [("llava", "unpad"), ("qwen2_vl", "unpad"), ("llava_next", "image_aspect")]
)
def test_arguments_of_another_family_are_refused(family: str, argument: str, harness) -> None:
    with pytest.raises(ArgumentError, match=f"unknown argument '{argument}'. It is for another model family"):
        harness.create(family, **{argument: "true"})


def test_what_unpad_may_be(harness) -> None:
    with pytest.raises(ArgumentError, match="unpad=no must be true or false"):
        harness.create("llava_next", unpad="no")
    assert "unpad" not in harness.create("llava").report.settings


def test_a_stage_that_is_not_defined_on_tiles_is_refused_before_the_weights(harness, monkeypatch) -> None:
    monkeypatch.setattr("lmms_prune.harness.pruned.load_model", None)
    with pytest.raises(ScheduleError, match="'mustdrop@0' is not defined for LLaVA-NeXT"):
        harness.create("llava_next", schedule="mustdrop@0,mustdrop@3")


def picture() -> Image.Image:
    """A wide image whose left half is red, the right one blue."""
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, :100, 0] = pixels[:, 100:, 2] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("unpad", ["true", "false"])
def test_show_draws_base_and_canvas(unpad: str, harness, tmp_path) -> None:
    wrapper = harness.create("llava_next", unpad=unpad)
    shown = compare(wrapper, [picture(), picture()], "What is it?", Schedule.parse("stride@2:0.5,pool@4:0.2"), 2)
    assert len(shown.images) == 4
    grids = [mask.shape for mask in shown.kept[0]]
    for image, (rows, columns) in zip(shown.images, grids, strict=True):
        assert (image.height, image.width) == (28 * rows, 28 * columns)
        middle = np.asarray(image)[image.height // 2]
        assert middle[image.width // 4].argmax() == 0
        assert middle[3 * image.width // 4].argmax() == 2
    assert [sum(int(mask.sum()) for mask in stage) for stage in shown.kept] == [sum(kept) for kept in shown.trace.kept]
    draw_comparison(shown, tmp_path / "shown.png")
    assert (tmp_path / "shown.png").stat().st_size > 1000


def test_an_image_whose_canvas_is_cut_off_is_drawn_and_recorded_by_its_base(harness, tmp_path) -> None:
    wrapper = harness.create("llava_next")
    thin = Image.new("RGB", (400, 1), "red")
    shown = compare(wrapper, [thin, picture()], "What is it?", Schedule.parse("pool@0:0.5"), 2)
    assert len(shown.images) == 3
    assert next(mask.shape for mask in shown.kept[0]) == (4, 4)
    draw_comparison(shown, tmp_path / "shown.png")
    assert (tmp_path / "shown.png").stat().st_size > 1000


def accounting(**changed: object) -> TokenAccounting:
    counts = dict.fromkeys(TokenAccounting.__dataclass_fields__, 0)
    lists = {name: () for name in counts if name.endswith(("_tokens", "grids", "bitmaps", "boxes", "kv_bytes"))}
    numbers = {"visual_tokens": 0, "avg_visual_tokens": 0.0, "input_tokens": 0, "output_tokens": 0, "text_tokens": 0}
    return TokenAccounting(**{**counts, **lists, **numbers, "kv_bytes": 0, **changed})  # type: ignore[arg-type]


def test_boxes_are_read_back_and_must_lie_in_their_grids() -> None:
    grids = ((4, 4), (8, 8))
    written = accounting(visual_grids=grids, grid_boxes=((0, 0, 0, 4, 4), (0, 1, 0, 6, 8)))
    assert TokenAccounting.read(written.to_dict()) == written
    _check_boxes(written)
    for box in ((0, 3, 0, 6, 8), (0, 0, 0, 4, 9), (-1, 0, 0, 4, 4), (0, 0, 0, 4)):
        with pytest.raises(ValueError, match=r"is no part of a grid of 8 x 8"):
            _check_boxes(accounting(visual_grids=grids, grid_boxes=((0, 0, 0, 4, 4), box)))


def test_the_pages_cards_say_which_part_of_a_grid_shows_the_image() -> None:
    wanted = Wanted("llava_next_pruned", "whole", TASK)
    boxes = ((0, 0, 0, 4, 4), (0, 1, 0, 6, 8))
    flips = [Flip(1, True, "?", "a", "a", "b", (3,), 80, ((4, 4),), (("AAA=",),), given) for given in (boxes, ())]
    cards = [_card(Change(0, 0, TASK, flip, 0, 1, wanted, "")) for flip in flips]
    assert cards[0]["boxes"] == boxes
    assert "boxes" not in cards[1]
