"""Losses computed outside the model train it as in one process: loss, every gradient, and their norm.

Cases of one world size share their ranks.
"""

import gc
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import hf_tpp
from hf_tpp.parallel_model import parallel_state
from tests.parity.models import make_batch, tiny_model
from tests.parity.outside import cross_entropy, split, trained_by
from tests.parity.training import Record, join
from tests.ranks import run_ranks

LAYOUTS = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"dp": 2, "tp": 2, "pp": 2}]
EVERYWHERE = ("plain", "label_smoothing", "preference")


@dataclass
class Case:
    """One way to train (a function of `outside`, by name) on one layout."""

    how: str
    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    checkpointing: bool = False
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        flags = ["ckpt"] * self.checkpointing + [f"{name}{value}" for name, value in self.options.items()]
        return "-".join([self.how, self.model, f"dp{self.dp}tp{self.tp}pp{self.pp}", *flags])


SEQUENCE = {"options": {"sequence_parallel": True}}
CASES = [
    *(Case(how, model, **sizes) for how in EVERYWHERE for model in ("gpt2", "llama_gqa") for sizes in LAYOUTS),
    *(Case("preference_of_two_calls", "llama_tied", **sizes) for sizes in LAYOUTS[:3]),
    *(Case("preference_of_two_calls", "gpt2", checkpointing=True, **sizes) for sizes in LAYOUTS[:3]),
    Case("preference_of_two_calls", "gpt2", checkpointing=True, tp=2, options={"compile": {"backend": "aot_eager"}}),
    *(Case("sum_of_both_kinds", "llama_gqa", **sizes) for sizes in LAYOUTS[:3]),
    *(Case("backwards_in_another_order", "gpt2", **sizes) for sizes in LAYOUTS[:3]),
    *(Case(how, "llama_gqa", tp=2, pp=2) for how in ("as_tuple", "one_row", "token_count", "forgotten_forward")),
    *(Case("some_positions", model, **sizes) for model in ("gpt2", "llama_gqa") for sizes in LAYOUTS[:2]),
    Case("chosen_positions", "llama_gqa", tp=2, pp=2),
    *(Case("frozen_in_between", "llama_gqa", **sizes) for sizes in LAYOUTS[:2]),
    *(Case("accumulated", "gpt2", **sizes) for sizes in LAYOUTS[2:]),
    Case("accumulated", "llama_gqa", dp=2),
    *(Case("separate_microbatches", "llama_gqa", **sizes) for sizes in LAYOUTS[:3]),
    *(Case("plain", model, tp=2, **SEQUENCE) for model in ("gpt2", "llama_gqa")),
    Case("preference_of_two_calls", "llama_gqa", tp=2, pp=2, checkpointing=True, **SEQUENCE),
    Case("plain", "gpt_neox", tp=2, pp=2, checkpointing=True),
    Case("plain", "llama_one_kv", tp=2),
    *(Case("autocast", "llama_gqa", tolerance=4e-2, **sizes) for sizes in LAYOUTS[:3]),
    *(
        Case("logits_beside_the_loss", model, options={"train_logits": True}, **sizes)
        for model in ("gpt2", "llama_gqa")
        for sizes in LAYOUTS[:3]
    ),
    *(Case("router_loss", "mixtral", options={"num_microbatches": 1}, **sizes) for sizes in LAYOUTS[:3]),
]


def build(case: Case) -> nn.Module:
    model = tiny_model(case.model, num_layers=3)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model: nn.Module, case: Case, dp_rank: int) -> Record:
    rows = 4
    batch = make_batch(rows * case.dp, 12, seed=2)
    loss = trained_by(case.how)(model, {name: value[dp_rank * rows :][:rows] for name, value in batch.items()})
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    return Record([float(loss.detach())], [float(norm)], gradients)


def train_alone(case: Case) -> list[Record]:
    """One process for each replica: their gradients have to be averaged."""
    return [train(build(case), case, dp_rank) for dp_rank in range(case.dp)]


def train_in_parallel(case: Case) -> tuple[int, int, int, Record]:
    model = hf_tpp.parallelize(build(case), case.tp, case.pp, verbose=False, **case.options)
    state = parallel_state(model)
    assert state is not None
    record = train(model, case, state.mesh.dp.rank)
    record.specs = dict(state.specs)
    return state.mesh.tp.rank, state.mesh.pp.rank, state.mesh.dp.rank, record


def train_all(cases: Sequence[Case]) -> list[Any]:
    """Body of a rank."""
    return [train_in_parallel(case) for case in cases]


@pytest.mark.parametrize("world_size", sorted({case.world_size for case in CASES}))
def test_equal_to_one_process(world_size, subtests):
    cases = [case for case in CASES if case.world_size == world_size]
    ranks = run_ranks(train_all, world_size, cases, timeout=250.0)
    for index, case in enumerate(cases):
        with subtests.test(str(case)):
            assert_equal(case, train_alone(case), [rank[index] for rank in ranks])


def assert_equal(case: Case, alone: list[Record], ranks: list[tuple[int, int, int, Record]]) -> None:
    loss_tolerance = max(1e-5, case.tolerance / 10)
    for _, _, dp_rank, record in ranks:
        assert record.losses == pytest.approx(alone[dp_rank].losses, rel=loss_tolerance)
    joined = join(ranks, "gradients")
    names = alone[0].gradients.keys()
    assert joined.keys() == names
    expected = {name: torch.stack([record.gradients[name] for record in alone]).mean(0) for name in names}
    for name, value in expected.items():
        error = (joined[name] - value).norm() / value.norm().clamp(min=1e-8)
        assert error < case.tolerance, f"gradient of {name} differs by {error:.2e} relative"
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    for *_, record in ranks:
        assert record.norms == pytest.approx([float(norm)], rel=case.tolerance)


# --- what is left behind ----------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """What autograd keeps of one tensor."""

    tensor: torch.Tensor


def drop_logits() -> list[bool]:
    """Body of a rank: after each step, whether anything of the stages' graphs is still there."""
    model = hf_tpp.parallelize(tiny_model("gpt2", 3).train(), pp=2, verbose=False)
    inputs, labels = split(make_batch(4, 8))
    graphs: list[weakref.ref[Saved]] = []

    def save(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor.detach())  # an output that is saved with its graph would hold itself
        graphs.append(weakref.ref(saved))
        return saved

    def are_kept() -> bool:
        gc.collect()
        return any(graph() is not None for graph in graphs)

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        logits = model(**inputs).logits
        found = [are_kept()]
        del logits
        found.append(are_kept())
        logits = model(**inputs).logits
    found.append(are_kept())
    cross_entropy(logits, labels).backward()
    return [*found, are_kept()]


def test_nothing_is_left_behind():
    """Graphs go with the logits, or with their backward."""
    assert run_ranks(drop_logits, 2) == [[True, False, True, False]] * 2
