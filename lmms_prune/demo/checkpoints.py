"""Builds LLaVA-1.5, LLaVA-NeXT, Qwen2-VL, Qwen2.5-VL and Qwen3-VL checkpoints with random weights, small enough for a CPU, and
with real processors.

Their answers are nonsense, but depend on the image and the question, and use words that benchmarks can score.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from lmms_prune.demo.folders import new_folder
from lmms_prune.demo.language import (
    ANSWERS,
    LIKELY,
    LLAVA_SPECIALS,
    LLAVA_TEMPLATE,
    QWEN_SPECIALS,
    QWEN_TEMPLATE,
    train_tokenizer,
)

PATCH = 14  # side in pixels, for all vision encoders but Qwen3-VL's
# Factors on the variance-preserving scale of `_draw`, for matrices whose names contain these parts.
GAINS = {"q_proj": 2.0, "k_proj": 2.0, "qkv": 1.5, "v_proj": 1.5, "o_proj": 1.5, "lm_head": 3.0}


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model. `mrope_section` (its sum is half a head) and `kv_heads` are for Qwen, `image_size` for LLaVA."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vision_layers: int
    vision_hidden: int
    vision_intermediate: int
    vision_heads: int = 4
    image_size: int = 112
    rope_theta: float = 10_000.0
    mrope_section: tuple[int, ...] = ()
    max_pixels: int = 256 * 28 * 28
    tied: bool = False  # whether the output matrix is the embedding matrix


def llava_model(
    tokenizer: PreTrainedTokenizerFast, sizes: Sizes, seed: int
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained LLaVA-1.5 in float32, with weights drawn from `seed`, and its processor."""
    return _to_train(LlavaForConditionalGeneration, _llava_config(tokenizer, sizes), seed), _llava_processor(
        tokenizer, sizes.image_size
    )


def qwen2_5_vl_model(
    tokenizer: PreTrainedTokenizerFast, sizes: Sizes, seed: int
) -> tuple[Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor]:
    """An untrained Qwen2.5-VL in float32, with weights drawn from `seed`, and its processor."""
    config = Qwen2_5_VLConfig(**_qwen_config(tokenizer, sizes, _windowed_encoder(sizes)))
    model = _to_train(Qwen2_5_VLForConditionalGeneration, config, seed)
    return model, Qwen2_5_VLProcessor(**_qwen_processor(tokenizer, sizes.max_pixels))


def build_llava(
    folder: str | os.PathLike[str],
    *,
    layers: int = 8,
    image_size: int = 112,
    hidden: int = 64,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    template: str = "jinja",
) -> Path:
    """Write a LLaVA-1.5 checkpoint with its processor to `folder`, which must be new, and return its path.

    An image gives (image_size / 14)² visual tokens: 64 at the default 112 pixels, 576 at 336.

    Args:
        folder: the folder to write; it appears only when complete.
        layers: decoder layers.
        image_size: side of the square centre crop, in pixels, a multiple of 14.
        hidden: width of the decoder, a multiple of `heads`.
        heads: attention heads; each has its own keys.
        dtype: dtype of the stored weights; the random draws are the same for all dtypes.
        seed: the seed of all weights; the global random state is neither read nor changed.
        template: "jinja" saves the chat template as `chat_template.jinja`, "json" as the older `chat_template.json`.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: a size does not divide, or `template` is unknown.
    """
    _check(image_size % PATCH == 0, f"image_size is {image_size}; it must be a multiple of {PATCH}")
    _check(hidden % heads == 0, f"hidden is {hidden}; it must be a multiple of heads, {heads}")
    _check(template in ("jinja", "json"), f"template is {template!r}; it must be 'jinja' or 'json'")
    tokenizer = train_tokenizer(LLAVA_SPECIALS, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    sizes = Sizes(layers, hidden, heads, heads, 2 * hidden, 3, hidden, 2 * hidden, heads, image_size)
    config, processor = _llava_config(tokenizer, sizes), _llava_processor(tokenizer, image_size)
    model = _random_model(LlavaForConditionalGeneration, config, dtype, seed)
    with new_folder(folder) as partial:
        _save(partial, model, processor, [tokenizer.eos_token_id])
        if template == "json":
            _template_as_json(partial)
    return Path(folder)


def build_llava_next(
    folder: str | os.PathLike[str],
    *,
    layers: int = 8,
    image_size: int = 56,
    hidden: int = 64,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Path:
    """Write a LLaVA-NeXT checkpoint with its processor to `folder`, which must be new, and return its path.

    The tiles are put together as in the published checkpoints: 2 x 2, 1 x 2, 2 x 1, 1 x 3 or 3 x 1. At the default 56
    pixels a tile has 16 patches, and an image at most 88 visual tokens.

    Args:
        folder: the folder to write; it appears only when complete.
        layers: decoder layers.
        image_size: side of a tile, in pixels, a multiple of 14.
        hidden: width of the decoder, a multiple of `heads`.
        heads: attention heads; each has its own keys.
        dtype: dtype of the stored weights; the random draws are the same for all dtypes.
        seed: the seed of all weights; the global random state is neither read nor changed.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: a size does not divide.
    """
    _check(image_size % PATCH == 0, f"image_size is {image_size}; it must be a multiple of {PATCH}")
    _check(hidden % heads == 0, f"hidden is {hidden}; it must be a multiple of heads, {heads}")
    tokenizer = train_tokenizer(LLAVA_SPECIALS, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    sizes = Sizes(layers, hidden, heads, heads, 2 * hidden, 3, hidden, 2 * hidden, heads, image_size)
    pinpoints = [[image_size * down, image_size * across] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    values = _llava_config(tokenizer, sizes).to_dict()
    names = ("vision_config", "text_config", "vision_feature_layer", "vision_feature_select_strategy")
    config = LlavaNextConfig(
        **{name: values[name] for name in names},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    crop = {"height": image_size, "width": image_size}
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": image_size}, crop_size=crop, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    model = _random_model(LlavaNextForConditionalGeneration, config, dtype, seed)
    with new_folder(folder) as partial:
        _save(partial, model, processor, [tokenizer.eos_token_id])
    return Path(folder)


def build_qwen2_5_vl(
    folder: str | os.PathLike[str],
    *,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_pixels: int = 256 * 28 * 28,
) -> Path:
    """Write a Qwen2.5-VL checkpoint with its processor to `folder`, which must be new, and return its path.

    An image gives about one visual token per 28 x 28 pixels, after resizing to at least 4 tokens' and at most `max_pixels`
    pixels.

    Args:
        folder: the folder to write; it appears only when complete.
        layers: decoder layers.
        hidden: width of the decoder; `hidden / heads` must be a multiple of 4, for the three rotary sections.
        heads: query heads, a multiple of `kv_heads`.
        kv_heads: key and value heads.
        depth: blocks of the vision encoder, at least 2; the middle and the last use full attention, the others windows.
        dtype: dtype of the stored weights; the random draws are the same for all dtypes.
        seed: the seed of all weights; the global random state is neither read nor changed.
        max_pixels: the processor shrinks larger images to this many pixels.

    Raises:
        FileExistsError: `folder` exists.
        ValueError: a size does not divide, or `depth` is below 2.
    """
    _check(depth >= 2, f"depth is {depth}; it must be at least 2")
    sizes = _qwen_sizes(layers, hidden, heads, kv_heads, depth)
    kinds = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
    return _build_qwen(folder, kinds, sizes, _windowed_encoder(sizes), max_pixels, dtype, seed)


def build_qwen2_vl(
    folder: str | os.PathLike[str],
    *,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 4,
    max_pixels: int = 256 * 28 * 28,
) -> Path:
    """Write a Qwen2-VL checkpoint with its processor to `folder`, which must be new, and return its path.

    As `build_qwen2_5_vl`, arguments and errors included, but for the vision encoder: all `depth` blocks, at least 1, use
    full attention. (With seed 0 all pictures would get the same first answer.)
    """
    _check(depth >= 1, f"depth is {depth}; it must be at least 1")
    sizes = _qwen_sizes(layers, hidden, heads, kv_heads, depth)
    kinds = (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
    encoder = {"embed_dim": sizes.vision_hidden, "hidden_size": hidden, "mlp_ratio": 2}
    return _build_qwen(folder, kinds, sizes, encoder, max_pixels, dtype, seed)


def build_qwen3_vl(
    folder: str | os.PathLike[str],
    *,
    layers: int = 8,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    depth: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_pixels: int = 256 * 32 * 32,
) -> Path:
    """Write a Qwen3-VL checkpoint with its processor to `folder`, which must be new, and return its path.

    As `build_qwen2_vl`, arguments and errors included, but a visual token is 32 x 32 pixels, and the features of the first
    min(`depth`, `layers`, 3) blocks of the vision encoder are added after as many decoder layers.
    """
    _check(depth >= 1, f"depth is {depth}; it must be at least 1")
    sizes = _qwen_sizes(layers, hidden, heads, kv_heads, depth)
    encoder = {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "out_hidden_size": hidden,
        "num_position_embeddings": 64,
        "patch_size": 16,
        "deepstack_visual_indexes": list(range(min(depth, layers, 3))),
    }
    kinds = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
    return _build_qwen(folder, kinds, sizes, encoder, max_pixels, dtype, seed)


def _build_qwen(
    folder: str | os.PathLike[str],
    kinds: tuple[Any, Any, Any],
    sizes: Sizes,
    encoder: dict[str, Any],
    max_pixels: int,
    dtype: torch.dtype,
    seed: int,
) -> Path:
    """Write a random checkpoint of one of Qwen's models; `kinds` are its classes of configuration, model and processor."""
    config_class, model_class, processor_class = kinds
    tokenizer = train_tokenizer(QWEN_SPECIALS, bos=None, eos="<|im_end|>", pad="<|endoftext|>", unk=None)
    config = config_class(**_qwen_config(tokenizer, sizes, encoder))
    model = _random_model(model_class, config, dtype, seed)
    processor = processor_class(**_qwen_processor(tokenizer, max_pixels, config.vision_config.patch_size))
    with new_folder(folder) as partial:
        _save(partial, model, processor, [tokenizer.eos_token_id, tokenizer.pad_token_id])
    return Path(folder)


def _qwen_sizes(layers: int, hidden: int, heads: int, kv_heads: int, depth: int) -> Sizes:
    """The sizes of a random Qwen model.

    Raises:
        ValueError: a size does not divide.
    """
    _check(hidden % (4 * heads) == 0, f"hidden is {hidden}; it must be a multiple of 4 x heads, {4 * heads}")
    _check(heads % kv_heads == 0, f"heads is {heads}; it must be a multiple of kv_heads, {kv_heads}")
    half = hidden // heads // 2
    sections = (half // 4, (half - half // 4) // 2)
    return Sizes(
        *(layers, hidden, heads, kv_heads, 2 * hidden, depth, 64, 128),
        rope_theta=1e6,
        mrope_section=(*sections, half - sum(sections)),
    )


def _check(holds: bool, message: str) -> None:
    """Raise ValueError with `message` unless `holds`."""
    if not holds:
        raise ValueError(message)


def _llava_processor(tokenizer: PreTrainedTokenizerFast, image_size: int) -> LlavaProcessor:
    crop = {"height": image_size, "width": image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def _qwen_processor(tokenizer: PreTrainedTokenizerFast, max_pixels: int, patch: int = PATCH) -> dict[str, Any]:
    """The parts of the processor of any of Qwen's models; `patch` is the side of a patch in pixels."""
    pixels = {"patch_size": patch, "min_pixels": 4 * (2 * patch) ** 2, "max_pixels": max_pixels}
    scale = {} if patch == PATCH else {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    videos = Qwen2VLVideoProcessor(**pixels) if patch == PATCH else Qwen3VLVideoProcessor(patch_size=patch)
    return {
        "image_processor": Qwen2VLImageProcessor(**pixels, **scale),
        "tokenizer": tokenizer,
        "video_processor": videos,
        "chat_template": QWEN_TEMPLATE,
    }


def _llava_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=sizes.vision_hidden,
        intermediate_size=sizes.vision_intermediate,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.vision_heads,
        image_size=sizes.image_size,
        patch_size=PATCH,
        projection_dim=sizes.vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        tie_word_embeddings=sizes.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=text.to_dict(),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(sizes.image_size // PATCH) ** 2,
        tie_word_embeddings=sizes.tied,
    )


def _windowed_encoder(sizes: Sizes) -> dict[str, Any]:
    """The values of Qwen2.5-VL's vision configuration that Qwen2-VL's does not have."""
    return {
        "hidden_size": sizes.vision_hidden,
        "intermediate_size": sizes.vision_intermediate,
        "out_hidden_size": sizes.hidden,
        "window_size": 112,
        "fullatt_block_indexes": sorted({(sizes.vision_layers - 1) // 2, sizes.vision_layers - 1}),
    }


def _qwen_config(tokenizer: PreTrainedTokenizerFast, sizes: Sizes, encoder: dict[str, Any]) -> dict[str, Any]:
    """The configuration of any of Qwen's models; `encoder` holds what is the vision encoder's own."""
    ids = {special: tokenizer.convert_tokens_to_ids(special) for special in QWEN_SPECIALS}
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta, "mrope_section": list(sizes.mrope_section)}
    return {
        "text_config": {
            "vocab_size": len(tokenizer),
            "hidden_size": sizes.hidden,
            "intermediate_size": sizes.intermediate,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads,
            "num_key_value_heads": sizes.kv_heads,
            "max_position_embeddings": 32768,
            "rope_parameters": rope,
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "tie_word_embeddings": sizes.tied,
            **({"head_dim": sizes.hidden // sizes.heads} if "deepstack_visual_indexes" in encoder else {}),
        },
        "vision_config": {
            "depth": sizes.vision_layers,
            "num_heads": sizes.vision_heads,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            **encoder,
        },
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": sizes.tied,
    }


def _to_train(kind: type[PreTrainedModel], config: PretrainedConfig, seed: int) -> PreTrainedModel:
    """Build a model and draw its parameters for training, at a scale that preserves variances.

    The last matrix of each residual branch is scaled down with the depth, so that the sum of the branches stays bounded.
    """
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    shrink = 1 / math.sqrt(2 * config.get_text_config().num_hidden_layers)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1 and "class_embedding" not in name:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed" in name and "patch" not in name:
                parameter.copy_(noise * (0.15 if config.tie_word_embeddings and "embed_tokens" in name else 0.3))
                continue
            last = any(part in name for part in ("o_proj", "out_proj", "down_proj", "fc2", "attn.proj"))
            parameter.copy_(noise * (shrink if last else 1.0) / math.sqrt(parameter[0].numel()))
        for layer in model.model.language_model.layers:
            _attend_to_similar(layer.self_attn)
    return model


def _attend_to_similar(attention: Any) -> None:
    """Initialise each head to attend to tokens similar to the query's token, and to copy them.

    "Mimetic initialization of self-attention layers", https://arxiv.org/abs/2305.09828: queries get the weights of the
    keys, and the output those of the transposed values. A word then finds the patches that resemble it. Without this, a
    small model needs most of its training to discover it.
    """
    dim = attention.head_dim
    keys, values = (module.weight.unflatten(0, (-1, dim)) for module in (attention.k_proj, attention.v_proj))
    group = attention.q_proj.weight.shape[0] // dim // len(keys)
    attention.q_proj.weight.copy_(keys.repeat_interleave(group, 0).flatten(0, 1))
    attention.o_proj.weight.copy_(0.3 * values.repeat_interleave(group, 0).flatten(0, 1).T)


def _random_model(
    kind: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, seed: int
) -> PreTrainedModel:
    """Build a model and draw all parameters from a separate generator, in the order of their names."""
    with torch.random.fork_rng(devices=[]):
        model = kind(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_draw(name, parameter, generator))
    return model.to(dtype).eval()


def _draw(name: str, parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor:
    """Draw at a scale that keeps activations near one, so that attention is sharp and answers follow the input.

    The library's usual standard deviation of 0.02 would make every layer nearly the identity and every answer the same.
    """
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.ndim == 1:
        return noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    if "embed_tokens" in name or "position_embedding" in name or "pos_embed" in name:
        return noise * (1.0 if "embed_tokens" in name else 0.3)
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return noise * gain / math.sqrt(parameter[0].numel())


def _save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin, eos: list[int]) -> None:
    """Save a model, with generation settings that give short answers from ANSWERS, and its processor."""
    tokenizer = processor.tokenizer
    answers = [tokenizer.encode(word, add_special_tokens=False) for word in ANSWERS]
    assert all(len(answer) == 1 for answer in answers), "each answer must be a single token"
    allowed = {answer[0] for answer in answers} | {eos[0]}
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=bos,
        eos_token_id=eos if len(eos) > 1 else eos[0],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[token for token in range(len(tokenizer)) if token not in allowed],
        # An answer must not be empty, and must end after a few words: random weights would never stop.
        begin_suppress_tokens=eos,
        exponential_decay_length_penalty=(0, 16.0),
        # Most benchmarks ask for yes, no or an option's letter, so these get a bias, but not one that always wins.
        sequence_bias=[[answer, 3.0] for answer, word in zip(answers, ANSWERS, strict=True) if word in LIKELY],
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _template_as_json(folder: Path) -> None:
    """Replace the chat template's file by the older JSON form."""
    jinja = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": jinja.read_text("utf-8")}), "utf-8")
    jinja.unlink()


BUILDERS: dict[str, Callable[..., Path]] = {
    "llava": build_llava,
    "qwen2_5_vl": build_qwen2_5_vl,
    "qwen2_vl": build_qwen2_vl,
    "llava_next": build_llava_next,
    "qwen3_vl": build_qwen3_vl,
}
"""Functions that write a small checkpoint with random weights, by family."""
