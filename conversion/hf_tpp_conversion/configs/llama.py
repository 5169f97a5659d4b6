"""Llama, Mistral, Qwen2/2.5/3, StarCoder2, Phi-3: config.json <-> `Architecture`."""

from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.decoder import ACTIVATIONS, decoder_from_config, decoder_to_config, qwen_window
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture

__all__ = [
    "llama_from_config",
    "llama_to_config",
    "mistral_from_config",
    "phi3_from_config",
    "phi3_to_config",
    "qwen2_from_config",
    "qwen2_to_config",
    "qwen3_from_config",
    "starcoder2_from_config",
    "starcoder2_to_config",
]

_PHI3_PADDING = 32000


def llama_from_config(config: Settings) -> Architecture:
    """Llama 2 and 3.

    Raises:
        UnsupportedModelError: Biases on the attention alone.
    """
    attention, mlp = config.flag("attention_bias"), config.flag("mlp_bias")
    if attention != mlp:
        raise UnsupportedModelError(
            f"{config.where} has attention_bias={attention} and mlp_bias={mlp}: Megatron has biases "
            f"on all linears or none"
        )
    return decoder_from_config(config, linear_bias=attention, qkv_bias=attention)


def llama_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `llama_from_config` and, with a window, of `mistral_from_config`."""
    biases = {"attention_bias": model.linear_bias, "mlp_bias": model.linear_bias} if model.linear_bias else {}
    return decoder_to_config(model) | biases


def mistral_from_config(config: Settings) -> Architecture:
    """Mistral: a window on every layer; without an entry it is 4096."""
    window = config.get("sliding_window") if "sliding_window" in config.values else 4096
    return decoder_from_config(config, window=window)


def qwen2_from_config(config: Settings) -> Architecture:
    """Qwen2 and Qwen2.5: biases on query, key and value."""
    return decoder_from_config(config, qkv_bias=True, window=qwen_window(config, config.integer("num_hidden_layers")))


def qwen2_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `qwen2_from_config` and `qwen3_from_config`."""
    windowed = {
        "use_sliding_window": model.window is not None,
        "max_window_layers": 0 if model.window else model.num_layers,
    }
    return decoder_to_config(model) | windowed


def qwen3_from_config(config: Settings) -> Architecture:
    """Qwen3: norms on queries and keys."""
    config.require("attention_bias", False, "Megatron's biases would also lie on the MLP")
    window = qwen_window(config, config.integer("num_hidden_layers"))
    head = config.integer("head_dim", 128)
    return decoder_from_config(config, qk_norm=True, kv_channels=head, window=window)


def starcoder2_from_config(config: Settings) -> Architecture:
    """StarCoder2: LayerNorm, biases, a plain MLP."""
    bias = config.flag("use_bias", True)
    return decoder_from_config(
        config,
        normalization="LayerNorm",
        norm_epsilon=config.number("norm_epsilon", 1e-5),
        activation=ACTIVATIONS.get(config.text("hidden_act", "gelu_pytorch_tanh"), ""),
        gated=False,
        linear_bias=bias,
        qkv_bias=bias,
        tied=config.flag("tie_word_embeddings", True),
        window=config.get("sliding_window"),
    )


def starcoder2_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `starcoder2_from_config`."""
    return decoder_to_config(model) | {"use_bias": model.linear_bias, "norm_epsilon": model.norm_epsilon}


def phi3_from_config(config: Settings) -> Architecture:
    """Phi-3 and Phi-4."""
    return decoder_from_config(
        config, window=config.get("sliding_window"), norm_epsilon=config.number("rms_norm_eps", 1e-5)
    )


def phi3_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `phi3_from_config`."""
    padding = {} if model.vocab_size > _PHI3_PADDING else {"pad_token_id": None}  # transformers' default lies outside
    positions = {"original_max_position_embeddings": model.max_position_embeddings}
    return decoder_to_config(model) | positions | padding
