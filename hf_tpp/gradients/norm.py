"""The gradient norm of the whole model, although each rank has only its shards.

    global^2 = sum over ranks of sum over parameters of |g|^2 / (ranks that hold it)

A stock `torch.nn.utils.clip_grad_norm_(model.parameters(), c)` sees local gradients only. So the model carries one more
parameter, the *residual*, whose gradient is sqrt(global^2 - local^2): then the L2 norm over `model.parameters()` is the
global one on every rank, and torch, accelerate and Trainer clip exactly without being patched. It has no weight, is in
no state dict, and serves L2 norms over the whole model; `hf_tpp.clip_grad_norm_` takes any norm and any subset.

Where replicas share the gradients (FSDP), these are DTensors, whose norm torch forms over the dp axis by itself; the
residual is then a DTensor too, the same on all replicas.

The residual is float64, so torch forms the total in float64 too: then the clipping factor is the same float32 number on
every rank, although each adds up other tensors, and replicated parameters stay bit-identical.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec, local_part, on_this_replica

__all__ = ["NormResidual", "ParallelNorm"]


class NormResidual(nn.Module):
    """Carries the share of the squared gradient norm that lies on other ranks, as the gradient of a scalar.

    Args:
        device: Where it lives.
        replicas: The dp axis, if replicas share the gradients.
    """

    def __init__(self, device: torch.device, replicas: DeviceMesh | None) -> None:
        super().__init__()
        value = _on_all(torch.zeros((), device=device, dtype=torch.float64), replicas)
        self.bias = nn.Parameter(value)  # "bias": trainers keep biases out of weight decay

    def _save_to_state_dict(self, *_: Any, **__: Any) -> None:
        """It is no part of any checkpoint."""

    def _load_from_state_dict(self, *_: Any, **__: Any) -> None:
        """Nothing to load."""


class ParallelNorm:
    """Norms over a set of sharded parameters.

    Args:
        specs: Parameter -> how it lies.
        mesh: The process groups.
        residual: The parameter that carries the rest; None if this rank holds the whole model.
    """

    def __init__(
        self, specs: Mapping[nn.Parameter, ShardSpec], mesh: ParallelMesh, residual: nn.Parameter | None
    ) -> None:
        self._specs = specs  # not a copy: adapters come and go
        self._is_shared = any(isinstance(parameter, DTensor) for parameter in specs)
        self._mesh = mesh
        self._residual = residual

    @torch.no_grad()
    def update_residual(self) -> None:
        """Set the residual's gradient from the `p.grad` of all others.

        Collective over the replica, or over the job where replicas share gradients.
        """
        if self._residual is None:
            return
        graded = [parameter for parameter in self._specs if parameter.grad is not None]
        gradients = [parameter.grad for parameter in graded if parameter.grad is not None]
        total = self._shared_power(graded, 2.0)
        self._all_reduce(total, dist.ReduceOp.SUM)
        # What torch's clipping will find here, formed in the same way.
        local = _plain(get_total_norm([*gradients, torch.zeros_like(self._residual)]))
        rest = (total - local.double() ** 2).clamp_(min=0.0).sqrt()
        rest = rest.where(total.isfinite(), total).to(self._residual.dtype)  # an overflow is one on every rank
        self._residual.grad = _on_all(rest, self._mesh.replicas if self._is_shared else None)

    @torch.no_grad()
    def is_finite(self, parameters: Iterable[nn.Parameter]) -> torch.Tensor:
        """Whether all gradients of the model are finite, once the residual is up to date; the same on every rank."""
        if self._residual is None:
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            return torch.isfinite(_plain(get_total_norm(gradients)))
        assert self._residual.grad is not None
        return torch.isfinite(_plain(self._residual.grad))

    @torch.no_grad()
    def total(self, parameters: Iterable[nn.Parameter], norm_type: float) -> torch.Tensor:
        """The norm of the gradients of `parameters` in the unsplit model.

        Collective over the replica, or over the job where replicas share gradients.

        Raises:
            ConfigurationError: A parameter is not one of the parallel model.
        """
        chosen = [p for p in parameters if p is not self._residual and p.grad is not None]
        for parameter in chosen:
            if parameter not in self._specs:
                raise ConfigurationError(
                    f"a parameter of shape {list(parameter.shape)} does not belong to the parallel model: "
                    f"pass parameters of model.parameters() as they are after parallelize()"
                )
        if math.isinf(norm_type):
            parts = [local_part(parameter.grad) for parameter in chosen if parameter.grad is not None]
            peaks = [part.abs().max().float() for part in parts if part.numel()]
            total = torch.stack(peaks).max() if peaks else torch.zeros((), device=self._mesh.device)
            self._all_reduce(total, dist.ReduceOp.MAX)
            return total
        total = self._shared_power(chosen, norm_type)
        self._all_reduce(total, dist.ReduceOp.SUM)
        return total.pow(1.0 / norm_type).float()

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float) -> torch.Tensor:
        """Scale the gradients in place so that their norm is at most `max_norm`; returns the norm before."""
        parameters = list(parameters)
        norm = self.total(parameters, norm_type)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in parameters:
            if parameter.grad is not None:
                local_part(parameter.grad).mul_(factor.to(parameter.grad.dtype))
        return norm

    def _all_reduce(self, value: torch.Tensor, op: Any) -> None:
        if self._is_shared:
            dist.all_reduce(value, op=op)
        elif self._mesh.replica.size > 1:
            dist.all_reduce(value, op=op, group=self._mesh.replica.group)

    def _shared_power(self, parameters: Iterable[nn.Parameter], norm_type: float) -> torch.Tensor:
        """Sum of |g|^norm_type in float64, every copy counted by its share, so that ranks can be added."""
        powers = []
        for parameter in parameters:
            spec = on_this_replica(self._specs[parameter], parameter)
            assert parameter.grad is not None
            gradient = local_part(parameter.grad)
            for segment in spec.segments:
                dtype = torch.promote_types(gradient.dtype, torch.float32)
                norm = torch.linalg.vector_norm(spec.narrow(gradient, segment), norm_type, dtype=dtype)
                powers.append(norm.double() ** norm_type / spec.copies(segment))
        return torch.stack(powers).sum() if powers else torch.zeros((), device=self._mesh.device, dtype=torch.float64)


def _on_all(value: torch.Tensor, replicas: DeviceMesh | None) -> torch.Tensor:
    """A scalar; a DTensor where gradients are, because torch does not take the norm of both kinds together."""
    return value if replicas is None else DTensor.from_local(value, replicas, [Replicate()], run_check=False)


def _plain(value: torch.Tensor) -> torch.Tensor:
    """The value that all replicas know. Collective over the dp axis if they only know parts of it."""
    if not isinstance(value, DTensor):
        return value
    plain: torch.Tensor = value.full_tensor()
    return plain
