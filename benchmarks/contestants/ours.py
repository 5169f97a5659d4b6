"""hf_tpp: one line around the plain model."""

from typing import Any, ClassVar

import torch
from torch import nn

import hf_tpp
from benchmarks.contestants.contract import Contestant, Setting

__all__ = [
    "PipelineParallel",
    "PipelineParallelCompiled",
    "PipelineParallelRecorded",
    "SequenceParallel",
    "SequenceParallelCompiled",
    "TensorParallel",
    "TensorParallelCompiled",
    "TensorParallelOverlapped",
    "TensorParallelOverlappedRecorded",
    "TensorParallelRecorded",
]


class _Parallel(Contestant):
    starts_distributed: ClassVar[bool] = True
    options: ClassVar[dict[str, Any]]
    compiles: ClassVar[bool] = False
    records: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.model = hf_tpp.parallelize(
            setting.model(),
            num_microbatches=self.workload.num_microbatches,
            device=setting.device,
            cuda_graphs=self.records and setting.device.type == "cuda",
            compile={"backend": setting.compile_backend} if self.compiles else False,
            **self.options,
        )

    def parameters(self) -> list[nn.Parameter]:
        """This rank's."""
        return list(self.model.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One call."""
        loss = self.model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        detached: torch.Tensor = loss.detach()
        return detached


class TensorParallel(_Parallel):
    """Every layer over two ranks."""

    options: ClassVar[dict[str, Any]] = {"tp": 2}


class TensorParallelCompiled(TensorParallel):
    """And blocks compiled."""

    compiles: ClassVar[bool] = True


class TensorParallelOverlapped(TensorParallelCompiled):
    """And the forward of a microbatch beside the backward of the one before."""

    options: ClassVar[dict[str, Any]] = {"tp": 2, "overlap_microbatches": True}


class TensorParallelRecorded(TensorParallelCompiled):
    """And microbatches recorded as CUDA graphs."""

    records: ClassVar[bool] = True


class TensorParallelOverlappedRecorded(TensorParallelOverlapped):
    """Both."""

    records: ClassVar[bool] = True


class SequenceParallel(_Parallel):
    """And the hidden states between the regions."""

    options: ClassVar[dict[str, Any]] = {"tp": 2, "sequence_parallel": True}


class SequenceParallelCompiled(SequenceParallel):
    """And blocks compiled."""

    compiles: ClassVar[bool] = True


class PipelineParallel(_Parallel):
    """Two stages, balanced by cost."""

    can_be_alone: ClassVar[bool] = False
    options: ClassVar[dict[str, Any]] = {"pp": 2}


class PipelineParallelCompiled(PipelineParallel):
    """And blocks compiled."""

    compiles: ClassVar[bool] = True


class PipelineParallelRecorded(PipelineParallelCompiled):
    """And microbatches recorded as CUDA graphs."""

    records: ClassVar[bool] = True
