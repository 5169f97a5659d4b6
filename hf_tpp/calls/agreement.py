"""The ranks of a replica must be called alike: a difference is an error on every rank, never a hang."""

from collections.abc import Sequence
from typing import Any

import torch

from hf_tpp.calls.context import Batch, CallContext
from hf_tpp.collectives.agreement import agree_on, checksum, exchange, text_hash
from hf_tpp.errors import HfTppError

__all__ = ["agree_on_call"]


def agree_on_call(
    context: CallContext,
    batch: Batch,
    problem: HfTppError | None,
    numbers: Sequence[int | torch.Tensor],
    *,
    trains: bool,
) -> list[list[int]]:
    """Raise on all ranks unless the ranks of each replica were called alike.

    Args:
        context: The model's.
        batch: All arguments of the call.
        problem: What this rank found wrong with it.
        numbers: To be given to the others; may differ between ranks, but as many in training as in evaluation.
        trains: Whether this is a training pass, of which all replicas hear; an evaluation concerns one replica.

    Returns:
        The `numbers` of the first rank of each replica (of this one alone in evaluation).
    """
    mesh = context.mesh
    tensors = [
        part
        for value in batch.values()
        for part in (value if isinstance(value, list) else [value])
        if isinstance(part, torch.Tensor)
    ]
    arguments = str({name: _describe(value) for name, value in batch.items()})
    facts = (int(trains), int(problem is not None), text_hash(arguments), checksum(tensors))
    rows = exchange([*facts, *numbers], mesh.replica_control)
    is_refused = any(row[1] or row[:4] != rows[0][:4] for row in rows)
    if is_refused:
        call = {
            "call": "training" if trains else "evaluation",
            "batch": f"{arguments} checksum {int(checksum(tensors)):x}",
        }
        try:
            agree_on(call, problem, mesh.replica_control)
        except HfTppError as error:
            problem = error
    if not any(row[0] for row in rows) or mesh.dp.size == 1:
        if problem is not None:
            raise problem
        return [rows[0][4:]]
    # If one rank of a replica trains, all of its ranks are here: the other replicas must hear what is wrong.
    replicas = exchange([int(is_refused), *numbers], mesh.control)[:: mesh.replica.size]
    if any(row[0] for row in replicas):
        agree_on({}, problem, mesh.control)
    return [row[1:] for row in replicas]


def _describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return [_describe(part) for part in value]
    return value if isinstance(value, bool | int | float | str) else type(value).__name__
