"""How many heads an attention module has, from its own numbers and the sizes of its linears."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hf_tpp.plan.resolve import HeadCounts
from hf_tpp.tensor_parallel.plain_linear import linear_sizes

__all__ = ["head_counts"]

_HEAD_SIZE = ("v_head_dim", "head_dim", "head_size", "dim_head", "attention_head_size")
_KEYS, _VALUES = ("k_proj", "Wk", "project_k"), ("v_proj", "Wv", "project_v")


def head_counts(module: nn.Module, columns: Mapping[str, nn.Module], row_size: int, config: Any) -> HeadCounts | None:
    """The head counts of an attention module; None if its numbers do not fit together.

    Sizes come first: families may give each layer its own number of heads, and the configuration only one of them.

    Args:
        module: The attention module.
        columns: Its column linears.
        row_size: Input channels of its row linear.
        config: Of the model.
    """
    head_size = _number(module, *_HEAD_SIZE)
    if head_size and row_size % head_size == 0:
        num_heads = row_size // head_size
    else:
        num_heads = _number(module, "num_heads", "num_attention_heads", "n_heads", "n_head") or int(
            config.num_attention_heads
        )
    value = next((columns[name] for name in _VALUES if name in columns), None)
    if value is not None:
        num_kv_heads, rest = divmod(linear_sizes(value)[1] * num_heads, row_size)
        return None if rest or not num_kv_heads else HeadCounts(num_heads, num_kv_heads)
    key = next((columns[name] for name in _KEYS if name in columns), None)
    if key is not None:
        return HeadCounts(num_heads, linear_sizes(key)[1] // head_size) if head_size else None
    if "kv_b_proj" in columns or "q_proj" in columns:  # latent attention, or keys of another layer
        return HeadCounts(num_heads, num_heads)
    if getattr(module, "multi_query", False) and not getattr(module, "new_decoder_architecture", False):
        return HeadCounts(num_heads, 1)
    return HeadCounts(num_heads, _number(module, "num_key_value_heads", "num_kv_heads", "kv_heads") or num_heads)


def _number(module: nn.Module, *names: str) -> int | None:
    return next((int(vars(module)[name]) for name in names if type(vars(module).get(name)) is int), None)
