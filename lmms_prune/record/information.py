"""Measured information on disk: a folder with one Parquet file a sample, complete or not there.

`lmms-prune information` writes such folders; its pictures and the oracle `information@…;of=FOLDER` read them.

Columns: sample, task, answer (the reference), p_full, layer, p_text, divergence, image, token (raster index), row, column
(of the unit's upper left token), tokens (in the unit), p_k. One line a layer and unit.
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


class InformationError(ValueError):
    """A prompt or an answer whose information cannot be measured, or measurements that cannot be had; says why."""


@dataclass(frozen=True)
class Store:
    """A folder of measured samples, all of one model measured in one way."""

    folder: Path

    @classmethod
    def open(cls, folder: Path, settings: Mapping[str, Any]) -> Store:
        """The folder for measurements with `settings`; what it already holds stays.

        Raises:
            InformationError: it holds measurements with other settings, or cannot be made.
        """
        about = folder / ABOUT
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The settings of a run that measured nothing bind no one.
            if not about.exists() or next(folder.rglob("*.parquet"), None) is None:
                write(about, json.dumps(settings, indent=1))
        except OSError as error:
            raise InformationError(
                f"{folder} cannot be the folder of the results ({error.strerror}); give another --out."
            ) from error
        store = cls(folder)
        for name, value, other in _differences(json.loads(json.dumps(settings)), store.settings(), about):
            raise InformationError(
                f"{folder} holds measurements with {name} {other!r}, not {value!r}; give another --out."
            )
        return store

    def settings(self) -> dict[str, Any]:
        """How its samples were measured.

        Raises:
            InformationError: it is no such folder.
        """
        try:
            return json.loads(read_text(self.folder / ABOUT))
        except (OSError, json.JSONDecodeError) as error:
            raise InformationError(
                f"{self.folder} holds no measured information ({ABOUT}: {error}); `lmms-prune information` makes such a folder."
            ) from error

    def path(self, sample: str) -> Path:
        """The file of a sample (task/split/number)."""
        return self.folder.joinpath(*sample.split("/")).with_suffix(".parquet")

    def has(self, sample: str) -> bool:
        """Whether a sample is measured."""
        return self.path(sample).exists()

    def write(self, sample: str, rows: pd.DataFrame) -> None:
        """Add a sample, in one move: an interruption leaves it out as a whole.

        Raises:
            InformationError: it cannot be written.
        """
        stream = BytesIO()
        rows.to_parquet(stream, index=False)
        try:
            write(self.path(sample), stream.getvalue())
        except WriteError as error:
            raise InformationError(
                f"{error} What was measured before is kept: when that is fixed, call the same command again."
            ) from error

    def samples(self) -> list[str]:
        """All samples measured, in the order of their tasks and numbers.

        Raises:
            InformationError: a file that no measurement is called like, or a folder that cannot be read.
        """
        unreadable: list[OSError] = []
        paths = find(self.folder, "*.parquet", unreadable.append)
        if unreadable:
            raise InformationError(f"{unreadable[0].filename} cannot be read: {unreadable[0].strerror}.")
        if other := [path for path in paths if not path.stem.isdigit()]:
            raise InformationError(f"{other[0]} is no measured sample, which is called by its number; take it away.")
        names = [path.relative_to(self.folder).with_suffix("").parts for path in paths]
        return ["/".join(parts) for parts in sorted(names, key=lambda parts: (*parts[:-1], int(parts[-1])))]

    def read(self, samples: Sequence[str] | None = None) -> pd.DataFrame:
        """The lines of some samples, or of all, with the column `information`.

        Raises:
            InformationError: nothing is measured yet, or a sample is not.
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


def token_information(rows: pd.DataFrame, image: int, grid: tuple[int, int], block: int) -> np.ndarray:
    """One image's information at one layer as an array (rows, columns) of its visual tokens.

    Args:
        rows: the lines of one sample at one layer.
        image: its number in the sample.
        grid: rows and columns of its visual tokens.
        block: side of a unit.

    Raises:
        InformationError: the measurements do not cover the grid.
    """
    information = np.full(grid, np.nan)
    for line in rows[rows.image == image].itertuples():
        information[line.row : line.row + block, line.column : line.column + block] = line.information
    if np.isnan(information).any():
        raise InformationError(f"the measurements do not cover an image of {grid[0]} x {grid[1]} visual tokens.")
    return information


def _differences(asked: dict[str, Any], known: dict[str, Any], path: Path) -> Iterator[tuple[str, Any, Any]]:
    """The names under which a folder says something else than what is asked for, with both values.

    Among them are the model's settings, each by itself; folders of before have all of them as one text.
    """
    if "identity" in known and "settings" in asked:
        asked = {"identity": settings_text(asked["settings"]), **_rest(asked)}
    try:
        own, others = (
            {f"setting {name}": value for name, value in read_settings(about).items()}
            if {"settings", "identity"} & set(about)
            else {}
            for about in (asked, known)
        )
    except ResultsError as error:
        raise InformationError(f"{path}: {error}") from None
    for name, value in {**own, **_rest(asked)}.items():
        other = {**known, **others}.get(name)
        if other != value:
            yield name, value, other


def _rest(about: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in about.items() if name not in ("settings", "identity")}
