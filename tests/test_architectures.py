"""The tap on every family of MoE classes: tiny random models, generation against full forwards."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install 'moesim[gpu]'")
transformers = pytest.importorskip("transformers", reason="needs pip install 'moesim[gpu]'")

from configs.errors import UserError  # noqa: E402
from tracer.adapters import find_moe_blocks  # noqa: E402
from tracer.modelinfo import expert_norms, expert_parts, model_geometry  # noqa: E402
from tracer.record import Request, generate_steps  # noqa: E402
from tracer.tap import RoutingTap  # noqa: E402

VOCABULARY = 40
NEW = 5
PROMPTS = [[5, 9, 2, 33, 17, 4, 21], [7, 8, 3], [11, 30, 14, 2, 6], [19]]
DRAWN = [[8, 30, 11, 3, 12], [26, 1, 19, 4, 4], [2, 5, 37, 20, 9], [33, 6, 28, 15, 10]]
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
MLA = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
LOCAL = {"num_local_experts": 8, "num_experts": None}
ROUTED = {"n_routed_experts": 8, "num_experts": None}
GROUPS = {
    **ROUTED,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES = {
    "mixtral": LOCAL,
    "qwen2_moe": {"shared_expert_intermediate_size": 20, "mlp_only_layers": [1]},
    "qwen3_moe": {"norm_topk_prob": True},
    "olmoe": {"num_experts_per_tok": 3},
    "phimoe": LOCAL,
    "deepseek_v2": {
        **MLA,
        **GROUPS,
        "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 1.5,
    },
    "deepseek_v3": {**MLA, **GROUPS},
    "gpt_oss": {
        **LOCAL,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "glm4_moe": GROUPS,
    "granitemoe": LOCAL,
    "llama4_text": {
        **LOCAL,
        "intermediate_size_mlp": 24,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 32,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "num_experts": None,
        "num_experts_per_tok": None,
    },
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "mamba_expand": 1,
        "mamba_dt_rank": 4,
        "use_mamba_kernels": False,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "ffn_config": {
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "ffn_hidden_size": 16,
            "hidden_size": 32,
        },
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
    "longcat_flash": {
        **MLA,
        **ROUTED,
        "ffn_hidden_size": 24,
        "expert_ffn_hidden_size": 16,
        "moe_topk": 3,
        "zero_expert_num": 4,
        "q_lora_rank": 16,
        "num_layers": 2,
        "num_hidden_layers": 4,
    },
}
SIGMOID = {"deepseek_v3", "glm4_moe", "llama4_text"}
CORRECTED = {"deepseek_v3", "glm4_moe", "ernie4_5_moe"}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, which fight with tests beside these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family):
    """A random float32 model whose gates are sharp enough that rounding decides no choice."""
    numbers = {k: v for k, v in {**COMMON, **FAMILIES[family]}.items() if v is not None}
    numbers |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    if family == "dbrx":
        numbers = {k: v for k, v in numbers.items() if k in {*FAMILIES["dbrx"], "vocab_size"}}
    torch.manual_seed(0)
    config = type(transformers.AutoConfig.for_model(family))(**numbers)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 4)
        for block in find_moe_blocks(model):
            for parameter in block.router.parameters():
                if parameter.dim() == 2 and parameter.shape[-1] == 32:
                    parameter.normal_(0, 0.5, generator=generator)
            for parameter in block.experts.parameters():
                parameter.normal_(0, 0.1, generator=generator)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return build(family)


class NoTap:
    """Takes nothing: what a step looks like without a tap."""

    def take(self, rows=None):
        return None


def generate(model, tap, members, logits=None):
    """Steps of a batch of the members' prompts when DRAWN is drawn; fills `logits` as they come."""

    def drawing(index):
        tokens = iter(DRAWN[index])

        def draw(row):
            if logits is not None:
                logits.append(row.clone())
            return next(tokens)

        return draw

    batch = [Request(index, PROMPTS[index], draw=drawing(index)) for index in members]
    return list(generate_steps(model, tap, batch, NEW, frozenset()))


def of_request(steps, index):
    """The request's columns, stitched together, and its token ids."""
    results = [(step, step.capture.result()) for step in steps]
    columns = {
        name: np.concatenate([columns[name][step.request == index] for step, columns in results])
        for name in results[0][1]
    }
    tokens = np.concatenate([step.token_ids[step.request == index] for step in steps])
    positions = np.concatenate([step.position[step.request == index] for step in steps])
    assert positions.tolist() == list(range(len(tokens)))
    return columns, tokens.tolist()


def full_forward(model, tokens):
    """Ids, weights and gate inputs of one forward pass, noted by plain hooks that copy."""
    blocks = find_moe_blocks(model)
    seen = [{} for _ in blocks]
    handles = []
    for block, layer in zip(blocks, seen, strict=True):

        def note_gate(_, args, output, layer=layer):
            layer["input"] = args[0].reshape(-1, args[0].shape[-1]).clone()
            layer["output"] = output

        def note_experts(_, args, layer=layer):
            layer["args"] = [each.clone() for each in args[1:]]

        handles.append(block.router.register_forward_hook(note_gate))
        handles.append(block.experts.register_forward_pre_hook(note_experts))
    with torch.inference_mode():
        model(torch.tensor([tokens]))
    for handle in handles:
        handle.remove()
    pairs = [layer["args"] or routes_of_llama4(layer["output"]) for layer in seen]
    ids, weights = (torch.stack(part, 1).numpy() for part in zip(*pairs, strict=True))
    return ids, weights, torch.stack([layer["input"] for layer in seen], 1).numpy()


def routes_of_llama4(output):
    _, logits = output
    best = logits.topk(COMMON["num_experts_per_tok"])
    return best.indices, best.values.sigmoid()


def without_identity_experts(model, ids, weights):
    """As recorded: experts without weights are null, after the others."""
    count = find_moe_blocks(model)[0].num_experts
    order = np.argsort(ids >= count, axis=-1, kind="stable")
    ids, weights = (np.take_along_axis(each, order, -1) for each in (ids, weights))
    return np.where(ids >= count, -1, ids), np.where(ids >= count, np.nan, weights)


@pytest.mark.parametrize("members", [[0], [0, 1, 2, 3]], ids=["batch 1", "batch 4"])
def test_generation_routes_as_one_full_forward(model, members):
    with RoutingTap(model, ["weights", "gate_norms"]) as tap:
        steps = generate(model, tap, members)
    assert len(steps) == NEW
    for index in members:
        columns, tokens = of_request(steps, index)
        assert tokens == PROMPTS[index] + DRAWN[index][:-1]
        ids, weights, inputs = full_forward(model, tokens)
        ids, weights = without_identity_experts(model, ids, weights)
        assert (columns["experts"] == ids).all()
        np.testing.assert_allclose(columns["weights"], weights, atol=1e-4)
        ran = ids[..., 0] >= 0
        norms = np.linalg.norm(inputs, axis=-1)
        np.testing.assert_allclose(columns["gate_norms"][ran], norms[ran], rtol=1e-3)


def test_outputs_are_unchanged_bit_for_bit(model):
    plain, traced = [], []
    generate(model, NoTap(), range(4), plain)
    columns = ["weights", "gate_probs", "gate_norms", "gate_inputs", "embedding"]
    with RoutingTap(model, columns, timings=True) as tap:
        steps = generate(model, tap, range(4), traced)
    assert len(plain) == len(traced) == NEW * 4
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))
    timings = steps[-1].capture.timings()
    assert (timings.experts_ns > 0).all()
    assert (timings.segment_ns > 0).all()


def test_generate_of_transformers_records_the_same(model):
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    tap = RoutingTap(model)
    with tap.collect() as steps:
        tokens = model.generate(
            torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    assert torch.equal(tokens, expected)
    assert len(steps) == NEW
    ids, weights, _ = full_forward(model, tokens[0, :-1].tolist())
    ids, weights = without_identity_experts(model, ids, weights)
    assert (np.concatenate([step["experts"] for step in steps]) == ids).all()
    recorded = np.concatenate([step["weights"] for step in steps])
    np.testing.assert_allclose(recorded, weights, atol=1e-4)


def test_what_is_kept_by_reference_is_not_written_to_later(model):
    """The tap keeps the layers' tensors until the step's end; copies made at once must agree."""
    tokens = PROMPTS[0]
    with RoutingTap(model, ["weights", "gate_inputs"]) as tap:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
        columns = tap.take().result()
    ids, weights, inputs = full_forward(model, tokens)
    ids, weights = without_identity_experts(model, ids, weights)
    assert (columns["experts"] == ids).all()
    assert np.array_equal(columns["weights"], weights.astype(np.float32), equal_nan=True)
    ran = ids[..., 0] >= 0
    assert (columns["gate_inputs"][ran] == inputs.astype(np.float16)[ran]).all()


def test_gate_probabilities_and_lookahead(model, family):
    """Distance d from layer l is what layer l + d would choose of this input, best first."""
    with RoutingTap(model, ["gate_probs"], lookahead=1) as tap:
        with torch.inference_mode():
            model(torch.tensor([PROMPTS[0]]))
        columns = tap.take().result()
    assert tap.score == ("sigmoid" if family in SIGMOID else "softmax")
    if family != "longcat_flash":
        np.testing.assert_allclose(columns["gate_probs"].sum(-1), 1, atol=1e-5)
    if family not in CORRECTED | {"deepseek_v2", "longcat_flash"}:
        k = columns["experts"].shape[-1]
        best = np.argsort(-columns["gate_probs"], axis=-1, kind="stable")[..., :k]
        assert (np.sort(best) == np.sort(columns["experts"])).all()
    predicted = columns["lookahead_1"]
    assert (predicted[:, -1] == -1).all()
    _, _, inputs = full_forward(model, PROMPTS[0])
    blocks = find_moe_blocks(model)
    assert len(blocks) > 1
    for layer, later in enumerate(blocks[1:]):
        chosen = chosen_by(model, later, torch.from_numpy(inputs[:, layer]))
        k = chosen.shape[-1]
        for own, ids in zip(predicted[:, layer], chosen, strict=True):
            real = {int(each) for each in ids if each < later.num_experts}
            assert set(own[: len(real)].tolist()) == real
            assert len(set(own.tolist())) == min(2 * k, later.num_experts)


def chosen_by(model, block, gate_input):
    """Ids that the gate of `block` chooses on an input, by running its block on it."""
    seen = []
    handles = [
        block.experts.register_forward_pre_hook(lambda _, args: seen.append(args[1:])),
        block.router.register_forward_hook(lambda _, args, output: seen.append(output)),
    ]
    with torch.inference_mode():
        block.block(gate_input[None])
    for handle in handles:
        handle.remove()
    output, args = seen
    return args[0] if args else routes_of_llama4(output)[0]


def test_geometry_counts_every_byte(model, family):
    geometry = model_geometry(model, family)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert geometry.model_bytes == total
    assert geometry.num_experts == 8
    assert sum(part["bytes"] for part in expert_parts(model)) == geometry.expert_bytes_by_layer[0]
    norms = np.array(expert_norms(model))
    assert norms.shape == (geometry.num_moe_layers, 8)
    assert (norms > 0).all()


def encoder_decoder(family, **changes):
    torch.manual_seed(0)
    numbers = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 24, "d_kv": 8, "num_heads": 4}
    numbers |= {"num_experts": 8, "router_dtype": "float32", **changes}
    config = type(transformers.AutoConfig.for_model(family))(**numbers)
    return transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()


def test_switch_is_tapped_stack_by_stack():
    model = encoder_decoder(
        "switch_transformers",
        num_layers=4,
        num_sparse_encoder_layers=2,
        num_decoder_layers=4,
        num_sparse_decoder_layers=2,
        expert_capacity=2,
    )
    with pytest.raises(UserError, match="more than one stack"):
        RoutingTap(model)
    tokens = torch.tensor([PROMPTS[0]])
    with RoutingTap(model.encoder, ["weights", "gate_probs"]) as tap:
        with torch.inference_mode():
            model.encoder(tokens)
        columns = tap.take().result()
    experts, probs = columns["experts"], columns["gate_probs"]
    assert experts.shape == (len(PROMPTS[0]), 2, 1)
    ran = experts[..., 0] >= 0
    assert (experts[..., 0] == probs.argmax(-1))[ran].all()
    np.testing.assert_allclose(columns["weights"][ran][:, 0], probs.max(-1)[ran], atol=1e-6)
    # Releases before 5.23 ignore the capacity.
    if not ran.all():
        for layer in range(2):
            assert np.bincount(experts[ran[:, layer], layer, 0]).max() <= 2
    assert np.isnan(columns["weights"][~ran]).all()


def test_nllb_is_routed_as_its_router_says():
    """Stock transformers 5 runs experts 0 and 1 for every token; under the tap, those meant."""
    model = encoder_decoder(
        "nllb-moe",
        encoder_layers=2,
        decoder_layers=2,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        expert_capacity=16,
        max_position_embeddings=64,
        second_expert_policy="all",
    )
    blocks = find_moe_blocks(model.model.encoder)
    combines = []
    handles = [
        block.router.register_forward_hook(lambda _, __, output: combines.append(output[1]))
        for block in blocks
    ]
    with RoutingTap(model.model.encoder) as tap:
        with torch.inference_mode():
            model.model.encoder(torch.tensor([PROMPTS[0]]))
        columns = tap.take().result()
    for handle in handles:
        handle.remove()
    combine = torch.stack(combines, 1).numpy()
    at_ids = np.take_along_axis(combine, columns["experts"].astype(int), -1)
    assert (columns["weights"] == at_ids).all()
    np.testing.assert_allclose(at_ids.sum(-1), combine.sum(-1), rtol=1e-6)


def test_jetmoe_is_refused_by_name():
    config = transformers.JetMoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=1,
        num_key_value_heads=2,
        kv_channels=8,
        intermediate_size=16,
        num_local_experts=4,
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UserError, match="JetMoeForCausalLM is not covered"):
        RoutingTap(model)


def test_experts_of_an_unknown_class_are_refused_by_name():
    class SomeExperts(torch.nn.Module):
        def forward(self, hidden):
            return hidden

    block = torch.nn.Module()
    block.experts, block.gate = SomeExperts(), torch.nn.Linear(4, 4)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([block])
    with pytest.raises(UserError, match=r"layers\.0: SomeExperts of Module is not covered"):
        RoutingTap(model)
