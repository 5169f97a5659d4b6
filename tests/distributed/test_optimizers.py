"""Optimizers that are not exact on shards are refused by name."""

import pytest
import torch

import hf_tpp
from tests.parity.models import make_batch, tiny_model
from tests.ranks import RankError, run_ranks


def one_step(optimizer_name: str, tp: int, pp: int) -> None:
    model = hf_tpp.parallelize(tiny_model("llama_gqa").train(), tp=tp, pp=pp, verbose=False)
    optimizer = getattr(torch.optim, optimizer_name)(model.parameters(), lr=1e-3)
    model(**make_batch(2, 8)).loss.backward()
    optimizer.step()


def test_adafactor_is_refused_on_shards() -> None:
    with pytest.raises(RankError) as caught:
        run_ranks(one_step, 2, "Adafactor", 2, 1)
    for rank in range(2):
        assert caught.value.types[rank] == "ConfigurationError"
        assert "Adafactor keeps statistics over whole tensors" in caught.value.messages[rank]


def test_the_suggested_fixes_work() -> None:
    run_ranks(one_step, 2, "AdamW", 2, 1)
    run_ranks(one_step, 2, "Adafactor", 1, 2)
