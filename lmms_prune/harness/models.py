"""The lmms-eval models: an unmodified checkpoint behind lmms-eval's chat interface, pruned by a schedule."""

from __future__ import annotations

import gc
import re
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from jinja2 import TemplateError
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from lmms_eval.protocol import ChatMessages
from loguru import logger
from PIL import Image
from qwen_vl_utils import process_vision_info

from lmms_prune.families import FAMILIES, Family, UnsupportedModelError
from lmms_prune.harness.arguments import ArgumentError, ModelArguments, plain_errors
from lmms_prune.harness.loading import load_model, load_processor, pick_device, read_config
from lmms_prune.harness.records import PrunedTokenCounts, RunRecord, provenance
from lmms_prune.hooks import prune
from lmms_prune.trace import RowTrace

# LLaVA-1.5's own evaluation prompt, for messages whose content is a list of parts.
VICUNA_TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. "
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT: {% elif message['role'] == 'user' %}"
    "USER: {% endif %}{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
# What openpyxl refuses: one such character in one answer loses a whole run's spreadsheet.
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_DEFAULT_LENGTH = 128
_PASSED_ON = ("min_new_tokens", "top_k", "repetition_penalty", "no_repeat_ngram_size")


class SampleError(RuntimeError):
    """A sample that could not be answered; names the task, the document and the cause."""


class PrunedModel(lmms):
    """A checkpoint whose visual tokens are pruned by a schedule.

    Created by lmms-eval through `create_from_arg_string`; `ModelArguments` says what may be given.
    """

    is_simple = False
    family: ClassVar[Family]
    defaults: ClassVar[dict[str, Any]] = {}
    refused: ClassVar[tuple[str, ...]] = ()

    def __init__(self, arguments: ModelArguments):
        super().__init__()
        config = read_config(arguments, self.family)
        layers, fixed = config.text_config.num_hidden_layers, self.family.tokens_per_image(config)
        schedule = arguments.schedule
        if arguments.budget is not None:
            schedule = schedule.solve(arguments.budget, layers, fixed)
        schedule.check(layers, [fixed] if fixed else None)
        self.arguments = replace(arguments, schedule=schedule)
        self._refuse_combinations()
        self.accelerator = Accelerator(
            cpu=arguments.device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))]
        )
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = pick_device(arguments, self.accelerator.local_process_index, self._world_size)
        self.processor = self._load_processor()
        self.model = load_model(arguments, self._device)
        self.template = self._chat_template()
        self._try_template()
        # The harness copies the values of `batch_sizes` into the results' config: the one place for what it does not
        # record by itself (its throughput section takes numbers only).
        self.batch_sizes: dict[str, dict[str, Any]] = {
            "run": {
                "batch_size": self.batch_size,
                "schedule": str(schedule),
                "identity": self.arguments.identity(),
                **provenance(self.device),
            }
        }

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str | Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> PrunedModel:
        """lmms-eval's constructor; takes the text of --model_args or a mapping.

        Raises:
            ArgumentError, ScheduleError, UnsupportedModelError: see the message. Under the lmms-eval command they end
                it with exit code 2 and the message alone.
        """
        with plain_errors(UnsupportedModelError):
            if arg_string and not isinstance(arg_string, (str, Mapping)):
                raise ArgumentError(f"model_args: {arg_string!r} is neither a text nor a mapping.")
            defaults = {"pretrained": cls.family.default, **cls.defaults}
            return cls(ModelArguments.read(arg_string, additional_config, defaults, cls.refused))

    def __repr__(self) -> str:
        # The response cache's key for a model object is its repr.
        return f"{type(self).__name__}({self.arguments.identity()})"

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return self.arguments.batch_size

    def clean(self) -> None:
        """Free what the run left, but keep the weights: the same object may be evaluated again."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval's chat tasks only generate; use a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported; use a generate_until task.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request; the order of the answers is the order of the requests.

        Raises:
            SampleError: a sample could not be answered. Nothing is answered with an empty text instead.
        """
        answers: dict[int, GenerationResult] = {}
        record = RunRecord()
        progress = make_progress(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        for places in self._batches(requests):
            batch = [requests[i].args for i in places]
            names = [f"task '{task}', document {doc}" for _, _, _, doc, task, _ in batch]
            with _naming(names):
                results, seconds = self._answer(batch)
            record.add([result.token_counts for result in results], seconds)
            answers.update(zip(places, results, strict=True))
            progress.update(len(places))
        progress.close()
        self._log(record)
        return [answers[i] for i in range(len(requests))]

    # -- one batch -------------------------------------------------------------------------------------------------

    def _answer(self, batch: list[tuple]) -> tuple[list[GenerationResult], float]:
        docs = [(build, self.task_dict[task][split][doc]) for _, build, _, doc, task, split in batch]
        messages = [self._with_system(ChatMessages(messages=build(doc)).to_hf_messages()) for build, doc in docs]
        _refuse_media(messages)
        inputs = self._inputs(messages).to(self.model.device, dtype=self.model.dtype)
        options, until = self._generation_options(batch[0][2])
        arguments = self.arguments
        start = time.perf_counter()
        with prune(
            self.model,
            arguments.schedule,
            seed=arguments.seed,
            positions=arguments.positions,
            samples=[f"{task}/{split}/{doc}" for _, _, _, doc, task, split in batch],
        ) as trace:
            output = self.model.generate(**inputs, **options)
        # Reading the tokens waits for the device, so the time is that of the finished generation.
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        seconds = time.perf_counter() - start
        rows = trace.rows or self._unpruned_rows(inputs)
        lengths = inputs["attention_mask"].sum(1).tolist()
        return [
            GenerationResult(self._text(ids, until), PrunedTokenCounts.of(row, length, len(ids)))
            for ids, row, length in zip(map(self._until_end, new), rows, lengths, strict=True)
        ], seconds

    def _unpruned_rows(self, inputs: Mapping[str, torch.Tensor]) -> list[RowTrace]:
        """The ledger of a run without a schedule: every layer sees every token."""
        image_token = self.model.config.image_token_id
        counts = (inputs["input_ids"] == image_token).sum(1).tolist()
        lengths = inputs["attention_mask"].sum(1).tolist()
        layers = self.model.config.text_config.num_hidden_layers
        return [
            RowTrace("", n - v, [v] if v else [], visual=[v] * layers) for v, n in zip(counts, lengths, strict=True)
        ]

    def _until_end(self, ids: list[int]) -> list[int]:
        """A row's own tokens: up to its end, or without the padding that follows a stop text."""
        tokenizer = self.processor.tokenizer
        if tokenizer.eos_token_id in ids:
            return ids[: ids.index(tokenizer.eos_token_id) + 1]
        length = len(ids)
        while length and ids[length - 1] == tokenizer.pad_token_id:
            length -= 1
        return ids[:length]

    def _text(self, ids: list[int], until: Sequence[str]) -> str:
        text = self._decode(ids)
        for stop in until:
            text = text.split(stop, 1)[0]
        return _CONTROL.sub("", text)

    def _generation_options(self, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """transformers' options, and the texts at which an answer ends, from the task's generation_kwargs."""
        until = given.get("until") or []
        # "\n\n" is what the harness fills in when a task names no stop; the stock chat models do not apply it either.
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop and stop != "\n\n"]
        temperature = given.get("temperature") or 0
        sampling = {"temperature": temperature, "top_p": given.get("top_p")} if temperature > 0 else {}
        tokenizer = self.processor.tokenizer
        options = {
            "max_new_tokens": given.get("max_new_tokens") or _DEFAULT_LENGTH,
            "do_sample": bool(sampling),
            "temperature": None,
            "top_p": None,
            "top_k": None,
            **sampling,
            **{name: given[name] for name in _PASSED_ON if name in given},
            "num_beams": given.get("num_beams") or 1,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            "use_cache": self.arguments.use_cache,
        }
        if stops:
            options |= {"stop_strings": stops, "tokenizer": tokenizer}
        return options, stops

    # -- the whole run ---------------------------------------------------------------------------------------------

    def _batches(self, requests: list[Instance]) -> Iterator[list[int]]:
        """Places of requests that may be generated together: same options, similar length."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            options = request.args[2]
            groups.setdefault(repr(sorted(options.items(), key=lambda item: item[0])), []).append(i)
        for places in groups.values():
            self._check_options(requests[places[0]].args[2])
            places.sort(key=lambda i: len(requests[i].args[0]), reverse=True)
            for start in range(0, len(places), self.batch_size):
                yield places[start : start + self.batch_size]

    def _check_options(self, options: Mapping[str, Any]) -> None:
        beams = options.get("num_beams") or 1
        with plain_errors():
            if beams > 1 and self.arguments.schedule.stages:
                message = f"num_beams={beams}: beam search reorders the cache that a schedule cuts; use num_beams=1."
                raise ArgumentError(message)
        known = {"until", "max_new_tokens", "temperature", "top_p", "do_sample", "num_beams", *_PASSED_ON}
        ignored = sorted(set(options) - known)
        if ignored:
            logger.warning("generation options without a meaning here are ignored: {}", ", ".join(ignored))

    def _log(self, record: RunRecord) -> None:
        speed = record.output_tokens / record.seconds if record.seconds else 0.0
        numbers = {"total_requests": record.samples, "rank": self.rank, **record.averages()}
        log_metrics(record.seconds, record.output_tokens, speed, numbers)
        self.batch_sizes["run"]["averages"] = record.averages()

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.arguments.system_prompt is None:
            return messages
        return self._apply_system_prompt(messages, _text_or_file("system_prompt", self.arguments.system_prompt))

    def _chat_template(self) -> str | None:
        if self.arguments.chat_template is not None:
            return _text_or_file("chat_template", self.arguments.chat_template)
        if self.arguments.prompt == "vicuna":
            return VICUNA_TEMPLATE
        if not self.processor.chat_template:
            hint = (
                "use prompt=vicuna or chat_template=FILE" if "prompt" not in self.refused else "use chat_template=FILE"
            )
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

    def _refuse_combinations(self) -> None:
        if self.arguments.schedule.stages and not self.arguments.use_cache:
            raise ArgumentError("use_cache=false prunes anew at every generated token; leave it out with a schedule.")
        if self.arguments.positions == "compact" and self.family.mrope:
            message = "positions=compact would destroy the height and width channels of M-RoPE; use positions=original."
            raise ArgumentError(message)

    def _load_processor(self, **options: Any) -> Any:
        processor = load_processor(self.arguments, **options)
        processor.tokenizer.padding_side = "left"
        return processor

    @abstractmethod
    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        """The processor's output for a batch of messages, left-padded."""

    @abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """The text of generated tokens, as the stock wrapper of the family decodes it."""


class LlavaPruned(PrunedModel):
    """LLaVA-1.5 (``--model llava_pruned``). Prompts and pixels are those of lmms-eval's own chat ``llava_hf``."""

    family = FAMILIES["llava"]
    refused = ("min_pixels", "max_pixels")

    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        images = [
            part["image"] for chat in messages for message in chat for part in message["content"] if "image" in part
        ]
        if self.arguments.image_aspect == "pad":
            mean = self.processor.image_processor.image_mean
            images = [_pad_to_square(image, mean) for image in images]
        return self.processor(images=images or None, text=self._prompts(messages), padding=True, return_tensors="pt")

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True)


class Qwen25VLPruned(PrunedModel):
    """Qwen2.5-VL (``--model qwen2_5_vl_pruned``). Prompts and pixels are those of lmms-eval's chat ``qwen2_5_vl``."""

    family = FAMILIES["qwen2_5_vl"]
    defaults = {"min_pixels": 256 * 28 * 28, "max_pixels": 2048 * 28 * 28}
    refused = ("prompt", "image_aspect")

    def _load_processor(self, **options: Any) -> Any:
        size = {"shortest_edge": self.arguments.min_pixels, "longest_edge": self.arguments.max_pixels}
        return super()._load_processor(size=size, **options)

    def _inputs(self, messages: list[list[dict[str, Any]]]) -> Any:
        images, _ = process_vision_info(messages)
        return self.processor(text=self._prompts(messages), images=images, padding=True, return_tensors="pt")

    def _decode(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Any error inside names the samples it happened in, and still ends the run."""
    try:
        yield
    except Exception as error:
        raise SampleError(f"{'; '.join(names)}: {type(error).__name__}: {error}") from error


def _refuse_media(messages: list[list[dict[str, Any]]]) -> None:
    for chat in messages:
        for message in chat:
            for part in message["content"]:
                if part["type"] not in ("image", "text"):
                    raise ArgumentError(f"the sample holds {part['type']}; only images and text are supported.")


def _text_or_file(name: str, value: str) -> str:
    # A template is longer than a file name may be; asking for such a file is an error of its own.
    if len(value) < 1024 and Path(value).is_file():
        return Path(value).read_text(encoding="utf-8").strip()
    if re.fullmatch(r"(~|\.{0,2}/)\S*|\S+\.(txt|jinja2?|j2)", value):
        raise ArgumentError(f"{name}={value}: there is no such file.")
    return value


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    """`image` in the middle of a square of the mean colour, as LLaVA-1.5's own evaluation pads."""
    image = image.convert("RGB")
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(channel * 255) for channel in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
