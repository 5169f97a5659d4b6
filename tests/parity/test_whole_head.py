"""A head that is not cut, over a vocabulary for which its products are aligned: the padding is seen by nobody."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hf_tpp
from hf_tpp.parallel_model import parallel_state
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.whole_head import AlignedHead
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks

VOCABULARY, ALIGNED = 4099, 4160


def loss_of_logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that is computed outside of the model."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.logsumexp(-1).square().mean()


def everything(name: str, folder: Path, vocab_size: int, align: bool) -> dict[str, Any]:
    """Body of a rank: what becomes of the head, and what a caller sees."""
    model = hf_tpp.parallelize(
        tiny_model(name, 2, vocab_size=vocab_size),
        pp=2,
        align_vocabulary=align,
        train_logits=True,
        num_microbatches=2,
        verbose=False,
    )
    widths: list[int] = []
    model.lm_head.register_forward_hook(lambda _, args, output: widths.append(output.shape[-1]))
    batch = make_batch(4, 8, vocab_size=vocab_size)
    trained = model.train()(**batch).logits
    loss_of_logits(model, batch).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and "hf_tpp" not in name}
    model.save_pretrained(folder)
    model.eval()
    return {
        "logits of training": trained,
        "gradients": gradients,
        "is last": parallel_state(model).mesh.pp.is_last,
        "head": type(model.lm_head),
        "loss": type(model.loss_function),
        "widths": widths,
        "logits": model(**batch).logits,
        "tokens": model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0),
    }


@pytest.mark.parametrize(
    ("name", "vocab_size", "align", "head", "width"),
    [
        ("gpt2", VOCABULARY, True, AlignedHead, ALIGNED),
        ("llama_gqa", VOCABULARY, True, AlignedHead, ALIGNED),
        ("gpt2", VOCABULARY, False, nn.Linear, VOCABULARY),
        ("gpt2", ALIGNED, True, nn.Linear, ALIGNED),
        ("gpt2", 131, True, nn.Linear, 131),
    ],
)
def test_what_a_caller_sees_is_not_padded(name, vocab_size, align, head, width, tmp_path):
    ranks = run_ranks(everything, 2, name, tmp_path, vocab_size, align)
    plain = tiny_model(name, 2, vocab_size=vocab_size).eval()
    batch = make_batch(4, 8, vocab_size=vocab_size)
    loss_of_logits(plain, batch).backward()
    with torch.no_grad():
        logits = plain(**batch).logits
    tokens = plain.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False, pad_token_id=0)
    for rank in ranks:
        assert rank["head"] is head
        assert rank["loss"] is VocabParallelCausalLMLoss
        assert set(rank["widths"]) == ({width} if rank["is last"] else set())
        torch.testing.assert_close(rank["logits"], logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(rank["logits of training"], logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(rank["tokens"], tokens)
        assert rank["gradients"]
        for key, gradient in rank["gradients"].items():
            torch.testing.assert_close(gradient, plain.get_parameter(key).grad, rtol=1e-4, atol=1e-6)
    saved = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
    for name, weight in plain.named_parameters():
        assert torch.equal(saved[name], weight), name


def test_alone_a_model_keeps_its_head_and_loss():
    model = tiny_model("gpt2", 2, vocab_size=VOCABULARY)
    loss = model.loss_function
    hf_tpp.parallelize(model, verbose=False)
    assert type(model.lm_head) is nn.Linear
    assert model.loss_function is loss
