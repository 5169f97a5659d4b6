"""parallelize(plan=...): modules that are not known by their names, described by the user."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import hf_tpp
from hf_tpp import Channels, Region
from hf_tpp.errors import ConfigurationError
from hf_tpp.parallel_model import parallel_state
from hf_tpp.sharding import shard_tensor
from tests.parity.models import make_batch, tiny_config
from tests.ranks import run_ranks


class OddMLP(LlamaMLP):
    """The same computation under names that nobody knows."""

    def __init__(self, config):
        super().__init__(config)
        self.wa, self.wb, self.wc = self.gate_proj, self.up_proj, self.down_proj
        del self.gate_proj, self.up_proj, self.down_proj

    def forward(self, x):
        return self.wc(self.act_fn(self.wa(x)) * self.wb(x))


MLP = Region(columns={"wa": "neurons", "wb": Channels.NEURONS}, row="wc")
ATTENTION = Region(
    columns={"q_proj": "query heads", "k_proj": "key/value heads", "v_proj": "key/value heads"},
    row="o_proj",
    num_heads=4,
    num_kv_heads=2,
)


def odd_llama() -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config("llama_gqa", 2))
    for layer in model.model.layers:
        layer.mlp = OddMLP(model.config)
    return model


def train(plan) -> tuple[float, list[str], int]:
    """Body of a rank: difference of the loss, gradients that differ, parameters of the MLPs that are cut."""
    plain = odd_llama()
    batch = make_batch(4, 12)
    expected = plain(**batch).loss
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    model = hf_tpp.parallelize(odd_llama(), tp=2, plan=plan, verify=True, verbose=False)
    loss = model(**batch).loss
    loss.backward()
    differing = []
    specs = parallel_state(model).specs
    for name, spec in specs.items():
        theirs = shard_tensor(gradients[spec.name], spec, torch.device("cpu"), torch.float32)
        if (model.get_parameter(name).grad - theirs).norm() > 1e-4 * gradients[spec.name].norm():
            differing.append(name)
    cut = sum(spec.dim is not None for name, spec in specs.items() if ".mlp." in name)
    return abs(float(loss - expected)), differing, cut


@pytest.mark.parametrize(
    ("plan", "num_cut"),
    [
        (None, 6),
        ({"model.layers.*.mlp": MLP}, 6),
        ({"model.layers.1.mlp": MLP, "model.layers.*.self_attn": ATTENTION, "model.layers.0.mlp": None}, 3),
        ({"model.layers.*.self_attn": None, "model.layers.*.mlp": None}, 0),
    ],
    ids=["by names and probe", "mlp", "one mlp and attention", "all stays whole"],
)
def test_a_plan_cuts_what_it_names(plan, num_cut):
    for difference, differing, cut in run_ranks(train, 2, plan):
        assert difference < 1e-5
        assert not differing
        assert cut == num_cut


def refuse(plan) -> str:
    """Body of a rank."""
    with pytest.raises(ConfigurationError) as caught:
        hf_tpp.parallelize(odd_llama(), tp=2, plan=plan, verbose=False)
    return str(caught.value)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"model.layers.*.mpl": MLP}, ("'model.layers.*.mpl'", "no module of a block", "model.layers.0.")),
        ({"*.mlp": Region(columns={"wx": "neurons"}, row="wc")}, ("wx", "children with parameters are wa, wb, wc")),
        ({"*.mlp": Region(columns={"wa": "rows"}, row="wc")}, ("'rows'", "use one of 'neurons'")),
        ({"*.mlp": Region(columns={"wa": "neurons"}, row="wc")}, ("does not say what happens", "wb.weight")),
        ({"*.mlp": Region(columns={"wa": "query heads", "wb": "neurons"}, row="wc")}, ("give num_heads",)),
        (
            {"*.mlp": Region(columns={"wa": "query heads", "wb": "query heads"}, row="wc", num_heads=10)},
            ("does not fit the sizes",),
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, words):
    for message in run_ranks(refuse, 2, plan):
        for word in words:
            assert word in message
