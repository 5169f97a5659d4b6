"""Names inside torch_dist: layers and experts become dimensions in front of the tensor's own.

    decoder.layers.7.mlp.linear_fc2.weight             decoder.layers.mlp.linear_fc2.weight                  [L, ...]
    decoder.layers.7.mlp.experts.3.linear_fc2.weight   decoder.layers.mlp.experts.experts.linear_fc2.weight  [L, E, ...]

A model in which only some layers have experts keeps the number of the layer in the name.
"""

import re

from hf_tpp_conversion.formats.megatron_names import LAYER, te_name
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import TensorSpec

__all__ = ["keys_of", "leading", "write_key"]

_EXPERT = re.compile(r"\.experts\.\d+\.")


def keys_of(spec: TensorSpec, model: Architecture) -> list[tuple[str, tuple[int, ...]]]:
    """The keys under which a tensor may lie, each with its indices into the leading dimensions.

    Norms are named as Transformer Engine fuses them, also by the local layer spec; before a router both names occur.
    """
    fused = spec.name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    candidates = []
    for name in dict.fromkeys([te_name(spec, model), fused, spec.name]):
        candidates += [_key(name, spec, stacked) for stacked in (True, False)]
    return candidates


def write_key(spec: TensorSpec, model: Architecture, layer_spec: str) -> tuple[str, tuple[int, ...]]:
    """The key that Megatron expects with this layer spec."""
    name = te_name(spec, model)
    if layer_spec == "local":
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    return _key(name, spec, stacked=not model.is_mixed)


def leading(spec: TensorSpec, model: Architecture) -> tuple[int, ...]:
    """Sizes of the leading dimensions that `write_key` gives indices for."""
    layers = (model.num_layers,) if spec.layer is not None and not model.is_mixed else ()
    return layers + ((model.experts.num_experts,) if spec.expert is not None and model.experts else ())


def _key(name: str, spec: TensorSpec, stacked: bool) -> tuple[str, tuple[int, ...]]:
    indices: tuple[int, ...] = ()
    if spec.layer is not None and stacked:
        name = LAYER.sub("decoder.layers.", name)
        indices += (spec.layer,)
    if spec.expert is not None:
        name = _EXPERT.sub(".experts.experts.", name)
        indices += (spec.expert,)
    return name, indices
