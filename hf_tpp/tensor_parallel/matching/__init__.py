"""Recognise the regions of a block by names and sizes. Only reads: what is recognised is swapped elsewhere."""

from hf_tpp.tensor_parallel.matching.match import find_rule
from hf_tpp.tensor_parallel.matching.user import UserPlan, resolve_user_region

__all__ = ["UserPlan", "find_rule", "resolve_user_region"]
