"""Random generators in a checkpoint: python's, numpy's, torch's and the device's, of every rank.

A job of the same layout continues every rank's generators. At another layout each replica continues those that the
first rank of the same replica had, so that dropout goes on as it would have; a replica that did not exist before is
seeded from the first one's generator and its own number.
"""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hf_tpp.mesh import ParallelMesh

__all__ = ["get_random_state", "layout_of", "saved_by", "set_random_state"]


def layout_of(mesh: ParallelMesh) -> dict[str, int]:
    """Sizes of the axes."""
    return {"tp": mesh.tp.size, "pp": mesh.pp.size, "dp": mesh.dp.size}


def saved_by(layout: Mapping[str, int], mesh: ParallelMesh) -> int:
    """The global rank of a job of `layout` whose generators this rank continues."""
    if layout == layout_of(mesh):
        return mesh.global_rank
    return mesh.dp.rank * layout["tp"] * layout["pp"] if mesh.dp.rank < layout["dp"] else 0


def get_random_state(mesh: ParallelMesh) -> dict[str, Any]:
    """This rank's generators as plain data."""
    algorithm, keys, *position = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": (algorithm, keys.tolist(), *position),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if mesh.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(mesh.device)
    return state


def set_random_state(state: Mapping[str, Any], layout: Mapping[str, int], mesh: ParallelMesh) -> None:
    """Continue from generators that a job of `layout` saved."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if mesh.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], mesh.device)
    if mesh.dp.rank >= layout["dp"]:
        seed = int(torch.randint(0, 2**31, ())) + mesh.dp.rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
