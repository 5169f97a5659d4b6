"""Caches on a stage that does not hold all layers.

transformers asks a cache's first attention layer how many tokens it holds, and its last recurrent layer whether there
is a state. Where these are hollow they would stay empty, and position ids and masks would be wrong. So hollow layers
store one channel of zeros per token, or a state of one number.
"""

import inspect
import sys
from collections.abc import Iterable

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.flow import StageFlow
from hf_tpp.transformers_versions import CACHE_ARGUMENTS

__all__ = ["cache_argument", "cache_layers", "find_cache", "hold_length", "new_cache", "takes_cache"]


def find_cache(arguments: Iterable[object]) -> Cache | None:
    """The key/value cache among the arguments of a layer, if there is one."""
    return next((value for value in arguments if isinstance(value, Cache)), None)


def cache_argument(model: nn.Module) -> str | None:
    """The name by which the model takes what it generates from; None if it takes none."""
    parameters = inspect.signature(type(model).forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def takes_cache(model: nn.Module) -> bool:
    """Whether a stage can generate from the cache of its own layers: one of transformers', or a state for each layer.

    A list (RWKV), and a class of the model's own in which one layer counts the tokens for all (MiniMax), cannot be
    handed on. A model that keeps nothing at all, and reads the whole text for every token (GPT-1), needs no cache.
    """
    if cache_argument(model) is None:
        parameters = inspect.signature(type(model).forward).parameters
        return "use_cache" not in parameters and "state" not in parameters
    home = type(model).__module__
    own = [value for value in vars(sys.modules[home]).values() if isinstance(value, type) and value.__module__ == home]
    return not any(hasattr(value, "get_seq_length") and not issubclass(value, CacheLayerMixin) for value in own)


def new_cache(model: nn.Module) -> Cache:
    """The cache that the model itself would make when it is asked to use one.

    Raises:
        UnsupportedModelError: It would make one of its own class.
    """
    if not takes_cache(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps the state of a generation in a form of its own, which a parallel model "
            f"does not hand on: leave use_cache out, or use plain transformers"
        )
    return DynamicCache(config=model.config)  # type: ignore[arg-type]


def cache_layers(block: nn.Module, index: int) -> list[int]:
    """The layers of a cache that block `index` writes to: what its modules say, else its own number."""
    inner = [module for module in block.modules() if module is not block]
    stated = {vars(module)["layer_idx"] for module in inner if type(vars(module).get("layer_idx")) is int}
    # A module that several blocks share (zamba2) states -1, and is told the layer when it is called.
    return sorted(layer for layer in stated if layer >= 0) or [index]


def hold_length(arguments: Iterable[object], layers: Iterable[int], flow: StageFlow) -> None:
    """Let the cache's `layers`, which are hollow here, know of the tokens that passed.

    Args:
        arguments: What a hollow layer was called with.
        layers: Indices of hollow layers.
        flow: Knows the size of the microbatch, and a tensor of its type and device.
    """
    cache = find_cache(arguments)
    if cache is None:
        return
    token = flow.token()
    for index in layers:
        grows = getattr(cache, "layer_class_to_replicate", None) is not None
        if index >= len(cache.layers) and not grows:
            continue  # a layer that keeps no cache of its own
        layer = cache.layers[index] if index < len(cache.layers) else None
        if layer is None or isinstance(layer, CacheLayerMixin):
            cache.update(token, token, index)
        for state in range(getattr(layer, "number_of_states", 0)):
            cache.update_conv_state(token[:, 0, :1].mT, index, state_idx=state)
            cache.update_recurrent_state(token[:, 0, :1], index, state_idx=state)
