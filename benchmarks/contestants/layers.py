"""The layers of the plain transformers models of the workload."""

from torch import nn

__all__ = ["compile_layers", "layers_of"]


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of layers of a Llama or GPT-2."""
    inner = model.model if hasattr(model, "model") else model.transformer
    found: nn.ModuleList = inner.layers if hasattr(inner, "layers") else inner.h
    return found


def compile_layers(model: nn.Module, backend: str) -> None:
    """Compile them one by one."""
    for layer in layers_of(model):
        layer.compile(backend=backend)
