"""transformers' own tensor parallelism, by the plan that a family's configuration has (`tp_plan="auto"`)."""

import contextlib
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.contestants.contract import Contestant, Setting
from benchmarks.contestants.one_gpu import accumulate

__all__ = ["TransformersTP"]


class TransformersTP(Contestant):
    """Two ranks; it cuts a model while it loads a checkpoint, so rank 0 saves one."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not getattr(self.workload.config(), "base_model_tp_plan", None):
            raise NotImplementedError(f"transformers has no tensor-parallel plan for {self.workload.family}")
        with contextlib.ExitStack() as stack:
            folder: list[Any] = [None]
            if setting.rank == 0:
                folder = [stack.enter_context(tempfile.TemporaryDirectory())]
                setting.model().save_pretrained(folder[0])
            dist.broadcast_object_list(folder, 0)
            self.model = AutoModelForCausalLM.from_pretrained(folder[0], dtype=setting.dtype, **_plan()).train()
            dist.barrier()

    def parameters(self) -> list[nn.Parameter]:
        """This rank's."""
        return list(self.model.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One microbatch after the other."""
        return accumulate(self.model, tokens, self.workload.micro_batch)


def _plan() -> dict[str, Any]:
    """How this release of transformers is asked for its plan."""
    from transformers.distributed import DistributedConfig

    if "tp_plan" in DistributedConfig.__dataclass_fields__:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}
