"""The recorder on tiny random models, and on the sample's model where it is at hand."""

import json
from functools import partial

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'moesim[gpu]'")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

from configs.errors import UserError  # noqa: E402
from configs.geometry import list_models, load_model_config  # noqa: E402
from tracer.modelinfo import expert_norms, expert_parts, model_geometry  # noqa: E402
from tracer.record import RECORDABLE, Sampling, generate_steps, load_model, main, record  # noqa: E402
from tracer.tap import RoutingTap  # noqa: E402
from tracer.trace import DECODE, PREFILL, Trace  # noqa: E402

VOCABULARY = 40
END = 0
PROMPT = [5, 9, 2, 33, 17, 4, 21]
DRAWN = [8, 30, 11, 3, 11, 26, 1, 19]
FORWARD = PROMPT + DRAWN[:-1]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": None,
}
CONFIGS = {
    "olmoe": {
        "num_hidden_layers": 4,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "qwen2_moe": {
        "num_hidden_layers": 5,
        "intermediate_size": 24,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 20,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1, 4],
        "tie_word_embeddings": False,
    },
}
PROMPTS = [{"domain": "code", "text": "t5 t9 t2"}, {"domain": "prose", "text": "t7 t8 t1 t30"}]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which fight with tests beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family, **changes):
    """A random float32 model whose gates are sharp enough that rounding decides no choice."""
    torch.manual_seed(0)
    defaults = type(transformers.AutoConfig.for_model(family))
    config = defaults(**{**COMMON, **CONFIGS.get(family, {}), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(50)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return build(request.param)


@pytest.fixture
def model_dir(tmp_path):
    path = tmp_path / "tiny-olmoe"
    build("olmoe").save_pretrained(path)
    words = {f"t{i}": i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def replay(model, tap, drawn=DRAWN, logits=None):
    """Steps of PROMPT when `drawn` is drawn; `logits` collects those that the model gave."""
    tokens = iter(drawn)

    def next_token(row):
        if logits is not None:
            logits.append(row.clone())
        return next(tokens)

    return list(generate_steps(model, tap, PROMPT, len(drawn), next_token))


def stitched(steps):
    return {
        name: np.concatenate([step.columns[name] for step in steps]) for name in steps[0].columns
    }


def plain_logits(model):
    """Logits of PROMPT and DRAWN from the model alone, with a KV cache."""
    cache, feed, logits = None, PROMPT, []
    with torch.inference_mode():
        for drawn in DRAWN:
            tokens = torch.tensor([feed])
            output = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits.append(output.logits[0, -1])
            cache, feed = output.past_key_values, [drawn]
    return logits


def gate_calls(model):
    """Gates of the model, their inputs and outputs in one full forward, without the tap."""
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    calls = []
    hooks = [
        gate.register_forward_hook(lambda _, args, out: calls.append((args[0], out)))
        for gate in gates
    ]
    with torch.inference_mode():
        model(torch.tensor([FORWARD]))
    for hook in hooks:
        hook.remove()
    return gates, calls


def test_ids_of_prefill_and_decode_equal_those_of_one_full_forward(model):
    with RoutingTap(model, ["weights", "gate_probs"], 0) as tap:
        recorded = stitched(replay(model, tap))
    _, calls = gate_calls(model)
    logits, weights, ids = (
        torch.stack(part, 1) for part in zip(*(c[1] for c in calls), strict=True)
    )
    assert (recorded["experts"] == ids.numpy()).all()
    np.testing.assert_allclose(recorded["weights"], weights, atol=1e-5)
    np.testing.assert_allclose(recorded["gate_probs"], logits.softmax(-1), atol=1e-5)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm", "eager"])
def test_logits_are_bit_equal_with_and_without_the_tap(model, kernel):
    usual = model.config._experts_implementation
    model.set_experts_implementation(kernel)
    expected, logits = plain_logits(model), []
    with RoutingTap(model, RECORDABLE, 3) as tap:
        replay(model, tap, logits=logits)
        assert tap.kernel_name == kernel
    assert model.config._experts_implementation == kernel
    assert all(torch.equal(a, b) for a, b in zip(expected, logits, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(expected, plain_logits(model), strict=True))
    model.set_experts_implementation(usual)


def test_a_tap_leaves_nothing_behind(model):
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    with RoutingTap(model, [], 1):
        pass
    assert {name: set(vars(module)) for name, module in model.named_modules()} == before
    assert not any(module._forward_hooks for module in model.modules())


def test_ids_are_those_that_ran_and_not_the_logits_best(model):
    gates = [m for name, m in model.named_modules() if name.endswith("mlp.gate")]
    k = model.config.num_experts_per_tok

    def choose_the_worst(_, __, output):
        logits, weights, _ = output
        return logits, weights, logits.argsort(-1)[:, :k]

    hooks = [gate.register_forward_hook(choose_the_worst) for gate in gates]
    with RoutingTap(model, ["gate_probs"], 0) as tap:
        recorded = stitched(replay(model, tap))
    for hook in hooks:
        hook.remove()
    worst = recorded["gate_probs"].argsort(-1)[..., :k]
    assert (np.sort(recorded["experts"]) == np.sort(worst)).all()


def test_lookahead_is_the_later_gate_on_the_earlier_gates_input(model):
    with RoutingTap(model, [], 3) as tap:
        recorded = stitched(replay(model, tap))
    gates, calls = gate_calls(model)
    layers, width = len(gates), 2 * model.config.num_experts_per_tok
    assert layers >= 3
    for distance in (1, 2, 3):
        column = recorded[f"lookahead_{distance}"]
        assert column.shape == (len(FORWARD), layers, width)
        assert (column[:, max(layers - distance, 0) :] == -1).all()
        for layer in range(layers - distance):
            logits = calls[layer][0] @ gates[layer + distance].weight.detach().T
            best = logits.topk(width).indices.numpy()
            assert (column[:, layer] == best).all()


def test_gate_inputs_norms_and_embeddings(model):
    with RoutingTap(model, RECORDABLE, 0) as tap:
        recorded = stitched(replay(model, tap))
    _, calls = gate_calls(model)
    inputs = torch.stack([call[0] for call in calls], 1)
    np.testing.assert_allclose(recorded["gate_inputs"], inputs, atol=1e-5)
    np.testing.assert_allclose(recorded["gate_norms"], inputs.norm(dim=-1), rtol=1e-5)
    table = model.get_input_embeddings().weight.detach()
    assert (recorded["embedding"] == table[FORWARD].numpy()).all()


def test_a_drawn_end_token_ends_the_request(model):
    with RoutingTap(model, [], 0) as tap:
        steps = replay(model, tap, drawn=[3, 4, END, 7, 7])
    assert [step.token_ids for step in steps] == [PROMPT, [3], [4]]
    assert [step.position for step in steps] == [0, len(PROMPT), len(PROMPT) + 1]


def test_geometry_counts_every_byte_once(model):
    geometry = model_geometry(model, "tiny")
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert geometry.model_bytes == total
    table = model.get_input_embeddings().weight
    unread = 0 if model.config.tie_word_embeddings else table.numel() * table.element_size()
    read = sum(geometry.segment_bytes_by_layer) + geometry.head_bytes
    assert read == geometry.nonexpert_bytes - unread
    head_dim = 32 // 4
    assert geometry.kv_bytes_per_token == 2 * 2 * head_dim * 4 * model.config.num_hidden_layers
    assert sum(part["bytes"] for part in expert_parts(model)) == geometry.expert_bytes_by_layer[0]
    assert [part["name"] for part in expert_parts(model)] == ["gate_proj", "up_proj", "down_proj"]


def test_dense_layers_belong_to_the_next_gates_segment():
    geometry = model_geometry(build("qwen2_moe"), "tiny")
    assert geometry.model_layer_ids == (0, 2, 3)
    assert geometry.shared_experts == "before_gate"
    attention_and_norms = 4 * (2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 2 * 32)
    gate_and_shared = 4 * (6 * 32 + 3 * 32 * 20 + 32)
    dense = attention_and_norms + 4 * 3 * 32 * 24
    moe = attention_and_norms + gate_and_shared
    assert geometry.segment_bytes_by_layer == (moe, dense + moe, moe)
    assert geometry.head_bytes == dense + 4 * (32 + VOCABULARY * 32)


def test_expert_norms_are_taken_over_all_of_an_experts_tensors(model):
    norms = expert_norms(model)
    experts = next(m for name, m in model.named_modules() if name.endswith("mlp.experts"))
    flat = torch.cat([p[3].detach().flatten() for p in experts.parameters()])
    assert norms[0][3] == pytest.approx(float(flat.norm()), rel=1e-5)
    assert {len(layer) for layer in norms} == {model.config.num_experts}


@pytest.mark.parametrize("name", list_models())
def test_published_models_counted_from_their_modules_are_as_computed_from_their_numbers(name):
    published = load_model_config(name)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            _transformers_config(published), dtype=torch.bfloat16
        ).eval()
    expected = published.geometry("bf16").model_copy(update={"revision": ""})
    assert model_geometry(model, name) == expected


def test_a_trace_from_end_to_end(model_dir, tmp_path):
    record(model_dir, PROMPTS, tmp_path / "out", max_new_tokens=6, columns=RECORDABLE)
    trace = Trace.open(tmp_path / "out")
    assert trace.manifest.model_id == "tiny-olmoe"
    assert trace.manifest.recording.sampling["experts_kernel"] == "grouped_mm"
    assert trace.manifest.complete
    rows = trace.load(trace.columns())
    requests = trace.requests()
    assert requests["prompt_tokens"].tolist() == [3, 4]
    for entry in requests.itertuples():
        own = rows["request"] == entry.request
        assert rows["phase"][own].tolist() == [PREFILL] * entry.prompt_tokens + [DECODE] * (
            entry.output_tokens - 1
        )
        assert rows["position"][own].tolist() == list(range(own.sum()))
    assert rows["token_id"][rows["phase"] == PREFILL].tolist() == [5, 9, 2, 7, 8, 1, 30]
    table = load_model(model_dir)[0].get_input_embeddings().weight.detach().numpy()
    assert (rows["embedding"] == table[rows["token_id"]].astype(np.float16)).all()


def test_recording_again_gives_the_same_bytes(model_dir, tmp_path):
    for out in ("a", "b"):
        record(model_dir, PROMPTS, tmp_path / out, max_new_tokens=6, seed=3)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*.*"))
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_each_request_samples_with_a_seed_of_its_own(model_dir, tmp_path):
    record(model_dir, PROMPTS, tmp_path / "both", max_new_tokens=6)
    record(model_dir, PROMPTS[:1], tmp_path / "first", max_new_tokens=6)
    record(model_dir, PROMPTS[1:], tmp_path / "second", max_new_tokens=6, seed=1)
    both, first, second = (
        Trace.open(tmp_path / out).load(["token_id", "experts"])
        for out in ("both", "first", "second")
    )
    assert len(first["token_id"]) > 3
    assert len(second["token_id"]) > 4
    for name, values in both.items():
        assert (values == np.concatenate([first[name], second[name]])).all()


def test_draws_stay_in_the_nucleus_and_follow_the_probabilities():
    logits = torch.log(torch.tensor([0.05, 0.5, 0.05, 0.3, 0.1]))
    generator = torch.Generator().manual_seed(0)
    draw = partial(Sampling(temperature=1.0, top_p=0.75).draw, logits, generator)
    drawn = np.bincount([draw() for _ in range(2000)], minlength=5) / 2000
    assert drawn[[0, 2, 4]].sum() == 0
    assert drawn[1] == pytest.approx(0.5 / 0.8, abs=0.04)  # four standard errors
    assert Sampling(temperature=0.0).draw(logits, generator) == 1
    assert Sampling(top_p=0.01).draw(logits, generator) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens 0"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"columns": ["gate_prob"]}, "'gate_prob': choose of weights"),
        ({"lookahead": 10}, "lookahead 10"),
        ({"max_new_tokens": 62}, "prompt 1: 3 tokens and 62 new ones exceed .* 64"),
        ({"prompts": []}, "no prompts"),
        ({"prompts": [{"domain": "code", "text": " "}]}, "prompt 1 has no tokens"),
        ({"model_dir": "nowhere"}, "nowhere: no model lies here"),
    ],
)
def test_wrong_values_are_named_and_write_nothing(model_dir, tmp_path, options, message):
    out = tmp_path / "out"
    arguments = {"model_dir": model_dir, "prompts": PROMPTS, "out": out, "max_new_tokens": 2}
    with pytest.raises(UserError, match=message):
        record(**arguments | options)
    assert not out.exists()


def test_a_directory_with_something_in_it_is_left_alone(model_dir, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    arguments = [str(model_dir), str(prompts), str(tmp_path / "out"), "--max-new-tokens", "2"]
    assert main(arguments) == 0
    digest = Trace.open(tmp_path / "out").digest
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{tmp_path / 'out'}: exists and is not empty" in captured.err
    assert Trace.open(tmp_path / "out").digest == digest


def test_a_model_without_experts_is_refused():
    model = build("llama", num_hidden_layers=1, intermediate_size=16)
    with pytest.raises(UserError, match="LlamaForCausalLM has no MoE layers"):
        RoutingTap(model, [], 0)


def test_lookahead_is_refused_where_logits_do_not_tell_the_choice():
    corrected = build(
        "glm4_moe",
        num_hidden_layers=2,
        first_k_dense_replace=1,
        intermediate_size=16,
        moe_intermediate_size=8,
        n_routed_experts=6,
        num_experts_per_tok=2,
        head_dim=8,
    )
    with pytest.raises(UserError, match="corrected score"):
        RoutingTap(corrected, [], 1)
    with RoutingTap(corrected, ["weights"], 0) as tap:
        recorded = stitched(replay(corrected, tap))
    assert recorded["experts"].shape == (len(FORWARD), 1, 2)


def test_the_samples_model_routes_and_draws_as_shipped(shared):
    """Fed the sample's own tokens: all the same where the CPU's kernels are.

    Other kernels round bf16 otherwise, and near ties at a gate or in a draw go the other way: 0.7 %
    of the experts and 4 % of the draws with PyTorch's unvectorised ones.
    """
    sample = Trace.open("sample")
    rows = sample.load(["request", "phase", "token_id", "experts"])
    own = rows["request"] == 0
    tokens = rows["token_id"][own].tolist()
    length = int((rows["phase"][own] == PREFILL).sum())
    sampling = sample.manifest.recording.sampling
    draw = partial(
        Sampling(sampling["max_new_tokens"], sampling["temperature"], sampling["top_p"]).draw,
        generator=torch.Generator().manual_seed(sample.manifest.recording.seed),
    )
    drawn, following = [], iter([*tokens[length:], END])

    def next_token(logits):
        drawn.append(draw(logits))
        return next(following)

    model, tokenizer = load_model(shared / "models" / "olmoe-twin")
    with RoutingTap(model, [], 0) as tap:
        steps = list(
            generate_steps(model, tap, tokens[:length], sampling["max_new_tokens"], next_token)
        )
    prompt = (sample.path.parent / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[0]
    assert tokenizer(json.loads(prompt)["text"]).input_ids == tokens[:length]
    experts = stitched(steps)["experts"]
    same = (experts[..., :, None] == rows["experts"][own][..., None, :]).any(-1)
    assert same.mean() >= 0.98
    assert np.mean(np.array(drawn[:-1]) == tokens[length:]) >= 0.9


def _transformers_config(published):
    """The public numbers under the names that each family's configuration class knows."""
    numbers = published.config.model_dump()
    family = numbers["model_type"]
    if family in ("mixtral", "phimoe", "gpt_oss"):
        numbers["num_local_experts"] = numbers.pop("num_experts")
    if family == "deepseek_v2":
        numbers["n_routed_experts"] = numbers.pop("num_experts")
    numbers["mlp_only_layers"] = list(numbers["mlp_only_layers"])
    optional = {name for name, value in numbers.items() if value is None} - {"q_lora_rank"}
    known = {name: value for name, value in numbers.items() if name not in optional}
    return type(transformers.AutoConfig.for_model(family))(**known)
