"""Names inside Megatron's files: from a rank's own names to those of the whole model, and back.

decoder.layers.0.self_attention.linear_qkv.layer_norm_weight     Transformer Engine, first layer of its chunk
decoder.layers.6.input_layernorm.weight                          the whole model, if the chunk begins at layer 6
"""

import re
from dataclasses import dataclass

from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import TensorSpec

__all__ = ["EXPERT_FUSED", "LAYER", "LINEARS", "RankName", "from_rank_name", "te_name", "to_rank_name"]

LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Norms that Transformer Engine fuses into the linear behind them.
_FUSED_NORMS = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}
_OLD_NAMES = [  # checkpoints from before Megatron-Core
    (r"^language_model\.", ""),
    (r"^(encoder|transformer)\.", "decoder."),
    (r"\.attention\.", ".self_attention."),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
    (r"\.post_attention_(layer)?norm\.", ".pre_mlp_layernorm."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"^decoder\.final_norm\.", "decoder.final_layernorm."),
]
_LOCAL_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_GROUPED_EXPERT = re.compile(r"\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
EXPERT_FUSED = re.compile(r"\.mlp\.experts\.weight([12])$")
LINEARS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True, slots=True)
class RankName:
    """A rank's tensor in terms of the whole model.

    Attributes:
        name: Its name in the whole model.
        is_old: It was named by a Megatron from before Megatron-Core.
    """

    name: str
    is_old: bool = False


def from_rank_name(name: str, first_layer: int, first_expert: int) -> RankName:
    """A rank's name -> the whole model's.

    Args:
        name: The name in the file.
        first_layer: The layer of the whole model that the chunk calls 0.
        first_expert: The expert of the whole model that the rank calls 0.
    """
    is_old = name.startswith("language_model.")
    if is_old:
        for pattern, replacement in _OLD_NAMES:
            name = re.sub(pattern, replacement, name)
    name = LAYER.sub(lambda match: f"decoder.layers.{first_layer + int(match[1])}.", name)
    for whole, fused in _FUSED_NORMS.items():
        name = name.replace(f".{fused}", f".{whole}")
    name = _LOCAL_EXPERT.sub(lambda match: f".experts.{first_expert + int(match[1])}.", name)
    name = _GROUPED_EXPERT.sub(lambda match: f".experts.{first_expert + int(match[3])}.{match[1]}.{match[2]}", name)
    return RankName(name, is_old)


def te_name(spec: TensorSpec, model: Architecture) -> str:
    """A tensor's name under Transformer Engine's layer spec; a layer with experts keeps the norm before its router."""
    for whole, fused in _FUSED_NORMS.items():
        is_router_norm = whole == "pre_mlp_layernorm." and spec.layer is not None and model.has_experts(spec.layer)
        if f".{whole}" in spec.name and not is_router_norm:
            return spec.name.replace(f".{whole}", f".{fused}")
    return spec.name


def to_rank_name(
    spec: TensorSpec, model: Architecture, layer_spec: str, local_layer: int, first_expert: int, grouped: bool
) -> str:
    """The whole model's name -> a rank's: the inverse of `from_rank_name`.

    Args:
        spec: The tensor.
        model: The model.
        layer_spec: "te" or "local".
        local_layer: What the chunk calls the tensor's layer.
        first_expert: The expert of the whole model that the rank calls 0.
        grouped: Experts are one grouped linear (Transformer Engine) instead of a list.
    """
    name = te_name(spec, model) if layer_spec == "te" else spec.name
    name = LAYER.sub(f"decoder.layers.{local_layer}.", name)
    if spec.expert is not None:
        expert = spec.expert - first_expert
        if grouped:
            return re.sub(r"\.experts\.\d+\.(linear_fc[12])\.(weight|bias)$", rf".experts.\1.\g<2>{expert}", name)
        name = re.sub(r"\.experts\.\d+\.", f".experts.local_experts.{expert}.", name)
    return name
