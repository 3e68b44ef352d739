"""Two buffers in place of a cache: layers take turns, and nothing outlives its turn.

Not a policy of its own: the memory of ``pregated`` and ``layer-stream``. Goes with the scopes
``buffers`` and ``whole-layers`` of :mod:`policies.capacity`.
"""

from __future__ import annotations

from collections.abc import Collection

from policies.core import DecisionCore
from policies.interface import CacheRule, Keys
from policies.memory import RESIDENT


class TwoBuffers(CacheRule):
    """Empties the other buffer once a layer's gate is known, and both when a step begins.

    What is still in flight then leaves at the next gate. Victims, where a buffer is too small for
    what was brought in by mistake: the layer whose turn is farthest, then the lowest key.
    """

    def bind(self, core: DecisionCore) -> None:
        """Both buffers are empty."""
        super().bind(core)
        self._held: set[int] = set()
        self._layer_of = core.memory.layer_of
        self._pool_of = core.memory.pool_of

    def on_step(self, step: int) -> None:
        """Nothing is kept from one step to the next."""
        self._empty(list(self._held))

    def on_event(self, layer: int, keys: Keys) -> None:
        """The layer before has been computed."""
        layer_of = self._layer_of
        self._empty([key for key in self._held if layer_of[key] != layer])

    def _empty(self, keys: list[int]) -> None:
        self.core.evict_all(sorted(keys))

    def on_insert(self, key: int) -> None:
        """``key`` takes a slot."""
        self._held.add(key)

    def on_evict(self, key: int) -> None:
        """``key`` lost its slot."""
        self._held.discard(key)

    def victim(self, pool: int, barred: Collection[int]) -> int | None:
        """The resident whose layer comes last from here."""
        state, pool_of, layer_of = self.state, self._pool_of, self._layer_of
        here, layers = self.core.layer, self.core.shape.layers
        candidates = [
            key
            for key in self._held
            if pool_of[key] == pool and state[key] == RESIDENT and key not in barred
        ]
        return min(
            candidates, key=lambda key: (-((layer_of[key] - here) % layers), key), default=None
        )
