"""Calls of a parallel model that cannot be run exactly are refused on every rank; the next call is none the worse."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers.cache_utils import DynamicCache

import hf_tpp
from tests.distributed.refusing import TIMEOUT, failure, gpt2
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks

BATCH = make_batch(4, 8, seed=1)
OTHER = make_batch(4, 8, seed=2)
Model = nn.Module


def call(model: Model, **batch: Any) -> Any:
    model.train()
    return model(**batch)


def cache_in_training(model: Model, rank: int) -> None:
    call(model, **BATCH, past_key_values=DynamicCache(config=model.config))


def logits_beside_the_loss(model: Model, rank: int) -> None:
    assert call(model, **BATCH).logits is not None


def logits_beside_the_loss_by_key(model: Model, rank: int) -> None:
    assert call(model, **BATCH).get("logits") is not None


def retained_graph(model: Model, rank: int) -> None:
    logits = call(model, input_ids=BATCH["input_ids"]).logits
    logits.sum().backward(retain_graph=True)
    model.zero_grad()
    logits.mean().backward()


def other_order_of_backwards(model: Model, rank: int) -> None:
    losses = [call(model, input_ids=batch["input_ids"]).logits.sum() for batch in (BATCH, OTHER)]
    losses[rank].backward()


def different_losses(model: Model, rank: int) -> None:
    (call(model, input_ids=BATCH["input_ids"]).logits.sum() * (1 + rank)).backward()


def reentrant_checkpointing(model: Model, rank: int) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        call(model, **BATCH)
    finally:
        model.gradient_checkpointing_disable()


def hidden_states(model: Model, rank: int) -> None:
    call(model, **BATCH, output_hidden_states=True)


def hidden_states_in_evaluation(model: Model, rank: int) -> None:
    model.eval()(**BATCH, output_hidden_states=True)


def attentions_by_config(model: Model, rank: int) -> None:
    model.config.output_hidden_states = True
    try:
        model.eval()(**BATCH)
    finally:
        model.config.output_hidden_states = False


def backward_twice(model: Model, rank: int) -> None:
    loss = call(model, **BATCH).loss
    loss.backward()
    model.zero_grad()
    loss.backward()


def no_rows(model: Model, rank: int) -> None:
    call(model, **{name: value[:0] for name, value in BATCH.items()})


def no_rows_on_one_rank(model: Model, rank: int) -> None:
    call(model, **{name: value[: 4 * rank] for name, value in BATCH.items()})


def no_microbatches(model: Model, rank: int) -> None:
    call(model, **{name: [] for name in BATCH})


def no_microbatches_on_one_rank(model: Model, rank: int) -> None:
    call(model, **{name: [value] * rank for name, value in BATCH.items()})


def microbatch_without_rows(model: Model, rank: int) -> None:
    call(model, **{name: [value, value[:0]] for name, value in BATCH.items()})


def lists_of_different_lengths(model: Model, rank: int) -> None:
    call(model, input_ids=[BATCH["input_ids"]], labels=[BATCH["labels"], BATCH["labels"]])


def list_beside_tensor(model: Model, rank: int) -> None:
    call(model, input_ids=[BATCH["input_ids"]], labels=BATCH["labels"])


def no_tokens(model: Model, rank: int) -> None:
    call(model, labels=BATCH["labels"])


def one_dimension(model: Model, rank: int) -> None:
    call(model, input_ids=BATCH["input_ids"][0], labels=BATCH["labels"][0])


def embeds_with_gradient(model: Model, rank: int) -> None:
    call(model, inputs_embeds=torch.zeros(4, 8, 32, requires_grad=True), labels=BATCH["labels"])


def different_values(model: Model, rank: int) -> None:
    call(model, **(OTHER if rank else BATCH))


def different_values_in_evaluation(model: Model, rank: int) -> None:
    model.eval()(**(OTHER if rank else BATCH))


def different_labels(model: Model, rank: int) -> None:
    call(model, **{**BATCH, "labels": BATCH["labels"].where(torch.tensor(rank == 0), -100)})


def different_token_counts(model: Model, rank: int) -> None:
    call(model, **BATCH, num_items_in_batch=20 + rank)


def different_rows(model: Model, rank: int) -> None:
    call(model, **{name: value[: 4 - rank] for name, value in BATCH.items()})


def different_lengths(model: Model, rank: int) -> None:
    call(model, **{name: value[:, : 8 - 2 * rank] for name, value in BATCH.items()})


def one_without_labels(model: Model, rank: int) -> None:
    call(model, **{name: value for name, value in BATCH.items() if rank == 0 or name != "labels"})


def one_without_labels_in_evaluation(model: Model, rank: int) -> None:
    model.eval()(**{name: value for name, value in BATCH.items() if rank == 0 or name != "labels"})


def one_without_mask(model: Model, rank: int) -> None:
    call(model, **{name: value for name, value in BATCH.items() if rank == 0 or name != "attention_mask"})


def one_in_evaluation(model: Model, rank: int) -> None:
    model.train(rank == 0)
    model(**BATCH)


def one_without_gradients(model: Model, rank: int) -> None:
    model.train()
    with torch.set_grad_enabled(rank == 0):
        model(**BATCH)


def different_prompts(model: Model, rank: int) -> None:
    prompts = (OTHER if rank else BATCH)["input_ids"]
    model.eval().generate(prompts, attention_mask=BATCH["attention_mask"], max_new_tokens=2, do_sample=False)


def different_prompt_lengths(model: Model, rank: int) -> None:
    model.eval().generate(BATCH["input_ids"][:, : 8 - rank], max_new_tokens=2, do_sample=False)


def different_generation_options(model: Model, rank: int) -> None:
    model.eval().generate(BATCH["input_ids"], max_new_tokens=2 + rank, do_sample=False)


BAD_CALLS: dict[Callable[[Model, int], None], tuple[str, Sequence[str]]] = {
    cache_in_training: ("BatchError", ("past_key_values", "model.eval()")),
    logits_beside_the_loss: ("BatchError", ("train_logits=True", "leave labels out")),
    logits_beside_the_loss_by_key: ("BatchError", ("train_logits=True",)),
    retained_graph: ("BatchError", ("retain_graph=True", "add the losses up")),
    other_order_of_backwards: ("RankMismatchError", ("different calls of the model", "same order")),
    different_losses: ("RankMismatchError", ("different losses from the same logits", "one seed")),
    reentrant_checkpointing: ("BatchError", ("'use_reentrant': False",)),
    hidden_states: ("BatchError", ("output_hidden_states=True",)),
    hidden_states_in_evaluation: ("BatchError", ("output_hidden_states=True",)),
    attentions_by_config: ("BatchError", ("output_hidden_states=True",)),
    backward_twice: ("RuntimeError", ("released before", "call the model again")),
    no_rows: ("BatchError", ("no rows", "drop_last")),
    no_rows_on_one_rank: ("BatchError", ("no rows",)),
    no_microbatches: ("BatchError", ("no rows",)),
    no_microbatches_on_one_rank: ("BatchError", ("no rows",)),
    microbatch_without_rows: ("BatchError", ("no rows",)),
    lists_of_different_lengths: ("BatchError", ("labels is a list of 2 microbatches, the tokens are 1",)),
    list_beside_tensor: ("BatchError", ("labels is one tensor", "give a list")),
    no_tokens: ("BatchError", ("neither input_ids nor inputs_embeds",)),
    one_dimension: ("BatchError", ("input_ids has the shape [8]: give [rows, seq]",)),
    embeds_with_gradient: ("BatchError", ("detach()",)),
    different_values: ("RankMismatchError", ("batch: rank 0 has",)),
    different_values_in_evaluation: ("RankMismatchError", ("batch: rank 0 has",)),
    different_labels: ("RankMismatchError", ("batch: rank 0 has",)),
    different_token_counts: ("RankMismatchError", ("'num_items_in_batch': 20", "'num_items_in_batch': 21")),
    different_rows: ("RankMismatchError", ("[4, 8]", "[3, 8]")),
    different_lengths: ("RankMismatchError", ("[4, 8]", "[4, 6]")),
    one_without_labels: ("RankMismatchError", ("labels",)),
    one_without_labels_in_evaluation: ("RankMismatchError", ("labels",)),
    one_without_mask: ("RankMismatchError", ("attention_mask",)),
    one_in_evaluation: ("RankMismatchError", ("call: rank 0 has 'training', rank 1 has 'evaluation'",)),
    one_without_gradients: ("RankMismatchError", ("call: rank 0 has 'training', rank 1 has 'evaluation'",)),
    different_prompts: ("RankMismatchError", ("prompts: rank 0 has",)),
    different_prompt_lengths: ("RankMismatchError", ("prompts: rank 0 has",)),
    different_generation_options: ("RankMismatchError", ("{'max_new_tokens': 2", "{'max_new_tokens': 3")),
}
HANGING_IF_WRONG = (
    no_microbatches_on_one_rank,
    one_in_evaluation,
    one_without_gradients,
    different_generation_options,
)


def train_once(model: Model) -> tuple[float, float]:
    model.train().zero_grad()
    loss = model(**BATCH).loss
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    model.zero_grad()
    return loss.item(), float(norm)


def refuse_calls(sizes: dict[str, int], calls: Sequence[Callable[[Model, int], None]]) -> list[Any]:
    """Body of a rank: what each call raises, and a good call after each."""
    model = hf_tpp.parallelize(tiny_model("gpt2", 3), verbose=False, **sizes)
    return [(failure(bad, model, dist.get_rank()), train_once(model)) for bad in calls]


def check_refused_calls(sizes, calls, subtests):
    ranks = run_ranks(refuse_calls, 2, sizes, list(calls), timeout=TIMEOUT)
    expected = train_once(tiny_model("gpt2", 3))
    for index, bad in enumerate(calls):
        error, words = BAD_CALLS[bad]
        with subtests.test(bad.__name__):
            for rank in ranks:
                (found, message), after = rank[index]
                assert found == error, message
                for word in words:
                    assert word in message
                assert after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_calls_are_refused(sizes, subtests):
    check_refused_calls(sizes, [bad for bad in BAD_CALLS if bad not in HANGING_IF_WRONG], subtests)


@pytest.mark.parametrize("bad", HANGING_IF_WRONG)
@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_ranks_that_do_different_things_are_stopped(sizes, bad, subtests):
    check_refused_calls(sizes, [bad], subtests)


def odd_sequence() -> Any:
    """Body of a rank."""
    model = hf_tpp.parallelize(gpt2(), tp=2, sequence_parallel=True, verbose=False).train()
    odd = {name: value[:, :7] for name, value in BATCH.items()}
    refused = failure(model, **odd)
    padded = {name: nn.functional.pad(value, (0, 1), value=-100 * (name == "labels")) for name, value in odd.items()}
    return refused, model(**padded).loss.item(), model.eval()(**odd).loss.item()


def test_sequence_parallelism_needs_divisible_sequences():
    """Padding is the suggested fix; evaluation does not cut the sequence and takes any length."""
    expected = gpt2().eval()(**{name: value[:, :7] for name, value in BATCH.items()}).loss.item()
    for (error, message), *losses in run_ranks(odd_sequence, 2, timeout=TIMEOUT):
        assert error == "BatchError"
        assert "divisible by tp=2, got 7: pad the batch (pad_to_multiple_of=2) or use" in message
        assert losses == pytest.approx([expected] * 2, rel=1e-5)


def one_replica_is_wrong(bad: Callable[[Model, int], None], wrong_rank: int) -> Any:
    """Body of a rank: of two replicas with two stages each, one rank does something else."""
    model = hf_tpp.parallelize(gpt2(), pp=2, verbose=False)
    refused = failure(bad, model, int(dist.get_rank() == wrong_rank))
    return refused, call(model, **BATCH).loss.item()


@pytest.mark.parametrize("bad", [different_values, different_rows, one_without_labels, one_in_evaluation])
def test_all_replicas_stop_if_one_is_wrong(bad):
    expected = call(gpt2(), **BATCH).loss.item()
    for (error, message), loss in run_ranks(one_replica_is_wrong, 4, bad, 3, timeout=TIMEOUT):
        assert error in ("RankMismatchError", "BatchError"), message
        assert error == BAD_CALLS[bad][0], message
        assert loss == pytest.approx(expected, rel=1e-5)


def replicas_may_differ() -> float:
    """Body of a rank: other rows, another length and another number of microbatches on the second replica."""
    model = hf_tpp.parallelize(gpt2(), pp=2, verbose=False)
    batch = make_batch(2, 12, seed=5) if dist.get_rank() >= 2 else BATCH
    return call(model, **batch).loss.item()


def test_replicas_may_have_batches_of_different_shapes():
    model = gpt2()
    batches = [BATCH, make_batch(2, 12, seed=5)]
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    expected = sum(model(**batch, num_items_in_batch=tokens).loss.item() for batch in batches)
    assert run_ranks(replicas_may_differ, 4, timeout=TIMEOUT) == pytest.approx([expected] * 4, rel=1e-5)
