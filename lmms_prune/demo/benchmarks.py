"""Miniature stand-ins for the ten benchmarks of the leaderboard, in the files and columns that lmms-eval reads.

`datasets` prefers a local folder to a dataset of the same name on the hub. So lmms-eval, started inside the folder that
`build_mirror` writes, runs its unchanged tasks and scorers on these rows, without network or login.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets
from datasets import Dataset

from lmms_prune.demo import content, pictures, questions, scene_rows, tables, text_rows
from lmms_prune.demo.folders import new_folder
from lmms_prune.demo.models import DemoError
from lmms_prune.demo.scene_rows import gqa, mmbench, mme, pope, scienceqa
from lmms_prune.demo.tables import Configs
from lmms_prune.demo.text_rows import documents, ocrbench, ocrvqa, textvqa

TASKS: tuple[str, ...] = (
    "mme",
    "scienceqa_img",
    "pope",
    "textvqa_val",
    "mmbench_en_dev_static",
    "mmbench_cn_dev_static",
    "gqa",
    "infovqa_val",
    "docvqa_val",
    "ocrbench",
)
"""One lmms-eval task per benchmark, scored without a judge; `mmbench_cn_dev_static` comes from `task_configs`."""


def build_mirror(folder: str | os.PathLike[str], *, rows: int = 4, seed: int = 0) -> Path:
    """Write the ten benchmarks, and OCR-VQA, below `folder`, which must be new, and return its path.

    The same arguments give the same files. File names contain a digest of the content: `datasets` recognises a folder only
    by its README, and would otherwise serve rows cached from an earlier folder.

    Args:
        folder: the folder to write; it appears only when complete.
        rows: rows per benchmark and split, even and at least 4 (MME counts pairs, MMBench rotated twins).
        seed: the seed of all drawings, questions and options.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: `rows` is odd or below 4.
    """
    if rows < 4 or rows % 2:
        raise ValueError(f"rows is {rows}; it must be even and at least 4")
    with new_folder(folder) as partial:
        for repository, builder in _BUILDERS.items():
            _write(partial / repository, builder(rows, seed))
    return Path(folder)


def mirror_in(folder: Path, rows: int) -> Path:
    """The benchmarks of so many rows below `folder`, drawn if they are not there.

    Raises:
        DemoError: they have changed since they were drawn.
        OSError: `folder` cannot be written.
    """
    mirror = folder / f"mirror-{rows}-{drawn_by()}"
    if not mirror.exists():
        datasets.disable_progress_bars()
        with suppress(FileExistsError):  # another process was faster; a folder that is there is whole
            build_mirror(mirror, rows=rows)
    elif damaged := next(damaged_files(mirror), None):
        raise DemoError(f"the data has changed since it was drawn: {damaged}. Delete {mirror} to have it drawn again.")
    return mirror


def drawn_by() -> str:
    """A digest of the drawing code: another version of it draws different data."""
    sources = (Path(__file__), *(Path(str(module.__file__)) for module in (content, pictures, questions)))
    rows = (Path(str(module.__file__)) for module in (scene_rows, tables, text_rows))
    return hashlib.sha256(b"".join(source.read_bytes() for source in (*sources, *rows))).hexdigest()[:8]


def damaged_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """The files in a folder written by `build_mirror` that are missing or have changed."""
    for repository in _BUILDERS:
        readme = Path(folder) / repository / "README.md"
        if not readme.is_file():
            yield readme
            continue
        for name in re.findall(r"^ +path: (.+)$", readme.read_text(encoding="utf-8"), re.MULTILINE):
            file = readme.parent / name
            if not file.is_file() or _digest(file) != file.stem.rpartition("-")[2]:
                yield file


def _digest(file: Path) -> str:
    """A digest of the file's content, as in its name."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _write(folder: Path, configs: Configs) -> None:
    """Write one parquet file per split, and the front matter that tells `datasets` where they are."""
    lines = ["---", "configs:"]
    for config, splits in configs.items():
        lines += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir(parents=True)
        for split, (rows, features) in splits.items():
            unnamed = folder / config / f"{split}.parquet"
            Dataset.from_list(rows, features=features).to_parquet(unnamed)
            named = unnamed.with_name(f"{split}-{_digest(unnamed)}.parquet")
            unnamed.rename(named)
            lines += [f"  - split: {split}", f"    path: {config}/{named.name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]), encoding="utf-8")


_BUILDERS: dict[str, Callable[[int, int], Configs]] = {
    "lmms-lab-encoder/MME": mme,
    "lmms-lab-encoder/ScienceQA": scienceqa,
    "lmms-lab-encoder/POPE": pope,
    "lmms-lab-encoder/textvqa": textvqa,
    "lmms-lab-encoder/MMBench": mmbench,
    "lmms-lab-encoder/GQA": gqa,
    "lmms-lab-encoder/DocVQA": documents,
    "echo840/OCRBench": ocrbench,
    "howard-hou/OCR-VQA": ocrvqa,
}
