"""Which parameters each block needs, found without running a block."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tpp.check.tiny_model import Recipe, build_config, build_model, quiet
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts
from hf_tpp.pipeline_parallel.trace import reachable, trace_block_inputs


def trace(family, on_meta=False):
    with quiet():
        config = build_config(Recipe(family))
        model = AutoModelForCausalLM.from_config(config) if not on_meta else None
        if model is None:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
        before = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
        inputs = trace_block_inputs(model, ModelParts.find(model))
        assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == before
        assert not any("forward" in vars(module) for module in model.modules())
        return inputs


@pytest.mark.parametrize("on_meta", [False, True])
def test_llama_needs_its_embedding_first_and_norm_and_head_last(on_meta):
    inputs = trace("llama", on_meta)
    assert inputs.of_block == (frozenset({"model.embed_tokens.weight"}), *[frozenset()] * 3)
    assert inputs.behind == {"model.norm.weight", "lm_head.weight"}


def test_a_tied_head_is_behind_the_blocks_under_its_own_name():
    inputs = trace("gpt2")
    assert inputs.of_block[0] == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert "lm_head.weight" in inputs.behind
    assert "transformer.wte.weight" not in inputs.behind


def test_later_blocks_may_need_embeddings():
    for block in trace("gemma3n_text").of_block:
        assert {"model.embed_tokens.weight", "model.embed_tokens_per_layer.weight"} <= block


def test_a_bias_that_all_blocks_share():
    assert all("cpmant.position_bias.relative_attention_bias" in block for block in trace("cpmant").of_block)


def test_blocks_that_are_called_several_times_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"once each and in order \(it called 0, 1, 2, 3, 0, .*use pp=1"):
        trace("hrm_text")


def test_the_model_is_left_in_training_mode():
    with quiet():
        model = build_model(Recipe("llama"))
    trace_block_inputs(model, ModelParts.find(model))
    assert all(module.training for module in model.modules())


def test_reachable_leaves():
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert reachable(a * 2 + b.detach()) == {a}
    assert reachable(a) == {a}
    assert reachable(torch.ones(2)) == set()
    assert reachable((a * b).sum()) == {a, b}
