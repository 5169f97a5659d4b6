"""Which parallel models live in this process, and the replicas that all of them share.

accelerate prepares a data loader without being told for which model: like its own state, the division of the processes
into replicas belongs to the process.
"""

import gc
import weakref
from typing import Any

import torch.distributed as dist
from torch import nn

from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.parallel_model import ParallelState, parallel_state

__all__ = ["find_parallel", "forget_meshes", "mesh_of_process", "register", "shared_mesh", "state_of"]

_LIVING: weakref.WeakSet[nn.Module] = weakref.WeakSet()

# (tp, pp) -> the world, and the mesh of the first model with these sizes in it. Models have groups of their own, and
# which of them are still alive differs between ranks: collectives for all of them must not depend on that.
_MESHES: dict[tuple[int, int], tuple[Any, ParallelMesh]] = {}


def register(model: nn.Module) -> None:
    """Note a model that has been parallelized; held weakly. On every rank, as `parallelize` is called."""
    _LIVING.add(model)
    mesh = state_of(model).mesh
    sizes = (mesh.tp.size, mesh.pp.size)
    if sizes not in _MESHES or _MESHES[sizes][0] is not dist.group.WORLD:
        _MESHES[sizes] = (dist.group.WORLD, mesh)


def forget_meshes() -> None:
    """Let go of the groups of a torch.distributed that has ended, so that their connections close.

    A rank that is in the middle of a collective hears of it by that.
    """
    _MESHES.clear()


def shared_mesh() -> ParallelMesh | None:
    """The mesh for all parallel models of this process; None if there is none, or one process alone.

    Raises:
        ConfigurationError: Models with different replicas: a batch cannot be right for both.
    """
    sizes = _living_sizes()
    if len(sizes) > 1:
        gc.collect()  # a model that nobody uses any more may still await collection
        sizes = _living_sizes()
    if len(sizes) > 1:
        found = " and ".join(f"tp={tp_size}, pp={pp_size}" for tp_size, pp_size in sorted(sizes))
        raise ConfigurationError(
            f"this process has parallel models with {found}: accelerate and Trainer share out batches to replicas, and "
            f"these differ. Give all models the same tp and pp, or delete the one that is not needed"
        )
    return _MESHES[sizes.pop()][1] if sizes else None


def mesh_of_process() -> ParallelMesh:
    """The mesh for all parallel models of this process, of which it is known that there are some."""
    mesh = shared_mesh()
    assert mesh is not None
    return mesh


def find_parallel(model: object) -> nn.Module | None:
    """The parallel model in `model`: itself, or what a wrapper (compiled, with adapters) holds."""
    if not isinstance(model, nn.Module):
        return None
    return next((module for module in model.modules() if _is_distributed(module)), None)


def state_of(model: nn.Module) -> ParallelState:
    """What parallelize() decided about a model of which it is known to be parallel."""
    state = parallel_state(model)
    assert state is not None
    return state


def _is_distributed(module: nn.Module) -> bool:
    state = parallel_state(module)
    return state is not None and state.mesh.world_size > 1


def _living_sizes() -> set[tuple[int, int]]:
    meshes = [state_of(model).mesh for model in _LIVING if _is_distributed(model)]
    return {(mesh.tp.size, mesh.pp.size) for mesh in meshes}
