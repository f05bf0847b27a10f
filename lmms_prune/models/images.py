"""Changes to an image before the processor, as in a family's published evaluation. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from PIL import Image

_MOST_PADDED = 2**29  # pixels: 1.6 GB, and several times that while the processor runs
_LONGEST_JPEG = 65500  # of a side, in pixels


class ImageTooLongError(ValueError):
    """An image whose padded square would not fit into memory."""


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """`image` in the middle of a square of the mean colour (0 to 1), as LLaVA-1.5's own evaluation pads.

    Raises:
        ImageTooLongError: the square would not fit into memory: a line of 60,000 pixels is padded to 11 GB.
    """
    side = max(image.size)
    if side**2 > _MOST_PADDED:
        raise ImageTooLongError(
            f"image_aspect=pad: an image of {image.width} x {image.height} pixels would be padded to {side} x {side}, more "
            f"than {_MOST_PADDED:,} pixels; make it smaller, or use image_aspect=crop."
        )
    image = image.convert("RGB")
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def on_white(image: Image.Image) -> Image.Image:
    """`image` in RGB as qwen-vl-utils passes it on: transparent parts of an RGBA image become white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    """`image` in RGB after a JPEG of this quality, as a model gets it to which images are passed on as JPEGs.

    Raises:
        ImageTooLongError: no JPEG has so long a side.
    """
    if max(image.size) > _LONGEST_JPEG:
        raise ImageTooLongError(
            f"an image of {image.width} x {image.height} pixels cannot be a JPEG, as which lmms-eval's own model of this "
            f"family passes images on: its sides are at most {_LONGEST_JPEG} pixels; make it smaller."
        )
    file = BytesIO()
    (image if image.mode == "RGB" else image.convert("RGB")).save(file, format="JPEG", quality=quality)
    return Image.open(file)
