"""Transformers configurations from the public numbers in configs/models."""

import transformers

from configs.geometry import load_model_config


def transformers_config(name):
    """The model's numbers under the names that its family's configuration class knows."""
    numbers = load_model_config(name).config.model_dump()
    family = numbers["model_type"]
    if family in ("mixtral", "phimoe", "gpt_oss"):
        numbers["num_local_experts"] = numbers.pop("num_experts")
    if family == "deepseek_v2":
        numbers["n_routed_experts"] = numbers.pop("num_experts")
    numbers["mlp_only_layers"] = list(numbers["mlp_only_layers"])
    optional = {name for name, value in numbers.items() if value is None} - {"q_lora_rank"}
    known = {name: value for name, value in numbers.items() if name not in optional}
    return type(transformers.AutoConfig.for_model(family))(**known)
