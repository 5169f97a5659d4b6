"""The cut module as each rank would run it, one after the other in this process: sums must equal the plain module's.

    plain        inputs x_i of all linears, the result, gradients of everything in front of the row
    rank r       given its slices: what goes into the row must be its slice of the plain x, other inputs the whole x;
                 its gradients, put where its slices belong, must add up to the plain ones over the ranks

A linear is linear: that its slices add up needs no weights. So this is all that cutting can change, up to rounding, for
the arguments that were seen.
"""

from collections.abc import Mapping

import torch
from torch import nn

from hf_tpp.mesh import Axis
from hf_tpp.plan.layout import Layout
from hf_tpp.plan.rules import RegionRule
from hf_tpp.tensor_parallel.attributes import set_attributes
from hf_tpp.tensor_parallel.plain_linear import linear_sizes
from hf_tpp.tensor_parallel.probe.calls import Call, NoRegionError
from hf_tpp.tensor_parallel.probe.cut_run import CutRun, Draws, run_cut
from hf_tpp.tensor_parallel.probe.roles import Roles
from hf_tpp.tensor_parallel.probe.skeleton import SEED, Skeleton
from hf_tpp.tensor_parallel.region import is_per_head, own_heads

__all__ = ["emulate"]

_TOLERANCE = 1e-4
_NOISE_FLOOR = 1e-3  # of the largest gradient; smaller ones may be nothing but rounding, as that of a bias of the keys
_SEED = SEED + 100


def emulate(skeleton: Skeleton, name: str, call: Call, roles: Roles, rule: RegionRule, tp_size: int) -> None:
    """Check that a rule is exact for a module.

    Args:
        skeleton: Of the model.
        name: Of the module.
        call: How it is called.
        roles: Of its linears.
        rule: How it would be cut.
        tp_size: Number of tensor-parallel ranks.

    Raises:
        NoRegionError: It is not exact.
        ConfigurationError: Its units cannot be dealt out to the ranks.
    """
    draws = Draws(_SEED)
    plain = run_cut(skeleton.copy(name), call, draws)
    weights = _Weights(plain)
    expected = _gradients(plain, weights.of_inputs)
    totals = {leaf: torch.zeros_like(gradient) for leaf, gradient in expected.items()}
    for tp_rank in range(tp_size):
        tp = Axis(tp_rank, tp_size, None, tuple(range(tp_size)))
        local = _run_local(skeleton.copy(name), call, draws, rule, tp)
        _compare_values(plain, local, rule, tp)
        share = 2 * (tp_rank + 1) / (tp_size * (tp_size + 1))  # uneven shares of 1, lest a sum be mistaken for a mean
        upstream = {linear: share * weight for linear, weight in weights.of_inputs.items()}
        upstream[rule.row] = own_slice(weights.of_inputs[rule.row], -1, rule.row_layout, tp)
        for leaf, gradient in _gradients(local, upstream).items():
            if leaf not in totals:
                raise NoRegionError(f"{leaf} has a gradient on rank {tp_rank}, and none in the plain module")
            _add_slice(totals[leaf], gradient, leaf, rule, tp)
        _compare_behind(plain, local, roles, weights.of_result)
    floor = _NOISE_FLOOR * max(float(gradient.norm()) for gradient in expected.values())
    for leaf, total in totals.items():
        _check_close(f"the gradient of {leaf}, summed over the ranks,", total, expected[leaf], floor)


def own_slice(full: torch.Tensor, dim: int, layout: Layout, tp: Axis) -> torch.Tensor:
    """This rank's part of a tensor whose `dim` is cut."""
    pieces = [full.narrow(dim, piece.start, piece.size) for piece in layout.segments(tp.rank, tp.size)]
    return torch.cat(pieces, dim) if pieces else full.narrow(dim, 0, 0)


class _Weights:
    """Random weights of everything that a gradient is taken of."""

    def __init__(self, plain: CutRun) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        ends = {**plain.inputs, "": plain.result}
        self.of_inputs = {
            name: torch.randn(end.shape, generator=generator, device="cpu").to(end.dtype) for name, end in ends.items()
        }
        self.of_result = self.of_inputs.pop("")


def _run_local(module: nn.Module, call: Call, draws: Draws, rule: RegionRule, tp: Axis) -> CutRun:
    set_attributes(module, rule.attributes)
    for name, cut in rule.tensors.items():
        _set_parameter(module, name, own_slice(module.get_parameter(name).detach(), cut.dim, cut.layout, tp))
    for name, layout in {**rule.columns, rule.row: rule.row_layout}.items():
        _set_local_shape(module.get_submodule(name), layout, name == rule.row, tp)

    def change_output(name: str, given: torch.Tensor) -> torch.Tensor:
        return own_slice(given, -1, rule.columns[name], tp) if name in rule.columns else given

    def change_argument(name: str, value: torch.Tensor) -> torch.Tensor:
        return own_heads(module, name, value, rule, tp) if is_per_head(name, value, rule) else value

    return run_cut(module, call, draws, change_output, change_argument)


def _set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module.get_submodule(owner).register_parameter(attribute, nn.Parameter(value))


def _set_local_shape(linear: nn.Module, layout: Layout, is_row: bool, tp: Axis) -> None:
    """Its weight is not read, but its shape may be."""
    in_features, out_features, transposed = linear_sizes(linear)
    local = layout.local_size(tp.rank, tp.size)
    shape = (out_features, local) if is_row else (local, in_features)
    zero = torch.zeros((), device="cpu").expand(shape)
    linear.register_parameter("weight", nn.Parameter(zero.t() if transposed else zero))


def _gradients(run: CutRun, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of everything in front of the row linear, by name."""
    leaves = {**run.outputs, **run.parameters, **run.arguments}
    ends = {name: end for name, end in run.inputs.items() if end.requires_grad}
    upstream = [weights[name] for name in ends]
    found = torch.autograd.grad([*ends.values()], [*leaves.values()], upstream, retain_graph=True, allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _compare_values(plain: CutRun, local: CutRun, rule: RegionRule, tp: Axis) -> None:
    for name, whole in plain.inputs.items():
        expected = own_slice(whole, -1, rule.row_layout, tp) if name == rule.row else whole
        _check_close(f"the input of {name} on rank {tp.rank}", local.inputs[name], expected)
    _check_close(f"the result on rank {tp.rank}", local.result, plain.result)


def _compare_behind(plain: CutRun, local: CutRun, roles: Roles, weight: torch.Tensor) -> None:
    """What lies behind the row sees the whole sum on each rank, and nothing else may."""
    found = []
    for run in (plain, local):
        leaves = {**run.outputs, **run.parameters, **run.arguments}
        gradients = torch.autograd.grad(run.result, [*leaves.values()], weight, retain_graph=True, allow_unused=True)
        found.append({name: g for name, g in zip(leaves, gradients, strict=True) if g is not None})
    if found[1].keys() != {roles.row, *roles.behind, *roles.outside_inputs}:
        raise NoRegionError("the result of a rank comes from elsewhere than that of the plain module")
    for name, gradient in found[1].items():
        _check_close(f"the gradient of {name}", gradient, found[0][name])


def _add_slice(total: torch.Tensor, gradient: torch.Tensor, name: str, rule: RegionRule, tp: Axis) -> None:
    dim, layout = -1, rule.columns.get(name)
    if name in rule.tensors:
        dim, layout = rule.tensors[name].dim, rule.tensors[name].layout
    if layout is None:
        total += gradient
        return
    for piece in layout.segments(tp.rank, tp.size):
        total.narrow(dim, piece.start, piece.size).add_(gradient.narrow(dim, piece.local_start, piece.size))


def _check_close(what: str, ours: torch.Tensor, plain: torch.Tensor, floor: float = 0.0) -> None:
    if ours.shape != plain.shape:
        raise NoRegionError(f"{what} has the shape {list(ours.shape)}, not {list(plain.shape)}")
    difference = float((ours.detach() - plain.detach()).norm())
    if not difference <= _TOLERANCE * max(float(plain.detach().norm()), floor):
        raise NoRegionError(f"{what} differs from the plain module's")
