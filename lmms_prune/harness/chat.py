"""Model inputs: prompts and pixels, as lmms-eval's own chat wrappers make them."""

from __future__ import annotations

from typing import Any, ClassVar

from jinja2 import TemplateError
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from PIL.Image import Image

from lmms_prune.harness.arguments import ArgumentError, ModelArguments
from lmms_prune.harness.loading import load_processor
from lmms_prune.harness.prompts import VICUNA_TEMPLATE
from lmms_prune.models import Family


class ChatModel(lmms):
    """A checkpoint and its processor behind lmms-eval's chat interface; `PrunedModel` implements answering."""

    is_simple = False
    family: ClassVar[Family]
    arguments: ModelArguments
    processor: Any
    model: Any
    template: str | None

    def inputs(self, image: Image, question: str) -> Any:
        """Return the model's inputs for one question about one image, with an evaluation's prompt and pixels."""
        content = [{"type": "image", "url": image}, {"type": "text", "text": question}]
        return self.inputs_of([{"role": "user", "content": content}])

    def chat(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Convert a chat of an lmms-eval task to transformers' format, with the system prompt."""
        chat = ChatMessages(messages=messages).to_hf_messages()
        kinds = {part["type"] for message in chat for part in message["content"]} - {"image", "text"}
        if kinds:
            raise ArgumentError(f"the sample holds {', '.join(sorted(kinds))}; only images and text are supported.")
        for image in (part["image"] for message in chat for part in message["content"] if "image" in part):
            if isinstance(image, Image) and 0 in image.size:
                raise ArgumentError(f"the sample holds an image of {image.width} x {image.height} pixels.")
        return self._apply_system_prompt(chat, self.arguments.system_prompt or "")

    def inputs_of(self, messages: list[dict[str, Any]]) -> Any:
        """Return the model's inputs for one chat of an lmms-eval task.

        Raises:
            ArgumentError: the family's image reader refuses an image; the message says why.
        """
        chat = self.chat(messages)
        try:
            inputs = self._inputs([chat])
        except ValueError as error:
            raise ArgumentError(f"the sample cannot be made the model's input: {error}.") from error
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def _chat_template(self) -> str | None:
        if self.arguments.chat_template is not None:
            return self.arguments.chat_template
        if self.arguments.prompt == "vicuna":
            return VICUNA_TEMPLATE
        if not self.processor.chat_template:
            refused = self.family.refused
            hint = "use chat_template=FILE" if "prompt" in refused else "use prompt=vicuna or chat_template=FILE"
            raise ArgumentError(f"pretrained={self.arguments.pretrained} has no chat template; {hint}.")
        return None

    def _try_template(self) -> None:
        try:
            self._prompts([[{"role": "user", "content": [{"type": "text", "text": "?"}]}]])
        except TemplateError as error:
            text = self.arguments.chat_template or f"of {self.arguments.pretrained}"
            raise ArgumentError(f"chat_template {text} is no Jinja template that takes messages: {error}.") from error

    def _prompts(self, messages: list[list[dict[str, Any]]]) -> list[str]:
        template = {"chat_template": self.template} if self.template else {}
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)

    def _load_processor(self) -> Any:
        processor = load_processor(self.arguments, **self.family.processor_options(self.arguments))
        processor.tokenizer.padding_side = "left"
        self.family.prepare_processor(processor, self.arguments)
        return processor

    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        """Return the processor's output for a batch of messages, left-padded."""
        return self.family.processed(self.processor, self._prompts(messages), messages, self.arguments)

    def decode(self, ids: list[int]) -> str:
        """Decode generated tokens as the family's stock wrapper does."""
        return self.family.decoded(self.processor.tokenizer, ids)
