"""LLaVA-NeXT: images in tiles. Each of its traps has a test that fails if it is stepped into."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from adapters import adapted
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Family, noise
from transformers import AutoModelForImageTextToText, LlavaNextConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from typer.testing import CliRunner

from lmms_prune import Schedule, prune
from lmms_prune.certificate.case import Case, Subject
from lmms_prune.certificate.runner import examine
from lmms_prune.cli import app
from lmms_prune.compat.tiles import keep_padding, unpads
from lmms_prune.configs.budget import kept_average
from lmms_prune.efficiency.estimate import estimate, prompt_sizes
from lmms_prune.errors import BrokenImageError, PruningError, ScheduleError, UnsupportedModelError
from lmms_prune.methods import METHODS
from lmms_prune.models.architectures import architecture
from lmms_prune.models.llava_next import LLAVA_NEXT
from lmms_prune.models.mosaic import Mosaic
from lmms_prune.models.parts import ModelParts
from lmms_prune.schedule.presets import PRESETS

SIDE, PIXELS = 4, 56
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
QUESTION = "What is it?"


@pytest.fixture
def small(loaded: Callable[..., Family]) -> Family:
    return loaded("next", torch.float32)


@pytest.fixture
def padded(small: Family) -> Family:
    """The same checkpoint with unpad=false."""
    model, processor = copy.deepcopy(small.model), copy.deepcopy(small.processor)
    keep_padding(model, processor)
    return Family(small.name, small.folder, model, processor)


def config(unpad: bool = True) -> Any:
    vision = SimpleNamespace(image_size=PIXELS, patch_size=14)
    made = SimpleNamespace(
        vision_config=vision, image_grid_pinpoints=PINPOINTS, vision_feature_select_strategy="default"
    )
    if not unpad:
        made.unpads_tiles = False
    return made


def mosaic_of(size: tuple[int, int], unpad: bool = True) -> Mosaic:
    (mosaic,) = LLAVA_NEXT.mosaics(config(unpad), {"image_sizes": torch.tensor([size])})
    return mosaic


def packed(mosaic: Mosaic, values: torch.Tensor, newline: torch.Tensor) -> torch.Tensor:
    """What the library makes of values of the patches of each tile (tiles, patches, D): one for each token."""
    holder = SimpleNamespace(config=config())
    (tokens,), _ = LlavaNextModel.pack_image_features(holder, [values], torch.tensor([mosaic.size]), "default", newline)
    return tokens


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 1500))
def test_each_patch_has_the_token_that_the_library_gives_it(height: int, width: int) -> None:
    """Newline tokens and the padding that is cut off move every later patch: none may be mistaken for another."""
    mosaic = mosaic_of((height, width))
    tiles = torch.arange(mosaic.encoded)[:, None, None].expand(-1, SIDE**2, 1)
    cells = torch.arange(SIDE**2)[None, :, None].expand(mosaic.encoded, -1, 1)
    tokens = packed(mosaic, torch.cat([tiles, cells], dim=2).float(), torch.tensor([-1.0, -1.0]))
    assert len(tokens) == mosaic.tokens == mosaic.patches + mosaic.newline_count
    assert tokens[list(mosaic.columns_of_patches)].int().tolist() == [list(source) for source in mosaic.sources]
    assert (tokens[list(mosaic.columns_of_newlines)] == -1).all()
    assert mosaic.newline_count == int((tokens[:, 0] == -1).sum())


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 1500), st.integers(1, 1500), st.booleans())
def test_regions_are_rectangles_of_their_tile(height: int, width: int, unpad: bool) -> None:
    mosaic = mosaic_of((height, width), unpad)
    for kind in ("rectangle", "tile"):
        regions = mosaic.regions(kind)
        assert sorted(number for region in regions for number in region.raster) == list(range(mosaic.patches))
        assert all(region.grid and region.grid[0] * region.grid[1] == len(region.raster) for region in regions)
        assert all(region.raster for region in regions), "no method can score an image without tokens"
    for region in mosaic.regions("tile"):
        assert len({mosaic.sources[number][0] for number in region.raster}) == 1
    boxes = mosaic.boxes
    assert all(rows and columns for rows, columns in mosaic.rectangles)
    assert sum(rows * columns for rows, columns in mosaic.rectangles) == mosaic.patches
    assert all(
        box[0] + box[2] <= grid[0] and box[1] + box[3] <= grid[1]
        for box, grid in zip(boxes, mosaic.rectangles, strict=True)
    )
    if not unpad:
        assert (mosaic.newline_count, mosaic.patches) == (0, SIDE**2 * mosaic.encoded)
        other = mosaic_of((height, width))
        assert boxes[1][2:] == (len(other.rows), len(other.columns))


def test_the_largest_image_has_2880_patches() -> None:
    real = SimpleNamespace(
        vision_config=SimpleNamespace(image_size=336, patch_size=14),
        image_grid_pinpoints=[[6 * side for side in pair] for pair in PINPOINTS],
        vision_feature_select_strategy="default",
        unpads_tiles=False,
    )
    (mosaic,) = LLAVA_NEXT.mosaics(real, {"image_sizes": torch.tensor([[480, 640]])})
    assert (mosaic.tokens, mosaic.tile_sizes) == (2880, [576] * 5)
    del real.unpads_tiles
    (mosaic,) = LLAVA_NEXT.mosaics(real, {"image_sizes": torch.tensor([[480, 640]])})
    assert (mosaic.patches, mosaic.newline_count) == (576 + 36 * 48, 36)


# -- newline tokens ---------------------------------------------------------------------------------------------------


def run(family: Family, schedule: str, images: list, **options: Any) -> Any:
    inputs = family.inputs([QUESTION] * len(images), images)
    asked = [QUESTION] * len(images)
    with torch.no_grad(), prune(family.model, schedule, questions=asked, **options) as trace:
        trace.output = family.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    return trace


def test_a_ratio_is_one_of_patches_and_newlines_come_on_top(small: Family) -> None:
    (row,) = run(small, "random@2:0.5,vtw@5", [[noise(1, 196, 140)]]).rows
    assert (row.images, row.newlines) == ([64], [6])
    assert row.kept == [[32], [0]]
    assert row.kept_tokens == [38, 0]
    assert row.visual == [70, 70, 38, 38, 38, 0, 0, 0]
    prompt = len(small.inputs([QUESTION], [[noise(1, 196, 140)]])["input_ids"][0])
    assert row.text_tokens == prompt - 70
    assert row.computed == [row.text_tokens + visual for visual in row.visual]


def test_newline_tokens_are_dropped_with_the_last_of_their_own_image_only(small: Family) -> None:
    images = [[noise(1, 196, 140), noise(2, 56, 56)]]
    (row,) = run(small, "random@2:1t", images).rows
    assert sorted(row.kept[0]) == [0, 1]
    kept = next(number for number, count in enumerate(row.kept[0]) if count)
    assert row.kept_tokens == [1 + row.newlines[kept]]


def test_methods_see_no_newline_token(small: Family) -> None:
    """FastV's attention to a newline token would be one of its scores; here it scores patches alone."""
    (row,) = run(small, "fastv@2:0.5", [[noise(1, 196, 140)]]).rows
    assert len(row.masks[0][0]) == row.images[0] == 64


# -- signals of the encoder -------------------------------------------------------------------------------------------


def signals_of(family: Family, schedule: str, monkeypatch: pytest.MonkeyPatch, images: list) -> Any:
    """The view that FasterVLM got."""
    from lmms_prune.methods.fastervlm import FasterVLM

    views, original = [], FasterVLM.score
    monkeypatch.setattr(FasterVLM, "score", lambda self, view: views.append(view) or original(self, view))
    trace = run(family, schedule, images)
    return views[0], trace


@pytest.mark.parametrize("per", ["", ";per=tile"])
def test_a_tokens_signal_is_that_of_its_patch_in_its_tile(
    small: Family, monkeypatch: pytest.MonkeyPatch, per: str
) -> None:
    """Against the library's own packing: the signals of the tiles go through it as if they were features."""
    images = [[noise(1, 196, 140)], [noise(2, 56, 200)]]
    view, _ = signals_of(small, f"fastervlm@1:0.5{per}", monkeypatch, images)
    block = view.encoder.shape.selected
    ours = view.encoder.class_attention(block).mean(1)
    inputs = small.inputs([QUESTION] * 2, images)
    layer = small.model.model.vision_tower
    layer = getattr(layer, "vision_model", layer).encoder.layers[block]
    expected = []
    for pixels, size in zip(inputs["pixel_values"], inputs["image_sizes"], strict=True):
        mosaic = mosaic_of(tuple(size.tolist()))
        with torch.no_grad():
            states = small.model.model.vision_tower(pixels[: mosaic.encoded], output_hidden_states=True)
            normed = layer.layer_norm1(states.hidden_states[block])
            query, key = (
                projection(normed).unflatten(-1, (layer.self_attn.num_heads, -1)).transpose(1, 2)
                for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
            )
            weights = (query[:, :, :1] @ key.transpose(2, 3) * layer.self_attn.scale).softmax(-1)[:, :, 0, 1:].mean(1)
        tokens = packed(mosaic, weights[..., None], torch.tensor([-1.0])).flatten()
        patches = tokens[tokens != -1]
        regions = mosaic.regions("tile" if per else "image")
        expected += [patches[list(region.raster)] for region in regions]
    assert len(ours) == len(expected)
    for row, patches in zip(ours, expected, strict=True):
        torch.testing.assert_close(row[: len(patches)], patches)
        assert not row[len(patches) :].any()


def test_per_tile_is_the_best_of_each_tile_and_per_image_the_best_of_all(
    small: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = [[noise(1, 196, 140)]]
    view, by_image = signals_of(small, "fastervlm@1:0.25", monkeypatch, images)
    scores = view.encoder.saliency()[0]
    mosaic = mosaic_of((140, 196))
    assert by_image.rows[0].indices(0)[0] == sorted(scores.topk(16).indices.tolist())
    _, by_tile = signals_of(small, "fastervlm@1:0.25;per=tile", monkeypatch, images)
    best = []
    for region in mosaic.regions("tile"):
        raster = torch.tensor(region.raster)
        best += raster[scores[raster].topk(round(len(raster) / 4)).indices].tolist()
    assert by_tile.rows[0].indices(0)[0] == sorted(best) != by_image.rows[0].indices(0)[0]


# -- budgets ----------------------------------------------------------------------------------------------------------


def counts_by_tile(row: Any, mosaic: Mosaic, stage: int = 0) -> list[int]:
    kept = set(row.indices(stage)[0])
    return [len(kept & set(region.raster)) for region in mosaic.regions("tile")]


def test_the_budget_of_a_tile(small: Family) -> None:
    mosaic = mosaic_of((140, 196))
    assert mosaic.tile_sizes == [16, 12, 12, 12, 12]
    for keep, later, expected in (("0.5", "0.1", [8, 6, 6, 6, 6]), ("20t", "6t", [5, 4, 4, 4, 3])):
        (row,) = run(small, f"random@1:{keep};per=tile,random@3:{later}", [[noise(1, 196, 140)]]).rows
        assert counts_by_tile(row, mosaic) == expected
        assert row.kept == [[sum(expected)], [6]]
    (row,) = run(small, "random@1:0.5", [[noise(1, 196, 140)]]).rows
    assert sum(counts_by_tile(row, mosaic)) == 32
    assert counts_by_tile(row, mosaic) != [8, 6, 6, 6, 6], "then the test of per=tile proves nothing"


def test_a_method_of_grids_gets_base_and_canvas_by_themselves(small: Family) -> None:
    """The image's budget is distributed in proportion to what is present, also after a stage that left that open."""
    mosaic = mosaic_of((140, 196))
    base = set(mosaic.regions("rectangle")[0].raster)
    (row,) = run(small, "hiprune@1:0.5,random@3:0.25,hivtp@5:0.2", [[noise(1, 196, 140)]]).rows
    assert row.kept == [[32], [16], [13]]
    assert len(base & set(row.indices(0)[0])) == 8
    present, kept = (len(base & set(row.indices(stage)[0])) for stage in (1, 2))
    assert kept in (13 * present // 16, 13 * present // 16 + 1)


def test_holovs_crops_and_pools_cells_lie_in_one_grid(small: Family) -> None:
    mosaic = mosaic_of((140, 196))
    base = set(mosaic.regions("rectangle")[0].raster)
    for schedule in ("holov@1:0.25;crops=4", "pool@1:0.25"):
        (row,) = run(small, schedule, [[noise(1, 196, 140)]]).rows
        assert len(base & set(row.indices(0)[0])) == 4, schedule
    (row,) = run(small, "pool@1:0.25", [[noise(1, 196, 140)]]).rows
    # The 2 x 2 cells of the base and the 3 x 4 of the canvas, by the middle token of each.
    assert row.indices(0)[0][:4] == [5, 7, 13, 15]


@pytest.mark.parametrize("size", [(300, 1), (1, 300)], ids=["high", "wide"])
def test_an_image_so_narrow_that_its_canvas_is_cut_off_whole(small: Family, size: tuple[int, int]) -> None:
    """Its only grid is the base, in a batch with an image that has both; a canvas without columns keeps its newline tokens."""
    mosaic = mosaic_of(size)
    assert mosaic.patches == SIDE**2
    assert len(mosaic.regions("rectangle")) == 1
    images = [[noise(1, size[1], size[0]), noise(2, 196, 140)], [noise(3, size[1], size[0])]]
    for spec in METHODS.values():
        if not spec.ready or not spec.needs_grid or spec.highest_layer == 0:
            continue
        several, alone = run(small, f"{spec.name}@1:0.5", images).rows
        assert several.images == [16, 64], spec.name
        assert alone.images == [16], spec.name
        assert several.kept[0][0] == alone.kept[0][0] < 16, spec.name


SCHEDULES = (
    "vispruner@0:0.5;per=tile,dart@2:0.3,pool@5:0.15",
    "visionzip@0:0.6;per=tile,fastv@3:0.3;per=tile",
    "tome@2:0.6;per=tile,random@4:0.3;per=tile",
    "scope@0:24t;per=tile,vtw@4",
    "prumerge@0;per=tile",
    "swiftvlm@2:0.6;per=tile,swiftvlm@4:0.3;per=tile",
    "nuwa@0:0.5,random@5:0.2",
    "sparsevlm@2:0.5;per=tile",
)


@pytest.mark.parametrize("unpad", [True, False])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_all_certified_properties_hold(small: Family, padded: Family, schedule: str, unpad: bool) -> None:
    """Those of the certificate's matrix are without per=tile and with the padding cut off."""
    model = (small if unpad else padded).model
    case = Case(Subject(model, "float32"), Schedule.parse(schedule), "original")
    assert [result for name in ("1", "ragged") for result in examine(case, name) if result.reason] == []


def test_several_answers_share_their_images(small: Family) -> None:
    inputs = small.inputs([QUESTION] * 2, [[noise(1, 196, 140), noise(3, 56, 112)], [noise(2, 60, 200)]])
    schedule = "vispruner@0:0.5;per=tile,sgl@2:0.4;new_tokens=2,pool@4:0.2"
    with torch.no_grad(), prune(small.model, schedule, questions=[QUESTION] * 2) as trace:
        small.model.generate(**inputs, max_new_tokens=2, num_return_sequences=2, do_sample=True)
    first, second, third, fourth = trace.rows
    assert (first.images, third.images) == (second.images, fourth.images)
    assert first.images != third.images
    assert [first.indices(stage) for stage in range(3)] == [second.indices(stage) for stage in range(3)]


def test_features_without_the_sizes_of_their_images_are_refused(small: Family) -> None:
    inputs = small.inputs([QUESTION], [[noise(1, 196, 140)]])
    pixels, sizes = inputs.pop("pixel_values"), inputs.pop("image_sizes")
    with torch.no_grad():
        encoded = small.model.model.get_image_features(pixels, sizes, return_dict=True)
        refused = pytest.raises(BrokenImageError, match=r"sizes are not known.*pixel_values and image_sizes")
        with refused, prune(small.model, "random@1:0.5"):
            small.model(**inputs, mm_encoder_outputs={"image": encoded})


def test_nothing_is_left_on_the_model(small: Family) -> None:
    for schedule in ("none", "random@1:0.5"):
        run(small, schedule, [[noise(1, 196, 140)]])
        assert not {"get_image_features", "generate"} & {*vars(small.model), *vars(small.model.model)}


# -- unpadding --------------------------------------------------------------------------------------------------------


def test_the_padding_is_kept_by_model_and_processor_alike(small: Family, padded: Family) -> None:
    assert (unpads(small.model.config), unpads(padded.model.config)) == (True, False)
    images = [[noise(1, 196, 140)], [noise(2, 56, 56), noise(3, 30, 200)]]
    with torch.no_grad():
        features = padded.model.model.get_image_features(
            **{
                name: x
                for name, x in padded.inputs([QUESTION] * 2, images).items()
                if name in ("pixel_values", "image_sizes")
            },
            return_dict=True,
        ).pooler_output
    assert [len(tokens) for tokens in features] == [80, 48, 64]
    newline = padded.model.model.image_newline
    assert not any((tokens == newline).all(1).any() for tokens in features)
    trace = run(padded, "random@1:0.5", images)
    assert [row.images for row in trace.rows] == [[80], [48, 64]]
    assert [row.newlines for row in trace.rows] == [[0], [0, 0]]
    assert [row.images for row in run(small, "random@1:0.5", images).rows] != [[80], [48, 64]]


def test_a_model_with_an_adapter_keeps_its_padding_too(small: Family) -> None:
    """PEFT's wrapper has an attribute `model` as well, and no image passes through that one's packing."""
    wrapper, processor = adapted(small.model), copy.deepcopy(small.processor)
    keep_padding(wrapper, processor)
    (row,) = run(Family(small.name, small.folder, wrapper, processor), "random@1:0.5", [[noise(1, 196, 140)]]).rows
    assert (row.images, row.kept) == ([80], [[40]])


def test_a_guide_that_cuts_the_padding_off_is_refused(padded: Family) -> None:
    with pytest.raises(UnsupportedModelError, match=r"cuts off the padding of tiles.*guide=self"):
        run(padded, f"sgl@2:0.5;guide={padded.folder}", [[noise(1, 196, 140)]])


# -- the schedule's text ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["dart@2:0.44;order=reference;per=tile", "prumerge@0;per=tile", "random@1:?;per=tile"])
def test_the_text_of_per_is_read_back(text: str) -> None:
    schedule = Schedule.parse(text)
    assert (str(schedule), schedule.stages[0].per) == (text, "tile")
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.parse([{"method": "random", "layer": 1, "keep": 0.5, "per": "tile"}]).stages[0].per == "tile"


def test_the_default_is_not_written() -> None:
    assert str(Schedule.parse("random@1:0.5;per=image")) == "random@1:0.5"
    assert Schedule.parse("random@1:0.5;per=image") == Schedule.parse("random@1:0.5")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random@1:0.5;per=row", "per=row: allowed are image and tile"),
        ("random@1:0.5;per=tile;per=tile", "names the option 'per' twice"),
        ("vtw@3;per=tile", "write 'vtw@3'"),
        ("random@1:0.5,random@3:0.2;per=tile", "per=tile in stage 2 follows stage 1, which keeps by image"),
    ],
)
def test_what_per_cannot_be(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_families_without_tiles_take_each_image_as_one(loaded: Callable[..., Family]) -> None:
    family = loaded("llava", torch.float32)
    image, tile = (
        run(family, f"dart@1:0.5{per},fastv@3:0.2{per}", [[noise(1)], [noise(2), noise(3)]])
        for per in ("", ";per=tile")
    )
    assert [row.kept for row in image.rows] == [row.kept for row in tile.rows]
    assert [row.indices(1) for row in image.rows] == [row.indices(1) for row in tile.rows]


def test_the_published_budgets_of_five_tiles() -> None:
    names = [name for name in PRESETS if "-next-" in name]
    assert len(names) == 17
    for name in names:
        schedule, budget = Schedule.parse(name), int(name.rpartition("-")[2])
        average = float(schedule.avg_visual_tokens(32, [2880]))
        assert abs(average - budget) <= 1 or name.startswith("dart"), name
        if schedule.stages[0].per == "tile":
            assert {sum(plan) for plan in schedule.plan([2880], [[576] * 5])} <= {budget, 480, 160}


@pytest.mark.parametrize(("budget", "limit"), [("640t", 640), ("0.1", 288), ("flops=30%", None)])
def test_budgets_by_tile_are_solved_on_tiles(budget: str, limit: int | None) -> None:
    """DART keeps four tokens more of each tile than a count rule of the whole image says."""
    sizes = architecture("llava-v1.6-vicuna-7b")
    prompt = prompt_sizes(sizes, 2880 if budget.endswith("t") else None)
    solved = Schedule.parse("dart@2:?;per=tile").solve(budget, prompt)
    average = solved.avg_visual_tokens(32, [2880], [[576] * 5])
    cost = estimate(sizes, solved, 2880, 64)
    assert sum(cost.visual) == 32 * average
    if limit is not None:
        assert limit - 40 < average <= limit
    else:
        assert 0.29 < cost.flops / estimate(sizes, Schedule(()), 2880, 64).flops <= 0.3


def test_a_schedule_by_tile_is_printed_and_claimed_as_it_runs() -> None:
    command = ["schedule", "dart@2:0.5;per=tile", "--model", "llava-v1.6-vicuna-7b"]
    printed = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert printed["stages"][0]["kept_tokens"] == 5 * 292
    assert printed["layer_visual_tokens"] == [2880] * 2 + [1460] * 30
    assert printed["avg_visual_tokens"] == 1548.75
    assert "1548.75 of 2880" in CliRunner().invoke(app, command).stdout
    share = kept_average(Schedule.parse(command[1]), architecture(command[-1]), "%")
    assert float(share) == pytest.approx(100 * 1548.75 / 2880)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule", ["downsample@0:0.3", "mustdrop@0", "tome@0:0.5;place=encoder", "folder@0:0.5;variant=full"]
)
def test_methods_that_encode_anew_are_refused_by_name(small: Family, schedule: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{schedule}' is not defined for LLaVA-NeXT.*in tiles"):
        run(small, schedule, [[noise(1)]])


def test_they_are_refused_before_any_weight_is_loaded(tmp_path: Path) -> None:
    """By `schedule` and `check`; the harness's wrapper is in tests/harness."""
    schedule = "downsample@0:0.3,random@2:0.1"
    refused = CliRunner().invoke(app, ["schedule", schedule, "--model", "llava-v1.6-vicuna-7b"])
    assert refused.exit_code == 2
    assert "'downsample@0:0.3' is not defined for LLaVA-NeXT" in refused.stderr
    assert "^^^^^^^^^^^^^^^^" in refused.stderr
    file = tmp_path / "run.yaml"
    arguments = "pretrained=llava-hf/llava-v1.6-vicuna-7b-hf,schedule=tome@0:0.5;place=encoder"
    file.write_text(f"model: llava_next_pruned\nmodel_args: {arguments}\ntasks: pope\n", "utf-8")
    checked = CliRunner().invoke(app, ["check", str(file)])
    assert checked.exit_code != 0
    assert "is not defined for LLaVA-NeXT" in " ".join(checked.output.split())


def test_all_other_methods_run(small: Family) -> None:
    """Each method's example, at a layer and with a keep that the small model has."""
    for spec in METHODS.values():
        stage = Schedule.parse(spec.example).stages[0]
        layer = min(max(stage.layer, spec.lowest_layer), 6)
        if not spec.ready or spec.undefined_on_tiles(layer, dict(stage.options)):
            continue
        options = "".join(f";{name}={value}" for name, value in stage.options)
        text = f"{spec.name}@{layer}{'' if spec.drops_all else ':0.4'}{options}"
        for per in ("",) if spec.drops_all else ("", ";per=tile"):
            (row,) = run(small, text + per, [[noise(1, 196, 140)]]).rows
            assert row.visual[-1] < row.visual_tokens, text + per


def test_a_method_that_does_not_say_that_it_reads_the_grid_is_told_so(
    small: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_prune.methods.random import Random

    monkeypatch.setattr(Random, "score", lambda self, view: view.grids, raising=False)
    with pytest.raises(PruningError, match=r"has several: name 'grid'.*per=tile"):
        run(small, "random@1:0.5", [[noise(1)]])


@pytest.mark.parametrize("window", [None, 16])
def test_mistral_without_a_sliding_window(window: int | None) -> None:
    text = {"model_type": "mistral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 160, "sliding_window": window}
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    made = LlavaNextConfig(
        text_config=text, vision_config=vision, image_token_id=150, image_grid_pinpoints=[[16, 32], [32, 16]]
    )
    model = AutoModelForImageTextToText.from_config(made, dtype=torch.float32).eval()
    if window:
        with pytest.raises(UnsupportedModelError, match="sliding window"):
            ModelParts.of(model)
        return
    case = Case(Subject(model, "float32"), Schedule.parse("random@1:0.5"), "original")
    assert [result for result in examine(case, "ragged") if result.reason] == []


def test_a_checkpoint_that_keeps_the_class_token_is_refused() -> None:
    made = config()
    made.vision_feature_select_strategy = "full"
    made.vision_config.model_type = "clip_vision_model"
    with pytest.raises(UnsupportedModelError, match="'full' of a LLaVA-NeXT is not supported"):
        LLAVA_NEXT.tokens_per_image(made)
