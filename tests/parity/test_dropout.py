"""Dropout in parallel: the same masks where activations are replicated, different ones where they are not."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from hf_tpp.sharding import ShardSpec
from tests.parity.dropout import (
    HIDDEN,
    LAYERS,
    SEQ,
    Job,
    Mask,
    Pass,
    jittered_pass,
    noise_of_forwards,
    one_pass,
    pass_with_skipped_blocks,
    passes_with_layerdrop,
    passes_with_noise,
    replicas_that_skip,
    train,
)
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import join
from tests.ranks import RankError, run_ranks

# --- ten steps --------------------------------------------------------------------------------------------------------

JOBS = [
    Job(model, sizes, checkpointing, sequence_parallel)
    for model, sizes, checkpointing, sequence_parallel in itertools.product(
        ("gpt2", "gpt_neox", "llama_tied"), ({"tp": 2}, {"tp": 2, "pp": 2}), (False, True), (False, True)
    )
]


@pytest.mark.parametrize("world_size", [2, 4])
def test_replicated_and_tied_parameters_stay_identical(world_size, subtests):
    """`join` asserts it: bit for bit between the tp ranks that replicate a parameter, and the stages that tie one."""
    jobs = [job for job in JOBS if job.world_size == world_size]
    ranks = run_ranks(train, world_size, jobs, timeout=200.0)
    for index, job in enumerate(jobs):
        with subtests.test(str(job)):
            pieces = [rank[index] for rank in ranks]
            specs: list[ShardSpec] = [spec for *_, record in pieces for spec in record.specs.values()]
            assert any(spec.dim is None for spec in specs)
            assert any(len(spec.stages) == 2 for spec in specs) == ("pp" in job.sizes and job.model != "gpt_neox")
            start = dict(tiny_model(job.model, LAYERS, "eager").named_parameters())
            for name, weight in join(pieces, "weights").items():
                assert weight.isfinite().all()
                assert not torch.equal(weight, start[name]), name


# --- masks ------------------------------------------------------------------------------------------------------------


def passes(*jobs: Job, own_seeds: bool = True) -> list[list[Pass]]:
    """Per job, the passes of all ranks; they need not start from equal generators."""
    ranks = run_ranks(one_pass, jobs[0].world_size, list(jobs), own_seeds=own_seeds, timeout=120.0)
    return [[rank[index] for rank in ranks] for index in range(len(jobs))]


def equal_masks(first: Sequence[Mask], second: Sequence[Mask]) -> list[bool]:
    assert [mask.shape for mask in first] == [mask.shape for mask in second]
    return [torch.equal(a.dropped, b.dropped) for a, b in zip(first, second, strict=True)]


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"tp": 2, "pp": 2}], ids=str)
def test_masks_over_tensor_parallel_ranks(sizes, subtests):
    jobs = [Job(model, sizes, checkpointing) for model in ("gpt2", "gpt_neox") for checkpointing in (False, True)]
    for job, ranks in zip(jobs, passes(*jobs), strict=True):
        with subtests.test(str(job)):
            for first, second in itertools.pairwise(ranks):
                if first.place[1:] == second.place[1:]:
                    for mask, equal in zip(first.masks, equal_masks(first.masks, second.masks), strict=True):
                        assert equal == (not mask.is_attention), mask.shape
                    assert any(mask.is_attention for mask in first.masks)
                    assert any(mask.shape[-1] == HIDDEN for mask in first.masks)


def test_masks_under_sequence_parallelism():
    """Before the cut the embeddings are replicated; between the regions every rank has its own tokens."""
    (ranks,) = passes(Job("gpt2", {"tp": 2}, sequence_parallel=True))
    equal = equal_masks(ranks[0].masks, ranks[1].masks)
    for mask, same in zip(ranks[0].masks, equal, strict=True):
        assert same == (mask.shape == (1, SEQ, HIDDEN)), mask.shape
    shapes = {mask.shape for mask in ranks[0].masks}
    assert shapes == {(1, SEQ, HIDDEN), (1, SEQ // 2, HIDDEN), (1, 2, SEQ, SEQ)}


@pytest.mark.parametrize("own_seeds", [False, True])
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
def test_no_mask_is_used_twice(sizes, own_seeds):
    """Not by two layers, stages, microbatches or replicas, whatever the generators; and at the expected rate."""
    (ranks,) = passes(Job("gpt2", sizes), own_seeds=own_seeds)
    ours = [rank for rank in ranks if rank.place[0] == 0]
    masks = [mask.dropped for rank in ours for mask in rank.masks if not mask.is_attention and alive(mask, rank, sizes)]
    assert len(masks) == (1 + 2 * LAYERS) * 4 * sizes.get("dp", 1)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(masks, 2))
    rate = torch.stack(masks).float().mean().item()
    assert rate == pytest.approx(0.1, abs=0.02)


def alive(mask: Mask, rank: Pass, sizes: dict[str, int]) -> bool:
    """Later stages drop elements of the zeros that stand in for the embedding: that draw counts for nothing."""
    per_microbatch = len(rank.masks) // 4
    position = next(i for i, other in enumerate(rank.masks) if other is mask) % per_microbatch
    return rank.place[1] == 0 or position > 0


CHECKPOINTED = [
    Job(model, sizes, sequence_parallel=sequence_parallel)
    for model in ("gpt2", "gpt_neox", "llama_tied")
    for sizes in ({"tp": 2}, {"pp": 2})
    for sequence_parallel in (False, True)
    if "tp" in sizes or not sequence_parallel
]


def test_recomputation_draws_the_same_masks(subtests):
    """Then loss and gradients are the same numbers with and without checkpointing."""
    twins = [Job(job.model, job.sizes, True, job.sequence_parallel) for job in CHECKPOINTED]
    found = passes(*CHECKPOINTED, *twins)
    for index, job in enumerate(CHECKPOINTED):
        with subtests.test(str(job)):
            for plain, checkpointed in zip(found[index], found[index + len(twins)], strict=True):
                assert not any(mask.in_backward for mask in plain.masks)
                assert any(mask.in_backward for mask in checkpointed.masks)
                assert plain.loss == checkpointed.loss
                assert plain.gradients.keys() == checkpointed.gradients.keys()
                for name, gradient in plain.gradients.items():
                    assert torch.equal(gradient, checkpointed.gradients[name]), name


def test_the_seed_decides(subtests):
    """The same seed gives the same pass; another seed another one."""
    jobs = [Job("gpt2", {"tp": 2}), Job("gpt2", {"pp": 2})]
    first, again, other = (run_ranks(one_pass, 2, jobs, seed) for seed in (5, 5, 6))
    for rank in range(2):
        for index in range(len(jobs)):
            assert first[rank][index].loss == again[rank][index].loss
            assert first[rank][index].loss != other[rank][index].loss
            assert all(equal_masks(first[rank][index].masks, again[rank][index].masks))
            assert not all(equal_masks(first[rank][index].masks, other[rank][index].masks))


# --- the caller's generator -------------------------------------------------------------------------------------------


def state_is_kept(call: Callable[[], Any]) -> bool:
    before = torch.get_rng_state()
    call()
    return torch.equal(before, torch.get_rng_state())


def watch_generator(sizes: dict[str, int]) -> list[bool]:
    """Body of a rank: whether the generator is untouched by passes without dropout, and moves by those with it."""
    batch = make_batch(4, SEQ)
    calm, noisy = Job("gpt2", sizes, dropout=0.0).build(), Job("gpt2", sizes).build()
    found = [
        state_is_kept(lambda: calm(**batch).loss.backward()),
        state_is_kept(lambda: calm.eval()(**batch)),
        state_is_kept(lambda: noisy.eval()(**batch)),
        not state_is_kept(lambda: noisy.train()(**batch)),
    ]
    torch.manual_seed(0)
    noisy(**batch)
    moved = torch.get_rng_state()
    torch.manual_seed(0)
    torch.randint(0, 2**62, ())
    return [*found, torch.equal(moved, torch.get_rng_state())]


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_generator_of_the_caller(sizes):
    """A pass with dropout takes exactly one number from it, on every stage."""
    assert run_ranks(watch_generator, 2, sizes) == [[True] * 5] * 2


# --- other noise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mixtral", "phimoe", "minimax"])
def test_routers_of_all_ranks_see_the_same_jitter(family):
    """Else each rank adds its shards of other experts to the same sum."""
    (loss, gradients), (other_loss, others) = run_ranks(jittered_pass, 2, family, timeout=120.0)
    assert loss == other_loss
    assert len(gradients) >= 4
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_that_no_name_announces_is_the_same_on_all_ranks(checkpointing):
    (losses, gradients, is_left), (other_losses, others, _) = run_ranks(passes_with_noise, 2, checkpointing)
    assert is_left
    assert losses == other_losses
    assert len(set(losses)) == 3
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("family", ["opt", "xglm", "biogpt"])
def test_all_ranks_skip_the_same_blocks(family):
    (losses, gradients), (other_losses, others) = run_ranks(passes_with_layerdrop, 2, family, 0.5, {"tp": 2})
    assert losses == other_losses
    assert len(set(losses)) > 1
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize(
    ("family", "sizes"), [("opt", {"pp": 2}), ("llama", {"tp": 2, "sequence_parallel": True})], ids=str
)
def test_skipped_blocks_are_refused_where_ranks_would_skip_others(family, sizes):
    with pytest.raises(RankError) as caught:
        run_ranks(passes_with_layerdrop, 2, family, 0.1, sizes)
    assert "layerdrop=0.1 skips blocks at random" in caught.value.messages[0]
    run_ranks(passes_with_layerdrop, 2, family, 0.0, sizes)


def test_skipped_blocks_are_refused_where_no_name_announces_them():
    with pytest.raises(RankError) as caught:
        run_ranks(pass_with_skipped_blocks, 2)
    assert any("skipped blocks at the edge of a pipeline stage" in text for text in caught.value.messages.values())


@pytest.mark.parametrize("is_trained", [False, True])
def test_noise_of_forwards_alone_is_the_same_on_all_ranks_and_new_each_time(is_trained):
    drawn, others = run_ranks(noise_of_forwards, 2, is_trained)
    assert len(drawn) == 3
    for ours, theirs in zip(drawn, others, strict=True):
        assert torch.equal(ours, theirs)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(drawn, 2))


def test_replicas_that_use_different_blocks_average_the_same_ones():
    """One message of equal size on both would hold other blocks' gradients without a word."""
    gradients, others = run_ranks(replicas_that_skip, 2)
    assert gradients.keys() == others.keys()
    used = {name.split(".")[2] for name in gradients if ".layers." in name}
    assert used == {"0", "1"}
    alone = dict(run_ranks(replicas_that_skip, 1)[0])
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name
        if ".layers.0." in name:  # half of what the first replica finds, and the other's zeros
            torch.testing.assert_close(gradient, alone[name] / 2)
