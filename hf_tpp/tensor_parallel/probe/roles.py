"""What the linears and the further parameters of a module are for, read off its graph cut at the linears.

hidden -> [q_a] -> norm -> [q_b] -----,
hidden -> [k] -----------------------attention -> [o] -> result         row: o     columns: q_b, k     inside: q_a
"""

from dataclasses import dataclass

from hf_tpp.tensor_parallel.probe.calls import Call, NoRegionError
from hf_tpp.tensor_parallel.probe.cut_run import CutRun, reached

__all__ = ["Roles", "find_roles"]


@dataclass(frozen=True)
class Roles:
    """Names, relative to the module.

    Attributes:
        row: The linear that the result comes from.
        direct: Linears that reach the row, and no other: they may be columns.
        inside: Parameters in front of the row that are no linears'.
        behind: Parameters behind the row.
        outside_inputs: Arguments with a gradient that join behind the row.
    """

    row: str
    direct: tuple[str, ...]
    inside: tuple[str, ...]
    behind: tuple[str, ...]
    outside_inputs: frozenset[str]


def find_roles(run: CutRun, call: Call) -> Roles:
    """The roles in a module that was run whole.

    Raises:
        NoRegionError: It is no region.
    """
    leaves = {**run.outputs, **run.parameters}
    at_result = reached(run.result, leaves)
    before = {name: reached(x, leaves) for name, x in run.inputs.items()}
    rows = at_result & run.outputs.keys()
    if len(rows) != 1:
        raise NoRegionError(f"its result comes from {', '.join(sorted(rows)) or 'no linear'}, and not from one")
    (row,) = rows
    used = set().union(*before.values())
    if row in used:
        raise NoRegionError(f"{row} reaches another linear as well as the result")
    lost = run.outputs.keys() - used - rows
    if lost:
        raise NoRegionError(f"what {', '.join(sorted(lost))} computes does not reach the result")
    _check_parameters(run, used, at_result)
    elsewhere = set().union(*(found for name, found in before.items() if name != row))
    return Roles(
        row=row,
        direct=tuple(name for name in run.outputs if name in before[row] - elsewhere),
        inside=tuple(name for name in run.parameters if name in used),
        behind=tuple(name for name in run.parameters if name in at_result),
        outside_inputs=_outside_inputs(run, call),
    )


def _check_parameters(run: CutRun, used: set[str], at_result: set[str]) -> None:
    for name in run.parameters:
        if name in used and name in at_result:
            raise NoRegionError(f"{name} is used in front of the row linear and behind it")
        if name not in used and name not in at_result:
            raise NoRegionError(f"{name} is not used")


def _outside_inputs(run: CutRun, call: Call) -> frozenset[str]:
    """The gradient of what enters is summed over the ranks, that of what joins behind the row is not."""
    behind = reached(run.result, run.arguments)
    if call.hidden in behind:
        raise NoRegionError("its hidden states reach the result beside the row linear")
    for name in call.with_gradient:
        if name not in behind or any(reached(x, {name: run.arguments[name]}) for x in run.inputs.values()):
            raise NoRegionError(f"it is given {name!r}, which needs a gradient, beside the hidden states")
    return frozenset(behind)
