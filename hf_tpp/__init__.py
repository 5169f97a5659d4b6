"""Tensor and pipeline parallelism for the Hugging Face model that you already have.

model = parallelize(model, tp=2, pp=4)
"""

from hf_tpp import errors
from hf_tpp.api import clip_grad_norm_, from_pretrained, parallelize
from hf_tpp.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
)

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "errors",
    "from_pretrained",
    "parallelize",
    "vocab_parallel_cross_entropy",
]
