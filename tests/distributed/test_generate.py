"""Evaluation: logits, losses and generated tokens equal the plain model's, on every rank."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.stopping_criteria import MaxTimeCriteria

import hf_tpp
from hf_tpp.errors import HfTppError, UnsupportedModelError
from tests.parity.decoding import STRATEGIES, Strategy, build, greedy, greedy_with_padding, prompts, sampling
from tests.parity.models import VOCABULARY, make_batch
from tests.ranks import run_ranks

MODELS = ("gpt2", "gpt_neox", "llama_gqa")
LAYOUTS = [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}]
Model = Any

# --- what is compared -------------------------------------------------------------------------------------------------


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


CHECKS: list[Strategy] = [
    *STRATEGIES,
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


def refused_options() -> dict[str, tuple[dict[str, Any], str]]:
    """What does not give the plain model's tokens on every rank: a name, options, and what the refusal says."""
    deadline = MaxTimeCriteria(max_time=5.0)
    return {
        "max_time": ({"max_time": 5.0}, "generate(max_time=5.0) with a parallel model: ranks reach it at different"),
        "MaxTimeCriteria": ({"stopping_criteria": [deadline]}, "a MaxTimeCriteria with a parallel model"),
        "configured": ({"generation_config": GenerationConfig(max_time=5.0)}, "use max_new_tokens"),
        "early exit": ({"assistant_early_exit": 1}, "assistant_early_exit=1"),
        "mtp": ({"use_mtp": True}, "use_mtp=True"),
        "dflash": ({"speculation_type": "dflash"}, "speculation_type='dflash'"),
        "compilation": ({"compile_config": CompileConfig()}, "which cannot be compiled: leave it out"),
        "quantized": ({"cache_implementation": "quantized"}, "rounds its own heads alone"),
        "paged": ({"cache_implementation": "paged"}, "continuous batching calls the layers by itself"),
        "from the hub": ({"custom_generate": "somebody/something"}, "code from the hub"),
        "groups of beams": ({"num_beams": 4, "num_beam_groups": 2, "trust_remote_code": True}, "group beam search"),
        "contrastive": ({"penalty_alpha": 0.6, "top_k": 4, "trust_remote_code": True}, "contrastive"),
        "hidden states": ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states=True"),
        "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions=True"),
    }


def refuse(sizes: dict[str, int]) -> tuple[dict[str, str], torch.Tensor]:
    """Body of a rank: what is said to each of them, and a text after all of them."""
    model = hf_tpp.parallelize(build("llama_gqa"), verbose=False, **sizes)
    said = {}
    for name, (options, _) in refused_options().items():
        with pytest.raises(HfTppError) as caught:
            model.generate(**prompts(1), max_new_tokens=2, **options)
        said[name] = str(caught.value)
    for method in (model.generate_batch, model.init_continuous_batching):
        with pytest.raises(UnsupportedModelError, match=r"use generate\(\)"):
            method([[1, 2]])
    return said, greedy(model)


@pytest.mark.parametrize("sizes", LAYOUTS[:2], ids=str)
def test_what_cannot_be_exact_is_refused_by_name(sizes):
    expected = greedy(build("llama_gqa"))
    for said, tokens in run_ranks(refuse, 2, sizes, timeout=120.0):
        for name, (_, pattern) in refused_options().items():
            assert pattern in said[name]
        assert torch.equal(tokens, expected)


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 4, "num_beam_groups": 2}, {"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}],
    ids=lambda options: next(reversed(options)),
)
def test_strategies_that_left_transformers(options):
    """Without trust_remote_code, transformers itself says so, before the model is called."""
    with pytest.raises(ValueError, match="requires `trust_remote_code=True`"):
        build("llama_gqa").generate(**prompts(1), max_new_tokens=2, **options)
