"""Compiled blocks: training equals one process, and torch compiles what it should and no more."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import hf_tpp
from hf_tpp.compilation import AUTOMATIC
from hf_tpp.errors import ConfigurationError
from hf_tpp.parallel_model import parallel_state
from tests.parity.compiled import EAGER, Counts, Trained, Way, both, counted, evaluate_only, run_cases
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import Case, assert_equal, run_single
from tests.ranks import run_ranks

short = functools.partial(Case, steps=2, num_layers=3, num_microbatches=2, options={"compile": EAGER})
CASES = [
    short("gpt2", tp=2, checkpointing=True),
    short("llama_gqa", tp=2, sequence_parallel=True),
    short("gpt_neox", tp=2, attention="eager"),
    short("llama_gqa", pp=2, checkpointing=True),
    short("gpt2", dp=2, options={"compile": EAGER, "data_parallel": "fully_shard"}),
    short("gpt2", tp=2, pp=2, sequence_parallel=True),
    short("gpt_neox", tp=2, pp=2, checkpointing=True),
]


SIZES = ({"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2})
ALL_CASES = [
    short(model, **sizes, checkpointing=checkpointing, sequence_parallel=sequence_parallel)
    for model in ("gpt2", "llama_gqa", "gpt_neox")
    for sizes in SIZES
    for checkpointing in (False, True)
    for sequence_parallel in (False, True)
    if "tp" in sizes or not sequence_parallel
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_training_equals_one_process(world_size, subtests):
    check([case for case in CASES if case.world_size == world_size], subtests)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("model", ["gpt2", "llama_gqa", "gpt_neox"])
def test_training_equals_one_process_in_all_combinations(model, sizes, subtests):
    check([case for case in ALL_CASES if case.model == model and sizes_of(case) == sizes], subtests)


def sizes_of(case: Case) -> dict[str, int]:
    return {name: getattr(case, name) for name in ("tp", "pp") if getattr(case, name) > 1}


def check(cases: Sequence[Case], subtests: Any) -> None:
    world_size = cases[0].world_size
    ranks = run_ranks(run_cases, world_size, cases, timeout=280.0)
    for index, case in enumerate(cases):
        with subtests.test(str(case)):
            results = [rank[index] for rank in ranks]
            assert_equal(case, run_single(case), [record for record, _ in results])
            # Batches have two lengths; the blocks of a stage share a graph of each.
            assert [counts for _, counts in results] == [Counts(graphs=2, breaks=0)] * world_size


def compare(way: Way, compile: Any = EAGER) -> list[tuple[Trained, Trained]]:
    """Plain and compiled blocks, on each rank."""
    ranks = run_ranks(both, way.tp * way.pp, way, compile, timeout=280.0)
    for plain, compiled in ranks:
        assert compiled.losses == pytest.approx(plain.losses, rel=1e-6)
        assert compiled.gradients.keys() == plain.gradients.keys()
        for name, gradient in plain.gradients.items():
            torch.testing.assert_close(compiled.gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
        assert plain.counts.graphs == 0
    return ranks


def test_hooks_inside_blocks_are_seen():
    """Dynamo by default takes a module without hooks for one that never has any, whichever block it is in."""
    for _, compiled in compare(Way("llama_gqa", tp=2, prepare="scale_one_norm")):
        assert compiled.counts == Counts(graphs=2, breaks=0)


def test_each_length_has_a_graph_up_to_the_limit():
    """And any further one runs plain, with the same numbers; recomputation does what the forward did."""
    way = Way("gpt2", pp=2, checkpointing=True, rows=3, lengths=(8, 12, 8, 12), limit=3)
    for _, compiled in compare(way):
        assert compiled.counts == Counts(graphs=3, breaks=0)


@pytest.mark.parametrize(
    "way",
    [
        Way("llama_gqa", tp=2, sequence_parallel=True),
        pytest.param(Way("gpt2", pp=2, checkpointing=True), marks=pytest.mark.slow),
        pytest.param(Way("gpt2", tp=2), marks=pytest.mark.slow),
    ],
    ids=["tp2-sp", "pp2", "tp2"],
)
def test_where_nobody_asked_a_few_graphs_serve_all_lengths(way):
    way = dataclasses.replace(way, lengths=(8, 12, 16, 20, 24, 28, 8))
    for plain, compiled in compare(way, EAGER | AUTOMATIC):
        assert compiled.counts == Counts(graphs=3, breaks=0)
        assert compiled.warnings == plain.warnings


def test_masks_are_decided_outside_of_the_blocks():
    """Where nothing is masked but the future, attention gets no mask and takes its fast path, compiled or not."""
    for with_mask in (True, False):
        for plain, compiled in compare(Way("llama_gqa", tp=2, with_mask=with_mask)):
            assert len(plain.masks) == len(compiled.masks) > 0
            for ours, theirs in zip(compiled.masks, plain.masks, strict=True):
                assert (ours is None) == (theirs is None) == (not with_mask)
                assert ours is None or torch.equal(ours, theirs)


DROPPING = [
    Way("gpt2", pp=2, dropout=0.1, checkpointing=True),
    Way("llama_gqa", tp=2, dropout=0.1, sequence_parallel=True),
]


@pytest.mark.parametrize("way", DROPPING, ids=["pp2", "tp2-sp"])
def test_dropout_where_streams_are_not_switched_inside_blocks(way):
    for _, compiled in compare(way):
        assert compiled.counts == Counts(graphs=1, breaks=0)


def test_dropout_over_tensor_parallel_ranks_runs_plain_and_says_so():
    for _, compiled in compare(Way("gpt2", tp=2, dropout=0.1)):
        assert compiled.counts.graphs == 0
        assert [text for text in compiled.warnings if "uncompiled, since dropout is on" in text]


def test_autocast():
    for _, compiled in compare(Way("llama_gqa", tp=2, autocast=True)):
        assert compiled.counts == Counts(graphs=1, breaks=0)


def test_only_training_is_compiled():
    assert run_ranks(evaluate_only, 2, Way("llama_gqa", tp=2)) == [Counts(graphs=0, breaks=0)] * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_one_process():
    plain, model = tiny_model("llama_gqa", 2).train(), tiny_model("llama_gqa", 2).train()
    assert hf_tpp.parallelize(model, compile=EAGER, verbose=False) is model
    batch = {**make_batch(1, 8), "use_cache": False}
    _, counts = counted(lambda: model(**batch).loss.backward())
    assert counts == Counts(graphs=1, breaks=0)
    plain(**batch).loss.backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    with pytest.warns(UserWarning, match="uncompiled, since they are trained with a cache.*: pass use_cache=False"):
        _, counts = counted(lambda: model(**make_batch(1, 8)))
    assert counts.graphs == 0


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("gpt2", tp=2), Way("llama_gqa", pp=2, checkpointing=True)], ids=["tp2", "pp2"])
def test_inductor(way):
    """Generated code rounds in another order. The loss is compiled too, where it is: its sums, and its gradient."""
    ranks = compare(way, True)
    for rank, (_, compiled) in enumerate(ranks):
        has_loss = way.tp == 2 or rank == 1
        assert compiled.counts == Counts(graphs=3 if has_loss else 1, breaks=0)


REFUSED: list[tuple[Any, str]] = [
    ("inductor", "compile='inductor': use True, or options of torch.compile such as {'backend': 'aot_eager'}"),
    ({"backends": "inductor"}, "unknown options ['backends']: use some of backend, mode"),
    ({"backend": "indctor"}, "the backend 'indctor', which torch does not know: use"),
    ({"mode": "reduce-overhead"}, "use the mode 'max-autotune-no-cudagraphs', or none"),
    ({"backend": "cudagraphs"}, "replays CUDA graphs"),
    ({"options": {"triton.cudagraphs": True}}, "replays CUDA graphs"),
]


@pytest.mark.parametrize(("wanted", "message"), REFUSED, ids=[str(wanted) for wanted, _ in REFUSED])
def test_options_are_checked_before_anything_changes(wanted, message):
    model = tiny_model("gpt2", 2)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        hf_tpp.parallelize(model, compile=wanted, verbose=False)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert parallel_state(model) is None


def compile_later(way: Way) -> Counts:
    """Body of a rank: the method of a parallel model."""
    model = way.build(None)
    model.compile(backend="aot_eager")
    tokens = make_batch(2, 8)["input_ids"]
    _, counts = counted(lambda: model(input_ids=tokens, labels=tokens).loss.backward())
    with pytest.raises(ConfigurationError, match="CUDA graphs"):
        model.compile(mode="max-autotune")
    return counts


def compile_by_accelerate(way: Way) -> Counts:
    """Body of a rank: `Accelerator(dynamo_backend=...)`, as Trainer's torch_compile=True does."""
    model = way.build(None)
    model = Accelerator(dynamo_backend="aot_eager").prepare(model)
    tokens = make_batch(2, 8)["input_ids"]
    return counted(lambda: model(input_ids=tokens, labels=tokens).loss.backward())[1]


def test_accelerate_compiles_blocks():
    found = run_ranks(compile_by_accelerate, 2, Way("gpt2", pp=2), init=False)
    assert found == [Counts(graphs=1, breaks=0)] * 2


def test_the_method_compiles_blocks():
    """Not the call of the whole model, which runs messages between stages."""
    assert run_ranks(compile_later, 2, Way("gpt2", pp=2)) == [Counts(graphs=1, breaks=0)] * 2
