"""Tensor-parallel modules with an explicit process group, usable alone, and the rewriting of a model's blocks."""

from hf_tpp.tensor_parallel.embedding import VocabParallelEmbedding
from hf_tpp.tensor_parallel.linear import ColumnParallelLinear, RowParallelLinear
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss, vocab_parallel_cross_entropy

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "VocabParallelCausalLMLoss",
    "VocabParallelEmbedding",
    "vocab_parallel_cross_entropy",
]
