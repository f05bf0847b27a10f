"""The stages of training: first the vision encoder learns each token's content, then the whole model learns questions."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from lmms_prune.demo.training.attention_supervision import AttentionSupervision, supervise_attention
from lmms_prune.demo.training.data import LABELS, Batch, QuestionBatches
from lmms_prune.demo.training.families import TrainingFamily

OWN_DIRECTION = ("place",)  # the dense labels for which there is no word
WARMUP = 100  # steps until the learning rate reaches its maximum
DECAY = 0.4  # the share of a stage's steps, at its end, in which the learning rate falls
LOG_EVERY = 100  # steps between two lines of the log
SAVE_EVERY = 200  # steps between two saved states


_SAVED_NAMES = {"attention": "gaze", "encoder_rate": "tower_rate"}  # so that states of earlier versions can be resumed


@dataclass(frozen=True)
class TrainingStage:
    """One stage of training.

    Without questions only the vision encoder learns; with a `encoder_rate` of 0 only the decoder.

    Args:
        name: a name in `data.STAGES`.
        steps: the number of steps.
        pictures: pictures per step.
        each: questions per picture.
        encoder_rate: learning rate of the vision encoder and the projector.
        rate: learning rate of the decoder.
        dense: weight of the dense labels' loss, relative to the answers' loss. It preserves what the vision encoder has
            learned while the decoder's first gradients are noise.
        attention: weight of the attention loss whose targets are in the picture, where the answer is.
        stated: weight of the attention loss whose targets are the words of the question that the answer depends on: the
            right option, or the statement to confirm or deny.
    """

    name: str
    steps: int
    pictures: int
    each: int
    encoder_rate: float
    rate: float = 0.0
    dense: float = 1.0
    attention: float = 0.0
    stated: float = 0.0

    def saved(self) -> dict[str, Any]:
        """The settings as saved states name them."""
        return {_SAVED_NAMES.get(name, name): value for name, value in asdict(self).items()}


class Heads(nn.Module):
    """Predicts the dense labels from visual tokens, and an image's labels from its class token; used only in training.

    A label's direction is the embedding of its word: a patch with a red circle moves near "red" and "circle", and a
    letter near its token. So the decoder starts with pictures that resemble words, which it can copy. Labels in
    `OWN_DIRECTION` have learned directions.
    """

    def __init__(self, family: TrainingFamily) -> None:
        super().__init__()
        config = family.model.config
        hidden = config.get_text_config().hidden_size
        self.norm = nn.LayerNorm(hidden)
        self.nothing = nn.ParameterDict({name: nn.Parameter(torch.zeros(hidden)) for name in LABELS})
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.present = nn.Linear(config.vision_config.hidden_size, sum(len(texts) - 1 for texts in LABELS.values()))
        self.places = nn.ParameterDict(
            {name: nn.Parameter(0.15 * torch.randn(len(LABELS[name]) - 1, hidden)) for name in OWN_DIRECTION}
        )
        for name, texts in LABELS.items():
            if name not in OWN_DIRECTION:
                self.register_buffer(f"words_{name}", torch.tensor([family.word(text) for text in texts[1:]]))

    def dense(self, name: str, states: Float[Tensor, "V D"], embedding: nn.Embedding) -> Float[Tensor, "V C"]:
        """The logits of one sort of label, from normalised visual tokens."""
        words = self.places[name] if name in OWN_DIRECTION else embedding(self.get_buffer(f"words_{name}"))
        return self.sharpness * states @ torch.cat([self.nothing[name][None], words]).T


class Trainer:
    """Trains a model, with its state and log in `folder`; a new Trainer with the same folder resumes the training.

    Args:
        family: the model.
        folder: the folder for the state and the log.
        stages: the stages, in order.
        seed: the seed of batches and heads.
        device: the device to train on.
        origin: a text that says what the training started from; part of the settings.

    Raises:
        ValueError: the state in `folder` cannot be read, or belongs to a training with other settings.
    """

    def __init__(
        self,
        family: TrainingFamily,
        folder: Path,
        stages: list[TrainingStage],
        seed: int,
        device: torch.device,
        origin: str = "",
    ) -> None:
        self.family, self.folder, self.stages, self.seed, self.device = family, folder, stages, seed, device
        self.origin, self.stopping = origin, False
        torch.manual_seed(seed)
        self.heads = Heads(family).to(device)
        family.model.to(device).train()
        supervise_attention(family.decoder)
        self.stage, self.step = 0, 0
        self.optimizer = self._optimizer()
        self.state = folder / "state.pt"
        if self.state.exists():
            self._load()

    def run(self, minutes: float | None, workers: int) -> bool:
        """Train until all stages are done, `minutes` are over or `stop` is called. The state is saved in any case.

        Returns:
            whether all stages are done.
        """
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            figures: dict[str, list[float]] = defaultdict(list)
            began = time.monotonic()
            for batch in self._batches(stage, workers):
                self._set_rates(stage)
                for name, value in self._learn(stage, batch.to(self.device)).items():
                    figures[name].append(value)
                self.step += 1
                if self.step % LOG_EVERY == 0:
                    self._log(stage, figures, (time.monotonic() - began) / LOG_EVERY)
                    began = time.monotonic()
                if self.step % SAVE_EVERY == 0:
                    self._save()
                if self.stopping or time.monotonic() > end:
                    self._save()
                    return False
            if stage.steps:
                self._evaluate(stage)
            self.stage, self.step = self.stage + 1, 0
            self.optimizer = self._optimizer()
            self._save()
        return True

    def stop(self) -> None:
        """Let `run` end after its current step."""
        self.stopping = True

    def _batches(self, stage: TrainingStage, workers: int) -> Iterator[Batch]:
        batches = QuestionBatches(self.family, self.seed, stage.pictures, stage.each, stage.name)
        remaining = range(self.step, stage.steps)
        loader = DataLoader(
            batches, batch_size=None, sampler=list(remaining), num_workers=workers, worker_init_fn=_leave_interrupts
        )
        return iter(loader)

    def _learn(self, stage: TrainingStage, batch: Batch) -> dict[str, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, parts = self.loss(stage, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        return parts

    def loss(self, stage: TrainingStage, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The loss of one batch, and its parts as numbers."""
        features, class_state = self.family.features(batch.pixels)
        dense, parts = self._dense_loss(batch, features, class_state)
        if not stage.each:
            return dense, parts
        supervision = AttentionSupervision(batch.supervised, batch.targets)
        with supervision.collecting() if stage.attention or stage.stated else nullcontext():
            logits = self.logits(batch, features)
        token = functional.cross_entropy(logits.float(), batch.target, reduction="none")
        loss = (token * batch.weight).sum() / len(batch.sorts)
        for sort, right in self.exact(batch, logits).items():
            parts[sort] = sum(right) / len(right)
        # The log calls the loss with targets in the picture "gaze".
        losses = (("gaze", ~batch.in_question, stage.attention), ("stated", batch.in_question, stage.stated))
        for name, among, weight in losses:
            if weight:
                attention_loss = supervision.loss(among)
                parts[name] = attention_loss.item()
                loss = loss + weight * attention_loss
        return loss + stage.dense * dense, {**parts, "loss": loss.item()}

    def logits(self, batch: Batch, features: Float[Tensor, "V D"]) -> Float[Tensor, "A vocabulary"]:
        """The logits of every answer token, from the token before it."""
        embedded = self.family.model.get_input_embeddings()(batch.ids)
        embedded = embedded.masked_scatter(batch.is_image[..., None], features.to(embedded.dtype))
        states = self.family.decoder(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        return self.family.model.lm_head(states[batch.asking[:, 0], batch.asking[:, 1]])

    @staticmethod
    def exact(batch: Batch, logits: Tensor) -> dict[str, list[float]]:
        """For each sort of question, which answers greedy decoding would give in full: 1.0 or 0.0 for each answer."""
        wrong = torch.zeros(len(batch.sorts), device=logits.device)
        wrong.index_add_(0, batch.answer, (logits.argmax(-1) != batch.target).float())
        right: dict[str, list[float]] = defaultdict(list)
        for sort, errors in zip(batch.sorts, wrong.tolist(), strict=True):
            right[sort].append(float(errors == 0))
        return right

    def _dense_loss(
        self, batch: Batch, features: Tensor, class_state: Tensor | None
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        total, shares = features.new_zeros(()), {}
        states = self.heads.norm(features)
        embedding = self.family.model.get_input_embeddings()
        for name, labels in batch.labels.items():
            logits = self.heads.dense(name, states, embedding).float()
            each = functional.cross_entropy(logits, labels, reduction="none")
            labelled = labels > 0
            # Most tokens show nothing. Both groups get equal weight; otherwise the model would predict only "nothing" for long.
            total = total + each[labelled].sum() / max(1, int(labelled.sum())) + each[~labelled].mean()
            right = logits.argmax(-1) == labels
            shares[f"patch {name}"] = right[labelled].float().mean().item() if labelled.any() else 1.0
        if class_state is not None:
            logits = self.heads.present(class_state).float()
            total = total + functional.binary_cross_entropy_with_logits(logits, batch.present)
        return total, shares

    def _evaluate(self, stage: TrainingStage, batches: int = 40) -> None:
        self._write({"held out": self.held_out(stage, batches)})

    @torch.no_grad()
    def held_out(self, stage: TrainingStage, batches: int) -> dict[str, float]:
        """The shares of right predictions on held-out pictures: answers by sort of question, and dense labels ("patch …")."""
        self.family.model.eval()
        right: dict[str, list[float]] = defaultdict(list)
        held_out = QuestionBatches(self.family, self.seed, stage.pictures, stage.each, stage.name, "test")
        for number in range(batches):
            batch = held_out[number].to(self.device)
            features, class_state = self.family.features(batch.pixels)
            _, shares = self._dense_loss(batch, features, class_state)
            for name, value in shares.items():
                right[name].append(value)
            if stage.each:
                for sort, answers in self.exact(batch, self.logits(batch, features)).items():
                    right[sort] += answers
        self.family.model.train()
        return {name: sum(values) / len(values) for name, values in sorted(right.items())}

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW on the parameters that the current stage trains, without weight decay on vectors."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        stage = self.stages[min(self.stage, len(self.stages) - 1)]
        for name, parameter in [*self.family.model.named_parameters(), *self.heads.named_parameters(prefix="heads")]:
            encoder = any(part in name for part in ("vision_tower", "visual.", "multi_modal_projector", "heads."))
            parameter.requires_grad_(stage.encoder_rate > 0 if encoder else stage.each > 0)
            if parameter.requires_grad:
                groups[encoder, parameter.ndim > 1].append(parameter)
        settings = [
            {"params": group, "encoder": encoder, "weight_decay": 0.05 * decays}
            for (encoder, decays), group in sorted(groups.items())
        ]
        return torch.optim.AdamW(settings, lr=0.0, betas=(0.9, 0.98), fused=self.device.type == "cuda")

    def _set_rates(self, stage: TrainingStage) -> None:
        """Set the learning rates: linear warm-up, then constant, and falling to a fiftieth over the last steps.

        A rate that falls from the start would be too low when the decoder, after many steps, begins to attend to pictures.
        """
        remaining = 1 - self.step / stage.steps
        share = min(1.0, (self.step + 1) / WARMUP, 0.02 + 0.98 * remaining / DECAY)
        for group in self.optimizer.param_groups:
            group["lr"] = share * (stage.encoder_rate if group["encoder"] else stage.rate)

    def _log(self, stage: TrainingStage, figures: dict[str, list[float]], seconds: float) -> None:
        means = {name: round(sum(values) / len(values), 4) for name, values in sorted(figures.items())}
        figures.clear()
        loss = f", loss {means['loss']:.3f}" if "loss" in means else ""
        print(f"{stage.name}: step {self.step} of {stage.steps}, {seconds:.2f} s a step{loss}", flush=True)
        self._write({"stage": stage.name, "step": self.step, "s/step": round(seconds, 3), **means})

    def _write(self, line: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        """Save the state. It replaces the former one in one step, so an interruption leaves one of them complete."""
        state = {"model": self.family.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "stage": self.stage, "step": self.step}
        state |= {"settings": self._settings()}
        partial = self.state.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state)

    def _load(self) -> None:
        if not is_zipfile(self.state):  # a truncated file is not a zip file
            raise ValueError(f"{self.state} is damaged: delete it to begin anew")
        state = torch.load(self.state, map_location=self.device, weights_only=True)
        saved, current = state["settings"], self._settings()
        if differ := [
            f"{name} was {saved.get(name)} and is {current.get(name)}"
            for name in {**current, **saved}
            if saved.get(name) != current.get(name)
        ]:
            raise ValueError(f"{self.state} belongs to a training with other settings: {'; '.join(differ)}")
        self.family.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step = state["stage"], state["step"]
        self.optimizer = self._optimizer()
        if self.stage < len(self.stages):
            self.optimizer.load_state_dict(state["optimizer"])

    def _settings(self) -> dict[str, Any]:
        each = {f"{stage.name}.{name}": value for stage in self.stages for name, value in stage.saved().items()}
        return {"seed": self.seed, "origin": self.origin, **each}


def _leave_interrupts(worker: int) -> None:
    """Let a worker ignore interruptions: the main process handles them, saves its state and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
