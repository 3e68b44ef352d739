from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from tests.traces import ALL_COLUMNS, make_geometry, make_trace, random_columns, random_ids
from tracer.columns import SQRT_U8_MAX_ABS_ERROR
from tracer.manifest import TrainedPredictor, sha256_of, write_manifest
from tracer.trace import DECODE, Trace, TraceWriter, append_column, list_samples, load_arrays

# Writing and reading


def write(path: Path, columns: dict[str, Any], **options: Any) -> Trace:
    """Write rows of the default tiny model in one go; requests are derived from the rows."""
    fields = {
        "model_id": "tiny",
        "geometry": make_geometry(),
        "recording": {"generator": "test"},
    }
    ids = np.unique(columns["request"])
    with TraceWriter(path, fields, **options) as writer:
        writer.write_rows(**columns)
        writer.close([{"request": i, "prompt_tokens": 1, "output_tokens": 1} for i in ids])
    return Trace.open(path)


def rows_of(rng: np.random.Generator, steps: list[int], columns: tuple[str, ...]) -> dict[str, Any]:
    """Random rows of the tiny model for steps of so many tokens, some layers not run.

    Five requests take turns at random, each with some prefill and then decoding.
    """
    geometry = make_geometry()
    n = sum(steps)
    ids = random_ids(rng, (n, geometry.num_moe_layers), geometry.num_experts, geometry.top_k)
    ids[rng.random(ids.shape[:2]) < 0.2] = -1
    extra = random_columns(rng, geometry, ids, columns)
    absent = ids[..., 0] < 0
    for name in {"gate_probs", "gate_norms", "gate_inputs"} & set(extra):
        extra[name][absent] = np.nan
    request = rng.integers(0, 5, n)
    of_request = pd.Series(request).groupby(request).cumcount().to_numpy()
    prompt, begins = rng.integers(0, 4, 5), rng.integers(0, 2**31 - n, 5)
    return {
        "request": request,
        "step": np.repeat(np.arange(len(steps)) * 3, steps),
        "row": np.concatenate([np.arange(size) for size in steps]),
        "phase": (of_request >= prompt[request]).astype(int),
        "position": begins[request] + of_request,
        "token_id": rng.integers(-1, 100, n),
        "experts": ids,
        **extra,
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    steps=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    columns=st.sets(st.sampled_from([name for name in ALL_COLUMNS if name != "gate_probs"])),
    shard_rows=st.integers(1, 20),
    data=st.data(),
)
def test_what_is_written_is_read(
    seed: int, steps: list[int], columns: set[str], shard_rows: int, data: st.DataObject
) -> None:
    rows = rows_of(np.random.default_rng(seed), steps, tuple(sorted(columns)))
    with tempfile.TemporaryDirectory() as scratch:
        trace = write(Path(scratch) / "t", rows, shard_rows=shard_rows)
        start = data.draw(st.integers(0, trace.rows - 1))
        stop = data.draw(st.integers(start + 1, trace.rows))
        assert trace.rows == sum(steps)
        assert set(trace.columns()) == set(rows)
        for name, values in trace.load(trace.columns(), start, stop).items():
            np.testing.assert_array_equal(values, rows[name][start:stop], err_msg=name)


def test_dtypes_and_shapes(tiny_trace: Trace) -> None:
    found = {name: (a.dtype.name, a.shape) for name, a in tiny_trace.load(ALL_COLUMNS).items()}
    n, layers, experts, k, hidden = tiny_trace.rows, 3, 8, 2, 4
    assert found == {
        "weights": ("float16", (n, layers, k)),
        "gate_probs": ("float16", (n, layers, experts)),
        "gate_norms": ("float32", (n, layers)),
        "lookahead_1": ("int16", (n, layers, 2 * k)),
        "lookahead_2": ("int16", (n, layers, 2 * k)),
        "lookahead_3": ("int16", (n, layers, 2 * k)),
        "learned_1": ("int16", (n, layers, 2 * k)),
        "embedding": ("float16", (n, hidden)),
        "gate_inputs": ("float16", (n, layers, hidden)),
        "residency": ("uint8", (n, layers, k)),
    }


def test_steps_are_numbered_and_keep_their_rows(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", requests=4, prompt=3, output=2, batch=2)
    rows = pd.DataFrame(trace.load(["request", "step", "row", "phase", "position"]))
    one_batch = [
        (0, 0, 0, 0),
        (0, 1, 0, 1),
        (0, 2, 0, 2),
        (1, 0, 0, 0),
        (1, 1, 0, 1),
        (1, 2, 0, 2),
        (2, 0, 1, 3),
        (2, 1, 1, 3),
        (3, 0, 1, 4),
        (3, 1, 1, 4),
    ]
    half = rows[["step", "row", "phase", "position"]][:10]
    assert [tuple(row) for row in half.to_numpy().tolist()] == one_batch
    assert rows["request"][:10].tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0, 1]
    assert rows["step"].max() == 7


@pytest.mark.parametrize(("experts", "stored"), [(256, "uint8"), (257, "uint16")])
def test_ids_take_the_narrowest_type(tmp_path: Path, experts: int, stored: str) -> None:
    trace = make_trace(tmp_path / "t", experts=experts, requests=1, prompt=200)
    field = pq.read_schema(trace.path / "tokens" / "part-00000.parquet").field("experts")
    assert str(field.type.value_type) == stored
    assert trace.load(["experts"])["experts"].max() == experts - 1


def test_pandas_opens_the_files(tiny_trace: Trace) -> None:
    tokens = pd.read_parquet(tiny_trace.path / "tokens")
    arrays = tiny_trace.load(["step", "experts", "weights"])
    assert tokens["step"].tolist() == arrays["step"].tolist()
    flat = np.stack(tokens["experts"].tolist())
    np.testing.assert_array_equal(flat, arrays["experts"].reshape(len(tokens), -1))
    flat = np.stack(tokens["weights"].tolist())
    np.testing.assert_array_equal(flat, arrays["weights"].reshape(len(tokens), -1))


def test_gate_probs_keep_the_stated_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = rows_of(rng, [500], ("gate_probs",))
    trace = write(tmp_path / "t", rows)
    decoded = trace.load(["gate_probs"])["gate_probs"].astype(np.float64)
    error = np.nanmax(np.abs(decoded - rows["gate_probs"]))
    info = trace.manifest.columns["gate_probs"]
    assert info.encoding == "sqrt_u8"
    assert info.max_abs_error == SQRT_U8_MAX_ABS_ERROR
    assert SQRT_U8_MAX_ABS_ERROR / 4 < error <= SQRT_U8_MAX_ABS_ERROR < 0.0045


def test_every_float16_probability_keeps_the_stated_error(tmp_path: Path) -> None:
    every = np.arange(0x3C01, dtype=np.uint16).view(np.float16)  # all of [0, 1]
    probs = np.resize(every, (-(-every.size // 24), 3, 8))
    rows = rows_of(np.random.default_rng(0), [len(probs)], ())
    rows["experts"][...] = [0, 1]
    decoded = write(tmp_path / "t", {**rows, "gate_probs": probs}).load(["gate_probs"])[
        "gate_probs"
    ]
    assert np.abs(decoded.astype(float) - probs).max() <= SQRT_U8_MAX_ABS_ERROR


def test_gate_probs_can_be_kept_whole(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(1), [50], ("gate_probs",))
    trace = write(tmp_path / "t", rows, encodings={"gate_probs": "float16"})
    np.testing.assert_array_equal(trace.load(["gate_probs"])["gate_probs"], rows["gate_probs"])


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    first, second = (make_trace(tmp_path / n, columns=ALL_COLUMNS, shard_rows=9) for n in "ab")
    files = sorted(p.relative_to(first.path) for p in first.path.rglob("*") if p.is_file())
    assert len(files) > 3 * len(ALL_COLUMNS)
    for file in files:
        assert (first.path / file).read_bytes() == (second.path / file).read_bytes(), file
    assert first.digest == second.digest
    assert make_trace(tmp_path / "c", seed=1).digest != first.digest


def test_shards_hold_whole_steps(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", prompt=5, output=6, batch=2, requests=4, shard_rows=4)
    rows = trace.manifest.shard_rows("tokens")
    assert len(rows) > 4
    step = trace.load(["step"])["step"]
    ends = np.cumsum(rows)[:-1]
    assert (step[ends] != step[ends - 1]).all()


def test_one_block_is_cut_into_shards_of_whole_steps(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(2), [3, 1, 1, 4, 1, 2], ())
    trace = write(tmp_path / "t", rows, shard_rows=4)
    assert trace.manifest.shard_rows("tokens") == [4, 5, 3]


def test_only_the_shards_of_the_rows_are_read(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", shard_rows=10, columns=("weights", "embedding"))
    first, second = trace.manifest.shard_rows("tokens")[:2]
    whole = trace.load(["experts"])["experts"]
    (trace.path / "tokens" / "part-00000.parquet").unlink()
    (trace.path / "embedding" / "part-00001.parquet").unlink()
    part = trace.load(["experts"], first, first + second)["experts"]
    np.testing.assert_array_equal(part, whole[first : first + second])
    with pytest.raises(UserError, match=r"tokens/part-00000\.parquet: missing"):
        trace.load(["experts"], first - 1, first + second)


def test_row_ranges(tiny_trace: Trace) -> None:
    assert len(tiny_trace.load(["step"], 0, 10**9)["step"]) == tiny_trace.rows
    assert tiny_trace.load([]) == {}
    for start, stop in ((-1, 5), (5, 5), (tiny_trace.rows, None)):
        with pytest.raises(UserError, match="none of the trace's 51 rows"):
            tiny_trace.load(["step"], start, stop)


def test_requests(tiny_trace: Trace) -> None:
    requests = tiny_trace.requests()
    assert requests["request"].tolist() == [0, 1, 2]
    assert requests["prompt_tokens"].tolist() == [5, 5, 5]
    assert requests["output_tokens"].tolist() == [13, 13, 13]
    assert requests["domain"].tolist() == ["code", "prose", "maths"]
    assert requests["arrival_s"].isna().all()


def test_a_missing_column_is_named_with_the_command_that_records_it(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t")
    with pytest.raises(UserError, match=r"no column 'lookahead_2', .*--record lookahead=2"):
        trace.load(["experts", "lookahead_2"])
    with pytest.raises(UserError, match=r"no column 'gate_probs', .*moesim trace .*--record probs"):
        trace.load(["gate_probs"])
    with pytest.raises(UserError, match="column 'nonsense' is not known"):
        trace.load(["nonsense"])


# Killed recordings


def test_a_killed_recording_reads_up_to_its_last_whole_shard(tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(root)!r})
import numpy as np
from tests.traces import make_geometry
from tracer.trace import TraceWriter
fields = dict(model_id="t", geometry=make_geometry(), recording=dict(generator="test"))
writer = TraceWriter({str(tmp_path / "t")!r}, fields, shard_rows=4)
for step in range(11):
    request, prefill = step // 5, step % 5 == 0
    rows = 3 if prefill else 1
    writer.write_step(request=request, row=np.arange(rows), phase=int(not prefill), token_id=7,
                      position=np.arange(3) if prefill else step % 5 + 2,
                      experts=np.tile([step % 7, 7], (rows, 3, 1)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert done.returncode == -9, done.stderr
    trace = Trace.open(tmp_path / "t")
    # Steps of 3, 1, 1, 1, 1, 3, 1, 1, 1, 1, 3 rows; the last shard of one step was not full.
    assert trace.manifest.shard_rows("tokens") == [4, 6, 4]
    assert trace.rows == 14
    assert [note.split(": ", 1)[1] for note in trace.notes] == [
        "not complete: the recording broke off; 14 rows of whole shards are read, domains and"
        " arrival times are unknown"
    ]
    assert trace.load(["step"])["step"].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5, 6, 7, 8, 9]
    requests = trace.requests()
    assert requests["request"].tolist() == [0, 1]
    assert requests["prompt_tokens"].tolist() == [3, 3]
    assert requests["output_tokens"].tolist() == [5, 5]
    assert requests["domain"].isna().all()


def test_lengths_of_killed_decode_only_recordings(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "t", shard_rows=1)
    for position in (40, 41):
        writer.write_step(**one_step(position=position))
    requests = Trace.open(tmp_path / "t").requests()
    assert requests[["prompt_tokens", "output_tokens"]].to_numpy().tolist() == [[40, 3]]


def test_a_recording_killed_before_its_first_shard_says_so(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "t")
    writer.write_step(**one_step())
    with pytest.raises(UserError, match="broke off before its first whole shard"):
        Trace.open(tmp_path / "t")


def test_an_exception_leaves_a_trace_that_is_not_complete(tmp_path: Path) -> None:
    def record() -> None:
        with new_writer(tmp_path / "t", shard_rows=2) as writer:
            for position in range(5):
                writer.write_step(**one_step(position=position))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record()
    trace = Trace.open(tmp_path / "t")
    assert trace.rows == 4
    assert len(trace.notes) == 1


# What the writer refuses


def new_writer(path: Path, **options: Any) -> TraceWriter:
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    return TraceWriter(path, fields, **options)


def one_step(**changed: Any) -> dict[str, Any]:
    ids = np.tile(np.array([3, 5]), (1, 3, 1))
    columns = {
        "request": 0,
        "row": 0,
        "phase": DECODE,
        "position": 4,
        "token_id": 9,
        "experts": ids,
    }
    return columns | changed


def record_one_step(path: Path, changed: dict[str, Any], requests: list[dict[str, Any]]) -> None:
    with new_writer(path) as writer:
        writer.write_step(**one_step(**changed))
        writer.close(requests)


REQUESTS = [{"request": 0, "prompt_tokens": 4, "output_tokens": 2}]


def ids_with(layer: int, ids: tuple[int, int]) -> np.ndarray:
    array = np.tile(np.array([3, 5]), (1, 3, 1))
    array[0, layer] = ids
    return array


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": ids_with(1, (8, 2))}, r"row 0, layer 1, rank 0: .*id 8 is outside \[0, 8\)"),
        ({"experts": ids_with(2, (0, -2))}, r"row 0, layer 2, rank 1: .*id -2 is outside"),
        ({"experts": ids_with(0, (4, 4))}, "row 0, layer 0: .*id 4 occurs twice"),
        ({"experts": ids_with(0, (-1, 4))}, "layer 0, rank 0: .*a null before expert id 4"),
        ({"experts": ids_with(0, (65536, 4))}, "experts 65536 does not fit int16"),
        ({"phase": 2}, r"row 0: phase 2 is outside \[0, 1\]"),
        ({"position": -1}, "row 0: position -1 is outside"),
        ({"token_id": -2}, "row 0: token_id -2 is outside"),
        ({"request": 2**31}, "request 2147483648 does not fit int32"),
        ({"weights": np.full((1, 3, 2), np.nan)}, "weights is null where an expert ran"),
        ({"weights": np.full((1, 3, 2), 1e9)}, "weights inf is not a finite float16"),
        (
            {"weights": np.full((1, 3, 2), 0.5), "experts": ids_with(1, (4, -1))},
            "layer 1, rank 1: a value of weights where none ran",
        ),
        ({"gate_probs": np.full((1, 3, 8), 1.5)}, r"gate_probs 1.5 is outside \[0, 1\]"),
        ({"gate_norms": np.full((1, 3), np.nan)}, "gate_norms is null where an expert ran"),
        ({"embedding": np.full((1, 4), np.nan)}, "embedding nan is not a finite float16"),
        ({"residency": np.full((1, 3, 2), 2)}, "residency 2 is neither 0, 1 nor null"),
        ({"lookahead_1": np.full((1, 3, 4), 6)}, "lookahead_1: expert id 6 occurs twice"),
    ],
)
def test_writer_refuses_values(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        record_one_step(tmp_path / "t", changed, REQUESTS)
    assert not list((tmp_path / "t").rglob("*.parquet"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"experts": np.zeros((1, 3, 3), int)}, r"column experts: shape \(1, 3, 3\)"),
        ({"experts": np.zeros((1, 3, 2))}, "column experts: dtype float64, expected integers"),
        ({"weights": np.zeros((1, 2, 2))}, r"column weights: shape \(1, 2, 2\)"),
        ({"experts": np.zeros((0, 3, 2), int)}, "at least one row"),
    ],
)
def test_writer_refuses_shapes(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_writer(tmp_path / "t").write_step(**one_step(**changed))


def test_writer_refuses_an_unknown_column(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="column 'logits' is not known"):
        new_writer(tmp_path / "t").write_step(**one_step(logits=np.zeros((1, 3))))


def test_writer_refuses_other_columns_than_the_first_steps(tmp_path: Path) -> None:
    writer = new_writer(tmp_path / "t")
    writer.write_step(**one_step())
    with pytest.raises(ValueError, match="differ from the first step's"):
        writer.write_step(**one_step(weights=np.full((1, 3, 2), 0.5)))


def test_writer_refuses_steps_out_of_order(tmp_path: Path) -> None:
    rows = rows_of(np.random.default_rng(0), [1, 1, 1], ())
    writer = new_writer(tmp_path / "t")
    writer.write_rows(**rows)
    with pytest.raises(ValueError, match="step 0 comes after step 6"):
        writer.write_rows(**rows)
    with pytest.raises(UserError, match="row 1: step 7 follows step 8"):
        writer.write_rows(**rows | {"step": np.array([8, 7, 9])})


def test_writer_refuses_a_directory_that_holds_something(tiny_trace: Trace) -> None:
    before = (tiny_trace.path / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="exists and is not empty"):
        new_writer(tiny_trace.path)
    assert (tiny_trace.path / "manifest.json").read_bytes() == before
    with pytest.raises(UserError, match=r"manifest\.json: is a file"):
        new_writer(tiny_trace.path / "manifest.json")


def test_writer_refuses_nonsense_in_the_manifest(tmp_path: Path) -> None:
    fields = {"model_id": "t", "geometry": make_geometry(), "recording": {"generator": "test"}}
    with pytest.raises(UserError, match=r"'recording.generator' is missing"):
        TraceWriter(tmp_path / "a", fields | {"recording": {}})
    with pytest.raises(UserError, match="expert_norms must be 3 layers x 8 experts"):
        TraceWriter(tmp_path / "b", fields | {"expert_norms": [[1.0] * 8] * 2})
    with pytest.raises(UserError, match="'author' is not known"):
        TraceWriter(tmp_path / "c", fields | {"author": "me"})
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_an_empty_trace(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rows were written"), new_writer(tmp_path / "t") as w:
        w.close(REQUESTS)


def test_writer_must_be_closed_once(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"close\(requests\) was not called"),
        new_writer(tmp_path / "a") as writer,
    ):
        writer.write_step(**one_step())
    with new_writer(tmp_path / "b") as writer:
        writer.write_step(**one_step())
        writer.close(REQUESTS)
        with pytest.raises(ValueError, match="the trace is closed"):
            writer.close(REQUESTS)
        with pytest.raises(ValueError, match="the trace is closed"):
            writer.write_step(**one_step())


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([{**REQUESTS[0], "request": 1}], "request 0 has rows but no entry"),
        (REQUESTS * 2, "request 0 is listed twice"),
        ([{"request": 0, "prompt_tokens": 4}], "column 'output_tokens' is missing"),
        ([{**REQUESTS[0], "prompt_tokens": -1}], "prompt_tokens -1 must be a number"),
        ([{**REQUESTS[0], "prompt_tokens": None}], "prompt_tokens None must be a number"),
        ([{**REQUESTS[0], "arrival_s": -0.5}], "arrival_s -0.5 must be a number"),
        ([{**REQUESTS[0], "user": "me"}], "column 'user' is not known"),
    ],
)
def test_writer_refuses_requests(tmp_path: Path, requests: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        record_one_step(tmp_path / "t", {}, requests)


# Columns added later


def test_a_column_can_be_added_later(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", shard_rows=10)
    digest, tokens = trace.digest, trace.load(["experts"])["experts"]
    values = random_columns(np.random.default_rng(3), make_geometry(), tokens, ["learned_1"])
    append_column(trace.path, "learned_1", np.array_split(values["learned_1"], 7))
    again = Trace.open(trace.path)
    np.testing.assert_array_equal(again.load(["learned_1"])["learned_1"], values["learned_1"])
    np.testing.assert_array_equal(again.load(["experts"])["experts"], tokens)
    assert again.manifest.shard_rows("learned_1") == again.manifest.shard_rows("tokens")
    assert again.digest != digest


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("learned_1", 50, "51 rows expected, the data ended early"),
        ("learned_1", 52, "51 rows expected, more were given"),
        ("weights", 51, "belongs to the tokens"),
        ("lookahead_1", 51, "is there already"),
        ("notes", 51, "column 'notes' is not known"),
    ],
)
def test_columns_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, rows: int, message: str
) -> None:
    trace = make_trace(tmp_path / "t", columns=("weights", "lookahead_1"))
    before = sorted(trace.path.iterdir())
    values = random_ids(np.random.default_rng(0), (rows, 3), 8, 4)
    with pytest.raises(UserError, match=message):
        append_column(trace.path, name, [values])
    assert sorted(trace.path.iterdir()) == before
    assert Trace.open(trace.path).columns() == trace.columns()


def test_an_append_that_breaks_off_changes_nothing(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", shard_rows=10)
    before = sorted(trace.path.iterdir())

    def blocks() -> Iterator[np.ndarray]:
        yield random_ids(np.random.default_rng(0), (30, 3), 8, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append_column(trace.path, "learned_2", blocks())
    assert sorted(trace.path.iterdir()) == before


# Arrays for many processes


def test_exported_arrays_are_the_traces_rows(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", shard_rows=10, columns=("weights", "lookahead_1"))
    trace.export_arrays(tmp_path / "arrays", ["step", "experts", "lookahead_1"], 7, 40)
    arrays = load_arrays(tmp_path / "arrays")
    assert arrays.rows == 33
    assert arrays.columns() == ["step", "experts", "lookahead_1"]
    assert arrays.digest == trace.digest
    assert arrays.manifest.geometry == trace.manifest.geometry
    pd.testing.assert_frame_equal(arrays.requests(), trace.requests())
    expected = trace.load(arrays.columns(), 17, 30)
    for name, values in arrays.load(arrays.columns(), 10, 23).items():
        np.testing.assert_array_equal(values, expected[name])
        assert isinstance(values, np.memmap)
        assert not values.flags.writeable


def test_exported_arrays_refuse(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t")
    with pytest.raises(UserError, match="is not empty"):
        trace.export_arrays(trace.path, ["step"])
    with pytest.raises(UserError, match="holds no exported arrays"):
        load_arrays(trace.path)
    trace.export_arrays(tmp_path / "arrays", ["step"])
    with pytest.raises(UserError, match="column 'experts' was not exported"):
        load_arrays(tmp_path / "arrays").load(["step", "experts"])


# Finding a trace


def test_the_sample_opens_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "olmoe-twin" in list_samples()
    sample = Trace.open("sample")
    assert sample.digest == Trace.open("olmoe-twin").digest
    assert sample.manifest.complete
    files = [path for path in sample.path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_a_name_that_is_sample_and_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_trace(tmp_path / "sample")
    with pytest.raises(UserError, match=r"write \./sample for the directory"):
        Trace.open("sample")
    assert Trace.open("./sample").manifest.model_id == "tiny"


def test_an_unknown_path_lists_the_samples(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such trace directory; .*sample, olmoe-twin"):
        Trace.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"not a trace \(no manifest.json\)"):
        Trace.open(tmp_path)


# Damaged traces: one line that names the file, the row and the value


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def forge(path: Path, file: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change a Parquet file and list its new digest, so that only its content is wrong."""
    table = change(pq.read_table(path / file))
    pq.write_table(table, path / file)
    digest = sha256_of((path / file).read_bytes())

    def relist(manifest: dict[str, Any]) -> None:
        for entry in [*manifest["shards"], manifest["requests"]]:
            if entry["file"] == file:
                entry["sha256"] = digest

    edit_manifest(path, relist)


TOKENS = "tokens/part-00001.parquet"


def set_scalar(name: str, row: int, value: int | None) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        column = pa.array(values, type=table.schema.field(name).type)
        return table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), column
        )

    return change


def set_element(name: str, row: int, element: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row][element] = value
        column = pa.array(values, type=table.schema.field(name).type)
        return table.set_column(
            table.schema.get_field_index(name), table.schema.field(name), column
        )

    return change


def repeat_first_rank(table: pa.Table) -> pa.Table:
    first = table["experts"][2].as_py()[4]
    return set_element("experts", 2, 5, first)(table)


def retype(name: str, arrow_type: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        at = table.schema.get_field_index(name)
        return table.set_column(at, name, table[name].cast(arrow_type))

    return change


FORGERIES: dict[str, tuple[str, Callable[[pa.Table], pa.Table], str]] = {
    "id out of range": (
        TOKENS,
        set_element("experts", 3, 5, 8),
        r"row 3, layer 2, rank 1: experts: expert id 8 is outside \[0, 8\)",
    ),
    "duplicate id": (TOKENS, repeat_first_rank, r"row 2, layer 2: experts: expert id \d occurs"),
    "null id before another": (
        TOKENS,
        lambda table: set_element("weights", 1, 0, None)(set_element("experts", 1, 0, None)(table)),
        r"row 1, layer 0, rank 0: experts: a null before expert id",
    ),
    "weight nan": (TOKENS, set_element("weights", 0, 3, float("nan")), "row 0, layer 1, rank 1"),
    "weight null": (TOKENS, set_element("weights", 0, 3, None), "row 0, layer 1, rank 1: weights"),
    "weight inf": (TOKENS, set_element("weights", 4, 1, float("inf")), "row 4, layer 0, rank 1"),
    "step back": (TOKENS, set_scalar("step", 2, 0), "row 2: step 0 follows step"),
    "phase": (TOKENS, set_scalar("phase", 5, 2), r"row 5: phase 2 is outside \[0, 1\]"),
    "position": (TOKENS, set_scalar("position", 6, -3), "row 6: position -3 is outside"),
    "unlisted request": (TOKENS, set_scalar("request", 1, 77), "row 1: request 77 is not in"),
    "null request": (TOKENS, set_scalar("request", 1, None), "column 'request' holds 1 nulls"),
    "wrong type": (TOKENS, retype("step", pa.int64()), "column 'step' is int64, expected int32"),
    "wrong width": (
        TOKENS,
        retype("experts", pa.list_(pa.uint8())),
        r"column 'experts' is list<.*, expected fixed_size_list",
    ),
    "missing column": (TOKENS, lambda table: table.drop_columns("phase"), "has no column 'phase'"),
    "short shard": (TOKENS, lambda table: table.slice(1), r"has \d+ rows, manifest.json lists \d+"),
    "look-ahead id": (
        "lookahead_1/part-00001.parquet",
        set_element("lookahead_1", 3, 2, 9),
        r"lookahead_1/part-00001.parquet: row 3, layer 0, rank 2: lookahead_1: expert id 9",
    ),
    "residency": (
        "residency/part-00001.parquet",
        set_element("residency", 0, 0, 7),
        "row 0, layer 0, rank 0: residency 7 is neither",
    ),
    "requests twice": (
        "requests.parquet",
        set_scalar("request", 1, 0),
        "request 0 is listed twice",
    ),
    "requests columns": (
        "requests.parquet",
        lambda table: table.drop_columns("domain"),
        "requests.parquet: its columns are not",
    ),
}


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    columns = ("weights", "lookahead_1", "residency")
    return make_trace(tmp_path / "victim", shard_rows=15, columns=columns).path


def complaint(path: Path) -> str:
    """What opening and reading everything complains about: one line."""
    with pytest.raises(UserError) as caught:
        load_all(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def load_all(path: Path) -> None:
    trace = Trace.open(path)
    trace.load(trace.columns())
    trace.requests()


@pytest.mark.parametrize("case", FORGERIES)
def test_wrong_content_is_an_error(victim: Path, case: str) -> None:
    file, change, message = FORGERIES[case]
    load_all(victim)
    forge(victim, file, change)
    found = complaint(victim)
    assert re.search(message, found), found
    assert f"{victim.name}/{file}: " in found


def damage(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    path.write_bytes(change(bytearray(path.read_bytes())))


def flip_middle(data: bytearray) -> bytearray:
    data[len(data) // 2] ^= 1
    return data


@pytest.mark.parametrize("file", [TOKENS, "residency/part-00000.parquet", "requests.parquet"])
@pytest.mark.parametrize(
    "change", [lambda data: data[:-10], lambda data: b"", flip_middle], ids=["cut", "empty", "edit"]
)
def test_cut_off_and_edited_files_are_errors(
    victim: Path, file: str, change: Callable[[bytearray], bytes]
) -> None:
    damage(victim / file, change)
    found = complaint(victim)
    assert f"{victim.name}/{file}: its SHA-256 differs from manifest.json's" in found
    assert "cut off or edited; restore it" in found


def test_a_file_that_is_gone_is_an_error(victim: Path) -> None:
    (victim / TOKENS).unlink()
    assert f"{TOKENS}: missing, but listed in manifest.json; restore it" in complaint(victim)


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "newer schema": (lambda m: m.update(schema_version=2), "schema_version 2 is not known"),
    "no schema": (lambda m: m.pop("schema_version"), "field schema_version is missing"),
    "missing field": (lambda m: m.pop("geometry"), "field 'geometry' is missing"),
    "unknown field": (lambda m: m.update(colour="red"), "field 'colour' is not known"),
    "wrong type": (lambda m: m["shards"][0].update(rows="many"), "'shards.0.rows': .*'many'"),
    "no rows": (lambda m: m["shards"][0].update(rows=0), r"shards.0.rows.*\(got 0\)"),
    "digest": (lambda m: m["shards"][0].update(sha256="abc"), "shards.0.sha256"),
    "file outside": (lambda m: m["shards"][0].update(file="../x.parquet"), "shards.0.file"),
    "misaligned": (lambda m: m["shards"].pop(), "do not have the tokens' rows"),
    "file twice": (lambda m: m["shards"].append(m["shards"][0]), "lists a file twice"),
    "geometry": (
        lambda m: m["geometry"].update(expert_bytes_by_layer=[1, 1, 1]),
        "geometry differs from its digest .*restore it, or pass --geometry to time another model",
    ),
    "geometry digest": (lambda m: m.update(geometry_sha256="0" * 64), "differs from its digest"),
    "geometry of other columns": (
        lambda m: (m["geometry"].update(top_k=3), m.pop("geometry_sha256")),
        r"'experts' is int16\(3, 2\)",
    ),
    "geometry parts": (lambda m: m["geometry"].update(top_k=9), "top_k 9 is above num_experts 8"),
    "unknown column": (
        lambda m: m["columns"].update(logits=m["columns"]["weights"]),
        "column 'logits' is not known",
    ),
    "column without shards": (
        lambda m: m["columns"].update(lookahead_2=m["columns"]["lookahead_1"]),
        "no shard of column 'lookahead_2'",
    ),
    "required column": (lambda m: m["columns"].pop("phase"), "lists no column 'phase'"),
    "encoding": (lambda m: m["columns"]["weights"].update(encoding="zip"), "'weights' is .*'zip'"),
    "empty": (lambda m: m.update(shards=[], columns={}), "the trace is empty"),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_a_wrong_manifest_is_an_error(victim: Path, case: str) -> None:
    change, message = MANIFESTS[case]
    edit_manifest(victim, change)
    found = complaint(victim)
    assert re.search(message, found), found
    assert str(victim) in found


def test_a_manifest_cut_off_is_an_error(victim: Path) -> None:
    damage(victim / "manifest.json", lambda data: data[:200])
    assert "manifest.json: not valid JSON" in complaint(victim)
    damage(victim / "manifest.json", lambda data: b"[]")
    assert "field schema_version is missing" in complaint(victim)
    damage(victim / "manifest.json", lambda data: b"[" * 100_000)
    assert "manifest.json: not valid JSON (nested too deeply)" in complaint(victim)


def test_a_manifest_without_the_digest_of_its_geometry_is_not_checked(victim: Path) -> None:
    before = Trace.open(victim)
    edit_manifest(victim, lambda m: m.pop("geometry_sha256"))
    load_all(victim)
    assert Trace.open(victim).digest == before.digest
    edit_manifest(victim, lambda m: m["geometry"].update(expert_bytes_by_layer=[1, 1, 1]))
    load_all(victim)
    assert Trace.open(victim).digest != before.digest


def test_who_trained_a_predictor_cannot_be_edited(tmp_path: Path) -> None:
    trace = make_trace(tmp_path / "t", columns=["weights", "learned_1"])
    predictor = TrainedPredictor(
        column="learned_1",
        kind="promoe",
        stride=1,
        hidden_units=1,
        seed=0,
        trained_requests=(0, 2),
        weights_file="promoe_s1.safetensors",
        weights_sha256="0" * 64,
    )
    listed = trace.manifest.model_copy(update={"predictors": (predictor,)})
    write_manifest(trace.path, listed)
    assert Trace.open(trace.path).manifest.predictor_of("learned_1") == predictor
    assert Trace.open(trace.path).digest != trace.digest
    edit_manifest(trace.path, lambda m: m["predictors"][0].update(trained_requests=[]))
    assert "predictors differs from its digest (predictors_sha256); restore it" in complaint(
        trace.path
    )
    edit_manifest(trace.path, lambda m: m.pop("predictors_sha256"))
    assert Trace.open(trace.path).digest != listed.digest


def test_an_added_column_keeps_the_digest_of_the_geometry(victim: Path) -> None:
    def listed() -> str:
        return json.loads((victim / "manifest.json").read_text())["geometry_sha256"]

    before, tokens = listed(), Trace.open(victim).load(["experts"])["experts"]
    values = random_columns(np.random.default_rng(3), make_geometry(), tokens, ["learned_1"])
    append_column(victim, "learned_1", [values["learned_1"]])
    assert listed() == before
    load_all(victim)


# Rows that cannot follow one another

FOUR_STEPS = {"step": [0, 0, 1, 2], "row": [0, 1, 0, 0], "request": [7, 7, 7, 7]}


def rows_in_order(**changed: Any) -> dict[str, Any]:
    """Request 7: two tokens of prefill, two decode steps."""
    order = {**FOUR_STEPS, "phase": [0, 0, 1, 1], "position": [0, 1, 2, 3], **changed}
    rows = len(order["step"])
    return {**order, "token_id": [9] * rows, "experts": np.tile([3, 5], (rows, 3, 1))}


WRONG_ORDERS: dict[str, tuple[dict[str, Any], str]] = {
    "jump": (
        {"position": [0, 1, 2, 4]},
        "row 3: position 4 of request 7 follows position 2: positions go on by one",
    ),
    "repeat": (
        {"position": [0, 0, 1, 2]},
        "row 1: position 0 of request 7 follows position 0: positions go on by one",
    ),
    "prefill after decode": (
        {"phase": [0, 1, 0, 1]},
        "row 2: request 7 decoded before this prefill row",
    ),
    "row twice": ({"row": [1, 1, 0, 0]}, "row 1: batch row 1 occurs twice in step 0"),
    "between others": (
        {"step": [0, 0, 1, 1], "row": [0, 1, 0, 1], "request": [7, 8, 7, 8]}
        | {"position": [4, 90, 5, 92], "phase": [1, 1, 1, 1]},
        "row 3: position 92 of request 8 follows position 90: positions go on by one",
    ),
}


@pytest.mark.parametrize("case", WRONG_ORDERS)
def test_writer_refuses_rows_that_cannot_follow(tmp_path: Path, case: str) -> None:
    changed, message = WRONG_ORDERS[case]
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path / "t", rows_in_order(**changed))
    assert f"{tmp_path / 't'}, shard 0: " in str(caught.value)
    # A shard a step: what came before is in another shard.
    if case != "row twice":
        with pytest.raises(UserError, match=re.sub(r"row \d", r"row \\d", message)):
            write(tmp_path / "s", rows_in_order(**changed), shard_rows=1)


@pytest.mark.parametrize("shard_rows", [1, 4096])
def test_rows_of_requests_that_interleave_are_in_order(tmp_path: Path, shard_rows: int) -> None:
    """Prefill in pieces beside another request's decoding, which begins where it was recorded."""
    rows = rows_in_order(
        step=[0, 0, 0, 1, 1, 2, 2],
        row=[1, 0, 2, 0, 1, 1, 0],
        request=[7, 7, 3, 7, 3, 3, 7],
        phase=[0, 0, 1, 0, 1, 1, 1],
        position=[0, 1, 500, 2, 501, 502, 3],
    )
    load_all(write(tmp_path / "t", rows, shard_rows=shard_rows).path)


ORDER_FORGERIES = {
    "position": (40, "position 40 of request 0 follows position 2"),
    "phase": (0, "request 0 decoded before this prefill row"),
    "step": (1, "batch row 0 occurs twice in step 1"),
}


@pytest.mark.parametrize("name", ORDER_FORGERIES)
@pytest.mark.parametrize(("shard_rows", "shard", "row"), [(1, 2, 0), (4096, 0, 3)])
def test_rows_that_cannot_follow_are_found_on_reading(
    tmp_path: Path, name: str, shard_rows: int, shard: int, row: int
) -> None:
    """The second decode step after a prefill of two rows: in a shard of its own, or in the only."""
    value, message = ORDER_FORGERIES[name]
    options = {"requests": 1, "prompt": 2, "output": 6, "columns": (), "shard_rows": shard_rows}
    trace = make_trace(tmp_path / "t", **options)
    file = f"tokens/part-{shard:05d}.parquet"
    forge(trace.path, file, set_scalar(name, row, value))
    assert f"t/{file}: row {row}: {message}" in complaint(trace.path)


def test_rows_are_compared_with_those_that_are_read_alone(tmp_path: Path) -> None:
    """A range that begins within a request has no row before it."""
    trace = make_trace(tmp_path / "t", requests=1, prompt=2, output=6, shard_rows=1, columns=())
    part = trace.load(["request", "position", "phase"], 4, 7)
    assert part["position"].tolist() == [4, 5, 6]
