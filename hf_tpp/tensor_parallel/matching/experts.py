"""Fused experts: every rank holds a share of each expert's neurons.

    experts.gate_up_proj [experts, 2 x neurons, hidden]      cut along the neurons of each half
    experts.down_proj    [experts, hidden, neurons]          cut along the neurons

The module is the region: its hidden states and routing weights enter, its output is the partial sum. The bias of the
down projection belongs to that sum once, so it counts on the first rank only.
"""

import inspect
from typing import Any

from torch import nn

from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.resolve import channel_layout
from hf_tpp.plan.rules import Channels, Cut, RegionRule
from hf_tpp.transformers_versions import stores_experts_transposed

__all__ = ["match_experts"]

_COLUMNS = ("gate_up_proj", "up_proj", "gate_proj")


def match_experts(module: nn.Module, tp_size: int) -> RegionRule | None:
    """The rule of a module with stacked experts, or None if it is none that we know.

    Args:
        module: Any module of a block.
        tp_size: Number of tensor-parallel ranks.
    """
    if type(module).__name__ == "DbrxExperts":
        return _dbrx(module, tp_size)
    parameters = dict(module.named_parameters(recurse=False))
    column_names = [name for name in _COLUMNS if name in parameters]
    down = parameters.get("down_proj")
    known = {*column_names, "down_proj", "down_proj_bias", *(f"{name}_bias" for name in column_names)}
    others = any(True for child in module.children() for _ in child.parameters())
    if down is None or down.dim() != 3 or not column_names or parameters.keys() - known or others:
        return None
    if getattr(module, "has_post_expert_norm", False):
        return None
    has_identity_expert = getattr(module, "identity_expert", None) is not None
    if any(len(parameters[name]) != len(down) for name in column_names) and not has_identity_expert:
        return None  # experts without a second matrix: LongCat's identity experts, before they were a module
    is_transposed = _is_transposed(module, parameters[column_names[0]], down)
    num_neurons = down.shape[1 if is_transposed else 2]
    dim = 2 if is_transposed else 1
    cuts = {"down_proj": Cut(1 if is_transposed else 2, Layout((Block(num_neurons),)))}
    for name in column_names:
        kind = _channels(module) if name == "gate_up_proj" else Channels.NEURONS
        layout = channel_layout(kind, None, parameters[name].shape[dim], tp_size)
        if layout is None or layout.size != num_neurons * (1 if kind is Channels.NEURONS else 2):
            return None
        cuts[name] = Cut(dim, layout)
        if f"{name}_bias" in parameters:
            cuts[f"{name}_bias"] = Cut(1, layout)
    # Identity experts (LongCat) hand on whole hidden states.
    whole = ("down_proj_bias", "identity_expert")
    return _rule(cuts, {}, tuple(name for name in whole if getattr(module, name, None) is not None), num_neurons)


def _rule(cuts: dict[str, Cut], attributes: dict[str, int], on_first: tuple[str, ...], size: int) -> RegionRule:
    return RegionRule(
        kind="experts",
        columns={},
        row="",
        row_layout=Layout((Block(size),)),
        tensors=cuts,
        summed=tuple(name for name in on_first if name.endswith("bias")),
        on_first=on_first,
        attributes=attributes,
    )


def _is_transposed(module: nn.Module, column: nn.Parameter, down: nn.Parameter) -> bool:
    """Whether weights are stored as [experts, in, out]: by their sizes, if those can be told apart."""
    if column.shape[2] != down.shape[1] or column.shape[1] == down.shape[2]:
        if column.shape[2] != down.shape[1]:
            return True
        return stores_experts_transposed(module)
    return False


def _channels(module: nn.Module) -> Channels:
    """How gate and up lie in `gate_up_proj`."""
    stated = getattr(module, "is_concatenated", None)
    if stated is None:
        gate: Any = getattr(type(module), "_apply_gate", type(module).forward)
        stated = "::2" not in inspect.getsource(inspect.unwrap(gate))
    return Channels.TWO_HALVES if stated else Channels.NEURON_PAIRS


def _dbrx(module: nn.Module, tp_size: int) -> RegionRule | None:
    """DBRX: [experts x neurons, hidden], reshaped in the forward."""
    mlp: Any = module.mlp
    neurons, num_experts = mlp.ffn_hidden_size, mlp.moe_num_experts
    if neurons % tp_size:
        return None
    layout = Layout((Block(neurons),) * num_experts)
    cuts = {f"mlp.{name}": Cut(0, layout) for name in ("w1", "v1", "w2")}
    return _rule(cuts, {"ffn_hidden_size": neurons // tp_size}, (), neurons)
