"""Names on both sides: one two-way table per family."""

from hf_tpp_conversion.names.gpt2 import GPT2
from hf_tpp_conversion.names.gpt_neox import GPT_NEOX
from hf_tpp_conversion.names.llama import LLAMA
from hf_tpp_conversion.names.mixtral import MIXTRAL
from hf_tpp_conversion.names.phi3 import PHI3
from hf_tpp_conversion.names.qwen_moe import QWEN_MOE
from hf_tpp_conversion.names.rows import NameTable, Row, fused_expert_names
from hf_tpp_conversion.names.starcoder2 import STARCODER2

__all__ = [
    "GPT2",
    "GPT_NEOX",
    "LLAMA",
    "MIXTRAL",
    "PHI3",
    "QWEN_MOE",
    "STARCODER2",
    "NameTable",
    "Row",
    "fused_expert_names",
]
