"""Training in parallel equals training in one process: every family on every layout, and every way to call a model.

The matrix runs whole trainings (losses, norms, first gradients, last weights), the calls single passes (loss and
gradients). Cases of one world size share their ranks, so that time goes into training and not into starting processes.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import hf_tpp
from hf_tpp.parallel_model import parallel_state
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import Case, Record, assert_equal, join, run_parallel, run_single
from tests.ranks import RankError, run_ranks

MODELS = ("gpt2", "gpt_neox", "llama_gqa", "llama_one_kv", "llama_tied")
LAYOUTS: dict[str, dict[str, int]] = {
    "tp2": {"tp": 2},
    "tp4": {"tp": 4},
    "tp2pp2": {"tp": 2, "pp": 2},
    "tp2pp4": {"tp": 2, "pp": 4},
    "dp2tp2pp2": {"dp": 2, "tp": 2, "pp": 2},
    "pp2": {"pp": 2},
    "pp4": {"pp": 4},
}
ATTENTIONS = ("sdpa", "eager")
LARGE_AND_ODD = 4099
"""A vocabulary for which products are aligned."""
CHUNK = 6
"""Cases that share one set of ranks."""


def matrix_case(
    model: str, layout: str, attention: str, checkpointing: bool, sequence_parallel: bool, **more: Any
) -> Case:
    flags = {"checkpointing": checkpointing, "sequence_parallel": sequence_parallel}
    return Case(model, **LAYOUTS[layout], attention=attention, **flags, **more)


def whole_matrix() -> list[Case]:
    product = itertools.product(MODELS, LAYOUTS, ATTENTIONS, (False, True), (False, True))
    cases = [matrix_case(*values) for values in product]
    return [case for case in cases if case.tp > 1 or not case.sequence_parallel]


def default_matrix() -> list[Case]:
    """Every model on every layout once, shorter than in the sweep; the flags alternate, so that all pairs occur."""
    cases = []
    for (i, model), (j, layout) in itertools.product(enumerate(MODELS), enumerate(LAYOUTS)):
        sequence_parallel = LAYOUTS[layout].get("tp", 1) > 1 and (i // 2 + j) % 2 == 1
        flags = ATTENTIONS[(i + j) % 2], (i + j // 2) % 2 == 1, sequence_parallel
        shorter = {} if "pp" in LAYOUTS[layout] else {"num_layers": 3, "num_microbatches": 2}
        cases.append(matrix_case(model, layout, *flags, steps=4, **shorter))
    return cases


OVERLAP = {"overlap_microbatches": True}
short = partial(Case, steps=4)
FURTHER = [
    *(short(model, tp=2) for model in ("qwen2", "mistral", "llama_bias")),
    *(short(model, pp=2) for model in ("qwen2", "mistral", "llama_bias")),
    short("mistral", tp=2, pp=2, attention="eager", sequence_parallel=True),
    short("llama_bias", tp=2, pp=2, checkpointing=True, sequence_parallel=True),
    short("qwen2", tp=4, sequence_parallel=True),
    short("llama_gqa", pp=2, num_microbatches=1),
    short("gpt2", tp=2, pp=2, num_microbatches=1),
    short("gpt2", pp=4, num_microbatches=2),
    short("gpt_neox", tp=2, pp=2, rows=5, num_microbatches=2),
    short("llama_gqa", pp=2, rows=3, num_microbatches=2),
    short("gpt2", pp=2, rows=5, num_microbatches=4),
    short("llama_tied", pp=2, rows=3, num_microbatches=4),
    short("gpt2", pp=2, rows=2, num_microbatches=7),
    short("llama_gqa", tp=2, rows=1),
    short("gpt_neox", tp=2, pp=2, rows=1),
    short("gpt2", pp=2, options={"stages": [1, 4]}),
    short("llama_tied", tp=2, pp=2, options={"stages": [4, 1]}),
    short("gpt2", tp=2, pp=2, frozen=("wte", "wpe")),
    short("gpt2", pp=2, frozen=("h.0.", "h.1.", "h.2.", "wte", "wpe")),
    short("llama_gqa", tp=2, pp=2, frozen=("norm", "k_proj"), sequence_parallel=True),
    short("llama_gqa", pp=2, frozen=("layers.0.", "layers.1.", "layers.2.", "layers.3.", "embed"), checkpointing=True),
    short("gpt_neox", tp=2, frozen=("bias",)),
    short("gpt2", dp=2),
    short("llama_tied", dp=2, pp=2, rows=3, num_microbatches=2),
    short("gpt2", pp=2, vocab_size=LARGE_AND_ODD, num_layers=2),
    short("llama_gqa", pp=2, vocab_size=LARGE_AND_ODD, num_layers=2, options={"align_vocabulary": False}),
    short("gpt_neox", dp=2, vocab_size=LARGE_AND_ODD, num_layers=2),
    short("llama_tied", tp=2, vocab_size=LARGE_AND_ODD, num_layers=2),
    short("llama_gqa", tp=2, num_layers=2, num_microbatches=3, checkpointing=True, options=OVERLAP),
    short("gpt2", tp=2, dp=2, num_layers=2, num_microbatches=2, options=OVERLAP),
    short("gpt_neox", tp=2, num_layers=2, num_microbatches=4, sequence_parallel=True, options=OVERLAP),
]


def label(case: Case) -> str:
    options = [f"{name}{value}" for name, value in case.options.items()]
    return "-".join([str(case), f"rows{case.rows}", *options]).replace(" ", "")


def run_cases(cases: Sequence[Case]) -> list[tuple[int, int, int, Record]]:
    """Body of a rank: one case after the other."""
    return [annotated(label(case), run_parallel, case) for case in cases]


def annotated(name: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function; if it fails, say for which case."""
    try:
        return function(*args)
    except BaseException as error:
        error.add_note(f"in case {name}")
        raise


class Pool:
    """Runs cases of one world size together, when the first of them is asked for; alone, if one of them fails."""

    def __init__(self, cases: Sequence[Any], run: Callable[[Sequence[Any]], list[Any]]) -> None:
        self.cases, self.run = list(cases), run
        sizes = sorted({case.world_size for case in self.cases})
        by_size = [[i for i, case in enumerate(self.cases) if case.world_size == size] for size in sizes]
        self.chunks = [group[start : start + CHUNK] for group in by_size for start in range(0, len(group), CHUNK)]
        self.results: dict[int, list[Any]] = {}
        self.failed: list[list[int]] = []

    def of_case(self, index: int) -> list[Any]:
        """What each rank returned."""
        chunk = next(members for members in self.chunks if index in members)
        if index not in self.results and chunk not in self.failed:
            try:
                self._run(chunk)
            except RankError:
                self.failed.append(chunk)
        if index not in self.results:
            self._run([index])
        return self.results[index]

    def _run(self, members: Sequence[int]) -> None:
        cases = [self.cases[i] for i in members]
        ranks = run_ranks(self.run, cases[0].world_size, cases, timeout=250.0)
        self.results |= {index: [rank[i] for rank in ranks] for i, index in enumerate(members)}


DEFAULT = Pool([*default_matrix(), *FURTHER], run_cases)
SWEEP = Pool(whole_matrix(), run_cases)


def indices(pool: Pool) -> list[Any]:
    return [pytest.param(index, id=label(case)) for index, case in enumerate(pool.cases)]


@pytest.mark.parametrize("index", indices(DEFAULT))
def test_training(index):
    case = DEFAULT.cases[index]
    assert_equal(case, run_single(case), DEFAULT.of_case(index))


@pytest.mark.slow
@pytest.mark.parametrize("index", indices(SWEEP))
def test_training_in_the_whole_matrix(index):
    case = SWEEP.cases[index]
    assert_equal(case, run_single(case), SWEEP.of_case(index))


def axes(case: Case) -> dict[str, Any]:
    layout = next(name for name, sizes in LAYOUTS.items() if sizes == sizes_of(case))
    flags = {"checkpointing": case.checkpointing, "sequence_parallel": case.sequence_parallel}
    return {"model": case.model, "layout": layout, "attention": case.attention, **flags}


def sizes_of(case: Case) -> dict[str, int]:
    return {name: getattr(case, name) for name in ("dp", "tp", "pp") if getattr(case, name) > 1}


def test_the_default_matrix_has_every_pair_of_values():
    def pairs(cases: Sequence[Case]) -> set[Any]:
        return {pair for case in cases for pair in itertools.combinations(axes(case).items(), 2)}

    assert pairs(default_matrix()) == pairs(whole_matrix())


# --- single calls -----------------------------------------------------------------------------------------------------

Batch = dict[str, torch.Tensor]


@dataclass
class Call:
    """One pass: how the model is called (a function of this module, by name), on which layout."""

    how: str
    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    rows: int = 4
    checkpointing: bool = False
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = f"tp{self.tp}pp{self.pp}" + f"dp{self.dp}" * (self.dp > 1)
        options = [f"{name}{value}" for name, value in self.options.items()]
        kind = [str(self.dtype).removeprefix("torch.")] * (self.dtype is not torch.float32)
        return "-".join([self.how, self.model, sizes, f"rows{self.rows}", *kind, *options]).replace(" ", "")

    @property
    def loss_tolerance(self) -> float:
        return 1e-5 if self.tolerance <= 1e-4 else self.tolerance


def plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch).loss
    loss.backward()
    return loss


def positional_arguments(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    return loss


def upstream_scale(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch).loss
    (loss * 3).backward()
    return loss


def sum_of_two_losses(model: nn.Module, batch: Batch) -> torch.Tensor:
    other = {name: value.flip(0) for name, value in make_batch(3, 8, seed=7).items()}
    loss = model(**batch).loss + 0.5 * model(**other).loss
    loss.backward()
    return loss


def evaluation_in_between(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch).loss
    model.eval()
    model(**make_batch(2, 8, seed=3))
    model.train()
    loss.backward()
    return loss


def as_tuple(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch, return_dict=False)[0]
    loss.backward()
    return loss


def given_token_count(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch, num_items_in_batch=17).loss
    loss.backward()
    return loss


def given_token_count_tensor(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch, num_items_in_batch=torch.tensor(17)).loss
    loss.backward()
    return loss


def another_ignore_index(model: nn.Module, batch: Batch) -> torch.Tensor:
    labels = batch["labels"].where(batch["labels"] != -100, -1)
    loss = model(**{**batch, "labels": labels}, ignore_index=-1).loss
    loss.backward()
    return loss


def own_shift(model: nn.Module, batch: Batch) -> torch.Tensor:
    shifted = batch["labels"].flip(1)
    loss = model(**batch, shift_labels=shifted).loss
    loss.backward()
    return loss


def no_mask(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    loss.backward()
    return loss


def row_without_labels(model: nn.Module, batch: Batch) -> torch.Tensor:
    labels = batch["labels"].clone()
    labels[2:] = -100
    loss = model(**{**batch, "labels": labels}).loss
    loss.backward()
    return loss


def position_ids(model: nn.Module, batch: Batch) -> torch.Tensor:
    seq = batch["input_ids"].shape[1]
    loss = model(**batch, position_ids=torch.arange(3, 3 + seq) + torch.arange(len(batch["labels"]))[:, None]).loss
    loss.backward()
    return loss


def position_ids_of_one_row(model: nn.Module, batch: Batch) -> torch.Tensor:
    loss = model(**batch, position_ids=torch.arange(3, 3 + batch["input_ids"].shape[1])[None]).loss
    loss.backward()
    return loss


def packed_texts(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Two texts in a row, which transformers tells apart by position ids that start again."""
    position_ids = torch.cat([torch.arange(5), torch.arange(7)]).expand(len(batch["labels"]), -1)
    labels = batch["input_ids"].clone()
    labels[:, 5] = -100
    loss = model(input_ids=batch["input_ids"], position_ids=position_ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss


def inputs_embeds(model: nn.Module, batch: Batch) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    embeds = torch.randn(*batch["input_ids"].shape, model.config.hidden_size, generator=generator)
    loss = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
    loss.backward()
    return loss


def autocast(model: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    return loss


def explicit_microbatches(model: nn.Module, batch: Batch) -> torch.Tensor:
    parts = [batch, make_batch(2, 16, seed=5), make_batch(1, 8, seed=6)]
    if parallel_state(model) is not None:
        loss = model(**{name: [part[name] for part in parts] for name in batch}).loss
    else:
        tokens = sum((part["labels"][:, 1:] != -100).sum() for part in parts)
        loss = sum(model(**part, num_items_in_batch=tokens).loss for part in parts)
    loss.backward()
    return loss


def unfrozen_afterwards(model: nn.Module, batch: Batch) -> torch.Tensor:
    """`build_call` froze the blocks 0 and 1, before the model became parallel."""
    model.requires_grad_(True)
    return plain(model, batch)


def frozen_afterwards(model: nn.Module, batch: Batch) -> torch.Tensor:
    for name, parameter in model.named_parameters():
        if is_early(name):
            parameter.requires_grad_(False)
    return plain(model, batch)


def hooks_on_parameters(model: nn.Module, batch: Batch) -> torch.Tensor:
    handles = [p.register_hook(lambda gradient: gradient * 2) for n, p in model.named_parameters() if is_early(n)]
    loss = plain(model, batch)
    for handle in handles:
        handle.remove()
    return loss


def accumulation(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The first pass without, the second with synchronisation of the replicas."""
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    with no_sync():
        first = model(**batch).loss
        first.backward()
    second = model(**{name: value.flip(0) for name, value in batch.items()}).loss
    (second * 2).backward()
    return first + second


def is_early(name: str) -> bool:
    return ".0." in name or ".1." in name


BF16 = {"dtype": torch.bfloat16, "tolerance": 4e-2}
CALLS = [
    *(Call(how, "gpt2", pp=2) for how in ("plain", "upstream_scale", "sum_of_two_losses", "evaluation_in_between")),
    *(Call(how, "llama_gqa", tp=2) for how in ("upstream_scale", "sum_of_two_losses", "evaluation_in_between")),
    *(Call(how, "llama_gqa", pp=2) for how in ("as_tuple", "positional_arguments")),
    *(Call(how, "gpt_neox", tp=2, pp=2) for how in ("as_tuple", "positional_arguments")),
    *(Call("given_token_count", model, tp=2, pp=2) for model in ("gpt2", "llama_gqa")),
    Call("given_token_count_tensor", "llama_tied", pp=2),
    *(Call("another_ignore_index", "llama_gqa", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    *(Call("own_shift", "llama_gqa", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    *(Call("no_mask", model, tp=2, pp=2) for model in ("gpt2", "mistral")),
    *(Call("row_without_labels", "llama_gqa", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    *(Call("position_ids", model, tp=2, pp=2) for model in ("gpt2", "gpt_neox", "llama_gqa")),
    *(Call("position_ids_of_one_row", model, pp=2) for model in ("gpt2", "llama_gqa")),
    Call("position_ids", "gpt2", pp=2, rows=12),
    *(Call("packed_texts", "llama_gqa", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    Call("packed_texts", "mistral", tp=2, options={"sequence_parallel": True}),
    *(Call("inputs_embeds", model, tp=2) for model in ("gpt2", "llama_gqa")),
    *(Call("inputs_embeds", model, pp=2) for model in ("gpt2", "llama_gqa", "llama_tied")),
    *(Call("autocast", model, tp=2, tolerance=4e-2) for model in ("gpt2", "llama_gqa")),
    *(Call("autocast", model, pp=2, tolerance=4e-2) for model in ("gpt_neox", "llama_gqa")),
    Call("autocast", "gpt2", tp=2, pp=2, checkpointing=True, tolerance=4e-2),
    *(Call("plain", model, tp=2, pp=2, **BF16) for model in ("gpt2", "gpt_neox", "llama_gqa")),
    Call("plain", "llama_gqa", tp=2, options={"sequence_parallel": True}, **BF16),
    *(Call("explicit_microbatches", "gpt2", **sizes) for sizes in ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2})),
    Call("explicit_microbatches", "llama_gqa", tp=2, pp=2, options={"sequence_parallel": True}),
    Call("explicit_microbatches", "llama_gqa", pp=2, options={"num_microbatches": 1}),
    *(Call("unfrozen_afterwards", "gpt2", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    *(Call("frozen_afterwards", "gpt2", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    *(Call("hooks_on_parameters", "llama_gqa", **sizes) for sizes in ({"tp": 2}, {"pp": 2})),
    Call("accumulation", "gpt2", dp=2),
    *(Call("accumulation", "llama_gqa", **sizes) for sizes in ({"tp": 2, "dp": 2}, {"pp": 2, "dp": 2}, {"pp": 2})),
    *(Call("upstream_scale", "gpt2", dp=2, pp=2, rows=rows) for rows in (1, 3)),
]
NORM_TYPES = (1.0, 2.0, 3.0, math.inf)


def build_call(call: Call) -> nn.Module:
    model = tiny_model(call.model, num_layers=4).to(call.dtype).train()
    if call.how == "unfrozen_afterwards":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not is_early(name))
    if call.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def run_call(model: nn.Module, call: Call, dp_rank: int, dp_size: int) -> tuple[Record, dict[float, Record]]:
    """Loss and gradients, and for each norm type the norm and the clipped gradients."""
    batch = make_batch(call.rows * call.dp, 12, seed=2)
    size = call.rows * call.dp // dp_size
    loss = globals()[call.how](model, {name: value[dp_rank * size :][:size] for name, value in batch.items()})
    record = Record(losses=[loss.item()], gradients=gradients_of(model))
    originals = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    clipped = {}
    for norm_type in NORM_TYPES:
        for parameter, gradient in originals.items():
            parameter.grad.copy_(gradient)
        if parallel_state(model) is None:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        else:
            norm = hf_tpp.clip_grad_norm_(model, 0.1, norm_type)
        clipped[norm_type] = Record(norms=[norm.item()], gradients=gradients_of(model))
    return record, clipped


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {name: parameter.grad.clone() for name, parameter in named if parameter.grad is not None}


def run_call_in_parallel(call: Call) -> tuple[int, int, int, Record, dict[float, Record]]:
    model = hf_tpp.parallelize(build_call(call), call.tp, call.pp, verbose=False, **call.options)
    state = parallel_state(model)
    record, clipped = run_call(model, call, state.mesh.dp.rank, state.mesh.dp.size)
    for one in (record, *clipped.values()):
        one.specs = dict(state.specs)
    return state.mesh.tp.rank, state.mesh.pp.rank, state.mesh.dp.rank, record, clipped


def run_calls(calls: Sequence[Call]) -> list[Any]:
    """Body of a rank."""
    return [annotated(str(call), run_call_in_parallel, call) for call in calls]


SINGLE_CALLS = Pool(CALLS, run_calls)


def assert_gradients_equal(call: Call, expected: Record, ranks: list[tuple[int, int, int, Record]]) -> None:
    joined = join(ranks, "gradients")
    assert joined.keys() == expected.gradients.keys()
    for name, value in expected.gradients.items():
        error = (joined[name] - value).float().norm() / value.float().norm().clamp(min=1e-8)
        assert error < call.tolerance, f"{call}: gradient of {name} differs by {error:.2e} relative"


@pytest.mark.parametrize("index", [pytest.param(i, id=str(call)) for i, call in enumerate(CALLS)])
def test_call(index):
    call = CALLS[index]
    single, single_clipped = run_call(build_call(call), call, 0, 1)
    ranks = SINGLE_CALLS.of_case(index)
    for *_, record, _ in ranks:
        assert record.losses == pytest.approx(single.losses, rel=call.loss_tolerance)
    assert_gradients_equal(call, single, [rank[:4] for rank in ranks])
    for norm_type, expected in single_clipped.items():
        assert len({rank[4][norm_type].norms[0] for rank in ranks}) == 1
        assert ranks[0][4][norm_type].norms == pytest.approx(expected.norms, rel=max(call.tolerance, 1e-4))
        assert_gradients_equal(call, expected, [(*rank[:3], rank[4][norm_type]) for rank in ranks])


def keep_local_gradients() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Body of a rank: gradients after a pass in no_sync, and after the next one outside of it."""
    model = hf_tpp.parallelize(build_call(Call("plain", "gpt2")), verbose=False)
    rank = parallel_state(model).mesh.dp.rank
    with model.no_sync():
        plain(model, make_batch(2, 8, seed=rank))
    local = gradients_of(model)
    plain(model, make_batch(2, 8, seed=10 + rank))
    return local, gradients_of(model)


def test_no_sync_keeps_gradients_local():
    (first, first_synced), (second, second_synced) = run_ranks(keep_local_gradients, 2)
    assert all(not torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first_synced[name], second_synced[name]) for name in first)
