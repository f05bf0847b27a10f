"""Answers lmms-eval's requests with a checkpoint whose visual tokens are pruned by a schedule."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import Any, ClassVar

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from lmms_eval.models.model_utils.progress import make_progress
from loguru import logger

from lmms_prune.compat.lmms_eval import cache_in_use, evaluation_options, tracker_in_use, under_the_command
from lmms_prune.efficiency.cost import kv_bytes
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.harness.adapters import adapter_digest
from lmms_prune.harness.arguments import ArgumentError, CheckpointError, ModelArguments, plain_errors
from lmms_prune.harness.batching import PreparedBatches, on_the_way
from lmms_prune.harness.chat import ChatModel
from lmms_prune.harness.circumstances import OtherLoad, circumstances
from lmms_prune.harness.fingerprint import digest, made_from
from lmms_prune.harness.generation import KNOWN, clean, options, own_tokens, stop_texts
from lmms_prune.harness.images import read_whole
from lmms_prune.harness.journal import Journal, JournalError, check_folder, repeats, sample_key
from lmms_prune.harness.lengths import CHARACTERS, visual_lengths
from lmms_prune.harness.loading import load_model, pick_device, read_config
from lmms_prune.harness.memory import BatchSize, PeakMemory, release, watched
from lmms_prune.harness.notices import refuse_split_pairs, say_at_start
from lmms_prune.harness.prompts import question_text, text_or_file
from lmms_prune.harness.records import Answered, AnsweredSample, image_grids, provenance, token_accounting
from lmms_prune.harness.respelling import respell
from lmms_prune.harness.response_cache import hold_to
from lmms_prune.harness.saving import read_back, refuse_unwritable
from lmms_prune.harness.unseen import UNSEEN, refuse_unseen
from lmms_prune.models.architectures import from_config
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.block import bound
from lmms_prune.pruning.hooks import check, prune
from lmms_prune.pruning.trace import masks_to_host
from lmms_prune.record.accounting import TokenAccounting, written
from lmms_prune.record.information import InformationError
from lmms_prune.record.redaction import redacted_values
from lmms_prune.record.run import RunReport, settings_text


class SampleError(Exception):
    """A sample that could not be answered; the message names the task, the document and the cause.

    It is not a RuntimeError on purpose. A processor may raise StopIteration, and `contextlib` mistakes a RuntimeError whose
    cause is that StopIteration for Python's own conversion (PEP 479): it drops the error and raises the StopIteration.
    """


@dataclass
class _Row:
    """One request to answer.

    Args:
        index: request index.
        name: names the sample in messages.
        sample: sample id, which seeds random draws.
        key: the sample's key in the journal; "" without a journal.
        chat: the messages of the prompt.
    """

    index: int
    name: str
    sample: str
    key: str
    chat: list[dict[str, Any]]


@dataclass
class _Prepared:
    """One batch, ready for the device.

    Args:
        inputs: the processor's output for `rows`; None if there are none.
        rows: the requests to answer.
        kwargs: generation options of the batch.
        finished: answers from the journal, by request index.
    """

    inputs: Any
    rows: list[_Row]
    kwargs: Mapping[str, Any]
    finished: dict[int, AnsweredSample]


class PrunedModel(ChatModel):
    """A checkpoint whose visual tokens are pruned by a schedule.

    lmms-eval creates it with `create_from_arg_string`; `ModelArguments` lists the arguments.

    Attributes:
        secrets: values that no file may contain. They come from the environment if lmms-eval loaded the class.
    """

    secrets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, arguments: ModelArguments):
        super().__init__()
        if arguments.journal is not None:
            check_folder(arguments.journal)
        config = read_config(arguments, self.family)
        layers, fixed = config.text_config.num_hidden_layers, self.family.tokens_per_image(config)
        # The code of a method of the user's own runs first: a mistake in it is found before any weight is loaded.
        schedule = bound(arguments.schedule)
        if arguments.budget is not None:
            sizes = from_config(config.to_dict(), arguments.pretrained).in_dtype(arguments.dtype)
            schedule = schedule.solve(arguments.budget, prompt_sizes(sizes, fixed))
        schedule.check(layers, [fixed] if fixed else None)
        if self.family.tiled:
            schedule.check_tiles(self.family.title)
        for stage in schedule.idle([fixed]) if fixed else ():
            logger.warning("stage '{}' prunes nothing from an image: all {} visual tokens are kept.", stage, fixed)
        # Text files are read here, so that the recorded settings contain their content, not only their path.
        self.arguments = replace(
            arguments,
            schedule=schedule,
            system_prompt=text_or_file("system_prompt", arguments.system_prompt),
            chat_template=text_or_file("chat_template", arguments.chat_template),
        )
        self.arguments.refuse_combinations(self.family)
        self.accelerator = Accelerator(
            cpu=arguments.device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))]
        )
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._rank == 0:
            say_at_start()
        self._device = pick_device(arguments, self.accelerator.local_process_index, self._world_size)
        self.processor = self._load_processor()
        if fault := self.family.processor_fault(self.processor, config):
            raise CheckpointError(f"pretrained={arguments.pretrained}: {fault}")
        self.model = load_model(arguments, self._device)
        # A missing requirement of a method, such as an auxiliary model, is reported before the first sample is answered.
        check(self.model, schedule)
        sizes = from_config(self.model.config.to_dict(), arguments.pretrained)
        self.architecture = replace(sizes, bytes_per_number=self.model.dtype.itemsize)
        self._size = BatchSize.of(arguments.batch_size, self.model.device)
        self.template = self._chat_template()
        self._try_template()
        executed = provenance(self.model, self.device)
        commit = getattr(self.model.config, "_commit_hash", None)
        # An adapter is often trained again under the same name, and a method's file edited: their content is a setting.
        content = {} if arguments.peft is None else {"peft_sha256": adapter_digest(arguments.peft)}
        if schedule.sources:
            content["methods_sha256"] = schedule.sources
        self.settings = self.arguments.settings() | {"schedule": str(schedule.portable)} | content
        self.made_from = made_from(self.arguments, executed, commit) | content
        self._journal = None if arguments.journal is None else Journal(arguments.journal, self.made_from, self.secrets)
        self.report = RunReport(
            settings=self.settings,
            provenance=executed,
            circumstances=circumstances(self.batch_size, self._world_size),
        )

    @property
    def batch_sizes(self) -> dict[str, dict[str, Any]]:
        """Return the run's report; lmms-eval copies this attribute into the results' config."""
        return {"run": redacted_values(self.report.to_dict(), self.secrets)}

    @classmethod
    def create_from_arg_string(cls, arg_string: Any, additional_config: Mapping[str, Any] | None = None) -> PrunedModel:
        """Create the model for lmms-eval from the text of --model_args, or from a mapping read from a YAML file.

        Raises:
            ArgumentError, InformationError, ScheduleError, UnsupportedModelError: see the message. Under the lmms-eval
                command, these errors print only the message and end the command with exit code 2.
        """
        with plain_errors(InformationError, UnsupportedModelError):
            refuse_unseen(evaluation_options(tuple(UNSEEN)))
            refuse_split_pairs()
            tracker = tracker_in_use() if under_the_command() else None
            if tracker is not None:
                refuse_unwritable(tracker)
            model = cls(ModelArguments.read(arg_string, additional_config, cls.family))
            cache = cache_in_use()
            respell(tracker, arg_string, cached=cache is not None)
            if cache is not None:
                hold_to(cache, cls.family.model_name, arg_string, redacted_values(model.made_from, cls.secrets))
            if tracker is not None:
                read_back(tracker)
            return model

    def __repr__(self) -> str:
        # lmms-eval's response cache puts this text into its keys if the evaluation was called with a model object.
        return f"{type(self).__name__}({settings_text(self.report.settings)}, made_from={digest(self.made_from)})"

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int | str:
        return self.arguments.batch_size

    def clean(self) -> None:
        """Free the run's memory but keep the weights, since the same object may be evaluated again."""
        release()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "loglikelihood tasks are not supported: lmms-eval's chat models only generate; use a generate_until task."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported; use a generate_until task.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, in order.

        Raises:
            ArgumentError, JournalError, SampleError: a sample could not be answered, or its answer could not be written.
                A failed answer is never replaced by an empty one. Under the lmms-eval command, these errors end it.
        """
        with plain_errors(JournalError, SampleError):
            # Check again, because the model object may have been created before the evaluation.
            refuse_unseen(evaluation_options(tuple(UNSEEN)))
            refuse_split_pairs()
            return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[GenerationResult]:
        answers: dict[int, AnsweredSample] = {}
        load, peak = OtherLoad(), PeakMemory(self.model)
        answered, repeat_counts, self._truncated = Answered(), repeats(requests), set[str]()
        progress = make_progress(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        batches = PreparedBatches(
            self._groups(requests), self._size, lambda indices: self._prepare(requests, indices, repeat_counts)
        )
        for indices, prepared in batches:
            new_answers = self._answer(prepared) if prepared.rows else []
            peak.note()
            if new_answers is None:
                self._size.halve(len(prepared.rows))
                batches.put_back(indices)
                continue
            self._store_answers(prepared.rows, new_answers)
            batch_answers = prepared.finished | {
                row.index: answer for row, answer in zip(prepared.rows, new_answers, strict=True)
            }
            for index, answer in batch_answers.items():
                answered.add(requests[index].args[4], answer)
            answered.resumed += len(prepared.finished)
            answers |= batch_answers
            progress.update(len(indices))
        progress.close()
        self._report(answered, load.share(), peak)
        self._warn([answers[i].accounting for i in range(len(requests))], requests)
        # lmms-eval only calls `to_dict` on token counts, so `TokenAccounting` can replace its class `TokenCounts`.
        return [GenerationResult(answers[i].text, answers[i].accounting) for i in range(len(requests))]

    # -- one batch -------------------------------------------------------------------------------------------------

    def _prepare(self, requests: list[Instance], indices: list[int], repeat_counts: list[int]) -> _Prepared:
        """Prepare the prompts and pixels of a batch, in a thread, while the device answers the previous batch."""
        kwargs = requests[indices[0]].args[2]
        # Sampled answers are never taken from the journal: skipping their draws would change those of later samples.
        sampled = options(kwargs, self.processor.tokenizer, self.arguments.use_cache)["do_sample"]
        journal = None if sampled else self._journal
        rows, finished = [], {}
        for i in indices:
            _, build, _, doc, task, split = requests[i].args
            name, sample = f"task '{task}', document {doc}", f"{task}/{split}/{doc}"
            with _naming_samples([name]):
                chat, truncated = read_whole(partial(self._document, build, task, split, doc))
                key = "" if journal is None else sample_key(sample, chat, kwargs, repeat_counts[i])
            if truncated:
                self._truncated.add(name)
            answer = None if journal is None else journal.finished(key)
            if answer is None:
                rows.append(_Row(i, name, sample, key, chat))
            else:
                finished[i] = answer
        inputs = on_the_way(self._batch_inputs(rows), self.model.dtype, self.model.device) if rows else None
        return _Prepared(inputs, rows, kwargs, finished)

    def _document(self, build: Any, task: str, split: str, doc: int) -> list[dict[str, Any]]:
        return self.chat(build(self.task_dict[task][split][doc]))

    def _answer(self, prepared: _Prepared) -> list[AnsweredSample] | None:
        """Answer a batch; None if it does not fit into memory."""
        kwargs, tokenizer = prepared.kwargs, self.processor.tokenizer
        samples = [row.sample for row in prepared.rows]
        with (
            _naming_samples([row.name for row in prepared.rows]),
            watched(self._size, len(samples), self.model) as memory,
        ):
            inputs = {name: x.to(self.model.device, non_blocking=True) for name, x in prepared.inputs.items()}
            start = time.perf_counter()
            with prune(
                self.model,
                self.arguments.schedule,
                seed=self.arguments.seed,
                positions=self.arguments.positions,
                samples=samples,
                questions=[question_text(row.chat) for row in prepared.rows],
                count_selection=True,
            ) as trace:
                output = self.model.generate(**inputs, **options(kwargs, tokenizer, self.arguments.use_cache))
            # `tolist` waits for the device, so the measured time includes all of the generation.
            generated = output[:, inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
        if memory.exhausted:
            return None
        lengths, trims = prepared.inputs["attention_mask"].sum(1).tolist(), self.family.trims_answers
        stops = stop_texts(kwargs, blank_line=trims)
        # Without pruning, beams or `use_cache=False` are allowed; then a sample has several, identical rows in the trace.
        rows = {row.sample: row for row in trace.rows}
        masks_to_host(list(rows.values()))
        sizes = [size for sample in samples for size in rows[sample].images]
        parts = ModelParts.of(self.model)
        grids = iter(image_grids(parts.grids(prepared.inputs, sizes), parts.mosaics(prepared.inputs)))
        results = []
        for ids, sample, length in zip(generated, samples, lengths, strict=True):
            answer_ids = own_tokens(ids, tokenizer)
            shapes = list(islice(grids, len(rows[sample].images)))
            accounting = token_accounting(rows[sample], shapes, self.architecture, length, len(answer_ids))
            computed, cached = sum(rows[sample].computed), int(sum(kv_bytes(self.architecture, rows[sample].cached)))
            text, seconds_each = clean(self.decode(answer_ids), stops, strip=trims), seconds / len(samples)
            results.append(AnsweredSample(text, accounting, computed, cached, len(samples), seconds_each))
        return results

    def _store_answers(self, rows: Sequence[_Row], answers: Sequence[AnsweredSample]) -> None:
        to_store = {row.key: answer for row, answer in zip(rows, answers, strict=True) if row.key}
        if self._journal is not None and to_store:
            self._journal.add(to_store)

    def _batch_inputs(self, rows: Sequence[_Row]) -> Any:
        """Return the processor's output for a batch; if it fails, the error names the row that causes it."""
        try:
            return self._inputs([row.chat for row in rows])
        except Exception:
            for row in rows:
                with _naming_samples([row.name]):
                    self._inputs([row.chat])
            raise

    # -- the run as a whole ---------------------------------------------------------------------------------------------

    def _groups(self, requests: list[Instance]) -> list[list[int]]:
        """Group request indices by generation options, longest prompts first; a batch has requests of one group only."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            kwargs = request.args[2]
            groups.setdefault(repr(sorted(kwargs.items(), key=lambda item: item[0])), []).append(i)
        for indices in groups.values():
            self._check_options(requests[indices[0]].args[2])
        lengths = self._lengths(requests)
        for indices in groups.values():
            indices.sort(key=lambda i: lengths[i], reverse=True)
        return list(groups.values())

    def _lengths(self, requests: list[Instance]) -> list[float]:
        """Estimate the length of each prompt in tokens, text and images together."""
        documents: dict[tuple[str, str], list[int]] = {}
        for request in requests:
            documents.setdefault(request.args[4:6], []).append(request.args[3])
        bounds = (self.arguments.min_pixels or 0, self.arguments.max_pixels or sys.maxsize)
        visual = {
            (task, split): visual_lengths(self.family, self.model.config, bounds, self.task_dict[task][split], numbers)
            for (task, split), numbers in documents.items()
        }
        return [
            len(text) / CHARACTERS + visual[task, split].get(doc, 0)
            for text, _, _, doc, task, split in (request.args for request in requests)
        ]

    def _check_options(self, kwargs: Mapping[str, Any]) -> None:
        beams = options(kwargs, self.processor.tokenizer, self.arguments.use_cache)["num_beams"]
        if beams > 1 and self.arguments.schedule.stages:
            message = f"num_beams={beams}: beam search reorders the KV cache, which is not supported with a schedule that prunes; use num_beams=1."
            raise ArgumentError(message)
        ignored = sorted(set(kwargs) - KNOWN)
        if ignored:
            logger.warning("generation options that are not supported are ignored: {}", ", ".join(ignored))

    def _unpruned_samples(self, answered: Answered) -> int:
        """Count the samples, over all processes, that kept every token.

        Raises:
            ArgumentError: the schedule was to prune, but pruned no sample.
        """
        schedule = self.arguments.schedule
        with_image = [answer.accounting for answer in answered.answers if answer.accounting.visual_tokens]
        counts = torch.tensor(
            [sum(accounting.unpruned for accounting in with_image), len(with_image)], device=self.device
        )
        unpruned, images = self.accelerator.reduce(counts).tolist() if schedule.stages else (0, 0)
        if images and unpruned == images and not schedule.keeps_all:
            average = sum(accounting.visual_tokens for accounting in with_image) / max(1, len(with_image))
            raise ArgumentError(
                f"model_args: schedule={schedule} pruned nothing: in all {images} samples with an image every visual token "
                f"was kept ({average:.0f} on average). Keep fewer tokens: use a ratio, or a number of tokens below that."
            )
        return unpruned

    def _peak_memory(self, peak: PeakMemory) -> int | None:
        """Return the peak of the process that used most memory."""
        own = torch.tensor([peak.note() or 0], device=self.device)
        return int(self.accelerator.gather(own).max()) or None

    def _report(self, answered: Answered, other_load: float | None, peak: PeakMemory) -> None:
        """Record the run for the results: lmms-eval's throughput and the `RunReport`."""
        answers, averages = answered.answers, answered.averages()
        largest = max((answer.rows for answer in answers), default=0)
        self.report = replace(
            self.report,
            circumstances=replace(
                self.report.circumstances,
                largest_batch=largest,
                other_load=other_load,
                peak_memory=self._peak_memory(peak),
                peak_memory_of=peak.of,
            ),
            averages=averages,
            tasks=answered.by_task(),
            unpruned_samples=self._unpruned_samples(answered),
            resumed=answered.resumed,
        )
        seconds, tokens = (
            sum(answer.seconds for answer in answers),
            sum(answer.accounting.output_tokens for answer in answers),
        )
        # lmms-eval adds the prefix "avg_" to each name.
        numbers = {name.removeprefix("avg_"): value for name, value in written(averages).items()}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"total_requests": len(answers), **numbers})

    def _warn(self, samples: Sequence[TokenAccounting], requests: Sequence[Instance]) -> None:
        """Count samples whose answers are unreliable and warn about them: truncated images and too long prompts.

        Such samples are still answered, as by lmms-eval's own model wrappers.
        """
        if self._truncated:
            logger.warning(
                "{} samples have an image whose file is cut short or damaged; the missing part is grey: {}. The results count them "
                "as cut_images.",
                *(len(self._truncated), ", ".join(sorted(self._truncated)[:3])),
            )
        limit = self.model.config.text_config.max_position_embeddings
        too_long = [
            i for i, accounting in enumerate(samples) if accounting.input_tokens + accounting.output_tokens > limit
        ]
        if too_long:
            _, _, _, doc, task, _ = requests[too_long[0]].args
            logger.warning(
                "{} samples are longer than the model's maximum of {} positions, first of them task '{}', document {}: "
                "their answers are unreliable. The results count them as beyond_positions.",
                *(len(too_long), limit, task, doc),
            )
        self.report = replace(self.report, cut_images=len(self._truncated), beyond_positions=len(too_long))


@contextmanager
def _naming_samples(names: Sequence[str]) -> Iterator[None]:
    """Turn any error inside into a `SampleError` that names the samples; the error still ends the run."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"{'; '.join(names)}: {type(error).__name__}: {error}") from error
