"""`information@l:keep;of=FOLDER`, the oracle that knows the right answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import Family, noise

from lmms_prune import prune
from lmms_prune.errors import ScheduleError
from lmms_prune.harness.documents import Document
from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.information.measure import measure
from lmms_prune.information.run import measure_documents
from lmms_prune.models.parts import ModelParts
from lmms_prune.record.information import InformationError, Store
from lmms_prune.schedule import Schedule


@pytest.mark.parametrize("name", ["llava_pruned", "qwen2_5_vl_pruned"])
def test_it_keeps_the_tokens_with_the_most_information(
    name: str, wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    """Each document by its own numbers; a tie goes to the lower index."""
    wrapper, documents = wrappers[name], [document(1), document(4)]
    store = Store.open(tmp_path / "worth", {"layers": [5], "block": 1})
    measure_documents(wrapper, documents, store, [5], 1)
    for shown in documents:
        with prune(wrapper.model, f"information@5:3t;of={tmp_path / 'worth'}", samples=[shown.sample]) as trace:
            wrapper.model(**wrapper.inputs_of(shown.messages))
        rows = store.read([shown.sample])
        best = np.argsort(-rows.information.to_numpy(), kind="stable")[:3]
        assert trace.rows[0].indices(0) == [sorted(best.tolist())]


def measured(worth: list[np.ndarray], columns: list[int]) -> pd.DataFrame:
    """Measurements made by hand at layer 2, token by token of some images."""
    lines = [
        {
            "layer": 2,
            "image": image,
            "token": n,
            "row": n // width,
            "column": n % width,
            "tokens": 1,
            "p_k": 0.1 + x,
            "p_text": 0.1,
        }
        for image, (values, width) in enumerate(zip(worth, columns, strict=True))
        for n, x in enumerate(values.tolist())
    ]
    return pd.DataFrame(lines)


def test_each_image_is_pruned_by_its_own_measurements(family: Family, tmp_path: Path) -> None:
    """A ragged batch, after another stage: tokens dropped before stay dropped, even with much information."""
    model, names = family.model, ["first", "second"]
    inputs = family.inputs(["A question?", "Another, longer question?"], [[noise(1)], [noise(2), noise(3, 140, 84)]])
    with prune(model, "none", samples=names) as whole:
        model(**inputs)
    grids = ModelParts.of(model).grids(inputs, [size for row in whole.rows for size in row.images])
    of = {"first": grids[:1], "second": grids[1:]}
    random, store = np.random.default_rng(0), Store.open(tmp_path / "worth", {"layers": [2], "block": 1})
    worth = {name: [random.permutation(rows * columns).astype(float) for rows, columns in of[name]] for name in names}
    for name in names:
        store.write(name, measured(worth[name], [columns for _, columns in of[name]]))
    with prune(model, f"keepfirst@1:0.5,information@2:0.25;of={store.folder}", samples=names) as trace:
        model(**inputs)
    for row, name in zip(trace.rows, names, strict=True):
        for image, values in enumerate(worth[name]):
            left = values[: row.kept[0][image]]
            best = np.argsort(-left)[: row.kept[1][image]]
            assert len(best) == round(0.25 * len(values)) > 0
            assert row.indices(1)[image] == sorted(best.tolist())


@pytest.mark.parametrize("per", ["", ";per=tile"])
def test_base_and_canvas_compete_for_an_images_tokens(per: str, loaded: Callable[..., Family], tmp_path: Path) -> None:
    """Measured on LLaVA-NeXT in blocks, of a canvas with odd sides too; with per=tile each tile keeps its own best."""
    family = loaded("next")
    inputs = family.inputs(["A question?"], [[noise(2, 140, 84), noise(3, 60, 130)]])
    store = Store.open(tmp_path / "worth", {"layers": [2], "block": 2})
    result = measure(family.model, inputs, 5, [2], 2)
    [layer] = result.layers
    lines = [(u.image, u.tokens[0], u.row, u.column, len(u.tokens)) for u in result.units]
    table = pd.DataFrame(lines, columns=["image", "token", "row", "column", "tokens"])
    store.write("sample", table.assign(layer=2, p_k=layer.p.tolist(), p_text=layer.p_text))
    with prune(family.model, f"information@2:0.25;of={store.folder}{per}", samples=["sample"]) as trace:
        family.model(**inputs)
    for image, mosaic in enumerate(ModelParts.of(family.model).mosaics(inputs)):
        worth = np.zeros(mosaic.patches)
        for unit, value in zip(result.units, layer.information.tolist(), strict=True):
            if unit.image == image:
                worth[list(unit.tokens)] = value
        best: list[int] = []
        for region in mosaic.regions("tile" if per else "image"):
            order = np.argsort(-worth[list(region.raster)], kind="stable")
            best += np.array(region.raster)[order[: round(0.25 * len(region.raster))]].tolist()
        assert trace.rows[0].indices(0)[image] == sorted(best)


def test_without_a_folder_the_schedule_is_refused() -> None:
    with pytest.raises(ScheduleError, match="add ';of=FOLDER', a folder of `lmms-prune information`"):
        Schedule.parse("information@5:0.5").check(12)


def test_missing_measurements_are_named(
    wrappers: dict[str, PrunedModel], document: Callable[..., Document], tmp_path: Path
) -> None:
    wrapper, shown = wrappers["llava_pruned"], document(1)

    def ask(folder: Path, layer: int) -> None:
        with prune(wrapper.model, f"information@{layer}:0.5;of={folder}", samples=[shown.sample]):
            wrapper.model(**wrapper.inputs_of(shown.messages))

    with pytest.raises(InformationError, match=r"nowhere holds no measured information"):
        ask(tmp_path / "nowhere", 5)
    store = Store.open(tmp_path / "worth", {"layers": [5, 7], "block": 2})
    with pytest.raises(InformationError, match="lacks sample drawn/test/1"):
        ask(store.folder, 5)
    with pytest.raises(InformationError, match="holds information at layers 5, 7, not at 6"):
        ask(store.folder, 6)
