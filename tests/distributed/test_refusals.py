"""Models and configurations that cannot be run exactly are refused: on every rank, within seconds, by name, and nothing
is changed by it."""

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

import hf_tpp
from tests.distributed.refusing import TIMEOUT, failure, gpt2
from tests.parity.models import make_batch, tiny_config, tiny_model
from tests.ranks import run_ranks

SMALL = {"hidden_size": 24, "num_attention_heads": 4, "vocab_size": 50}

# --- models -----------------------------------------------------------------------------------------------------------


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
