"""Every argument with which a model can be run: supported under pruning, irrelevant to it, or refused, with the reason.

The tables cover `forward` of both families (the whole model's and the multimodal one's) and `generate`, in transformers
5.17 to 5.24. A test compares them with the installed version. An argument that no table lists is refused if it is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmms_prune.compat.transformers import CACHE_NAMES


@dataclass(frozen=True)
class Refusal:
    """Why an argument is refused, and the fix; values (or types) in `harmless` pass, and None always does."""

    why: str
    harmless: tuple[Any, ...] = ()

    def passes(self, value: Any) -> bool:
        """Whether `value` is harmless."""
        return any(isinstance(value, kind) if isinstance(kind, type) else value == kind for kind in self.harmless)


@dataclass(frozen=True)
class Calls:
    """The arguments of one kind of call.

    Args:
        name: of the call, for messages.
        supported: arguments that work under pruning as without it.
        irrelevant: arguments without effect on pruning, or without effect unless a refused one is set.
        refused: by the argument's name.
    """

    name: str
    supported: frozenset[str]
    irrelevant: frozenset[str]
    refused: Mapping[str, Refusal] = field(default_factory=dict)

    def knows(self, name: str) -> bool:
        """Whether the table lists the argument."""
        return name in self.supported or name in self.irrelevant or name in self.refused

    def refuses(self, arguments: Mapping[str, Any], defaults: Any = None, more: Iterable[str] = ()) -> str | None:
        """The error message for the first refused argument of a call; None if there is none.

        Args:
            arguments: those that were set, by name.
            defaults: an object whose attributes are the arguments' default values.
            more: further supported arguments: those of the family's images.
        """
        for name, value in arguments.items():
            if value is None or name in self.supported or name in self.irrelevant or name in more:
                continue
            refusal = self.refused.get(name, _UNKNOWN)
            plain = isinstance(value, (bool, int, float, str))
            if plain and (refusal.passes(value) or value == getattr(defaults, name, None)):
                continue
            return f"{self.name}: {name}{f'={value!r}' if plain else ''} is not supported while pruning: {refusal.why}."
        return None


def _names(*groups: str | Iterable[str]) -> frozenset[str]:
    return frozenset(name for group in groups for name in (group.split() if isinstance(group, str) else group))


_UNKNOWN = Refusal("its effect on dropped tokens is not known; leave it out")
_VIDEO = Refusal("video input is not supported while pruning; give images")
_FEATURES = Refusal("methods read it in the model's configuration; set it there")
_PACKED = Refusal("packed sequences are counted by columns that are dropped; give a padded batch")
_BEAMS = Refusal("beam search reorders the pruned cache; use num_beams=1", (1,))
_ASSISTED = Refusal("assisted decoding takes tokens back from the pruned cache; leave it out")
_TWO_PROMPTS = Refusal("guidance runs a second prompt, which would not be pruned in the same way; leave it out", (1,))
_OWN_LOOP = Refusal(
    "a decoding loop other than greedy and sampled decoding may reorder or crop the cache; leave it out"
)
_CONSTRAINED = Refusal("constrained decoding is a beam search, which reorders the pruned cache; leave it out")

FORWARD = Calls(
    "forward",
    supported=_names(
        "input_ids pixel_values attention_mask position_ids image_grid_thw mm_token_type_ids mm_encoder_outputs",
        CACHE_NAMES,
        "use_cache return_dict output_hidden_states output_attentions",
    ),
    # generate() hands its tokenizers on to every forward, which takes no notice of them.
    irrelevant=_names("num_items_in_batch output_router_logits tokenizer assistant_tokenizer"),
    refused={
        "inputs_embeds": Refusal("visual tokens are known by their ids; give input_ids"),
        "labels": Refusal(
            "dropped tokens have no logits to compare them with; compute the loss from the logits of the kept tokens"
        ),
        **dict.fromkeys(("pixel_values_videos", "video_grid_thw", "second_per_grid_ts"), _VIDEO),
        **dict.fromkeys(("vision_feature_layer", "vision_feature_select_strategy", "image_sizes"), _FEATURES),
        **dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"), _PACKED),
        # A number counts from the end of the pruned sequence, so it stays valid.
        "logits_to_keep": Refusal("a dropped token's column is another token's; give how many from the end", (int,)),
        "is_causal": Refusal("the masks of the pruned sequence are causal; leave it out", (True,)),
    },
)

GENERATE = Calls(
    "generate",
    supported=FORWARD.supported - {"use_cache"}
    | _names(
        "inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus streamer",
        "max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample num_return_sequences",
        "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty",
        "encoder_repetition_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids renormalize_logits",
        "forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens",
        "begin_suppress_tokens sequence_bias watermarking_config output_scores output_logits return_dict_in_generate",
        "pad_token_id bos_token_id eos_token_id",
    ),
    irrelevant=FORWARD.irrelevant
    | _names(
        "trust_remote_code transformers_version _from_model_config _commit_hash decoder_start_token_id",
        # Of beam search.
        "length_penalty early_stopping low_memory diversity_penalty",
        # Of assisted decoding.
        "num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold",
        "assistant_lookbehind target_lookbehind max_matching_ngram_size assistant_ensemble_weight",
        # Of caches that preallocate: only their decoding is compiled.
        "cache_config max_cache_len compile_config disable_compile",
    ),
    refused={
        **FORWARD.refused,
        "num_beams": _BEAMS,
        "num_beam_groups": _BEAMS,
        "constraints": _CONSTRAINED,
        "force_words_ids": _CONSTRAINED,
        **dict.fromkeys(
            ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "speculation_type"), _ASSISTED
        ),
        "use_mtp": Refusal(_ASSISTED.why, (False,)),
        "is_assistant": Refusal(_ASSISTED.why, (False,)),
        "prefill_chunk_size": Refusal("a chunked prefill would be pruned chunk by chunk; leave it out"),
        "use_cache": Refusal(
            "generation without a cache would prune again at every token; leave use_cache on", (True,)
        ),
        "cache_implementation": Refusal(
            "layers of different lengths need the default cache (a StaticCache, say, preallocates them); leave it out",
            ("dynamic",),
        ),
        "continuous_batching_config": Refusal("continuous batching pages its cache; leave it out"),
        "guidance_scale": _TWO_PROMPTS,
        "negative_prompt_ids": _TWO_PROMPTS,
        "negative_prompt_attention_mask": _TWO_PROMPTS,
        "penalty_alpha": Refusal(_OWN_LOOP.why, (0,)),
        "dola_layers": _OWN_LOOP,
        "custom_generate": _OWN_LOOP,
        "token_healing": Refusal(
            "it generates from parts of the prompt, each of which would be pruned; leave it out", (False,)
        ),
    },
)
