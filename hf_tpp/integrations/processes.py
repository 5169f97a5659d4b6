"""Where accelerate counts processes, it counts replicas: the ranks of a replica work on one batch.

    process     0 1 2 3 | 4 5 6 7        tp x pp = 4
    counted     0         1              num_processes is 2; gather and reduce take one of each

Scripts multiply and divide by `accelerator.num_processes` where they mean the batches of one step: in the length of a
schedule, in the size of the whole batch, in a sum of tokens. The first and the last process, which write and print, are
still single processes.
"""

from typing import Any

import torch
from accelerate import Accelerator

from hf_tpp.integrations import gathering, stepping
from hf_tpp.integrations.changes import Changes
from hf_tpp.integrations.replicas import mesh_of_process

__all__ = ["PROCESS_CHANGES"]


def num_processes(_: Any, _accelerator: Accelerator) -> int:
    """The number of replicas."""
    return mesh_of_process().dp.size


def is_last_process(_: Any, accelerator: Accelerator) -> bool:
    """Whether this is the last of all processes: accelerate compares its number with `num_processes`."""
    return bool(accelerator.state.is_last_process)


def gather(_: Any, _accelerator: Accelerator, tensor: Any) -> Any:
    """One copy per replica."""
    return gathering.gather(tensor, mesh_of_process())


def reduce(_: Any, _accelerator: Accelerator, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
    """Over the replicas; `scale` is for XLA alone."""
    return gathering.reduce(tensor, reduction, mesh_of_process())


def gather_for_metrics(_: Any, accelerator: Accelerator, input_data: Any, use_gather_object: bool = False) -> Any:
    """One copy per replica, without the samples that only fill up the last batch."""
    return gathering.gather_for_metrics(accelerator.gradient_state, input_data, mesh_of_process(), use_gather_object)


def check_trigger(original: Any, accelerator: Accelerator) -> bool:
    """Whether any process was triggered."""
    if accelerator.flag_tensor is None:
        accelerator.flag_tensor = torch.tensor(0, device=accelerator.device)
    accelerator.flag_tensor = gathering.share_trigger(accelerator.flag_tensor, mesh_of_process())
    return bool(original())


def prepare_scheduler(original: Any, _: Accelerator, scheduler: Any) -> Any:
    """One step of the schedule per replica."""
    return stepping.count_replicas(original(scheduler), mesh_of_process().dp.size)


PROCESS_CHANGES: Changes = {
    "num_processes": num_processes,
    "is_last_process": is_last_process,
    "gather": gather,
    "reduce": reduce,
    "gather_for_metrics": gather_for_metrics,
    "check_trigger": check_trigger,
    "prepare_scheduler": prepare_scheduler,
}
