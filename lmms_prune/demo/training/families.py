"""What differs between the two families in training: sizes, pixels, visual grids and positions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedTokenizerFast

from lmms_prune.demo.checkpoints import PATCH, Sizes, llava_model, qwen2_5_vl_model
from lmms_prune.demo.language import LLAVA_SPECIALS, QWEN_SPECIALS, train_tokenizer
from lmms_prune.demo.questions import CHINESE
from lmms_prune.models.images import pad_to_square

Place = tuple[int, int, int]


class Family:
    """A model to be trained, with its tokenizer and processor."""

    name: str
    mrope: bool

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.tokenizer: PreTrainedTokenizerFast = processor.tokenizer
        self.image_id: int = model.config.image_token_id
        self._head, self._tail = self._around()
        self.question = lru_cache(maxsize=4096)(self._question)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image of (width, height) pixels."""
        raise NotImplementedError

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        """A box in pixels of the image, in visual tokens."""
        raise NotImplementedError

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        """What the vision encoder takes."""
        raise NotImplementedError

    def features(self, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Visual tokens of all images (V, D) in the decoder's space, and each image's class state (I, d) if any."""
        raise NotImplementedError

    def _image_places(self, start: int, size: tuple[int, int]) -> list[Place]:
        raise NotImplementedError

    @property
    def decoder(self) -> nn.Module:
        """Takes embeddings, gives the last hidden states."""
        return self.model.model.language_model

    def prefix(self, size: tuple[int, int] | None) -> tuple[list[int], list[Place]]:
        """Token ids and positions up to an image's end; without an image, what every text begins with."""
        begin = self.tokenizer.encode("")
        if size is None:
            return begin, [(n,) * 3 for n in range(len(begin))]
        before = self.tokenizer.encode(self._head)
        image = self._image_places(len(before), size)
        places: list[Place] = [(n, n, n) for n in range(len(before))]
        return before + [self.image_id] * len(image), places + image

    def word(self, label: str) -> int:
        """The token that a dense label's name is written with: the word as in a question, or the letter."""
        words = {"board": " sign", "bar": " chart"}
        text = label if len(label) == 1 else words.get(label, f" {label.lower()}")
        return self.tokenizer.encode(text, add_special_tokens=False)[-1]

    def _around(self) -> tuple[str, str]:
        """The prompt before the image token, and between it and the question."""
        head, rest = self._rendered("QUESTION", with_image=True).split(self.tokenizer.decode([self.image_id]))
        return head, rest.split("QUESTION")[0]

    def _question(self, prompt: str, with_image: bool) -> list[int]:
        text = self._rendered(prompt, with_image)
        if with_image:
            text = text[text.index(token := self.tokenizer.decode([self.image_id])) + len(token) :]
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _rendered(self, prompt: str, with_image: bool) -> str:
        content = [{"type": "image"}] * with_image + [{"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


class Llava(Family):
    """LLaVA-1.5: every image becomes the same square."""

    name = "llava"
    mrope = False

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__(model, processor)
        self.cells = model.config.vision_config.image_size // PATCH

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        return self.cells, self.cells

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        side = max(size)
        across, down = (side - size[0]) // 2, (side - size[1]) // 2
        left, top, right, bottom = box
        cell = side / self.cells
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

    def _image_places(self, start: int, size: tuple[int, int]) -> list[Place]:
        return [(n, n, n) for n in range(start, start + self.cells**2)]


class Qwen(Family):
    """Qwen2.5-VL: a token for each 28 x 28 pixels, rows and columns in the positions."""

    name = "qwen2_5_vl"
    mrope = True

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        assert not any(side % (2 * PATCH) for side in size), size
        return size[1] // (2 * PATCH), size[0] // (2 * PATCH)

    def to_grid(self, size: tuple[int, int], box: Sequence[int | float]) -> tuple[float, float, float, float]:
        left, top, right, bottom = (side / (2 * PATCH) for side in box)
        return left, top, right, bottom

    def pixels(self, images: list[Image.Image]) -> dict[str, Tensor]:
        return dict(self.processor.image_processor(images, return_tensors="pt"))

    def features(self, pixels: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        out = self.model.model.get_image_features(pixels["pixel_values"], pixels["image_grid_thw"])
        return torch.cat(list(out.pooler_output)), None

    def _image_places(self, start: int, size: tuple[int, int]) -> list[Place]:
        rows, columns = self.grid(size)
        return [(start, start + row, start + column) for row in range(rows) for column in range(columns)]


def take_tower(family: Family, folder: Path) -> None:
    """Put the vision encoder and the projector of the model in `folder` into `family`.

    Raises:
        OSError: there is no model in `folder`.
        ValueError: it has another tower.
    """
    weights = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    seen = {name: value for name, value in weights.items() if re.search(r"vision_tower|visual\.|projector", name)}
    own = family.model.state_dict()
    if strange := [name for name, tensor in seen.items() if name not in own or own[name].shape != tensor.shape]:
        raise ValueError(f"the tower in {folder} is not one of {family.name} in this size: it has {strange[0]}")
    family.model.load_state_dict(seen, strict=False)


def started_family(folder: Path) -> Family:
    """A model to be trained on, as `folder` has it, in float32, with its own tokenizer."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(folder)
    return (Llava if model.config.model_type == "llava" else Qwen)(model, processor)


def new_family(name: str, sizes: Sizes, texts: Sequence[str], seed: int) -> Family:
    """An untrained model of `name`, "llava" or "qwen2_5_vl", with a tokenizer trained on `texts`."""
    # Written words are spelled: no two capitals and no two digits ever share a token.
    spelled = [re.sub(r"[A-Z]{2,}|\d", " ", text) for text in texts]
    words = tuple(CHINESE.values())
    if name == "llava":
        specials = (*LLAVA_SPECIALS, "USER:", "ASSISTANT:")
        tokenizer = train_tokenizer(
            specials, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>", texts=spelled, words=words
        )
        family: Family = Llava(*llava_model(tokenizer, sizes, seed))
    else:
        ends = ("<|im_end|>", "<|endoftext|>")
        tokenizer = train_tokenizer(
            QWEN_SPECIALS, bos=None, eos=ends[0], pad=ends[1], unk=None, texts=spelled, words=words
        )
        family = Qwen(*qwen2_5_vl_model(tokenizer, sizes, seed))
    _draw_words_alike(family)
    return family


@torch.no_grad()
def _draw_words_alike(family: Family) -> None:
    """Give a word after a space, the same word at the beginning of an answer and in Chinese one embedding to start with.

    In a trained model they are near each other. Else what a patch looks like and what is said of it have nothing in
    common at first, and colours are found long before they can be named.
    """
    embedding = family.model.get_input_embeddings().weight
    for english, chinese in CHINESE.items():
        embedding[family.tokenizer.convert_tokens_to_ids(chinese)] = embedding[family.word(english)]
    for token in range(len(family.tokenizer)):
        text = family.tokenizer.decode([token])
        if text.startswith(" ") and len(same := family.tokenizer.encode(text[1:], add_special_tokens=False)) == 1:
            embedding[same[0]] = embedding[token]
