"""A training run in one process and the same run in parallel, and the comparison of everything that must be equal."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

import hf_tpp
from hf_tpp.check import joining
from hf_tpp.check.joining import Place, RankTensors
from hf_tpp.parallel_model import parallel_state
from hf_tpp.sharding import ShardSpec
from tests.parity.models import VOCABULARY, make_batch, tiny_model

ACCUMULATION = 2
MAX_NORM = 0.7


@dataclass
class Case:
    """One configuration of the parity test."""

    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    attention: str = "sdpa"
    checkpointing: bool = False
    sequence_parallel: bool = False
    num_layers: int = 5
    num_microbatches: int | None = None
    rows: int = 4
    seq: int = 12
    steps: int = 6
    frozen: tuple[str, ...] = ()
    vocab_size: int = VOCABULARY
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        flags = [self.model, f"tp{self.tp}", f"pp{self.pp}", f"dp{self.dp}", self.attention]
        flags += ["ckpt"] * self.checkpointing + ["sp"] * self.sequence_parallel
        flags += [f"m{self.num_microbatches}"] * bool(self.num_microbatches) + list(self.frozen)
        flags += [f"v{self.vocab_size}"] * (self.vocab_size != VOCABULARY)
        return "-".join(flags)


@dataclass
class Record:
    """What a run leaves behind: per step losses and norms, the first step's gradients, the last weights."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    specs: dict[str, ShardSpec] = field(default_factory=dict)


def build(case: Case) -> nn.Module:
    model = tiny_model(case.model, case.num_layers, case.attention, vocab_size=case.vocab_size)
    for name, parameter in model.named_parameters():
        if any(part in name for part in case.frozen):
            parameter.requires_grad_(False)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(model: nn.Module, case: Case, dp_rank: int, dp_size: int) -> Record:
    """SGD for the first half of the steps, AdamW for the second; accumulation and clipping throughout."""
    record = Record()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.5)
    # A key bias has no gradient but rounding noise (softmax does not see it), and with a tiny eps Adam would turn that
    # noise into full steps.
    adamw = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-4)
    for step in range(case.steps):
        optimizer = sgd if step < case.steps // 2 else adamw
        total = 0.0
        for part in range(ACCUMULATION):
            batch = make_batch(case.rows * case.dp, case.seq + 4 * part, 10 * step + part, case.vocab_size)
            rows = slice(dp_rank * case.rows * case.dp // dp_size, (dp_rank + 1) * case.rows * case.dp // dp_size)
            loss = model(**{name: value[rows] for name, value in batch.items()}).loss / ACCUMULATION
            loss.backward()
            total += loss.item()
        if step == 0:
            named = model.named_parameters()
            record.gradients = {name: whole(p.grad) for name, p in named if p.grad is not None}
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(total)
        record.norms.append(float(norm))
    record.weights = {name: whole(p) for name, p in model.named_parameters()}
    return record


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; of a tensor that replicas share, put together over the dp axis."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def run_parallel(case: Case) -> tuple[int, int, int, Record]:
    """Body of a rank."""
    model = hf_tpp.parallelize(
        build(case),
        tp=case.tp,
        pp=case.pp,
        num_microbatches=case.num_microbatches,
        sequence_parallel=case.sequence_parallel,
        verbose=False,
        **case.options,
    )
    state = parallel_state(model)
    assert state is not None
    record = train(model, case, state.mesh.dp.rank, state.mesh.dp.size)
    record.specs = dict(state.specs)
    return state.mesh.tp.rank, state.mesh.pp.rank, state.mesh.dp.rank, record


def run_single(case: Case) -> Record:
    """The same run in this process, on the batches of all replicas together."""
    return train(build(case), case, 0, 1)


def join(ranks: list[tuple[int, int, int, Record]], field_name: str) -> dict[str, torch.Tensor]:
    """Full tensors by Hugging Face name, from the shards of all ranks; replicas and copies must be identical."""
    full, problems = joining.join(
        [
            RankTensors(Place(pp_rank, dp_rank, tp_rank), getattr(record, field_name), record.specs)
            for tp_rank, pp_rank, dp_rank, record in ranks
        ]
    )
    assert not problems
    return full


def assert_equal(case: Case, single: Record, ranks: list[tuple[int, int, int, Record]]) -> None:
    """Loss 1e-5, gradients, norms and weights 1e-4 relative."""
    for _, _, _, record in ranks:
        torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(single.losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(record.norms), torch.tensor(single.norms), rtol=1e-4, atol=0)
    for what in ("gradients", "weights"):
        joined, expected = join(ranks, what), getattr(single, what)
        assert joined.keys() == expected.keys()
        for name, value in expected.items():
            error = (joined[name] - value).norm() / value.norm().clamp(min=1e-8)
            assert error < 1e-4, f"{case}: {what} of {name} differ by {error:.2e} relative"
