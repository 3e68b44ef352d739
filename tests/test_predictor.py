"""Learned predictors: the split, bounded memory, training, what a trace and the weights tell."""

import json
import tracemalloc

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")

from configs.errors import UserError  # noqa: E402
from tests.traces import DOMAINS, make_geometry, make_trace  # noqa: E402
from tracer.commands.train_predictor import register  # noqa: E402
from tracer.predictor import load  # noqa: E402
from tracer.predictor.data import GATE_INPUTS, RowSource, as_rows  # noqa: E402
from tracer.predictor.pipeline import Options, apply_predictor, train_predictor  # noqa: E402
from tracer.predictor.split import prompt_digests, split_requests  # noqa: E402
from tracer.predictor.train import default_hidden_units  # noqa: E402
from tracer.trace import DECODE, PREFILL, Trace, TraceWriter  # noqa: E402

LAYERS, EXPERTS, TOP_K, HIDDEN, STRIDE = 4, 12, 3, 16, 2
QUICK = Options(hidden_units=32, epochs=30, device="cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which fight with tests beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_learnable(
    path, *, requests=30, prompt=50, output=10, seed=0, shard_rows=100, model="tiny", absent=False
):
    """Experts of layer l are the best of a fixed linear map of the gate input of layer l - 2.

    The gate of l + 2 on that input, the next-gate predictor, sees a noisy map. Request r has the
    prompt of token ids r, r, ... With `absent`, the last layer runs for no token of a prefill.
    """
    rng, maps = np.random.default_rng(seed), np.random.default_rng(99)
    true = maps.normal(size=(LAYERS, HIDDEN, EXPERTS))
    noisy = true + 0.5 * maps.normal(size=true.shape)
    fields = {
        "model_id": model,
        "geometry": make_geometry(LAYERS, EXPERTS, TOP_K, HIDDEN),
        "recording": {"generator": "tests"},
    }
    request = np.repeat(np.arange(requests), prompt + output)
    position = np.tile(np.arange(prompt + output), requests)
    decode = position >= prompt
    n = len(request)
    source = rng.normal(size=(n, LAYERS, HIDDEN)).astype(np.float16)
    experts = rng.permuted(np.tile(np.arange(EXPERTS), (n, LAYERS, 1)), axis=-1)
    lookahead = np.full((n, LAYERS, 2 * TOP_K), -1)
    for layer in range(LAYERS - STRIDE):
        later, known = layer + STRIDE, source[:, layer].astype(float)
        experts[:, later] = np.argsort(-known @ true[later], axis=-1)
        lookahead[:, layer] = np.argsort(-known @ noisy[later], axis=-1)[:, : 2 * TOP_K]
    experts, inputs = experts[..., :TOP_K], source + np.float16(3)
    if absent:
        experts[~decode, -1], inputs[~decode, -1] = -1, np.nan
    with TraceWriter(path, fields, shard_rows=shard_rows) as writer:
        writer.write_rows(
            request=request,
            step=np.cumsum(decode | (position == 0)) - 1,
            row=np.where(decode, 0, position),
            phase=np.where(decode, DECODE, PREFILL),
            position=position,
            token_id=np.where(decode, rng.integers(0, 50, n), request),
            experts=experts,
            gate_inputs=inputs,
            lookahead_2=lookahead,
        )
        writer.close(
            {
                "request": request,
                "prompt_tokens": prompt,
                "output_tokens": output + 1,
                "domain": DOMAINS[request % 3],
                "arrival_s": None,
            }
            for request in range(requests)
        )
    return Trace.open(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trace with a predictor trained on it, and the report."""
    path = tmp_path_factory.mktemp("predictor") / "trace"
    report = train_predictor(make_learnable(path), QUICK)
    return Trace.open(path), report


# The split


@given(
    owners=st.lists(st.integers(0, 30), min_size=3, max_size=60),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 5),
)
def test_the_split_keeps_prompts_together_and_forgets_none(owners, share, seed):
    digests = {request: f"{owner:x}" for request, owner in enumerate(owners)}
    if len(set(owners)) < 3:
        with pytest.raises(UserError, match="distinct prompt"):
            split_requests(digests, dict.fromkeys(digests), share, seed)
        return
    split = split_requests(digests, dict.fromkeys(digests), share, seed)
    parts = (split.train, split.validation, split.heldout)
    assert all(parts)
    assert sorted(sum(parts, ())) == list(digests)
    prompts = [{digests[request] for request in part} for part in parts]
    assert not (prompts[0] & prompts[1] | prompts[0] & prompts[2] | prompts[1] & prompts[2])
    assert split == split_requests(digests, dict.fromkeys(digests), share, seed)


@given(sizes=st.lists(st.integers(4, 40), min_size=1, max_size=4), share=st.floats(0.1, 0.6))
def test_every_domain_is_held_out_in_proportion(sizes, share):
    domains = dict(enumerate(d for i, size in enumerate(sizes) for d in [f"domain-{i}"] * size))
    digests = {request: f"{request:x}" for request in domains}
    split = split_requests(digests, domains, share, 0)
    for i, size in enumerate(sizes):
        held = sum(domains[request] == f"domain-{i}" for request in split.heldout)
        assert abs(held - share * size) <= 1.6


def test_the_seed_draws_the_split():
    digests = {request: f"{request:x}" for request in range(40)}
    splits = {split_requests(digests, dict.fromkeys(digests), 0.3, seed) for seed in range(3)}
    assert len(splits) == 3


def test_a_prompt_has_one_digest_however_it_was_recorded(tmp_path):
    whole = make_learnable(tmp_path / "a", requests=4)
    other = make_learnable(tmp_path / "b", requests=4, seed=1, output=3, shard_rows=7)
    assert prompt_digests(whole) == prompt_digests(other)
    assert len(set(prompt_digests(whole).values())) == 4


# Rows


def test_rows_pair_a_gate_input_with_the_experts_stride_layers_later(tmp_path):
    trace = make_learnable(tmp_path / "t", requests=1, absent=True)
    arrays = trace.load(["experts", GATE_INPUTS, "phase"])
    rows = as_rows(arrays["experts"], arrays[GATE_INPUTS], STRIDE)
    assert np.array_equal(rows.targets[:, 0], arrays["experts"][:, 2])
    assert np.array_equal(rows.inputs, arrays[GATE_INPUTS][:, :2])
    prefill = arrays["phase"] == PREFILL
    assert (rows.targets[prefill, 1] == -1).all()
    assert np.array_equal(rows.targets[~prefill, 1], arrays["experts"][~prefill, 3])


def test_windows_hold_every_row_of_the_requests_once_however_small(tmp_path):
    trace = make_learnable(tmp_path / "t", requests=12, shard_rows=50)
    chosen = (1, 2, 5, 9)
    arrays = trace.load(["request", GATE_INPUTS])
    wanted = arrays[GATE_INPUTS][np.isin(arrays["request"], chosen)][:, :2]
    for memory in (1, 20_000, 2**30):
        source = RowSource(trace, chosen, STRIDE, memory)
        assert source.rows == len(wanted)
        rng = np.random.default_rng(0)
        for order in (None, rng, rng):
            windows = [window.inputs.copy() for window in source.windows(order)]
            found = np.concatenate(windows)
            assert np.array_equal(*(np.sort(x.reshape(len(x), -1)[:, 0]) for x in (found, wanted)))
        assert (len(windows) > 1) == (source.bytes > memory)


def test_memory_is_a_window_and_a_shard_however_long_the_trace(tmp_path):
    window, peaks = 100_000, []
    for requests in (60, 180):
        trace = make_learnable(tmp_path / str(requests), requests=requests, shard_rows=200)
        source = RowSource(trace, range(requests), STRIDE, window)
        assert source.bytes > 2 * window
        tracemalloc.start()
        for rows in source.windows():
            assert rows.inputs.nbytes <= window
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.25 * peaks[0] < source.bytes


# Training


def test_what_can_be_learned_is_learned_and_judged_on_heldout_requests(trained):
    trace, report = trained
    entry = trace.manifest.predictor_of("learned_2")
    arrays = trace.load(["request", "phase", "experts", "learned_2", "lookahead_2"])
    heldout = ~np.isin(arrays["request"], entry.trained_requests)
    assert len(entry.trained_requests) == report["requests"]["trained"] == 21
    for phase, code in (("decode", DECODE), ("prefill", PREFILL)):
        rows = heldout & (arrays["phase"] == code)
        true = arrays["experts"][rows][:, STRIDE:]
        scores = report["accuracy"][phase]["mean"]
        for name, column in (("learned", "learned_2"), ("next_gate", "lookahead_2")):
            predicted = arrays[column][rows][:, :-STRIDE]
            for measure, width in (("accuracy", TOP_K), ("recall_2k", 2 * TOP_K)):
                found = (true[..., None] == predicted[..., None, :width]).any(-1).mean()
                assert scores[name][measure] == pytest.approx(found, abs=1e-6)
        assert scores["learned"]["accuracy"] > 0.8
        assert scores["learned"]["accuracy"] > scores["popularity"]["accuracy"] + 0.3
        assert entry.heldout_accuracy[phase] == scores["learned"]["accuracy"]


def test_popularity_counts_training_requests_alone(trained):
    trace, report = trained
    arrays = trace.load(["request", "experts"])
    split = split_requests(
        prompt_digests(trace), dict(enumerate(trace.requests()["domain"])), 0.3, QUICK.seed
    )
    used = arrays["experts"][np.isin(arrays["request"], split.train), STRIDE]
    counts = np.bincount(used.ravel(), minlength=EXPERTS)
    predictor = load(trace.path / report["weights_file"])
    assert predictor.weights.popularity[0].tolist() == counts.tolist()


def test_the_column_is_what_the_kept_weights_predict(trained):
    trace, report = trained
    entry = trace.manifest.predictor_of("learned_2")
    predictor = load(trace.path / entry.weights_file, sha256=entry.weights_sha256)
    arrays = trace.load([GATE_INPUTS, "learned_2"])
    for layer in range(LAYERS - STRIDE):
        ids = predictor.predict(torch.from_numpy(arrays[GATE_INPUTS][:, layer]), layer)
        assert ids.shape == (trace.rows, predictor.width)
        # Kernels for one layer and for all may round differently; near ties may swap.
        assert (ids.numpy() == arrays["learned_2"][:, layer]).mean() > 0.999
    assert (arrays["learned_2"][:, -STRIDE:] == -1).all()
    assert report["parameters_per_layer"] == sum(
        tensor[0].numel()
        for name, tensor in vars(predictor.weights).items()
        if name != "popularity"
    )
    with pytest.raises(ValueError, match="layers 0 to 1 predict"):
        predictor.predict(torch.zeros(1, HIDDEN), 2)


def test_equal_seeds_give_equal_files_apart_from_measured_times(trained, tmp_path):
    first, report = trained
    again = train_predictor(make_learnable(tmp_path / "trace"), QUICK)
    assert (tmp_path / "trace/manifest.json").read_bytes() == (
        first.path / "manifest.json"
    ).read_bytes()
    assert again["weights_sha256"] == report["weights_sha256"]
    other = Options(hidden_units=32, epochs=1, device="cpu", seed=1, weights_only=True)
    other = train_predictor(make_learnable(tmp_path / "other"), other)
    assert other["weights_sha256"] != report["weights_sha256"]


def test_training_in_small_windows_learns_too(trained, tmp_path):
    trace = make_learnable(tmp_path / "trace")
    options = Options(hidden_units=32, epochs=30, device="cpu", memory_bytes=20_000)
    report = train_predictor(trace, options)
    learned = report["accuracy"]["decode"]["mean"]["learned"]["accuracy"]
    assert learned > trained[1]["accuracy"]["decode"]["mean"]["learned"]["accuracy"] - 0.05


def test_layers_that_did_not_run_are_neither_trained_nor_judged(tmp_path):
    trace = make_learnable(tmp_path / "trace", absent=True)
    report = train_predictor(trace, QUICK)
    layers = {p: report["accuracy"][p]["layers"] for p in ("decode", "prefill")}
    assert [layer["layer"] for layer in layers["decode"]] == [2, 3]
    assert [layer["layer"] for layer in layers["prefill"]] == [2]
    assert layers["prefill"][0]["learned"]["accuracy"] > 0.8


@pytest.mark.parametrize(
    ("hidden", "experts", "units"), [(2048, 64, 896), (3584, 64, 512), (192, 64, 768), (8, 8, 64)]
)
def test_default_width_is_two_million_parameters_where_the_model_is_wide(hidden, experts, units):
    assert default_hidden_units(hidden, experts) == units


# What is kept, and other traces


def test_the_report_beside_the_weights_has_the_latency(trained):
    trace, report = trained
    kept = json.loads((trace.path / "predictors/promoe_s2.json").read_text())
    assert kept == report
    times = kept["latency"]["cpu"]
    assert 0 < times["p10_ns"] <= times["median_ns"] <= times["p90_ns"]
    assert "latency" not in (trace.path / "manifest.json").read_text()


def test_another_trace_of_the_model_gets_predictions_and_is_told_what_trained(trained, tmp_path):
    first, report = trained
    weights = first.path / report["weights_file"]
    other = make_learnable(tmp_path / "other", requests=40, output=4, seed=5)
    apply_predictor(other, weights, "cpu")
    entry = Trace.open(other.path).manifest.predictor_of("learned_2")
    assert entry.trained_requests == first.manifest.predictor_of("learned_2").trained_requests
    assert entry.weights_file == "promoe_s2.safetensors"
    assert entry.weights_sha256 == report["weights_sha256"]
    assert entry.heldout_accuracy["decode"] > 0.8


def test_only_prompts_that_trained_leave_nothing_to_judge(trained, tmp_path):
    first, report = trained
    trained_on = first.manifest.predictor_of("learned_2").trained_requests
    assert trained_on[:2] == (0, 1)
    other = make_learnable(tmp_path / "other", requests=2)
    applied = apply_predictor(other, first.path / report["weights_file"], "cpu")
    assert applied["accuracy"]["decode"] == {"mean": None, "layers": []}
    assert Trace.open(other.path).manifest.predictor_of("learned_2").heldout_accuracy == {}


def test_weights_of_another_model_are_refused(trained, tmp_path):
    first, report = trained
    other = make_learnable(tmp_path / "other", requests=3, model="small")
    with pytest.raises(UserError, match=r"a trace of small .* the predictor is of tiny"):
        apply_predictor(other, first.path / report["weights_file"], "cpu")


def test_damaged_weights_are_refused(trained, tmp_path):
    from safetensors.torch import save_file

    first, report = trained
    whole = (first.path / report["weights_file"]).read_bytes()
    path = tmp_path / "w.safetensors"
    with pytest.raises(UserError, match="no such file"):
        load(path)
    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="not readable safetensors"):
        load(path)
    with pytest.raises(UserError, match="SHA-256"):
        load(path, sha256=report["weights_sha256"])
    save_file({"hidden_weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="holds no predictor"):
        load(path)
    path.write_bytes(whole.replace(b'\\"hidden_units\\":32', b'\\"hidden_units\\":33'))
    with pytest.raises(UserError, match="tensors"):
        load(path)


# The commands


def run(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_prints_what_it_did(tmp_path):
    make_learnable(tmp_path / "trace")
    arguments = ("--trace", tmp_path / "trace", "--epochs", 2, "--device", "cpu")
    ran = run("train-predictor", *arguments)
    assert ran.exit_code == 0
    for text in ("decode", "prefill", "next gate", "popularity", "latency", "21 of 30 requests"):
        assert text in ran.stdout
    assert "epoch 2: validation loss" in ran.stderr
    assert "learned_2" in Trace.open(tmp_path / "trace").columns()

    again = run("train-predictor", *arguments)
    assert isinstance(again.exception, UserError)
    assert "is there already and is not replaced" in str(again.exception)

    weights = tmp_path / "beside.safetensors"
    beside = run("train-predictor", *arguments, "--weights-only", "--out", weights, "--json")
    report = json.loads(beside.stdout)
    assert report["appended"] is False
    assert report["weights_file"] == "beside.safetensors"

    make_learnable(tmp_path / "other")
    applied = run("apply-predictor", "--trace", tmp_path / "other", "--weights", weights)
    assert applied.exit_code == 0
    assert "learned_2 added" in applied.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stride", "4"], "--stride 4: this trace's layers allow 1 to 3"),
        (["--kind", "oracle"], "--kind 'oracle' is not known; choose promoe"),
        (["--epochs", "0"], "--epochs 0"),
        (["--hidden-units", "0"], "--hidden-units 0"),
        (["--hidden-units", "1000000000000"], "for the weights alone, and cpu has"),
        (["--seed", "-1"], "--seed -1"),
        (["--test-share", "1"], "--test-share 1"),
        (["--device", "tpu"], "--device 'tpu' is not known"),
        (["--memory", "8"], "has no unit"),
        (["--out", "weights.bin"], "safetensors"),
    ],
)
def test_options_out_of_bounds_end_in_one_line(tmp_path, options, message):
    make_learnable(tmp_path / "trace", requests=3)
    ran = run("train-predictor", "--trace", tmp_path / "trace", "--device", "cpu", *options)
    assert isinstance(ran.exception, UserError)
    assert message in str(ran.exception)
    assert "\n" not in str(ran.exception)


def test_a_trace_without_gate_inputs_says_how_to_record_them(tmp_path):
    make_trace(tmp_path / "trace")
    ran = run("train-predictor", "--trace", tmp_path / "trace", "--stride", 1)
    assert isinstance(ran.exception, UserError)
    assert "moesim trace ... --record hidden" in str(ran.exception)


def test_existing_weights_are_kept(tmp_path):
    make_learnable(tmp_path / "trace", requests=3)
    out = tmp_path / "w.safetensors"
    out.write_bytes(b"precious")
    ran = run("train-predictor", "--trace", tmp_path / "trace", "--out", out)
    assert isinstance(ran.exception, UserError)
    assert "exists already" in str(ran.exception)
    assert out.read_bytes() == b"precious"


def test_a_shipped_sample_stays_as_it_is(trained):
    sample = Trace.open("sample")
    before = sorted(path for path in sample.path.rglob("*"))
    with pytest.raises(UserError, match=r"is a shipped sample .*moesim subset olmoe-twin --out"):
        train_predictor(sample, Options(stride=3))
    assert sorted(path for path in sample.path.rglob("*")) == before


def test_unknown_token_ids_cannot_be_split(tmp_path):
    with TraceWriter(
        tmp_path / "t",
        {"model_id": "tiny", "geometry": make_geometry(), "recording": {"generator": "tests"}},
    ) as writer:
        writer.write_step(
            request=0, row=0, phase=DECODE, position=4, token_id=-1, experts=[[[0, 1]] * 3]
        )
        writer.close([{"request": 0, "prompt_tokens": 4, "output_tokens": 2}])
    with pytest.raises(UserError, match="its token id is unknown"):
        prompt_digests(Trace.open(tmp_path / "t"))
