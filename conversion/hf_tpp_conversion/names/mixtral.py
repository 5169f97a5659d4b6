"""Mixtral."""

from hf_tpp_conversion.layouts import GATE_UP
from hf_tpp_conversion.names.llama import ATTENTION, ENDS, IGNORED
from hf_tpp_conversion.names.rows import NameTable, Row

__all__ = ["MIXTRAL"]

_M, _H = "decoder.layers.{layer}.mlp", "model.layers.{layer}.block_sparse_moe"
_EXPERT = f"{_H}.experts.{{expert}}"

MIXTRAL = NameTable(
    [
        *ENDS,
        *ATTENTION,
        Row(f"{_M}.router.weight", (f"{_H}.gate.weight",)),
        Row(f"{_M}.experts.{{expert}}.linear_fc1.weight", (f"{_EXPERT}.w1.weight", f"{_EXPERT}.w3.weight"), GATE_UP),
        Row(f"{_M}.experts.{{expert}}.linear_fc2.weight", (f"{_EXPERT}.w2.weight",)),
    ],
    base="model.",
    ignored=IGNORED,
)
