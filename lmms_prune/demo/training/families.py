"""What training needs of each family beyond `lmms_prune.models`: pixels, features, positions and tokenizers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from lmms_prune.demo.checkpoints import Sizes, llava_model, qwen2_5_vl_model
from lmms_prune.demo.language import LLAVA_SPECIALS, QWEN_SPECIALS, train_tokenizer
from lmms_prune.demo.questions import CHINESE
from lmms_prune.models import Family
from lmms_prune.models.images import pad_to_square
from lmms_prune.models.llava import LLAVA
from lmms_prune.models.qwen2_5_vl import QWEN2_5_VL

Position = tuple[int, int, int]  # time, row and column; equal for text, and for all tokens without M-RoPE


class TrainingFamily:
    """A model in training, with its tokenizer and processor."""

    family: ClassVar[Family]

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer: PreTrainedTokenizerFast = processor.tokenizer
        self.image_id: int = model.config.image_token_id
        # The prompt's text before the image token.
        self._head = self._rendered("QUESTION", with_image=True).split(self.tokenizer.decode([self.image_id]))[0]
        self.question = lru_cache(maxsize=4096)(self._question)

    @classmethod
    def untrained(cls, sizes: Sizes, texts: Sequence[str], seed: int) -> TrainingFamily:
        """A model with weights drawn from `seed`, and a tokenizer trained on `texts`."""
        raise NotImplementedError

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The rows and columns of visual tokens of an image with (width, height) pixels."""
        raise NotImplementedError

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        """A box in pixels of the image, converted to units of visual tokens."""
        raise NotImplementedError

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """The vision encoder's inputs for some images."""
        raise NotImplementedError

    def features(self, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The visual tokens of all images (V, D), in the decoder's space, and each image's class state (I, d) or None."""
        raise NotImplementedError

    def position_ids(self, positions: Int[Tensor, "3 B L"]) -> Int[Tensor, "..."]:
        """The decoder's position ids: the three channels, or one of them where they are equal."""
        raise NotImplementedError

    def end_tokens(self) -> list[int]:
        """The tokens that end an answer."""
        return [self.tokenizer.eos_token_id]

    def _image_positions(self, start: int, size: tuple[int, int]) -> list[Position]:
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """The decoder, from embeddings to the last hidden states."""
        return self.model.model.language_model

    def prefix(self, size: tuple[int, int] | None) -> tuple[list[int], list[Position]]:
        """Token ids and positions up to the image's end; without an image, those that every text starts with."""
        begin = self.tokenizer.encode("")
        if size is None:
            return begin, [(n,) * 3 for n in range(len(begin))]
        before = self.tokenizer.encode(self._head)
        image = self._image_positions(len(before), size)
        positions: list[Position] = [(n, n, n) for n in range(len(before))]
        return before + [self.image_id] * len(image), positions + image

    def word(self, label: str) -> int:
        """The token of a dense label's name: the word as in a question, or the letter."""
        words = {"board": " sign", "bar": " chart"}
        text = label if len(label) == 1 else words.get(label, f" {label.lower()}")
        return self.tokenizer.encode(text, add_special_tokens=False)[-1]

    def _question(self, prompt: str, with_image: bool) -> list[int]:
        """The tokens of a prompt after its image, or all of them without one."""
        text = self._rendered(prompt, with_image)
        if with_image:
            text = text[text.index(token := self.tokenizer.decode([self.image_id])) + len(token) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _rendered(self, prompt: str, with_image: bool) -> str:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


class TrainingLlava(TrainingFamily):
    """LLaVA-1.5: every image is padded to a square and resized to one size."""

    family = LLAVA

    @classmethod
    def untrained(cls, sizes: Sizes, texts: Sequence[str], seed: int) -> TrainingFamily:
        specials = (*LLAVA_SPECIALS, "USER:", "ASSISTANT:")
        tokenizer = train_tokenizer(
            specials, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", texts=texts, words=tuple(CHINESE.values())
        )
        return cls(*llava_model(tokenizer, sizes, seed))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        grid = self.family.only_grid(self.model.config)
        assert grid is not None
        return grid

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        side = max(size)
        across, down = (side - size[0]) // 2, (side - size[1]) // 2
        left, top, right, bottom = box
        cell = side / self.grid(size)[0]
        return (left + across) / cell, (top + down) / cell, (right + across) / cell, (bottom + down) / cell

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        processor = self.processor.image_processor
        squares = [pad_to_square(image, processor.image_mean) for image in images]
        return dict(processor(squares, return_tensors="pt"))

    def features(self, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        out = self.model.model.get_image_features(
            pixels["pixel_values"],
            vision_feature_layer=self.model.config.vision_feature_layer,
            vision_feature_select_strategy=self.model.config.vision_feature_select_strategy,
            output_hidden_states=True,
        )
        return torch.cat(list(out.pooler_output)), out.last_hidden_state[:, 0]

    def _image_positions(self, start: int, size: tuple[int, int]) -> list[Position]:
        rows, columns = self.grid(size)
        return [(n, n, n) for n in range(start, start + rows * columns)]

    def position_ids(self, positions: Int[Tensor, "3 B L"]) -> Int[Tensor, "B L"]:
        return positions[0]


class TrainingQwen(TrainingFamily):
    """Qwen2.5-VL: one token for each 28 x 28 pixels, with rows and columns in its positions."""

    family = QWEN2_5_VL

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.side = self.family.pixel_side(model.config)

    @classmethod
    def untrained(cls, sizes: Sizes, texts: Sequence[str], seed: int) -> TrainingFamily:
        ends = ("<|im_end|>", "<|endoftext|>")
        tokenizer = train_tokenizer(
            QWEN_SPECIALS, bos=None, eos=ends[0], pad=ends[1], unk=None, texts=texts, words=tuple(CHINESE.values())
        )
        return cls(*qwen2_5_vl_model(tokenizer, sizes, seed))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        assert not any(side % self.side for side in size), size
        return size[1] // self.side, size[0] // self.side

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        left, top, right, bottom = (side / self.side for side in box)
        return left, top, right, bottom

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def features(self, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        out = self.model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        return torch.cat(list(out.pooler_output)), None

    def _image_positions(self, start: int, size: tuple[int, int]) -> list[Position]:
        rows, columns = self.grid(size)
        return [(start, start + row, start + column) for row in range(rows) for column in range(columns)]

    def position_ids(self, positions: Int[Tensor, "3 B L"]) -> Int[Tensor, "3 B L"]:
        return positions

    def end_tokens(self) -> list[int]:
        return [*super().end_tokens(), self.tokenizer.pad_token_id]


FAMILIES: dict[str, type[TrainingFamily]] = {kind.family.model_type: kind for kind in (TrainingLlava, TrainingQwen)}
"""By ``config.model_type``."""


def take_encoder(family: TrainingFamily, folder: Path) -> None:
    """Copy the vision encoder and the projector of the model in `folder` to `family`.

    Raises:
        OSError: there is no model in `folder`.
        ValueError: its vision encoder is of another architecture or size.
    """
    weights = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    encoder = {name: value for name, value in weights.items() if re.search(r"vision_tower|visual\.|projector", name)}
    own = family.model.state_dict()
    if strange := [name for name, tensor in encoder.items() if name not in own or own[name].shape != tensor.shape]:
        raise ValueError(
            f"the vision encoder in {folder} is not one of {family.family.model_type} in this size: it has {strange[0]}"
        )
    family.model.load_state_dict(encoder, strict=False)


def started_family(folder: Path) -> TrainingFamily:
    """A model to continue training from: the one in `folder`, in float32, with its tokenizer."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    return FAMILIES[model.config.model_type](model, processor)


def new_family(name: str, sizes: Sizes, texts: Sequence[str], seed: int) -> TrainingFamily:
    """An untrained model of a family in `FAMILIES`, with a tokenizer trained on `texts`."""
    # Written words must be spelled: no token may contain two capitals or two digits.
    family = FAMILIES[name].untrained(sizes, [re.sub(r"[A-Z]{2,}|\d", " ", text) for text in texts], seed)
    _share_embeddings(family)
    return family


@torch.no_grad()
def _share_embeddings(family: TrainingFamily) -> None:
    """Initialise the tokens of one word with the same embedding: after a space, at an answer's start and in Chinese.

    In a trained model these embeddings are near each other. Without this, a patch and the word for it start unrelated,
    and the model finds colours long before it can name them.
    """
    embedding = family.model.get_input_embeddings().weight
    for english, chinese in CHINESE.items():
        embedding[family.tokenizer.convert_tokens_to_ids(chinese)] = embedding[family.word(english)]
    for token in range(len(family.tokenizer)):
        text = family.tokenizer.decode([token])
        if text.startswith(" ") and len(same := family.tokenizer.encode(text[1:], add_special_tokens=False)) == 1:
            embedding[same[0]] = embedding[token]
