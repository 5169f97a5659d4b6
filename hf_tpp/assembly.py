"""From a plain model to this rank's part of it: everything is checked first, then swapped, hollowed and filled.

Assembly.check    parts, cuts, stages, ties; reads the model, changes nothing, may refuse
assembly.apply    swap the linears, hollow the other stages; new parameters are on meta
assembly.fill     one shard after the other from the source
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hf_tpp.checkpoint.source import WeightSource
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.parts import ModelParts
from hf_tpp.pipeline_parallel.split import StageFlow, hollow_out
from hf_tpp.plan.stages import balance_stages, check_stages
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.region import RegionState, install_sequence_boundaries
from hf_tpp.tensor_parallel.rewrite import RewritePlan, apply_rewrite, plan_rewrite

__all__ = ["Assembly"]


@dataclass(slots=True)
class Assembly:
    """All decisions about one model, taken without changing it.

    Attributes:
        model: The model.
        parts: Its parts.
        cuts: What is swapped and how weights are cut.
        stages: Blocks per stage.
        shapes: Canonical parameter name -> shape in the unsplit model.
        canonical: Parameter name -> the name under which checkpoints store it (tied weights have several names).
        sequence_parallel: Hidden states are cut along the sequence in training.
        frozen: Canonical names of parameters that need no gradient.
    """

    model: nn.Module
    parts: ModelParts
    cuts: RewritePlan
    stages: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    canonical: dict[str, str]
    sequence_parallel: bool
    frozen: set[str] = field(default_factory=set)

    @classmethod
    def check(
        cls, model: nn.Module, tp_size: int, pp_size: int, stages: Sequence[int] | None, sequence_parallel: bool
    ) -> "Assembly":
        """Take all decisions, or refuse.

        Raises:
            ConfigurationError: Sizes that cannot work for this model.
            UnsupportedModelError: A model that cannot be split exactly.
        """
        parts = ModelParts.find(model)
        cuts = plan_rewrite(model, parts, tp_size)
        if stages is None:
            head = model.get_submodule(parts.head)
            costs = [_num_parameters(model.get_submodule(parts.block_name(i))) for i in range(parts.num_blocks)]
            chosen = balance_stages(costs, pp_size, last_cost=_num_parameters(head))
        else:
            chosen = check_stages(stages, parts.num_blocks, pp_size)
        first_names: dict[nn.Parameter, str] = {}
        canonical = {
            name: first_names.setdefault(parameter, name)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        }
        tied = {name for name, first in canonical.items() if name != first}
        if tied - {f"{parts.head}.weight"}:
            raise UnsupportedModelError(f"the weights {sorted(tied)} are tied; only the head may share the embedding's")
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return cls(model, parts, cuts, chosen, shapes, canonical, sequence_parallel and tp_size > 1, frozen)

    def blocks(self, stage: int) -> range:
        """Indices of the blocks of a stage."""
        start = sum(self.stages[:stage])
        return range(start, start + self.stages[stage])

    def apply(self, mesh: ParallelMesh, state: RegionState, flow: StageFlow) -> None:
        """Swap and hollow, in place; afterwards swapped parameters are on the meta device."""
        blocks = self.blocks(mesh.pp.rank)
        apply_rewrite(self.model, self.parts, self.cuts, mesh.tp, blocks, state)
        if mesh.pp.size > 1:
            hollow_out(self.model, self.parts, blocks, flow)
        if self.sequence_parallel:
            first = self.model.get_submodule(self.parts.block_name(0)) if mesh.pp.is_first else None
            last = self.model.get_submodule(self.parts.block_name(blocks[-1])) if mesh.pp.is_last else None
            install_sequence_boundaries(first, last, state)

    def spec(self, name: str, mesh: ParallelMesh) -> ShardSpec:
        """How the local parameter `name` lies in the unsplit model."""
        canonical = self.canonical[name]
        dim, layout = self.cuts.cuts.get(name, (None, None))
        is_tied = sum(first == canonical for first in self.canonical.values()) > 1
        in_block = name.startswith(self.parts.blocks + ".")
        return ShardSpec(
            name=canonical,
            full_shape=self.shapes[canonical],
            dim=dim,
            layout=layout,
            tp_rank=mesh.tp.rank,
            tp_size=mesh.tp.size,
            num_stages=2 if is_tied and mesh.pp.size > 1 else 1,
            sequence_sharded=self.sequence_parallel and in_block and dim is None,
        )

    @torch.no_grad()
    def fill(self, source: WeightSource, mesh: ParallelMesh, dtypes: Mapping[str, torch.dtype]) -> dict[str, ShardSpec]:
        """Give every local parameter and buffer its values, on this rank's device.

        Args:
            source: Where the values come from.
            mesh: This rank's place.
            dtypes: Canonical name -> type of the parameter.

        Returns:
            Local parameter name -> its spec, tied names once.
        """
        filled: dict[str, nn.Parameter] = {}
        specs: dict[str, ShardSpec] = {}
        for name, _ in list(self.model.named_parameters(remove_duplicate=False)):
            spec = self.spec(name, mesh)
            if spec.name not in filled:
                values = source.shard(spec, mesh.device, dtypes[spec.name])
                filled[spec.name] = nn.Parameter(values, requires_grad=spec.name not in self.frozen)
                specs[name] = spec
            _assign(self.model, name, filled[spec.name])
        for name, _ in list(self.model.named_buffers(remove_duplicate=False)):
            _assign(self.model, name, source.buffer(name, mesh.device))
        return specs

    def all_specs(self, mesh: ParallelMesh) -> list[ShardSpec]:
        """The specs of all parameters of the whole model, in an order that every rank shares."""
        return [self.spec(name, mesh) for name in self.canonical]


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(attribute, tensor)
    else:
        module.register_buffer(attribute, tensor, persistent=attribute not in module._non_persistent_buffers_set)
