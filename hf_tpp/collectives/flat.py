"""Collectives on one flat tensor, whose names differ between torch releases: the only place that knows.

torch                2.10 ... 2.12              2.13 ...
all_gather_flat      all_gather_into_tensor     all_gather_single
reduce_scatter_flat  reduce_scatter_tensor      reduce_scatter_single
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

__all__ = ["all_gather_flat", "reduce_scatter_flat"]


def _first_of(*names: str) -> Callable[..., Any]:
    function: Callable[..., Any] = next(getattr(dist, name) for name in names if hasattr(dist, name))
    return function


all_gather_flat = _first_of("all_gather_single", "all_gather_into_tensor")
reduce_scatter_flat = _first_of("reduce_scatter_single", "reduce_scatter_tensor")
