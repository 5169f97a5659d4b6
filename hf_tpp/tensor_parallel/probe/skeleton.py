"""A copy of a model without its weights: it runs anywhere, by its own code, and nothing that it computes is real.

    linears, embeddings     give random numbers of the right shape; their weights are never read
    other parameters        random numbers, or one number over and over where they are large
    buffers                 the model's own; random where the model is on the meta device

Everything is on the CPU, in float32, and drawn from one seed: all ranks see the same. The model is left alone.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.tensor_parallel.plain_linear import linear_sizes

__all__ = ["SEED", "Skeleton", "is_linear", "linears_of", "replace_forward"]

SEED = 20
_MAX_DRAWN = 1 << 20


class Skeleton:
    """The weightless copy of a model, in evaluation mode.

    Args:
        model: The whole model, on any device.

    Attributes:
        model: The copy; what it is made of can be changed freely.
    """

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(SEED)
        stand_ins: dict[int, Any] = {id(parameter): _stand_in(parameter) for parameter in model.parameters()}
        stand_ins |= {id(buffer): _buffer(buffer, generator) for buffer in model.buffers()}
        self.model = copy.deepcopy(model, stand_ins).eval()
        for module in self.model.modules():
            if is_linear(module):
                replace_forward(module, _random_product(linear_sizes(module)[1], generator))
            elif type(module) is nn.Embedding:
                replace_forward(module, _random_rows(module.embedding_dim, generator))
            else:
                _draw_parameters(module, generator)
        configs = [config for config in map(_config, self.model.modules()) if config is not None]
        self._shared = [*self.model.parameters(), *self.model.buffers(), *configs]

    def copy(self, name: str = "") -> nn.Module:
        """A copy of one of its modules, or of all, with the same tensors and configuration."""
        return copy.deepcopy(self.model.get_submodule(name), {id(thing): thing for thing in self._shared})


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear that can be cut."""
    try:
        linear_sizes(module)
    except ConfigurationError:
        return False
    return True


def linears_of(module: nn.Module) -> dict[str, nn.Module]:
    """The linears below `module`, by name."""
    return {name: child for name, child in module.named_modules() if name and is_linear(child)}


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `forward` run in place of the module's own."""
    vars(module)["forward"] = forward


def _config(module: nn.Module) -> Any:
    return vars(module).get("config")


def _plain_type(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    zero = torch.zeros((), dtype=_plain_type(parameter.dtype), device="cpu")
    return nn.Parameter(zero.expand(parameter.shape), requires_grad=zero.is_floating_point())


def _buffer(buffer: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    dtype = _plain_type(buffer.dtype)
    if not buffer.is_meta:
        return buffer.detach().to("cpu", dtype, copy=True)
    if dtype.is_floating_point:
        return torch.rand(buffer.shape, generator=generator, dtype=dtype, device="cpu")
    return torch.full(buffer.shape, dtype is torch.bool, dtype=dtype, device="cpu")


def _draw_parameters(module: nn.Module, generator: torch.Generator) -> None:
    """Vectors are scales around 1; what has more dimensions is drawn so that a product keeps its input's size."""
    for name, parameter in module.named_parameters(recurse=False):
        if not parameter.is_floating_point():
            continue
        shape = parameter.shape if parameter.numel() <= _MAX_DRAWN else ()
        values = torch.randn(shape, generator=generator, device="cpu")
        values = 1.0 + 0.5 * values if parameter.dim() < 2 else values / max(parameter.shape[-2:]) ** 0.5
        module.register_parameter(name, nn.Parameter(values.expand(parameter.shape)))


def _random_product(out_features: int, generator: torch.Generator) -> Callable[..., torch.Tensor]:
    return lambda x: _drawn((*x.shape[:-1], out_features), generator).to(x.dtype)


def _random_rows(embedding_dim: int, generator: torch.Generator) -> Callable[..., torch.Tensor]:
    return lambda ids: _drawn((*ids.shape, embedding_dim), generator)


def _drawn(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Needs a gradient, but is neither a leaf nor a view of one, which could not be written into in place."""
    return torch.randn(shape, generator=generator, device="cpu").requires_grad_().clone()
