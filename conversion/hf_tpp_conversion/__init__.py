"""Megatron <-> Hugging Face checkpoints, one tensor at a time, without Megatron and without a GPU.

convert(Conversion(source, target, to="megatron", partition=Partition(tp=2, pp=4)))
"""

from hf_tpp_conversion.convert import Conversion, convert
from hf_tpp_conversion.inspection import inspect
from hf_tpp_conversion.model.partition import Partition
from hf_tpp_conversion.verify import verify

__all__ = ["Conversion", "Partition", "convert", "inspect", "verify"]
