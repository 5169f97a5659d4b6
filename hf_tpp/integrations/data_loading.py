"""Batches for replicas: all ranks of a replica get the same ones, different replicas different ones.

    rank      0 1 2 3 | 4 5 6 7        tp x pp = 4: ranks 0..3 are replica 0, ranks 4..7 replica 1
    batch     a a a a | b b b b

Whatever a rank was seeded with, all ranks must draw the same: the order of the samples, and what a dataset draws when
it reads one. So torch's generator, and the sampler's if it has one, continue from the first rank's when an epoch
starts.
"""

import functools
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import ParallelMesh

__all__ = ["share_out"]


def share_out(accelerator: Accelerator, loader: DataLoader[Any], mesh: ParallelMesh, device_placement: bool) -> Any:
    """Have accelerate prepare a data loader for replicas instead of processes.

    Args:
        accelerator: Whose settings count.
        loader: The whole data, the same on every rank.
        mesh: This rank's replica.
        device_placement: Move batches to the device.

    Collective: every rank of the job, and again whenever an epoch starts.

    Raises:
        ConfigurationError: Batches were to be sent out by the first process.
    """
    settings = accelerator.dataloader_config
    if settings.dispatch_batches:
        raise ConfigurationError(
            "dispatch_batches=True sends a different part of each batch to every process, and the ranks of a replica "
            "need the same: use dispatch_batches=False, each rank then reads the data itself"
        )
    _seed_workers(loader, mesh)
    generator = getattr(getattr(loader, "sampler", None), "generator", None)
    prepared = prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=mesh.dp.size,
        process_index=mesh.dp.rank,
        split_batches=settings.split_batches,
        put_on_device=device_placement,
        rng_types=list(accelerator.rng_types),
        dispatch_batches=False,
        even_batches=settings.even_batches,
        use_seedable_sampler=settings.use_seedable_sampler,
        data_seed=_shared_seed(settings.data_seed, mesh),
        non_blocking=settings.non_blocking,
        use_stateful_dataloader=settings.use_stateful_dataloader,
    )
    if mesh.dp.size == 1 and generator is not None and not settings.use_seedable_sampler:
        prepared.synchronized_generator = generator
    has_generator = prepared.synchronized_generator is not None
    prepared.rng_types = ["torch", "generator"] if has_generator else ["torch"]
    return prepared


def _seed_workers(loader: DataLoader[Any], mesh: ParallelMesh) -> None:
    """Have Trainer's workers draw the same on all ranks of a replica: it seeds them by the number of the process."""
    function = loader.worker_init_fn
    if isinstance(function, functools.partial) and function.func is seed_worker:
        loader.worker_init_fn = functools.partial(function, rank=mesh.dp.rank)


def _shared_seed(data_seed: int | None, mesh: ParallelMesh) -> int:
    """The seed of a `SeedableRandomSampler`: by default accelerate takes what this rank was seeded with."""
    return _of_first_rank(torch.initial_seed() if data_seed is None else data_seed, mesh)


def _of_first_rank(number: int, mesh: ParallelMesh) -> int:
    numbers = [number]
    dist.broadcast_object_list(numbers, src=0, group=mesh.control)
    return numbers[0]
