"""Tiny models, prompts and images that the tests share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor

from lmms_prune.certificate.tiny import LAYERS, load_model

__all__ = ["LAYERS", "Family", "load", "load_model", "noise"]


@dataclass
class Family:
    """One family's tiny model with its processor, and prompts made as lmms-eval makes them."""

    name: str
    folder: Path
    model: Any
    processor: Any

    def inputs(self, questions: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, torch.Tensor]:
        """A left-padded batch; each row has its question and its (possibly no, possibly several) images."""
        chats = [
            [{"role": "user", "content": [*({"type": "image"} for _ in row), {"type": "text", "text": question}]}]
            for question, row in zip(questions, images, strict=True)
        ]
        texts = self.processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        flat = [image for row in images for image in row]
        batch = self.processor(text=texts, images=flat or None, padding=True, return_tensors="pt")
        floating = self.model.dtype
        return {name: x.to(floating) if x.is_floating_point() else x for name, x in batch.items()}


def noise(seed: int, width: int = 112, height: int = 112) -> Image.Image:
    """An image of seeded noise: no two of its visual tokens are alike, so that no choice hangs on rounding."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def load(name: str, folder: Path, dtype: torch.dtype, attention: str) -> Family:
    model = load_model(folder, dtype, attention)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return Family(name, folder, model, processor)
