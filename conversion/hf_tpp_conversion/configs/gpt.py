"""GPT-2 and GPT-NeoX: config.json <-> `Architecture`."""

from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.rotary import rotary_from_config, rotary_to_config
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture

__all__ = ["gpt2_from_config", "gpt2_to_config", "gpt_neox_from_config", "gpt_neox_to_config"]

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu"}


def _activation(config: Settings, name: str, default: str) -> str:
    """The activation of the MLP.

    Raises:
        UnsupportedModelError: One that Megatron does not have.
    """
    value = config.text(name, default)
    if value not in _ACTIVATIONS:
        raise UnsupportedModelError(
            f"{config.where} has the activation {value[:40]!r}: use one of {list(_ACTIVATIONS)}"
        )
    return _ACTIVATIONS[value]


def gpt2_from_config(config: Settings) -> Architecture:
    """GPT-2."""
    config.require("scale_attn_weights", True, "Megatron always scales attention by the square root of the head size")
    config.require("scale_attn_by_inverse_layer_idx", False, "Megatron has no such scale")
    config.require("add_cross_attention", False, "this is no decoder-only model")
    heads, hidden = config.integer("n_head", 12), config.integer("n_embd", 768)
    return Architecture(
        num_layers=config.integer("n_layer", 12),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // max(1, heads),
        ffn_hidden_size=config.integer("n_inner", 4 * hidden),
        vocab_size=config.integer("vocab_size", 50257),
        max_position_embeddings=config.integer("n_positions", 1024),
        position_embedding="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=config.number("layer_norm_epsilon", 1e-5),
        activation=_activation(config, "activation_function", "gelu_new"),
        gated=False,
        linear_bias=True,
        qkv_bias=True,
        tied=config.flag("tie_word_embeddings", True),
    )


def gpt2_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `gpt2_from_config`."""
    return {
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_head": model.num_attention_heads,
        "n_inner": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "n_positions": model.max_position_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": _ACTIVATION_NAMES.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied,
    }


def gpt_neox_from_config(config: Settings) -> Architecture:
    """GPT-NeoX without its parallel residual, which Megatron's GPT does not have."""
    if config.flag("use_parallel_residual", True):
        raise UnsupportedModelError(
            f"{config.where} has use_parallel_residual=True (attention and MLP side by side, as Pythia): Megatron's "
            f"GPT has them one after the other, so this model cannot be represented"
        )
    config.require("attention_bias", True, "Megatron has biases on all linears or none")
    heads, hidden = config.integer("num_attention_heads", 64), config.integer("hidden_size", 6144)
    rotary = rotary_from_config(
        Settings({"rotary_pct": 0.25, "rotary_emb_base": 10000.0} | dict(config.values), config.where)
    )
    return Architecture(
        num_layers=config.integer("num_hidden_layers", 44),
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // max(1, heads),
        ffn_hidden_size=config.integer("intermediate_size", 24576),
        vocab_size=config.integer("vocab_size", 50432),
        max_position_embeddings=config.integer("max_position_embeddings", 2048),
        normalization="LayerNorm",
        norm_epsilon=config.number("layer_norm_eps", 1e-5),
        activation=_activation(config, "hidden_act", "gelu"),
        gated=False,
        linear_bias=True,
        qkv_bias=True,
        tied=config.flag("tie_word_embeddings", False),
        **rotary,
    )


def gpt_neox_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `gpt_neox_from_config`."""
    rotary = rotary_to_config(model)
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "layer_norm_eps": model.norm_epsilon,
        "hidden_act": _ACTIVATION_NAMES.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied,
        "use_parallel_residual": False,
        "rotary_pct": model.rotary_percent,
        "rotary_emb_base": model.rotary_base,
        **rotary,
    }
