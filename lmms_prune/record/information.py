"""Measured information on disk: a folder with one Parquet file per sample, which is either complete or missing.

`lmms-prune information` writes such folders; its pictures and the oracle `information@…;of=FOLDER` read them.

Each file has one line per layer and unit. Columns: sample, task, answer (the reference), p_full, layer, p_text, divergence,
image, token (raster index), row and column (of the unit's upper left token, in its grid), tokens (number in the unit), p_k.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import ArrowInvalid

from lmms_prune.record.files import WriteError, find, read_text, regular, write
from lmms_prune.record.results import ResultsError
from lmms_prune.record.run import read_settings, settings_text

ABOUT = "information.json"
_EARLIER = {"label": "probable"}  # settings that folders of earlier versions lack


class InformationError(ValueError):
    """Information cannot be measured for a prompt or an answer, or measurements cannot be read or written; says why."""


@dataclass(frozen=True)
class Store:
    """A folder of measured samples, all measured on one model with the same settings."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Store:
        """Open or make the folder for measurements with `settings`; existing measurements are kept.

        Raises:
            InformationError: the folder holds measurements with other settings, or cannot be made.
        """
        about = folder / ABOUT
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The settings of an earlier run that measured nothing are overwritten.
            if not about.exists() or next(folder.rglob("*.parquet"), None) is None:
                write(about, json.dumps(settings, indent=1))
        except OSError as error:
            raise InformationError(
                f"{folder} cannot be used as the results folder ({error.strerror}); give another --out."
            ) from error
        store = cls(folder)
        for name, value, other in _differences(json.loads(json.dumps(settings)), store.settings(), about):
            raise InformationError(
                f"{folder} holds measurements with {name} {other!r}, not {value!r}; give another --out."
            )
        return store

    def settings(self) -> dict[str, Any]:
        """Read the settings with which the samples were measured.

        Raises:
            InformationError: the folder holds no measured information.
        """
        try:
            return json.loads(read_text(self.folder / ABOUT))
        except (OSError, json.JSONDecodeError) as error:
            raise InformationError(
                f"{self.folder} holds no measured information ({ABOUT}: {error}); `lmms-prune information` makes such a folder."
            ) from error

    def path(self, sample: str) -> Path:
        """Return the file of a sample, which is named task/split/number."""
        return self.folder.joinpath(*sample.split("/")).with_suffix(".parquet")

    def has(self, sample: str) -> bool:
        """Return whether a sample is measured."""
        return self.path(sample).exists()

    def write(self, sample: str, rows: pd.DataFrame) -> None:
        """Add a sample atomically: an interruption leaves no part of it.

        Raises:
            InformationError: the sample cannot be written.
        """
        stream = BytesIO()
        rows.to_parquet(stream, index=False)
        try:
            write(self.path(sample), stream.getvalue())
        except WriteError as error:
            raise InformationError(
                f"{error} Earlier measurements are kept: fix the cause, then run the same command again."
            ) from error

    def samples(self) -> list[str]:
        """List all measured samples, ordered by task and number.

        Raises:
            InformationError: a file does not have the name of a measurement, or a folder cannot be read.
        """
        unreadable: list[OSError] = []
        paths = find(self.folder, "*.parquet", unreadable.append)
        if unreadable:
            raise InformationError(f"{unreadable[0].filename} cannot be read: {unreadable[0].strerror}.")
        if unexpected := [path for path in paths if not path.stem.isdigit()]:
            raise InformationError(
                f"{unexpected[0]} is not a measured sample: those are named by their number; remove the file."
            )
        names = [path.relative_to(self.folder).with_suffix("").parts for path in paths]
        return ["/".join(parts) for parts in sorted(names, key=lambda parts: (*parts[:-1], int(parts[-1])))]

    def read(self, samples: Sequence[str] | None = None) -> pd.DataFrame:
        """Read the lines of `samples`, or of all samples, and add the column `information` (p_k - p_text).

        Raises:
            InformationError: no sample is measured yet, or one of `samples` is not measured, or a file is damaged.
        """
        wanted = self.samples() if samples is None else list(samples)
        if not wanted:
            raise InformationError(f"{self.folder} holds no measured sample yet.")
        if missing := [sample for sample in wanted if not self.has(sample)]:
            raise InformationError(
                f"{self.folder} lacks sample {missing[0]}; measure it with `lmms-prune information` first."
            )
        rows = pd.concat([self._lines(sample) for sample in wanted], ignore_index=True)
        return rows.assign(information=rows.p_k - rows.p_text)

    def _lines(self, sample: str) -> pd.DataFrame:
        try:
            rows = pd.read_parquet(regular(self.path(sample)))
        except (OSError, ArrowInvalid) as error:
            raise InformationError(
                f"{self.path(sample)} is damaged ({getattr(error, 'strerror', None) or str(error).splitlines()[0]}); remove "
                "it and measure the sample again."
            ) from error
        if not {"p_k", "p_text"} <= set(rows.columns):
            raise InformationError(f"{self.path(sample)} lacks p_k or p_text; remove it and measure the sample again.")
        return rows


def token_information(rows: pd.DataFrame, image: int, grids: Sequence[tuple[int, int]], block: int) -> list[np.ndarray]:
    """Return one image's information at one layer as an array (rows, columns) of its visual tokens for each of its grids.

    Args:
        rows: lines of one sample at one layer.
        image: the image's number in the sample.
        grids: rows and columns of the image's visual tokens; of an image in tiles, of its base and its canvas.
        block: side of a unit, in visual tokens.

    Raises:
        InformationError: the measurements do not cover a grid.
    """
    lines, arrays, first = rows[rows.image == image], [], 0
    for grid in grids:
        information, last = np.full(grid, np.nan), first + grid[0] * grid[1]
        for line in lines[(lines.token >= first) & (lines.token < last)].itertuples():
            information[line.row : line.row + block, line.column : line.column + block] = line.information
        if np.isnan(information).any():
            message = f"the measurements do not cover all of an image of {grid[0]} x {grid[1]} visual tokens."
            raise InformationError(message)
        arrays.append(information)
        first = last
    return arrays


def _differences(requested: dict[str, Any], stored: dict[str, Any], path: Path) -> Iterator[tuple[str, Any, Any]]:
    """Yield each setting whose requested and stored values differ, as (name, requested, stored).

    The model's settings are compared one by one; older folders have them as one text, ``identity``.

    Args:
        path: the file of the stored settings, for messages.
    """
    if "identity" in stored and "settings" in requested:
        requested = {"identity": settings_text(requested["settings"]), **_without_model(requested)}
    try:
        requested_model, stored_model = (
            {f"setting {name}": value for name, value in read_settings(about).items()}
            if {"settings", "identity"} & set(about)
            else {}
            for about in (requested, stored)
        )
    except ResultsError as error:
        raise InformationError(f"{path}: {error}") from None
    # Some settings are recorded only where they are set, such as an adapter: one that is stored alone differs too.
    alone = {name: None for name in stored_model if requested_model and name not in requested_model}
    for name, value in {**alone, **requested_model, **_without_model(requested)}.items():
        other = {**_EARLIER, **stored, **stored_model}.get(name)
        if other != value:
            yield name, value, other


def _without_model(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings except the model's."""
    return {name: value for name, value in about.items() if name not in ("settings", "identity")}
