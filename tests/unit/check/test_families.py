"""Kinds of families, and the shrinking of their configurations."""

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hf_tpp.check.families import FamilyKind, causal_families, kind_of
from hf_tpp.check.shrink import MAX_LAYERS, num_layers, shrink
from hf_tpp.check.tiny_model import Recipe, build_config, build_model, make_batch, quiet

KINDS = {
    "llama": FamilyKind.DECODER_ONLY,
    "gpt_neox": FamilyKind.DECODER_ONLY,  # has is_decoder=False, and is one
    "dbrx": FamilyKind.DECODER_ONLY,  # its configuration has parts, which are no models
    "modernbert-decoder": FamilyKind.DECODER_ONLY,
    "bert": FamilyKind.ENCODER,
    "bert-generation": FamilyKind.ENCODER,
    "xlnet": FamilyKind.ENCODER,
    "bart": FamilyKind.ENCODER_DECODER,
    "trocr": FamilyKind.ENCODER_DECODER,
    "musicgen": FamilyKind.ENCODER_DECODER,
    "gemma3": FamilyKind.COMPOSITE,
    "blt": FamilyKind.COMPOSITE,
    "gemma4_assistant": FamilyKind.DRAFT_HEAD,
}
NO_SMALL_MODEL = {"gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody"}
"""Needs timm; need the model that they draft for; no configuration that AutoModelForCausalLM could build from."""


@pytest.mark.parametrize("model_type", KINDS)
def test_kind(model_type):
    assert kind_of(model_type) is KINDS[model_type]


def test_most_families_are_decoder_only():
    kinds = [kind_of(name) for name in causal_families()]
    assert kinds.count(FamilyKind.DECODER_ONLY) > 0.6 * len(kinds)


@pytest.mark.parametrize("model_type", sorted(set(causal_families()) - NO_SMALL_MODEL))
def test_a_small_model_of_every_family(model_type):
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(Recipe(model_type)))
    assert sum(parameter.numel() for parameter in model.parameters()) < 15_000_000
    if kind_of(model_type) is FamilyKind.DECODER_ONLY:
        assert 4 <= num_layers(model.config) <= (32 if model_type == "hrm_text" else MAX_LAYERS)


def test_ratios_of_heads_are_kept():
    def heads(num_heads: int, num_kv_heads: int) -> tuple[int, int]:
        config = LlamaConfig(hidden_size=4096, num_attention_heads=num_heads, num_key_value_heads=num_kv_heads)
        small = shrink(config)
        return small.num_attention_heads, small.num_key_value_heads

    assert heads(32, 32) == (4, 4)
    assert heads(32, 8) == (4, 2)
    assert heads(32, 1) == (4, 1)


def test_every_kind_of_layer_is_kept_once():
    config = CONFIG_MAPPING["qwen3_next"]()
    small = shrink(config)
    assert set(small.layer_types) == set(config.layer_types)
    assert len(small.layer_types) == small.num_hidden_layers == 4
    config = Qwen3MoeConfig(num_hidden_layers=12, mlp_only_layers=[5])
    assert shrink(config).mlp_only_layers == [3]
    assert config.num_hidden_layers == 12


def test_the_same_weights_every_time_and_none_special():
    first, second = (build_model(Recipe("gpt2")) for _ in range(2))
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()
        assert not (one == one.round()).all(), f"{name} is at 0 or 1"


def test_batches_are_padded_and_uneven():
    batch = make_batch(build_model(Recipe("llama")))
    counts = (batch["labels"] != -100).sum(1).tolist()
    assert len(set(counts)) > 1
    assert not batch["attention_mask"].all()
    assert (batch["input_ids"][~batch["attention_mask"].bool()] == 0).all()


def test_unknown_family():
    with pytest.raises(ValueError, match="no model family 'lama': use a model_type"):
        build_config(Recipe("lama"))
