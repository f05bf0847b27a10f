"""What a method must know of a vision encoder, before anything runs. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EncoderShape:
    """What decides which blocks a method reads, and in which form it can run.

    Args:
        depth: number of blocks.
        selected: the 0-based block whose output the decoder is given (by way of projector or merger).
        class_tokens: tokens before the patches that gather from them: CLIP's 1, or 0.
        patches_per_token: patches that become one visual token.
        is_clip: whether it is CLIP's own, so that CLIP's text encoder speaks of the same features, and its blocks can be
            run one by one on any tokens (methods that merge inside it do so).
        projects_after: whether a projector follows the selected block, so that its output can be read before that; else
            the encoder's own output, after its merger, is what is read.
    """

    depth: int
    selected: int
    class_tokens: int = 0
    patches_per_token: int = 1
    is_clip: bool = False
    projects_after: bool = False

    def scaled(self, block: int, of: int) -> int:
        """The block at the same relative depth as 0-based `block` of an encoder with `of` blocks; the same if as deep."""
        return block * self.depth // of
