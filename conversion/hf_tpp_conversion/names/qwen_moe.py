"""Qwen2-MoE and Qwen3-MoE: experts, in some models one that is shared, and layers without experts."""

from hf_tpp_conversion.layouts import GATE_UP
from hf_tpp_conversion.names.llama import ATTENTION, ENDS, IGNORED, MLP
from hf_tpp_conversion.names.rows import NameTable, Row, linear

__all__ = ["QWEN_MOE"]

_M, _H = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"
_EXPERT = f"{_H}.experts.{{expert}}"
_SHARED = f"{_H}.shared_expert"

QWEN_MOE = NameTable(
    [
        *ENDS,
        *ATTENTION,
        *MLP,
        Row(f"{_M}.router.weight", (f"{_H}.gate.weight",)),
        *linear(f"{_M}.experts.{{expert}}.linear_fc1", [f"{_EXPERT}.gate_proj", f"{_EXPERT}.up_proj"], GATE_UP),
        *linear(f"{_M}.experts.{{expert}}.linear_fc2", f"{_EXPERT}.down_proj"),
        *linear(f"{_M}.shared_experts.linear_fc1", [f"{_SHARED}.gate_proj", f"{_SHARED}.up_proj"], GATE_UP),
        *linear(f"{_M}.shared_experts.linear_fc2", f"{_SHARED}.down_proj"),
        Row(f"{_M}.shared_experts.gate_weight", (f"{_H}.shared_expert_gate.weight",)),
    ],
    base="model.",
    ignored=IGNORED,
)
