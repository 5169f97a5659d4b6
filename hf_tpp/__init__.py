"""Tensor and pipeline parallelism for the Hugging Face model that you already have.

model = parallelize(model, tp=2, pp=4)
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_tpp import errors

if TYPE_CHECKING:
    from hf_tpp.api import clip_grad_norm_, from_pretrained, parallelize
    from hf_tpp.integrations.classes import TPPAccelerator, TPPTrainer, TPPTrainerMixin
    from hf_tpp.plan.rules import Channels, Region
    from hf_tpp.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        vocab_parallel_cross_entropy,
    )

__all__ = [
    "Channels",
    "ColumnParallelLinear",
    "Region",
    "RowParallelLinear",
    "TPPAccelerator",
    "TPPTrainer",
    "TPPTrainerMixin",
    "VocabParallelEmbedding",
    "clip_grad_norm_",
    "errors",
    "from_pretrained",
    "parallelize",
    "vocab_parallel_cross_entropy",
]

_MODULES = {
    "hf_tpp.api": ("clip_grad_norm_", "from_pretrained", "parallelize"),
    "hf_tpp.integrations.classes": ("TPPAccelerator", "TPPTrainer", "TPPTrainerMixin"),
    "hf_tpp.plan.rules": ("Channels", "Region"),
    "hf_tpp.tensor_parallel": (
        "ColumnParallelLinear",
        "RowParallelLinear",
        "VocabParallelEmbedding",
        "vocab_parallel_cross_entropy",
    ),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for: torch and transformers take seconds, and `hf-tpp --help` needs neither."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
