"""Mixtral, Qwen2-MoE and Qwen3-MoE: config.json <-> `Architecture`."""

from typing import Any

from hf_tpp_conversion.configs.decoder import decoder_from_config, decoder_to_config, qwen_window
from hf_tpp_conversion.configs.llama import qwen2_to_config
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture, Experts

__all__ = ["mixtral_from_config", "mixtral_to_config", "qwen_moe_from_config", "qwen_moe_to_config"]


def mixtral_from_config(config: Settings) -> Architecture:
    """Mixtral."""
    experts = Experts(
        config.integer("num_local_experts", 8),
        config.integer("intermediate_size"),
        config.integer("num_experts_per_tok", 2),
        aux_loss=config.number("router_aux_loss_coef", 0.001),
    )
    return decoder_from_config(config, window=config.get("sliding_window"), experts=experts)


def mixtral_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `mixtral_from_config`."""
    experts = model.experts or Experts(1, 1, 1)
    return decoder_to_config(model) | {
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.top_k,
        "router_aux_loss_coef": experts.aux_loss,
        "intermediate_size": experts.ffn_hidden_size,
    }


def qwen_moe_from_config(config: Settings) -> Architecture:
    """Qwen2-MoE (biases, a shared expert) and Qwen3-MoE (norms on queries and keys)."""
    is_qwen2 = config.text("model_type") == "qwen2_moe"
    config.require("attention_bias", False, "Megatron's biases would also lie on the MLP")
    layers = config.integer("num_hidden_layers")
    step, dense = config.integer("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    sparse = tuple(layer not in dense and step > 0 and (layer + 1) % step == 0 for layer in range(layers))
    experts = Experts(
        config.integer("num_experts", config.get("num_local_experts", 60 if is_qwen2 else 128)),
        config.integer("moe_intermediate_size"),
        config.integer("num_experts_per_tok"),
        renormalize=config.flag("norm_topk_prob", False),
        shared_ffn_hidden_size=config.integer("shared_expert_intermediate_size") if is_qwen2 else 0,
        shared_gate=is_qwen2,
        aux_loss=config.number("router_aux_loss_coef", 0.001),
    )
    return decoder_from_config(
        config,
        qkv_bias=is_qwen2 and config.flag("qkv_bias", True),
        qk_norm=not is_qwen2,
        window=qwen_window(config, layers),
        experts=experts if any(sparse) else None,
        moe_layers=() if all(sparse) or not any(sparse) else sparse,
    )


def qwen_moe_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse of `qwen_moe_from_config`."""
    experts = model.experts or Experts(1, 1, 1)
    shared = {"shared_expert_intermediate_size": experts.shared_ffn_hidden_size} if experts.shared_gate else {}
    dense = [layer for layer in range(model.num_layers) if not model.has_experts(layer)]
    return (
        qwen2_to_config(model)
        | shared
        | {
            "num_experts": experts.num_experts,
            "moe_intermediate_size": experts.ffn_hidden_size,
            "num_experts_per_tok": experts.top_k,
            "norm_topk_prob": experts.renormalize,
            "router_aux_loss_coef": experts.aux_loss,
            "mlp_only_layers": dense,
            "decoder_sparse_step": 1,
        }
    )
