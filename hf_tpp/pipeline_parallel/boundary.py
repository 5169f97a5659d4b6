"""Is a block given the same on the stage that runs it as on the stage before, where all that came earlier is at hand?

The stage before runs the model's code up to the first block that it does not have, and so sees with what that block
would have been called. The stage that has the block sees with what it is called. Whatever the model computes from
things that did not travel (a value without a gradient, a state that blocks leave somewhere, dropped elements of
embeddings) differs between the two.
"""

from collections.abc import Mapping
from typing import Any

import torch

from hf_tpp.collectives.agreement import checksum
from hf_tpp.pipeline_parallel.payload import Path, leaves_of

__all__ = ["Fingerprints", "differing_argument", "fingerprints"]

Fingerprints = dict[Path, tuple[int, bool]]
"""Path of a tensor in the arguments of a block -> checksum of its values, and whether it needs a gradient."""


def fingerprints(arguments: Mapping[str, Any]) -> Fingerprints:
    """All tensors that a block is given."""
    return {path: (_checksum(tensor), tensor.requires_grad) for path, tensor in leaves_of(arguments)}


def differing_argument(before: Fingerprints, here: Fingerprints) -> str | None:
    """The name of an argument that is not the same on both stages.

    Args:
        before: What the stage before would have given the block.
        here: What the stage of the block gives it.
    """
    for path in {**before, **here}:
        if path not in before or path not in here:
            return str(path[0])
        (value, graded_before), (other, graded_here) = before[path], here[path]
        # A parameter between two blocks may be real on the later stage alone: then only there it has a gradient.
        if value != other and not (graded_here and not graded_before):
            return str(path[0])
    return None


def _checksum(tensor: torch.Tensor) -> int:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return int(checksum([real.detach()]))
