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

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
_OF_MODULES = frozenset(vars(nn.Module())) - {"training"}
"""Parameters, children, hooks: looked at by themselves."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OWN = ("hf_tpp.", "transformers.")


def state_of(model: nn.Module, device: torch.device) -> Hashable:
    """Weights by their place in memory, the attributes of all modules and configurations, torch's own modes."""
    tensors = [_place_of(tensor) for tensor in (*model.parameters(), *model.buffers())]
    kind = device.type
    autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    modes = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    modules = [(id(vars(module).get("forward")), _attributes(module)) for module in model.modules()]
    config: Any = model.config
    configs = [_attributes(config), _attributes(config.get_text_config())]
    return tuple(tensors), tuple(modules), tuple(configs), autocast, modes


def shape_of(arguments: Mapping[Any, Any]) -> Hashable | None:
    """All of `arguments` but the values of tensors; None if something in them cannot be told apart."""
    found: list[Hashable] = []
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            found.append((name, value.shape, value.stride(), value.dtype))
        elif isinstance(value, _PLAIN):
            found.append((name, value, type(value)))
        else:
            return None
    return tuple(found)


def has_foreign_hooks(model: nn.Module) -> bool:
    """Whether code that is neither ours nor transformers' runs at some module, or at all of them."""
    return module_hooks._has_any_global_hook() or any(map(_is_hooked, model.modules()))


def host_generators() -> Sequence[Any]:
    """The states of Python's and torch's generators on the host: a pass that moves them has drawn from them."""
    return random.getstate(), torch.default_generator.get_state().numpy().tobytes()


def _attributes(owner: Any) -> Hashable:
    return tuple((name, _told(value)) for name, value in vars(owner).items() if name not in _OF_MODULES)


def _told(value: Any) -> Hashable:
    """Numbers, names and tensors' places, also inside containers; other objects by what they are."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, torch.Tensor):
        return _place_of(value)
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(map(_told, value))
    if isinstance(value, dict):
        return tuple((repr(name), _told(each)) for name, each in value.items())
    return id(value)


def _place_of(tensor: torch.Tensor) -> Hashable:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad


def _is_hooked(module: nn.Module) -> bool:
    attributes = vars(module)
    return any(not _module_of(hook).startswith(_OWN) for kind in _HOOKS for hook in attributes[kind].values())


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return getattr(hook, "__module__", "") or ""
