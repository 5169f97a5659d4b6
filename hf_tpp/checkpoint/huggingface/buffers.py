"""Buffers: which of them checkpoints store, and the values of those that they do not."""

import copy
from collections.abc import Iterator

import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError

__all__ = ["computed_buffer", "persistent_buffers"]


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and values of the buffers that belong into a checkpoint."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


@torch.no_grad()
def computed_buffer(model: nn.Module, name: str) -> torch.Tensor:
    """The value that a model on meta gives to a buffer when it is initialised (masks, rotary frequencies).

    Args:
        model: The unsplit model; only read.
        name: The buffer.

    Returns:
        The buffer on the CPU, as transformers' own loading would leave it.

    Raises:
        UnsupportedModelError: The model's `_init_weights` does not compute it.
    """
    buffer = model.get_buffer(name)
    if buffer.device.type != "meta":
        return buffer
    owner, _, attribute = name.rpartition(".")
    module = copy.deepcopy(model.get_submodule(owner))  # its parameters stay on meta: they cost nothing
    for key, value in module._buffers.items():
        if value is not None:
            module._buffers[key] = _unset(value)
    with torch.random.fork_rng(devices=[]):
        model._init_weights(module)  # type: ignore[operator]
    result = module.get_buffer(attribute)
    if result.is_floating_point() and bool(result.isnan().any()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has a buffer {name!r} that is neither in checkpoints nor computed by its "
            f"_init_weights: load it with transformers' from_pretrained on every rank and parallelize that"
        )
    return result


def _unset(value: torch.Tensor) -> torch.Tensor:
    empty = torch.zeros(value.shape, dtype=value.dtype)
    return empty.fill_(torch.nan) if empty.is_floating_point() else empty
