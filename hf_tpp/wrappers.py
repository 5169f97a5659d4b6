"""What PEFT puts around the modules of a model, recognised without importing peft.

A linear with an addition of low rank (LoRA) is a sum of products, and each of its terms can be cut as the linear is:

    y = W x + sum_i scale_i B_i (A_i x)        W [out, in],  A_i [rank, in],  B_i [out, rank]

               column-parallel                            row-parallel
    W          outputs cut                                inputs cut: a partial product
    A_i        whole, its gradient summed over tp         cut as the inputs of W
    B_i        cut as the outputs of W                    whole, its gradient summed over tp: a partial product too

Other wrappers are not taken apart: what they hold stays whole on each rank.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models".
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

__all__ = ["LowRankSum", "copies_of", "is_wrapper", "plain_names", "unwrap_hollow", "unwrapped", "wrappers_of"]

_LORA, _AUXILIARY = "peft.tuners.lora.layer", "peft.utils.other"


@dataclass(frozen=True, slots=True)
class LowRankSum:
    """A linear and its additions.

    Attributes:
        module: Computes the sum.
        base: The linear.
        downs: Names in `module` of the linears A_i, to the low rank.
        ups: Names of the linears B_i.
        dropouts: Names of what drops elements of the additions' input.
    """

    module: nn.Module
    base: nn.Module
    downs: tuple[str, ...]
    ups: tuple[str, ...]
    dropouts: tuple[str, ...]

    BASE = "base_layer"
    """Name of the linear in `module`."""

    @classmethod
    def of(cls, module: nn.Module) -> "LowRankSum | None":
        """The parts of a plain LoRA layer; None for any other module, variants such as DoRA among them."""
        if type(module) is not _class(_LORA, "Linear"):
            return None
        adapters = [*module.lora_A]  # type: ignore[misc]
        if module.lora_variant or any(module.lora_bias.values()) or hasattr(module.base_layer, cls.BASE):  # type: ignore[operator]
            return None
        return cls(
            module,
            module.base_layer,  # type: ignore[arg-type]
            tuple(f"lora_A.{adapter}" for adapter in adapters),
            tuple(f"lora_B.{adapter}" for adapter in adapters),
            tuple(f"lora_dropout.{adapter}" for adapter in adapters),
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is an adapter's layer around another one: any of PEFT's methods, not its `modules_to_save`."""
    kind = _class("peft.tuners.tuners_utils", "BaseTunerLayer")
    return kind is not None and isinstance(module, kind)


def copies_of(module: nn.Module) -> nn.Module | None:
    """The module that PEFT's `modules_to_save` keeps beside its trained copies; None if `module` is no such pair."""
    kind = _class(_AUXILIARY, "ModulesToSaveWrapper")
    return module.original_module if kind is not None and type(module) is kind else None  # type: ignore[return-value]


def unwrapped(module: nn.Module) -> nn.Module:
    """What a wrapper of either kind was put around; any other module itself."""
    while True:
        inner = module.base_layer if is_wrapper(module) and hasattr(module, LowRankSum.BASE) else copies_of(module)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def wrappers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all wrappers that are in no other wrapper."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if not name.startswith(inside) and (is_wrapper(module) or copies_of(module) is not None):
            inside += (f"{name}.",)
            yield name, module


def plain_names(model: nn.Module) -> dict[str, str]:
    """Name of each parameter -> its name in the model without adapters; the adapters' own are left out."""
    wrappers = dict(wrappers_of(model))
    inside = tuple(f"{name}." for name in wrappers)
    names = {name: name for name, _ in model.named_parameters(remove_duplicate=False) if not name.startswith(inside)}
    for name, module in wrappers.items():
        inner = unwrapped(module)
        path = next(path for path, child in module.named_modules() if child is inner)
        for key, _ in inner.named_parameters():
            names[f"{name}.{path}.{key}"] = f"{name}.{key}"
    return names


def unwrap_hollow(model: nn.Module) -> None:
    """Take the wrappers off modules that have no parameters on this stage, in place: adapters go where those are."""
    for name, module in list(wrappers_of(model)):
        inner = unwrapped(module)
        if not any(True for _ in inner.parameters()):
            model.set_submodule(name, inner)


def _class(module: str, name: str) -> type | None:
    """A class of PEFT, if PEFT was imported: without that, no module is of it."""
    kind: type | None = getattr(sys.modules.get(module), name, None)
    return kind
