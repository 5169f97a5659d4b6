"""Which families of transformers are what: decided by attributes of the configuration and the model class, not by name.

draft head        the model takes no labels: it proposes tokens for another model
encoder-decoder   `is_encoder_decoder`, or a decoder that counts its layers as `decoder_layers`, or a configuration
                  with a part called `decoder`
encoder           there is a masked language model of the family, or it becomes a decoder only by a flag
                  (`is_decoder` beside `add_cross_attention`), or it takes a `perm_mask`
composite         the configuration has parts that are configurations of models: vision, audio, text
decoder-only      the others
"""

import inspect
from enum import StrEnum
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

__all__ = ["FamilyKind", "causal_families", "kind_of"]


class FamilyKind(StrEnum):
    """What a family is, as far as splitting it goes."""

    DECODER_ONLY = "decoder-only"
    COMPOSITE = "composite"
    ENCODER_DECODER = "encoder-decoder"
    ENCODER = "encoder"
    DRAFT_HEAD = "draft head"


def causal_families() -> list[str]:
    """The `model_type` of every entry of the installed transformers' MODEL_FOR_CAUSAL_LM_MAPPING."""
    return sorted(name for name in CONFIG_MAPPING if CONFIG_MAPPING[name] in MODEL_FOR_CAUSAL_LM_MAPPING)


def kind_of(model_type: str) -> FamilyKind:
    """What the family `model_type` is."""
    config: Any = CONFIG_MAPPING[model_type]
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
    arguments = inspect.signature((model[0] if isinstance(model, tuple) else model).forward).parameters
    counts_layers_as = getattr(config, "attribute_map", {}).get("num_hidden_layers")
    if "labels" not in arguments:
        return FamilyKind.DRAFT_HEAD
    if getattr(config, "is_encoder_decoder", False) or counts_layers_as == "decoder_layers":
        return FamilyKind.ENCODER_DECODER
    if "decoder" in config.sub_configs:
        return FamilyKind.ENCODER_DECODER
    becomes_decoder = getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")
    if config in MODEL_FOR_MASKED_LM_MAPPING or becomes_decoder or "perm_mask" in arguments:
        return FamilyKind.ENCODER
    if any(getattr(part, "model_type", "any") for part in config.sub_configs.values()):
        return FamilyKind.COMPOSITE
    return FamilyKind.DECODER_ONLY
