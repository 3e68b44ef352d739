"""What models and machines are: geometry, hardware, units, and the error for wrong input.

- errors: `UserError`
- units: `parse_bytes`, `parse_rate`, `parse_expert_budget`, `ExpertBudget`, `format_bytes`
- geometry: `Geometry`, `ModelConfig`, `EXPERT_DTYPE_BITS`, `load_geometry`, `load_model_config`,
  `list_models`
- budget: GPU memory by use, from a budget for the model or for its experts
- hardware: `Hardware`, `load_hardware`, `list_hardware`
"""

from configs.errors import UserError
from configs.geometry import (
    EXPERT_DTYPE_BITS,
    Geometry,
    ModelConfig,
    list_models,
    load_geometry,
    load_model_config,
)
from configs.hardware import Hardware, list_hardware, load_hardware
from configs.units import (
    ExpertBudget,
    format_bytes,
    parse_bytes,
    parse_expert_budget,
    parse_rate,
)

__all__ = [
    "EXPERT_DTYPE_BITS",
    "ExpertBudget",
    "Geometry",
    "Hardware",
    "ModelConfig",
    "UserError",
    "format_bytes",
    "list_hardware",
    "list_models",
    "load_geometry",
    "load_hardware",
    "load_model_config",
    "parse_bytes",
    "parse_expert_budget",
    "parse_rate",
]
