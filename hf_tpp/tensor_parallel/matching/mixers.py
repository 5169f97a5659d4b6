"""Sequence mixers that are no attention: delta-rule linear attention and gated short convolutions.

Their heads are independent as those of attention are, but every channel also passes a depthwise convolution, and decay
rates have one entry per head. All heads must divide evenly: state is kept per head, and none is replicated.

    columns                                  inside                                  row
    in_proj_qkv [q|k|v], in_proj_z, b, a     conv1d [q|k|v], A_log, dt_bias, norm    out_proj
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.rules import Cut, RegionRule
from hf_tpp.tensor_parallel.matching.inside import summed_parameters
from hf_tpp.tensor_parallel.plain_linear import leaves_of, linear_sizes

__all__ = ["match_mixer"]

_KEY, _VALUE, _PER_VALUE_HEAD, _PER_KEY_HEAD = "key channels", "value channels", "value heads", "per key head"

_COLUMNS = {
    "in_proj_qkv": (_KEY, _KEY, _VALUE),
    "in_proj_qkvz": (_PER_KEY_HEAD,),
    "in_proj_ba": (_PER_KEY_HEAD,),
    "in_proj_z": (_VALUE,),
    "in_proj_b": (_PER_VALUE_HEAD,),
    "in_proj_a": (_PER_VALUE_HEAD,),
    "q_proj": (_KEY,),
    "k_proj": (_KEY,),
    "v_proj": (_VALUE,),
    "g_proj": (_VALUE,),
    "g_b_proj": (_VALUE,),
    "a_proj": (_PER_VALUE_HEAD,),
    "b_proj": (_PER_VALUE_HEAD,),
    "forget_gate.f_proj": (_VALUE,),
    "forget_gate.f_b_proj": (_VALUE,),
}
_CONVOLUTION = (_KEY, _KEY, _VALUE)
_DECAY = frozenset({"A_log", "dt_bias", "forget_gate.A_log", "forget_gate.dt_bias"})
_ROWS = frozenset({"out_proj", "o_proj"})
_WHOLE = frozenset({"norm", "o_norm", "g_a_proj", "forget_gate.f_a_proj"})


@dataclass(frozen=True, slots=True)
class _Heads:
    """Key and value heads of a delta-rule mixer, and their sizes."""

    num_keys: int
    key_size: int
    num_values: int
    value_size: int

    @classmethod
    def of(cls, module: nn.Module) -> "_Heads | None":
        numbers = vars(module)
        if {"num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"} <= numbers.keys():
            return cls(*(int(numbers[key]) for key in ("num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim")))
        if {"num_heads", "head_dim", "qkv_dim"} <= numbers.keys():
            return cls(*(int(numbers[key]) for key in ("num_heads", "head_dim") * 2))
        return None

    def layout(self, blocks: tuple[str, ...], size: int) -> Layout | None:
        """The layout of `size` channels in these blocks; None if they do not add up."""
        known = {
            _KEY: Block(self.num_keys, self.key_size),
            _VALUE: Block(self.num_values, self.value_size),
            _PER_VALUE_HEAD: Block(self.num_values),
            _PER_KEY_HEAD: Block(self.num_keys, size // self.num_keys),
        }
        layout = Layout(tuple(known[block] for block in blocks))
        return layout if layout.size == size else None

    def local_numbers(self, module: nn.Module, prefix: str, tp_size: int) -> dict[str, int]:
        """Local values of the numbers that count heads or channels."""
        counted = ("num_k_heads", "num_v_heads", "num_heads", "key_dim", "value_dim", "qkv_dim", "conv_dim")
        own = vars(module)
        return {f"{prefix}{name}": own[name] // tp_size for name in counted if type(own.get(name)) is int}


def match_mixer(module: nn.Module, tp_size: int) -> RegionRule | None:
    """The rule of a mixer, or None if the module is none, or its heads do not divide.

    Args:
        module: Any module of a block.
        tp_size: Number of tensor-parallel ranks.
    """
    if type(module).__name__.endswith("ShortConv"):
        return _short_convolution(module, tp_size)
    heads = _Heads.of(module)
    if heads is None or heads.num_keys % tp_size or heads.num_values % tp_size:
        return None
    leaves = dict(leaves_of(module))
    rows = _ROWS & leaves.keys()
    decay = {name: tensor for name, tensor in module.named_parameters() if name in _DECAY}
    if len(rows) != 1 or "conv1d" not in leaves or not decay:
        return None
    if leaves.keys() - _COLUMNS.keys() - rows - _WHOLE - {"conv1d", "forget_gate"}:
        return None
    return _delta_rule(module, heads, leaves, next(iter(rows)), tp_size)


def _delta_rule(
    module: nn.Module, heads: _Heads, leaves: Mapping[str, nn.Module], row: str, tp_size: int
) -> RegionRule | None:
    columns = {
        name: heads.layout(blocks, linear_sizes(leaves[name])[1]) for name, blocks in _COLUMNS.items() if name in leaves
    }
    of_row = heads.layout((_VALUE,), linear_sizes(leaves[row])[0])
    cuts: dict[str, Cut | None] = {}
    for name, tensor in module.named_parameters():
        if name in _DECAY:
            dim = max(range(tensor.dim()), key=lambda axis, shape=tensor.shape: shape[axis])  # type: ignore[misc]
            blocks = (_PER_VALUE_HEAD,) if tensor.numel() == heads.num_values else (_VALUE,)
            layout = heads.layout(blocks, tensor.shape[dim])
        elif name.startswith("conv1d."):
            dim, layout = 0, heads.layout(_CONVOLUTION, tensor.shape[0])
        else:
            continue
        cuts[name] = Cut(dim, layout) if layout else None
    found = {name: layout for name, layout in columns.items() if layout is not None}
    tensors = {name: cut for name, cut in cuts.items() if cut is not None}
    if of_row is None or len(found) < len(columns) or len(tensors) < len(cuts):
        return None
    numbers = heads.local_numbers(module, "", tp_size)
    if "forget_gate" in leaves:
        numbers |= heads.local_numbers(leaves["forget_gate"], "forget_gate.", tp_size)
    return RegionRule(
        kind="linear attention",
        columns=found,
        row=row,
        row_layout=of_row,
        tensors=tensors,
        summed=summed_parameters(module, {*found, row}, tensors),
        attributes=numbers,
    )


def _short_convolution(module: nn.Module, tp_size: int) -> RegionRule | None:
    """LFM2: in_proj [b|c|x], a depthwise convolution of b * x, gated by c."""
    leaves = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
    if leaves != {"conv", "in_proj", "out_proj"}:
        return None
    size = linear_sizes(module.get_submodule("out_proj"))[0]
    if size % tp_size or linear_sizes(module.get_submodule("in_proj"))[1] != 3 * size:
        return None
    channels = Layout((Block(size),))
    convolution = module.get_submodule("conv")._parameters
    tensors = {f"conv.{name}": Cut(0, channels) for name, tensor in convolution.items() if tensor is not None}
    return RegionRule(
        kind="convolution",
        columns={"in_proj": Layout((Block(size),) * 3)},
        row="out_proj",
        row_layout=channels,
        tensors=tensors,
        attributes={},
    )
