"""Rotary embeddings in config.json: `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""

from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture

__all__ = ["rotary_from_config", "rotary_to_config"]

# The constants that Megatron has in its code for Llama 3's scaling.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rotary_from_config(config: Settings) -> dict[str, Any]:
    """The rotary fields of an `Architecture`.

    Raises:
        UnsupportedModelError: A scaling that Megatron's rotary embedding does not have.
    """
    new = config.get("rope_parameters") or {}
    scaling = new or config.get("rope_scaling") or {}
    if not isinstance(new, dict) or not isinstance(scaling, dict):
        raise UnsupportedModelError(f"{config.where} has damaged rotary settings")
    rope = Settings(scaling, f"{config.where} (rotary settings)")
    kind = rope.text("rope_type", rope.text("type", "default"))
    factors: dict[str, float | None] = {"llama3_factor": None, "linear_factor": None}
    if kind == "llama3":
        for name, value in _LLAMA3.items():
            rope.require(name, value, f"Megatron has {value} in its code, no other value can be represented")
        factors["llama3_factor"] = rope.number("factor")
    elif kind == "linear":
        factors["linear_factor"] = rope.number("factor")
    elif kind != "default":
        raise UnsupportedModelError(
            f"{config.where} scales rotary frequencies by {kind[:40]!r}: Megatron's GPT has 'default', 'linear' and "
            f"'llama3' only"
        )
    base = rope.number("rope_theta", config.number("rope_theta", config.number("rotary_emb_base", 10000.0)))
    share = config.number("partial_rotary_factor", config.number("rotary_pct", 1.0))
    return {
        "position_embedding": "rope",
        "rotary_base": base,
        "rotary_percent": rope.number("partial_rotary_factor", share),
        **factors,
    }


def rotary_to_config(model: Architecture) -> dict[str, Any]:
    """The inverse: entries that transformers 4 and 5 both read."""
    scaling: dict[str, Any] | None = None
    if model.llama3_factor is not None:
        scaling = {"rope_type": "llama3", "factor": model.llama3_factor, **_LLAMA3}
    elif model.linear_factor is not None:
        scaling = {"rope_type": "linear", "factor": model.linear_factor}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": model.rotary_base}
    entries: dict[str, Any] = {"rope_theta": model.rotary_base, "rope_scaling": scaling}
    if model.rotary_percent != 1.0:
        entries["partial_rotary_factor"] = model.rotary_percent
        parameters["partial_rotary_factor"] = model.rotary_percent
    return {**entries, "rope_parameters": parameters}
