"""Parquet of indices and scores: files made here by the layout of FLAME-MoE-Traces."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from configs.errors import UserError
from configs.geometry import load_geometry
from tests.traces import random_ids
from tracer.importers.hf_parquet import import_hf_parquet
from tracer.trace import PREFILL, Trace

MODEL = "deepseek-v2-lite"  # 26 MoE layers, 1 to 26, of 27; 64 experts, top-6
LAYERS, EXPERTS, TOP_K = 26, 64, 6
Tables = list[dict[str, Any]]


def routing(rows: int) -> tuple[NDArray, NDArray]:
    rng = np.random.default_rng(0)
    experts = random_ids(rng, (rows, LAYERS), EXPERTS, TOP_K)
    scores = -np.sort(-rng.dirichlet(np.ones(EXPERTS), (rows, LAYERS))[..., :TOP_K])
    return experts, scores.astype(np.float16)


def tables(experts: NDArray, scores: NDArray) -> Tables:
    """One table a layer, with the published types."""
    return [
        {
            "scores": pa.array(list(scores[:, layer]), pa.list_(pa.float16())),
            "indices": pa.array(list(experts[:, layer]), pa.list_(pa.int16())),
        }
        for layer in range(experts.shape[1])
    ]


def saved(
    directory: Path, layers: Tables, first: int = 1, row_group: int = 5, code: str = "02d"
) -> Path:
    directory.mkdir()
    for number, columns in enumerate(layers, start=first):
        path = directory / f"layer_{number:{code}}.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=row_group)
    return directory


def samples(directory: Path, ids: NDArray, parts: int = 2) -> Path:
    directory.mkdir()
    for index, part in enumerate(np.array_split(ids.astype(np.int32), parts)):
        pq.write_table(pa.table({"token_id": part}), directory / f"{index:03d}.parquet")
    return directory


@pytest.mark.parametrize("first", [1, 2])
def test_sequences_become_prefills(tmp_path: Path, first: int) -> None:
    """Layers counted from 0 and from 1, sequences across row groups and files of samples."""
    experts, scores = routing(12)
    src = saved(tmp_path / "iter", tables(experts, scores), first)
    ids = samples(tmp_path / "samples", np.arange(100, 113))
    import_hf_parquet(src, MODEL, tmp_path / "out", sequence_tokens=4, token_ids=ids)
    trace = Trace.open(tmp_path / "out")
    arrays = trace.load(trace.columns())
    np.testing.assert_array_equal(arrays["experts"], experts)
    np.testing.assert_array_equal(arrays["weights"], scores)
    assert arrays["token_id"].tolist() == list(range(100, 112))
    assert (arrays["phase"] == PREFILL).all()
    assert arrays["position"].tolist() == [0, 1, 2, 3] * 3
    assert arrays["request"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert arrays["step"].tolist() == arrays["request"].tolist()
    lengths = trace.requests()[["prompt_tokens", "output_tokens"]].to_numpy().tolist()
    assert lengths == [[4, 1]] * 3
    assert trace.manifest.geometry == load_geometry(MODEL)


def test_the_first_rows_alone_without_token_ids(tmp_path: Path) -> None:
    experts, scores = routing(12)
    src = saved(tmp_path / "iter", tables(experts, scores))
    import_hf_parquet(src, MODEL, tmp_path / "out", sequence_tokens=3, max_tokens=6)
    arrays = Trace.open(tmp_path / "out").load(["experts", "token_id"])
    np.testing.assert_array_equal(arrays["experts"], experts[:6])
    assert (arrays["token_id"] == -1).all()


def refuse(src: Path, message: str, **options: Any) -> None:
    before = sorted(src.parent.iterdir())
    options = {"sequence_tokens": 4} | options
    with pytest.raises(UserError, match=message) as caught:
        import_hf_parquet(src, MODEL, src.parent / "out", **options)
    assert "\n" not in str(caught.value)
    assert sorted(src.parent.iterdir()) == before


def lists(values: list[Any], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.list_(kind))


def edit(layer: int, at: tuple[int, int], name: str, value: float) -> Callable[[Tables], None]:
    def change(layers: Tables) -> None:
        column = layers[layer][name]
        rows = column.to_pylist()
        rows[at[0]][at[1]] = value
        layers[layer][name] = pa.array(rows, column.type)

    return change


def put(layer: int, name: str, value: Any) -> Callable[[Tables], None]:
    def change(layers: Tables) -> None:
        layers[layer][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            edit(3, (9, 2), "indices", 64),
            r"layer_04\.parquet: row 9: indices: expert 64 is outside \[0, 64\) of deepseek",
        ),
        (edit(0, (9, 2), "indices", -1), r"layer_01\.parquet: row 9: indices: expert -1"),
        (
            lambda layers: [edit(1, (5, r), "indices", 7)(layers) for r in (0, 1)],
            "rows counted from 4: row 1, layer 1: .*expert id 7 occurs twice",
        ),
        (edit(2, (6, 1), "scores", 1.5), r"layer_03\.parquet: row 6: scores: 1.5 is no prob"),
        (edit(2, (6, 1), "scores", float("nan")), "row 6: scores: nan is no probability"),
        (
            put(4, "indices", lists([[1, 2, 3, 4, 5, 6]] * 7 + [[1]] + [[0] * 6] * 4, pa.int16())),
            r"layer_05\.parquet: row 7: indices holds 1 values, .*top-6",
        ),
        (
            put(4, "indices", lists([[1, 2, 3, 4, 5, 6]] * 7 + [None] * 5, pa.int16())),
            "row 7: indices holds 0 values",
        ),
        (
            put(4, "indices", lists([[1, 2, 3, 4, 5, None]] * 12, pa.int16())),
            "row 0: indices holds a null",
        ),
        (put(4, "indices", lists([[0.5] * 6] * 12, pa.float32())), "expected lists of integers"),
        (put(4, "scores", pa.array([1] * 12)), "column scores is int64, expected lists of floats"),
        (lambda layers: layers[4].pop("scores"), r"layer_05\.parquet: no column 'scores'"),
        (lambda layers: layers.pop(), "holds layer_NN.parquet of layers 1, .* has MoE layers 1 to"),
        (
            lambda layers: layers.__setitem__(8, tables(*routing(11))[8]),
            r"layer_09\.parquet: 11 rows, layer_01\.parquet has 12",
        ),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, change: Callable[[Tables], None], message: str
) -> None:
    layers = tables(*routing(12))
    change(layers)
    refuse(saved(tmp_path / "iter", layers), message)


def test_lengths_that_do_not_fit(tmp_path: Path) -> None:
    src = saved(tmp_path / "iter", tables(*routing(12)))
    refuse(src, "12 rows are no multiple of --sequence-tokens 5", sequence_tokens=5)
    refuse(src, r"--sequence-tokens 40000 is outside \[1, 32768\]", sequence_tokens=40_000)
    refuse(src, "--max-tokens 6 is no multiple", max_tokens=6)
    refuse(saved(tmp_path / "empty", tables(*routing(0))), "hold no rows")


def test_token_ids_that_do_not_fit(tmp_path: Path) -> None:
    src = saved(tmp_path / "iter", tables(*routing(12)))
    few = samples(tmp_path / "few", np.arange(11))
    refuse(src, "11 token ids for 12 rows", token_ids=few)
    wrong = samples(tmp_path / "wrong", np.full(12, 102_400))
    refuse(src, "row 0: token_id 102400 is outside", token_ids=wrong)
    refuse(src, "no Parquet files of token ids", token_ids=tmp_path / "nowhere")
    refuse(src, "no column 'token_id'", token_ids=src)


@pytest.mark.parametrize("cut", [0, 100, -8])
def test_files_cut_off(tmp_path: Path, cut: int) -> None:
    src = saved(tmp_path / "iter", tables(*routing(12)))
    path = src / "layer_07.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    refuse(src, r"layer_07\.parquet: not readable Parquet: cut off")


def test_an_edited_page_is_refused(tmp_path: Path) -> None:
    src = saved(tmp_path / "iter", tables(*routing(12)))
    path = src / "layer_07.parquet"
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(255 for _ in range(36))
    path.write_bytes(data)
    refuse(src, r"layer_07\.parquet: cut off or edited")


def test_directories_without_layers(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "no such directory")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "of layers none")
