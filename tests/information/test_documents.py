"""Documents measured into a folder, and the tables and pictures made from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from lmms_prune import prune
from lmms_prune.harness.documents import Document
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.aggregate import by_layer, by_sample
from lmms_prune.information.answers import find_answer
from lmms_prune.information.canvas import SIDE, dimmed, grids_of, seen_images
from lmms_prune.information.kept import kept_information
from lmms_prune.information.measure import measure
from lmms_prune.information.options import measure_missing
from lmms_prune.information.run import measure_documents
from lmms_prune.information.show import compare
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.record.information import InformationError, Store, token_information
from lmms_prune.schedule import Schedule

LAYERS = [0, 5, 11]
NAMES = ["llava_pruned", "qwen2_5_vl_pruned"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_run_resumes_with_the_same_result(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    wrapper, documents = wrappers["llava_pruned"], [document(number) for number in range(4)]
    uninterrupted = Store.open(tmp_path / "whole", {"block": 3})
    measure_documents(wrapper, documents, uninterrupted, LAYERS, 3)
    seen: list[int] = []

    def stop(measured: Document) -> None:
        seen.append(measured.number)
        if len(seen) == 2:
            raise KeyboardInterrupt

    again = Store.open(tmp_path / "again", {"block": 3})
    with pytest.raises(KeyboardInterrupt):
        measure_documents(wrapper, documents, again, LAYERS, 3, stop)
    assert len(again.samples()) == 2
    stamps = {sample: again.path(sample).stat().st_mtime_ns for sample in again.samples()}
    measure_documents(wrapper, documents, Store.open(tmp_path / "again", {"block": 3}), LAYERS, 3)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    assert {sample: again.path(sample).stat().st_mtime_ns for sample in stamps} == stamps


@pytest.mark.parametrize("name", NAMES)
def test_tables_match_the_measurements(
    name: str, wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    """Means and variances against plain loops over the stored lines; a block counts for each of its tokens."""
    wrapper, documents = wrappers[name], [document(number) for number in range(3)]
    store = Store.open(tmp_path, {})
    measure_documents(wrapper, documents, store, LAYERS, 2)
    rows = store.read()
    assert set(rows["sample"]) == {measured.sample for measured in documents}
    columns = {"sample", "layer", "token", "row", "column", "p_k", "p_text"}
    assert columns <= set(pd.read_parquet(store.path(documents[0].sample)).columns)
    samples = by_sample(rows)
    for line in samples.itertuples():
        lines = rows[(rows["sample"] == line.sample) & (rows.layer == line.layer)]
        values = [unit.p_k - unit.p_text for unit in lines.itertuples() for _ in range(unit.tokens)]
        grids = grids_of(wrapper, dict(wrapper.inputs_of(document(int(line.sample.split("/")[-1])).messages)))
        assert len(values) == line.tokens == sum(r * c for r, c in grids)
        assert (lines.token == lines.row * grids[0][1] + lines.column).all()
        assert line.mean == pytest.approx(np.mean(values))
        assert line.variance == pytest.approx(np.var(values), abs=1e-12)
    layers = by_layer(samples)
    assert layers.layer.tolist() == LAYERS
    for line in layers.itertuples():
        means = samples[samples.layer == line.layer]["mean"]
        assert line.mean == pytest.approx(means.mean())
        ordered = np.array([means.min(), line.low, line.mean, line.high, means.max()])
        assert (np.diff(ordered) >= -1e-12).all()


def test_a_folder_holds_one_kind_of_measurement(tmp_path: Path) -> None:
    Store.open(tmp_path, {"block": 9, "layers": [0, 1]})
    # A run that measured nothing leaves a folder that any settings may use.
    store = Store.open(tmp_path, {"block": 2, "layers": [0, 1]})
    with pytest.raises(InformationError, match="holds no measured sample yet"):
        store.read()
    store.write("pope/test/0", pd.DataFrame({"p_k": [0.5], "p_text": [0.25]}))
    with pytest.raises(InformationError, match=r"holds measurements with block 2, not 1; give another --out"):
        Store.open(tmp_path, {"block": 1, "layers": [0, 1]})
    with pytest.raises(InformationError, match="lacks sample pope/test/3"):
        Store(tmp_path).read(["pope/test/3"])
    with pytest.raises(InformationError, match="holds no measured information"):
        Store(tmp_path / "elsewhere").settings()
    with pytest.raises(InformationError, match=r"0\.parquet cannot be used as the results folder \(File exists\)"):
        Store.open(store.path("pope/test/0"), {})


def test_weights_changed_under_the_same_name_are_a_different_model(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapper = wrappers["llava_pruned"]
    assert measure_missing(wrapper, [document(1)], [0], 4, tmp_path).samples() == ["drawn/test/1"]
    monkeypatch.setitem(wrapper.made_from, "files", "others")
    with pytest.raises(InformationError, match=r"files of the checkpoint .*, not 'others'"):
        measure_missing(wrapper, [document(2)], [0], 4, tmp_path)


def test_a_folder_holds_one_label_and_those_of_earlier_versions_the_probable_one(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    wrapper = wrappers["llava_pruned"]
    measure_missing(wrapper, [document(1)], [0], 4, tmp_path / "a")
    about = tmp_path / "a" / "information.json"
    settings = json.loads(about.read_text())
    assert settings.pop("label") == "probable"
    about.write_text(json.dumps(settings))
    assert measure_missing(wrapper, [document(1)], [0], 4, tmp_path / "a").samples() == ["drawn/test/1"]
    with pytest.raises(InformationError, match="holds measurements with label 'probable', not 'release'; give another"):
        measure_missing(wrapper, [document(1)], [0], 4, tmp_path / "a", "release")
    store = measure_missing(wrapper, [document(1, "yELLOW")], [0], 4, tmp_path / "b", "release")
    tokenizer = wrapper.processor.tokenizer
    ids = tokenizer.encode("yELLOW", add_special_tokens=False)
    inputs = dict(wrapper.inputs_of(document(1).messages))
    with torch.no_grad():
        full = wrapper.model(**inputs, logits_to_keep=1).logits[0, -1].double().softmax(-1)
    assert store.read().p_full.unique() == pytest.approx([full[ids[0]].item()])


def test_deleting_is_not_masking_with_zeros(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document]
) -> None:
    """What docs and `--help` say of the paper's equations: with zeros, most tokens of this image change sign."""
    wrapper = wrappers["llava_pruned"]
    model, one, layer = wrapper.model, document(1), 2
    inputs = dict(wrapper.inputs_of(one.messages))
    answer = find_answer(model, wrapper.processor.tokenizer, inputs, [one.target]).token
    visual = (inputs["input_ids"][0] == model.config.image_token_id).nonzero().flatten().tolist()

    def masked(kept: int | None) -> float:
        """The answer's probability if all visual tokens but one are zero at the layer's input."""

        def zero(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0].clone()
            hidden[:, [column for number, column in enumerate(visual) if number != kept]] = 0
            return (hidden, *args[1:]), kwargs

        with (
            torch.no_grad(),
            hooked([ModelParts.of(model).layers[layer].register_forward_pre_hook(zero, with_kwargs=True)]),
        ):
            logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[0, -1]
        return logits.double().softmax(-1)[answer].item()

    (measured,) = measure(model, inputs, answer, [layer]).layers
    numbers = range(0, len(visual), 9)
    without = masked(None)
    by_zeros = [masked(number) - without for number in numbers]
    by_deletion = measured.information[::9].tolist()
    assert len(by_deletion) == len(by_zeros) == 16
    flipped = [deleted for deleted, zeroed in zip(by_deletion, by_zeros, strict=True) if deleted * zeroed < 0]
    assert len(flipped) > 8
    assert max(map(abs, flipped)) > 0.05


def test_a_document_that_cannot_be_measured_is_named(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    with pytest.raises(InformationError, match="task 'drawn', document 7: it has no right answer"):
        measure_documents(wrappers["llava_pruned"], [document(7, "")], Store.open(tmp_path, {}), LAYERS, 2)


@pytest.mark.parametrize("name", NAMES)
def test_information_kept_is_that_of_the_tokens_kept(
    name: str, wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    wrapper, documents = wrappers[name], [document(1)]
    store = Store.open(tmp_path, {})
    measure_documents(wrapper, documents, store, LAYERS, 1)
    kept = kept_information(wrapper, documents, store, ["random", "fastv"], [0.25], LAYERS, 1)
    assert set(kept[kept.layer == 0].method) == {"most", "mean", "random"}  # FastV reads a layer before
    inputs = dict(wrapper.inputs_of(documents[0].messages))
    [grid] = grids_of(wrapper, inputs)
    rows = store.read()
    for layer in LAYERS:
        values = token_information(rows[rows.layer == layer], 0, [grid], 1)[0].flatten()
        here = kept[kept.layer == layer].set_index("method")
        count = round(0.25 * len(values))
        assert here.information["most"] == pytest.approx(np.sort(values)[-count:].sum())
        assert here.information["mean"] == pytest.approx(values.mean() * count)
        for method in set(here.index) - {"most", "mean"}:
            with prune(wrapper.model, f"{method}@{layer}:0.25", samples=[documents[0].sample]) as trace:
                wrapper.model(**inputs)
            expected = sum(values[token] for token in trace.rows[0].indices(0)[0])
            assert here.information[method] == pytest.approx(expected)
            assert here.information[method] <= here.information["most"] + 1e-9


def test_a_grid_that_was_not_measured_is_refused() -> None:
    lines = pd.DataFrame(
        {"image": [0, 0], "token": [0, 2], "row": [0, 0], "column": [0, 2], "information": [0.5, 0.25]}
    )
    [values] = token_information(lines, 0, [(1, 3)], 2)
    assert values.tolist() == [[0.5, 0.5, 0.25]]
    with pytest.raises(InformationError, match="2 x 3"):
        token_information(lines, 0, [(2, 3)], 1)


@pytest.mark.parametrize("name", NAMES)
def test_the_models_view_is_drawn_token_by_token(
    name: str, wrappers: dict[str, PrunedModel], document: Callable[..., Document]
) -> None:
    """The picture covers the grid, and shows the scene where the model sees it."""
    wrapper, one = wrappers[name], document(2)
    inputs = dict(wrapper.inputs_of(one.messages))
    grids = grids_of(wrapper, inputs)
    [picture] = seen_images(wrapper, inputs, grids)
    rows, columns = grids[0]
    assert picture.size == (columns * SIDE, rows * SIDE)
    image = one.fields["image"]
    side = max(image.size) if name == "llava_pruned" else None
    left, top = ((side - image.width) // 2, (side - image.height) // 2) if side else (0, 0)
    width, height = (side, side) if side else image.size
    middle = image.getpixel((image.width // 2, image.height // 2))
    there = (
        int((left + image.width // 2) / width * picture.width),
        int((top + image.height // 2) / height * picture.height),
    )
    assert np.abs(np.subtract(picture.getpixel(there), middle)).max() <= 12
    mask = np.zeros((rows, columns), dtype=bool)
    mask[0, 0] = True
    pale = np.asarray(dimmed(picture, mask))
    assert (pale[:SIDE, :SIDE] == np.asarray(picture)[:SIDE, :SIDE]).all()
    assert pale[SIDE:].min() > 200


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "1"])
def test_the_picture_shows_the_models_pixels_also_of_odd_images(
    name: str, mode: str, wrappers: dict[str, PrunedModel]
) -> None:
    """Each visual token's square has the colours of that token's input pixels."""
    wrapper = wrappers[name]
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (150, 190, 4), dtype=np.uint8), "RGBA")
    image = image.resize((19, 15)).resize((190, 150), Image.Resampling.NEAREST)
    image = image.quantize(8) if mode == "P" else image.convert("I" if mode == "I;16" else mode).convert(mode)
    shown = compare(wrapper, [image], "What is this?", Schedule.parse("stride@2:0.5"), 2)
    [picture] = shown.images
    pixels = wrapper.inputs(image, "What is this?")["pixel_values"].float()
    processor = wrapper.processor.image_processor
    rows, columns = shown.kept[0][0].shape
    assert picture.size == (columns * SIDE, rows * SIDE)
    squares = np.asarray(picture, float).reshape(rows, SIDE, columns, SIDE, 3).mean((1, 3)) / 255
    if name == "llava_pruned":
        own = pixels[0].unflatten(1, (rows, -1)).unflatten(3, (columns, -1)).mean((2, 4)).permute(1, 2, 0)
    else:
        # Four patches a token, one after the other; each has colour, frame and pixels.
        own = pixels.reshape(rows, columns, 4, 3, -1).mean((2, 4))
    own = own * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    assert np.abs(squares - own.numpy()).max() < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_show_returns_the_kept_tokens_and_both_answers(
    name: str, wrappers: dict[str, PrunedModel], document: Callable[..., Document]
) -> None:
    wrapper, one = wrappers[name], document(3)
    images = [one.fields["image"], document(4).fields["image"]]
    shown = compare(wrapper, images, "How many shapes are there?", Schedule.parse("stride@2:0.5,random@6:0.2"), 4)
    assert [[mask.sum() for mask in masks] for masks in shown.kept] == shown.trace.kept
    assert [mask.size for mask in shown.kept[0]] == shown.trace.images
    assert all((late <= early).all() for early, late in zip(*shown.kept, strict=True))
    alone = compare(wrapper, images, "How many shapes are there?", Schedule(), 4)
    assert alone.answer == alone.unpruned == shown.unpruned
    assert alone.kept == []
