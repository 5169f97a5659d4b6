"""A stock Trainer evaluates, saves, keeps the best and resumes a parallel model as it does a plain one."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, default_data_collator

from tests.integrations import checkpoints
from tests.integrations.checkpoints import EVALUATION_ROWS
from tests.integrations.runs import Layout, Rows
from tests.ranks import run_ranks

LAYOUTS = [Layout(tp=2, pp=2), Layout(pp=2, dp=2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    (record,) = run_ranks(
        checkpoints.evaluations, 1, "gpt2", Layout(), str(tmp_path_factory.mktemp("single")), timeout=300
    )
    return record


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_evaluation_and_best_model(layout, single, tmp_path):
    records = run_ranks(checkpoints.evaluations, 4, "gpt2", layout, str(tmp_path), timeout=300)
    for record in records:
        assert len(record.evaluation["history"]) >= 4
        for found, expected in zip(record.evaluation["history"], single.evaluation["history"], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(
            record.evaluation["predictions"], single.evaluation["predictions"], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(record.evaluation["labels"], single.evaluation["labels"])
        assert record.notes["loss"] == pytest.approx(record.notes["best_loss"], rel=1e-6)
        for name in ("best", "tokens", "rows", "checkpoints", "card", "config"):
            assert record.notes[name] == single.notes[name]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "final").eval()
    with torch.no_grad():
        logits = model(**default_data_collator([Rows(EVALUATION_ROWS, seed=7)[0]])).logits
    np.testing.assert_allclose(logits[0], single.evaluation["predictions"][0], rtol=1e-4, atol=1e-5)


def saved_as(layout: Layout, *, sharded: bool = False) -> tuple[Layout, dict[str, Any]]:
    return layout, {"options": {"data_parallel": "fully_shard"}} if sharded else {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (saved_as(Layout(pp=2, dp=2)), saved_as(Layout(pp=2, dp=2))),
        (saved_as(Layout(tp=2, pp=2)), saved_as(Layout(tp=2, dp=2))),
        pytest.param(saved_as(Layout(tp=2, dp=2), sharded=True), saved_as(Layout(pp=2)), marks=pytest.mark.slow),
        pytest.param(saved_as(Layout(tp=2)), saved_as(Layout(pp=2, dp=2), sharded=True), marks=pytest.mark.slow),
    ],
    ids=["same", "other", "sharded to pp2", "tp2 to sharded"],
)
def test_resume(before, after, single, tmp_path):
    layout, changes = before
    run_ranks(checkpoints.killed, layout.world_size, "gpt2", layout, str(tmp_path), timeout=300, **changes)
    layout, changes = after
    for record in run_ranks(
        checkpoints.resumed, layout.world_size, "gpt2", layout, str(tmp_path), timeout=300, **changes
    ):
        # The log goes on from that of the checkpoint.
        assert record.losses == pytest.approx(single.losses, rel=1e-5)
        assert record.norms == pytest.approx(single.norms, rel=1e-5)
        assert record.rates == pytest.approx(single.rates, rel=1e-7)
