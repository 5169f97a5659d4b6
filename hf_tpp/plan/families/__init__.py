"""The table of supported families: `model_type` of the config -> how a block is cut.

A further family is a further row. A family without a row is refused by name.
"""

from hf_tpp.plan.rules import Family, Fused, Region, Units

__all__ = ["FAMILIES"]

_LLAMA = Family(
    (
        Region(
            parent="self_attn",
            columns={
                "q_proj": Units.QUERY_HEADS,
                "k_proj": Units.KEY_VALUE_HEADS,
                "v_proj": Units.KEY_VALUE_HEADS,
            },
            row="o_proj",
            group_size="num_key_value_groups",
        ),
        Region(parent="mlp", columns={"gate_proj": Units.NEURONS, "up_proj": Units.NEURONS}, row="down_proj"),
    )
)
_GPT2 = Family(
    (
        Region(
            parent="attn",
            columns={"c_attn": Fused.QKV_BLOCKS},
            row="c_proj",
            divide=("num_heads", "split_size"),
        ),
        Region(parent="mlp", columns={"c_fc": Units.NEURONS}, row="c_proj"),
    )
)
_GPT_NEOX = Family(
    (
        Region(parent="attention", columns={"query_key_value": Fused.QKV_PER_HEAD}, row="dense"),
        Region(parent="mlp", columns={"dense_h_to_4h": Units.NEURONS}, row="dense_4h_to_h"),
    )
)

FAMILIES: dict[str, Family] = {
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}
