"""Phi-3 and Phi-4: queries, keys and values in one tensor, gate and up in one."""

from hf_tpp_conversion.layouts import BLOCKS
from hf_tpp_conversion.names.llama import ATTENTION, ENDS, IGNORED
from hf_tpp_conversion.names.rows import NameTable, linear

__all__ = ["PHI3"]

_M, _H = "decoder.layers.{layer}", "model.layers.{layer}"

PHI3 = NameTable(
    [
        *ENDS,
        *(row for row in ATTENTION if "linear_qkv" not in row.megatron),
        *linear(f"{_M}.self_attention.linear_qkv", f"{_H}.self_attn.qkv_proj", BLOCKS),
        *linear(f"{_M}.mlp.linear_fc1", f"{_H}.mlp.gate_up_proj"),
        *linear(f"{_M}.mlp.linear_fc2", f"{_H}.mlp.down_proj"),
    ],
    base="model.",
    ignored=IGNORED,
)
