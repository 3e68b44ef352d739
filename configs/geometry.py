"""Shapes and bytes of MoE models, computed from the numbers of their public configurations.

`Geometry` is what the simulator, the traces and the replay need to know of a model. `ModelConfig`
holds a public configuration and computes it. Weights outside the routed experts are bf16; buffers
(rotary frequencies and the like) are not counted.
"""

from __future__ import annotations

import os
from decimal import Decimal
from fractions import Fraction
from math import ceil
from typing import Annotated, Literal, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from configs.load import find, names_in, read_yaml, unknown_name

EXPERT_DTYPE_BITS: dict[str, float] = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "fp8": 8,
    "int8": 8,
    "int4": 4.5,  # 4 bits, and a 16-bit scale a group of 32 weights (as GGUF's Q4_0)
    "int2": 2.5,  # 2 bits, and a 16-bit scale a group of 32 weights
    "mxfp4": 4.25,  # 4 bits, and an 8-bit exponent a block of 32 weights (OCP MX)
}
"""Bits that one weight of an expert's matrices takes, scales included."""

_NONEXPERT_BYTES = 2
_KV_BYTES = 2

Count = Annotated[int, Field(ge=1, le=2**50)]
Size = Annotated[int, Field(ge=0, le=2**50)]


class Geometry(BaseModel):
    """Shapes and bytes of one model at one expert precision.

    L is the number of MoE layers, E the experts a layer. All sizes are bytes of weights.
    Raises pydantic's ValidationError when the parts contradict each other.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str = ""
    num_layers: Count
    """All decoder layers, MoE or dense."""
    model_layer_ids: tuple[Size, ...] = Field(min_length=1)
    """The MoE layers' ids in the model, [L], increasing."""
    num_experts: Count
    top_k: Count
    hidden_size: Count
    vocab_size: Count
    expert_params: Count
    """Parameters of one routed expert, biases included."""
    expert_dtype: str = Field(min_length=1)
    expert_bytes_by_layer: tuple[Count, ...]
    """Bytes of one expert in each MoE layer, [L]."""
    nonexpert_bytes: Size
    """Everything on the GPU that is no routed expert: embeddings, attention, norms, gates, ..."""
    segment_bytes_by_layer: tuple[Size, ...]
    """Read from after the experts of MoE layer l-1 up to the gate of l, [L]; dense layers in
    between and shared experts are part of it, the embedding's one row a token is not."""
    head_bytes: Size
    """Read after the last MoE layer's experts: rest layers, final norm, lm_head."""
    kv_bytes_per_token: Size
    """Cache bytes a token over all layers, sliding-window layers counted in full."""
    shared_experts: Literal["none", "before_gate", "after_gate"]
    """Where they run: in their own layer's segment, or in what follows the layer's experts."""

    @property
    def num_moe_layers(self) -> int:
        return len(self.model_layer_ids)

    @property
    def expert_bytes_total(self) -> int:
        """Bytes of all routed experts."""
        return self.num_experts * sum(self.expert_bytes_by_layer)

    @property
    def model_bytes(self) -> int:
        """Bytes of all weights."""
        return self.nonexpert_bytes + self.expert_bytes_total

    @model_validator(mode="after")
    def _check(self) -> Self:
        layers = len(self.model_layer_ids)
        for field in ("expert_bytes_by_layer", "segment_bytes_by_layer"):
            if len(getattr(self, field)) != layers:
                raise ValueError(
                    f"{field} has {len(getattr(self, field))} values for {layers} MoE layers"
                )
        ids = self.model_layer_ids
        if list(ids) != sorted(set(ids)) or ids[-1] >= self.num_layers:
            raise ValueError(
                f"model_layer_ids {ids} must increase and stay below num_layers {self.num_layers}"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is above num_experts {self.num_experts}")
        return self


class PublicConfig(BaseModel):
    """The numbers of a model's config.json that its weights and cache depend on, under its names.

    Names that differ between families are aliases: `num_local_experts` (Mixtral, Phi, gpt-oss) and
    `n_routed_experts` (DeepSeek) are `num_experts`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model_type: str = Field(min_length=1)
    num_hidden_layers: Count
    hidden_size: Count
    vocab_size: Count
    tie_word_embeddings: bool
    num_attention_heads: Count
    num_key_value_heads: Count
    head_dim: Count | None = None
    """hidden_size / num_attention_heads where the config.json has none."""
    attention_bias: bool = False
    """On query, key, value and output projections."""
    qkv_bias: bool = False
    """On query, key and value projections only."""
    q_lora_rank: Count | None = None
    kv_lora_rank: Count | None = None
    """Given for multi-head latent attention (MLA) only, as are the three below."""
    qk_nope_head_dim: Count | None = None
    qk_rope_head_dim: Count | None = None
    v_head_dim: Count | None = None
    intermediate_size: Count
    """Of dense layers; of the routed experts too where there is no `moe_intermediate_size`."""
    moe_intermediate_size: Count | None = None
    num_experts: Count = Field(
        validation_alias=AliasChoices("num_experts", "num_local_experts", "n_routed_experts")
    )
    num_experts_per_tok: Count
    n_shared_experts: Size = 0
    """Each of `moe_intermediate_size`."""
    shared_expert_intermediate_size: Size = 0
    first_k_dense_replace: Size = 0
    decoder_sparse_step: Count = 1
    mlp_only_layers: tuple[Size, ...] = Field(default=(), strict=False)
    lm_head_bias: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(
                f"num_experts_per_tok {self.num_experts_per_tok} is above "
                f"num_experts {self.num_experts}"
            )
        mla = (self.kv_lora_rank, self.qk_nope_head_dim, self.qk_rope_head_dim, self.v_head_dim)
        if any(mla) and not all(mla):
            raise ValueError(
                "MLA needs kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim and v_head_dim"
            )
        if not all(mla) and self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError("head_dim is missing and hidden_size is no multiple of the heads")
        if not self.moe_layer_ids:
            raise ValueError("no layer is an MoE layer by these numbers")
        return self

    @property
    def moe_layer_ids(self) -> tuple[int, ...]:
        return tuple(i for i in range(self.num_hidden_layers) if self._is_moe(i))

    @property
    def expert_intermediate_size(self) -> int:
        return self.moe_intermediate_size or self.intermediate_size

    @property
    def shared_intermediate_size(self) -> int:
        shared = self.n_shared_experts * self.expert_intermediate_size
        return shared or self.shared_expert_intermediate_size

    def _is_moe(self, layer: int) -> bool:
        if layer < self.first_k_dense_replace or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0


class Architecture(BaseModel):
    """What the modelling code adds and config.json does not say."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str = Field(min_length=1)
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm on queries and keys: none, over one head, over all heads together."""
    attention_sinks: bool = False
    norm_bias: bool = False
    """LayerNorm with a bias in place of RMSNorm."""
    router_bias: bool = False
    expert_bias: bool = False
    shared_expert_gate: bool = False
    shared_experts: Literal["none", "before_gate", "after_gate"] = "none"
    """Where the code runs the shared experts, relative to the gate and the routed experts."""
    kv_cache: Literal["keys_values", "mla_expanded", "mla_latent"] = "keys_values"
    """What the Hugging Face implementation stores a token and layer."""


class PublishedCount(BaseModel):
    """A parameter count as its authors print it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    value: str = Field(pattern=r"^\d+(\.\d+)?B$")
    """With the digits printed: `46.7B`."""
    source: str = Field(min_length=1)
    rounding: Literal["nearest", "down"] = "nearest"
    input_embedding: bool = True
    """Whether the authors count the input embedding among the parameters."""

    def agrees_with(self, params: int) -> bool:
        """Whether a count, in parameters, prints as this one."""
        printed = Decimal(self.value.removesuffix("B"))
        rounding = "ROUND_HALF_EVEN" if self.rounding == "nearest" else "ROUND_DOWN"
        return (Decimal(params) / 10**9).quantize(printed, rounding) == printed


class Published(BaseModel):
    """Published parameter counts: of the model, and of those active for one token."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    total: PublishedCount
    active: PublishedCount


class ModelConfig(BaseModel):
    """A public model: its configuration's numbers, their source, its published counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    source: str = Field(min_length=1)
    """Hugging Face model id and the file the numbers come from."""
    revision: str = ""
    expert_dtype: str
    """Of the experts in the published checkpoint."""
    config: PublicConfig
    architecture: Architecture
    published: Published

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.expert_dtype not in EXPERT_DTYPE_BITS:
            known = ", ".join(EXPERT_DTYPE_BITS)
            raise ValueError(f"expert_dtype {self.expert_dtype!r} is unknown; known: {known}")
        if (self.config.shared_intermediate_size > 0) != (
            self.architecture.shared_experts != "none"
        ):
            raise ValueError(
                "architecture.shared_experts must say where the shared experts of config run, "
                "and be 'none' where there are none"
            )
        if (self.config.kv_lora_rank is not None) != (self.architecture.kv_cache != "keys_values"):
            raise ValueError("architecture.kv_cache must name an MLA cache exactly for MLA models")
        return self

    @property
    def expert_matrix_params(self) -> int:
        """Weights of one routed expert's gate, up and down matrices."""
        return 3 * self.config.hidden_size * self.config.expert_intermediate_size

    @property
    def expert_bias_params(self) -> int:
        if not self.architecture.expert_bias:
            return 0
        return 2 * self.config.expert_intermediate_size + self.config.hidden_size

    @property
    def expert_params(self) -> int:
        return self.expert_matrix_params + self.expert_bias_params

    @property
    def embedding_params(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def nonexpert_params(self) -> int:
        own_table = 0 if self.config.tie_word_embeddings else self.embedding_params
        return own_table + sum(self._segment_params()) + self._head_params()

    @property
    def total_params(self) -> int:
        experts = len(self.config.moe_layer_ids) * self.config.num_experts
        return self.nonexpert_params + experts * self.expert_params

    def active_params(self, input_embedding: bool = True) -> int:
        """Parameters that one token uses; a tied embedding is the lm_head and always counts."""
        experts = len(self.config.moe_layer_ids) * self.config.num_experts_per_tok
        active = self.nonexpert_params + experts * self.expert_params
        if input_embedding or self.config.tie_word_embeddings:
            return active
        return active - self.embedding_params

    def expert_bytes(self, expert_dtype: str) -> int:
        """Bytes of one expert, rounded up; biases keep 16 bits under quantisation."""
        if expert_dtype not in EXPERT_DTYPE_BITS:
            raise unknown_name("expert dtype", expert_dtype, list(EXPERT_DTYPE_BITS))
        bits = Fraction(EXPERT_DTYPE_BITS[expert_dtype])
        bias_bits = max(bits, Fraction(16))
        return ceil((self.expert_matrix_params * bits + self.expert_bias_params * bias_bits) / 8)

    def geometry(self, expert_dtype: str | None = None) -> Geometry:
        """The geometry with experts at a dtype of EXPERT_DTYPE_BITS, or at the checkpoint's.

        Raises UserError for an unknown dtype.
        """
        dtype = expert_dtype or self.expert_dtype
        layers = len(self.config.moe_layer_ids)
        return Geometry(
            name=self.name,
            revision=self.revision,
            num_layers=self.config.num_hidden_layers,
            model_layer_ids=self.config.moe_layer_ids,
            num_experts=self.config.num_experts,
            top_k=self.config.num_experts_per_tok,
            hidden_size=self.config.hidden_size,
            vocab_size=self.config.vocab_size,
            expert_params=self.expert_params,
            expert_dtype=dtype,
            expert_bytes_by_layer=(self.expert_bytes(dtype),) * layers,
            nonexpert_bytes=self.nonexpert_params * _NONEXPERT_BYTES,
            segment_bytes_by_layer=tuple(n * _NONEXPERT_BYTES for n in self._segment_params()),
            head_bytes=self._head_params() * _NONEXPERT_BYTES,
            kv_bytes_per_token=self._kv_values_per_token() * _KV_BYTES,
            shared_experts=self.architecture.shared_experts,
        )

    def _segment_params(self) -> list[int]:
        """Parameters from after the experts of MoE layer l-1 up to the gate of l, [L]."""
        ids = self.config.moe_layer_ids
        shared = self._shared_params()
        late = self.architecture.shared_experts == "after_gate"
        segments = []
        for previous, layer in zip((-1, *ids), ids, strict=False):
            dense_between = layer - previous - 1
            shared_run_here = shared if not late or previous >= 0 else 0
            segments.append(
                dense_between * self._dense_layer_params()
                + self._attention_and_norms_params()
                + self._router_params()
                + shared_run_here
            )
        return segments

    def _head_params(self) -> int:
        """Parameters read after the last MoE layer's experts."""
        rest = self.config.num_hidden_layers - 1 - self.config.moe_layer_ids[-1]
        late = self.architecture.shared_experts == "after_gate"
        bias = self.config.vocab_size if self.config.lm_head_bias else 0
        return (
            (self._shared_params() if late else 0)
            + rest * self._dense_layer_params()
            + self._norm_params()
            + self.embedding_params
            + bias
        )

    def _dense_layer_params(self) -> int:
        mlp = 3 * self.config.hidden_size * self.config.intermediate_size
        return self._attention_and_norms_params() + mlp

    def _attention_and_norms_params(self) -> int:
        attention = self._mla_params() if self.config.kv_lora_rank else self._gqa_params()
        return attention + 2 * self._norm_params()

    def _gqa_params(self) -> int:
        c = self.config
        head = self._head_dim()
        queries, keys = c.num_attention_heads * head, c.num_key_value_heads * head
        weights = 2 * c.hidden_size * queries + 2 * c.hidden_size * keys
        qkv_bias = queries + 2 * keys if c.attention_bias or c.qkv_bias else 0
        output_bias = c.hidden_size if c.attention_bias else 0
        sinks = c.num_attention_heads if self.architecture.attention_sinks else 0
        qk_norm = {"none": 0, "head": 2 * head, "full": queries + keys}[self.architecture.qk_norm]
        return weights + qkv_bias + output_bias + sinks + qk_norm

    def _mla_params(self) -> int:
        c = self.config
        assert c.kv_lora_rank
        assert c.qk_nope_head_dim
        assert c.qk_rope_head_dim
        assert c.v_head_dim
        heads = c.num_attention_heads
        queries = heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        rank = c.q_lora_rank
        query = rank * (c.hidden_size + 1 + queries) if rank else c.hidden_size * queries
        compress = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
        expand = c.kv_lora_rank * heads * (c.qk_nope_head_dim + c.v_head_dim)
        return query + compress + expand + heads * c.v_head_dim * c.hidden_size

    def _norm_params(self) -> int:
        return self.config.hidden_size * (2 if self.architecture.norm_bias else 1)

    def _router_params(self) -> int:
        bias = self.config.num_experts if self.architecture.router_bias else 0
        return self.config.num_experts * self.config.hidden_size + bias

    def _shared_params(self) -> int:
        gate = self.config.hidden_size if self.architecture.shared_expert_gate else 0
        return 3 * self.config.hidden_size * self.config.shared_intermediate_size + gate

    def _head_dim(self) -> int:
        return self.config.head_dim or self.config.hidden_size // self.config.num_attention_heads

    def _kv_values_per_token(self) -> int:
        c = self.config
        if self.architecture.kv_cache == "keys_values":
            return c.num_hidden_layers * 2 * c.num_key_value_heads * self._head_dim()
        assert c.kv_lora_rank
        assert c.qk_nope_head_dim
        assert c.qk_rope_head_dim
        assert c.v_head_dim
        if self.architecture.kv_cache == "mla_latent":
            return c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
        widths = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
        return c.num_hidden_layers * c.num_attention_heads * widths


def list_models() -> list[str]:
    """Names of the shipped models, sorted."""
    return names_in("models")


def load_model_config(name_or_path: str | os.PathLike[str]) -> ModelConfig:
    """A shipped model by name, or a user's YAML file of the same form.

    Raises UserError for an unknown name and for a file that is missing or wrong.
    """
    return read_yaml(ModelConfig, find(name_or_path, "models", "model"))


def load_geometry(
    name_or_path: str | os.PathLike[str], expert_dtype: str | None = None
) -> Geometry:
    """Geometry of a shipped model or a user's YAML file, experts at a dtype of EXPERT_DTYPE_BITS.

    Without `expert_dtype` the published checkpoint's is taken (MXFP4 for gpt-oss, else bf16).
    Raises UserError for an unknown name or dtype and for a file that is missing or wrong.

    >>> load_geometry("olmoe-1b-7b").expert_bytes_by_layer[0]
    12582912
    """
    return load_model_config(name_or_path).geometry(expert_dtype)
