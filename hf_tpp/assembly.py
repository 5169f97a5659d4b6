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
from hf_tpp.pipeline_parallel.flow import StageFlow
from hf_tpp.pipeline_parallel.split import hollow_out
from hf_tpp.pipeline_parallel.trace import BlockInputs, trace_block_inputs
from hf_tpp.plan.layout import Layout
from hf_tpp.plan.stages import balance_stages, check_stages
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.matching import UserPlan
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.tensor_parallel.rewrite import RewritePlan, apply_rewrite, plan_rewrite
from hf_tpp.tensor_parallel.sequence import check_tokenwise, install_sequence_boundaries
from hf_tpp.tensor_parallel.whole_head import install_whole_head, plan_whole_head
from hf_tpp.wrappers import plain_names, unwrap_hollow

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
        inputs: Which parameters outside the blocks each block needs; None without a pipeline.
        whole_head: How the logits of a head lie that is not cut; None if head and loss stay as they are.
        plain_names: Parameter name -> its name in a model without adapters.
    """

    model: nn.Module
    parts: ModelParts
    cuts: RewritePlan
    stages: tuple[int, ...]
    shapes: dict[str, tuple[int, ...]]
    canonical: dict[str, str]
    sequence_parallel: bool
    frozen: set[str] = field(default_factory=set)
    inputs: BlockInputs | None = None
    whole_head: Layout | None = None
    plain_names: dict[str, str] = field(default_factory=dict)

    @classmethod
    def check(
        cls,
        model: nn.Module,
        tp_size: int,
        pp_size: int,
        stages: Sequence[int] | None,
        sequence_parallel: bool,
        plan: UserPlan | None = None,
        align_vocabulary: bool = True,
        is_alone: bool = False,
    ) -> "Assembly":
        """Take all decisions, or refuse. The arguments are those of `parallelize`.

        A model that `is_alone`, in a world of one, keeps its own forward: the caller sees its logits.

        Raises:
            ConfigurationError: Sizes that cannot work for this model.
            UnsupportedModelError: A model that cannot be split exactly.
        """
        parts = ModelParts.find(model)
        cuts = plan_rewrite(model, parts, tp_size, plan)
        if sequence_parallel and tp_size > 1:
            check_tokenwise(model, parts, cuts)
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
        _check_ties(canonical, cuts)
        inputs = trace_block_inputs(model, parts) if pp_size > 1 else None
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        whole_head = plan_whole_head(model, parts, align_vocabulary) if tp_size == 1 and not is_alone else None
        return cls(
            model,
            parts,
            cuts,
            chosen,
            shapes,
            canonical,
            sequence_parallel and tp_size > 1,
            frozen,
            inputs,
            whole_head,
            plain_names(model),
        )

    @property
    def logits(self) -> Layout | None:
        """How the model's logits lie on a rank; None if they are whole, without padding."""
        whole = self.whole_head
        return whole if whole is not None and whole.padded_local_size != whole.size else self.cuts.vocabulary.logits

    def blocks(self, stage: int) -> range:
        """Indices of the blocks of a stage."""
        start = sum(self.stages[:stage])
        return range(start, start + self.stages[stage])

    def apply(self, mesh: ParallelMesh, state: RegionState, flow: StageFlow) -> None:
        """Swap and hollow, in place; afterwards swapped parameters are on the meta device."""
        blocks = self.blocks(mesh.pp.rank)
        apply_rewrite(self.model, self.parts, self.cuts, mesh.tp, blocks, state)
        if self.whole_head is not None:
            install_whole_head(self.model, self.parts, self.whole_head)
        if mesh.pp.size > 1:
            assert self.inputs is not None
            flow.block_before = blocks.start - 1
            flow.history = self.inputs.history(blocks.stop) if not mesh.pp.is_last else ()
            hollow_out(self.model, self.parts, blocks, self._outside(mesh.pp.rank), flow, mesh.device)
            unwrap_hollow(self.model)
        if self.sequence_parallel:
            first = self.model.get_submodule(self.parts.block_name(0)) if mesh.pp.is_first else None
            last = self.model.get_submodule(self.parts.block_name(blocks[-1])) if mesh.pp.is_last else None
            install_sequence_boundaries(first, last, state)

    def spec(self, name: str, mesh: ParallelMesh) -> ShardSpec:
        """How the local parameter `name` lies in the unsplit model."""
        canonical = self.canonical[name]
        dim, layout = self.cuts.cuts.get(name, (None, None))
        in_block = self.parts.is_in_block(name)
        return ShardSpec(
            name=canonical,
            full_shape=self.shapes[canonical],
            dim=dim,
            layout=layout,
            tp_rank=mesh.tp.rank,
            tp_size=mesh.tp.size,
            stages=self._stages_of(canonical),
            is_partial=dim is None and (name in self.cuts.summed or (self.sequence_parallel and in_block)),
        )

    def _outside(self, stage: int) -> frozenset[str]:
        """Names of the parameters outside the blocks that a stage uses."""
        if self.inputs is None:
            return frozenset(self.canonical)
        blocks = self.blocks(stage)
        used = frozenset().union(*(self.inputs.of_block[index] for index in blocks))
        return used | self.inputs.behind if blocks.stop == self.parts.num_blocks else used

    def _stages_of(self, canonical: str) -> tuple[int, ...]:
        if self.inputs is None:
            return (0,)
        names = [name for name, first in self.canonical.items() if first == canonical]
        return tuple(sorted({stage for name in names for stage in self.stages_with(name)}))

    def stages_with(self, name: str) -> tuple[int, ...]:
        """All stages that hold a parameter of the unsplit model under this very name."""
        if self.inputs is None:
            return (0,)
        return tuple(stage for stage in range(len(self.stages)) if self._is_on(name, stage))

    def holders(self, name: str) -> tuple[int, ...]:
        """All stages that hold a parameter of the unsplit model under any of its names."""
        return self._stages_of(self.canonical[name])

    def _is_on(self, name: str, stage: int) -> bool:
        if not self.parts.is_in_block(name):
            return name in self._outside(stage)
        prefix = self.parts.blocks + "."
        return int(name.removeprefix(prefix).partition(".")[0]) in self.blocks(stage)

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


def _check_ties(canonical: Mapping[str, str], cuts: RewritePlan) -> None:
    """Weights with several names must be cut alike under each of them."""
    for name, first in canonical.items():
        if cuts.cuts.get(name) != cuts.cuts.get(first):
            raise UnsupportedModelError(
                f"{name} and {first} are one weight, but would be cut in different ways: use tp=1 for this model"
            )


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _assign(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    if attribute in module._buffers:  # of any type: FalconMamba of transformers 5.0 has parameters as buffers
        module.register_buffer(attribute, tensor, persistent=attribute not in module._non_persistent_buffers_set)
    else:
        module.register_parameter(attribute, tensor)  # type: ignore[arg-type]
