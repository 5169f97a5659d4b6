"""What the families after Llama have in common: config.json <-> `Architecture`."""

from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.rotary import rotary_from_config, rotary_to_config
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture

__all__ = ["ACTIVATIONS", "decoder_from_config", "decoder_to_config", "qwen_window"]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


def decoder_from_config(config: Settings, **fields: Any) -> Architecture:
    """What all of these families share."""
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    activation = config.text("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(f"{config.where} has the activation {activation[:40]!r}, Megatron has none such")
    values: dict[str, Any] = {
        "num_layers": config.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.integer("num_key_value_heads", heads),
        "kv_channels": config.integer("head_dim", hidden // max(1, heads)),
        "ffn_hidden_size": config.integer("intermediate_size"),
        "vocab_size": config.integer("vocab_size"),
        "max_position_embeddings": config.integer("max_position_embeddings"),
        "norm_epsilon": config.number("rms_norm_eps", 1e-6),
        "activation": ACTIVATIONS[activation],
        "tied": config.flag("tie_word_embeddings", False),
        **rotary_from_config(config),
    }
    return Architecture(**(values | fields))


def decoder_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `decoder_from_config`."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "intermediate_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.norm_epsilon,
        "hidden_act": {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}.get(model.activation, model.activation),
        "tie_word_embeddings": model.tied,
        "sliding_window": model.window,
        **rotary_to_config(model),
    }


def qwen_window(config: Settings, num_layers: int) -> int | None:
    """Qwen's window, if all layers have it.

    Raises:
        UnsupportedModelError: Only some have it.
    """
    if not config.flag("use_sliding_window"):
        return None
    types = config.get("layer_types")
    windowed = num_layers - min(num_layers, config.integer("max_window_layers", num_layers))
    if isinstance(types, list):
        windowed = sum(kind == "sliding_attention" for kind in types)
    if windowed == 0:
        return None
    if windowed != num_layers:
        raise UnsupportedModelError(
            f"{config.where} has a sliding window on {windowed} of {num_layers} layers: only all or none are converted"
        )
    return config.integer("sliding_window", 4096)
