"""parallelize(verify=True): passes on exact blocks, names the block and the tensor that are not, leaves no trace."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_tpp
from hf_tpp import Channels, Region
from hf_tpp.check.tiny_model import Recipe, build_config, build_model, make_batch, quiet
from tests.check.faults import FAULTS
from tests.ranks import RankError, run_ranks

FAMILIES = ("gpt2", "llama", "qwen3_moe", "gemma3_text", "falcon", "qwen3_next")


def verify(names, tp, pp, num_layers=None, **options):
    """Body of a rank: losses of a step of each family, verified and not."""
    overrides = {} if num_layers is None else {"num_hidden_layers": num_layers}
    losses = []
    for name in names:
        pair = []
        for verified in (True, False):
            with quiet():
                model = build_model(Recipe(name), **overrides)
                hf_tpp.parallelize(model, tp, pp, verify=verified, verbose=False, **options)
                assert model.training
                assert all(parameter.grad is None for parameter in model.parameters())
                pair.append(float(model(**make_batch(model)).loss))
        losses.append(pair)
    return losses


@pytest.mark.parametrize(("tp", "pp", "options"), [(2, 1, {}), (2, 2, {}), (1, 2, {})])
def test_exact_blocks_pass_and_nothing_is_changed(tp, pp, options):
    for losses in run_ranks(verify, tp * pp, FAMILIES, tp, pp, timeout=120.0, **options):
        assert [first for first, _ in losses] == [second for _, second in losses]


def test_a_block_that_is_a_stage_by_itself():
    """Its output was cut off from its graph, as in the rehearsal of a schedule, and verify=True refused every model."""
    for losses in run_ranks(verify, 2, ["gpt2"], 1, 2, num_layers=2):
        assert [first for first, _ in losses] == [second for _, second in losses]


def test_sequence_parallel_blocks():
    for losses in run_ranks(verify, 2, ["llama", "gpt2"], 2, 1, sequence_parallel=True):
        assert [first for first, _ in losses] == [second for _, second in losses]


def verify_with_fault(name):
    fault = FAULTS[name]
    with quiet(), fault.make():
        model = build_model(fault.recipe)
        hf_tpp.parallelize(model, fault.sizes.tp, fault.sizes.pp, verify=True, verbose=False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qkv_cut_without_regard_to_heads", r"transformer\.h\.0 \(GPT2Block\): the output on tp rank"),
        ("all_reduce_dropped_at_the_exit", r"model\.layers\.0 \(LlamaDecoderLayer\): the output on tp rank"),
        ("all_reduce_dropped_in_the_backward", r"model\.layers\.0 .*: the gradient of its input on tp rank"),
        ("gradient_of_a_replicated_head_not_summed", r"model\.layers\.0 .*gradient of self_attn\.[kv]_proj\.weight"),
        ("gradient_of_a_parameter_inside_a_region_not_summed", r"model\.layers\.0 .*gradient of self_attn\.[qk]_norm"),
    ],
)
def test_a_wrong_block_is_named_on_every_rank(name, message):
    with pytest.raises(RankError, match=message) as caught:
        run_ranks(verify_with_fault, 2, name)
    assert set(caught.value.types.values()) == {"ParityError"}
    assert set(caught.value.types) == {0, 1}


def verify_own_plan():
    """A plan of the user's that takes GPT-2's [q|k|v] for GPT-NeoX's layout."""
    region = Region(columns={"c_attn": Channels.QKV_PER_HEAD}, row="c_proj", num_heads=4)
    recipe = FAULTS["qkv_cut_without_regard_to_heads"].recipe
    with quiet():
        model = build_model(recipe)
        hf_tpp.parallelize(model, tp=2, plan={"transformer.h.*.attn": region}, verify=True, verbose=False)


def test_a_wrong_plan_of_the_user_is_found():
    with pytest.raises(RankError, match=r"transformer\.h\.0 \(GPT2Block\): the output on tp rank . differs"):
        run_ranks(verify_own_plan, 2)


def verify_on_meta():
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(build_config(Recipe("llama")))
    hf_tpp.parallelize(model, tp=2, verify=True, verbose=False)


def test_a_model_on_meta_is_refused():
    with pytest.raises(RankError, match=r"verify=True compares with the plain blocks.*`hf-tpp check`") as caught:
        run_ranks(verify_on_meta, 2)
    assert set(caught.value.types.values()) == {"ConfigurationError"}
