"""Regions that only some versions of transformers have, and what a cut leaves consistent."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DiffLlamaConfig
from transformers.models.diffllama import modeling_diffllama

from hf_tpp.check.tiny_model import Recipe, build_model
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.mesh import Axis
from hf_tpp.parts import ModelParts
from hf_tpp.tensor_parallel.matching import find_rule
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.tensor_parallel.rewrite import apply_rewrite, plan_rewrite

TP = 2


class Stacked(nn.Module):
    """A matrix for each expert, in a module of its own class."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape))


def test_stacked_experts_in_modules_with_the_names_of_linears_stay_whole():
    experts = nn.Module()
    experts.fc1, experts.fc2 = Stacked(4, 8, 16), Stacked(4, 16, 8)
    assert find_rule("experts", experts, None, TP) is None


@pytest.mark.parametrize(
    ("num_experts", "identity", "is_cut"), [(4, None, True), (6, None, False), (6, nn.Identity(), True)]
)
def test_identity_experts_without_a_module_stay_whole(num_experts, identity, is_cut):
    """Two experts without a second matrix hand on whole states, which must not be summed over the ranks."""
    experts = nn.Module()
    experts.identity_expert = identity
    experts.is_concatenated = True
    experts.gate_up_proj = nn.Parameter(torch.ones(num_experts, 32, 8))
    experts.down_proj = nn.Parameter(torch.ones(4, 8, 16))
    assert (find_rule("experts", experts, None, TP) is not None) is is_cut


@pytest.mark.parametrize("name", ["DiffLlamaAttention", "DiffLlamaFlashAttention2", "DiffLlamaSdpaAttention"])
def test_classes_of_each_attention_implementation(name):
    config = DiffLlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    attention = modeling_diffllama.DiffLlamaAttention(config, layer_idx=0)
    attention.__class__ = type(name, (modeling_diffllama.DiffLlamaAttention,), {})
    rule = find_rule("self_attn", attention, config, TP)
    assert rule is not None
    assert rule.columns.keys() == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("family", ["qwen3_next", "lfm2_moe"])
def test_a_cut_convolution_can_be_called(family):
    """Older versions of transformers call the module, newer ones read its weight."""
    model = build_model(Recipe(family))
    parts = ModelParts.find(model)
    group = SimpleNamespace(rank=lambda: 0, size=lambda: TP)
    plan = plan_rewrite(model, parts, TP)
    apply_rewrite(model, parts, plan, Axis(0, TP, group, (0, 1)), range(parts.num_blocks), RegionState(group, None))
    cut = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d) and f"{name}.weight" in plan.cuts
    }
    assert cut
    for name, convolution in cut.items():
        channels = plan.cuts[f"{name}.weight"][1].size // TP
        states = torch.ones(1, channels, 8, device="meta")
        assert convolution(states).shape[1] == channels
        assert len(convolution.weight) == channels


def test_a_head_that_does_more_than_a_linear_stays_whole():
    model = build_model(Recipe("llama"))
    parts = ModelParts.find(model)
    assert plan_rewrite(model, parts, TP).vocabulary.cuts
    model.lm_head.__class__ = type("ScaledHead", (nn.Linear,), {"__module__": "transformers.models.dory.modeling_dory"})
    plan = plan_rewrite(model, parts, TP)
    assert plan.vocabulary.layout is None
    assert not plan.vocabulary.cuts
    assert plan.cuts  # of the blocks


@pytest.mark.parametrize("further", [0, 16])
def test_a_head_before_a_loss_of_its_own_gathers_all_its_outputs(further):
    model = build_model(Recipe("llama"))
    model.loss_function = lambda logits, labels, **_: logits.sum()
    model.lm_head = nn.Linear(64, model.config.vocab_size + further, bias=False)
    plan = plan_rewrite(model, ModelParts.find(model), TP).vocabulary
    assert plan.gathers_logits
    assert plan.layout.size == model.config.vocab_size + further


def test_a_head_with_more_outputs_than_the_loss_takes_is_refused():
    model = build_model(Recipe("llama"))
    model.lm_head = nn.Linear(64, model.config.vocab_size + 16, bias=False)
    with pytest.raises(UnsupportedModelError, match="the head has 146 tokens and the configuration 130"):
        plan_rewrite(model, ModelParts.find(model), TP)
