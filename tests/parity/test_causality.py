"""A later token never changes an earlier logit, however the model is split."""

from typing import Any

import pytest
import torch

import hf_tpp
from tests.parity.models import VOCABULARY, tiny_model
from tests.ranks import run_ranks

MODELS = ("gpt2", "gpt_neox", "llama_gqa", "llama_tied", "llama_bias", "mistral", "qwen2")
SEQ = 10


def probe(sizes: dict[str, int]) -> list[list[tuple[bool, bool]]]:
    """Body of a rank: per model and position, whether the logits before it stayed and those from it on changed."""
    found = []
    for name in MODELS:
        model = hf_tpp.parallelize(tiny_model(name, 2).eval(), verbose=False, **sizes)
        input_ids = torch.randint(3, VOCABULARY, (2, SEQ), generator=torch.Generator().manual_seed(0))
        before = model(input_ids=input_ids).logits
        found.append([changes(model, input_ids, before, position) for position in range(1, SEQ)])
    return found


def changes(model: Any, input_ids: torch.Tensor, before: torch.Tensor, position: int) -> tuple[bool, bool]:
    changed = input_ids.clone()
    changed[:, position] = (changed[:, position] + 7) % VOCABULARY
    after = model(input_ids=changed).logits
    same = before == after
    return bool(same[:, :position].all()), not same[:, position].all(dim=-1).any()


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"pp": 2}], ids=str)
def test_later_tokens_do_not_change_earlier_logits(sizes):
    for rank in run_ranks(probe, 2, sizes):
        assert dict(zip(MODELS, rank, strict=True)) == dict.fromkeys(MODELS, [(True, True)] * (SEQ - 1))
