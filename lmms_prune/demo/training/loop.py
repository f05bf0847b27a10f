"""The stages of training: the vision encoder on what stands at each token, then everything on questions."""

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

from lmms_prune.demo.training.attention_supervision import Gaze, watch
from lmms_prune.demo.training.data import LABELS, Batch, Batches
from lmms_prune.demo.training.families import Family

PLACES = ("place",)  # the dense labels that no word is near to
WARMUP = 100  # steps until the learning rate is full
DECAY = 0.4  # share of a stage's steps over which it falls at the end
EVERY = 100  # steps between two lines of the log
SAVE = 200  # steps between two saved states


@dataclass(frozen=True)
class Stage:
    """One stage, named as in `data.STAGES`: `each` questions on each of `pictures` a step.

    Without questions only the tower learns, with a `tower_rate` of 0 only the decoder.

    `tower_rate` holds for the tower and the projector, `rate` for the decoder. `dense` weighs the dense labels' loss
    beside the answers': it keeps what the tower has learned while the decoder's first gradients are noise. `gaze`
    weighs the loss that tells the decoder where in the picture the answer stands, `stated` the one that tells it which
    words of the question the answer depends on: the right option's, or what is to be confirmed or denied.
    """

    name: str
    steps: int
    pictures: int
    each: int
    tower_rate: float
    rate: float = 0.0
    dense: float = 1.0
    gaze: float = 0.0
    stated: float = 0.0


class Heads(nn.Module):
    """Reads the dense labels off the visual tokens, and an image's labels off its class token; in training only.

    A label's direction is the embedding of its word: a patch with a red circle comes to lie near "red" and "circle",
    and a letter near its own token. So the decoder starts with pictures that look like words that it can copy. Places
    have directions of their own (`PLACES`).
    """

    def __init__(self, family: Family) -> None:
        super().__init__()
        config = family.model.config
        hidden = config.get_text_config().hidden_size
        self.norm = nn.LayerNorm(hidden)
        self.nothing = nn.ParameterDict({name: nn.Parameter(torch.zeros(hidden)) for name in LABELS})
        self.sharpness = nn.Parameter(torch.tensor(1.0))
        self.present = nn.Linear(config.vision_config.hidden_size, sum(len(texts) - 1 for texts in LABELS.values()))
        self.places = nn.ParameterDict(
            {name: nn.Parameter(0.15 * torch.randn(len(LABELS[name]) - 1, hidden)) for name in PLACES}
        )
        for name, texts in LABELS.items():
            if name not in PLACES:
                self.register_buffer(f"words_{name}", torch.tensor([family.word(text) for text in texts[1:]]))

    def dense(self, name: str, states: Float[Tensor, "V D"], embedding: nn.Embedding) -> Float[Tensor, "V C"]:
        """Logits of one sort of label from normalised visual tokens."""
        words = self.places[name] if name in PLACES else embedding(self.get_buffer(f"words_{name}"))
        return self.sharpness * states @ torch.cat([self.nothing[name][None], words]).T


class Trainer:
    """Trains `family` into `folder`, where it keeps its state and its log; started again, it goes on.

    `origin` says in words what the training began with.

    Raises:
        ValueError: the state in `folder` cannot be read, or belongs to a training with other settings.
    """

    def __init__(
        self, family: Family, folder: Path, stages: list[Stage], seed: int, device: torch.device, origin: str = ""
    ) -> None:
        self.family, self.folder, self.stages, self.seed, self.device = family, folder, stages, seed, device
        self.origin, self.stopping = origin, False
        torch.manual_seed(seed)
        self.heads = Heads(family).to(device)
        family.model.to(device).train()
        watch(family.decoder)
        self.stage, self.step = 0, 0
        self.optimizer = self._optimizer()
        self.state = folder / "state.pt"
        if self.state.exists():
            self._load()

    def run(self, minutes: float | None, workers: int) -> bool:
        """Train until all stages are done (True), or `minutes` are over or `stop` was called (False).

        The state is saved either way.
        """
        end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        while self.stage < len(self.stages):
            stage = self.stages[self.stage]
            seen: dict[str, list[float]] = defaultdict(list)
            began = time.monotonic()
            for batch in self._batches(stage, workers):
                self._set_rates(stage)
                for name, value in self._learn(stage, batch.to(self.device)).items():
                    seen[name].append(value)
                self.step += 1
                if self.step % EVERY == 0:
                    self._log(stage, seen, (time.monotonic() - began) / EVERY)
                    began = time.monotonic()
                if self.step % SAVE == 0:
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
        """Let `run` end after the step that it is at."""
        self.stopping = True

    def _batches(self, stage: Stage, workers: int) -> Iterator[Batch]:
        batches = Batches(self.family, self.seed, stage.pictures, stage.each, stage.name)
        left = range(self.step, stage.steps)
        loader = DataLoader(
            batches, batch_size=None, sampler=list(left), num_workers=workers, worker_init_fn=_leave_interrupts
        )
        return iter(loader)

    def _learn(self, stage: Stage, batch: Batch) -> dict[str, float]:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss, said = self.loss(stage, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in self.optimizer.param_groups for p in group["params"]], 1.0)
        self.optimizer.step()
        return said

    def loss(self, stage: Stage, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """The loss of one batch, and its parts as numbers."""
        features, class_state = self.family.features(batch.pixels)
        dense, said = self._dense_loss(batch, features, class_state)
        if not stage.each:
            return dense, said
        gaze = Gaze(batch.grounded, batch.grounds)
        with gaze.collecting() if stage.gaze or stage.stated else nullcontext():
            logits = self.logits(batch, features)
        token = functional.cross_entropy(logits.float(), batch.target, reduction="none")
        loss = (token * batch.weight).sum() / len(batch.sorts)
        for sort, right in self.exact(batch, logits).items():
            said[sort] = sum(right) / len(right)
        for name, among, weight in (("gaze", ~batch.textual, stage.gaze), ("stated", batch.textual, stage.stated)):
            if weight:
                elsewhere = gaze.loss(among)
                said[name] = elsewhere.item()
                loss = loss + weight * elsewhere
        return loss + stage.dense * dense, {**said, "loss": loss.item()}

    def logits(self, batch: Batch, features: Float[Tensor, "V D"]) -> Float[Tensor, "A vocabulary"]:
        """Next-token logits at the places before each answer token."""
        embedded = self.family.model.get_input_embeddings()(batch.ids)
        embedded = embedded.masked_scatter(batch.is_image[..., None], features.to(embedded.dtype))
        states = self.family.decoder(
            inputs_embeds=embedded, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        return self.family.model.lm_head(states[batch.ask[:, 0], batch.ask[:, 1]])

    @staticmethod
    def exact(batch: Batch, logits: Tensor) -> dict[str, list[float]]:
        """For each sort of question, which answers greedy decoding would give in full."""
        wrong = torch.zeros(len(batch.sorts), device=logits.device)
        wrong.index_add_(0, batch.answer, (logits.argmax(-1) != batch.target).float())
        seen: dict[str, list[float]] = defaultdict(list)
        for sort, errors in zip(batch.sorts, wrong.tolist(), strict=True):
            seen[sort].append(float(errors == 0))
        return seen

    def _dense_loss(
        self, batch: Batch, features: Tensor, class_state: Tensor | None
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        total, said = features.new_zeros(()), {}
        states = self.heads.norm(features)
        embedding = self.family.model.get_input_embeddings()
        for name, labels in batch.labels.items():
            logits = self.heads.dense(name, states, embedding).float()
            each = functional.cross_entropy(logits, labels, reduction="none")
            something = labels > 0
            # Most tokens show nothing: both halves count alike, else "nothing" is all that is learned for long.
            total = total + each[something].sum() / max(1, int(something.sum())) + each[~something].mean()
            right = logits.argmax(-1) == labels
            said[f"patch {name}"] = right[something].float().mean().item() if something.any() else 1.0
        if class_state is not None:
            logits = self.heads.present(class_state).float()
            total = total + functional.binary_cross_entropy_with_logits(logits, batch.present)
        return total, said

    def _evaluate(self, stage: Stage, batches: int = 40) -> None:
        self._write({"held out": self.held_out(stage, batches)})

    @torch.no_grad()
    def held_out(self, stage: Stage, batches: int) -> dict[str, float]:
        """Shares that are right on held-out pictures: of answers, by sort of question, and of dense labels ("patch …")."""
        self.family.model.eval()
        seen: dict[str, list[float]] = defaultdict(list)
        held_out = Batches(self.family, self.seed, stage.pictures, stage.each, stage.name, "test")
        for number in range(batches):
            batch = held_out[number].to(self.device)
            features, class_state = self.family.features(batch.pixels)
            _, said = self._dense_loss(batch, features, class_state)
            for name, value in said.items():
                seen[name].append(value)
            if stage.each:
                for sort, right in self.exact(batch, self.logits(batch, features)).items():
                    seen[sort] += right
        self.family.model.train()
        return {name: sum(values) / len(values) for name, values in sorted(seen.items())}

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW on what the stage teaches. Vectors do not decay."""
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = defaultdict(list)
        stage = self.stages[min(self.stage, len(self.stages) - 1)]
        for name, parameter in [*self.family.model.named_parameters(), *self.heads.named_parameters(prefix="heads")]:
            tower = any(part in name for part in ("vision_tower", "visual.", "multi_modal_projector", "heads."))
            parameter.requires_grad_(stage.tower_rate > 0 if tower else stage.each > 0)
            if parameter.requires_grad:
                groups[tower, parameter.ndim > 1].append(parameter)
        settings = [
            {"params": group, "tower": tower, "weight_decay": 0.05 * decays}
            for (tower, decays), group in sorted(groups.items())
        ]
        return torch.optim.AdamW(settings, lr=0.0, betas=(0.9, 0.98), fused=self.device.type == "cuda")

    def _set_rates(self, stage: Stage) -> None:
        """Linear warm-up, then constant, and over the last steps down to a fiftieth.

        A rate that falls from the start on is low when, after long, the decoder begins to look.
        """
        left = 1 - self.step / stage.steps
        share = min(1.0, (self.step + 1) / WARMUP, 0.02 + 0.98 * left / DECAY)
        for group in self.optimizer.param_groups:
            group["lr"] = share * (stage.tower_rate if group["tower"] else stage.rate)

    def _log(self, stage: Stage, seen: dict[str, list[float]], seconds: float) -> None:
        figures = {name: round(sum(values) / len(values), 4) for name, values in sorted(seen.items())}
        seen.clear()
        loss = f", loss {figures['loss']:.3f}" if "loss" in figures else ""
        print(f"{stage.name}: step {self.step} of {stage.steps}, {seconds:.2f} s a step{loss}", flush=True)
        self._write({"stage": stage.name, "step": self.step, "s/step": round(seconds, 3), **figures})

    def _write(self, line: dict[str, Any]) -> None:
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")

    def _save(self) -> None:
        """Replace the saved state in one move, so that an interruption leaves the former one."""
        state = {"model": self.family.model.state_dict(), "heads": self.heads.state_dict()}
        state |= {"optimizer": self.optimizer.state_dict(), "stage": self.stage, "step": self.step}
        state |= {"settings": self._settings()}
        partial = self.state.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.state)

    def _load(self) -> None:
        if not is_zipfile(self.state):  # a file that ends too early is none
            raise ValueError(f"{self.state} is damaged: delete it to begin anew")
        state = torch.load(self.state, map_location=self.device, weights_only=True)
        was, now = state["settings"], self._settings()
        if differ := [
            f"{name} was {was.get(name)} and is {now.get(name)}"
            for name in {**now, **was}
            if was.get(name) != now.get(name)
        ]:
            raise ValueError(f"{self.state} belongs to a training with other settings: {'; '.join(differ)}")
        self.family.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage, self.step = state["stage"], state["step"]
        self.optimizer = self._optimizer()
        if self.stage < len(self.stages):
            self.optimizer.load_state_dict(state["optimizer"])

    def _settings(self) -> dict[str, Any]:
        each = {f"{stage.name}.{name}": value for stage in self.stages for name, value in asdict(stage).items()}
        return {"seed": self.seed, "origin": self.origin, **each}


def _leave_interrupts(worker: int) -> None:
    """An interruption is for the training, which then ends in order; its workers end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
