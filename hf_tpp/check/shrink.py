"""A configuration of the same family, small enough to be checked on a CPU in seconds.

Rules go by attribute name and keep what a split depends on: several heads per group, several groups, an expert count
that tp divides, every kind of layer once. Sizes that must fit together are derived from one another:

    hidden = heads x head_dim          query heads : key/value heads stays "all", "one" or "some"
    qk_head_dim = qk_nope + qk_rope    mamba heads x mamba head size = expand x hidden

    layers     d d s s s s s s          d: dense, s: sparse; f: full, w: sliding window
    types      f w w w f w w w
    kept       ^ ^ ^   ^                one of each kind, in order: at least 4, at most 8
"""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

__all__ = ["num_layers", "shrink", "small_default"]

HIDDEN, HEADS, HEAD_SIZE = 64, 4, 16
MIN_LAYERS, MAX_LAYERS = 4, 8

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_LEADING_LAYERS = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads")
_QUERY_HEADS = ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads", "swa_num_attention_heads")

_STATE_HEADS = (
    ("mamba_n_heads", "mamba_d_head"),
    ("n_mamba_heads", "mamba_headdim"),
    ("mamba_num_heads", "mamba_head_dim"),
)

_SIZES: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "embedding_dim", "word_embed_proj_dim", "lru_width", "emb_dim"), HIDDEN
    ),
    **dict.fromkeys(_QUERY_HEADS, HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("adapter_in_dim", "adapter_input_size", "adapter_out_dim"), HIDDEN),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), MIN_LAYERS),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_inner"), 128),
    **dict.fromkeys(("num_query_groups", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels", "linear_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "v_head_dim", "index_head_dim"), HEAD_SIZE),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "index_topk"), 8),
    **dict.fromkeys(("linear_num_key_heads", "index_n_heads", "o_groups"), 2),
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "dff", "dim_ff"), 128),
    "expert_ffn_hidden_size": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("zero_expert_num", "split_ngram_parts", "position_bias_num_buckets"), 4),
    **dict.fromkeys(("moe_topk", "moe_k", "num_experts_per_tok", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "num_expert_group", "n_groups", "mamba_n_groups", "mamba_ngroups"), 2),
    **dict.fromkeys(("topk_group", "index_local_blocks", "n_layers_per_attn_res_block"), 1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size", "decoder_vocab_size"), 130),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("model_max_length", "position_bias_max_distance", "log_scaling_n_floor"), 64),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_window_size"), 8),
    **dict.fromkeys(("window_size", "attention_chunk_size", "rel_extent", "index_block_size"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size"), 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank"), 4),
    **dict.fromkeys(("hidden_size_per_layer_input", "laurel_rank", "router_hidden_size", "adapter_rank"), 16),
    **dict.fromkeys(("ple_embed_dim", "hc_lowrank", "dim_model_base"), 16),
    **dict.fromkeys(("ngram_vocab_size_base", "make_ngram_vocab_size_divisible_by", "query_pre_attn_scalar"), 16),
    **dict.fromkeys(("prompt_length", "prompt_types", "segment_types"), 4),
    **dict.fromkeys(("floor_scale", "keep_window_size", "max_inference_chunksize"), 8),
}
"""Size attribute -> its small value; only ever lowered."""
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small configuration of the same class, without dropout.

    Args:
        config: Any configuration, for instance the default one of a family or that of a checkpoint; not changed.

    Returns:
        The small one. That a model can be built from it is likely, not certain: families may tie sizes together in ways
        of their own.
    """
    return _shrink(config, shrink)


def small_default(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small configuration in place of a family's default one, which for some families builds no model at all.

    Args:
        config: A default configuration; its text part may be of another family.

    Returns:
        The values of `tiny_configs.json`, else what `shrink` makes of it.
    """
    given = _given_configs().get(config.model_type)
    return _shrink(config, small_default) if given is None else type(config).from_dict(dict(given))


@cache
def _given_configs() -> dict[str, dict[str, Any]]:
    """Families whose default configuration builds no model, or one without some kind of layer: model_type -> values."""
    values: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("tiny_configs.json").read_text())
    return values


def _shrink(config: PreTrainedConfig, shrink_part: Callable[[PreTrainedConfig], PreTrainedConfig]) -> PreTrainedConfig:
    values = _plain_values(config)
    parts = {name: shrink_part(part) for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)}
    small = _shrink_layers({name: value for name, value in values.items() if name not in parts})
    before = dict(small)
    for name, value in before.items():
        small[name] = _small_value(name, value, before)
    _tie_sizes_together(small, before)
    small |= {name: _plain_values(part) for name, part in parts.items()}
    result = type(config).from_dict(small)
    result.name_or_path = config.name_or_path
    result.pad_token_id = getattr(result, "pad_token_id", None)  # StableLM of transformers 5.0 reads it and has none
    return result


def _plain_values(config: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = copy.deepcopy(config.to_dict())
    for name in ("transformers_version", "architectures", "dtype", "torch_dtype"):
        values.pop(name, None)
    return values


def _small_value(name: str, value: Any, values: dict[str, Any]) -> Any:
    """The small value of one attribute; what no rule knows stays as it is."""
    if name in _TOKENS and value is not None:
        return _TOKENS[name]
    if name.endswith("_token_id") and isinstance(value, int):
        return 3
    if isinstance(value, float) and ("drop" in name or name.endswith("jitter_noise")):
        return 0.0
    if name == "use_mamba_kernels":
        return False  # there are none for the CPU
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name in _KV_HEADS:
        heads = next((values[key] for key in _QUERY_HEADS if isinstance(values.get(key), int)), value)
        return HEADS if value == heads else min(value, 2)
    if "intermediate_size" in name:
        return min(value, 32 if "moe" in name or "shared" in name else 128)
    return min(value, _SIZES.get(name, value))


def _tie_sizes_together(small: dict[str, Any], before: dict[str, Any]) -> None:
    """Sizes that are functions of others, by the relation that held before."""
    hidden = next((small[key] for key in ("hidden_size", "d_model", "n_embd", "embedding_dim") if key in small), HIDDEN)
    if isinstance(small.get("qk_nope_head_dim"), int) and isinstance(small.get("qk_rope_head_dim"), int):
        small["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
        if before.get("head_dim") == before["qk_rope_head_dim"]:
            small["head_dim"] = small["qk_rope_head_dim"]
    elif isinstance(small.get("rotary_dim"), int) and isinstance(small.get("head_dim"), int):
        small["rotary_dim"] = min(small["rotary_dim"], small["head_dim"])
    inner = hidden * int(small.get("mamba_expand") or small.get("expand") or 2)
    for heads, size in _STATE_HEADS:
        if isinstance(small.get(heads), int) and isinstance(small.get(size), int):
            small[heads], small[size] = inner // HEAD_SIZE, HEAD_SIZE
    if "expand" in small and "head_dim" in small and "num_attention_heads" not in small:
        small["num_heads"] = inner // small["head_dim"]
    if isinstance(small.get("mamba_d_ssm"), int):
        small["mamba_d_ssm"] = inner
    if isinstance(small.get("attention_hidden_size"), int):
        small["attention_hidden_size"] = round(before["attention_hidden_size"] / before["hidden_size"]) * hidden
    if isinstance(small.get("attention_head_dim"), int):
        small["attention_head_dim"] = small.get("attention_hidden_size", hidden) // small["num_attention_heads"]
    if isinstance(small.get("attn_layer_period"), int) and small["attn_layer_period"] > MIN_LAYERS:
        small["attn_layer_period"], small["attn_layer_offset"] = 2, 1


def _shrink_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Keep a few layers of every kind, in all attributes that say something about single layers."""
    count_name = next((name for name in _LAYER_COUNTS if isinstance(values.get(name), int)), None)
    if count_name is None:
        return dict(values)
    num_layers: int = values[count_name]
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == num_layers and num_layers > 2}
    kept = _representatives(num_layers, lists, values)
    if not lists and len(kept) < MIN_LAYERS:
        kept += [kept[-1]] * (MIN_LAYERS - len(kept))
    result = dict(values)
    for name in _LAYER_COUNTS:
        if values.get(name) == num_layers:
            result[name] = len(kept)
    for name, entries in lists.items():
        result[name] = [entries[index] for index in kept]
    for name, value in values.items():
        if name in _LEADING_LAYERS and isinstance(value, int):
            result[name] = sum(index < value for index in kept)
        elif name == "attention_types" and "attention_layers" in result:  # GPT-Neo says the same thing twice
            result[name] = [[[kind], 1] for kind in result["attention_layers"]]
        elif name == "moe_layer_end_index" and value != -1:
            result[name] = max(sum(index <= value for index in kept) - 1, 0)
        elif name not in lists and _is_index_list(name, value, num_layers):
            result[name] = [position for position, index in enumerate(kept) if index in value]
        elif name == "per_layer_config" and value:
            result[name] = {str(p): value[key] for p, index in enumerate(kept) for key in value if int(key) == index}
    return result


def _is_index_list(name: str, value: Any, num_layers: int) -> bool:
    named = name.endswith(("_layers", "_ids", "_idxs")) and "token" not in name
    return named and isinstance(value, list) and all(type(index) is int and 0 <= index < num_layers for index in value)


def _representatives(num_layers: int, lists: dict[str, list[Any]], values: dict[str, Any]) -> list[int]:
    """Indices of the layers to keep: the first of each kind, and further ones in order."""
    kinds: dict[str, list[int]] = {}
    for index in range(num_layers):
        facts = [str(entries[index]) for entries in lists.values()]
        facts += [str(index < values[name]) for name in _LEADING_LAYERS if isinstance(values.get(name), int)]
        facts += [str(index in v) for k, v in values.items() if k not in lists and _is_index_list(k, v, num_layers)]
        kinds.setdefault(str(facts), []).append(index)
    kept = sorted(members[0] for members in kinds.values())[:MAX_LAYERS]
    wanted = min(num_layers, max(MIN_LAYERS, len(kept)))
    spare = [index for index in range(num_layers) if index not in kept]
    return sorted([*kept, *spare[: wanted - len(kept)]])


def num_layers(config: PreTrainedConfig) -> int:
    """Blocks of the (text) model that a configuration describes; 0 if it does not say."""
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in _LAYER_COUNTS)
    return next((count for count in counts if isinstance(count, int)), 0)
