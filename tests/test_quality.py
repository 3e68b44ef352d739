"""What lossy policies do to a real model: the twins, small, and the parts by themselves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from cli import app  # noqa: E402
from configs.errors import UserError  # noqa: E402
from policies.errors import BudgetTooSmall  # noqa: E402
from replay.front import draw_front  # noqa: E402
from replay.lossy import LossyModel, LossyRun  # noqa: E402
from replay.low_bits import low_bit_parameters, rounded  # noqa: E402
from replay.quality import Job, Recording, Scores, _choose, check_gates, measure  # noqa: E402
from tests.driver import table  # noqa: E402
from tests.tiny_models import build, save  # noqa: E402
from tracer.load_model import Loaded, load_model  # noqa: E402
from tracer.modelinfo import model_geometry  # noqa: E402
from tracer.prompts import Prompt, read_prompts  # noqa: E402
from tracer.tap import RoutingTap  # noqa: E402
from tracer.trace import Trace  # noqa: E402

TWINS = pytest.mark.parametrize("twin", ["olmoe-twin", "qwen2moe-twin"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums in one order; two cores are shared by the whole suite."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def texts(shared: Path) -> list[Prompt]:
    """A document of every kind, and then some."""
    return read_prompts(shared / "prompts" / "heldout_text.jsonl")[::25]


def load(shared: Path, twin: str, dtype: str = "fp32") -> Loaded:
    return load_model(shared / "models" / twin, "cpu", dtype)


def quality(loaded: Loaded, texts: list[Prompt], policy: str, *budgets: str, **given: Any) -> Any:
    sizes = {"max_tokens": 64, "context": 32, "chunk": 16}
    sizes |= {name: given.pop(name) for name in list(given) if name in sizes}
    job = Job(policy, given, [(None, each) for each in budgets], **sizes)
    return measure(loaded, texts, job, lambda _: None)


# ---------------------------------------------------------------------- the twins


@TWINS
def test_with_all_experts_the_model_is_as_it_was_and_with_fewer_it_is_worse(twin, shared, texts):
    # In the checkpoint's own bf16, where a detour would show.
    result = quality(load(shared, twin, "auto"), texts, "swapmoe", "100%", "50%", "20%")
    whole, half, fifth = result["budgets"]
    own = result["unmodified"]["perplexity"]
    assert whole["perplexity"] == own
    assert (whole["next_token_agreement"], whole["kl_nats"]) == (1, 0)
    assert (whole["changed_share"], whole["retained_mass_share"], whole["copies"]) == (0, 1, 0)
    assert 0 < half["kl_nats"] < fifth["kl_nats"]
    assert own < fifth["perplexity"]
    assert 1 > half["retained_mass_share"] > fifth["retained_mass_share"] > 0
    assert 0 < half["changed_share"] < fifth["changed_share"]
    assert fifth["peak_bytes"] < half["peak_bytes"] < result["unmodified"]["peak_bytes"]
    # The first token of a piece is given.
    assert result["tokens"] == 64 - result["pieces"]["judged"]


def test_the_unmodified_perplexity_is_that_of_plain_transformers(shared, texts):
    loaded = load(shared, "olmoe-twin")
    job = Job("swapmoe", {}, [(None, "100%")], max_tokens=64, context=32, chunk=7)
    result = measure(loaded, texts, job, lambda _: None)
    tokens = [loaded.tokenize(text, 0)[:32] for text in texts]
    judged, _ = _choose([piece for piece in tokens if len(piece) > 1], job)
    model = loaded.weights()
    nll = count = 0.0
    for piece in judged:
        ids = torch.tensor([piece])
        with torch.inference_mode():
            nll += float(model(ids, labels=ids).loss) * (len(piece) - 1)
        count += len(piece) - 1
    assert count == result["tokens"]
    assert result["unmodified"]["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)


class FixedRun(LossyRun):
    """Masks the odd experts, whatever the policy; counts what it was asked."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.asked = 0

    def event(self, layer: int, columns: dict[str, Any]) -> Any:
        from policies.swapmoe import masked_top_k, masked_weights
        from replay.lossy import Routed

        self.asked += 1
        probs = columns["gate_probs"].astype(np.float64)
        even = np.arange(probs.shape[1]) % 2 == 0
        experts, weights = columns["experts"], columns["weights"]
        ids = masked_top_k(experts, probs, even)
        instead = masked_weights(experts, weights, ids, probs, even, self.how)
        return Routed(ids, instead, np.zeros(ids.shape, bool), changed=True)


@TWINS
def test_masked_routing_is_the_model_with_other_logits_at_minus_infinity(twin, shared):
    """Written down a second time: logits of the odd experts are -inf before the softmax."""
    loaded = load(shared, twin)
    model = loaded.weights()
    ids = torch.arange(24)[None] * 131 % 8000
    tap = RoutingTap(model, ("weights", "gate_probs", "gate_norms"))
    normalises = bool(model.config.norm_topk_prob)
    run = FixedRun("sum" if normalises else "masked")
    with LossyModel(model, tap.gate) as lossy, lossy.listening_to(run), torch.inference_mode():
        got = model(ids).logits
    assert run.asked == len(lossy.blocks)
    other = deepcopy(model)
    for block in LossyModel(other, tap.gate).blocks:
        router = block.router

        def forward(hidden: Any, router: Any = router) -> Any:
            hidden = hidden.reshape(-1, hidden.shape[-1])
            logits = torch.nn.functional.linear(hidden, router.weight)
            logits[:, 1::2] = -torch.inf
            weights, chosen = logits.float().softmax(-1).topk(router.top_k, dim=-1)
            if normalises:
                weights = weights / weights.sum(-1, keepdim=True)
            return logits, weights.to(logits.dtype), chosen

        router.forward = forward
    with torch.inference_mode():
        expected = other(ids).logits
    assert torch.allclose(got, expected, atol=2e-3)
    with torch.inference_mode():
        unmodified = model(ids).logits
    assert not torch.allclose(unmodified, expected, atol=0.5)


def test_hobbit_takes_the_bits_that_it_is_given(shared, texts):
    loaded = load(shared, "olmoe-twin")
    small = {"max_tokens": 48, "chunk": 8}
    lossless = quality(loaded, texts, "hobbit", "25%", full=1, low=1, **small)["budgets"][0]
    assert (lossless["kl_nats"], lossless["changed_share"]) == (0, 0)
    kl, low = {}, {}
    for dtype in ("int8", "int2"):
        found = quality(loaded, texts, "hobbit", "25%", full=0, low=1, low_dtype=dtype, **small)
        kl[dtype] = found["budgets"][0]["kl_nats"]
        low[dtype] = found["budgets"][0]["low_mass_share"]
    assert 0 < kl["int8"] < kl["int2"]
    assert min(low.values()) > 0.1
    skipped = quality(loaded, texts, "hobbit", "25%", full=0, low=0, **small)["budgets"][0]
    assert skipped["retained_mass_share"] < 1
    assert skipped["kl_nats"] > kl["int8"]


def test_a_low_bit_expert_computes_with_rounded_weights(shared):
    model = load(shared, "olmoe-twin").weights()
    tap = RoutingTap(model, ("weights", "gate_probs", "gate_norms"))
    low = [low_bit_parameters(each.experts, "int4") for each in LossyModel(model, tap.gate).blocks]

    class AllLow(FixedRun):
        def event(self, layer: int, columns: dict[str, Any]) -> Any:
            from replay.lossy import Routed

            ids = columns["experts"]
            return Routed(ids, columns["weights"], np.ones(ids.shape, bool), changed=False)

    ids = torch.arange(12)[None] * 131 % 8000
    with (
        LossyModel(model, tap.gate, low) as lossy,
        lossy.listening_to(AllLow("own")),
        torch.inference_mode(),
    ):
        got = model(ids).logits
    for layer, each in enumerate(lossy.blocks):
        for name, values in low[layer].items():
            each.experts._parameters[name].data = values
    with torch.inference_mode():
        expected = model(ids).logits
    assert torch.allclose(got, expected, atol=1e-4)


# ---------------------------------------------------------------------- parts


@pytest.mark.parametrize(("bits", "levels"), [(4, 15), (2, 4)])
def test_rounding_has_its_levels_and_its_error(bits, levels):
    weight = torch.randn((2, 3, 40), generator=torch.Generator().manual_seed(1))
    low = rounded(weight, bits, -1)
    assert low.shape == weight.shape
    for group in (low[0, 0, :32], low[1, 2, 32:]):
        assert len(group.unique()) <= levels
    step = weight[0, 0, :32].abs().max() / (1.5 if bits == 2 else 7)
    assert (low - weight)[0, 0, :32].abs().max() <= step / 2 * 1.01
    across = rounded(weight.transpose(1, 2).contiguous(), bits, -2)
    assert torch.equal(across.transpose(1, 2), low)
    assert torch.equal(
        rounded(torch.zeros(1, 2, 8), bits, -1).abs() < 1e-4, torch.ones(1, 2, 8) > 0
    )


def test_scores_are_means_over_predicted_tokens():
    own = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]])
    got = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    scores = Scores()
    scores.add(own, got, torch.tensor([1, 0]))
    found = scores.result()
    assert found["next_token_agreement"] == 0.5
    assert found["perplexity"] == pytest.approx(math.exp((math.log(4) + math.log(4 / 3)) / 2))
    assert math.exp(scores.own_nll / 2) == pytest.approx(4 / 3)
    assert found["kl_nats"] == pytest.approx((0.75 - 0.25) * math.log(3) / 2)


def test_pieces_to_learn_from_are_never_judged():
    pieces = [[index] * 10 for index in range(100)]
    for tokens in (5, 95, 300, 5000):
        judged, aside = _choose(pieces, Job("swapmoe", {}, [], max_tokens=tokens))
        seen = {piece[0] for piece in judged}
        assert not seen & {piece[0] for piece in aside}
        assert aside
        assert sum(map(len, judged)) == min(tokens, 700)
        assert max(seen) > 50 or len(judged) == 1
    with pytest.raises(UserError, match="one piece of text only"):
        _choose(pieces[:1], Job("swapmoe", {}, []))


def recording(weights: Any, probs: Any) -> Recording:
    ids = np.array([[[0, 1]], [[1, 2]]])
    columns = {"experts": ids, "weights": np.array(weights), "gate_probs": np.array(probs)}
    rows = np.arange(2)
    return Recording(table([[[0, 1]], [[1, 2]]], 1), columns, rows, rows, rows)


def test_gates_that_choose_or_weigh_by_more_than_their_logits_are_refused():
    probs = [[[0.5, 0.3, 0.2]], [[0.1, 0.5, 0.4]]]
    check_gates(recording([[[0.5, 0.3]], [[0.5, 0.4]]], probs), "mine")
    check_gates(recording([[[1.25, 0.75]], [[1.0, 0.8]]], probs), "mine")
    with pytest.raises(UserError, match="mine: its gates choose by corrected scores"):
        check_gates(recording([[[0.5, 0.3]], [[0.5, 0.4]]], [probs[0], probs[0]]), "mine")
    with pytest.raises(UserError, match="mine: its weights are not in proportion"):
        check_gates(recording([[[0.5, 0.5]], [[0.5, 0.5]]], probs), "mine")


def test_a_pass_stands_for_as_many_decode_steps():
    class Steps:
        """A core that only counts."""

        def __init__(self) -> None:
            self.calls: list[str] = []

        def __getattr__(self, name: str) -> Any:
            if name == "shape":
                return type("Shape", (), {"experts": 4, "layers": 1})
            results = {"predictions_at_step": (), "next_chunk": None}

            def call(*_: Any) -> Any:
                self.calls.append(name)
                return results.get(name)

            return call

    core: Any = Steps()
    run = LossyRun(core, None)  # type: ignore[arg-type]
    run.begin_pass(3, (0,))
    run.end_pass((0,))
    assert core.calls.count("step_begin") == core.calls.count("step_end") == 3
    assert (core.calls[0], core.calls[-1]) == ("request_begin", "request_end")


# ---------------------------------------------------------------------- refusals, figure, command


def test_what_cannot_be_measured_is_told(shared, texts):
    loaded = load(shared, "olmoe-twin")
    with pytest.raises(UserError, match=r"lru is lossless: .* choose one of hobbit, swapmoe"):
        quality(loaded, texts, "lru", "50%")
    with pytest.raises(UserError, match="--context 9999: olmoe-twin takes at most 4096"):
        quality(loaded, texts, "swapmoe", "50%", context=9999)
    with pytest.raises(UserError, match="--chunk 0: give at least 1"):
        quality(loaded, texts, "swapmoe", "50%", chunk=0)
    with pytest.raises(UserError, match="give --expert-budget"):
        quality(loaded, texts, "swapmoe")
    with pytest.raises(BudgetTooSmall, match="8 slots in each of 16 layers"):
        quality(loaded, texts, "swapmoe", "10%")


WORDS = [
    Prompt(domain=None, text=" ".join(f"t{(7 * at + 3 * text) % 40}" for at in range(12)))
    for text in range(20)
]


def tiny(path: Path, spoil: Callable[[Any], None]) -> Loaded:
    """A random model with `spoil` done to it."""
    model = build("olmoe")
    with torch.no_grad():
        spoil(model)
    return load_model(save(model, path / "tiny"), "cpu", "fp32")


def scale_head(model: Any, factor: float) -> None:
    model.model.norm.weight *= factor


@pytest.mark.parametrize("policy", ["swapmoe", "hobbit"])
def test_logits_that_are_not_finite_are_refused(policy, tmp_path):
    broken = tiny(tmp_path, lambda model: scale_head(model, float("nan")))
    with pytest.raises(UserError, match="logits are not finite"):
        quality(broken, WORDS, policy, "50%")


def test_logits_that_break_at_some_tokens_are_refused(tmp_path):
    def spoil(model: Any) -> None:
        model.model.embed_tokens.weight[21] = float("nan")

    with pytest.raises(UserError, match="logits are not finite"):
        quality(tiny(tmp_path, spoil), WORDS, "hobbit", "50%")


def test_logits_out_of_all_proportion_are_refused(tmp_path):
    large = tiny(tmp_path, lambda model: scale_head(model, 1e6))
    with pytest.raises(UserError, match="nats each, beyond any perplexity"):
        quality(large, WORDS, "hobbit", "50%")


def test_tokens_that_the_model_bars_count_for_nothing():
    own = torch.tensor([[0.0, 1.0, -float("inf")]])
    scores, plain = Scores(), Scores()
    scores.add(own, own + torch.tensor([0.0, 0.5, 0.0]), torch.tensor([1]))
    plain.add(own[:, :2], own[:, :2] + torch.tensor([0.0, 0.5]), torch.tensor([1]))
    assert scores.result() == pytest.approx(plain.result())
    assert plain.kl > 0


def test_a_trace_of_other_sizes_is_refused_before_anything_is_measured(tmp_path):
    loaded = tiny(tmp_path, lambda _: None)
    job = Job("hobbit", {}, [(None, "50%")], max_tokens=24, context=12)
    own = model_geometry(loaded.weights(), "tiny")
    assert measure(loaded, WORDS, job, lambda _: None, own)["tokens"] > 0
    other = Trace.open("sample").manifest.geometry
    with pytest.raises(UserError, match=r"16 layers x 64 .* the model tiny 4 layers x 8 experts"):
        measure(loaded, WORDS, job, lambda _: None, other)
    for change in ({"num_experts": 9}, {"top_k": 2}):
        with pytest.raises(UserError, match="--trace: tiny has 4 layers x"):
            measure(loaded, WORDS, job, lambda _: None, own.model_copy(update=change))


def test_the_command_refuses_a_trace_of_another_model(tmp_path):
    path = save(build("olmoe"), tmp_path / "tiny")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each["text"]}) + "\n" for each in WORDS))
    words = ["quality", "--model", str(path), "--policy", "hobbit", "--text", str(text)]
    words += ["--expert-budget", "50%", "--trace", "sample", "--hardware", "rtx4090-pcie4"]
    done = CliRunner().invoke(app, [*words, "--context", "12", "--device", "cpu"])
    assert isinstance(done.exception, UserError)
    assert "--trace: olmoe-twin has 16 layers x 64 experts, top-8" in str(done.exception)


def made_up_result() -> dict[str, Any]:
    budgets = [
        {
            "budget": f"{share}%",
            "expert_budget_bytes": share,
            "perplexity": 10 + 400 / share,
            "next_token_agreement": share / 100,
            "tpot_ms": 5.0,
            "lru_tpot_ms": 900 / share,
        }
        for share in (75, 25, 50)
    ]
    return {
        "model": "mine",
        "policy": "swapmoe",
        "tokens": 1000,
        "unmodified": {"perplexity": 12.0, "expert_bytes": 100},
        "budgets": budgets,
        "simulated": {"geometry": "mine", "hardware": "a card"},
    }


def test_the_figure_is_the_same_again_and_replaces_no_other(tmp_path):
    result = made_up_result()
    paths = draw_front(result, tmp_path, "front")
    first = [path.read_bytes() for path in paths]
    assert [path.name for path in paths] == ["front.png", "front.svg"]
    assert [path.read_bytes() for path in draw_front(result, tmp_path, "front")] == first
    result["budgets"][0]["perplexity"] = 99
    with pytest.raises(UserError, match="another figure is there"):
        draw_front(result, tmp_path, "front")


def test_the_command_prints_one_object_and_draws(shared, texts, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each["text"]}) + "\n" for each in texts))
    given = {
        "--model": shared / "models" / "olmoe-twin",
        "--policy": "swapmoe",
        "--text": text,
        "--expert-budget": "50%",
        "--max-tokens": "32",
        "--context": "32",
        "--chunk": "16",
        "--device": "cpu",
        "--trace": "sample",
        "--hardware": "rtx4090-pcie4",
        "--geometry": "olmoe-1b-7b",
        "--figure": tmp_path / "front",
    }
    arguments = [str(part) for pair in given.items() for part in pair]
    done = CliRunner().invoke(app, ["quality", *arguments, "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    (budget,) = result["budgets"]
    assert budget["perplexity"] > 0
    assert 0 < budget["tpot_ms"] < budget["lru_tpot_ms"]
    assert result["simulated"]["geometry"] == "olmoe-1b-7b"
    assert (tmp_path / "front.png").exists()
    assert (tmp_path / "front.svg").exists()


def test_another_figure_in_the_way_does_not_cost_the_result(tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each["text"]}) + "\n" for each in WORDS))
    path = save(build("olmoe"), tmp_path / "tiny")
    (tmp_path / "front.svg").write_text("another")
    words = ["quality", "--model", str(path), "--policy", "hobbit", "--text", str(text)]
    words += ["--expert-budget", "50%", "--context", "12", "--device", "cpu", "--max-tokens", "24"]
    done = CliRunner().invoke(app, [*words, "--figure", str(tmp_path / "front")])
    assert "another figure is there" in str(done.exception)
    assert "perplexity" in done.stdout
    done = CliRunner().invoke(app, [*words, "--figure", str(text / "front")])
    assert "--figure: " in str(done.exception)
    assert not done.stdout


def test_the_command_says_what_goes_together(tmp_path):
    base = ["quality", "--model", "none", "--policy", "swapmoe", "--text", str(tmp_path)]
    for extra, told in (
        (["--trace", "sample"], "--trace and --hardware go together"),
        (["--geometry", "olmoe-1b-7b"], "give --trace, too"),
    ):
        done = CliRunner().invoke(app, [*base, *extra])
        assert isinstance(done.exception, UserError)
        assert told in str(done.exception)
