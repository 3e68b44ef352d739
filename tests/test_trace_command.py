"""`moesim trace` as a user meets it: what it writes, what it refuses, and how it ends."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'moesim[gpu]'")

from tests.tiny_models import build, save  # noqa: E402
from tracer.trace import DECODE, Trace  # noqa: E402

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which fight with tests beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save(build("olmoe"), tmp_path_factory.mktemp("models") / "tiny-olmoe")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    entries = [{"domain": "code", "text": "t5 t9 t2"}, {"text": "t7 t8 t1 t30"}, {"text": "t3"}]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def refusal(moesim, *arguments):
    """The one line of a refusal."""
    status, out, err = moesim("trace", *arguments)
    assert status == 2
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("moesim: error: ")]
    assert len(lines) == 1
    assert err.splitlines()[-1] == lines[0]
    return lines[0]


def test_a_trace_of_all_columns(moesim, model_dir, prompts, tmp_path):
    out = tmp_path / "out"
    status, said, _ = moesim(
        *("trace", "--model", model_dir, "--prompts", prompts, "--out", out, "--device", "cpu"),
        *("--max-new-tokens", 6, "--batch-size", 2, "--sample", "0.8,0.95,4", "--record", "all"),
        *("--domain", "prose", "--ignore-eos"),
    )
    assert status == 0
    trace = Trace.open(out)
    assert said == f"{out}: 3 of 3 requests, {trace.rows} tokens\n"
    assert trace.rows == 3 + 4 + 1 + 3 * 5
    assert {"weights", "gate_probs", "gate_norms", "embedding", "gate_inputs"} < set(
        trace.columns()
    )
    assert {"lookahead_1", "lookahead_2", "lookahead_3"} < set(trace.columns())
    assert trace.requests()["domain"].tolist() == ["code", "prose", "prose"]
    assert len(trace.timings()) == 4 * 2 * 6
    recording = trace.manifest.recording
    assert (recording.seed, recording.sampling["temperature"]) == (4, 0.8)
    assert recording.sampling["batch_size"] == 2
    assert trace.manifest.prompts.name == "prompts"
    status, _, err = moesim("inspect", out)
    assert status == 0, err


def test_ids_and_weights_alone_unless_more_is_asked_for(moesim, model_dir, prompts, tmp_path):
    out = tmp_path / "out"
    options = ("--max-new-tokens", 3, "--limit", 1, "--device", "cpu", "--dtype", "bf16")
    assert (
        moesim("trace", "--model", model_dir, "--prompts", prompts, "--out", out, *options)[0] == 0
    )
    trace = Trace.open(out)
    assert set(trace.columns()) == {
        *("request", "step", "row", "phase", "position", "token_id", "experts", "weights")
    }
    assert len(trace.requests()) == 1
    assert trace.manifest.geometry.expert_dtype == "bf16"
    assert trace.manifest.recording.sampling["temperature"] == 0


def test_a_text_from_stdin(moesim, model_dir, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"t5 t9\nt7\n")))
    options = ("--max-new-tokens", 2, "--device", "cpu", "--lines")
    assert moesim("trace", "--model", model_dir, "--text-stdin", "--out", out, *options)[0] == 0
    assert Trace.open(out).requests()["prompt_tokens"].tolist() == [2, 1]
    assert Trace.open(out).manifest.prompts.name == "stdin"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--record", "logits"], "--record 'logits': choose of probs, norms, embedding, hidden"),
        (["--record", "lookahead"], "--record 'lookahead': choose of"),
        (["--record", "lookahead=12"], "lookahead 12: give 0 to 9 layers"),
        (["--sample", "hot"], "--sample 'hot': give temperature,top_p,seed"),
        (["--sample", "1,1,1,1"], "--sample '1,1,1,1': give temperature,top_p,seed"),
        (["--sample", "0.8,2"], "top_p 2.0"),
        (["--text-stdin"], "give --prompts FILE or --text-stdin, one of them"),
        (["--device", "tpu"], "device 'tpu': choose of auto, cpu, cuda"),
        (["--max-new-tokens", "64"], "exceed the model's context of 64"),
        (["--batch-size", "0"], "batch_size 0: give 1 or more"),
        (["--limit", "0"], "limit 0: give 1 or more"),
        (["--record", "lookahead=\u00b2"], "--record 'lookahead=\u00b2': choose of"),
        (["--field", ""], "--field is empty"),
    ],
)
def test_options_that_do_not_fit(moesim, model_dir, prompts, tmp_path, options, message):
    out = tmp_path / "out"
    given = ("--model", model_dir, "--prompts", prompts, "--out", out, "--max-new-tokens", "2")
    assert message in refusal(moesim, *given, *options)
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu(moesim, model_dir, prompts, tmp_path):
    given = ("--model", model_dir, "--prompts", prompts, "--out", tmp_path / "out")
    assert "PyTorch sees no GPU here; use --device cpu" in refusal(
        moesim, *given, "--device", "cuda"
    )


def test_an_output_that_exists_is_left_alone(moesim, model_dir, prompts, tmp_path):
    (tmp_path / "notes").write_text("mine")
    line = refusal(moesim, "--model", model_dir, "--prompts", prompts, "--out", tmp_path)
    assert "exists and is not empty" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "prompts.jsonl"]


def test_models_that_cannot_be_recorded(moesim, model_dir, prompts, tmp_path, monkeypatch):
    def asked(model):
        out = tmp_path / "out"
        given = ("--model", model, "--prompts", prompts, "--out", out, "--max-new-tokens", 2)
        line = refusal(moesim, *given)
        assert not out.exists()
        return line

    def configured(name, config):
        """A directory with a configuration and a tokenizer, and no weights: none are needed."""
        config.save_pretrained(tmp_path / name)
        transformers.AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / name)
        return tmp_path / name

    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1}
    dense = configured("dense", transformers.LlamaConfig(**small, intermediate_size=16))
    assert "LlamaForCausalLM has no MoE layers" in asked(dense)
    jetmoe = transformers.JetMoeConfig(**small, num_key_value_heads=2, kv_channels=8)
    assert "JetMoeForCausalLM is not covered" in asked(configured("jetmoe", jetmoe))
    switch = transformers.SwitchTransformersConfig(num_layers=1, num_decoder_layers=1)
    assert "an encoder-decoder model" in asked(configured("switch", switch))
    assert "nowhere: no model lies here" in asked(tmp_path / "nowhere")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    assert "it has no tokenizer; put tokenizer.json" in asked(tmp_path / "bare")
    tokenizer_only = configured("empty", build("olmoe").config)
    assert "its weights cannot be loaded" in asked(tokenizer_only)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = asked("someone/a-model")
    assert "someone/a-model: neither a local directory nor" in line
    assert "hf download someone/a-model --local-dir DIR" in line


def test_a_full_disk(moesim, model_dir, prompts, tmp_path, monkeypatch):
    def full(path, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("tracer.shards.write_atomically", full)
    given = ("--model", model_dir, "--prompts", prompts, "--out", tmp_path / "out")
    line = refusal(moesim, *given, "--device", "cpu", "--max-new-tokens", 2)
    assert "part-00000.parquet: No space left on device" in line


@pytest.fixture(scope="module")
def long_runs(model_dir, tmp_path_factory):
    """Two recordings in processes of their own that would take minutes; (process, directory)."""
    directory = tmp_path_factory.mktemp("runs")
    save(build("olmoe", max_position_embeddings=100_000), directory / "model")
    (directory / "p.jsonl").write_text('{"text": "t5 t9 t2", "domain": "code"}\n{"text": "t7"}\n')
    runs = []
    for name in ("killed", "interrupted"):
        arguments = [
            *("trace", "--model", directory / "model", "--prompts", directory / "p.jsonl"),
            *("--out", directory / name, "--device", "cpu", "--max-new-tokens", 90_000),
            *("--ignore-eos", "--shard-rows", 20, "--batch-size", 2, "--record", "timings"),
        ]
        process = subprocess.Popen(
            [sys.executable, "-m", "cli", *map(str, arguments)],
            cwd=PROJECT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        runs.append((process, directory / name))
    yield dict(zip(("killed", "interrupted"), runs, strict=True))
    for process, _ in runs:
        process.kill()
        process.communicate()


def wait_for_shards(process, out, count):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        if len(list(out.glob("tokens/part-*.parquet"))) > count:
            return
        time.sleep(0.1)
    pytest.fail(f"{out}: no {count} shards in time")


def test_kill_9_leaves_whole_shards(long_runs):
    process, out = long_runs["killed"]
    wait_for_shards(process, out, 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    trace = Trace.open(out)
    assert "not complete: the recording broke off" in trace.notes[0]
    assert trace.rows >= 3 * 20
    rows = trace.load(trace.columns())
    assert rows["request"][rows["phase"] == DECODE].tolist()[:4] == [0, 1, 0, 1]
    assert set(trace.timings()["step"]) == set(rows["step"].tolist())


def test_ctrl_c_keeps_a_valid_trace(long_runs):
    process, out = long_runs["interrupted"]
    wait_for_shards(process, out, 3)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "moesim: interrupted: what was recorded is kept" in err
    trace = Trace.open(out)
    assert trace.manifest.complete
    assert said == f"{out}: 0 of 2 requests, {trace.rows} tokens\n"
    requests = trace.requests()
    assert requests["domain"].tolist()[0] == "code"
    assert (requests["prompt_tokens"] + requests["output_tokens"] - 1).sum() == trace.rows


def test_without_torch_the_install_command_is_named(model_dir, prompts, tmp_path):
    program = (
        "import importlib.util as u, sys; found = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'torch' else found(name, *a);"
        "import cli; cli.main()"
    )
    arguments = ["trace", "--model", model_dir, "--prompts", prompts, "--out", tmp_path / "out"]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=PROJECT,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'moesim[gpu]'" in done.stderr
    assert done.stderr.count("\n") == 1
