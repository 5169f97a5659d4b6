"""Numbers of a module that may have to be local: candidates, of which the emulation takes the first that works.

Known names come first (`attributes.py`). Under unknown names, a number is a candidate if it counts what is cut: heads,
groups of heads, channels of the row or of a column. As few of these as possible are changed: a number may be equal by
chance.
"""

import inspect
from collections.abc import Iterator
from itertools import chain, combinations, islice
from typing import Any

from torch import nn

from hf_tpp.plan.layout import Layout
from hf_tpp.plan.resolve import HeadCounts
from hf_tpp.tensor_parallel.attributes import local_attributes
from hf_tpp.tensor_parallel.probe.needs import Proposal

__all__ = ["local_numbers"]

_MAX_TRIED = 256
_NO_COUNTS = ("layer", "index", "idx")


def local_numbers(module: nn.Module, proposal: Proposal, tp_size: int, config: Any) -> Iterator[dict[str, int]]:
    """Attribute -> local value; several choices, the most likely first.

    Args:
        module: The module, or a copy.
        proposal: How it is cut.
        tp_size: Number of tensor-parallel ranks.
        config: Of the (text) model.
    """
    known = {} if proposal.unit_size == 1 else _known(module, proposal, tp_size, config)
    yield known
    if known:
        yield {}
    counted = _counted(proposal, tp_size)
    values = {**_config_numbers(module), **{name: value for name, value in vars(module).items() if type(value) is int}}
    unknown = {
        name: counted[value]
        for name, value in values.items()
        if value in counted and name not in known and not any(word in name for word in _NO_COUNTS)
    }
    choices = chain.from_iterable(combinations(unknown, size) for size in range(1, len(unknown) + 1))
    for chosen in islice(choices, _MAX_TRIED):
        found = {name: unknown[name] for name in chosen}
        yield {**known, **found}
        if known:
            yield found


def _known(module: nn.Module, proposal: Proposal, tp_size: int, config: Any) -> dict[str, int]:
    heads = HeadCounts(sum(block.num_units for block in proposal.row_layout.blocks), _num_kv_heads(proposal))
    if heads.num_heads % tp_size:
        return {}
    return local_attributes(module, heads, heads.local(tp_size, in_pairs=False), (), config)


def _num_kv_heads(proposal: Proposal) -> int:
    """The fewest units of a block, over all blocks of a column that are dealt out as one."""
    if proposal.has_shared:
        return 1
    num_blocks = len(proposal.row_layout.blocks)
    return min(block.num_units * num_blocks for layout in proposal.columns.values() for block in layout.blocks)


def _counted(proposal: Proposal, tp_size: int) -> dict[int, int]:
    """Full count -> local count, of heads, their groups, and channels."""
    cut = [*proposal.columns.values(), *(cut.layout for cut in proposal.tensors.values())]
    layouts = [proposal.row_layout, *cut, *(Layout((block,)) for layout in cut for block in layout.blocks)]
    counts = {layout.size: layout.local_size(0, tp_size) for layout in layouts}
    counts |= {count: count // tp_size for count in proposal.unit_counts if count % tp_size == 0}
    num_heads, num_kv_heads = proposal.unit_counts[0], _num_kv_heads(proposal)
    local_kv_heads = max(num_kv_heads // tp_size, 1)
    counts[num_kv_heads] = local_kv_heads
    counts.setdefault(num_heads // num_kv_heads, num_heads // tp_size // local_kv_heads)
    return {count: local for count, local in counts.items() if local and local != count}


def _config_numbers(module: nn.Module) -> dict[str, int]:
    """Numbers that the module's forward reads from its configuration, as "config.x"."""
    config = vars(module).get("config")
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return {}
    numbers = {name: value for name, value in vars(config).items() if type(value) is int} if config else {}
    return {f"config.{name}": value for name, value in numbers.items() if f"self.config.{name}" in source}
