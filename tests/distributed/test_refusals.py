"""What cannot be run exactly is refused: on every rank, within seconds, by name, and nothing is changed by it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.cache_utils import DynamicCache

import hf_tpp
from hf_tpp.errors import HfTppError
from tests.parity.models import make_batch, tiny_config, tiny_model
from tests.ranks import run_ranks

TIMEOUT = 40.0
SMALL = {"hidden_size": 24, "num_attention_heads": 4, "vocab_size": 50}

# --- models -----------------------------------------------------------------------------------------------------------


def gpt2(num_layers: int = 2) -> nn.Module:
    return tiny_model("gpt2", num_layers)


def llama() -> nn.Module:
    return tiny_model("llama_gqa", 2)


def llama_of_6_and_3_heads() -> nn.Module:
    sizes = {"num_hidden_layers": 2, "intermediate_size": 20, "head_dim": 4, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"num_attention_heads": 6}, **sizes))


def gpt2_of_one_layer() -> nn.Module:
    return gpt2(1)


def gpt2_without_head() -> nn.Module:
    return GPT2Model(tiny_config("gpt2", 2))


def bert() -> nn.Module:
    return BertModel(BertConfig(**SMALL, num_hidden_layers=2, intermediate_size=20))


def t5() -> nn.Module:
    return T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=20, num_layers=2, num_heads=4))


def no_transformer() -> nn.Module:
    return nn.Linear(2, 2)


def llama_with_larger_head() -> nn.Module:
    model = llama()
    model.lm_head = nn.Linear(32, 140, bias=False)
    return model


class QuantizedLinear(nn.Linear):
    """Stands for a linear whose weight is not what it seems."""


def llama_with_quantized_linear() -> nn.Module:
    model = llama()
    model.model.layers[1].mlp.up_proj = QuantizedLinear(32, 44, bias=False)
    return model


def llama_with_max_norm() -> nn.Module:
    model = llama()
    model.model.embed_tokens.max_norm = 1.0
    return model


# --- parallelize ------------------------------------------------------------------------------------------------------


@dataclass
class Refusal:
    """One call of parallelize() that must fail. `fix` are arguments that the message suggests, and that must work."""

    name: str
    build: Callable[[], nn.Module]
    arguments: dict[str, Any]
    error: str
    words: Sequence[str]
    world_size: int = 2
    fix: dict[str, Any] | None = field(default_factory=lambda: {"tp": 2})


def configuration(name: str, arguments: dict[str, Any], *words: str, **more: Any) -> Refusal:
    return Refusal(name, more.pop("build", gpt2), arguments, "ConfigurationError", words, **more)


def unsupported(build: Callable[[], nn.Module], *words: str, **more: Any) -> Refusal:
    return Refusal(build.__name__, build, {"tp": 2}, "UnsupportedModelError", words, **{"fix": None} | more)


REFUSALS = [
    configuration("world", {"tp": 3}, "tp=3 x pp=1 = 3", "world of 2", "product divides 2"),
    configuration("world_of_both", {"tp": 2, "pp": 2}, "tp=2 x pp=2 = 4", "world of 2", fix={"pp": 2}),
    configuration("heads", {"tp": 3}, "4 attention heads", "tp=2 or tp=4", world_size=3, fix=None),
    configuration(
        "kv_heads",
        {"tp": 2},
        "6 attention heads with 3 key/value heads",
        "tp=1 or tp=3",
        build=llama_of_6_and_3_heads,
        fix={"pp": 2},
    ),
    configuration(
        "kv_heads_of_six",
        {"tp": 2, "pp": 3},
        "tp=1 or tp=3",
        build=llama_of_6_and_3_heads,
        world_size=6,
        fix={"tp": 3, "pp": 2},
    ),
    configuration("layers", {"pp": 2}, "pp=2 is more than the model's 1 layers", "pp <= 1", build=gpt2_of_one_layer),
    configuration("tp_zero", {"tp": 0}, "tp=0 is not a positive whole number"),
    configuration("tp_text", {"tp": "2"}, "tp='2' is not a positive whole number"),
    configuration("tp_true", {"tp": True}, "tp=True is not a positive whole number"),
    configuration("pp_negative", {"pp": -2}, "pp=-2 is not a positive whole number"),
    configuration("microbatches_zero", {"pp": 2, "num_microbatches": 0}, "num_microbatches=0", fix={"pp": 2}),
    configuration("microbatches_half", {"pp": 2, "num_microbatches": 1.5}, "num_microbatches=1.5", fix={"pp": 2}),
    configuration("stages_count", {"pp": 2, "stages": [2]}, "got 1 counts (2,) for pp=2", fix={"pp": 2}),
    configuration("stages_sum", {"pp": 2, "stages": [1, 2]}, "adds up to 3", "remove 1", fix={"pp": 2}),
    configuration("stages_empty", {"pp": 2, "stages": [2, 0]}, "at least one whole layer", fix={"pp": 2}),
    configuration("checkpoint", {"tp": 2, "checkpoint": "somewhere"}, "loaded already", "leave checkpoint out"),
    unsupported(bert, "BertModel"),
    unsupported(t5, "T5ForConditionalGeneration"),
    unsupported(gpt2_without_head, "GPT2Model"),
    unsupported(no_transformer, "Linear is not a transformers model"),
    unsupported(llama_with_larger_head, "140 tokens", "131", "resize"),
    unsupported(llama_with_quantized_linear, "model.layers.1.mlp.up_proj", "QuantizedLinear", "before it is quantized"),
    unsupported(llama_with_max_norm, "max_norm", fix={"pp": 2}),
]


def failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Name and message of what a function raises; the package's own errors and autograd's only."""
    try:
        function(*args, **kwargs)
    except (HfTppError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""


def snapshot(model: nn.Module) -> Any:
    parameters = {name: (id(p), p.device.type, p.requires_grad) for name, p in model.named_parameters()}
    modules = {name: (id(module), type(module).__name__) for name, module in model.named_modules()}
    return type(model).__name__, type(model).__module__, parameters, modules, list(model.state_dict())


def loss_of(model: nn.Module) -> float:
    vocab_size = model.config.vocab_size
    return model.eval()(**make_batch(4, 8, vocab_size=vocab_size), use_cache=False).loss.item()


def refuse_to_parallelize(refusals: Sequence[Refusal]) -> list[dict[str, Any]]:
    """Body of a rank."""
    found = []
    for refusal in refusals:
        torch.manual_seed(0)
        model = refusal.build()
        before = snapshot(model)
        expected = loss_of(model) if refusal.fix else 0.0
        result = {"failure": failure(hf_tpp.parallelize, model, verbose=False, **refusal.arguments)}
        result["unchanged"] = snapshot(model) == before
        if refusal.fix:
            result["fixed"] = loss_of(hf_tpp.parallelize(model, verbose=False, **refusal.fix)), expected
        found.append(result)
    return found


@pytest.mark.parametrize("world_size", sorted({refusal.world_size for refusal in REFUSALS}))
def test_parallelize_refuses(world_size, subtests):
    refusals = [refusal for refusal in REFUSALS if refusal.world_size == world_size]
    ranks = run_ranks(refuse_to_parallelize, world_size, refusals, timeout=TIMEOUT + 2 * len(refusals))
    for index, refusal in enumerate(refusals):
        with subtests.test(refusal.name):
            for rank in ranks:
                error, message = rank[index]["failure"]
                assert error == refusal.error, message
                for word in refusal.words:
                    assert word in message
                assert rank[index]["unchanged"]
                if refusal.fix:
                    found, expected = rank[index]["fixed"]
                    assert found == pytest.approx(expected, rel=1e-5)


def parallelize_twice() -> Any:
    """Body of a rank."""
    model = hf_tpp.parallelize(gpt2(), tp=2, verbose=False)
    before, loss = snapshot(model), loss_of(model)
    first = failure(hf_tpp.parallelize, model, tp=2, verbose=False)
    second = failure(hf_tpp.parallelize, model, tp=1, pp=2, verbose=False)
    return first, second, snapshot(model) == before, loss_of(model) == loss


def test_parallelize_twice():
    for *failures, unchanged, same_loss in run_ranks(parallelize_twice, 2, timeout=TIMEOUT):
        for error, message in failures:
            assert error == "AlreadyParallelError"
            assert "GPT2LMHeadModel is parallel already: call parallelize() once" in message
        assert unchanged
        assert same_loss


# --- ranks that differ ------------------------------------------------------------------------------------------------


def another_seed() -> nn.Module:
    model = gpt2()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def one_weight_off() -> nn.Module:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.view(-1)[-1] += 1.0
    return model


def one_frozen() -> nn.Module:
    model = gpt2()
    model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    return model


def half_precision() -> nn.Module:
    return gpt2().bfloat16()


def already_parallel() -> nn.Module:
    return hf_tpp.parallelize(gpt2(), tp=2, verbose=False)


Ours = tuple[Callable[[], nn.Module], dict[str, Any]]
MISMATCHES: dict[str, tuple[Ours, Ours, str, Sequence[str]]] = {
    "sizes": ((gpt2, {"tp": 2}), (gpt2, {"pp": 2}), "RankMismatchError", ("tp: rank 0 has 2, rank 1 has 1", "pp: ")),
    "num_microbatches": (
        (gpt2, {"pp": 2, "num_microbatches": 2}),
        (gpt2, {"pp": 2, "num_microbatches": 4}),
        "RankMismatchError",
        ("num_microbatches: rank 0 has 2, rank 1 has 4",),
    ),
    "stages": (
        (lambda: gpt2(3), {"pp": 2, "stages": [1, 2]}),
        (lambda: gpt2(3), {"pp": 2, "stages": [2, 1]}),
        "RankMismatchError",
        ("stages: rank 0 has (1, 2), rank 1 has (2, 1)",),
    ),
    "sequence_parallel": (
        (gpt2, {"tp": 2, "sequence_parallel": True}),
        (gpt2, {"tp": 2}),
        "RankMismatchError",
        ("sequence_parallel: rank 0 has True, rank 1 has False",),
    ),
    "eval_logits": (
        (gpt2, {"pp": 2, "eval_logits": False}),
        (gpt2, {"pp": 2}),
        "RankMismatchError",
        ("eval_logits: rank 0 has False, rank 1 has True",),
    ),
    "weights": ((gpt2, {"tp": 2}), (another_seed, {"tp": 2}), "RankMismatchError", ("weights: rank 0 has",)),
    "one_weight": ((gpt2, {"tp": 2}), (one_weight_off, {"tp": 2}), "RankMismatchError", ("weights: rank 0 has",)),
    "frozen": ((gpt2, {"tp": 2}), (one_frozen, {"tp": 2}), "RankMismatchError", ("weights: rank 0 has",)),
    "dtype": ((gpt2, {"tp": 2}), (half_precision, {"tp": 2}), "RankMismatchError", ("weights: rank 0 has",)),
    "class": (
        (gpt2, {"pp": 2}),
        (llama, {"pp": 2}),
        "RankMismatchError",
        ("model: rank 0 has 'GPT2LMHeadModel', rank 1 has 'LlamaForCausalLM'",),
    ),
    "one_rank_refuses": (
        (gpt2, {"pp": 2}),
        (gpt2, {"pp": 2, "num_microbatches": 0}),
        "ConfigurationError",
        ("num_microbatches=0",),
    ),
    "one_unknown_model": ((gpt2, {"tp": 2}), (bert, {"tp": 2}), "UnsupportedModelError", ("BertModel",)),
}


def mismatch(names: Sequence[str]) -> list[Any]:
    """Body of a rank."""
    found = []
    for name in names:
        build, arguments = MISMATCHES[name][dist.get_rank()]
        model = build()
        before = snapshot(model)
        result = failure(hf_tpp.parallelize, model, verbose=False, **arguments)
        found.append((result, snapshot(model) == before))
    found.append(loss_of(hf_tpp.parallelize(gpt2(), pp=2, verbose=False)))
    return found


def test_ranks_must_agree_on_the_model(subtests):
    ranks = run_ranks(mismatch, 2, list(MISMATCHES), timeout=TIMEOUT)
    for index, (name, (_, _, error, words)) in enumerate(MISMATCHES.items()):
        with subtests.test(name):
            for rank in ranks:
                (found, message), unchanged = rank[index]
                assert found == error, message
                for word in words:
                    assert word in message
                assert unchanged
    expected = loss_of(gpt2())
    assert [rank[-1] for rank in ranks] == pytest.approx([expected] * 2, rel=1e-5)


# --- calls ------------------------------------------------------------------------------------------------------------

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
