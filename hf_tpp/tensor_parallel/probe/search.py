"""Look for regions in the modules of a model's blocks that the table of names does not know.

block --> modules with two linears or more, from the outside in --> roles, proposals, emulation --> the first that
                                                                   passes is taken, and nothing in it is looked at
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hf_tpp.errors import HfTppError
from hf_tpp.parts import ModelParts
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.patterns import HEAD_INPUTS
from hf_tpp.plan.rules import RegionRule
from hf_tpp.tensor_parallel.matching.inside import summed_parameters
from hf_tpp.tensor_parallel.probe.calls import Call, Calls, NoRegionError, observe_calls
from hf_tpp.tensor_parallel.probe.cut_run import Draws, run_cut
from hf_tpp.tensor_parallel.probe.emulation import emulate
from hf_tpp.tensor_parallel.probe.needs import Proposal, propose
from hf_tpp.tensor_parallel.probe.numbers import local_numbers
from hf_tpp.tensor_parallel.probe.roles import Roles, find_roles
from hf_tpp.tensor_parallel.probe.skeleton import SEED, Skeleton, linears_of
from hf_tpp.tensor_parallel.probe.ties import has_aliases, torn_regions

__all__ = ["Probed", "probe_regions"]

_PLAIN = (bool, int, float, str, type(None))


@dataclass
class Probed:
    """What was found.

    Attributes:
        rules: Name of a module -> its rule; each has passed the emulation.
        declined: Name of a module with several linears, in which nothing was found -> why.
    """

    rules: dict[str, RegionRule] = field(default_factory=dict)
    declined: dict[str, str] = field(default_factory=dict)


def probe_regions(
    model: nn.Module,
    parts: ModelParts,
    config: Any,
    tp_size: int,
    taken: Collection[str],
    include_shipped: bool = False,
) -> Probed:
    """Probe the modules of all blocks; the model is only read, and may be on the meta device.

    Args:
        model: The whole model.
        parts: Its parts.
        config: Of the (text) model.
        tp_size: Number of tensor-parallel ranks.
        taken: Modules about which something else has decided: neither they, nor what they are in or have in them, are
            looked at.
        include_shipped: Look at modules of transformers' own as well: families are in the table as they are, and what
            it leaves whole stays so, but the two can be compared.
    """
    search = _Search(model, parts, config, tp_size)
    names = [
        name
        for index in range(parts.num_blocks)
        for name, module in _named_modules(model, parts.block_name(index))
        if _could_be_region(module)
        and (include_shipped or not type(module).forward.__module__.startswith("transformers."))
        and not any(_overlap(name, other) for other in taken)
    ]
    if names:
        search.run(names)
    return search.probed


class _Search:
    """The search through one model; what was found for one module is tried first for others of its kind."""

    def __init__(self, model: nn.Module, parts: ModelParts, config: Any, tp_size: int) -> None:
        self.probed = Probed()
        self._model, self._parts, self._config, self._tp_size = model, parts, config, tp_size
        self._found: dict[str, RegionRule | str] = {}
        self._passed: set[tuple[str, str]] = set()

    def run(self, names: list[str]) -> None:
        """Probe the modules of these names, outer ones before inner ones."""
        try:
            skeleton = Skeleton(self._model)
        except Exception as error:  # what cannot be copied cannot be probed
            self.probed.declined = dict.fromkeys(names, f"the model cannot be copied ({type(error).__name__}: {error})")
            return
        calls = observe_calls(skeleton.copy(), self._parts, names)
        for name in names:
            if any(_overlap(name, found) for found in self.probed.rules):
                continue
            try:
                self.probed.rules[name] = self._probe(skeleton, name, calls)
            except (NoRegionError, HfTppError) as reason:
                self.probed.declined[name] = str(reason)
        for name in torn_regions(self._model, self.probed.rules):
            del self.probed.rules[name]
            self.probed.declined[name] = "a weight of it is used elsewhere as well, and would not be cut there"
        for name in [*self.probed.declined]:
            outer = (other for other in self.probed.declined if name.startswith(f"{other}."))
            if any(outer) or any(found.startswith(f"{name}.") for found in self.probed.rules):
                del self.probed.declined[name]

    def _probe(self, skeleton: Skeleton, name: str, calls: Calls) -> RegionRule:
        """The rule of a module.

        Raises:
            NoRegionError: There is none.
        """
        if name in calls.problems:
            raise NoRegionError(calls.problems[name])
        call, module = calls.seen[name], self._model.get_submodule(name)
        if has_aliases(module):
            raise NoRegionError("something in it has several names")
        kind = _kind(module)
        if kind not in self._found:
            try:
                self._found[kind] = self._search(skeleton, name, call)
            except (NoRegionError, HfTppError) as reason:
                self._found[kind] = str(reason)
        rule = self._found[kind]
        if isinstance(rule, str):
            raise NoRegionError(rule)
        # Attributes that are not part of the kind (a layer's number, a window) may change what it computes.
        detailed = (kind, _attributes(module))
        if detailed not in self._passed:
            emulate(skeleton, name, call, self._roles(skeleton, name, call), rule, self._tp_size)
            self._passed.add(detailed)
        return rule

    def _roles(self, skeleton: Skeleton, name: str, call: Call) -> Roles:
        return find_roles(run_cut(skeleton.copy(name), call, Draws(SEED)), call)

    def _search(self, skeleton: Skeleton, name: str, call: Call) -> RegionRule:
        roles = self._roles(skeleton, name, call)
        module = self._model.get_submodule(name)
        problem = "no channels of its linears belong to heads or neurons of the row linear"
        for proposal in propose(skeleton.copy(name), call, roles):
            for numbers in local_numbers(module, proposal, self._tp_size, self._config):
                rule = _rule(module, roles, proposal, numbers)
                try:
                    emulate(skeleton, name, call, roles, rule, self._tp_size)
                except (NoRegionError, HfTppError) as reason:
                    problem = str(reason)
                else:
                    return rule
        raise NoRegionError(problem)


def _rule(module: nn.Module, roles: Roles, proposal: Proposal, numbers: dict[str, int]) -> RegionRule:
    row, is_attention = proposal.row_layout, proposal.unit_size > 1
    return RegionRule(
        kind="attention" if is_attention else "MLP",
        columns=proposal.columns,
        row=roles.row,
        row_layout=row,
        tensors=proposal.tensors,
        summed=summed_parameters(module, {*proposal.columns, roles.row}, proposal.tensors, roles.behind),
        head_inputs=tuple(sorted(HEAD_INPUTS)) if is_attention else (),
        head_layout=Layout((Block(row.blocks[0].num_units),)) if is_attention and len(row.blocks) == 1 else None,
        outside_inputs=roles.outside_inputs,
        attributes=numbers,
        found_by="probe",
    )


def _named_modules(model: nn.Module, block: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules below a block, under each of their names: blocks may share modules."""
    for name, module in model.get_submodule(block).named_modules(remove_duplicate=False):
        if name:
            yield f"{block}.{name}", module


def _could_be_region(module: nn.Module) -> bool:
    """Two linears at least, and none that an adapter wraps."""
    homes = {type(child).__module__.partition(".")[0] for child in module.modules()}
    is_called = not isinstance(module, (nn.ModuleList, nn.ModuleDict))
    return is_called and "peft" not in homes and len(linears_of(module)) > 1


def _overlap(name: str, other: str) -> bool:
    """Whether one is the other, or lies in it."""
    return f"{name}.".startswith(f"{other}.") or f"{other}.".startswith(f"{name}.")


def _kind(module: nn.Module) -> str:
    """Class and sizes of all that is in a module."""
    classes = [(name, type(child)) for name, child in module.named_modules()]
    return str((classes, [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]))


def _attributes(module: nn.Module) -> str:
    """All plain attributes of all that is in a module."""
    return str(
        [
            (name, key, value)
            for name, child in module.named_modules()
            for key, value in vars(child).items()
            if isinstance(value, _PLAIN)
        ]
    )
