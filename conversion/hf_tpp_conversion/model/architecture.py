"""The description of a model that both sides share, in Megatron's terms: sizes and switches, checked once, here."""

import math
from dataclasses import dataclass, fields

from hf_tpp.errors import UnsupportedModelError

__all__ = ["Architecture", "Experts"]

_LIMITS = {
    "num_layers": 10_000,
    "hidden_size": 1_000_000,
    "num_attention_heads": 100_000,
    "num_query_groups": 100_000,
    "kv_channels": 100_000,
    "ffn_hidden_size": 10_000_000,
    "vocab_size": 100_000_000,
    "max_position_embeddings": 1_000_000_000,
}
_CHOICES = {
    "position_embedding": ("learned_absolute", "rope"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "activation": ("gelu", "gelu_tanh", "silu", "relu"),
}


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts.

    Attributes:
        num_experts: Per layer.
        ffn_hidden_size: Neurons of one expert.
        top_k: Experts per token.
        renormalize: The chosen probabilities are scaled to add up to 1.
        shared_ffn_hidden_size: Neurons of the expert that sees every token; 0: there is none.
        shared_gate: The shared expert has a gate.
        aux_loss: Coefficient of the loss that balances the experts.
    """

    num_experts: int
    ffn_hidden_size: int
    top_k: int
    renormalize: bool = True
    shared_ffn_hidden_size: int = 0
    shared_gate: bool = False
    aux_loss: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder-only model.

    Attributes:
        num_layers: Layers.
        hidden_size: Hidden channels.
        num_attention_heads: Query heads.
        num_query_groups: Key/value heads.
        kv_channels: Channels of a head.
        ffn_hidden_size: Neurons of the MLP.
        vocab_size: Vocabulary entries without padding.
        max_position_embeddings: Longest sequence, in tokens.
        position_embedding: "learned_absolute" or "rope" (halves, not interleaved).
        rotary_base: Base of the rotary frequencies.
        rotary_percent: Share of a head's channels that is rotated.
        llama3_factor: Llama 3's scaling of the frequencies by this factor (with its constants 1, 4, 8192), or None.
        linear_factor: Positions divided by this factor, or None.
        normalization: "LayerNorm" (with bias) or "RMSNorm".
        norm_epsilon: Its epsilon.
        activation: "gelu" (erf), "gelu_tanh", "silu" or "relu".
        gated: The MLP multiplies by a gate (SwiGLU).
        linear_bias: All linears have biases.
        qkv_bias: The query/key/value linear has one.
        tied: Embedding and head are one weight.
        qk_norm: Queries and keys are normalized per head.
        window: Tokens that a token sees, itself included; None: all before it.
        experts: Mixture of experts, or None.
        moe_layers: Whether each layer has experts; empty: all or none.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    position_embedding: str = "rope"
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    llama3_factor: float | None = None
    linear_factor: float | None = None
    normalization: str = "RMSNorm"
    norm_epsilon: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    linear_bias: bool = False
    qkv_bias: bool = False
    tied: bool = False
    qk_norm: bool = False
    window: int | None = None
    experts: Experts | None = None
    moe_layers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        """Check every size: they come from files that nobody vouches for.

        Raises:
            UnsupportedModelError: A size that no model has, or sizes that do not fit together.
        """
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= limit:
                raise UnsupportedModelError(f"{name}={str(value)[:40]!r} is no size of a model: 1 to {limit} are")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UnsupportedModelError(f"{name}={str(getattr(self, name))[:40]!r} is not one of {choices}")
        if self.num_attention_heads % self.num_query_groups:
            raise UnsupportedModelError(
                f"{self.num_attention_heads} heads do not form {self.num_query_groups} equal groups: "
                f"fix the configuration"
            )
        if not (math.isfinite(self.norm_epsilon) and math.isfinite(self.rotary_base) and self.rotary_base > 0):
            raise UnsupportedModelError("norm_epsilon and rotary_base must be finite numbers")
        if self.moe_layers and len(self.moe_layers) != self.num_layers:
            raise UnsupportedModelError(f"moe_layers lists {len(self.moe_layers)} layers of {self.num_layers}")

    def has_experts(self, layer: int) -> bool:
        """Whether `layer` has a mixture of experts."""
        return self.experts is not None and (not self.moe_layers or self.moe_layers[layer])

    @property
    def is_mixed(self) -> bool:
        """Whether some layers have experts and others have not."""
        return len({self.has_experts(layer) for layer in range(self.num_layers)}) == 2

    @property
    def qkv_size(self) -> int:
        """Rows of the fused query/key/value matrix."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    def differences(self, other: "Architecture") -> list[str]:
        """Fields in which two descriptions differ, as text."""
        return [
            f"{field.name}: {getattr(self, field.name)} and {getattr(other, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]
