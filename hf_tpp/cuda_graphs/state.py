"""All that a training pass depends on beside the values of its inputs.

A graph repeats what the device did; what Python did is not repeated. So a recording stands for passes that differ in
the values of tensors alone.
"""

import functools
import random
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

__all__ = ["has_foreign_hooks", "host_generators", "shape_of", "state_of"]

_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWN = ("hf_tpp.", "transformers.")


def state_of(model: nn.Module, device: torch.device) -> Hashable:
    """Weights by their place in memory, the plain attributes of all modules and configurations, torch's own modes."""
    tensors = [
        (tensor.data_ptr(), tensor.dtype, tensor.requires_grad) for tensor in (*model.parameters(), *model.buffers())
    ]
    kind = device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    modes = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    modules = [(id(vars(module).get("forward")), _plain_attributes(module)) for module in model.modules()]
    config: Any = model.config
    configs = [_plain_attributes(config), _plain_attributes(config.get_text_config())]
    return tuple(tensors), tuple(modules), tuple(configs), autocast, modes


def shape_of(arguments: Mapping[Any, Any]) -> Hashable:
    """All of `arguments` but the values of tensors."""
    return tuple(
        (name, (value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else repr(value))
        for name, value in arguments.items()
    )


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether code that is neither ours nor transformers' runs at some module, or at all of them."""
    return module_hooks._has_any_global_hook() or any(map(_is_hooked, model.modules()))


def host_generators() -> Sequence[Any]:
    """The states of Python's and torch's generators on the host: a pass that moves them has drawn from them."""
    return random.getstate(), torch.default_generator.get_state().numpy().tobytes()


def _plain_attributes(owner: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((name, value) for name, value in vars(owner).items() if isinstance(value, _PLAIN))


def _is_hooked(module: nn.Module) -> bool:
    attributes = vars(module)
    return any(not _module_of(hook).startswith(_OWN) for kind in _HOOKS for hook in attributes[kind].values())


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", "") or ""
