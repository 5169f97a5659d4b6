"""Optimizers that would be silently inexact on shards are refused at their first step.

SGD, Adam, AdamW and the like treat every element by itself: on a shard they do what they do on the whole. Some keep
statistics over a whole tensor (its norm, its rows and columns, its singular vectors), and a shard is not the tensor.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_tpp.errors import ConfigurationError

__all__ = ["refuse_whole_tensor_optimizers"]

WHOLE_TENSOR_OPTIMIZERS = frozenset(
    {"Adafactor", "CAME", "DistributedShampoo", "GaLoreAdamW", "LAMB", "LARS", "Lamb", "Muon", "SOAP", "Shampoo"}
)


def refuse_whole_tensor_optimizers(parameters: Iterable[torch.nn.Parameter]) -> None:
    """From now on raise when an optimizer with whole-tensor statistics steps on any of `parameters`.

    Args:
        parameters: Those that are cut over ranks; held weakly.
    """
    sharded = {id(parameter): weakref.ref(parameter) for parameter in parameters}
    seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def is_sharded(parameter: torch.Tensor) -> bool:
        reference = sharded.get(id(parameter))
        return reference is not None and reference() is parameter

    def check(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer in seen:
            return
        names = {kind.__name__ for kind in type(optimizer).__mro__} & WHOLE_TENSOR_OPTIMIZERS
        if names and any(is_sharded(parameter) for group in optimizer.param_groups for parameter in group["params"]):
            raise ConfigurationError(
                f"{names.pop()} keeps statistics over whole tensors, and with tp > 1 or data_parallel='fully_shard' a "
                f"rank has only shards: use an elementwise optimizer such as AdamW, or tp=1 (pp and replicated data "
                f"parallelism keep tensors whole)"
            )
        seen.add(optimizer)

    register_optimizer_step_pre_hook(check)
