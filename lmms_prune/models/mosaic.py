"""Images that are shown to the vision encoder in several tiles: which token is which patch. Free of torch.

LLaVA-NeXT encodes the whole image at low resolution (the base, tile 0) and the image at a higher resolution in tiles. In
the prompt the base's patches come first, then the rows of all tiles side by side (the canvas), each followed by a newline
token, which belongs to no patch. What the canvas holds beyond the image is cut off (unpadding).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["image", "rectangle", "tile"]
"""Into what a stage divides an image: not at all, into its grids of patches (base and canvas), or into its tiles."""


@dataclass(frozen=True)
class Region:
    """A part of an image that a method sees as one image.

    Args:
        raster: the raster index in the image of each of its patches, in order.
        grid: its rows and columns; None if it is no single rectangle.
    """

    raster: tuple[int, ...]
    grid: tuple[int, int] | None


@dataclass(frozen=True)
class Mosaic:
    """One image in several tiles. Patches are numbered in the order of their tokens: first the base's, then the canvas's.

    Args:
        size: height and width of the image, in pixels.
        side: patches along one side of a tile.
        tiles: rows and columns of tiles of the canvas.
        rows, columns: the rows and columns of the canvas's patches that unpadding leaves.
        newlines: whether each row of the canvas ends with a newline token.
        shown: the rows and columns of the canvas's patches that show the image; the others are padding.
    """

    size: tuple[int, int]
    side: int
    tiles: tuple[int, int]
    rows: range
    columns: range
    newlines: bool
    shown: tuple[range, range]

    @property
    def rectangles(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the base and of the canvas; of the base alone if unpadding leaves nothing of the canvas."""
        canvas = (len(self.rows), len(self.columns))
        return ((self.side, self.side), canvas) if all(canvas) else ((self.side, self.side),)

    @property
    def boxes(self) -> tuple[tuple[int, int, int, int], ...]:
        """The part of each rectangle that shows the image: its first row and column, and its height and width."""
        down, across = self.shown
        top, left = down.start - self.rows.start, across.start - self.columns.start
        boxes = (0, 0, self.side, self.side), (top, left, len(down), len(across))
        return boxes[: len(self.rectangles)]

    @property
    def base(self) -> int:
        """Patches of the base."""
        return self.side**2

    @property
    def patches(self) -> int:
        """Patches among the tokens."""
        return self.base + len(self.rows) * len(self.columns)

    @property
    def newline_count(self) -> int:
        """Newline tokens among the tokens."""
        return len(self.rows) * self.newlines

    @property
    def tokens(self) -> int:
        """All tokens of the image in a prompt."""
        return self.patches + self.newline_count

    @property
    def encoded(self) -> int:
        """Tiles that the encoder sees, the base among them."""
        return 1 + self.tiles[0] * self.tiles[1]

    @cached_property
    def columns_of_patches(self) -> tuple[int, ...]:
        """The number among the image's tokens of each patch."""
        width = len(self.columns)
        starts = (self.base + row * (width + self.newlines) for row in range(len(self.rows)))
        return (*range(self.base), *(start + column for start in starts for column in range(width)))

    @cached_property
    def columns_of_newlines(self) -> tuple[int, ...]:
        """The number among the image's tokens of each newline token."""
        width = len(self.columns)
        return tuple(self.base + row * (width + 1) + width for row in range(self.newline_count))

    @cached_property
    def sources(self) -> tuple[tuple[int, int], ...]:
        """The tile of each patch (0 is the base), and its raster index in that tile."""
        side, across = self.side, self.tiles[1]
        canvas = (
            (1 + row // side * across + column // side, row % side * side + column % side)
            for row in self.rows
            for column in self.columns
        )
        return (*((0, cell) for cell in range(self.base)), *canvas)

    @property
    def tile_sizes(self) -> list[int]:
        """Patches of each tile that unpadding leaves."""
        return [len(region.raster) for region in self.regions("tile")]

    def regions(self, kind: Kind) -> tuple[Region, ...]:
        """The image's regions; a tile or canvas of which unpadding leaves nothing is none."""
        return _regions(self, kind)


@dataclass(frozen=True)
class Tiles:
    """The images of a batch as the encoder saw them, tile after tile, and the rows of a view.

    Args:
        mosaics: of the encoded images, in order.
        encoded: for each image of the prompts, its number among the encoded ones: several answers to a prompt share them.
        rows: for each row of the view the number of its encoded image, and its region in that image.
    """

    mosaics: list[Mosaic]
    encoded: list[int]
    rows: list[tuple[int, Region]]


@lru_cache(maxsize=256)
def _regions(mosaic: Mosaic, kind: Kind) -> tuple[Region, ...]:
    everything = tuple(range(mosaic.patches))
    if kind == "image":
        return (Region(everything, None),)
    if kind == "rectangle":
        parts = (everything[: mosaic.base], everything[mosaic.base :])
        return tuple(Region(*part) for part in zip(parts, mosaic.rectangles, strict=False))
    members: list[list[int]] = [[] for _ in range(mosaic.encoded)]
    for number, (tile, _) in enumerate(mosaic.sources):
        members[tile].append(number)
    regions = []
    for raster in filter(None, members):
        # A tile is cut at its edges alone, so that its patches are a rectangle.
        first = mosaic.sources[raster[0]][1] // mosaic.side
        height = mosaic.sources[raster[-1]][1] // mosaic.side - first + 1
        regions.append(Region(tuple(raster), (height, len(raster) // height)))
    return tuple(regions)


@lru_cache(maxsize=1024)
def mosaic(
    size: tuple[int, int], canvas: tuple[int, int], tile: int, side: int, *, unpad: bool, newlines: bool
) -> Mosaic:
    """The mosaic of an image.

    Args:
        size: height and width of the image, in pixels.
        canvas: height and width to which its tiles are put together, in pixels.
        tile: side of a tile, in pixels.
        side: side of a tile, in patches.
        unpad: whether the part of the canvas beyond the image is cut off.
        newlines: whether each row ends with a newline token.
    """
    tiles = (canvas[0] // tile, canvas[1] // tile)
    rows, columns = range(tiles[0] * side), range(tiles[1] * side)
    shown_rows, shown_columns = rows, columns
    (height, width), (down, across) = size, (len(rows), len(columns))
    # Computed as transformers does it (`unpad_image`), roundings included.
    if width / height > across / down:
        cut = (down - int(round(height * (across / width), 7))) // 2
        shown_rows = rows[cut : down - cut]
    else:
        cut = (across - int(round(width * (down / height), 7))) // 2
        shown_columns = columns[cut : across - cut]
    kept = (shown_rows, shown_columns) if unpad else (rows, columns)
    return Mosaic(size, side, tiles, *kept, newlines, (shown_rows, shown_columns))
