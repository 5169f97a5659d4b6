"""StarCoder2: Llama's attention with biases, a plain MLP."""

from hf_tpp_conversion.names.llama import ATTENTION, ENDS, IGNORED
from hf_tpp_conversion.names.rows import NameTable, linear

__all__ = ["STARCODER2"]

_M, _H = "decoder.layers.{layer}.mlp", "model.layers.{layer}.mlp"

STARCODER2 = NameTable(
    [*ENDS, *ATTENTION, *linear(f"{_M}.linear_fc1", f"{_H}.c_fc"), *linear(f"{_M}.linear_fc2", f"{_H}.c_proj")],
    base="model.",
    ignored=IGNORED,
)
