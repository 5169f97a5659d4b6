"""Replicas that share weights, gradients and optimizer state: torch's FSDP2 over the dp axis.

    parallelize      fully_shard: the model's parameters become DTensors, a part of the rows on each replica
    a call           one all-gather per unit, then the pass as ever, on whole parameters; their memory is freed again
    loss.backward()  one reduce-scatter per unit, from whole gradients to p.grad of the parts
    optimizer        on the parts alone

torch's own hooks would gather and reduce around each forward and backward of a module, hence for each microbatch.
Therefore `fully_shard` is given modules that are never called, which contain those of the model: it cuts, gathers and
frees, and the schedule says when.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_tpp.collectives.agreement import true_somewhere
from hf_tpp.data_parallel.reduction import scatter_mean
from hf_tpp.data_parallel.units import UnitPlan
from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import ParallelMesh

__all__ = ["FullySharded"]


class _Unit(nn.Module):
    """What `fully_shard` shards: never called, so that none of its hooks runs."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


class FullySharded:
    """Every replica has a part of the rows of each parameter.

    Args:
        model: This rank's part of the model; its parameters are replaced by DTensors.
        plans: Which parameters travel together.
        mesh: The process groups.

    Attributes:
        own: Each parameter as `model.parameters()` gave it before -> what it gives now.
    """

    shares_weights = True

    def __init__(self, model: nn.Module, plans: Sequence[UnitPlan], mesh: ParallelMesh) -> None:
        self._model, self._mesh = model, mesh
        self._depth = 0
        self._units: list[Any] = []
        self._members: list[list[nn.Parameter]] = []
        self._whole: dict[nn.Parameter, nn.Parameter] = {}
        self.own: dict[nn.Parameter, nn.Parameter] = {}
        for plan in plans:
            self._shard(plan)
        with self.gathered():
            pass  # from here on it is known what stands in for what

    def _shard(self, plan: UnitPlan) -> None:
        before = dict(self._model.named_parameters())
        others = set(before.values()) - set(plan.parameters)
        unit = _Unit(plan.module)
        # The units nest, and each leaves the others' parameters alone.
        fully_shard(unit, mesh=self._mesh.replicas, reshard_after_forward=False, ignored_params=others)
        self._units.append(unit)
        after = dict(self._model.named_parameters())
        now = {before[name]: parameter for name, parameter in after.items()}
        self._members.append([now[parameter] for parameter in plan.parameters])
        self.own |= {parameter: now[parameter] for parameter in plan.parameters}

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Whole parameters. Collective over the dp axis."""
        if self._depth == 0:
            self._gather()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for unit in self._units:
                    unit.reshard()

    def _gather(self) -> None:
        """One unit's message travels while that of the unit before is taken apart."""
        names = {} if self._whole else dict(self._model.named_parameters())
        before = None
        with torch.inference_mode(False):  # the whole parameters of an evaluation are those of the next training pass
            for unit in self._units:
                handle = unit.unshard(async_op=True)
                if before is not None:
                    before.wait()
                before = handle
            if before is not None:
                before.wait()
        self._whole |= {parameter: self._model.get_parameter(name) for name, parameter in names.items()}

    def computing(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The whole parameters behind the parts; known once they have been gathered."""
        return [self._whole[parameter] for parameter in parameters]

    @torch.no_grad()
    def hand_out(
        self,
        parameters: Sequence[nn.Parameter],
        gradients: list[torch.Tensor | None],
        factor: torch.Tensor | None = None,
    ) -> list[torch.Tensor | None]:
        """Parts of the mean over replicas. Collective over the dp axis.

        A parameter that no replica used gets none, as in one process; one that only some used gets a mean all the same.
        """
        places = {parameter: index for index, parameter in enumerate(parameters)}
        is_used = true_somewhere([gradient is not None for gradient in gradients], self._mesh.dp_control)
        released: list[torch.Tensor | None] = [None] * len(gradients)
        for members in self._members:
            chosen = [places[own] for own in members if own in places and is_used[places[own]]]
            if not chosen:
                continue
            whole = []
            for index in chosen:
                gradient, gradients[index] = gradients[index], None
                like = parameters[index]
                if gradient is None:
                    gradient = torch.zeros(like.shape, dtype=like.dtype, device=self._mesh.device)
                whole.append(gradient if factor is None else gradient * factor.to(gradient.dtype))
            for index, rows in zip(chosen, scatter_mean(whole, self._mesh.dp), strict=True):
                released[index] = _like(parameters[index], rows)
        return released

    def finish(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients are averaged already."""

    def convert(self, convert: Callable[[torch.Tensor], torch.Tensor], plainly: Callable[[], object]) -> None:
        """Convert buffers alone: what FSDP gathers from must stay where it is.

        Raises:
            ConfigurationError: Type or device of a parameter would change.
        """
        for parameter in self.own.values():
            probe = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
            converted = convert(probe)
            if (converted.dtype, converted.device) != (probe.dtype, probe.device):
                raise ConfigurationError(
                    f"a fully sharded model cannot be converted from {probe.dtype} on {probe.device} to "
                    f"{converted.dtype} on {converted.device}: convert the model before parallelize()"
                )
        for name, buffer in list(self._model.named_buffers()):
            owner, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(owner), attribute, convert(buffer))


def _like(parameter: torch.Tensor, rows: torch.Tensor) -> DTensor:
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
