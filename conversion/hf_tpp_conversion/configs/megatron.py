"""Megatron's args (an argparse.Namespace in every checkpoint) <-> `Architecture`.

Only plain values are read, each with its type and range; no path among the args is ever opened. Names that changed
with Megatron's versions are read in both forms and written in both.
"""

from collections.abc import Mapping
from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.megatron_args import WHERE, MegatronArgs
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture, Experts

__all__ = ["architecture_from_args", "architecture_to_args"]


def architecture_from_args(values: Mapping[str, Any]) -> Architecture:
    """The model that the args describe.

    Raises:
        UnsupportedModelError: Something that no family here has, or missing entries (the message names the flag).
    """
    args = MegatronArgs(values, WHERE)
    _refuse(args)
    heads, hidden = args.integer("num_attention_heads"), args.integer("hidden_size")
    gated, linear_bias = args.flag("swiglu"), args.flag("add_bias_linear", True)
    groups = args.integer("num_query_groups", heads) if args.flag("group_query_attention") else heads
    layers = args.integer("num_layers")
    experts = _experts(args)
    positions = args.text("position_embedding_type", "learned_absolute")
    return Architecture(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=args.integer("kv_channels", hidden // max(1, heads)),
        ffn_hidden_size=args.integer("ffn_hidden_size", 4 * hidden),
        vocab_size=args.integer("vocab_size", args.get("padded_vocab_size")),
        max_position_embeddings=args.integer("max_position_embeddings", args.get("seq_length")),
        position_embedding=positions,
        **(_rotary(args) if positions == "rope" else {}),
        normalization=args.text("normalization", "LayerNorm"),
        norm_epsilon=args.number("layernorm_epsilon", args.number("norm_epsilon", 1e-5)),
        activation="silu" if gated else _gelu(args, linear_bias),
        gated=gated,
        linear_bias=linear_bias,
        qkv_bias=linear_bias or args.flag("add_qkv_bias"),
        tied=not args.flag("untie_embeddings_and_output_weights"),
        qk_norm=args.flag("qk_layernorm"),
        window=_window(args),
        experts=experts,
        moe_layers=_moe_layers(args, layers) if experts else (),
    )


def _refuse(args: Settings) -> None:
    """What would be lost without a word.

    Raises:
        UnsupportedModelError: Such a thing.
    """
    for name in ("layernorm_zero_centered_gamma", "apply_layernorm_1p", "multi_latent_attention", "rotary_interleaved"):
        args.require(name, False, "no family of Hugging Face models that is converted has it")
    args.require("squared_relu", False, "no family of Hugging Face models that is converted has this activation")
    args.require("mtp_num_layers", None, "multi-token prediction is not converted")
    if args.get("num_layers") is not None:
        args.require("encoder_num_layers", args.get("num_layers"), "only decoder-only models are converted")


def _rotary(args: Settings) -> dict[str, Any]:
    linear = args.get("rotary_seq_len_interpolation_factor")
    return {
        "rotary_base": args.number("rotary_base", 10000.0),
        "rotary_percent": args.number("rotary_percent", 1.0),
        "llama3_factor": args.number("rope_scaling_factor", 8.0) if args.flag("use_rope_scaling") else None,
        "linear_factor": None if linear is None else float(linear),
    }


def _gelu(args: Settings, linear_bias: bool) -> str:
    """Megatron's fused gelu, its default with biases, is the tanh approximation; the unfused one is exact."""
    fused = linear_bias and args.flag("bias_gelu_fusion", True)
    return "gelu_tanh" if fused or args.flag("openai_gelu") else "gelu"


def _window(args: Settings) -> int | None:
    """Megatron counts the tokens to the left, Hugging Face the token itself as well."""
    window = args.get("window_size")
    if window is None or window == () or window == []:
        return None
    args.require("window_attn_skip_freq", None, "only a window on every layer is converted")
    if not isinstance(window, (tuple, list)) or len(window) != 2 or type(window[0]) is not int or window[1] != 0:
        raise UnsupportedModelError(f"{WHERE} have window_size={ascii(window)[:40]}: (tokens, 0) is understood")
    return window[0] + 1 if window[0] >= 0 else None


def _experts(args: Settings) -> Experts | None:
    count = args.get("num_experts")
    if count is None:
        return None
    args.require("moe_router_score_function", "softmax", "Hugging Face's routers take the softmax")
    shared = args.get("moe_shared_expert_intermediate_size")
    # softmax over the chosen experts' scores = softmax over all, then scaled to add up to 1
    return Experts(
        args.integer("num_experts"),
        args.integer("moe_ffn_hidden_size", args.integer("ffn_hidden_size")),
        args.integer("moe_router_topk", 2),
        renormalize=not args.flag("moe_router_pre_softmax"),
        shared_ffn_hidden_size=0 if shared is None else args.integer("moe_shared_expert_intermediate_size"),
        shared_gate=shared is not None and args.flag("moe_shared_expert_gate"),
        aux_loss=args.number("moe_aux_loss_coeff", 0.0),
    )


def _moe_layers(args: Settings, layers: int) -> tuple[bool, ...]:
    """Which layers have experts: every n-th, or a list of 0 and 1."""
    frequency = args.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        frequency = [int(layer % max(1, frequency) == 0) for layer in range(layers)]
    if not isinstance(frequency, (list, tuple)) or len(frequency) != layers:
        raise UnsupportedModelError(f"{WHERE} have moe_layer_freq={ascii(frequency)[:60]} for {layers} layers")
    return () if all(frequency) else tuple(bool(value) for value in frequency)


def architecture_to_args(model: Architecture) -> dict[str, Any]:
    """The inverse of `architecture_from_args`."""
    is_grouped = model.num_query_groups != model.num_attention_heads
    window = None if model.window is None else (model.window - 1, 0)
    args: dict[str, Any] = {
        "num_layers": model.num_layers,
        "encoder_num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "group_query_attention": is_grouped,
        "num_query_groups": model.num_query_groups if is_grouped else 1,  # Megatron's own value without groups
        "kv_channels": model.kv_channels,
        "ffn_hidden_size": model.ffn_hidden_size,
        "vocab_size": model.vocab_size,
        "seq_length": model.max_position_embeddings,
        "encoder_seq_length": model.max_position_embeddings,
        "max_position_embeddings": model.max_position_embeddings,
        "position_embedding_type": model.position_embedding,
        "add_position_embedding": model.position_embedding == "learned_absolute",
        "use_rotary_position_embeddings": model.position_embedding == "rope",
        "rotary_base": int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "rotary_interleaved": False,
        "use_rope_scaling": model.llama3_factor is not None,
        "rope_scaling_factor": 8.0 if model.llama3_factor is None else model.llama3_factor,
        "rotary_seq_len_interpolation_factor": model.linear_factor,
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "norm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": False,
        "apply_layernorm_1p": False,
        "swiglu": model.gated,
        "bias_gelu_fusion": model.activation == "gelu_tanh" and model.linear_bias,
        "openai_gelu": False,  # Megatron-Core does not look at it; the args of older checkpoints may have it
        "add_bias_linear": model.linear_bias,
        "add_qkv_bias": model.qkv_bias and not model.linear_bias,
        "untie_embeddings_and_output_weights": not model.tied,
        "qk_layernorm": model.qk_norm,
        "window_size": window,
        "num_experts": None,
        "attention_softmax_in_fp32": False,
        "apply_query_key_layer_scaling": False,
    }
    return args | _experts_to_args(model)


def _experts_to_args(model: Architecture) -> dict[str, Any]:
    experts = model.experts
    if experts is None:
        return {}
    shared = experts.shared_ffn_hidden_size
    return {
        "num_experts": experts.num_experts,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.top_k,
        "moe_router_pre_softmax": not experts.renormalize,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.aux_loss,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_shared_expert_gate": experts.shared_gate,
        "moe_layer_freq": [int(value) for value in model.moe_layers] if model.moe_layers else 1,
    }
