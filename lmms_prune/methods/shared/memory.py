"""Memory: what a method's stages pass on to its later stages, within one prefill."""

from __future__ import annotations

from typing import TypeVar

State = TypeVar("State")


class Memory:
    """Values by their class and the layer of the stage that stored them.

    A method stores objects of a class of its own, so that no two methods read each other's.
    """

    def __init__(self) -> None:
        self._stored: dict[tuple[type, int], object] = {}

    def store(self, layer: int, state: object) -> None:
        """Keep `state` of the stage at `layer`; replaces what the stage stored before."""
        self._stored[type(state), layer] = state

    def before(self, layer: int, kind: type[State]) -> State | None:
        """The `kind` that the nearest stage before `layer` stored, or None."""
        layers = [at for stored, at in self._stored if stored is kind and at < layer]
        state = self._stored[kind, max(layers)] if layers else None
        return state if isinstance(state, kind) else None
