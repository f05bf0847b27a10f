"""matplotlib with this package's settings: no screen, and no formulas in texts, because a question may contain ``$``."""

from __future__ import annotations

import textwrap
import unicodedata
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl

from lmms_prune.record.files import write

mpl.use("Agg")
mpl.rcParams["text.parse_math"] = False

from matplotlib import font_manager, pyplot  # noqa: E402  (after its settings)

# matplotlib's own font has no Chinese letters; a font with them is added if one is installed.
_CHINESE = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "SimHei", "Arial Unicode MS"),
)
_installed = {font.name for font in font_manager.fontManager.ttflist}
mpl.rcParams["font.family"] = ["DejaVu Sans", *(name for name in _CHINESE if name in _installed)]

__all__ = ["mpl", "pyplot", "save", "wrapped"]


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure to a file; the ending of its name decides the format.

    Args:
        figure: is closed afterwards.
        path: of the file.
        options: of matplotlib's `savefig`.

    Raises:
        WriteError: the file cannot be written.
    """
    stream = BytesIO()
    try:
        figure.savefig(stream, format=path.suffix.removeprefix(".").lower(), **options)
    finally:
        pyplot.close(figure)
    write(path, stream.getvalue())


def wrapped(text: str, figure: Any, size: int) -> str:
    """`text` wrapped to the width of a figure at a font size; matplotlib's own wrapping reads ``$`` as mathematics."""
    # A letter is about half as wide as it is high, a Chinese one as wide as high.
    wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    letters = int(figure.get_figwidth() * 72 / (size * (1.0 if wide else 0.55)))
    return "\n".join(textwrap.fill(line, letters) for line in text.splitlines())
