"""The expert memory: which experts hold a slot, and in which state each expert is.

States: ``ABSENT`` (host only), ``QUEUED`` (a copy waits; no slot yet), ``COPYING`` (holds a slot,
not complete), ``RESIDENT`` (complete). A queued copy throws nobody out: the slot is taken when its
first chunk is handed to the hardware.
"""

from __future__ import annotations

from policies.capacity import MemoryPlan
from policies.interface import Shape

ABSENT, QUEUED, COPYING, RESIDENT = 0, 1, 2, 3


class ExpertMemory:
    """Slots of all pools. Lists are indexed by key; see :mod:`policies.interface` for keys."""

    def __init__(self, shape: Shape, plan: MemoryPlan) -> None:
        self.shape = shape
        self.plan = plan
        keys = shape.keys
        layers = [shape.layer_of(key) for key in range(keys)]
        self.layer_of: list[int] = layers
        self.pool_of: list[int] = [plan.pool_of_layer[layer] for layer in layers]
        self.bytes_of: list[int] = [shape.bytes_of(key) for key in range(keys)]
        # Units of a key: a low-bit copy is smaller only where capacity is counted in bytes.
        self.unit_of: list[int] = (
            self.bytes_of if plan.by_bytes else [plan.unit_of_layer[layer] for layer in layers]
        )
        self.state: list[int] = [ABSENT] * keys
        self.free: list[int] = list(plan.capacity)
        self.staging_free: int = plan.staging_slots
        self.staged: set[int] = set()
        self.slot_of: dict[int, int] = {}
        self._one_size = min(self.bytes_of) == max(self.bytes_of)
        self._least = self._least_units()
        self._never_full = {
            pool for pool, free in enumerate(self.free) if free >= self._least[pool]
        }
        self._free_slots = self._number_slots()
        self._free_staging = self._number_staging()

    def _number_slots(self) -> list[list[int]]:
        """Free slot numbers of each pool, lowest last (popped first); none where bytes count."""
        if self.plan.by_bytes:
            return [[] for _ in self.plan.capacity]
        numbers, first = [], 0
        for slots in self.plan.capacity:
            numbers.append(list(range(first + slots - 1, first - 1, -1)))
            first += slots
        return numbers

    def _number_staging(self) -> list[int]:
        if self.plan.by_bytes:
            return []
        first = sum(self.plan.capacity)
        return list(range(first + self.plan.staging_slots - 1, first - 1, -1))

    def _least_units(self) -> list[int]:
        """Units of the smallest expert of each pool, at the checkpoint's own precision."""
        least = [max(self.unit_of)] * len(self.plan.capacity)
        for key in range(self.shape.layers * self.shape.experts):
            pool = self.pool_of[key]
            least[pool] = min(least[pool], self.unit_of[key])
        return least

    @property
    def full(self) -> bool:
        """Whether every pool once had no room for another expert in full; buffers have none.

        Once: where precisions are mixed, an eviction may make more room than is needed.
        """
        return self.plan.buffers or not self._never_full

    def take(self, key: int) -> None:
        """Give ``key`` a slot of its pool; there must be room."""
        pool = self.pool_of[key]
        self.free[pool] -= self.unit_of[key]
        if self._never_full and self.free[pool] < self._least[pool]:
            self._never_full.discard(pool)
        numbers = self._free_slots[pool]
        if numbers:
            self.slot_of[key] = numbers.pop()
        self.state[key] = COPYING

    def take_staging(self, key: int) -> None:
        """Give ``key`` a staging slot; there must be one."""
        self.staging_free -= 1
        if self._free_staging:
            self.slot_of[key] = self._free_staging.pop()
        self.staged.add(key)
        self.state[key] = COPYING

    def replace(self, victim: int, key: int) -> None:
        """``key`` takes the slot of ``victim`` in a pool that counts slots."""
        self.state[victim] = ABSENT
        self.state[key] = COPYING
        self.slot_of[key] = self.slot_of.pop(victim)

    def release(self, key: int) -> None:
        """Take the slot from ``key``, cached or staged."""
        self.state[key] = ABSENT
        slot = self.slot_of.pop(key, None)
        if self.staged and key in self.staged:
            self.staged.discard(key)
            self.staging_free += 1
            if slot is not None:
                self._free_staging.append(slot)
            return
        pool = self.pool_of[key]
        self.free[pool] += self.unit_of[key]
        if slot is not None:
            self._free_slots[pool].append(slot)

    def swap(self, staged: int, resident: int) -> None:
        """``staged`` becomes a resident in the place of ``resident``, which is absent afterwards.

        Where all slots have one size, they change roles and nothing is copied; else the expert
        moves into the resident's slot on the GPU, since a staging slot fits the largest expert.
        """
        if not self._one_size and resident in self.slot_of:
            kept, moved = self.slot_of.pop(resident), self.slot_of[staged]
            self.slot_of[staged], self.slot_of[resident] = kept, moved
        self.staged.discard(staged)
        self.staged.add(resident)
        self.release(resident)

    def residents(self) -> list[int]:
        """Resident keys outside staging, ascending."""
        return [
            key
            for key, state in enumerate(self.state)
            if state == RESIDENT and key not in self.staged
        ]

    def occupied_bytes(self) -> int:
        """Bytes of all slots in use, staging included."""
        return sum(
            size for size, state in zip(self.bytes_of, self.state, strict=True) if state >= COPYING
        )
