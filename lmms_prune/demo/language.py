"""The text side of the demo checkpoints: chat templates, a trained tokenizer and the allowed answers."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LLAVA_SPECIALS = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
QWEN_SPECIALS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
YES_NO = (" yes", " no", "yes", "no", "Yes", "No", " Yes", " No")
LIKELY = (*YES_NO, *"ABCD")
ANSWERS = (*LIKELY, *"0123456789", " red", " blue", " green", " circle", " square", " left", " right")
VOCABULARY = 2000

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly. There are several options: A. B. C. D. E.",
    "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT: system user assistant",
    "The assistant gives helpful, detailed, and polite answers to the user's questions. You are a helpful assistant.",
    "Is there a red circle in this image? Is the blue square left or right of the green triangle?",
    "Please answer yes or no.",
    "What is the brand of this camera? What is written in the image? What is the date mentioned in the document?",
    "How many people are shown in the infographic? Which colour is the object? Context:",
    "Look at the picture. Yes, no, No.",
    "Reference OCR token: invoice total number name city white black yellow orange purple above below",
    "请直接使用所提供的选项字母作为答案回答。 图中是什么颜色？ 图中是什么形状？ 红色 绿色 蓝色 圆形 方形 三角形",
    "0 1 2 3 4 5 6 7 8 9 10 12 20 42 50 100 1999 2024",
)


def train_tokenizer(
    specials: tuple[str, ...],
    *,
    bos: str | None,
    eos: str,
    pad: str,
    unk: str | None,
    texts: Sequence[str] = (*CORPUS, *ANSWERS) * 4,
    words: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer.

    With the default texts, each of ANSWERS is one token. For this, each text occurs several times, since only pairs that
    occur more than once are merged, and the answers are on separate lines, with and without a space before them.

    Args:
        specials: special tokens, with the ids 0, 1, 2, …
        bos, eos, pad, unk: the special tokens with these roles; None leaves a role empty.
        texts: the training texts.
        words: each becomes one token everywhere, also within a text without spaces.

    Returns:
        the tokenizer; it pads on the left.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(specials),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    core.train_from_iterator(texts, trainer)
    core.add_tokens([AddedToken(word, normalized=False) for word in words])
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, specials.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        unk_token=unk,
        padding_side="left",
        additional_special_tokens=[name for name in specials if name not in (bos, eos, pad, unk)],
        clean_up_tokenization_spaces=False,
    )
