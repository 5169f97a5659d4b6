"""Who is measured: every contestant trains the workload in its own way.

    from benchmarks.contestants import CONTESTANTS, load

A contestant is imported where it runs, so that one whose library is missing says so and the others go on.
"""

import importlib

from benchmarks.contestants.contract import Contestant, Setting

__all__ = ["CONTESTANTS", "Contestant", "Setting", "load"]

CONTESTANTS: dict[str, tuple[str, str]] = {
    "one GPU, plain transformers": ("one_gpu", "Plain"),
    "one GPU, layers compiled": ("one_gpu", "PlainCompiled"),
    "tensor parallel 2": ("ours", "TensorParallel"),
    "tensor parallel 2, compiled": ("ours", "TensorParallelCompiled"),
    "tensor parallel 2, overlapped, compiled": ("ours", "TensorParallelOverlapped"),
    "tensor parallel 2, recorded, compiled": ("ours", "TensorParallelRecorded"),
    "tensor parallel 2, overlapped and recorded, compiled": ("ours", "TensorParallelOverlappedRecorded"),
    "tensor + sequence parallel 2": ("ours", "SequenceParallel"),
    "tensor + sequence parallel 2, compiled": ("ours", "SequenceParallelCompiled"),
    "pipeline parallel 2": ("ours", "PipelineParallel"),
    "pipeline parallel 2, compiled": ("ours", "PipelineParallelCompiled"),
    "pipeline parallel 2, recorded, compiled": ("ours", "PipelineParallelRecorded"),
    "torch DTensor 2": ("torch_dtensor", "DTensor"),
    "torch DTensor 2, compiled": ("torch_dtensor", "DTensorCompiled"),
    "torch 1F1B 2": ("torch_pipeline", "TorchPipeline"),
    "torch 1F1B 2, compiled": ("torch_pipeline", "TorchPipelineCompiled"),
    "transformers tensor parallel 2": ("transformers_tp", "TransformersTP"),
    "Megatron-Core tensor parallel 2": ("megatron", "MegatronTensor"),
    "Megatron-Core pipeline parallel 2": ("megatron", "MegatronPipeline"),
}
"""Name -> (module of this folder, class)."""


def load(name: str) -> type[Contestant]:
    """The class of a contestant; raises ImportError where its library is missing."""
    module, attribute = CONTESTANTS[name]
    kind: type[Contestant] = getattr(importlib.import_module(f"benchmarks.contestants.{module}"), attribute)
    return kind
