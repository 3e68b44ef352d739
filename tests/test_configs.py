"""Shipped models and machines: their figures, their sources, and errors in files like them."""

import difflib
import doctest
import importlib
import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import configs
from configs import geometry
from configs.errors import UserError
from configs.geometry import (
    EXPERT_DTYPE_BITS,
    Geometry,
    PublishedCount,
    list_models,
    load_geometry,
    load_model_config,
)
from configs.hardware import Hardware, PredictorNs, list_hardware, load_hardware

FOLDER = Path(configs.__file__).parent

# Parameters in the published safetensors files.
EXACT_PARAMS = {
    "deepseek-v2-lite": 15_706_484_224,
    "gpt-oss-20b": 20_914_757_184,
    "mixtral-8x7b": 46_702_792_704,
    "olmoe-1b-7b": 6_919_161_856,
    "phi-3.5-moe": 41_873_153_344,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
    "qwen3-30b-a3b": 30_532_122_624,
}


def text_of(kind, name):
    return (FOLDER / kind / f"{name}.yaml").read_text(encoding="utf-8")


def edited(tmp_path, kind, name, old, new):
    """The path of a copy of a shipped file with one piece of its text replaced."""
    text = text_of(kind, name)
    assert text.count(old) == 1
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new), encoding="utf-8")
    return path


# Models


def test_the_models_listed_are_the_ones_shipped():
    assert list_models() == sorted(EXACT_PARAMS)


@pytest.mark.parametrize("name", list_models())
def test_parameters_are_the_published_ones(name):
    model = load_model_config(name)
    assert model.total_params == EXACT_PARAMS[name]
    assert model.published.total.agrees_with(model.total_params)
    active = model.published.active
    assert active.agrees_with(model.active_params(active.input_embedding))


def test_a_published_count_is_compared_to_its_last_digit():
    count = PublishedCount(value="3.3B", source="x")
    assert count.agrees_with(3_349_999_999)
    assert not count.agrees_with(3_353_032_704)
    assert count.model_copy(update={"rounding": "down"}).agrees_with(3_353_032_704)


@pytest.mark.parametrize("name", list_models())
def test_transformers_builds_the_same_parameters(name):
    torch = pytest.importorskip("torch", reason="needs torch to build the models")
    transformers = pytest.importorskip("transformers", reason="needs transformers' model code")
    numbers = yaml.safe_load(text_of("models", name))["config"]
    config = transformers.AutoConfig.for_model(numbers.pop("model_type"), **numbers)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {key: p.numel() for key, p in model.named_parameters()}
    assert sum(shapes.values()) == load_model_config(name).total_params
    shape = load_geometry(name)
    for layer in shape.model_layer_ids:
        in_experts = [n for key, n in shapes.items() if f"layers.{layer}.mlp.experts." in key]
        assert sum(in_experts) == shape.num_experts * shape.expert_params


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("dtype", sorted(EXPERT_DTYPE_BITS))
def test_bytes_add_up(name, dtype):
    model = load_model_config(name)
    shape = model.geometry(dtype)
    assert shape.num_moe_layers == len(shape.expert_bytes_by_layer)
    read = sum(shape.segment_bytes_by_layer) + shape.head_bytes
    assert shape.nonexpert_bytes == read + 2 * shape.vocab_size * shape.hidden_size
    assert shape.model_bytes == shape.nonexpert_bytes + shape.expert_bytes_total
    least = shape.expert_params * EXPERT_DTYPE_BITS[dtype] / 8
    assert least <= shape.expert_bytes_by_layer[0] <= 1.002 * least
    if dtype == "bf16":
        assert shape.model_bytes == 2 * model.total_params


def test_a_tied_embedding_is_counted_once(tmp_path):
    tied = ("tie_word_embeddings: false", "tie_word_embeddings: true")
    shape = load_geometry(edited(tmp_path, "models", "olmoe-1b-7b", *tied))
    apart = load_geometry("olmoe-1b-7b")
    assert apart.nonexpert_bytes - shape.nonexpert_bytes == 2 * 50304 * 2048
    assert apart.head_bytes == shape.head_bytes


def test_gpt_oss_experts():
    """3 x 2880 x 2880 weights and 8,640 biases, which stay bf16 beside MXFP4 weights."""
    assert load_geometry("gpt-oss-20b", "bf16").expert_bytes_by_layer == (49_783_680,) * 24
    assert load_geometry("gpt-oss-20b", "mxfp4").expert_bytes_by_layer == (13_236_480,) * 24
    assert load_geometry("gpt-oss-20b") == load_geometry("gpt-oss-20b", "mxfp4")


@pytest.mark.parametrize("name", [n for n in list_models() if n != "gpt-oss-20b"])
def test_the_other_checkpoints_are_bf16(name):
    assert load_geometry(name) == load_geometry(name, "bf16")


def test_sub_byte_experts_are_rounded_up_to_whole_bytes(tmp_path):
    odd = ("hidden_size: 2048", "hidden_size: 16\n  head_dim: 3")
    path = edited(tmp_path, "models", "olmoe-1b-7b", *odd)
    path.write_text(path.read_text().replace("intermediate_size: 1024", "intermediate_size: 1"))
    assert load_geometry(path, "int4").expert_bytes_by_layer[0] == 27
    assert load_geometry(path, "mxfp4").expert_bytes_by_layer[0] == 26  # 25.5


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt-oss-20b", 2 * 24 * 8 * 64 * 2),
        ("olmoe-1b-7b", 2 * 16 * 16 * 128 * 2),
        ("qwen1.5-moe-a2.7b", 2 * 24 * 16 * 128 * 2),
        ("mixtral-8x7b", 2 * 32 * 8 * 128 * 2),
        ("phi-3.5-moe", 2 * 32 * 8 * 128 * 2),
        ("qwen3-30b-a3b", 2 * 48 * 4 * 128 * 2),
        ("deepseek-v2-lite", 27 * (512 + 64) * 2),
    ],
)
def test_cache_bytes_a_token(name, expected):
    assert load_geometry(name).kv_bytes_per_token == expected


def test_an_expanded_mla_cache_is_nine_times_the_latent_one(tmp_path):
    latent = ("kv_cache: mla_latent", "kv_cache: mla_expanded")
    shape = load_geometry(edited(tmp_path, "models", "deepseek-v2-lite", *latent))
    assert shape.kv_bytes_per_token == 27 * 16 * (192 + 128) * 2


def test_deepseek_runs_its_dense_layer_first_and_its_shared_experts_after_the_gate():
    shape = load_geometry("deepseek-v2-lite")
    assert (shape.num_layers, shape.model_layer_ids) == (27, tuple(range(1, 27)))
    attention = 2048 * 16 * 192 + 2048 * 576 + 512 + 512 * 16 * 256 + 16 * 128 * 2048
    layer = attention + 2 * 2048
    dense, router, shared = 3 * 2048 * 10944, 64 * 2048, 3 * 2048 * 2 * 1408
    assert shape.shared_experts == "after_gate"
    assert shape.segment_bytes_by_layer[0] == 2 * (layer + dense + layer + router)
    assert set(shape.segment_bytes_by_layer[1:]) == {2 * (shared + layer + router)}
    assert shape.head_bytes == 2 * (shared + 2048 + 102400 * 2048)


def test_qwen_runs_its_shared_expert_before_the_gate():
    shape = load_geometry("qwen1.5-moe-a2.7b")
    attention = 4 * 2048 * 2048 + 3 * 2048
    shared = 3 * 2048 * 5632 + 2048
    assert shape.shared_experts == "before_gate"
    segment = 2 * (attention + 2 * 2048 + 60 * 2048 + shared)
    assert shape.segment_bytes_by_layer == (segment,) * 24
    assert shape.head_bytes == 2 * (2048 + 151936 * 2048)


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ("decoder_sparse_step: 2", tuple(range(1, 24, 2))),
        ("decoder_sparse_step: 1\n  mlp_only_layers: [0, 23]", tuple(range(1, 23))),
    ],
)
def test_dense_layers_fall_into_segments_and_head(tmp_path, new, expected):
    path = edited(tmp_path, "models", "qwen1.5-moe-a2.7b", "decoder_sparse_step: 1", new)
    shape = load_geometry(path)
    assert shape.model_layer_ids == expected
    read = sum(shape.segment_bytes_by_layer) + shape.head_bytes
    assert shape.nonexpert_bytes == read + 2 * 151936 * 2048
    assert shape.head_bytes > load_geometry("qwen1.5-moe-a2.7b").head_bytes or expected[-1] == 23


def test_geometry_survives_json():
    shape = load_geometry("deepseek-v2-lite", "int8")
    assert Geometry.model_validate_json(shape.model_dump_json()) == shape


@pytest.mark.parametrize(
    "change",
    [
        {"model_layer_ids": (0, 0, *range(2, 16))},
        {"model_layer_ids": tuple(range(1, 17))},
        {"expert_bytes_by_layer": (12_582_912,) * 15},
        {"segment_bytes_by_layer": ()},
        {"top_k": 65},
        {"num_experts": 0},
        {"surprise": 1},
    ],
)
def test_a_geometry_that_contradicts_itself_is_refused(change):
    data = load_geometry("olmoe-1b-7b").model_dump()
    with pytest.raises(ValidationError, match=next(iter(change))):
        Geometry.model_validate({**data, **change})


# Machines


def test_the_machines_listed_are_the_ones_shipped():
    assert list_hardware() == [
        "a100-pcie4",
        "h200-pcie5",
        "laptop-pcie4x8",
        "rtx3090-pcie4",
        "rtx4090-pcie4",
        "t4-pcie3",
    ]


@pytest.mark.parametrize("name", list_hardware())
def test_every_value_has_a_source(name):
    machine = load_hardware(name)
    assert machine.name == name
    numbers = set(Hardware.model_fields) - {
        *("name", "calibrated", "provenance", "predictor_ns"),
        *("link_curve", "also_measured"),
    }
    assert set(machine.provenance) == numbers
    assert set(machine.predictor_ns.provenance) == set(PredictorNs.model_fields) - {"provenance"}
    sources = [*machine.provenance.values(), *machine.predictor_ns.provenance.values()]
    assert min(len(entry.source) for entry in sources) > 10


@pytest.mark.parametrize("name", list_hardware())
def test_a_machine_survives_being_written(name):
    machine = load_hardware(name)
    assert Hardware.model_validate(machine.model_dump()) == machine
    assert Hardware.model_validate_json(machine.model_dump_json()) == machine


@pytest.mark.parametrize(
    ("name", "nominal_gb_per_s"),
    [
        ("h200-pcie5", 63.0),
        ("a100-pcie4", 31.5),
        ("rtx4090-pcie4", 31.5),
        ("rtx3090-pcie4", 31.5),
        ("t4-pcie3", 15.75),
        ("laptop-pcie4x8", 15.75),
    ],
)
def test_links_are_achievable_not_nominal(name, nominal_gb_per_s):
    share = load_hardware(name).link_bytes_per_s / (nominal_gb_per_s * 1e9)
    assert 0.7 < share < 0.9


def test_the_h200s_copies_are_the_measured_ones():
    machine = load_hardware("h200-pcie5")
    assert machine.provenance["link_bytes_per_s"].source.startswith("measured: ")
    # Alone, a part of the hand-over runs beside the copy, hence the wider margin.
    for kind, overhead_ns, margin in (
        ("pinned_h2d", machine.link_startup_ns + machine.copy_issue_ns, 0.1),
        ("pinned_h2d_back_to_back", machine.link_gap_ns, 0.01),
    ):
        curve = [p for p in machine.link_curve if p.kind == kind and p.bytes >= 2**20]
        assert len(curve) == 9
        for point in curve:
            expected_ns = overhead_ns + 1e9 * point.bytes / machine.link_bytes_per_s
            assert point.ns == pytest.approx(expected_ns, rel=margin), (kind, point.bytes)


@pytest.mark.parametrize(
    ("model", "layers", "measured_ms"),
    [("gpt-oss-20b", 24, 4.4), ("deepseek-v2-lite", 27, 4.7), ("qwen3-30b-a3b", 12, 2.2)],
)
def test_the_h200s_segments_are_the_measured_ones(model, layers, measured_ms):
    machine = load_hardware("h200-pcie5")
    head_ms = 1e3 * load_geometry(model).head_bytes / machine.gpu_bytes_per_s
    assert layers * machine.segment_floor_ns / 1e6 + head_ms == pytest.approx(measured_ms, rel=0.02)


def test_the_h200s_step_without_misses_is_the_measured_one():
    machine, shape = load_hardware("h200-pcie5"), load_geometry("olmoe-1b-7b")
    host_ns = machine.segment_launch_ns + machine.experts_launch_ns
    host_ns += machine.readback_ns + machine.decision_ns
    layer_ns = host_ns + machine.segment_floor_ns + machine.experts_floor_ns
    head_ns = 1e9 * shape.head_bytes / machine.gpu_bytes_per_s
    step_ms = (machine.step_ns + shape.num_moe_layers * layer_ns + head_ns) / 1e6
    assert step_ms == pytest.approx(3.72, rel=0.02)


def test_another_link():
    machine = load_hardware("h200-pcie5").model_copy(update={"calibrated": True})
    slower = machine.with_link(25_000_000_000)
    assert slower.link_bytes_per_s == 25_000_000_000
    assert slower.provenance["link_bytes_per_s"].source == "set by the user"
    assert slower.calibrated is False
    unchanged = {"link_bytes_per_s", "link_curve", "provenance", "calibrated"}
    assert slower.model_copy(update={f: getattr(machine, f) for f in unchanged}) == machine


@pytest.mark.parametrize("rate", [1, 0, -5, 10**13, float("nan"), float("inf")])
def test_a_link_out_of_bounds(rate):
    with pytest.raises(UserError, match=r"hardware t4-pcie3: field 'link_bytes_per_s'") as error:
        load_hardware("t4-pcie3").with_link(rate)
    assert f"got {rate!r}" in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("value: 12_300_000_000", "value: 1", "link_bytes_per_s"),
        ("value: 12_300_000_000", "value: 10_000_000_000_000", "link_bytes_per_s"),
        ("value: 12_300_000_000", "value: fast", "link_bytes_per_s"),
        ("value: 12_300_000_000", "value: true", "link_bytes_per_s"),
        ("value: 12_300_000_000", "value: .nan", "link_bytes_per_s"),
        ("value: 15_642_329_088", "value: 16", "gpu_memory_bytes"),
        ("value: 220_000_000_000", "value: 220", "gpu_bytes_per_s"),
        ("value: 5_300\n", "value: -1\n", "link_gap_ns"),
        ("value: 5_300\n", "value: 5.3\n", "link_gap_ns"),
        ("value: 0.15\n", "value: 15\n", "cpu_slowdown"),
        ("  spread: 6_000_000_000", "  sprad: 1", "cpu_bytes_per_s"),
        ("  source: cores,", "  sources: cores,", "cpu_slowdown"),
        ("value: 300_000", "value: -1", "predictor_ns.learned"),
        ("link_gap_ns:", "link_gap_us:", "link_gap_us"),
        ("  spread: 6_000_000_000", "  spread: -1", "cpu_bytes_per_s.spread"),
        ("calibrated: false", "calibrated: no idea", "calibrated"),
        ("calibrated: false", "calibrated: false\nprovenance: {}", "provenance"),
        ("calibrated: false", "calibrated: false\ncolour: red", "colour"),
        ("calibrated: false", "calibrated: false\n1: 2", "1"),
        ("calibrated: false\n", "", "calibrated"),
    ],
)
def test_a_machine_with_a_slip_is_refused(tmp_path, old, new, field):
    path = edited(tmp_path, "hardware", "t4-pcie3", old, new)
    with pytest.raises(UserError) as error:
        load_hardware(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert f"'{field}'" in message
    assert "\n" not in message


def test_a_misspelt_field_is_named_beside_the_one_it_should_be(tmp_path):
    path = edited(tmp_path, "hardware", "t4-pcie3", "link_gap_ns:", "link_gap_us:")
    with pytest.raises(UserError, match=r"'link_gap_us' is not known; .*\(missing: link_gap_ns\)"):
        load_hardware(path)


# Names and files


@pytest.mark.parametrize(
    ("load", "wrong", "closest", "known"),
    [
        (load_geometry, "olmoe-7b", "olmoe-1b-7b", list_models()),
        (load_geometry, "Mixtral-8x7B-v0.1", "mixtral-8x7b", list_models()),
        (load_hardware, "rtx4090", "rtx4090-pcie4", list_hardware()),
    ],
)
def test_an_unknown_name_lists_the_names_and_the_closest(load, wrong, closest, known):
    with pytest.raises(UserError) as error:
        load(wrong)
    message = str(error.value)
    assert repr(wrong) in message
    assert f"did you mean {closest!r}?" in message
    assert ", ".join(known) in message


def test_a_name_like_no_other_gets_no_suggestion():
    assert not difflib.get_close_matches("zzz", list_models(), cutoff=0.4)
    with pytest.raises(UserError, match=r"^unknown model 'zzz'; known: deepseek-v2-lite, "):
        load_geometry("zzz")


def test_an_unknown_expert_dtype():
    with pytest.raises(UserError, match=r"unknown expert dtype 'bf15'; did you mean 'bf16'\?"):
        load_geometry("olmoe-1b-7b", "bf15")


def test_a_users_own_files(tmp_path):
    mine = edited(
        tmp_path, "models", "olmoe-1b-7b", "num_hidden_layers: 16", "num_hidden_layers: 2"
    )
    assert load_geometry(str(mine)).num_moe_layers == 2
    assert load_geometry(mine) == load_geometry(str(mine))


@pytest.mark.parametrize("where", ["absent.yaml", "absent/olmoe", "."])
def test_a_file_that_is_not_there(tmp_path, where):
    path = str(tmp_path / where)
    with pytest.raises(UserError, match=r"model file '.*' is not there; .* olmoe-1b-7b"):
        load_geometry(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: [", "not valid YAML"),
        ("name: a\nname: b", "'name' is given twice"),
        ("? [a, b]\n: c", "not valid YAML"),
        ("", "holds None"),
        ("just words", "holds 'just words'"),
    ],
)
def test_a_file_that_is_no_mapping(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    for load in (load_geometry, load_hardware):
        with pytest.raises(UserError, match=re.escape(says)) as error:
            load(path)
        assert str(error.value).startswith(f"{path}: ")
        assert "\n" not in str(error.value)


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not valid YAML"):
        load_geometry(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("name: " + "[" * 10_000, "nested too deeply"),
        ("name: " + "{a: " * 10_000, "nested too deeply"),
        ("name: 18446744073709551616", "the number is beyond 64 bits"),
        ("name: 0x" + "f" * 10_000, "the number is beyond 64 bits"),
        ("name: " + "9" * 10_000, "not valid YAML"),
        ("name: 2024-02-31", "not valid YAML"),
        ("name: &a [*a]", "name"),
    ],
)
def test_yaml_that_python_cannot_hold(tmp_path, text, says):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        load_geometry(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ("  num_hidden_layers: 27\n", "", "config.num_hidden_layers"),
        ("num_hidden_layers: 27", "num_hidden_layers: many", "config.num_hidden_layers"),
        ("num_hidden_layers: 27", "num_hidden_layers: 27.0", "config.num_hidden_layers"),
        ("num_hidden_layers: 27", "num_hiden_layers: 27", "config.num_hiden_layers"),
        ("num_hidden_layers: 27", "num_hidden_layers: 27\n  layers: 3", "config.layers"),
        ("num_hidden_layers: 27", "num_hidden_layers: 1", "config"),
        ("num_experts_per_tok: 6", "num_experts_per_tok: 65", "config"),
        ("  v_head_dim: 128\n", "", "config"),
        ("value: 15.7B", "value: 15.7", "published.total.value"),
        ("shared_experts: after_gate", "shared_experts: later", "architecture.shared_experts"),
    ],
)
def test_a_model_with_a_slip_is_refused(tmp_path, old, new, field):
    path = edited(tmp_path, "models", "deepseek-v2-lite", old, new)
    with pytest.raises(UserError) as error:
        load_geometry(path)
    message = str(error.value)
    assert message.startswith(f"{path}: field '{field}'")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("expert_dtype: bf16", "expert_dtype: bf15", "known: fp32, bf16"),
        ("shared_experts: after_gate", "shared_experts: none", "architecture.shared_experts"),
        ("kv_cache: mla_latent", "kv_cache: keys_values", "architecture.kv_cache"),
    ],
)
def test_a_model_that_contradicts_itself_is_refused(tmp_path, old, new, says):
    with pytest.raises(UserError, match=says):
        load_geometry(edited(tmp_path, "models", "deepseek-v2-lite", old, new))


# The package


def test_the_package_docstring_lists_what_it_offers():
    assert set(re.findall(r"`(\w+)`", configs.__doc__)) == set(configs.__all__)
    for name in configs.__all__:
        assert hasattr(configs, name)


def test_the_package_imports_none_of_the_others():
    for path in FOLDER.glob("*.py"):
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert not {"tracer", "policies", "sim", "replay", "cli"} & set(imported)


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(importlib.import_module(geometry.__name__))
    assert result.attempted == 1
    assert result.failed == 0
