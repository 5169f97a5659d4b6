"""The structural probe finds what the table of names knows under other names, and leaves whole what cannot be cut."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_tpp.assembly import Assembly
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.rules import Cut, RegionRule
from hf_tpp.report import describe_probe
from hf_tpp.tensor_parallel.probe.calls import NoRegionError, observe_calls
from hf_tpp.tensor_parallel.probe.cut_run import Draws, run_cut
from hf_tpp.tensor_parallel.probe.emulation import emulate
from hf_tpp.tensor_parallel.probe.roles import find_roles
from hf_tpp.tensor_parallel.probe.skeleton import Skeleton
from hf_tpp.tensor_parallel.rewrite import RewritePlan, plan_rewrite
from tests.probe.models import ODD, LowRank, Odd, Odd2, Scaled, pieces


def plan_of(model: nn.Module, tp_size: int = 2) -> RewritePlan:
    return plan_rewrite(model, ModelParts.find(model), tp_size)


def usual_name(odd: Odd, name: str) -> str:
    return ".".join(odd.names.get(step, step) for step in name.split("."))


def cuts_of(plan: RewritePlan, model: nn.Module, rename=lambda name: name) -> dict[str, tuple[int, list[list[int]]]]:
    """Parameter -> its cut dimension and channels; those that all ranks hold whole are left out."""
    known = dict(model.named_parameters(remove_duplicate=False))
    cuts = {}
    for name, (dim, layout) in plan.cuts.items():
        ranks = pieces(layout, plan.tp_size)
        if name in known and any(rank != list(range(layout.size)) for rank in ranks):
            cuts[rename(name)] = (dim, ranks)
    return cuts


@pytest.mark.parametrize(("name", "tp_size"), [(name, tp_size) for name in ODD for tp_size in (2, 4)])
def test_the_plan_is_that_of_the_usual_names(name, tp_size):
    odd = ODD[name]
    model, usual = odd.build(), odd.build_usual()
    found, known = plan_of(model, tp_size), plan_of(usual, tp_size)
    assert not found.declined
    assert {name: rule.found_by for name, rule in found.regions.items()} == dict.fromkeys(known.regions, "probe")
    expected = cuts_of(known, usual)
    if isinstance(model, ODD["llama_gqa"].kind):  # its MLP has [gate|up] in one weight
        expected = {
            key: cut for key, cut in expected.items() if not key.endswith(("gate_proj.weight", "up_proj.weight"))
        }
        half = Layout((Block(44), Block(44)))
        expected |= {f"model.layers.{index}.mlp.both.weight": (0, pieces(half, tp_size)) for index in range(2)}
    assert cuts_of(found, model, lambda key: usual_name(odd, key)) == expected


def test_a_model_on_meta_is_planned_like_a_loaded_one():
    odd = ODD["gpt2"]
    with torch.device("meta"):
        on_meta = odd.kind(odd.build().config)
    assert plan_of(on_meta).decisions == plan_of(odd.build()).decisions


def test_the_model_is_left_as_it_was():
    model = ODD["llama_gqa"].build().train()
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    plan_of(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


# What the emulation must see: the probe's rules, made wrong.


def with_layout(rule: RegionRule, column: str, *blocks: tuple[int, int]) -> RegionRule:
    return replace(rule, columns={**rule.columns, column: Layout(tuple(Block(*block) for block in blocks))})


ATTN, MLP = "transformer.h.1.attn", "transformer.h.1.mlp"
LLAMA_ATTN, LLAMA_MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FAULTS = {
    "none": ("gpt2", ATTN, lambda rule: rule, None),
    "[q|k|v] as one run": ("gpt2", ATTN, lambda rule: with_layout(rule, "mix", (12, 8)), "differs"),
    "[q|k|v] per head": ("gpt2", ATTN, lambda rule: with_layout(rule, "mix", (4, 24)), "differs"),
    "heads not made local": ("gpt2", ATTN, lambda rule: replace(rule, attributes={}), "Error"),
    "row and column swapped": (
        "gpt2",
        MLP,
        lambda rule: replace(rule, columns={"fold": Layout((Block(32),))}, row="grow", row_layout=Layout((Block(32),))),
        "shape",
    ),
    "per head as [q|k|v]": (
        "gpt_neox",
        "gpt_neox.layers.0.attention",
        lambda rule: with_layout(rule, "braid", (4, 8), (4, 8), (4, 8)),
        "differs",
    ),
    "[gate|up] as one run": ("llama_gqa", LLAMA_MLP, lambda rule: with_layout(rule, "both", (88, 1)), "differs"),
    "[gate|up] interleaved": ("llama_gqa", LLAMA_MLP, lambda rule: with_layout(rule, "both", (44, 2)), "differs"),
    "keys left whole": (
        "llama_gqa",
        LLAMA_ATTN,
        lambda rule: replace(rule, columns={"ask": rule.columns["ask"], "give": rule.columns["give"]}),
        "Error|shape|differs",
    ),
    "key heads the other way round": (
        "llama_gqa",
        LLAMA_ATTN,
        lambda rule: with_layout(with_layout(rule, "tag", (1, 16)), "give", (1, 16)),
        "Error|shape|differs",
    ),
    "groups doubled": ("llama_gqa", LLAMA_ATTN, lambda rule: replace(rule, attributes={"sharing": 4}), "Error"),
    "a row of one unit": (
        "llama_gqa",
        LLAMA_MLP,
        lambda rule: replace(with_layout(rule, "both", (1, 88)), row_layout=Layout((Block(1, 44),))),
        "summed over the ranks",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_emulation_catches_wrong_rules(fault):
    model_name, module, change, message = FAULTS[fault]
    model = ODD[model_name].build()
    rule = change(plan_of(model).regions[module])
    skeleton = Skeleton(model)
    call = observe_calls(skeleton.copy(), ModelParts.find(model), [module]).seen[module]
    roles = find_roles(run_cut(skeleton.copy(module), call, Draws(0)), call)
    if message is None:
        emulate(skeleton, module, call, roles, rule, 2)
        return
    with pytest.raises(NoRegionError, match=message):
        emulate(skeleton, module, call, roles, rule, 2)


# What stays whole, and why.


class TopK(Odd2):
    def forward(self, x):
        y = self.grow(x)
        return self.fold(y * (y >= y.topk(5, dim=-1).values[..., -1:]))


class Normed(Odd2):
    def forward(self, x):
        return self.fold(F.layer_norm(F.relu(self.grow(x)), (self.grow.out_features,)))


class Softmaxed(Odd2):
    def forward(self, x):
        return self.fold(self.grow(x).softmax(-1))


class Residual(Odd2):
    def forward(self, x):
        return x + self.fold(F.relu(self.grow(x)))


class Twice(Odd2):
    def forward(self, x):
        return self.fold(F.relu(self.grow(x)) + F.relu(self.grow(-x)))


class Reversed(Odd2):
    """Neuron i of the row is neuron n - i of the column."""

    def forward(self, x):
        return self.fold(F.relu(self.grow(x)).flip(-1))


class Keeping(Odd2):
    def forward(self, x):
        self.last = F.relu(self.grow(x))
        return self.fold(self.last)


class Peeking(Odd2):
    def forward(self, x):
        return self.fold(F.relu(self.grow(x)) + self.fold.weight.mean())


class Wired(Odd2):
    """The number of neurons is written into the forward."""

    def forward(self, x):
        return self.fold(F.relu(self.grow(x)).view(*x.shape[:-1], 48))


class Unused(Odd2):
    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.ones(48))

    def forward(self, x):
        return self.fold(F.relu(self.grow(x)))


class Parallel(Odd2):
    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(32, 32)

    def forward(self, x):
        return self.fold(F.relu(self.grow(x))) + self.skip(x)


class BeforeAndBehind(Odd2):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.fold(self.scale * self.grow(x))


class Aliased(Odd2):
    def __init__(self):
        super().__init__()
        self.grow_too = self.grow

    def forward(self, x):
        return self.fold(F.relu(self.grow_too(x)))


WHOLE = {
    TopK: "differs|no channels",
    Normed: "no channels",
    Softmaxed: "no channels",
    Residual: "hidden states reach the result beside the row",
    Twice: "grow is called twice",
    Reversed: "no channels",
    Keeping: "keeps what it computed as last",
    Peeking: "the weight of a linear is used beside the linear",
    Wired: "Error",
    Unused: "spare is not used",
    Parallel: "comes from fold, skip",
    Aliased: "has several names",
    BeforeAndBehind: "scale is used in front of the row linear and behind it",
}


def llama_with(kind: type[nn.Module]) -> nn.Module:
    model = ODD["llama_gqa"].build()
    model.model.layers[1].mlp = kind()
    return model


@pytest.mark.parametrize("kind", WHOLE)
def test_what_cannot_be_cut_stays_whole(kind):
    plan = plan_of(llama_with(kind))
    assert set(plan.regions) == {"model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn"}
    with pytest.raises(NoRegionError, match=WHOLE[kind]):
        raise NoRegionError(plan.declined["model.layers.1.mlp"])


class Relu(Odd2):
    def forward(self, x):
        return self.fold(F.relu(self.grow(x)))


def test_a_weight_that_is_used_elsewhere_stays_whole():
    model = llama_with(Relu)
    model.model.layers[0].extra = nn.Linear(32, 48)
    model.model.layers[0].extra.weight = model.model.layers[1].mlp.grow.weight
    plan = plan_of(model)
    assert "used elsewhere" in plan.declined["model.layers.1.mlp"]
    assert "model.layers.0.mlp" in plan.regions


def test_a_module_that_blocks_share_is_cut_in_each():
    model = llama_with(Relu)
    model.model.layers[0].mlp = model.model.layers[1].mlp
    plan = plan_of(model)
    assert plan.regions["model.layers.0.mlp"] == plan.regions["model.layers.1.mlp"]
    assert not plan.declined


# What is more than linears, and can be cut.


def test_parameters_beside_the_linears():
    rule = plan_of(llama_with(Scaled)).regions["model.layers.1.mlp"]
    assert rule.tensors == {"each": Cut(0, Layout((Block(48),)))}
    assert rule.summed == ("all",)


def test_a_linear_in_front_of_a_column_stays_whole_and_is_summed():
    rule = plan_of(llama_with(LowRank)).regions["model.layers.1.mlp"]
    assert set(rule.columns) == {"grow", "widen"}
    assert set(rule.summed) == {"narrow.weight", "narrow.bias", "norm.weight", "norm.bias"}


def test_units_that_do_not_divide_stay_whole_or_are_dealt_unevenly():
    plan = plan_of(ODD["llama_gqa"].build(), tp_size=3)
    assert set(plan.regions) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert plan.regions["model.layers.0.mlp"].row_layout.local_size(0, 3) == 15


def test_the_report_names_what_was_found_and_what_stays_whole():
    plan = plan_of(llama_with(Residual))
    assert describe_probe(plan.regions, plan.declined) == (
        " Found by probe: model.layers.*.self_attn (attention: ask, tag, give -> tell), "
        "model.layers.*.mlp (MLP: both -> back). Whole on each rank: "
        "model.layers.*.mlp (its hidden states reach the result beside the row linear)."
    )
    assert describe_probe(plan_of(ODD["gpt2"].build_usual()).regions, {}) == ""


def test_sequence_parallelism_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"transformer\.h\.0\.attn\.mix .*use sequence_parallel=False"):
        Assembly.check(ODD["gpt2"].build(), 2, 1, None, sequence_parallel=True)


def test_a_shipped_model_is_not_probed(monkeypatch):
    monkeypatch.setattr("hf_tpp.tensor_parallel.rewrite.probe_regions", None)
    plan_of(ODD["gpt2"].build_usual())
