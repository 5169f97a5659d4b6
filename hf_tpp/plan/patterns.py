"""The table: names that transformers gives to the parts of attention and MLP, and what they mean for cutting them.

One row serves every family that uses its names. Separate q, k, v and gate, up projections speak for themselves; a
*fused* weight does not tell its layout, so those rows name the classes that they were read from.
"""

from hf_tpp.plan.rules import Channels, Pattern

__all__ = ["HEAD_INPUTS", "PATTERNS"]

_QUERY, _KEY_VALUE, _NEURONS = Channels.QUERY_HEADS, Channels.KEY_VALUE_HEADS, Channels.NEURONS

HEAD_INPUTS = frozenset({"alibi", "position_bias"})
"""Arguments of attention with one slice per head; `attention_mask` too, when it has one row per head."""

_NORMS = {
    "q_norm": "query",
    "q_layernorm": "query",
    "query_layernorm": "query",
    "k_norm": "key",
    "k_layernorm": "key",
    "key_layernorm": "key",
    "attn_sub_norm": "row",
}

_SEPARATE = Pattern(
    kind="attention",
    rows=frozenset({"o_proj", "out_proj", "dense", "Wo", "attention_out"}),
    columns={
        "q_proj": _QUERY,
        "Wq": _QUERY,
        "project_q": _QUERY,
        "q_b_proj": _QUERY,
        "q_gate_proj": _QUERY,
        "kv_b_proj": _QUERY,
        "gate_proj": _QUERY,
        "g_proj": _QUERY,
        "r_proj": _QUERY,
        "sink_proj": _QUERY,
        "k_proj": _KEY_VALUE,
        "v_proj": _KEY_VALUE,
        "Wk": _KEY_VALUE,
        "Wv": _KEY_VALUE,
        "project_k": _KEY_VALUE,
        "project_v": _KEY_VALUE,
    },
    needs=frozenset({"q_proj", "Wq", "project_q", "q_b_proj", "q_gate_proj"}),
    inside=frozenset(
        {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm", "k_rope_only_layernorm", "indexer"}
        | {"rel_logits_proj"}
    ),
    norms=_NORMS,
    per_kv_head=frozenset({"A"}),
    mixing=frozenset({"dt_proj"}),
    per_head=frozenset({"sinks", "gate_bias", "q_l2_clip.scale", "rel_l2_clip.scale"}),
    convolutions={"k_sconv.conv1d": "key", "v_sconv.conv1d": "value"},
)

_DIFFERENTIAL = Pattern(
    kind="attention",
    rows=frozenset({"o_proj"}),
    columns={
        "q_proj": Channels.PAIRED_QUERY_HEADS,
        "k_proj": Channels.PAIRED_KEY_VALUE_HEADS,
        "v_proj": Channels.PAIRED_KEY_VALUE_HEADS,
    },
    needs=frozenset({"q_proj"}),
    inside=frozenset({"lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"}),
    only=frozenset({"DiffLlamaAttention", "DiffLlamaFlashAttention2", "DiffLlamaSdpaAttention"}),
)


def _fused(column: str, row: str, layout: Channels, *classes: str, widths: tuple[str, ...] = ()) -> Pattern:
    return Pattern(
        kind="attention",
        rows=frozenset({row}),
        columns={column: layout},
        needs=frozenset({column}),
        norms=_NORMS,
        outside=frozenset({"dense_bias"}),
        outside_inputs=frozenset({"residual"}),
        only=frozenset(classes),
        widths=frozenset(widths),
    )


_FUSED = (
    _fused("c_attn", "c_proj", Channels.QKV_BLOCKS, "GPT2Attention", "Attention"),
    _fused("c_attn", "c_proj", Channels.QKV_BLOCKS, "GPTBigCodeAttention with one key/value head"),
    _fused("c_attn", "c_proj", Channels.QKV_PER_HEAD, "GPTBigCodeAttention"),
    _fused("Wqkv", "out_proj", Channels.QKV_BLOCKS, "MptAttention"),
    _fused("Wqkv", "out_proj", Channels.QKV_BLOCKS, "DbrxAttention", widths=("hidden_size",)),
    _fused("qkv_proj", "o_proj", Channels.QKV_BLOCKS, "Phi3Attention"),
    _fused("qkv_proj", "out_proj", Channels.QVK_QUARTERS, "CodeGenAttention"),
    _fused("query_key_value", "dense", Channels.QKV_BLOCKS, "FalconAttention with one key/value head"),
    _fused("query_key_value", "dense", Channels.QKV_PER_GROUP, "FalconAttention with key/value groups"),
    _fused(
        "query_key_value",
        "dense",
        Channels.QKV_PER_HEAD,
        "BloomAttention",
        "FalconAttention",
        "GPTNeoXAttention",
        "GPTNeoXJapaneseAttention",
        "PersimmonAttention",
    ),
)

_MLP = Pattern(
    kind="MLP",
    rows=frozenset(
        {"down_proj", "c_proj", "fc2", "dense_4h_to_h", "w2", "fc_out", "output_linear", "Wo", "w_out", "2"}
    ),
    columns={
        "gate_proj": _NEURONS,
        "up_proj": _NEURONS,
        "w1": _NEURONS,
        "w3": _NEURONS,
        "c_fc": _NEURONS,
        "fc1": _NEURONS,
        "fc_in": _NEURONS,
        "dense_h_to_4h": _NEURONS,
        "0": _NEURONS,
        "w_in.w_0": _NEURONS,
        "w_in.w_1": _NEURONS,
        "gate_up_proj": Channels.TWO_HALVES,
        "input_linear": Channels.TWO_HALVES,
        "Wi": Channels.TWO_HALVES,
    },
    needs=frozenset(
        {
            "up_proj",
            "w1",
            "c_fc",
            "fc1",
            "fc_in",
            "dense_h_to_4h",
            "0",
            "w_in.w_0",
            "gate_up_proj",
            "input_linear",
            "Wi",
        }
    ),
    inside=frozenset({"act_fn", "act", "activation_fn"}),
    norms={"ffn_sub_norm": "row"},
    outside_inputs=frozenset({"residual"}),
)

_MLP_IN_BLOCK = Pattern(
    kind="MLP",
    rows=frozenset({"fc2"}),
    columns={"fc1": _NEURONS},
    needs=frozenset({"fc1"}),
    at_columns=True,
    only=frozenset({"BioGptDecoderLayer", "OPTDecoderLayer", "XGLMDecoderLayer"}),
)

_RWKV_FEED_FORWARD = Pattern(
    kind="MLP",
    rows=frozenset({"value"}),
    columns={"key": _NEURONS},
    needs=frozenset({"key"}),
    at_columns=True,
    only=frozenset({"RwkvFeedForward"}),
)

_RWKV_ATTENTION = Pattern(
    kind="MLP",
    rows=frozenset({"output"}),
    columns={"key": _NEURONS, "value": _NEURONS, "receptance": _NEURONS},
    needs=frozenset({"receptance"}),
    inside=frozenset({"time_mix_key", "time_mix_value", "time_mix_receptance"}),
    per_channel=frozenset({"time_decay", "time_first"}),
    only=frozenset({"RwkvSelfAttention"}),
)

PATTERNS: tuple[Pattern, ...] = (
    _DIFFERENTIAL,
    *_FUSED,
    _SEPARATE,
    _MLP,
    _MLP_IN_BLOCK,
    _RWKV_ATTENTION,
    _RWKV_FEED_FORWARD,
)
"""Tried in this order; the first that fits is taken."""
