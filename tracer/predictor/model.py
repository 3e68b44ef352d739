"""ProMoE's predictor: one small MLP a layer, its weights on disk, its predictions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from configs.errors import UserError
from configs.files import write_atomically
from configs.geometry import Geometry
from configs.load import parse_json, validated
from tracer.manifest import sha256_of

FORMAT = 1
_METADATA = "moesim_predictor"
_ROWS_AT_ONCE = 1024


class PredictorInfo(BaseModel):
    """What a file of weights was trained on and for: kept in the file, as one line of JSON.

    `trained_prompts` are the digests (`tracer.predictor.split`) of all prompts that were not held
    out.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = Field(default=FORMAT, ge=FORMAT, le=FORMAT)
    kind: str = "promoe"
    stride: int = Field(gt=0)
    hidden_units: int = Field(gt=0)
    seed: int
    model_id: str
    num_moe_layers: int = Field(gt=0)
    num_experts: int = Field(gt=0)
    top_k: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    trained_prompts: tuple[str, ...]

    @property
    def layers(self) -> int:
        """Number of layers that predict; the first `stride` layers are predicted by none."""
        return self.num_moe_layers - self.stride

    @property
    def column(self) -> str:
        """The trace's column of these predictions."""
        return f"learned_{self.stride}"

    @property
    def parameters_per_layer(self) -> int:
        """Weights and biases of one layer's MLP."""
        into, out = self.hidden_size + 1, self.num_experts
        return into * self.hidden_units + (self.hidden_units + 1) * out

    def refuse_other(self, model_id: str, geometry: Geometry, where: str) -> None:
        """Raise UserError unless model and shape are those that the predictor was trained for."""
        ours = (self.model_id, self.num_moe_layers, self.num_experts, self.top_k, self.hidden_size)
        theirs = (
            model_id,
            geometry.num_moe_layers,
            geometry.num_experts,
            geometry.top_k,
            geometry.hidden_size,
        )
        if ours != theirs:
            raise UserError(
                f"{where}: a trace of {_describe(*theirs)}; the predictor is of"
                f" {_describe(*ours)}: name weights trained on that model"
            )


@dataclass(frozen=True)
class Weights:
    """Float32, P = L - stride layers, h hidden units; standardised inputs are folded in.

    hidden_weight [P, h, H], hidden_bias [P, h], output_weight [P, E, h], output_bias [P, E];
    popularity int64 [P, E]: how often the training rows used each expert of the predicted layer.
    """

    hidden_weight: torch.Tensor
    hidden_bias: torch.Tensor
    output_weight: torch.Tensor
    output_bias: torch.Tensor
    popularity: torch.Tensor


class Predictor:
    """Predicts the experts of layer l + stride from the gate input of layer l."""

    def __init__(self, info: PredictorInfo, weights: Weights) -> None:
        self.info = info
        self.weights = weights
        self.width = min(2 * info.top_k, info.num_experts)

    @classmethod
    def load(cls, path: str | Path, *, sha256: str | None = None, device: str = "cpu") -> Predictor:
        """Read what `save` wrote; see `tracer.predictor.load`."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file; moesim train-predictor writes one")
        if sha256 is not None and sha256_of(path.read_bytes()) != sha256:
            raise UserError(f"{path}: its SHA-256 is not the listed one; restore it or train again")
        try:
            with safe_open(path, framework="pt", device=device) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise UserError(f"{path}: not readable safetensors ({error}); train again") from error
        info = _read_info(path, metadata)
        _refuse_other_shapes(path, tensors, info)
        return cls(info, Weights(**tensors))

    def save(self, path: Path) -> str:
        """Write the weights, equal bytes for equal weights; return their SHA-256."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in vars(self.weights).items()}
        # One key: safetensors writes several in no fixed order.
        metadata = {_METADATA: self.info.model_dump_json()}
        data = save(tensors, metadata)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
        return sha256_of(data)

    def to(self, device: str) -> Predictor:
        """Return this predictor with its weights on `device`."""
        moved = {name: tensor.to(device) for name, tensor in vars(self.weights).items()}
        return Predictor(self.info, Weights(**moved))

    @torch.inference_mode()
    def predict(self, gate_input: torch.Tensor, layer: int) -> torch.Tensor:
        """Rank the experts of MoE layer `layer` + stride.

        gate_input: [T, H], any float dtype, on the weights' device; returns int64 [T, min(2k, E)],
        best first, the lowest id first among equals. Raises ValueError for a layer that predicts
        nothing.
        """
        if not 0 <= layer < self.info.layers:
            raise ValueError(f"layer {layer}: layers 0 to {self.info.layers - 1} predict")
        w = self.weights
        hidden = torch.addmm(w.hidden_bias[layer], gate_input.float(), w.hidden_weight[layer].T)
        scores = torch.addmm(w.output_bias[layer], hidden.relu_(), w.output_weight[layer].T)
        return self._ranked(scores)

    @torch.inference_mode()
    def predict_all(self, gate_inputs: torch.Tensor) -> torch.Tensor:
        """`predict` for every layer that predicts: [n, P, H] -> int64 [n, P, min(2k, E)]."""
        parts = gate_inputs.split(_ROWS_AT_ONCE)
        return torch.cat([self._ranked(self._scores(part)) for part in parts])

    def _scores(self, gate_inputs: torch.Tensor) -> torch.Tensor:
        w = self.weights
        inputs = gate_inputs.to(w.hidden_weight.device).float().transpose(0, 1)
        hidden = torch.baddbmm(w.hidden_bias[:, None], inputs, w.hidden_weight.mT).relu_()
        return torch.baddbmm(w.output_bias[:, None], hidden, w.output_weight.mT).transpose(0, 1)

    def _ranked(self, scores: torch.Tensor) -> torch.Tensor:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : self.width]


def _read_info(path: Path, metadata: dict[str, str]) -> PredictorInfo:
    if _METADATA not in metadata:
        raise UserError(f"{path}: holds no predictor; name a file that train-predictor wrote")
    content = parse_json(metadata[_METADATA])
    return validated(PredictorInfo, content, str(path))


def _refuse_other_shapes(path: Path, tensors: dict[str, torch.Tensor], info: PredictorInfo) -> None:
    layers, units, experts = info.layers, info.hidden_units, info.num_experts
    expected = {
        "hidden_weight": (layers, units, info.hidden_size),
        "hidden_bias": (layers, units),
        "output_weight": (layers, experts, units),
        "output_bias": (layers, experts),
        "popularity": (layers, experts),
    }
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        raise UserError(f"{path}: tensors {found} instead of {expected}; train again")


def _describe(model_id: str, layers: int, experts: int, top_k: int, hidden: int) -> str:
    return f"{model_id} ({layers} x {experts} experts, top-{top_k}, hidden {hidden})"
