"""What travels between stages: the output of a stage's last block, as nested tuples of tensors.

Most models hand one tensor [batch, seq, hidden] from block to block. Others return a tuple, of which later blocks get
some elements back as arguments (a top-k selection, a router's state) and others not (attention weights); or they give
all blocks one dictionary that blocks write to and later ones read from (shared keys and values).

    block's output (h, weights, state)      next block's arguments (h, state=state)      sent: h, state

A `PayloadSpec` says what is sent and where it belongs; the stage behind rebuilds the output from it, with None in the
place of what was not sent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["LeafSpec", "Payload", "PayloadSpec", "leaves_of", "plain_payload"]

Path = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """One tensor of a payload; `needs_grad`: its gradient travels back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    needs_grad: bool = True

    @property
    def num_bytes(self) -> int:
        """Size of the message."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PayloadSpec:
    """What is sent from one stage to the next.

    Attributes:
        leaves: The tensors, in the order in which they are sent.
        places: For each tensor its path in the block's output; () is the output itself.
        skeleton: The output with None for every tensor and anything else that is no container.
        shared: For tensors behind those of `places`: path in the arguments of a block, first the argument's name.
        routers: For tensors behind those: which router of which block they are the logits of.
        history: For tensors behind those: of which earlier block they are the output.
    """

    leaves: tuple[LeafSpec, ...]
    places: tuple[Path, ...] = ((),)
    skeleton: Any = None
    shared: tuple[Path, ...] = ()
    routers: tuple[tuple[int, int], ...] = ()
    history: tuple[int, ...] = ()

    def rebuild(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The block's output, from received tensors."""
        if self.places == ((),):
            return tensors[0]
        return _placed(self.skeleton, dict(zip(self.places, tensors, strict=False)), ())

    def share(self, arguments: Mapping[str, Any], tensors: Sequence[torch.Tensor]) -> None:
        """Put what blocks of earlier stages wrote to shared dictionaries into those of this stage's arguments."""
        for path, tensor in zip(self.shared, tensors[len(self.places) :], strict=False):
            owner = arguments[path[0]]
            _insert(owner, path[1:], tensor)

    def router_logits(self, tensors: Sequence[torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
        """The router logits among received tensors."""
        return dict(zip(self.routers, tensors[len(self.places) + len(self.shared) :], strict=False))

    def earlier_outputs(self, tensors: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
        """The outputs of earlier blocks among received tensors."""
        return dict(zip(self.history, tensors[len(tensors) - len(self.history) :], strict=True))


Payload = tuple[torch.Tensor, ...]


def plain_payload(shape: tuple[int, ...], dtype: torch.dtype, skeleton: Any = None) -> PayloadSpec:
    """One tensor, which is the block's output or (with a skeleton) its first element."""
    return PayloadSpec((LeafSpec(shape, dtype),), ((),) if skeleton is None else ((0,),), skeleton)


def leaves_of(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    """All tensors in nested tuples, lists and dictionaries, with their paths."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from leaves_of(part, (*path, key))
    elif isinstance(value, tuple | list):
        for key, part in enumerate(value):
            yield from leaves_of(part, (*path, key))


def skeleton_of(value: Any) -> Any:
    """The same containers around None."""
    if isinstance(value, tuple | list):
        return tuple(skeleton_of(part) for part in value)
    if isinstance(value, dict):
        return {key: skeleton_of(part) for key, part in value.items()}
    return None


def tensor_at(value: Any, path: Path) -> torch.Tensor:
    """The tensor at a path of `leaves_of`."""
    for key in path:
        value = value[key]
    assert isinstance(value, torch.Tensor)
    return value


def map_leaves(function: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with every tensor replaced."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(function, part) for part in value)
    if isinstance(value, dict):
        return {key: map_leaves(function, part) for key, part in value.items()}
    return value


def _placed(skeleton: Any, tensors: Mapping[Path, torch.Tensor], path: Path) -> Any:
    if path in tensors:
        return tensors[path]
    if isinstance(skeleton, tuple):
        return tuple(_placed(part, tensors, (*path, key)) for key, part in enumerate(skeleton))
    if isinstance(skeleton, dict):
        return {key: _placed(part, tensors, (*path, key)) for key, part in skeleton.items()}
    return None


def _insert(owner: Any, path: Path, tensor: torch.Tensor) -> None:
    """owner[path] = tensor for nested dictionaries that end in tuples."""
    key, *rest = path
    if not rest:
        owner[key] = tensor
        return
    if isinstance(rest[0], int) and len(rest) == 1:
        before = owner.get(key, ())
        owner[key] = (*before[: rest[0]], tensor, *before[rest[0] + 1 :])
        return
    _insert(owner.setdefault(key, {}), tuple(rest), tensor)
