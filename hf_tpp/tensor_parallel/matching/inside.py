"""What lies inside a region beside its linears: norms, convolutions, and parameters with one entry per head."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.resolve import HeadCounts
from hf_tpp.plan.rules import Channels, Cut, Pattern
from hf_tpp.tensor_parallel.plain_linear import linear_sizes

__all__ = ["Inside", "resolve_inside", "summed_parameters"]

_GATES = frozenset({"gate_proj", "g_proj", "r_proj", "sink_proj"})
_KEY_VALUE = frozenset({Channels.KEY_VALUE_HEADS, Channels.PAIRED_KEY_VALUE_HEADS})


@dataclass(slots=True)
class Inside:
    """What to do with the parts of a region that are no linears.

    Attributes:
        cuts: Parameter -> how it is cut.
        gathered: Child that is shown the channels of all ranks -> layouts of its input and output.
        numbers: Attribute of a child -> its local value.
    """

    cuts: dict[str, Cut] = field(default_factory=dict)
    gathered: dict[str, tuple[Layout, Layout]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)


def resolve_inside(
    pattern: Pattern,
    module: nn.Module,
    layouts: Mapping[str, Layout],
    row: Layout,
    heads: HeadCounts | None,
    tp_size: int,
) -> Inside | None:
    """Decide about everything that `pattern` names inside `module`; None if one of them is not understood.

    Args:
        pattern: What the module fits.
        module: The region's module.
        layouts: Column linear -> layout of its outputs.
        row: Layout of the row linear's inputs.
        heads: Head counts; None for an MLP.
        tp_size: Number of tensor-parallel ranks.
    """
    inside = Inside()
    sides = {"row": row, **_sides(pattern, layouts)}
    for name, side in pattern.norms.items():
        norm = getattr(module, name, None)
        if isinstance(norm, nn.Module) and any(True for _ in norm.parameters()):
            layout = sides.get(side) or sides.get("query")
            if layout is None or not _add_norm(inside, name, norm, layout, heads, tp_size):
                return None
    for name, side in pattern.convolutions.items():
        if _has(module, name):
            inside.cuts |= {
                f"{name}.{key}": Cut(0, sides[side])
                for key, tensor in module.get_submodule(name)._parameters.items()
                if tensor is not None
            }
    for name in pattern.per_head:
        owner, _, attribute = name.rpartition(".")
        if _has(module, owner) and module.get_submodule(owner)._parameters.get(attribute) is not None:
            if heads is None or module.get_parameter(name).shape[0] != heads.num_heads:
                return None
            inside.cuts[name] = Cut(0, Layout((Block(heads.num_heads),)))
    inside.cuts |= {name: Cut(0, row) for name in pattern.per_channel if module._parameters.get(name) is not None}
    return inside if _add_per_kv_head(inside, pattern, module, sides, heads) else None


def _add_per_kv_head(
    inside: Inside, pattern: Pattern, module: nn.Module, sides: Mapping[str, Layout], heads: HeadCounts | None
) -> bool:
    """Numbers for each key/value head, computed from all of them (Doge's dynamic mask)."""
    names = [name for name in pattern.per_kv_head if module._parameters.get(name) is not None]
    mixing = [name for name in pattern.mixing if name in module._modules]
    if not names and not mixing:
        return True
    if heads is None or "value" not in sides:
        return False
    each = Layout((Block(heads.num_kv_heads),))
    inside.cuts |= {name: Cut(0, each) for name in names}
    inside.gathered |= dict.fromkeys(mixing, (sides["value"], each))
    sizes = [linear_sizes(module.get_submodule(name))[:2] for name in mixing]
    lengths = [module.get_parameter(name).shape for name in names]
    return all(size == (sides["value"].size, each.size) for size in sizes) and all(n == (each.size,) for n in lengths)


def _has(module: nn.Module, name: str) -> bool:
    return not name or any(name == child for child, _ in module.named_modules())


def _sides(pattern: Pattern, layouts: Mapping[str, Layout]) -> dict[str, Layout]:
    """The layouts of queries, keys and values."""
    sides: dict[str, Layout] = {}
    for name, layout in layouts.items():
        if name in _GATES:
            continue
        is_key_value = pattern.columns[name] in _KEY_VALUE
        side = "query" if not is_key_value else "value" if name in ("v_proj", "Wv", "project_v") else "key"
        sides.setdefault(side, layout)
    return sides


def _add_norm(
    inside: Inside, name: str, norm: nn.Module, layout: Layout, heads: HeadCounts | None, tp_size: int
) -> bool:
    """A norm per head stays as it is, one with a row per head is cut, one over all channels is shown all of them."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return False
    (block, *others) = layout.blocks
    if weight.dim() == 2 and weight.shape[0] == block.num_units:
        inside.cuts |= {f"{name}.{key}": Cut(0, Layout((Block(block.num_units),))) for key in norm._parameters}
        return True
    if weight.numel() == layout.size and block.num_units > 1 and not others:
        inside.gathered[name] = (layout, layout)
        return len({layout.local_size(rank, tp_size) for rank in range(tp_size)}) == 1
    return heads is not None and weight.dim() == 1


def summed_parameters(
    module: nn.Module, linears: Collection[str], cuts: Collection[str], outside: Collection[str] = ()
) -> tuple[str, ...]:
    """Whole parameters that work on this rank's part: everything in `module` but its linears and what is cut."""
    of_linears = tuple(f"{name}." for name in linears)
    names = (name for name, _ in module.named_parameters(remove_duplicate=False))
    return tuple(name for name in names if not name.startswith(of_linears) and name not in cuts and name not in outside)
