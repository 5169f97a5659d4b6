"""Ranks that must agree say so before anything depends on it: a difference is an error on every rank, never a hang.

Host data over a gloo group. What is compared is a few numbers; what differs is only spelled out once it does.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from hf_tpp.collectives.flat import all_gather_flat
from hf_tpp.errors import RankMismatchError

__all__ = ["agree_on", "checksum", "exchange", "text_hash", "true_somewhere"]

_FLAGS = 62  # per number that ranks exchange
_MIX = 0x9E37_79B9_7F4A_7C15 - 2**64  # odd 64-bit constant (golden ratio), as a signed integer


def text_hash(text: str) -> int:
    """A number for a text, the same in every process."""
    return zlib.crc32(text.encode())


def checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """An int64 that changes with any value, its position and its tensor; computed where the tensors are."""
    total: torch.Tensor | None = None
    for tensor in tensors:
        values = tensor.detach().reshape(-1)
        if values.is_floating_point():
            values = values.float().view(torch.int32)
        positions = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.int64)
        mixed = ((values.to(torch.int64) + 1) * (positions * _MIX)).sum()
        total = mixed if total is None else (total * 31 + mixed.to(total.device))
    return torch.zeros((), dtype=torch.int64) if total is None else total


def exchange(numbers: Sequence[int | torch.Tensor], group: dist.ProcessGroup | None) -> list[list[int]]:
    """Every rank's numbers, in rank order. One small message and at most one wait for the device."""
    row = torch.stack([torch.as_tensor(number, dtype=torch.int64) for number in _on_one_device(numbers)]).cpu()
    if group is None:
        return [row.tolist()]
    gathered = torch.empty(group.size() * len(row), dtype=torch.int64)
    all_gather_flat(gathered, row, group=group)
    rows: list[list[int]] = gathered.view(group.size(), -1).tolist()
    return rows


def true_somewhere(flags: Sequence[bool], group: dist.ProcessGroup | None) -> list[bool]:
    """Which of the flags any rank has set. Collective; as many flags on every rank."""
    numbers = [
        sum(1 << offset for offset, flag in enumerate(flags[start : start + _FLAGS]) if flag)
        for start in range(0, len(flags), _FLAGS)
    ]
    rows = exchange(numbers, group) if numbers else []
    return [any(row[index // _FLAGS] >> index % _FLAGS & 1 for row in rows) for index in range(len(flags))]


def _on_one_device(numbers: Sequence[int | torch.Tensor]) -> list[int | torch.Tensor]:
    devices = {number.device for number in numbers if isinstance(number, torch.Tensor)}
    if not devices or devices == {torch.device("cpu")}:
        return list(numbers)
    device = next(device for device in devices if device.type != "cpu")
    return [torch.as_tensor(number, dtype=torch.int64).to(device) for number in numbers]


def agree_on(facts: Mapping[str, Any], problem: Exception | None, group: dist.ProcessGroup | None) -> None:
    """Raise on every rank if any rank has a problem or the facts differ.

    Args:
        facts: What must be the same everywhere, by name.
        problem: What this rank found wrong, to be raised here; the others are told.
        group: gloo group of all ranks; None for a world of one.

    Collective: every rank of `group`.

    Raises:
        Exception: `problem`, or another rank's, as the same class.
        RankMismatchError: The facts differ.
    """
    if group is None:
        if problem is not None:
            raise problem
        return
    everyone: list[Any] = [None] * group.size()
    dist.all_gather_object(everyone, (dict(facts), problem), group=group)
    if problem is not None:
        raise problem
    ranks = dist.get_process_group_ranks(group)
    for rank, (_, other) in zip(ranks, everyone, strict=True):
        if other is not None:
            raise type(other)(f"rank {rank}: {other}")
    by_rank = {rank: theirs for rank, (theirs, _) in zip(ranks, everyone, strict=True)}
    differences = [
        f"{name}: " + ", ".join(f"rank {rank} has {theirs[name]!r}" for rank, theirs in by_rank.items())
        for name in facts
        if len({repr(theirs.get(name)) for theirs in by_rank.values()}) > 1
    ]
    if differences:
        raise RankMismatchError(
            "the ranks disagree, they must all be given the same model and sizes: " + "; ".join(differences)
        )
