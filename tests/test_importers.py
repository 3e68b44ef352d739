from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from configs.errors import UserError
from configs.geometry import load_geometry
from tests.traces import random_ids
from tracer.importers import import_bigmoe_csv, import_npz
from tracer.trace import DECODE, PREFILL, Trace

# .npz: the published file


def test_npz_is_imported_whole_and_fast(shared: Path, tmp_path: Path) -> None:
    src = shared / "traces" / "gpt-oss-20b-decode.npz"
    begin_s = time.process_time()
    import_npz(src, "gpt-oss-20b", tmp_path / "t")
    trace = Trace.open(tmp_path / "t")
    arrays = trace.load(trace.columns())
    assert time.process_time() - begin_s < 10
    with np.load(src) as source:
        np.testing.assert_array_equal(arrays["experts"], source["experts"])
        np.testing.assert_array_equal(arrays["weights"], source["scores"])
        np.testing.assert_array_equal(arrays["token_id"], source["token"])
        lengths = np.diff(source["offsets"])
        requests = trace.requests()
        assert requests["prompt_tokens"].tolist() == source["prompt_len"].tolist()
        assert requests["domain"].tolist() == source["dataset"].tolist()
    assert requests["output_tokens"].tolist() == (lengths + 1).tolist()
    assert trace.rows == 64_794
    assert (arrays["phase"] == DECODE).all()
    assert (arrays["step"] == np.arange(64_794)).all()
    assert not arrays["row"].any()
    rows = pd.DataFrame({name: arrays[name] for name in ("request", "position")})
    assert rows.groupby("request").size().tolist() == lengths.tolist()
    first = rows.groupby("request")["position"].min()
    assert first.tolist() == requests["prompt_tokens"].tolist()
    assert (rows.groupby("request")["position"].diff().dropna() == 1).all()


def test_npz_trace_says_what_it_is(gpt_oss_trace: Trace) -> None:
    manifest = gpt_oss_trace.manifest
    assert manifest.geometry == load_geometry("gpt-oss-20b")
    assert "token ids are an arbitrary index" in manifest.recording.notes
    assert "prefill was not recorded" in manifest.recording.notes
    assert gpt_oss_trace.notes == []


# .npz: damaged files


def npz_arrays(rows: int = 9) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "experts": random_ids(rng, (rows, 24), 32, 4).astype(np.uint8),
        "scores": rng.dirichlet(np.ones(4), (rows, 24)).astype(np.float16),
        "token": np.arange(rows, dtype=np.int32),
        "offsets": np.array([0, 4, rows]),
        "prompt_len": np.array([7, 3], np.int32),
        "dataset": np.array(["a", "b"]),
        "n_experts": np.array(32),
    }


def changed(name: str, at: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][at] = value

    return change


def replaced(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("experts", (5, 3, 1), 32),
            r"row 5, layer 3, rank 1: .*id 32 is outside \[0, 32\)",
        ),
        (changed("experts", (6, 2), 9), "row 6, layer 2: .*expert id 9 occurs twice"),
        (changed("scores", (1, 0, 0), np.inf), "row 1, layer 0, rank 0: weights inf"),
        (changed("scores", (1, 0, 2), np.nan), "row 1, layer 0, rank 2: weights is null"),
        (changed("offsets", 1, 0), "offsets must increase from 0 to the 9 rows"),
        (changed("offsets", 2, 8), "offsets must increase from 0 to the 9 rows"),
        (changed("prompt_len", 1, -1), "prompt_len -1 of request 1 is negative"),
        (changed("prompt_len", 1, 2**31 - 3), "row 7: position 2147483648 is outside"),
        (changed("token", 5, -7), "row 5: token_id -7 is outside"),
        (replaced("token", np.arange(9) + 2**31 - 4), "row 4: token_id 2147483648 is outside"),
        (replaced("offsets", np.array([0, 2**64 - 1, 9], np.uint64)), "offsets must increase"),
        (
            replaced("experts", np.zeros((7, 24, 4), np.uint8)),
            r"\[7, 24, 4\], expected integers \[9, 24, 4\]: .*cut off .*restore the file",
        ),
        (
            replaced("offsets", np.array([0, 4])),
            r"'offsets' is int64 \[2\], expected integers \[3\]: .*cut off",
        ),
        (
            lambda arrays: arrays.pop("scores"),
            "array 'scores' is missing; it needs experts, scores",
        ),
        (replaced("experts", np.zeros((9, 24, 8), np.uint8)), r"\[9, 24, 8\], expected .*top-4"),
        (replaced("experts", np.zeros((9, 23, 4), np.uint8)), r"\[9, 23, 4\], expected .*24 MoE"),
        (replaced("scores", np.zeros((8, 24, 4), np.float16)), r"'scores' is float16 \[8, 24, 4\]"),
        (replaced("scores", np.zeros((9, 24, 4), np.int8)), "'scores' is int8 .*expected floats"),
        (replaced("token", np.zeros(9)), "'token' is float64 .*expected integers"),
        (replaced("token", np.array(3)), r"'token' is int64 \[\], expected integers \[1\]"),
        (replaced("dataset", np.zeros(2)), "'dataset' is float64 .*expected text"),
        (replaced("n_experts", np.array(64)), "n_experts is 64, gpt-oss-20b has 32"),
    ],
)
def test_malformed_npz(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    arrays = npz_arrays()
    change(arrays)
    np.savez_compressed(tmp_path / "src.npz", **arrays)
    refuse(import_npz, tmp_path / "src.npz", "gpt-oss-20b", message)


def test_an_npz_without_rows_is_refused(tmp_path: Path) -> None:
    arrays = npz_arrays(0) | {"offsets": np.array([0]), "prompt_len": np.zeros(0, int)}
    np.savez(tmp_path / "src.npz", **arrays | {"dataset": np.zeros(0, "U1")})
    refuse(import_npz, tmp_path / "src.npz", "gpt-oss-20b", "holds no rows")


def test_nobody_is_told_to_unpickle(tmp_path: Path) -> None:
    text, objects = tmp_path / "text.npz", tmp_path / "objects.npz"
    text.write_text("request,experts\n0,1\n")
    np.savez(objects, **npz_arrays() | {"dataset": np.array([{}], object)})
    for path, reason in ((text, "no archive, or cut off"), (objects, "it holds Python objects")):
        with pytest.raises(UserError, match=reason) as refused:
            import_npz(path, "gpt-oss-20b", tmp_path / "out")
        assert "pickle" not in str(refused.value)


@pytest.mark.parametrize("keep", [0, 30, 2000, -20])
def test_an_npz_cut_off_is_refused(tmp_path: Path, keep: int) -> None:
    np.savez_compressed(tmp_path / "src.npz", **npz_arrays())
    whole = (tmp_path / "src.npz").read_bytes()
    (tmp_path / "src.npz").write_bytes(whole[:keep])
    refuse(import_npz, tmp_path / "src.npz", "gpt-oss-20b", r"not a readable \.npz file")


def test_an_npz_with_an_edited_byte_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "src.npz", **npz_arrays())
    data = bytearray((tmp_path / "src.npz").read_bytes())
    data[500] ^= 1
    (tmp_path / "src.npz").write_bytes(data)
    refuse(import_npz, tmp_path / "src.npz", "gpt-oss-20b", r"not a readable \.npz file.*CRC")


def test_pickled_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "src.npz", **npz_arrays() | {"dataset": np.array([{}, {}], object)})
    refuse(import_npz, tmp_path / "src.npz", "gpt-oss-20b", r"not a readable \.npz.*Python objects")


def test_a_good_npz_is_imported(tmp_path: Path) -> None:
    np.savez(tmp_path / "src.npz", **npz_arrays())
    import_npz(tmp_path / "src.npz", "gpt-oss-20b", tmp_path / "t")
    arrays = Trace.open(tmp_path / "t").load(["request", "position"])
    assert arrays["request"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
    assert arrays["position"].tolist() == [7, 8, 9, 10, 3, 4, 5, 6, 7]


def refuse(importer: Callable[..., None], src: Path, model: str, message: str) -> None:
    """The import fails with one line that names the file, and writes nothing."""
    before = sorted(src.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        importer(src, model, src.parent / "out" if src.parent.is_dir() else src)
    assert str(src) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(src.parent.iterdir()) == before


@pytest.mark.parametrize("importer", [import_npz, import_bigmoe_csv])
def test_importers_refuse_names(tmp_path: Path, importer: Callable[..., None]) -> None:
    refuse(importer, tmp_path / "nowhere", "gpt-oss-20b", "no such file")
    (tmp_path / "src").write_text("x\n")
    with pytest.raises(UserError, match="unknown model 'gpt-oss'"):
        importer(tmp_path / "src", "gpt-oss", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_importers_write_over_nothing(tmp_path: Path) -> None:
    np.savez(tmp_path / "src.npz", **npz_arrays())
    (tmp_path / "log.csv").write_text("\n".join(log_lines()) + "\n")
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists and is not empty"):
        import_npz(tmp_path / "src.npz", "gpt-oss-20b", out)
    with pytest.raises(UserError, match="exists and is not empty"):
        import_bigmoe_csv(tmp_path / "log.csv", "qwen3-30b-a3b", out)
    assert [path.name for path in out.iterdir()] == ["keep"]


# The engine's log: the published file


def test_log_keeps_the_files_sizes_and_top_k(bigmoe_trace: Trace) -> None:
    geometry, public = bigmoe_trace.manifest.geometry, load_geometry("qwen3-30b-a3b")
    assert (public.top_k, geometry.top_k) == (8, 6)
    assert set(geometry.expert_bytes_by_layer) == {3_059_712, 2_654_208}
    assert geometry.expert_bytes_by_layer[5:8] == (3_059_712, 2_654_208, 2_654_208)
    assert set(geometry.segment_bytes_by_layer) == {11_953_152, 11_682_816}
    embedding_and_head = public.nonexpert_bytes - sum(public.segment_bytes_by_layer)
    segments = sum(geometry.segment_bytes_by_layer)
    assert geometry.nonexpert_bytes == embedding_and_head + segments
    assert geometry.num_experts == 128
    assert bigmoe_trace.manifest.model_revision == "Qwen3-30B-A3B-Q4_K_M.gguf"


def test_log_has_one_prefill_step(bigmoe_trace: Trace) -> None:
    arrays = bigmoe_trace.load(["step", "row", "phase", "position", "token_id", "request"])
    assert arrays["step"].tolist() == [0] * 28 + list(range(1, 129))
    assert arrays["row"].tolist() == list(range(28)) + [0] * 128
    assert arrays["phase"].tolist() == [PREFILL] * 28 + [DECODE] * 128
    assert arrays["position"].tolist() == list(range(156))
    assert not arrays["request"].any()
    assert (arrays["token_id"] == -1).all()
    requests = bigmoe_trace.requests()
    assert requests[["prompt_tokens", "output_tokens"]].to_numpy().tolist() == [[28, 129]]


def test_log_nulls_layers_that_did_not_run(bigmoe_trace: Trace) -> None:
    arrays = bigmoe_trace.load(["experts", "weights", "residency"])
    absent = np.zeros((156, 48, 6), bool)
    absent[:27, 47] = True
    np.testing.assert_array_equal(arrays["experts"] < 0, absent)
    np.testing.assert_array_equal(np.isnan(arrays["weights"]), absent)
    np.testing.assert_array_equal(arrays["residency"] == 255, absent)


def test_log_agrees_with_the_file_access_by_access(bigmoe_trace: Trace, shared: Path) -> None:
    src = shared / "traces" / "bigmoe-qwen3-30b-route.csv"
    log = pd.read_csv(src, comment="#")
    arrays = bigmoe_trace.load(["experts", "weights", "residency"])
    at = (log["step"], log["layer"], log["slot"])
    np.testing.assert_array_equal(arrays["experts"][at], log["expert"])
    np.testing.assert_array_equal(arrays["residency"][at], log["residency"])
    np.testing.assert_allclose(arrays["weights"][at], log["weight"], rtol=2**-11)
    decode = arrays["residency"][28:]
    assert decode.size == 36_864
    assert round(100 * decode.mean(), 1) == 80.3


# The engine's log: several turns, damaged files

LAYERS, TOP_K, PROMPT, OUTPUT = 48, 2, 3, 2
HEADER_LINES = 2 + LAYERS + 1


def log_lines(turns: int = 1) -> list[str]:
    """A log of `turns` prompts; the last layer runs for a prompt's last token alone."""
    rng = np.random.default_rng(0)
    lines = ["# route_trace v1"]
    lines += [f"# model=/data/m.gguf arch=qwen3moe n_layer=48 n_expert=128 n_expert_used={TOP_K}"]
    lines += [f"# layer={layer} expert_bytes=3000 dense_bytes=9000" for layer in range(LAYERS)]
    lines += ["turn,phase,step,layer,slot,expert,weight,residency,expert_bytes"]
    for turn in range(turns):
        prefill = [(0, step, layer) for layer in range(LAYERS) for step in range(PROMPT)]
        decode = [(1, PROMPT + i, layer) for i in range(OUTPUT) for layer in range(LAYERS)]
        for phase, step, layer in prefill + decode:
            if phase == 0 and layer == LAYERS - 1 and step < PROMPT - 1:
                continue
            experts = rng.permutation(128)[:TOP_K]
            lines += [
                f"{turn},{phase},{step},{layer},{slot},{expert},0.5,{phase},{3000 * (1 - phase)}"
                for slot, expert in enumerate(experts)
            ]
    return lines


def import_log(tmp_path: Path, lines: list[str]) -> Trace:
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    import_bigmoe_csv(tmp_path / "log.csv", "qwen3-30b-a3b", tmp_path / "t")
    return Trace.open(tmp_path / "t")


def test_each_turn_is_a_request(tmp_path: Path) -> None:
    arrays = import_log(tmp_path, log_lines(turns=2)).load(
        ["request", "step", "row", "phase", "position", "experts"]
    )
    assert arrays["request"].tolist() == [0] * 5 + [1] * 5
    assert arrays["step"].tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4, 5]
    assert arrays["row"].tolist() == [0, 1, 2, 0, 0] * 2
    assert arrays["position"].tolist() == [0, 1, 2, 3, 4] * 2
    assert arrays["phase"].tolist() == [0, 0, 0, 1, 1] * 2
    assert (arrays["experts"][:, LAYERS - 1, 0] < 0).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ] * 2


def test_sizes_of_the_public_model_where_the_log_has_none(tmp_path: Path) -> None:
    lines = [line.replace(" dense_bytes=9000", "") for line in log_lines()]
    geometry = import_log(tmp_path, lines).manifest.geometry
    public = load_geometry("qwen3-30b-a3b")
    assert geometry.expert_bytes_by_layer == (3000,) * LAYERS
    assert geometry.segment_bytes_by_layer == public.segment_bytes_by_layer
    assert geometry.nonexpert_bytes == public.nonexpert_bytes


def access_line(line: int, **fields: Any) -> Callable[[list[str]], None]:
    """Change fields of an access, counted from 0."""
    names = log_lines()[HEADER_LINES - 1].split(",")

    def change(lines: list[str]) -> None:
        values = lines[HEADER_LINES + line].split(",")
        for name, value in fields.items():
            values[names.index(name)] = str(value)
        lines[HEADER_LINES + line] = ",".join(values)

    return change


def cut_last_line(lines: list[str]) -> None:
    lines[-1] = lines[-1][:9]


def header(old: str, new: str) -> Callable[[list[str]], None]:
    def change(lines: list[str]) -> None:
        index = next(i for i, line in enumerate(lines) if old in line)
        lines[index] = lines[index].replace(old, new)

    return change


ACCESSES = 2 * ((LAYERS - 1) * PROMPT + 1 + OUTPUT * LAYERS)
LAST = HEADER_LINES + ACCESSES


@pytest.mark.parametrize(
    ("change", "line", "message"),
    [
        (lambda lines: lines.pop(0), 1, "the header '# route_trace v1' is missing"),
        (
            lambda lines: lines.__delitem__(slice(1, None)),
            1,
            "the header '# route_trace v1' is missing",
        ),
        (header("n_expert_used=2", ""), 2, "expected '# model="),
        (header("n_expert_used=2", "n_expert_used=0"), 2, r"n_expert_used=0 is outside \[1, 128\]"),
        (header("n_expert=128", "n_expert=64"), 2, "n_expert=64, but qwen3-30b-a3b has 48 and 128"),
        (header("layer=7 ", "layer=8 "), 10, "expected '# layer=7 expert_bytes=..'"),
        (header("expert_bytes=3000", "expert_bytes=0"), 3, "expected '# layer=0 expert_bytes=..'"),
        (header(" dense_bytes=9000", ""), 3, "dense_bytes is given for some layers only"),
        (header("turn,phase", "phase,turn"), HEADER_LINES, "expected the column names turn,phase"),
        (lambda lines: lines.__delitem__(slice(HEADER_LINES, None)), 52, "holds no accesses"),
        (cut_last_line, LAST, "5 fields, expected 9: the line is cut off"),
        (lambda lines: lines.pop(), LAST - 1, "fewer than 2 accesses: cut off"),
        (
            lambda lines: lines.__delitem__(slice(-2, None)),
            LAST - 2,
            "layer 47 of this token is absent: the file is cut off",
        ),
        (
            lambda lines: lines.__delitem__(slice(HEADER_LINES + 2 * PROMPT * 20, None)),
            HEADER_LINES + 2 * PROMPT * 20,
            "layer 20 of this token is absent: the file is cut off",
        ),
        (access_line(4, expert="x"), 56, "expert 'x' is no int"),
        (access_line(4, expert=1.0), 56, "expert '1.0' is no int"),
        (access_line(4, expert=128), 56, r"expert 128 is outside \[0, 128\)"),
        (access_line(4, expert=-1), 56, "expert -1 is out of range"),
        (access_line(4, layer=48), 56, r"layer 48 is outside \[0, 48\)"),
        (access_line(4, phase=2), 56, r"phase 2 is outside \[0, 2\)"),
        (access_line(4, residency=3), 56, r"residency 3 is outside \[0, 2\)"),
        (access_line(4, weight="nan"), 56, "weight nan is out of range"),
        (access_line(4, weight="heavy"), 56, "weight 'heavy' is no float"),
        (access_line(4, expert_bytes=17), 56, "expert_bytes 17 is neither 0 nor the header's 3000"),
        (access_line(5, slot=2), 57, r"slot 2 is outside \[0, 2\)"),
        (access_line(5, slot=0), 57, "expected slot 1 of the layer begun before"),
        (access_line(5, layer=1), 57, "expected slot 1 of the layer begun before"),
        (lambda lines: lines.pop(HEADER_LINES + 5), 57, "expected slot 1 of the layer begun"),
        (
            lambda lines: lines.extend(lines[HEADER_LINES : HEADER_LINES + 2]),
            LAST + 1,
            "this token's layer occurs a second time",
        ),
    ],
)
def test_malformed_logs(
    tmp_path: Path, change: Callable[[list[str]], Any], line: int, message: str
) -> None:
    lines = log_lines()
    change(lines)
    src = tmp_path / "log.csv"
    src.write_text("".join(text + "\n" for text in lines))
    refuse(import_bigmoe_csv, src, "qwen3-30b-a3b", f"line {line}: .*{message}")


def test_duplicate_experts_of_a_log(tmp_path: Path) -> None:
    lines = log_lines()
    expert = lines[HEADER_LINES + 4].split(",")[5]
    access_line(5, expert=expert)(lines)
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    message = f"line 57: expert {expert} occurs twice for one token and layer"
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "qwen3-30b-a3b", message)


def test_steps_of_a_log_follow_each_other(tmp_path: Path) -> None:
    lines = [re.sub("^0,1,4,", "0,1,6,", line) for line in log_lines()]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    message = "step 6 follows step 3 of its turn"
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "qwen3-30b-a3b", message)


def test_prefill_of_a_log_comes_first(tmp_path: Path) -> None:
    lines = [re.sub("^0,1,4,", "0,0,4,", line) for line in log_lines()]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    message = "a prefill token after the turn's first decode step"
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "qwen3-30b-a3b", message)


def test_a_log_that_ends_in_a_line_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("\n".join(log_lines()))
    message = f"line {LAST}: the line has no end: the file is cut off"
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "qwen3-30b-a3b", message)


def test_a_log_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"# route_trace v1\n\xff\xfe\n")
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "qwen3-30b-a3b", "line 2: not text")


def test_a_model_with_dense_layers_does_not_fit_a_log(tmp_path: Path) -> None:
    lines = [line.replace("n_layer=48", "n_layer=27") for line in log_lines()]
    lines = [line.replace("n_expert=128", "n_expert=64") for line in lines]
    del lines[2 + 27 : 2 + 48]
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    refuse(import_bigmoe_csv, tmp_path / "log.csv", "deepseek-v2-lite", "has dense layers")
