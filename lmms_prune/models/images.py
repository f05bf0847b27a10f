"""What a family's own evaluation does to an image before its processor. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image


def pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """`image` in the middle of a square of the mean colour (0 to 1), as LLaVA-1.5's own evaluation pads."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def on_white(image: Image.Image) -> Image.Image:
    """`image` in RGB as qwen-vl-utils hands it on: what of an RGBA image is transparent is white."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
