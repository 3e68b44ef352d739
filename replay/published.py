"""Transformers configurations from the public numbers in configs/models."""

from __future__ import annotations

from typing import Any

from configs.geometry import load_model_config

_CALLS_EXPERTS = {"deepseek_v2": "n_routed_experts"} | dict.fromkeys(
    ("mixtral", "phimoe", "gpt_oss"), "num_local_experts"
)


def transformers_config(name: str) -> Any:
    """A model's numbers under the names that its family's configuration class knows."""
    import transformers

    numbers = load_model_config(name).config.model_dump()
    family = numbers["model_type"]
    numbers[_CALLS_EXPERTS.get(family, "num_experts")] = numbers.pop("num_experts")
    numbers["mlp_only_layers"] = list(numbers["mlp_only_layers"])
    optional = {name for name, value in numbers.items() if value is None} - {"q_lora_rank"}
    known = {name: value for name, value in numbers.items() if name not in optional}
    return type(transformers.AutoConfig.for_model(family))(**known)
