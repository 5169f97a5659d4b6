"""Evaluation: logits, losses and generated tokens equal the plain model's, on every rank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import hf_tpp
from tests.parity.models import VOCABULARY, make_batch, tiny_model
from tests.ranks import run_ranks

MODELS = ("gpt2", "gpt_neox", "llama_gqa")
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]
Model = Any

# --- what is compared -------------------------------------------------------------------------------------------------


def prompts(rows: int, seq: int = 7, padding: bool = False) -> dict[str, torch.Tensor]:
    """Token ids, with padding on the left if asked for."""
    input_ids = torch.randint(3, VOCABULARY, (rows, seq), generator=torch.Generator().manual_seed(11))
    attention_mask = torch.ones_like(input_ids)
    if padding:
        for row in range(1, rows):
            attention_mask[row, :row] = 0
    return {"input_ids": input_ids.where(attention_mask.bool(), 0), "attention_mask": attention_mask}


def greedy(model: Model) -> torch.Tensor:
    return model.generate(**prompts(1), max_new_tokens=6, do_sample=False)


def greedy_without_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2), max_new_tokens=4, do_sample=False, use_cache=False)


def greedy_with_padding(model: Model) -> torch.Tensor:
    return model.generate(**prompts(4, padding=True), max_new_tokens=5, do_sample=False)


def greedy_with_padding_without_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(3, padding=True), max_new_tokens=4, do_sample=False, use_cache=False)


def sampling(model: Model) -> torch.Tensor:
    torch.manual_seed(21)
    return model.generate(**prompts(3, padding=True), max_new_tokens=5, do_sample=True, top_k=0, temperature=1.5)


def sampling_twice(model: Model) -> torch.Tensor:
    """The generator goes on after the first call as it does for the plain model."""
    torch.manual_seed(22)
    options = {"max_new_tokens": 4, "do_sample": True, "num_return_sequences": 2}
    return torch.cat([model.generate(**prompts(1), **options) for _ in range(2)])


def beams(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2, padding=True), max_new_tokens=4, do_sample=False, num_beams=3)


def static_cache(model: Model) -> torch.Tensor:
    return model.generate(**prompts(2), max_new_tokens=3, do_sample=False, cache_implementation="static")


def batch_logits(model: Model) -> torch.Tensor:
    return model(**make_batch(5, 9, seed=3)).logits


def batch_logits_alone(model: Model) -> torch.Tensor:
    return model(input_ids=make_batch(3, 9, seed=3)["input_ids"]).logits


def batch_loss(model: Model) -> torch.Tensor:
    return model(**make_batch(5, 9, seed=3)).loss


def batch_as_tuple(model: Model) -> torch.Tensor:
    loss, logits, *_ = model(**make_batch(3, 9, seed=3), return_dict=False)
    return logits * loss


def last_logits(model: Model) -> torch.Tensor:
    return model(**prompts(3), logits_to_keep=2).logits


def logits_of_embeddings(model: Model) -> torch.Tensor:
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(12))
    return model(inputs_embeds=embeds).logits


def logits_in_training_mode(model: Model) -> torch.Tensor:
    with torch.no_grad():
        logits = model.train()(**make_batch(3, 9)).logits
    model.eval()
    return logits


def continued_cache(model: Model) -> torch.Tensor:
    """Three pieces of a text, each after the cache of those before."""
    batch = prompts(3, seq=9)["input_ids"]
    cache, pieces = None, []
    for start, stop in ((0, 5), (5, 6), (6, 9)):
        output = model(input_ids=batch[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        assert cache.get_seq_length() == stop
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)


def cache_with_padding(model: Model) -> torch.Tensor:
    batch = prompts(3, seq=9, padding=True)
    cache, pieces = None, []
    for start, stop in ((0, 6), (6, 9)):
        output = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, dim=1)[batch["attention_mask"].bool()]


CHECKS: list[Callable[[Model], torch.Tensor]] = [
    greedy,
    greedy_without_cache,
    greedy_with_padding,
    greedy_with_padding_without_cache,
    sampling,
    sampling_twice,
    beams,
    static_cache,
    batch_logits,
    batch_logits_alone,
    batch_loss,
    batch_as_tuple,
    last_logits,
    logits_of_embeddings,
    logits_in_training_mode,
    continued_cache,
    cache_with_padding,
]


def evaluated(model: Model) -> list[torch.Tensor]:
    return [check(model).detach() for check in CHECKS]


def build(name: str) -> nn.Module:
    model = tiny_model(name, 3).eval()
    with torch.no_grad():  # blocks that change much, so that texts do not repeat one token
        for parameter in model.get_decoder().parameters():
            if parameter.dim() > 1 and parameter is not model.get_input_embeddings().weight:
                parameter.mul_(5)
    return model


def evaluate_all(sizes: dict[str, int]) -> dict[str, list[torch.Tensor]]:
    """Body of a rank."""
    return {name: evaluated(hf_tpp.parallelize(build(name), verbose=False, **sizes)) for name in MODELS}


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_equal_to_the_plain_model(sizes, subtests):
    ranks = run_ranks(evaluate_all, sizes.get("tp", 1) * sizes.get("pp", 1), sizes, timeout=120.0)
    for name in MODELS:
        for index, (check, expected) in enumerate(zip(CHECKS, evaluated(build(name)), strict=True)):
            with subtests.test(f"{name}: {check.__name__}"):
                for rank in ranks:
                    torch.testing.assert_close(rank[name][index], expected, rtol=1e-5, atol=1e-5)


def test_the_texts_are_worth_comparing():
    """Different checks of one model give different tokens, and sampling is not greedy."""
    for name in MODELS:
        model = build(name)
        assert len(greedy(model)[0, 7:].unique()) > 2
        sampled = sampling(model)
        greedily = greedy_with_padding(model)[:3]
        assert not torch.equal(sampled, greedily[:, : sampled.shape[1]])


def sample_with_own_seeds() -> tuple[torch.Tensor, torch.Tensor]:
    """Body of a rank: every rank comes with a generator of its own."""
    model = hf_tpp.parallelize(build("gpt2"), tp=2, pp=2, verbose=False)
    torch.manual_seed(100 + dist.get_rank())
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "temperature": 3.0}
    return model.generate(**prompts(2), **options), model.generate(**prompts(2), **options)


def test_sampling_with_different_seeds_gives_one_text():
    texts = run_ranks(sample_with_own_seeds, 4)
    plain = build("gpt2")
    torch.manual_seed(100)
    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "temperature": 3.0}
    expected = [plain.generate(**prompts(2), **options) for _ in range(2)]
    assert not torch.equal(*expected)
    for first, second in texts:
        assert torch.equal(first, expected[0])
        assert torch.equal(second, expected[1])


def generate_per_replica() -> torch.Tensor:
    """Body of a rank: the replicas get different prompts, and are not even called equally often."""
    model = hf_tpp.parallelize(build("llama_gqa"), tp=2, verbose=False)
    batch = prompts(2)["input_ids"]
    replica = dist.get_rank() // 2
    if replica:
        model(input_ids=batch)
    return model.generate(batch[replica : replica + 1], max_new_tokens=5, do_sample=False)


def test_replicas_generate_on_their_own():
    model = build("llama_gqa")
    batch = prompts(2)["input_ids"]
    expected = [model.generate(batch[i : i + 1], max_new_tokens=5, do_sample=False) for i in (0, 0, 1, 1)]
    for found, tokens in zip(run_ranks(generate_per_replica, 4), expected, strict=True):
        assert torch.equal(found, tokens)


def evaluate_without_logits() -> list[Any]:
    """Body of a rank."""
    model = hf_tpp.parallelize(build("gpt2"), pp=2, eval_logits=False, verbose=False)
    batch = make_batch(3, 9)
    output = model(**batch)
    alone = model(input_ids=batch["input_ids"])
    lists = model(input_ids=[batch["input_ids"], batch["input_ids"][:1, :4]])
    return [output.loss, output.logits, alone.logits, lists.logits]


def test_eval_logits():
    """Off, there are none beside a loss; but whoever gives no labels has nothing else to ask for."""
    batch = make_batch(3, 9)
    plain = build("gpt2")
    for loss, none, logits, pieces in run_ranks(evaluate_without_logits, 2):
        torch.testing.assert_close(loss, plain(**batch).loss)
        assert none is None
        torch.testing.assert_close(logits, plain(input_ids=batch["input_ids"]).logits)
        assert [list(piece.shape) for piece in pieces] == [[3, 9, VOCABULARY], [1, 4, VOCABULARY]]
