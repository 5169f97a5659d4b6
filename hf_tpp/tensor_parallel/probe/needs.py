"""Which heads or neurons of the row need which channels of the columns: the layouts that a module may have.

forward     a channel of a column changes          the row's channels that change: a head, or one neuron
backward    from each head of the row alone        the channels of each column that have a gradient
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import nn

from hf_tpp.plan.dependence import is_shared, layout_of_needs, refined, unit_sizes
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.rules import Cut
from hf_tpp.tensor_parallel.probe.calls import Call
from hf_tpp.tensor_parallel.probe.cut_run import CutRun, Draws, run_cut
from hf_tpp.tensor_parallel.probe.roles import Roles
from hf_tpp.tensor_parallel.probe.skeleton import SEED

__all__ = ["Proposal", "propose"]

_ROW_BLOCKS = (1, 2, 4)
_MAX_GROUPS = 64
_MAX_DRAWS = 4
"""A neuron whose activation is 0 for all tokens of a draw shows no gradient; in another draw it will."""


@dataclass(frozen=True)
class Proposal:
    """One way to cut a module.

    Attributes:
        row_layout: Of the row's input channels.
        columns: Column -> layout of its outputs. Direct predecessors that are not named here are needed by all units.
        tensors: Parameter that is no linear's -> its cut.
        unit_size: Channels of a head, at the row; 1 for neurons.
        unit_counts: How many units there are, taking each size that was found: heads, groups of heads.
        has_shared: A direct predecessor is needed by all units: a single key/value head.
    """

    row_layout: Layout
    columns: dict[str, Layout]
    tensors: dict[str, Cut] = field(default_factory=dict)
    unit_size: int = 1
    unit_counts: tuple[int, ...] = ()
    has_shared: bool = False


def propose(module: nn.Module, call: Call, roles: Roles) -> Iterator[Proposal]:
    """Ways to cut a module, the most likely first; none has been tried.

    Args:
        module: A copy from a skeleton.
        call: How it is called.
        roles: Of its linears.

    Raises:
        NoRegionError: It does not run so.
    """
    run = run_cut(module, call, Draws(SEED))
    size = run.inputs[roles.row].shape[-1]
    sizes = unit_sizes(list(_influences(module, call, roles, run)), size)
    counts = tuple(size // unit_size for unit_size in sizes)
    needs: dict[int, dict[str, list[list[int]]]] = {}
    for num_blocks, unit_size in product(_ROW_BLOCKS, sizes):
        num_units = size // unit_size
        factor = _factor(num_units) if unit_size == 1 else 1
        if unit_size not in needs:
            needs[unit_size] = _needs(module, call, roles, num_units // factor)
        found = _layouts(needs[unit_size], roles, num_units // factor, num_blocks, factor)
        if any(name in found for name in roles.direct):
            columns = {name: cut.layout for name, cut in found.items() if name in roles.direct}
            tensors = {name: cut for name, cut in found.items() if name not in roles.direct}
            row = Layout((Block(num_units // num_blocks, unit_size),) * num_blocks)
            yield Proposal(row, columns, tensors, unit_size, counts, len(columns) < len(roles.direct))


def _factor(num_units: int) -> int:
    """How many neurons are looked at together, so that there are not too many groups."""
    return next(n for n in range(1, num_units + 1) if num_units % n == 0 and num_units // n <= _MAX_GROUPS)


def _influences(module: nn.Module, call: Call, roles: Roles, run: CutRun) -> Iterator[list[int]]:
    """For some channels that the row's channel 0 needs, the row's channels that depend on them."""
    columns = [run.outputs[name] for name in roles.direct]
    first = run.inputs[roles.row][..., 0].sum()
    for name, gradient in zip(roles.direct, torch.autograd.grad(first, columns, retain_graph=True), strict=True):
        needed = _is_used(gradient, -1).tolist()
        for channel, used in enumerate(needed):
            if used and not (channel and needed[channel - 1]):
                yield _influence(module, call, roles.row, run, name, channel)


def _influence(module: nn.Module, call: Call, row: str, run: CutRun, name: str, channel: int) -> list[int]:
    def raise_channel(linear: str, given: torch.Tensor) -> torch.Tensor:
        if linear != name:
            return given
        raised = given.clone()
        raised[..., channel] += 1.0
        return raised

    other = run_cut(module, call, Draws(SEED), raise_channel).inputs[row]
    change = (other - run.inputs[row]).detach()
    return torch.nonzero(_is_used(change, -1, 1e-6 * float(run.inputs[row].detach().abs().max()))).flatten().tolist()


def _needs(module: nn.Module, call: Call, roles: Roles, num_units: int) -> dict[str, list[list[int]]]:
    """Column or parameter -> for each of its dimensions (a column's channels alone) the units that need each index."""
    found: dict[str, list[torch.Tensor]] = {}
    for draw in range(_MAX_DRAWS):
        run = run_cut(module, call, Draws(SEED + draw))
        leaves = {name: {**run.outputs, **run.parameters}[name] for name in (*roles.direct, *roles.inside)}
        for name, used in _used_by_units(run.inputs[roles.row], leaves, set(roles.direct), num_units).items():
            found[name] = [a | b for a, b in zip(found[name], used, strict=True)] if name in found else used
        if all(bool(found[name][0].any(0).all()) for name in roles.direct):
            break
    return {name: [_as_bits(used) for used in dims] for name, dims in found.items()}


def _used_by_units(
    row_input: torch.Tensor, leaves: dict[str, torch.Tensor], columns: set[str], num_units: int
) -> dict[str, list[torch.Tensor]]:
    """Leaf -> for each dimension a table [units, indices]: whether the unit depends on the index."""
    rows: dict[str, list[list[torch.Tensor]]] = {name: [] for name in leaves}
    for unit in row_input.chunk(num_units, dim=-1):
        weights = torch.randn(unit.shape, generator=torch.Generator().manual_seed(SEED), device="cpu")
        gradients = torch.autograd.grad(unit, [*leaves.values()], weights, retain_graph=True, allow_unused=True)
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            if gradient is not None:
                dims = [-1] if name in columns else range(leaf.dim())
                rows[name].append([_is_used(gradient, dim) for dim in dims])
    return {name: [torch.stack(dim) for dim in zip(*found, strict=True)] for name, found in rows.items() if found}


def _is_used(values: torch.Tensor, dim: int, above: float = 0.0) -> torch.Tensor:
    """Along `dim`, whether anything differs from 0: [size of dim]."""
    last = values.detach().movedim(dim, -1)
    return (last.reshape(-1, last.shape[-1]).abs() > above).any(0)


def _as_bits(used: torch.Tensor) -> list[int]:
    """[units, indices] -> for each index the units as bits of a number."""
    return [int("".join("1" if unit else "0" for unit in reversed(column)), 2) for column in used.t().tolist()]


def _layouts(
    needs: dict[str, list[list[int]]], roles: Roles, num_units: int, num_blocks: int, factor: int
) -> dict[str, Cut]:
    """What can be cut, and where; nothing if a column can neither be cut nor is shared by all units."""
    cuts: dict[str, Cut] = {}
    for name, dims in needs.items():
        for dim, channels in enumerate(dims):
            coarse = None if is_shared(channels, num_units) else layout_of_needs(channels, num_units, num_blocks)
            layout = None if coarse is None else refined(coarse, factor)
            if layout is not None:
                cuts.setdefault(name, Cut(dim, layout))
        if name in roles.direct and name not in cuts and not is_shared(dims[0], num_units):
            return {}
    return cuts
