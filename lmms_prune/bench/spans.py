"""Marks at which the parts of one generation begin and end, set by hooks around those of `prune`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lmms_prune.bench.clock import Clock
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule

PARTS = ("encoder", "selection", "prefill", "decode")


class Marks:
    """The times at which a run's parts begin and end."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.encoder: list[list[Any]] = []
        self.selection: list[list[Any]] = []
        self.first_token: Any = None
        # A method may run the encoder again, or the whole model as its guide: that time belongs to its stage.
        self.open_stages = 0

    @contextmanager
    def around(self, model: Any, schedule: Schedule, **options: Any) -> Iterator[None]:
        """Hook the model outside `prune`'s own hooks: a stage's time passes between a hook before and one after them.

        Args:
            model, schedule, options: as for `prune`.
        """
        parts = ModelParts.of(model)
        stages = [parts.layers[stage.layer] for stage in schedule.stages]
        last = parts.family.last_of_vision(parts.multimodal)
        handles = [
            parts.encoder.register_forward_pre_hook(self._opens(self.encoder)),
            last.register_forward_hook(self._closes(self.encoder)),
            model.register_forward_hook(self._answered),
            *(layer.register_forward_pre_hook(self._opens(self.selection)) for layer in stages),
        ]
        # The baseline is the unhooked model; `prune` with an empty schedule would still hook it for the trace.
        closing = (layer.register_forward_pre_hook(self._closes(self.selection)) for layer in stages)
        with hooked(handles), prune(model, schedule, **options) if stages else nullcontext(), hooked(closing):
            yield

    def _opens(self, spans: list[list[Any]]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.first_token is None and not self.open_stages:
                spans.append([self.clock.mark()])
            self.open_stages += spans is self.selection

        return hook

    def _closes(self, spans: list[list[Any]]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.open_stages -= spans is self.selection
            if self.first_token is None and not self.open_stages:
                spans[-1].append(self.clock.mark())

        return hook

    def _answered(self, *_: Any) -> None:
        if self.first_token is None and not self.open_stages:
            self.first_token = self.clock.mark()

    def parts(self, start: Any, end: Any) -> dict[str, float]:
        """Return the seconds of each of PARTS; they add up to the whole."""
        between = self.clock.between
        encoder = sum(between(*span) for span in self.encoder)
        selection = sum(between(*span) for span in self.selection)
        prefill = between(start, self.first_token) - encoder - selection
        decode = between(self.first_token, end)
        return {"encoder": encoder, "selection": selection, "prefill": prefill, "decode": decode}
