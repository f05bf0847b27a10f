"""The shape of a vision encoder, known before the model runs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderShape:
    """The facts about an encoder from which a method chooses the blocks that it reads and the form in which it runs.

    Args:
        depth: number of blocks.
        selected: the 0-based block whose output the decoder is given (through projector or merger).
        class_tokens: class tokens before the patches: 1 for CLIP, or 0.
        patches_per_token: patches that become one visual token.
        is_clip: whether it is CLIP's encoder: its features share a space with CLIP's text encoder, and its blocks can be
            run one by one on any tokens (as methods do that merge inside it).
        projects_after: whether a projector follows the selected block, whose output is then read before the projector;
            otherwise the encoder's own output, after its merger, is read.
        window: side, in visual tokens, of the windows in which blocks attend and in whose order the patches lie; 0 if
            there are none: then patches lie in raster order of the visual tokens.
        full: blocks that attend over the whole image although there are windows.
        tiles: whether an image is encoded in several tiles, each by itself.
    """

    depth: int
    selected: int
    class_tokens: int = 0
    patches_per_token: int = 1
    is_clip: bool = False
    projects_after: bool = False
    window: int = 0
    full: tuple[int, ...] = ()
    tiles: bool = False

    def in_windows(self, block: int) -> bool:
        """Whether 0-based `block` attends in windows."""
        return self.window > 0 and block not in self.full

    def scaled(self, block: int, of: int) -> int:
        """The block at the same relative depth as 0-based `block` of an encoder with `of` blocks."""
        return block * self.depth // of
