"""Adapters that cannot be cut exactly are refused by name."""

import dataclasses
from typing import Any

from torch import nn

from hf_tpp.errors import ConfigurationError, UnsupportedModelError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.parallel_model import ParallelState
from hf_tpp.tensor_parallel.linear import ParallelLinear
from hf_tpp.tensor_parallel.sequence import check_dropout
from hf_tpp.tensor_parallel.whole_head import AlignedHead
from hf_tpp.wrappers import LowRankSum, copies_of, unwrapped, wrappers_of

__all__ = ["check_config", "check_wrapper", "find_tied_additions"]

_BEFORE = "call get_peft_model before parallelize; such modules then stay whole on every tensor-parallel rank"
_FURTHER = ("lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_dora")
"""Fields of a LoraConfig, beside its variants, that ask for more than products of low rank."""
_WITHOUT_WEIGHTS = (True, False, "gaussian", "orthogonal")
"""Initial values that do not depend on the weights of the linear."""


def check_config(config: Any, mesh: ParallelMesh) -> None:
    """Before an adapter is put into a parallel model.

    Args:
        config: PEFT's configuration of the adapter.
        mesh: The process groups.

    Raises:
        ConfigurationError: It could not be cut exactly.
    """
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if mesh.tp.size > 1 and kind != "LORA":
        raise ConfigurationError(
            f"adapters of the type {kind} cannot be cut as a parallel linear is: use LoRA, or {_BEFORE}"
        )
    if kind != "LORA":
        return
    variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
    asked = [name for name in dict.fromkeys((*_FURTHER, *variants)) if getattr(config, name, None)]
    if mesh.tp.size > 1 and asked:
        raise ConfigurationError(
            f"LoRA with {', '.join(f'{name}={getattr(config, name)!r}' for name in asked)} is more than an addition of "
            f"low rank and cannot be cut as a parallel linear is: leave it out, or {_BEFORE}"
        )
    if config.init_lora_weights not in _WITHOUT_WEIGHTS:
        raise ConfigurationError(
            f"init_lora_weights={config.init_lora_weights!r} is computed from whole weights, of which a rank has a "
            f"part: use init_lora_weights=True, or call get_peft_model before parallelize"
        )


def find_tied_additions(state: ParallelState) -> ConfigurationError | None:
    """What is wrong with merging: additions at a weight of which another stage holds a copy under another name."""
    for name, module in wrappers_of(state.assembly.model):
        total = LowRankSum.of(module)
        weight: Any = None if total is None else total.base.weight
        spec = state.calls.specs.get(weight)
        if spec is not None and len(spec.stages) > 1:
            return ConfigurationError(
                f"the adapter at {name} cannot be merged, since the weight is tied to one on another stage: save the "
                f"adapter, and merge it in one process"
            )
    return None


def check_wrapper(name: str, module: nn.Module, num_holders: int, sequence_parallel: bool) -> None:
    """After PEFT has wrapped a module of a parallel model.

    Args:
        name: Of the wrapped module.
        module: The wrapper.
        num_holders: Stages that hold the module's weights, under any of their names.
        sequence_parallel: Hidden states are cut along the sequence in training.

    Raises:
        UnsupportedModelError: It cannot be cut exactly.
    """
    inner, total = unwrapped(module), LowRankSum.of(module)
    if copies_of(module) is not None:
        if num_holders > 1:
            raise UnsupportedModelError(
                f"modules_to_save names {name}, whose weights are tied to those of a module on another stage: leave it "
                f"out, or load the model with tie_word_embeddings=False"
            )
        return
    if isinstance(inner, nn.Embedding):
        raise UnsupportedModelError(f"{name} is an embedding, and adapters of embeddings cannot be cut: leave it out")
    if isinstance(inner, AlignedHead):
        raise UnsupportedModelError(
            f"{name} computes products for more tokens than there are, and cannot be adapted now: use "
            f"parallelize(align_vocabulary=False), or call get_peft_model before parallelize"
        )
    if isinstance(inner, ParallelLinear):
        if total is None:
            raise UnsupportedModelError(
                f"{name} was given {type(module).__name__}, which cannot be cut as the parallel linear is: use plain "
                f"LoRA, or {_BEFORE}"
            )
        if sequence_parallel and inner.cuts_outputs:
            check_dropout(name, module)
    elif inner._forward_hooks or inner._forward_pre_hooks:
        raise UnsupportedModelError(f"{name} is shown the channels of all ranks, and cannot be adapted now: {_BEFORE}")
