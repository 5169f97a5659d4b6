"""Adapters of PEFT on parallel models: cut with the linears that they are added to, saved as ordinary adapters."""

from hf_tpp.adapters.methods import model_of

__all__ = ["model_of"]
