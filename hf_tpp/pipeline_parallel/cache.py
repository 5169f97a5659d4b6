"""Key/value caches on a stage that does not hold the first layer.

transformers asks a cache's layer 0 how many tokens it holds. On later stages that layer is hollow and would stay empty,
and with it the position ids and masks would be wrong. So a hollow layer stores one channel of zeros per token.
"""

from collections.abc import Iterable

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache

__all__ = ["find_cache", "hold_length", "new_cache"]


def find_cache(arguments: Iterable[object]) -> Cache | None:
    """The key/value cache among the arguments of a layer, if there is one."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


def new_cache(model: nn.Module) -> Cache:
    """The cache that the model itself would make when it is asked to use one."""
    return DynamicCache(config=model.config)  # type: ignore[arg-type]


def hold_length(arguments: Iterable[object], layer_index: int, hidden_states: torch.Tensor) -> None:
    """Let the cache's layer `layer_index` know of the tokens that passed.

    Args:
        arguments: What the hollow layer was called with.
        layer_index: Its index.
        hidden_states: [batch, seq, hidden] of the new tokens.
    """
    cache = find_cache(arguments)
    if cache is not None:
        batch, seq = hidden_states.shape[:2]
        token = hidden_states.new_zeros((batch, 1, seq, 1))
        cache.update(token, token, layer_index)
