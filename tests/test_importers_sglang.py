"""SGLang's recorder, mode per_token: dumps made here by its documented layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import Geometry, load_geometry
from tests.traces import random_ids
from tracer.trace import DECODE, PREFILL, Trace

torch = pytest.importorskip("torch")

from tracer.importers.sglang import _Pass, _Requests, import_sglang  # noqa: E402

OLMOE, DEEPSEEK, QWEN = "olmoe-1b-7b", "deepseek-v2-lite", "qwen1.5-moe-a2.7b"
Dump = dict[str, Any]


class Engine:
    """Makes records as SGLang's scheduler would: every sequence is (positions)."""

    def __init__(self, model: str = QWEN, rids: bool = False) -> None:
        self.geometry: Geometry = load_geometry(model)
        self.rng = np.random.default_rng(0)
        self.records: list[dict[str, Any]] = []
        self.experts: list[NDArray] = []
        self.with_rids = rids

    def extend(self, *spans: tuple[int, int], rids: str = "") -> Engine:
        positions = [p for begin, end in spans for p in range(begin, end)]
        return self._add(positions, [end - begin for begin, end in spans], 1, rids)

    def decode(self, *positions: int, rids: str = "") -> Engine:
        return self._add(list(positions), None, 2, rids)

    def idle(self) -> Engine:
        return self._add([], None, 4, "")

    def _add(self, positions: list[int], lengths: Any, mode: int, rids: str) -> Engine:
        g, n = self.geometry, len(positions)
        ids = random_ids(self.rng, (n, g.num_moe_layers), g.num_experts, g.top_k)
        buffer = np.full((g.num_layers, n, 8), -1, np.int32)
        buffer[list(g.model_layer_ids), :, : g.top_k] = ids.transpose(1, 0, 2)
        record = {
            "forward_pass_id": len(self.records) + 1,
            "rank": 0,
            "gatherer_key": "primary",
            "input_ids": self.rng.integers(0, 1000, n).tolist(),
            "positions": positions,
            "extend_seq_lens": lengths,
            "forward_mode": mode,
            "topk_ids_of_layer": torch.tensor(buffer),
            "misc_objects": [],
            "global_physical_count": torch.zeros(g.num_layers, g.num_experts, dtype=torch.int32),
        }
        self.records.append(record | ({"rids": list(rids)} if self.with_rids else {}))
        self.experts.append(ids)
        return self

    def dump(self) -> Dump:
        identity = torch.arange(self.geometry.num_experts).repeat(self.geometry.num_layers, 1)
        return {"records": self.records, "last_physical_to_logical_map": identity}


def saved(tmp_path: Path, dump: Any) -> Path:
    torch.save(dump, tmp_path / "dump.pt")
    return tmp_path / "dump.pt"


def imported(tmp_path: Path, engine: Engine) -> Trace:
    import_sglang(saved(tmp_path, engine.dump()), engine.geometry.name, tmp_path / "out")
    return Trace.open(tmp_path / "out")


def refuse(tmp_path: Path, dump: Any, message: str, model: str = QWEN) -> None:
    src = saved(tmp_path, dump)
    with pytest.raises(UserError, match=message) as caught:
        import_sglang(src, model, tmp_path / "out")
    assert str(src) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [src]


def three_requests() -> Engine:
    """Two requests together; one leaves, one comes."""
    engine = Engine().extend((0, 4), (0, 3)).decode(4, 3).decode(5, 4).idle()
    return engine.extend((0, 2)).decode(5, 2).decode(6)


def test_passes_become_steps(tmp_path: Path) -> None:
    engine = three_requests()
    trace = imported(tmp_path, engine)
    arrays = trace.load(trace.columns())
    np.testing.assert_array_equal(arrays["experts"], np.concatenate(engine.experts))
    assert arrays["step"].tolist() == [0] * 7 + [1, 1, 2, 2, 3, 3, 4, 4, 5]
    assert arrays["row"].tolist() == [*range(7), 0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert arrays["phase"].tolist() == [PREFILL] * 7 + [DECODE] * 4 + [PREFILL] * 2 + [DECODE] * 3
    tokens = [token for record in engine.records for token in record["input_ids"]]
    assert arrays["token_id"].tolist() == tokens
    assert "weights" not in trace.columns()


def test_requests_are_followed_by_order_and_position(tmp_path: Path) -> None:
    trace = imported(tmp_path, three_requests())
    arrays = trace.load(["request", "position"])
    assert arrays["request"].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 2, 2, 1, 2, 1]
    assert arrays["position"].tolist() == [0, 1, 2, 3, 0, 1, 2, 4, 3, 5, 4, 0, 1, 5, 2, 6]
    lengths = trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist()
    assert lengths == [[4, 3], [3, 5], [2, 2]]


def test_a_prefill_in_chunks_and_a_cached_prefix(tmp_path: Path) -> None:
    engine = Engine().extend((0, 3), (0, 5)).extend((5, 9), (2, 6)).decode(3, 9, 6)
    trace = imported(tmp_path, engine)
    requests = [0] * 3 + [1] * 5 + [1] * 4 + [2] * 4 + [0, 1, 2]
    assert trace.load(["request"])["request"].tolist() == requests
    assert trace.requests()["prompt_tokens"].tolist() == [3, 9, 6]


def test_names_of_requests_tell_them_apart(tmp_path: Path) -> None:
    engine = Engine(rids=True).extend((0, 2), (0, 2), rids="ab").decode(2, 2, rids="ab")
    engine.decode(3, rids="b").extend((1, 4), rids="c").decode(4, 4, rids="bc")
    trace = imported(tmp_path, engine)
    assert trace.load(["request"])["request"].tolist() == [0, 0, 1, 1, 0, 1, 1, 2, 2, 2, 1, 2]
    assert trace.requests()["output_tokens"].tolist() == [2, 4, 2]


def test_dense_layers_and_255_as_padding(tmp_path: Path) -> None:
    engine = Engine(DEEPSEEK).extend((0, 3)).decode(3)
    for record in engine.records:
        ids = record["topk_ids_of_layer"]
        record["topk_ids_of_layer"] = torch.where(ids == -1, 255, ids).to(torch.uint8)
    trace = imported(tmp_path, engine)
    np.testing.assert_array_equal(
        trace.load(["experts"])["experts"], np.concatenate(engine.experts)
    )


def test_physical_experts_are_translated(tmp_path: Path) -> None:
    engine = Engine(OLMOE).extend((0, 3)).decode(3)
    dump = engine.dump()
    maps = np.stack([np.random.default_rng(layer).permutation(64) for layer in range(16)])
    dump["last_physical_to_logical_map"] = torch.tensor(np.hstack([maps, maps[:, :4]]))
    import_sglang(saved(tmp_path, dump), OLMOE, tmp_path / "out")
    physical = np.concatenate(engine.experts)
    logical = np.take_along_axis(np.broadcast_to(maps, (4, 16, 64)), physical.astype(int), axis=-1)
    experts = Trace.open(tmp_path / "out").load(["experts"])["experts"]
    np.testing.assert_array_equal(experts, logical)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (
            Engine().extend((0, 2), (0, 2)).decode(2, 2).decode(3),
            r"record 2: requests at equal positions \(\[3\]\) cannot be told apart",
        ),
        (Engine().extend((0, 2)).decode(7), r"record 1: rows at positions \[7\] do not follow"),
        (Engine().decode(7), "start recording before the requests"),
        (Engine().extend((0, 2)).decode(2, 2), r"record 1: rows at positions \[2, 2\]"),
        (
            Engine().extend((0, 2), (0, 3)).extend((2, 4)),
            "record 1: sequence 0 begins at position 2: .*--disable-radix-cache",
        ),
        (Engine(rids=True).extend((0, 2), rids="a").decode(2, rids="b"), "request b decodes"),
        (
            Engine(rids=True).extend((0, 2), rids="a").decode(2, rids="a").extend((0, 3), rids="a"),
            "request a is prefilled again from position 0",
        ),
        (Engine(rids=True).extend((0, 2), (0, 2), rids="aa"), "1 different rids for 2 sequences"),
        (Engine().idle(), "no record holds a token"),
    ],
)
def test_requests_that_cannot_be_told(tmp_path: Path, engine: Engine, message: str) -> None:
    refuse(tmp_path, engine.dump(), message)


def ids_of(dump: Dump) -> Any:
    return dump["records"][1]["topk_ids_of_layer"]


def put(*at: Any, value: int) -> Callable[[Dump], None]:
    def change(dump: Dump) -> None:
        ids_of(dump)[at] = value

    return change


def field(name: str, value: Any) -> Callable[[Dump], None]:
    def change(dump: Dump) -> None:
        dump["records"][1][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(3, 1, 2, value=60), r"record 1: row 1, layer 3, rank 2: id 60 is outside \[0, 60\)"),
        (put(3, 1, 2, value=-1), "record 1: row 1, layer 3, rank 2: id -1 is padding"),
        (put(3, 1, 2, value=255), "id 255 is padding where an expert ran"),
        (put(3, 1, 4, value=5), "row 1, layer 3: id 5 behind the 4 experts.*shared-experts-fusion"),
        (put(3, 1, slice(0, 4), value=5), "record 1: row 1, layer 3: .*expert id 5 occurs twice"),
        (field("topk_ids_of_layer", torch.zeros(24, 3, 8)), "no tensor of integers in 3"),
        (field("topk_ids_of_layer", torch.zeros(24, 3, 8).int()), "ids of 3 tokens for 2"),
        (field("topk_ids_of_layer", torch.zeros(23, 2, 8).int()), "has 23 layers, qwen1.5"),
        (field("topk_ids_of_layer", [[1]]), "no tensor of integers"),
        (field("positions", [4]), "record 1: 1 positions for 2 input_ids"),
        (field("positions", [4, -3]), "record 1: row 1: -3 in positions is outside"),
        (field("positions", [4, 2.5]), "positions is float64"),
        (field("positions", None), "record 1: no positions"),
        (field("input_ids", [1, 151_936]), "row 1: 151936 in input_ids is outside"),
        (field("forward_mode", 3), "mixes prefill and decoding.*--enable-mixed-chunk"),
        (field("forward_mode", 5), "record without speculative decoding"),
        (field("forward_mode", 1), "forward_mode 1 without extend_seq_lens"),
        (field("forward_mode", None), "forward_mode None is no integer"),
        (field("rids", [1, 2]), "rids is no list of names"),
        (lambda dump: dump["records"][0].update(extend_seq_lens=[4, 4]), "add up to 8, the pass"),
        (lambda dump: dump["records"][0].update(positions=[0, 1, 2, 4, 0, 1, 2]), "have gaps"),
        (lambda dump: dump["records"].insert(1, {"global_physical_count": 1}), "per_pass"),
        (lambda dump: dump.update(records=[]), "'records' is empty"),
        (
            lambda dump: dump["last_physical_to_logical_map"].fill_(60),
            r"layer 0, physical expert 0 is expert 60, outside \[0, 60\)",
        ),
        (
            lambda dump: dump.update(last_physical_to_logical_map=torch.zeros(24, 59).int()),
            r"last_physical_to_logical_map is \[24, 59\]",
        ),
    ],
)
def test_dumps_that_do_not_fit(
    tmp_path: Path, change: Callable[[Dump], None], message: str
) -> None:
    dump = three_requests().dump()
    change(dump)
    refuse(tmp_path, dump, message)


def test_a_wider_top_k_than_the_buffer_is_refused(tmp_path: Path) -> None:
    dump = Engine(OLMOE).extend((0, 3)).dump()
    dump["records"][0]["topk_ids_of_layer"] = dump["records"][0]["topk_ids_of_layer"][..., :6]
    refuse(tmp_path, dump, "ids are 6 wide, olmoe-1b-7b has top-8", OLMOE)


def test_other_modes_and_files_are_refused(tmp_path: Path) -> None:
    counts = {"rank": 0, "logical_count": torch.zeros(1, 24, 60)}
    refuse(tmp_path, counts, "only counts of experts .*recorder-mode per_token")
    refuse(tmp_path, [1], "no dict with 'records'")
    refuse(tmp_path, {"records": three_requests}, "not a readable dump of tensors")
    (tmp_path / "dump.pt").unlink()
    whole = saved(tmp_path, three_requests().dump()).read_bytes()
    for cut in (0, 10, len(whole) // 2):
        (tmp_path / "dump.pt").write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a readable dump") as caught:
            import_sglang(tmp_path / "dump.pt", QWEN, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        import_sglang(tmp_path / "nowhere.pt", QWEN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@dataclass
class Running:
    number: int
    prompt: int
    output: int
    position: int = 0


def scheduled(lengths: list[tuple[int, int]], cached: int, budget: int) -> Iterator[Any]:
    """Passes as (phase, [(request, begin, end)]) of a scheduler that prefers prefill, in chunks.

    A third of the requests find `cached` tokens of their prompts in the radix cache.
    """
    waiting = [Running(i, prompt, output) for i, (prompt, output) in enumerate(lengths)]
    for request in waiting[::3]:
        request.position = min(cached, request.prompt - 1)
    running: list[Running] = []
    chunked: Running | None = None
    turn = 0
    while waiting or running or chunked:
        turn += 1
        if chunked or (waiting and (turn % 3 or not running)):
            batch, left = [], budget
            while left and (chunked or waiting):
                request, chunked = chunked or waiting.pop(0), None
                end = min(request.prompt, request.position + left)
                batch.append((request.number, request.position, end))
                left -= end - request.position
                request.position = end
                if end < request.prompt:
                    chunked = request
                elif request.output > 1:
                    running.append(request)
            yield PREFILL, batch
            continue
        yield DECODE, [(r.number, r.position, r.position + 1) for r in running]
        for request in running:
            request.position += 1
        running = [r for r in running if r.position < r.prompt + r.output - 1]


def follow(passes: Iterable[Any]) -> tuple[list[tuple[list[int], list[int]]], _Requests]:
    """Requests found for the rows of each pass, beside the true ones."""
    requests, found = _Requests(), []
    empty = np.zeros(0)
    for phase, spans in passes:
        positions = np.concatenate([np.arange(begin, end) for _, begin, end in spans])
        sizes = tuple(end - begin for _, begin, end in spans)
        expected = np.repeat([number for number, _, _ in spans], sizes).tolist()
        forward = _Pass("x", phase, empty, empty, positions, sizes, None)
        found.append((requests.follow(forward).tolist(), expected))
    return found, requests


@given(
    lengths=st.lists(st.tuples(st.integers(5, 30), st.integers(1, 12)), min_size=1, max_size=12),
    cached=st.integers(0, 4),
    budget=st.integers(4, 20),
)
def test_requests_are_followed_or_refused(
    lengths: list[tuple[int, int]], cached: int, budget: int
) -> None:
    """Never a wrong request: what the scheduler did, or the error that asks for another recording.

    Requests are numbered in the order of their first tokens, which is that of the prompts.
    No cached prefix is another's whole prompt: that looks like a prefill that goes on.
    """
    try:
        found, requests = follow(scheduled(lengths, cached, budget))
    except UserError as error:
        refused = str(error)
    else:
        refused = ""
    if refused:
        assert re.search("told apart|--disable-radix-cache", refused)
        return
    for numbers, expected in found:
        assert numbers == expected
    assert [(r["prompt_tokens"], r["output_tokens"]) for r in requests.lengths()] == lengths


def test_different_prompts_are_always_followed() -> None:
    """Requests that never meet at a position are told apart, whoever ends first."""
    lengths = [(10 * n, 1 + n % 7) for n in range(1, 30)]
    found, requests = follow(scheduled(lengths, 0, 64))
    assert all(numbers == expected for numbers, expected in found)
    assert [(r["prompt_tokens"], r["output_tokens"]) for r in requests.lengths()] == lengths
