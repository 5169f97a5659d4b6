"""The linears of a plain model: their sizes, and where they are among the children of a module."""

from collections.abc import Iterator

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_tpp.errors import ConfigurationError
from hf_tpp.wrappers import LowRankSum

__all__ = ["leaves_of", "linear_sizes"]

_PLAIN_SUBCLASSES = frozenset({"FalconLinear"})
"""Subclasses of nn.Linear in transformers that compute the same product."""


def linear_sizes(linear: nn.Module) -> tuple[int, int, bool]:
    """(in_features, out_features, is the weight stored as [in, out]) of an `nn.Linear` or transformers' `Conv1D`.

    With additions of low rank, a linear keeps its sizes.

    Raises:
        ConfigurationError: It is neither.
    """
    total = LowRankSum.of(linear)
    if total is not None:
        return linear_sizes(total.base)
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1], True
    if type(linear) is nn.Linear or type(linear).__name__ in _PLAIN_SUBCLASSES:
        assert isinstance(linear, nn.Linear)
        return linear.in_features, linear.out_features, False
    raise ConfigurationError(f"{type(linear).__name__} is no linear layer: give an nn.Linear or transformers' Conv1D")


def leaves_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Everything below `module` that has parameters of its own; a linear with additions of low rank in one piece."""
    inside: tuple[str, ...] = ()
    for name, child in module.named_modules():
        if not name or name.startswith(inside):
            continue
        if LowRankSum.of(child) is not None:
            inside += (f"{name}.",)
            yield name, child
        elif any(True for _ in child.parameters(recurse=False)):
            yield name, child
