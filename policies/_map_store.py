"""FineMoE's store of expert maps: what an iteration's gates said, found again by cosine.

An entry is (embedding [H], map [L, E]). Searches are batched matrix products. Both are kept as
whole numbers in float32, probabilities in units of 1/4096 and embeddings as unit vectors in units
of 1/2048: products of a layer's probabilities, and of embeddings, then sum to less than 2**24, so
they are exact in any order of summation and a search finds the same entry on every machine.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]

#: Probability units: whole numbers up to this stand for 0 to 1.
UNITS = 4096
_EMBEDDING_UNITS = 2048
_ZERO = np.float32(0)
_BLOCK_ROWS = 256
#: multiplications of one product below which OpenBLAS starts no threads
_MOST_TERMS = 1 << 18


def as_units(probabilities: Floats) -> Floats:
    """Probabilities in units, float32; nan (a layer that did not run) becomes 0."""
    units: Floats = np.multiply(probabilities, UNITS, dtype=np.float32)
    np.rint(units, out=units)
    return np.fmax(units, _ZERO, out=units)


def scatter(experts: npt.NDArray[Any], weights: Floats, num_experts: int) -> Floats:
    """Top-k weights [..., k] of ``experts`` [..., k] as probabilities [..., E], others 0."""
    # One place more, the last, for the experts -1 of layers that did not run.
    full = np.zeros((*experts.shape[:-1], num_experts + 1), np.float32)
    np.put_along_axis(full, experts.astype(np.int64), weights.astype(np.float32), axis=-1)
    return full[..., :num_experts]


def _directions(embeddings: Floats) -> tuple[Floats, Floats]:
    """Unit vectors in whole numbers, float32 [n, H], and their inverse norms, float64 [n]."""
    exact = embeddings.astype(np.float64)
    exact *= _inverse(np.einsum("nh,nh->n", exact, exact))[:, None] * _EMBEDDING_UNITS
    whole = np.rint(exact).astype(np.float32)
    return whole, _inverse(np.einsum("nh,nh->n", whole, whole, dtype=np.float64))


def _inverse(squares: Floats) -> Floats:
    """1 / sqrt, and 0 for 0: what has no direction is similar to nothing."""
    inverse: Floats = np.where(squares > 0, 1 / np.sqrt(np.where(squares > 0, squares, 1)), 0)
    return inverse


def _products(rows: Floats, others: Floats) -> Floats:
    """``rows`` [n, K] times ``others`` [m, K]: float32 [n, m].

    In products so small that they stay on one thread: for sizes like these, and beside other
    simulations, threads cost more than they bring.
    """
    result = np.empty((len(rows), len(others)), np.float32)
    size = max(1, _MOST_TERMS // max(1, rows.size))
    for first in range(0, len(others), size):
        part = slice(first, first + size)
        np.matmul(rows, others[part].T, out=result[:, part])
    return result


class MapStore:
    """At most ``capacity`` entries. At capacity a new one replaces the most redundant.

    ``semantic_share``: weight of the embeddings' similarity in the redundancy, the rest is the
    maps'. ``maps``: float32 [layers, capacity, experts] in :data:`UNITS`, the first ``size`` are
    filled. Memory: about 4 * capacity * (layers * experts + H) bytes.
    """

    def __init__(self, capacity: int, layers: int, experts: int, semantic_share: float) -> None:
        self.capacity = capacity
        self.size = 0
        self.maps = np.zeros((layers, capacity, experts), np.float32)
        self._semantic_share = semantic_share
        self.inverse_norms = np.zeros((layers, capacity))
        self.embeddings = np.zeros((capacity, 0), np.float32)
        self.inverse_lengths = np.zeros(capacity)

    @property
    def nbytes(self) -> int:
        """Host memory taken."""
        return self.maps.nbytes + self.embeddings.nbytes + self.inverse_norms.nbytes

    def semantic(self, embeddings: Floats) -> Floats:
        """Cosines of ``embeddings`` [n, H] with those of the entries: [n, size]."""
        whole, inverse = _directions(embeddings)
        if self.size == 0:
            return np.zeros((len(embeddings), 0))
        return self._semantic(whole, inverse)

    def _semantic(self, whole: Floats, inverse: Floats) -> Floats:
        dots = _products(whole, self.embeddings[: self.size]).astype(np.float64)
        dots *= self.inverse_lengths[: self.size]
        dots *= inverse[:, None]
        return dots

    def search_ahead(self, embeddings: Floats, maps: Floats) -> SearchAhead:
        """Searches for iterations of one token each, one after the other: [n, H], [n, L, E]."""
        return SearchAhead(self, embeddings, maps)

    def prefixes(self, rows: int) -> Prefixes:
        """A trajectory search for the ``rows`` tokens of one iteration."""
        return Prefixes(self.maps, self.inverse_norms, self.size, rows)

    def fill(self, embeddings: Floats, maps: Floats) -> None:
        """Add entries in order, from ``embeddings`` [n, H] and ``maps`` [n, L, E] in units."""
        for first in range(0, len(maps), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            prefixes = self.prefixes(len(maps[block]))
            for layer in range(len(self.maps)):
                prefixes.extend(layer, maps[block, layer])
            semantic = self.semantic(embeddings[block])
            self.add(embeddings[block], maps[block], semantic, prefixes.cosines())

    def add(
        self, embeddings: Floats, maps: Floats, semantic: Floats, trajectory: Floats
    ) -> list[int]:
        """Add entries one after the other, given their cosines with the entries so far.

        Returns their places.
        """
        whole, inverse = _directions(embeddings)
        if self.embeddings.shape[1] == 0:
            self.embeddings = np.zeros((self.capacity, whole.shape[1]), np.float32)
        redundancy = self._redundancies(semantic, trajectory)
        squares = np.einsum("nle,nle->nl", maps, maps, dtype=np.float64)
        norms = _inverse(np.cumsum(squares, axis=1))
        among = self._among(whole, inverse, maps, norms[:, -1])
        places = []
        for row in range(len(maps)):
            slot = self.size if self.size < self.capacity else int(redundancy[row].argmax())
            self.size = max(self.size, slot + 1)
            self.maps[:, slot] = maps[row]
            self.inverse_norms[:, slot] = norms[row]
            self.embeddings[slot] = whole[row]
            self.inverse_lengths[slot] = inverse[row]
            redundancy[row + 1 :, slot] = among[row + 1 :, row]
            places.append(slot)
        return places

    def _redundancies(self, semantic: Floats, trajectory: Floats) -> Floats:
        """[n, capacity]; -inf where there is no entry yet."""
        known = np.full((len(semantic), self.capacity), -np.inf)
        known[:, : semantic.shape[1]] = self._mixed(semantic, trajectory)
        return known

    def _mixed(self, semantic: Floats, trajectory: Floats) -> Floats:
        share = self._semantic_share
        return share * semantic + (1 - share) * trajectory

    def _among(self, whole: Floats, inverse: Floats, maps: Floats, norms: Floats) -> Floats:
        """Redundancy of the new entries among themselves: [n, n]."""
        rows = len(maps)
        if rows == 1:
            return np.zeros((1, 1))
        dots = np.zeros((rows, rows))
        for layer in range(maps.shape[1]):
            dots += _products(maps[:, layer], maps[:, layer])
        semantic = _products(whole, whole) * np.outer(inverse, inverse)
        return self._mixed(semantic, dots * np.outer(norms, norms))


class Prefixes:
    """Cosines between the maps of an iteration so far and the entries' maps up to there.

    The products of the layers before are kept, so a layer costs one product of [rows, E] with
    [E, size].
    """

    def __init__(self, maps: Floats, inverse_norms: Floats, size: int, rows: int) -> None:
        self._maps = maps
        self._inverse_norms = inverse_norms
        self._size = size
        self._dots = np.zeros((rows, size))
        self._squares = np.zeros(rows)
        self._layer = len(maps) - 1

    def extend(self, layer: int, units: Floats) -> None:
        """The gate of ``layer`` said ``units`` [rows, E]."""
        self._layer = layer
        if self._size == 0:
            return
        self._dots += _products(units, self._maps[layer, : self._size])
        self._squares += np.vecdot(units, units)

    def best(self) -> list[tuple[int, float]]:
        """For each row the most similar entry, and its cosine."""
        scores = self._dots * self._inverse_norms[self._layer, : self._size]
        found = []
        for row, square in enumerate(self._squares.tolist()):
            entry = int(scores[row].argmax())
            found.append((entry, float(scores[row, entry]) / math.sqrt(square) if square else 0.0))
        return found

    def cosines(self) -> Floats:
        """[rows, size], over all layers."""
        scores = self._dots * self._inverse_norms[-1, : self._size]
        scores *= _inverse(self._squares)[:, None]
        return scores


class SearchAhead:
    """Both searches for iterations of one token each, whose products are taken at once.

    What :meth:`MapStore.semantic` and :class:`Prefixes` give one by one, as long as nothing but
    :meth:`add` changes the store.
    """

    def __init__(self, store: MapStore, embeddings: Floats, maps: Floats) -> None:
        rows, layers = maps.shape[:2]
        size = store.size
        places = min(store.capacity, size + rows)
        self._store = store
        self._embeddings, self._maps = embeddings, maps
        whole, self._inverse = _directions(embeddings)
        self._meaning = np.zeros((rows, places))
        if size:
            self._meaning[:, :size] = _products(whole, store.embeddings[:size])
        self._meaning_among = _products(whole, whole)
        self._paths = np.zeros((rows, layers, places))
        self._paths_among = np.empty((rows, layers, rows))
        for layer in range(layers):
            own = maps[:, layer]
            self._paths[:, layer, :size] = _products(own, store.maps[layer, :size])
            self._paths_among[:, layer] = _products(own, own)
        np.cumsum(self._paths, axis=1, out=self._paths)
        np.cumsum(self._paths_among, axis=1, out=self._paths_among)
        self._squares = np.cumsum(np.einsum("nle,nle->nl", maps, maps, dtype=np.float64), axis=1)

    def find(self, row: int) -> tuple[npt.NDArray[np.intp], Floats]:
        """The entry found by meaning, then by the map up to each layer: [1 + L], and cosines."""
        size = self._store.size
        self._semantic = self._meaning[row, :size] * self._store.inverse_lengths[:size]
        self._semantic *= self._inverse[row]
        self._scores = self._paths[row, :, :size] * self._store.inverse_norms[:, :size]
        by_path = self._scores.argmax(axis=1)
        squares = self._squares[row]
        found = np.take_along_axis(self._scores, by_path[:, None], 1)[:, 0]
        cosines = np.where(squares > 0, found / np.sqrt(np.where(squares > 0, squares, 1)), 0.0)
        by_meaning = int(self._semantic.argmax())
        entries = np.concatenate(([by_meaning], by_path))
        return entries, np.concatenate(([self._semantic[by_meaning]], cosines))

    def add(self, row: int) -> None:
        """The iteration is over: its map enters the store."""
        own = slice(row, row + 1)
        size = self._store.size
        semantic = trajectory = np.zeros((1, 0))
        if size:
            semantic = self._semantic[None]
            trajectory = (self._scores[-1] * _inverse(self._squares[own, -1]))[None]
        (place,) = self._store.add(self._embeddings[own], self._maps[own], semantic, trajectory)
        self._meaning[row + 1 :, place] = self._meaning_among[row + 1 :, row]
        self._paths[row + 1 :, :, place] = self._paths_among[row + 1 :, :, row]
