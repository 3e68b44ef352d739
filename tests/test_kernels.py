"""The Triton kernels against plain products: on a GPU, or anywhere in Triton's interpreter.

`pytest -m gpu tests/test_kernels.py`, with `TRITON_INTERPRET=1` where there is no GPU.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from replay.gated import CLAMPED_GLU, SILU  # noqa: E402
from replay.kernels import (  # noqa: E402
    Block,
    GatedExperts,
    Launched,
    _down,
    _store,
    _up,
    named_words,
    scatter_rows,
)
from replay.tiles import TILE_ROWS, TileExperts  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.gpu,
    # Of Triton's interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
    pytest.mark.skipif(
        not (INTERPRETED or torch.cuda.is_available()), reason="no CUDA GPU, no TRITON_INTERPRET=1"
    ),
]
DEVICE = "cpu" if INTERPRETED else "cuda"
SLOTS, WIDTH, INNER, TOP_K = 6, 72, 40, 3
SLOT_OF = (3, 1, 5, 0, 2)
PADDED = 8  # experts of a layer, with none
PLAIN = [Block(8, 32), Block(4, 64, warps=2), Block(16, 16, warps=8)]
BLOCKS = [*PLAIN, Block(8, 32, defer=True), Block(8, 32, paired=True)]
BLOCKS += [Block(32, 16, 8, defer=True, paired=True)]


def drawn(*size: int) -> torch.Tensor:
    return (torch.randn(size) * 0.3).to(DEVICE)


@pytest.fixture(params=[False, True], ids=["concatenated", "interleaved"])
def experts(request: Any) -> GatedExperts:
    """As OLMoE has them, and as gpt-oss: transposed, gate and up alternating, biased, clamped."""
    torch.manual_seed(0)
    other = request.param
    up = (SLOTS, WIDTH, 2 * INNER) if other else (SLOTS, 2 * INNER, WIDTH)
    down = (SLOTS, INNER, WIDTH) if other else (SLOTS, WIDTH, INNER)
    return GatedExperts(
        gate_up=drawn(*up),
        down=drawn(*down),
        gate_up_bias=drawn(SLOTS, 2 * INNER) if other else None,
        down_bias=drawn(SLOTS, WIDTH) if other else None,
        width=WIDTH,
        inner=INNER,
        transposed=other,
        interleaved=other,
        kind=CLAMPED_GLU if other else SILU,
    )


def expected(experts: GatedExperts, hidden: torch.Tensor, slot: int) -> torch.Tensor:
    """One expert of one token."""
    if not experts.transposed:
        gate, up = (experts.gate_up[slot] @ hidden).chunk(2)
        return experts.down[slot] @ (torch.nn.functional.silu(gate) * up)
    assert experts.gate_up_bias is not None
    assert experts.down_bias is not None
    both = hidden @ experts.gate_up[slot] + experts.gate_up_bias[slot]
    gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
    act = (up + 1) * gate * torch.sigmoid(gate * 1.702)
    return act @ experts.down[slot] + experts.down_bias[slot]


@pytest.mark.parametrize("words", [False, True], ids=["from memory", "in words"])
@pytest.mark.parametrize("named", [[4, -1, 2], [-1, 5, -1, 0, 3, -1, 2, 1]], ids=["3", "8"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_decode_blocks_give_the_plain_products(
    experts: GatedExperts, block: Block, named: list[int], words: bool
) -> None:
    require_decoded(experts, block, named, 1, words)


@pytest.mark.parametrize("words", [False, True], ids=["from memory", "in words"])
def test_a_few_of_many_assignments_are_computed(experts: GatedExperts, words: bool) -> None:
    """Of four tokens; the last of all is among them, and one expert twice."""
    named = [-1, 3, -1, -1, 5, -1, -1, -1, 3, -1, 0, 2]
    require_decoded(experts, BLOCKS[0], named, 4, words)


class Interpreted:
    """As :class:`replay.launches.BoundKernel`, of kernels that are interpreted."""

    def __init__(self, launched: Launched, stream: int, places: Mapping[str, int]) -> None:
        self._kernel = _store
        if "out" in launched.arguments:
            self._kernel = _down
        if "hidden" in launched.arguments:
            self._kernel = _up
        self._grid, self._arguments = list(launched.grid), dict(launched.arguments)
        self._places = places
        self.launch = self

    def resize(self, grid: Sequence[int]) -> None:
        self._grid[: len(grid)] = grid

    def __call__(self) -> None:
        words = {name: ctypes.c_int32.from_address(at).value for name, at in self._places.items()}
        block = {"ROWS": 8, "COLUMNS": 32, "DEFER": False}
        if self._kernel is _store:
            block = {}
        if self._kernel is _up:
            block["PAIRED"] = False
        self._kernel[tuple(self._grid)](**{**self._arguments, **words, **block})


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, whose launches go through the driver where there is one."""
    from replay import launches

    if INTERPRETED:
        monkeypatch.setattr(launches, "BoundKernel", Interpreted)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        plain = (Block(8, 32), Block(8, 32))
        monkeypatch.setattr("replay.kernels.DECODE_BLOCKS", {False: plain, True: plain})
    return launches


@pytest.mark.parametrize("rows", [1, 4, 13])
def test_launches_of_a_step_compute_what_they_name(
    experts: GatedExperts, launches: Any, rows: int
) -> None:
    """One request's, and batches': group by group, each some of the assignments.

    Those of more than eight are stored first, 32 at a time.
    """
    count = rows * TOP_K
    hidden = drawn(rows, WIDTH)
    edges = [
        SimpleNamespace(hidden=hidden, out=torch.full((count, WIDTH), 9.0, device=DEVICE))
        for _ in range(2)
    ]
    step_of_two = launches.group_launches(SimpleNamespace(boundaries=edges), [experts, experts])
    slots = [(5, 0, 3, 3, 1, 2, 4, 0, 5, 2, 1, 4)[at % 12] for at in range(count)]
    groups = [[0], [count - 1], list(range(1, count - 1))]
    if rows > 1:  # of the largest, some come before and some after
        groups[2:] = [[1, 4], [2, 3, *range(6, count - 1)], [5]]
    if rows > 4:  # two of them, each with numbers of its own
        groups[3:4] = [[2, 3, *range(6, 20)], list(range(20, count - 1))]
    for layer in (1, 0):
        slots = [*slots[1:], slots[0]]
        found: set[int] = set()
        for group in groups:
            step_of_two.launch(layer, [slots[at] if at in group else -1 for at in range(count)])
            found |= set(group)
            for at, slot in enumerate(slots):
                wanted = torch.full((WIDTH,), 9.0).to(DEVICE)
                if at in found:
                    wanted = expected(experts, hidden[at // TOP_K], slot)
                torch.testing.assert_close(edges[layer].out[at], wanted, rtol=1e-3, atol=1e-3)
        assert len(found) == count
        assert layer == 0 or (edges[0].out == 9.0).all()


def require_decoded(
    experts: GatedExperts, block: Block, named: list[int], tokens: int, words: bool
) -> None:
    hidden = drawn(tokens, WIDTH)
    slots = torch.tensor(named, dtype=torch.int16, device=DEVICE)
    told = None
    if words:
        told = named_words({place: slot for place, slot in enumerate(named) if slot >= 0})
        slots.fill_(-1)  # not to be read
    act = torch.zeros(len(named), INNER, device=DEVICE)
    out = torch.full((len(named), WIDTH), 9.0, device=DEVICE)
    experts.launch_up(hidden, slots, act, block, told)
    experts.launch_down(act, slots, out, block, told)
    for row, slot in enumerate(named):
        # Assignments of another group are left as they were.
        wanted = torch.full((WIDTH,), 9.0).to(DEVICE)
        if slot >= 0:
            wanted = expected(experts, hidden[row * tokens // len(named)], slot)
        torch.testing.assert_close(out[row], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rows", TILE_ROWS)
@pytest.mark.parametrize("tokens", [1, 11, 90])
@pytest.mark.parametrize("words", [False, True], ids=["from memory", "in words"])
def test_tiles_give_the_plain_products(
    experts: GatedExperts, rows: int, tokens: int, words: bool
) -> None:
    hidden, ids = routed(tokens)
    counts = torch.bincount(ids, minlength=PADDED)
    order = torch.argsort(ids, stable=True)
    places = torch.cat([torch.cumsum(counts, 0) - counts, counts, order]).int().to(DEVICE)
    slots = torch.tensor([*SLOT_OF, -1, -1, -1], dtype=torch.int32, device=DEVICE)
    group = dict(enumerate(SLOT_OF)) if words else slots
    act = torch.zeros(len(ids), INNER, device=DEVICE)
    out = torch.zeros(len(ids), WIDTH, device=DEVICE)
    most = int(counts.max())
    experts.launch_tiles(hidden, places, PADDED, group, act, out, tile_rows=rows, most=most)
    require_products(experts, hidden, ids, out)


@pytest.mark.parametrize("tokens", [1, 23])
def test_an_event_computes_the_groups_that_it_is_given(experts: GatedExperts, tokens: int) -> None:
    hidden, ids = routed(tokens)
    tiles = TileExperts(experts, len(SLOT_OF), TOP_K)
    for _ in range(2):  # the second event writes over what the first has read
        out = torch.full((len(ids), WIDTH), 9.0, device=DEVICE)
        event = tiles.event(hidden, ids.numpy(), out)
        needed = sorted(set(ids.tolist()))
        event.launch({expert: SLOT_OF[expert] for expert in needed[:2]})
        for row, expert in enumerate(ids.tolist()):
            # Assignments of another group are left as they were.
            assert (out[row] == 9.0).all() == (expert not in needed[:2])
        for expert in needed[2:]:
            event.launch({expert: SLOT_OF[expert]})
        require_products(experts, hidden, ids, out)


def test_groups_too_large_for_a_launchs_arguments_are_brought_to_the_device() -> None:
    torch.manual_seed(0)
    count, tokens = 21, 40
    many = GatedExperts(
        drawn(count, 2 * INNER, WIDTH), drawn(count, WIDTH, INNER), None, None,
        width=WIDTH, inner=INNER, transposed=False, interleaved=False, kind=SILU,
    )  # fmt: skip
    hidden = drawn(tokens, WIDTH)
    ids = torch.stack([torch.randperm(count)[:TOP_K] for _ in range(tokens)]).reshape(-1)
    slot_of = torch.randperm(count).tolist()
    out = torch.zeros(len(ids), WIDTH, device=DEVICE)
    event = TileExperts(many, count, TOP_K).event(hidden, ids.numpy(), out)
    for first in (0, 9):
        event.launch({expert: slot_of[expert] for expert in range(first, min(first + 9, count))})
    event.launch({expert: slot_of[expert] for expert in range(18, count)})
    require_products(many, hidden, ids, out, slot_of)
    event.restart()
    out.zero_()
    event.launch(dict(enumerate(slot_of)))
    require_products(many, hidden, ids, out, slot_of)


def test_experts_in_slots_beyond_16_bits_are_computed() -> None:
    torch.manual_seed(0)
    slots, slot_of = 2**15 + 3, [2**15 + 2, 7, 2**15]
    many = GatedExperts(
        torch.zeros(slots, 4, 8, device=DEVICE), torch.zeros(slots, 8, 2, device=DEVICE),
        None, None, width=8, inner=2, transposed=False, interleaved=False, kind=SILU,
    )  # fmt: skip
    for slot in slot_of:
        many.gate_up[slot] = drawn(4, 8)
        many.down[slot] = drawn(8, 2)
    hidden, ids = drawn(1, 8), torch.arange(3)
    out = torch.zeros(3, 8, device=DEVICE)
    event = TileExperts(many, 3, 3).event(hidden, ids.numpy(), out)
    for expert, slot in enumerate(slot_of):
        event.launch({expert: slot})
    for row, slot in enumerate(slot_of):
        wanted = expected(many, hidden[0], slot)
        torch.testing.assert_close(out[row], wanted, rtol=2e-2, atol=2e-2)


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states, and the expert of every assignment."""
    ids = torch.stack([torch.randperm(len(SLOT_OF))[:TOP_K] for _ in range(tokens)]).reshape(-1)
    return drawn(tokens, WIDTH), ids


def require_products(
    experts: GatedExperts,
    hidden: torch.Tensor,
    ids: torch.Tensor,
    out: torch.Tensor,
    slot_of: Sequence[int] = SLOT_OF,
) -> None:
    for row, expert in enumerate(ids.tolist()):
        wanted = expected(experts, hidden[row // TOP_K], slot_of[expert])
        # On a GPU products of float32 in tiles are of TF32's precision.
        torch.testing.assert_close(out[row], wanted, rtol=2e-2, atol=2e-2)


def test_rows_are_scattered_to_their_places() -> None:
    rows, places = torch.randn(6, 700), torch.tensor([3, 0, 7, 1, 2, 9], dtype=torch.int32)
    out = torch.zeros(10, 700, device=DEVICE)
    expected = torch.zeros(10, 700)
    expected[places[:4].long()] = rows[:4]
    if not INTERPRETED:
        rows, places = rows.pin_memory(), places.pin_memory()
    scatter_rows(rows, places, out, 4)
    assert torch.equal(out.cpu(), expected)
