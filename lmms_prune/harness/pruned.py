"""Answering lmms-eval's requests with a checkpoint whose visual tokens are pruned by a schedule."""

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
from lmms_prune.harness.arguments import ArgumentError, ModelArguments, plain_errors
from lmms_prune.harness.batching import PreparedBatches
from lmms_prune.harness.chat import ChatModel
from lmms_prune.harness.circumstances import OtherLoad, circumstances
from lmms_prune.harness.fingerprint import digest, made_from
from lmms_prune.harness.generation import KNOWN, clean, options, own_tokens, stop_texts
from lmms_prune.harness.images import read_whole
from lmms_prune.harness.journal import Journal, JournalError, check_folder, repeats, sample_key
from lmms_prune.harness.lengths import CHARACTERS, visual_lengths
from lmms_prune.harness.loading import load_model, pick_device, read_config
from lmms_prune.harness.memory import BatchSize, release, watched
from lmms_prune.harness.prompts import question_text, text_or_file
from lmms_prune.harness.records import Answered, AnsweredSample, provenance, token_accounting
from lmms_prune.harness.response_cache import hold_to
from lmms_prune.harness.saving import read_back, refuse_unwritable
from lmms_prune.harness.unseen import UNSEEN, refuse_unseen
from lmms_prune.models.architectures import from_config
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import check, prune
from lmms_prune.pruning.trace import masks_to_host
from lmms_prune.record.accounting import TokenAccounting, written
from lmms_prune.record.information import InformationError
from lmms_prune.record.redaction import redacted_values
from lmms_prune.record.run import RunReport, settings_text


class SampleError(Exception):
    """A sample that could not be answered; names the task, the document and the cause.

    Not a RuntimeError: as the outcome of a StopIteration, which processors raise, one would be taken for Python's own.
    """


@dataclass
class _Row:
    """One request that is to be answered: its place, its name for people and for random draws, and its chat.

    `key` is the journal's, "" where there is none.
    """

    place: int
    name: str
    sample: str
    key: str
    chat: list[dict[str, Any]]


@dataclass
class _Prepared:
    """One batch, ready for the device, without the rows that a journal has `finished`, by their places."""

    inputs: Any
    rows: list[_Row]
    given: Mapping[str, Any]
    finished: dict[int, AnsweredSample]


class PrunedModel(ChatModel):
    """A checkpoint whose visual tokens are pruned by a schedule.

    Created by lmms-eval through `create_from_arg_string`; `ModelArguments` says what may be given.

    Attributes:
        secrets: values that no file may hold; those of the environment, where lmms-eval has loaded the class.
    """

    secrets: ClassVar[tuple[str, ...]] = ()

    def __init__(self, arguments: ModelArguments):
        super().__init__()
        if arguments.journal is not None:
            check_folder(arguments.journal)
        config = read_config(arguments, self.family)
        layers, fixed = config.text_config.num_hidden_layers, self.family.tokens_per_image(config)
        schedule = arguments.schedule
        if arguments.budget is not None:
            sizes = from_config(config.to_dict(), arguments.pretrained)
            schedule = schedule.solve(arguments.budget, prompt_sizes(sizes, fixed))
        schedule.check(layers, [fixed] if fixed else None)
        for stage in schedule.idle([fixed]) if fixed else ():
            logger.warning("stage '{}' prunes nothing of an image: all {} visual tokens stay.", stage, fixed)
        # Files are read now, so that the run's identity holds what they say.
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
        self._device = pick_device(arguments, self.accelerator.local_process_index, self._world_size)
        self.processor = self._load_processor()
        self.model = load_model(arguments, self._device)
        # What a method lacks (a second model, say) must be known before the first sample.
        check(self.model, schedule)
        sizes = from_config(self.model.config.to_dict(), arguments.pretrained)
        self.architecture = replace(sizes, bytes_per_number=self.model.dtype.itemsize)
        self._size = BatchSize.of(arguments.batch_size, self.model.device)
        self.template = self._chat_template()
        self._try_template()
        executed = provenance(self.model, self.device)
        commit = getattr(self.model.config, "_commit_hash", None)
        self.made_from = made_from(self.arguments, executed, commit)
        self._journal = None if arguments.journal is None else Journal(arguments.journal, self.made_from, self.secrets)
        self.report = RunReport(
            settings=self.arguments.settings(),
            provenance=executed,
            circumstances=circumstances(self.batch_size, self._world_size),
        )

    @property
    def batch_sizes(self) -> dict[str, dict[str, Any]]:
        """The run's report, where lmms-eval looks for what it copies into the results' config."""
        return {"run": redacted_values(self.report.to_dict(), self.secrets)}

    @classmethod
    def create_from_arg_string(cls, arg_string: Any, additional_config: Mapping[str, Any] | None = None) -> PrunedModel:
        """lmms-eval's constructor; takes the text of --model_args or a mapping (whatever a YAML held).

        Raises:
            ArgumentError, InformationError, ScheduleError, UnsupportedModelError: see the message. Under the lmms-eval command they end
                it with exit code 2 and the message alone.
        """
        with plain_errors(InformationError, UnsupportedModelError):
            refuse_unseen(evaluation_options(tuple(UNSEEN)))
            tracker = tracker_in_use() if under_the_command() else None
            if tracker is not None:
                refuse_unwritable(tracker)
            model = cls(ModelArguments.read(arg_string, additional_config, cls.family))
            if (cache := cache_in_use()) is not None:
                hold_to(cache, cls.family.model_name, arg_string, redacted_values(model.made_from, cls.secrets))
            if tracker is not None:
                read_back(tracker)
            return model

    def __repr__(self) -> str:
        # The response cache's key for a model object is its repr.
        return f"{type(self).__name__}({settings_text(self.report.settings)}, made_from={digest(self.made_from)})"

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int | str:
        return self.arguments.batch_size

    def clean(self) -> None:
        """Free what the run left, but keep the weights: the same object may be evaluated again."""
        release()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError("lmms-eval's chat tasks only generate; use a generate_until task.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("multi-round tasks are not supported; use a generate_until task.")

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request; the order of the answers is the order of the requests.

        Raises:
            ArgumentError, JournalError, SampleError: a sample could not be answered, or not be written down. Nothing is
                answered with an empty text instead. Under the lmms-eval command they end it, as any other error does.
        """
        with plain_errors(JournalError, SampleError):
            # Of an object, too, which was there before the evaluation.
            refuse_unseen(evaluation_options(tuple(UNSEEN)))
            return self._generate(requests)

    def _generate(self, requests: list[Instance]) -> list[GenerationResult]:
        answers: dict[int, AnsweredSample] = {}
        load = OtherLoad()
        answered, again, self._cut = Answered(), repeats(requests), set[str]()
        progress = make_progress(total=len(requests), desc="Model Responding", disable=self.rank != 0)
        batches = PreparedBatches(
            self._groups(requests), self._size, lambda places: self._prepare(requests, places, again)
        )
        for places, prepared in batches:
            new = self._answer(prepared) if prepared.rows else []
            if new is None:
                self._size.halve(len(prepared.rows))
                batches.put_back(places)
                continue
            self._write_down(prepared.rows, new)
            done = prepared.finished | {row.place: one for row, one in zip(prepared.rows, new, strict=True)}
            for place, answer in done.items():
                answered.add(requests[place].args[4], answer)
            answered.resumed += len(prepared.finished)
            answers |= done
            progress.update(len(places))
        progress.close()
        self._report(answered, load.share())
        self._warn([answers[i].accounting for i in range(len(requests))], requests)
        # The harness asks the accounting for its `to_dict`, and for nothing else of its own class.
        return [GenerationResult(answers[i].text, answers[i].accounting) for i in range(len(requests))]

    # -- one batch -------------------------------------------------------------------------------------------------

    def _prepare(self, requests: list[Instance], places: list[int], again: list[int]) -> _Prepared:
        """Prompts and pixels of a batch; runs in a thread of its own, while the device answers the batch before."""
        given = requests[places[0]].args[2]
        # What is drawn from torch's generator is drawn again, so that the stream stays the same.
        drawn = options(given, self.processor.tokenizer, self.arguments.use_cache)["do_sample"]
        journal = None if drawn else self._journal
        rows, finished = [], {}
        for i in places:
            _, build, _, doc, task, part = requests[i].args
            name, sample = f"task '{task}', document {doc}", f"{task}/{part}/{doc}"
            with _naming([name]):
                chat, cut = read_whole(partial(self._document, build, task, part, doc))
                key = "" if journal is None else sample_key(sample, chat, given, again[i])
            if cut:
                self._cut.add(name)
            answer = None if journal is None else journal.finished(key)
            if answer is None:
                rows.append(_Row(i, name, sample, key, chat))
            else:
                finished[i] = answer
        return _Prepared(self._batch_inputs(rows) if rows else None, rows, given, finished)

    def _document(self, build: Any, task: str, part: str, doc: int) -> list[dict[str, Any]]:
        return self.chat(build(self.task_dict[task][part][doc]))

    def _answer(self, prepared: _Prepared) -> list[AnsweredSample] | None:
        """The answers of a batch; None if it does not fit the memory."""
        given, tokenizer = prepared.given, self.processor.tokenizer
        samples = [row.sample for row in prepared.rows]
        with _naming([row.name for row in prepared.rows]), watched(self._size, len(samples), self.model) as memory:
            inputs = prepared.inputs.to(self.model.device, dtype=self.model.dtype)
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
                output = self.model.generate(**inputs, **options(given, tokenizer, self.arguments.use_cache))
            # Reading the tokens waits for the device, so the time is that of the finished generation.
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            seconds = time.perf_counter() - start
        if memory.exhausted:
            return None
        lengths, stops = inputs["attention_mask"].sum(1).tolist(), stop_texts(given)
        # An unpruned run may have beams or no cache, and then traces a sample more than once, each time alike.
        rows = {row.sample: row for row in trace.rows}
        masks_to_host(list(rows.values()))
        sizes = [size for sample in samples for size in rows[sample].images]
        grids = iter(ModelParts.of(self.model).grids(dict(inputs), sizes))
        results = []
        for ids, sample, length in zip(new, samples, lengths, strict=True):
            own = own_tokens(ids, tokenizer)
            shapes = list(islice(grids, len(rows[sample].images)))
            accounting = token_accounting(rows[sample], shapes, self.architecture, length, len(own))
            computed, cached = sum(rows[sample].computed), int(sum(kv_bytes(self.architecture, rows[sample].cached)))
            text, share = clean(self.decode(own), stops), seconds / len(samples)
            results.append(AnsweredSample(text, accounting, computed, cached, len(samples), share))
        return results

    def _write_down(self, rows: Sequence[_Row], answers: Sequence[AnsweredSample]) -> None:
        kept = {row.key: answer for row, answer in zip(rows, answers, strict=True) if row.key}
        if self._journal is not None and kept:
            self._journal.add(kept)

    def _batch_inputs(self, rows: Sequence[_Row]) -> Any:
        """The processor's output for a batch; if it fails, the row that fails by itself is the one to name."""
        try:
            return self._inputs([row.chat for row in rows])
        except Exception:
            for row in rows:
                with _naming([row.name]):
                    self._inputs([row.chat])
            raise

    # -- the whole run ---------------------------------------------------------------------------------------------

    def _groups(self, requests: list[Instance]) -> list[list[int]]:
        """Places of requests that may be generated together: same options; the longest first."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            given = request.args[2]
            groups.setdefault(repr(sorted(given.items(), key=lambda item: item[0])), []).append(i)
        for places in groups.values():
            self._check_options(requests[places[0]].args[2])
        lengths = self._lengths(requests)
        for places in groups.values():
            places.sort(key=lambda i: lengths[i], reverse=True)
        return list(groups.values())

    def _lengths(self, requests: list[Instance]) -> list[float]:
        """About how many tokens each prompt will have."""
        documents: dict[tuple[str, str], list[int]] = {}
        for request in requests:
            documents.setdefault(request.args[4:6], []).append(request.args[3])
        bounds = (self.arguments.min_pixels or 0, self.arguments.max_pixels or sys.maxsize)
        visual = {
            of: visual_lengths(self.family, self.model.config, bounds, self.task_dict[of[0]][of[1]], numbers)
            for of, numbers in documents.items()
        }
        return [
            len(text) / CHARACTERS + visual[task, part].get(doc, 0)
            for text, _, _, doc, task, part in (request.args for request in requests)
        ]

    def _check_options(self, given: Mapping[str, Any]) -> None:
        beams = options(given, self.processor.tokenizer, self.arguments.use_cache)["num_beams"]
        if beams > 1 and self.arguments.schedule.stages:
            message = f"num_beams={beams}: beam search reorders the cache that a schedule cuts; use num_beams=1."
            raise ArgumentError(message)
        ignored = sorted(set(given) - KNOWN)
        if ignored:
            logger.warning("generation options without a meaning here are ignored: {}", ", ".join(ignored))

    def _unpruned_samples(self, answered: Answered) -> int:
        """How many samples lost no token, of all processes; a schedule that pruned none of them was not evaluated."""
        schedule = self.arguments.schedule
        pictured = [one.accounting for one in answered.answers if one.accounting.visual_tokens]
        counts = torch.tensor([sum(one.unpruned for one in pictured), len(pictured)], device=self.device)
        unpruned, images = self.accelerator.reduce(counts).tolist() if schedule.stages else (0, 0)
        if images and unpruned == images and not schedule.keeps_all:
            average = sum(one.visual_tokens for one in pictured) / max(1, len(pictured))
            raise ArgumentError(
                f"model_args: schedule={schedule} pruned nothing: in all {images} samples with an image every visual token "
                f"stayed ({average:.0f} on average). Keep fewer: give a ratio, or a number of tokens below that."
            )
        return unpruned

    def _report(self, answered: Answered, other_load: float | None) -> None:
        """What the results say of the run: the harness's throughput, and our report."""
        answers, averages = answered.answers, answered.averages()
        largest = max((one.rows for one in answers), default=0)
        self.report = replace(
            self.report,
            circumstances=replace(self.report.circumstances, largest_batch=largest, other_load=other_load),
            averages=averages,
            tasks=answered.by_task(),
            unpruned_samples=self._unpruned_samples(answered),
            resumed=answered.resumed,
        )
        seconds, tokens = sum(one.seconds for one in answers), sum(one.accounting.output_tokens for one in answers)
        # The harness writes "avg_" before each of them.
        numbers = {name.removeprefix("avg_"): value for name, value in written(averages).items()}
        log_metrics(seconds, tokens, tokens / seconds if seconds else 0.0, {"total_requests": len(answers), **numbers})

    def _warn(self, samples: Sequence[TokenAccounting], requests: Sequence[Instance]) -> None:
        """Count what the harness's own wrappers answer, too, but whose answers say little: cut images, long prompts."""
        if self._cut:
            logger.warning(
                "{} samples have an image whose file is cut short or damaged; the rest of it is grey: {}. The results count them "
                "as cut_images.",
                *(len(self._cut), ", ".join(sorted(self._cut)[:3])),
            )
        most = self.model.config.text_config.max_position_embeddings
        long = [i for i, one in enumerate(samples) if one.input_tokens + one.output_tokens > most]
        if long:
            _, _, _, doc, task, _ = requests[long[0]].args
            logger.warning(
                "{} samples are longer than the {} positions that the model has, the first one task '{}', document {}: "
                "what it answers to them says little. The results count them as beyond_positions.",
                *(len(long), most, task, doc),
            )
        self.report = replace(self.report, cut_images=len(self._cut), beyond_positions=len(long))


@contextmanager
def _naming(names: Sequence[str]) -> Iterator[None]:
    """Any error inside names the samples it happened in, and still ends the run."""
    try:
        yield
    except SampleError:
        raise
    except Exception as error:
        raise SampleError(f"{'; '.join(names)}: {type(error).__name__}: {error}") from error
