"""The families that can be converted: one line each, and why others cannot."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion import names
from hf_tpp_conversion.configs import gpt, llama, moe
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.names import NameTable

__all__ = ["FAMILIES", "Family", "family_of_config", "family_of_model"]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of Hugging Face models.

    Attributes:
        model_type: As in config.json.
        class_name: Of the causal language model.
        table: Names on both sides.
        from_config: config.json -> `Architecture`, or a refusal.
        to_config: The inverse.
    """

    model_type: str
    class_name: str
    table: NameTable
    from_config: Callable[[Settings], Architecture]
    to_config: Callable[[Architecture], dict[str, Any]]

    def config(self, model: Architecture, dtype: str) -> dict[str, Any]:
        """A config.json for the model.

        Raises:
            UnsupportedModelError: The family has no such models.
        """
        config = self.to_config(model) | {
            "architectures": [self.class_name],
            "model_type": self.model_type,
            "torch_dtype": dtype,
        }
        read = self.from_config(Settings(json.loads(json.dumps(config)), f"a config.json of {self.model_type}"))
        if read != model:
            raise UnsupportedModelError(
                f"{self.model_type} has no such model ({'; '.join(read.differences(model)[:4])}): pass another --family"
            )
        return config


def _families(*rows: Family) -> dict[str, Family]:
    return {row.model_type: row for row in rows}


# In this order a Megatron checkpoint that does not say what it was is matched: the first family that has such a model.
FAMILIES = _families(
    Family("gpt2", "GPT2LMHeadModel", names.GPT2, gpt.gpt2_from_config, gpt.gpt2_to_config),
    Family("llama", "LlamaForCausalLM", names.LLAMA, llama.llama_from_config, llama.llama_to_config),
    Family("mistral", "MistralForCausalLM", names.LLAMA, llama.mistral_from_config, llama.llama_to_config),
    Family("qwen2", "Qwen2ForCausalLM", names.LLAMA, llama.qwen2_from_config, llama.qwen2_to_config),
    Family("qwen3", "Qwen3ForCausalLM", names.LLAMA, llama.qwen3_from_config, llama.qwen2_to_config),
    Family("mixtral", "MixtralForCausalLM", names.MIXTRAL, moe.mixtral_from_config, moe.mixtral_to_config),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", names.QWEN_MOE, moe.qwen_moe_from_config, moe.qwen_moe_to_config),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", names.QWEN_MOE, moe.qwen_moe_from_config, moe.qwen_moe_to_config),
    Family(
        "starcoder2",
        "Starcoder2ForCausalLM",
        names.STARCODER2,
        llama.starcoder2_from_config,
        llama.starcoder2_to_config,
    ),
    Family("phi3", "Phi3ForCausalLM", names.PHI3, llama.phi3_from_config, llama.phi3_to_config),
    Family("gpt_neox", "GPTNeoXForCausalLM", names.GPT_NEOX, gpt.gpt_neox_from_config, gpt.gpt_neox_to_config),
)

# What users are likely to try, and what stands in the way.
_REFUSED = {
    "gemma": "it multiplies embeddings, but not the head that is tied to them, by the square root of the hidden size, "
    "and its gate is a tanh-gelu without biases; Megatron's GPT and its args have neither",
    "gemma2": "it has norms behind attention and MLP, soft-caps and scaled embeddings, Megatron's GPT has none of them",
    "gemma3": "it has an image encoder, and its text model has norms that Megatron's GPT does not have",
    "gemma3_text": "it has norms behind attention and MLP and scaled embeddings, Megatron's GPT has neither",
    "gptj": "its rotary embedding is interleaved and attention and MLP stand side by side",
    "phi": "attention and MLP stand side by side",
    "falcon": "attention and MLP stand side by side",
    "bloom": "its ALiBi positions are not in Megatron's GPT",
    "opt": "its positions are offset by two and its norms may lie behind the layers",
    "cohere": "attention and MLP stand side by side",
    "deepseek_v3": "multi-head latent attention is not converted",
}


def family_of_config(values: Mapping[str, Any], where: str) -> tuple[Family, Architecture]:
    """The family and architecture of a config.json.

    Raises:
        UnsupportedModelError: Another family, or a model that Megatron cannot represent.
    """
    kind = values.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        reason = _REFUSED.get(str(kind), f"{len(FAMILIES)} families are: {', '.join(FAMILIES)}")
        raise UnsupportedModelError(f"{where}: models of type {str(kind)[:40]!r} cannot be converted: {reason}")
    if values.get("quantization_config"):
        raise UnsupportedModelError(f"{where}: the model is quantized; convert the model that it was made from")
    return family, family.from_config(Settings(values, where))


def family_of_model(model: Architecture, wanted: str | None = None) -> Family:
    """The family in which a Megatron model is to be written.

    Args:
        model: The model.
        wanted: Its `model_type`, if the user named one.

    Raises:
        UnsupportedModelError: No family has such a model.
    """
    if wanted is not None:
        if wanted not in FAMILIES:
            raise UnsupportedModelError(f"the family {wanted!r} is unknown: use one of {', '.join(FAMILIES)}")
        FAMILIES[wanted].config(model, "float32")
        return FAMILIES[wanted]
    reasons = []
    for family in FAMILIES.values():
        try:
            family.config(model, "float32")
        except UnsupportedModelError as error:
            reasons.append(str(error))
            continue
        return family
    raise UnsupportedModelError(f"no family of Hugging Face has such a model: {'; '.join(reasons[:3])}")
