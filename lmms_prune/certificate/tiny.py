"""Tiny models on which a method is tried: random prompts of different lengths and image sizes, through a real processor."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.memory import Memory
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.shape import EncoderShape
from lmms_prune.pruning.hooks import prune
from lmms_prune.pruning.trace import Trace
from lmms_prune.schedule import Schedule, Stage
from lmms_prune.schedule.stage import stage

LAYERS = 8
WORDS = [
    "is",
    "there",
    "a",
    "red",
    "circle",
    "in",
    "this",
    "image",
    "left",
    "right",
    "of",
    "the",
    "blue",
    "square",
    "what",
    "colour",
    "how",
    "many",
    "people",
    "yes",
    "no",
]
Prompt = tuple[list[Image.Image], str]
"""The images and the question of one prompt."""


class Patches(nn.Module):
    """Qwen's patch embedding as the product that it is: a CPU takes fifty times as long to convolve float64."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias  # type: ignore[assignment]

    def forward(self, pixels: Tensor) -> Tensor:
        product = pixels.flatten(1) @ self.weight.flatten(1).T
        return product if self.bias is None else product + self.bias


def load_model(folder: Path, dtype: torch.dtype, attention: str) -> Any:
    """A checkpoint of a local folder in a dtype, with an attention kernel."""
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    ).eval()
    if dtype == torch.float64 and hasattr(model.model, "visual"):
        embedding = model.model.visual.patch_embed
        embedding.proj = Patches(embedding.proj)
    return model


@dataclass
class Tiny:
    """One family's checkpoint, loaded once for each (dtype, kernel) asked for."""

    family: str
    folder: Path
    processor: Any = field(repr=False)
    loaded: dict[tuple[torch.dtype, str], nn.Module] = field(default_factory=dict, repr=False)

    @classmethod
    def load(cls, family: str, folder: Path) -> Tiny:
        """A family's tiny model in a folder."""
        return cls(family, folder, AutoProcessor.from_pretrained(folder, padding_side="left", trust_remote_code=False))

    def model(self, dtype: torch.dtype = torch.float64, kernel: str = "sdpa") -> Any:
        """The model in a dtype."""
        key = (dtype, kernel)
        if key not in self.loaded:
            self.loaded[key] = load_model(self.folder, dtype, kernel)
        return self.loaded[key]

    @cached_property
    def parts(self) -> ModelParts:
        """The parts of the model."""
        return ModelParts.of(self.model())

    @property
    def fixed(self) -> bool:
        """Whether all images have the same number of tokens."""
        return self.parts.tokens_per_image is not None

    def row(self, rng: random.Random, images: int = 1, words: int | None = None) -> Prompt:
        """A random prompt: noise images (of random sizes where the family allows) and a random question."""
        question = " ".join(rng.choices(WORDS, k=words or rng.randint(1, 12)))
        return [self.image(rng) for _ in range(images)], question

    def image(self, rng: random.Random, size: tuple[int, int] | None = None) -> Image.Image:
        """Noise. Where sizes differ, of `size` (columns, rows) visual tokens."""
        columns, rows = (4, 4) if self.fixed else size or (rng.randint(3, 6), rng.randint(3, 6))
        pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 256, (28 * rows, 28 * columns, 3))
        return Image.fromarray(pixels.astype(np.uint8))

    def batch(self, rows: Sequence[Prompt], dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """The model's inputs for a batch of prompts."""
        texts = []
        for images, question in rows:
            content = [{"type": "image"} for _ in images] + [{"type": "text", "text": question}]
            message = {"role": "user", "content": content}
            texts.append(self.processor.apply_chat_template([message], add_generation_prompt=True))
        flat = [image for images, _ in rows for image in images]
        inputs = self.processor(text=texts, images=flat or None, padding=True, return_tensors="pt")
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}

    def numbered(self, rows: Sequence[Prompt]) -> dict[str, Tensor]:
        """A batch with the position ids that `generate` gives a model without M-RoPE.

        Without them its padding counts as positions, and DART's key norms, taken after the rotation, depend on these.
        """
        inputs = self.batch(rows)
        if self.parts.family.renumbers:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        return inputs

    def run(
        self,
        inputs: dict[str, Tensor],
        schedule: str | Schedule | Stage | Sequence[str | Stage],
        *,
        dtype: torch.dtype = torch.float64,
        kernel: str = "sdpa",
        **options: Any,
    ) -> tuple[Trace, Tensor]:
        """The trace and the last position's logits of one pruned forward pass."""
        model = self.model(dtype, kernel)
        with torch.no_grad(), prune(model, schedule, **options) as trace:
            logits = model(**inputs, logits_to_keep=1).logits[:, -1]
        return trace, logits


def mixed_rows(tiny: Tiny, seed: int = 0) -> list[Prompt]:
    """Rows of different lengths: one image, two, none, and one with a long question."""
    rng = random.Random(seed)
    return [tiny.row(rng, images=n, words=words) for n, words in ((1, 3), (2, 8), (0, 5), (1, 25), (1, 1))]


def questions_of(rows: Sequence[Prompt]) -> list[str]:
    """The question of each row."""
    return [question for _, question in rows]


ORDER = [3, 1, 4, 0, 2]


class Mixed:
    """The mixed rows of a family, batched once: all rows, with the positions of `generate`, permuted, alone, with a longer row."""

    def __init__(self, tiny: Tiny):
        self.tiny, self.rows = tiny, mixed_rows(tiny)
        self.questions = questions_of(self.rows)
        longer = tiny.row(random.Random(9), words=60)
        self.inputs = tiny.batch(self.rows)
        self.numbered = tiny.numbered(self.rows)
        self.permuted = tiny.numbered([self.rows[i] for i in ORDER])
        self.alone = [tiny.numbered([row]) for row in self.rows]
        self.longer = longer[1], tiny.numbered([*self.rows, longer])
        self.single = tiny.batch(self.rows, torch.float32)
        with torch.no_grad():
            self.plain = tiny.model(torch.float32)(**self.single).logits
        self._views: dict[int, TokenView] = {}

    def view(self, layer: int) -> TokenView:
        """The view of the mixed rows at a layer: captured once, and new for each call but for the tensors in it."""
        if layer not in self._views:
            self._views[layer] = self.captured(layer)
        return replace(self._views[layer], memory=Memory())

    def captured(self, layer: int, before: Sequence[Stage] = ()) -> TokenView:
        """The view that a method gets at a layer, in a real run, after the stages `before`."""
        spy = _DeepSpy() if layer else _Spy()
        _Spy.views.clear()
        schedule = Schedule((*before, stage(spy, layer, "0.2")))
        self.tiny.run(self.inputs, schedule, questions=self.questions)
        # A new view: what the hooks read of the old one is no matter of the method's.
        return replace(_Spy.views.pop())


@dataclass(frozen=True)
class _Spy(Method):
    """Keeps the first tokens, and the view that it was given."""

    reads: ClassVar[tuple[str, ...]] = ("hidden", "embeddings", "encoder", "pixels")
    views: ClassVar[list[TokenView]] = []

    def signals(self, encoder: EncoderShape) -> Signals:
        every = frozenset(range(encoder.depth))
        return Signals(attention=every, outputs=every, features=True, pixels=True)

    def select(self, view: TokenView, budget: Tensor) -> Tensor:
        self.views.append(view)
        rank = torch.arange(view.valid.shape[1], device=view.valid.device)
        return view.valid & (rank < budget[:, None])


@dataclass(frozen=True)
class _DeepSpy(_Spy):
    """The same where there is a layer before."""

    reads: ClassVar[tuple[str, ...]] = (*_Spy.reads, "attention", "keys", "values")
