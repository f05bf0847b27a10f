"""Names of transformers that this package uses beyond the documented interface.

`LIBRARY` lists all of them. The functions in this file are for names that have moved: the keyword of a layer's cache was
``past_key_values`` until 5.23 and is ``cache`` since 5.24; outputs hold it under the same name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

from lmms_prune.compat.names import Library, PrivateNames

CACHE_NAMES = ("cache", "past_key_values")
"""The newest name first. Callers may use an old name as long as the library translates it."""
# Attention kernels of CLIP that add a mask of numbers to the logits.
_TAKES_A_MASK = ("sdpa", "eager")


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among a call's keyword arguments, under any of its names; None if there is none."""
    return next((arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None), None)


def filled_cache(output: Any) -> Any:
    """The cache that a model's output holds; None if it holds none."""
    return next((getattr(output, name) for name in CACHE_NAMES if hasattr(output, name)), None)


def with_cache(module: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument that passes `cache` to a layer, a decoder or a whole model."""
    return {next(name for name in CACHE_NAMES if name in _parameters(_forward(module))): cache}


def named(module: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, positional ones included."""
    return {**dict(zip(_parameters(_forward(module)), args, strict=False)), **kwargs}


def generation_settings(model: Any, arguments: Mapping[str, Any], knows: Callable[[str], bool]) -> dict[str, Any]:
    """The settings of a call of ``model.generate``: its arguments override its configuration, which overrides the checkpoint's.

    Args:
        model: the model.
        arguments: of the call, by name.
        knows: whether a name of the checkpoint's configuration is used; others are ignored (it may contain any names).
    """
    defaults = {name: value for name, value in vars(model.generation_config).items() if not name.startswith("_")}
    configuration = arguments.get("generation_config")
    passed = {} if configuration is None else vars(configuration)
    differing = {k: v for k, v in passed.items() if v is not None and not k.startswith("_") and v != defaults.get(k)}
    return {**{name: value for name, value in defaults.items() if knows(name)}, **differing, **arguments}


def named_for_generate(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of ``model.generate`` by name, positional ones included."""
    return {**dict(zip(_parameters(type(model).generate), args, strict=False)), **kwargs}


def watch_cache(cache: Any, methods: tuple[str, ...], watcher: Callable[[str], None]) -> None:
    """Call `watcher` with the method's name before each of a cache's `methods` runs; also for copies of the cache.

    The object's class is replaced by a subclass of the same name. A method set on the object itself would refer to the
    object, so that only the collector of cycles could free the cache's gigabytes.
    """
    kind: Any = type(cache)
    cache.__class__ = kind if hasattr(kind, "watched_methods") else _watched_class(kind, methods)
    cache.watcher = watcher


@lru_cache(maxsize=8)
def _watched_class(kind: Any, methods: tuple[str, ...]) -> type:
    def watched(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.watcher(name)
            return getattr(kind, name)(self, *args, **kwargs)

        return call

    return type(kind.__name__, (kind,), {"watched_methods": methods, **{name: watched(name) for name in methods}})


def layer_keys(cache: Any, layer: int) -> Any:
    """The keys (B, H_kv, L, d) that a layer's cache holds."""
    return cache.layers[layer].keys


def cached_lengths(cache: Any) -> list[int]:
    """Tokens that each layer of a cache holds, padding included."""
    return [layer.keys.shape[-2] for layer in cache.layers]


def attend(attention: Any, query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    """The attention of a CLIP block by the kernel that its model runs with, before the output projection.

    Args:
        attention: the block's attention module.
        query, key, value: (B, H, n, d).
        mask: additive, (B, 1, 1, n). FlashAttention takes none; torch's fused kernel replaces it.

    Returns:
        the mixed values (B, n, H, d).
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kernel = attention.config._attn_implementation
    if mask is not None and kernel not in _TAKES_A_MASK:
        kernel = "sdpa"
    eager = import_module(type(attention).__module__).eager_attention_forward
    run = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager)
    return run(attention, query, key, value, mask, scaling=query.shape[-1] ** -0.5, dropout=0.0)[0]


def _forward(module: Any) -> Callable[..., Any]:
    # The class's forward: accelerate replaces that of a module which is spread over devices.
    return type(module).forward


@lru_cache(maxsize=64)
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(name for name in inspect.signature(forward).parameters if name != "self")


@cache
def _smallest(model_type: str) -> Any:
    """A model of the smallest size without weights, whose modules are owners in the table."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    text: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"num_key_value_heads": 2, "vocab_size": 32, "bos_token_id": 1, "eos_token_id": 2}
    if model_type in ("llava", "llava_next"):
        vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
        text["model_type"] = "llama"
    else:
        vision = {"depth": 1, "hidden_size": 16, "num_heads": 2}
        own = {"embed_dim": 16} if model_type == "qwen2_vl" else {"intermediate_size": 16, "out_hidden_size": 16}
        vision |= own | ({"deepstack_visual_indexes": [0]} if model_type == "qwen3_vl" else {})
        text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


_LLAMA = "transformers.models.llama.modeling_llama"
_LLAVA = "transformers.models.llava.modeling_llava"
_NEXT = "transformers.models.llava_next.modeling_llava_next"
_QWEN = "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl"
_QWEN2 = "transformers.models.qwen2_vl.modeling_qwen2_vl"
_QWEN3 = "transformers.models.qwen3_vl.modeling_qwen3_vl"
_QWENS = (
    (_QWEN, "Qwen2_5_VL"),
    (_QWEN2, "Qwen2VL"),
    (_QWEN3, "Qwen3VL"),
)  # module and the beginning of its classes' names
_CACHES = "transformers.cache_utils"
_MOVED = "5.17 ('cache': 5.24)"
_LAYER = ("hidden_states", "attention_mask", "position_ids", "cache|past_key_values", "position_embeddings")
_PASSED_ON = "arguments that the pruning hooks pass to a decoder layer"
_SEEN = "finding token ids, positions, mask and cache of a call"
_PROJECTIONS = ("q_proj", "k_proj", "head_dim", "scaling")
_RECOMPUTED = "queries and keys that methods recompute"
_ENCODER = "signals of the vision encoder"
_RUN_AGAIN = "running the vision encoder's blocks again"
_ADDED = "adding DeepStack's features to the kept tokens"
_OUTPUT = "reading the cache that a call has filled"

LIBRARY = Library(
    "transformers",
    "lmms_prune/compat/transformers.py",
    (
        PrivateNames(f"{_LLAMA}:LlamaDecoderLayer.forward", "parameters", _LAYER, _MOVED, _PASSED_ON),
        *(
            PrivateNames(f"{module}:{name}.forward", "parameters", _LAYER, _MOVED, _PASSED_ON)
            for module, name in (
                (_QWEN, "Qwen2_5_VLDecoderLayer"),
                (_QWEN2, "Qwen2VLDecoderLayer"),
                (_QWEN3, "Qwen3VLTextDecoderLayer"),
            )
        ),
        *(
            PrivateNames(f"{decoder}.forward", "parameters", (*_LAYER[1:4], "inputs_embeds"), _MOVED, _SEEN)
            for decoder in (f"{_LLAMA}:LlamaModel", *(f"{module}:{name}TextModel" for module, name in _QWENS))
        ),
        *(
            PrivateNames(f"{model}.forward", "parameters", ("input_ids", "pixel_values", *_LAYER[1:4]), _MOVED, _SEEN)
            for model in (
                f"{_LLAVA}:LlavaModel",
                f"{_NEXT}:LlavaNextModel",
                *(f"{module}:{name}Model" for module, name in _QWENS),
            )
        ),
        *(
            PrivateNames(
                f"{module}:{name}Model.forward", "parameters", ("image_grid_thw", "mm_token_type_ids"), "5.17", _SEEN
            )
            for module, name in _QWENS
        ),
        *(
            PrivateNames(f"{model}.forward", "parameters", ("cache|past_key_values", "logits_to_keep"), _MOVED, _SEEN)
            for model in (
                f"{_LLAVA}:LlavaForConditionalGeneration",
                f"{_NEXT}:LlavaNextForConditionalGeneration",
                *(f"{module}:{name}ForConditionalGeneration" for module, name in _QWENS),
            )
        ),
        PrivateNames(
            "transformers.modeling_outputs:BaseModelOutputWithPast",
            "fields",
            ("cache|past_key_values",),
            _MOVED,
            _OUTPUT,
        ),
        PrivateNames(
            "transformers.generation:GenerateDecoderOnlyOutput", "fields", ("cache|past_key_values",), _MOVED, _OUTPUT
        ),
        PrivateNames(
            f"{_CACHES}:DynamicCache",
            "attributes",
            ("get_seq_length", "update", "reorder_cache", "crop", "batch_repeat_interleave", "batch_select_indices"),
            "5.17",
            "telling a decode step from a prefill, and refusing methods that reorder a pruned cache",
        ),
        PrivateNames(
            "transformers:GenerationMixin.generate",
            "parameters",
            ("inputs", "generation_config"),
            "5.17",
            "refusing arguments of generate()",
        ),
        PrivateNames(
            "llava:",
            "attributes",
            ("generation_config",),
            "5.17",
            "refusing settings of a checkpoint's generation configuration",
        ),
        PrivateNames(
            f"{_CACHES}:Cache.__init__", "parameters", ("layers",), "5.17", "reading keys and values of each layer"
        ),
        PrivateNames(
            f"{_CACHES}:DynamicLayer.update", "leading parameters", ("key_states", "value_states"), "5.17", _OUTPUT
        ),
        PrivateNames(f"{_LLAMA}:LlamaModel", "attributes", ("get_input_embeddings",), "5.17", "information's output"),
        *(
            row
            for model, encoder in (
                ("llava", "vision_tower"),
                ("llava_next", "vision_tower"),
                ("qwen2_5_vl", "visual"),
                ("qwen2_vl", "visual"),
                ("qwen3_vl", "visual"),
            )
            for row in (
                PrivateNames(
                    f"{model}:", "attributes", ("model", "config", "generate", "get_output_embeddings"), "5.17", _SEEN
                ),
                PrivateNames(
                    f"{model}:model", "attributes", ("language_model", encoder), "5.17", "finding decoder and encoder"
                ),
                PrivateNames(
                    f"{model}:model.language_model", "attributes", ("layers", "norm", "rotary_emb"), "5.17", _PASSED_ON
                ),
                PrivateNames(
                    f"{model}:model.language_model.config",
                    "attributes",
                    ("_attn_implementation",),
                    "5.17",
                    "the mask's form",
                ),
                PrivateNames(
                    f"{model}:model.language_model.layers.0",
                    "attributes",
                    ("self_attn", "input_layernorm"),
                    "5.17",
                    _RECOMPUTED,
                ),
                PrivateNames(
                    f"{model}:model.language_model.layers.0.self_attn", "attributes", _PROJECTIONS, "5.17", _RECOMPUTED
                ),
            )
        ),
        PrivateNames(f"{_NEXT}:LlavaNextModel.forward", "parameters", ("image_sizes",), "5.17", _SEEN),
        PrivateNames(
            f"{_NEXT}:LlavaNextModel.get_image_features",
            "parameters",
            ("pixel_values", "image_sizes"),
            "5.17",
            "noting the sizes of images that generate() encodes beforehand",
        ),
        PrivateNames(
            f"{_NEXT}:LlavaNextModel.pack_image_features",
            "leading parameters",
            ("image_features", "image_sizes", "vision_feature_select_strategy", "image_newline"),
            "5.17",
            "keeping the padding of tiles (unpad=false)",
        ),
        PrivateNames(
            "transformers.models.llava_next.processing_llava_next:LlavaNextProcessor._get_unpadded_features",
            "leading parameters",
            ("height", "width", "patches_height", "patches_width", "scale_height", "scale_width"),
            "5.17",
            "keeping the padding of tiles (unpad=false)",
        ),
        PrivateNames("llava_next:model.multi_modal_projector", "attributes", ("linear_1",), "5.17", _ENCODER),
        PrivateNames("llava_next:model.vision_tower", "attributes", ("vision_model|encoder",), "5.17", _ENCODER),
        PrivateNames("llava:model.multi_modal_projector", "attributes", ("linear_1",), "5.17", _ENCODER),
        PrivateNames("llava:model.vision_tower", "attributes", ("vision_model|encoder",), "5.17", _ENCODER),
        PrivateNames(
            "transformers.models.clip.modeling_clip:CLIPEncoderLayer.forward",
            "leading parameters",
            ("hidden_states", "attention_mask"),
            "5.17",
            _ENCODER,
        ),
        PrivateNames(
            "transformers.models.clip.modeling_clip:eager_attention_forward",
            "leading parameters",
            ("module", "query", "key", "value", "attention_mask", "scaling", "dropout"),
            "5.17",
            _RUN_AGAIN,
        ),
        PrivateNames(
            "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS", "attributes", ("get_interface",), "5.17", _RUN_AGAIN
        ),
        *(
            PrivateNames(f"{model}:model.visual{module}", "attributes", names, "5.17", _ENCODER)
            for model in ("qwen2_5_vl", "qwen2_vl", "qwen3_vl")
            for module, names in (
                ("", ("blocks", "patch_embed", "merger")),
                (".blocks.0", ("norm1", "attn")),
                (".blocks.0.attn", ("qkv",)),
            )
        ),
        *(
            PrivateNames(
                f"{module}:{name}VisionBlock.forward",
                "parameters",
                ("hidden_states", "cu_seqlens", "position_embeddings"),
                "5.17",
                _ENCODER,
            )
            for module, name in _QWENS
        ),
        *(
            PrivateNames(f"{encoder}.forward", "leading parameters", ("hidden_states", "grid_thw"), "5.17", _ENCODER)
            for encoder in (
                f"{_QWEN}:Qwen2_5_VisionTransformerPretrainedModel",
                f"{_QWEN2}:Qwen2VisionTransformerPretrainedModel",
                f"{_QWEN3}:Qwen3VLVisionModel",
            )
        ),
        PrivateNames(
            "qwen3_vl:model.language_model.layers.0.self_attn", "attributes", ("q_norm", "k_norm"), "5.17", _RECOMPUTED
        ),
        PrivateNames(
            f"{_QWEN3}:Qwen3VLTextModel.forward",
            "parameters",
            ("visual_pos_masks", "deepstack_visual_embeds"),
            "5.17",
            _ADDED,
        ),
        PrivateNames(
            f"{_QWEN3}:BaseModelOutputWithDeepstackFeatures", "fields", ("deepstack_features",), "5.17", _ADDED
        ),
    ),
    _smallest,
)
