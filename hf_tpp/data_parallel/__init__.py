"""What replicas do for one another: each has all of its weights and averages gradients, or they share everything."""

from torch import nn

from hf_tpp.data_parallel.replicas import Replicas, Replicated
from hf_tpp.data_parallel.sharded import FullySharded
from hf_tpp.data_parallel.units import check_shardable, plan_units
from hf_tpp.mesh import ParallelMesh
from hf_tpp.parts import ModelParts

__all__ = ["DATA_PARALLEL", "Replicas", "check_shardable", "replicas_of"]

DATA_PARALLEL = ("replicate", "fully_shard")


def replicas_of(model: nn.Module, parts: ModelParts, mesh: ParallelMesh, data_parallel: str) -> Replicas:
    """What a parallel model's replicas do; "fully_shard" changes the parameters of `model`, if there are several."""
    if data_parallel == "fully_shard" and mesh.dp.size > 1:
        return FullySharded(model, plan_units(model, parts), mesh)
    return Replicated(mesh)
