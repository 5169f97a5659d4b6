"""Options of Trainer do on a parallel model what they do on the plain one, or are refused by name."""

import pytest
import torch

from hf_tpp import TPPTrainer
from tests.integrations.options import OPTIONS, OVERFLOWS_AT, option_runs
from tests.integrations.runs import Layout
from tests.ranks import run_ranks

TOLERANCES = {"bf16": 2e-2, "fp16": 3e-3}
# What depends on the rows of one process in its very meaning cannot be compared between one process and two replicas.
OF_ONE_REPLICA = {"group by length", "tokens of a process", "one of four"}
WITH_REPLICAS = ["label smoothing", "loss function", "sequential", "bf16", "fp16"]


@pytest.fixture(scope="module")
def single():
    return run_ranks(option_runs, 1, Layout(), list(OPTIONS), timeout=300)[0]


def assert_equal(name, found, expected):
    for what in ("losses", "norms", "rates"):
        values, wanted = torch.tensor(getattr(found, what)), torch.tensor(getattr(expected, what))
        assert len(values) == 4
        torch.testing.assert_close(
            values, wanted, rtol=TOLERANCES.get(name, 1e-5), atol=1e-12, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize(
    ("layout", "names", "options"),
    [
        (Layout(tp=2), list(OPTIONS)[::2], {}),
        (Layout(pp=2), list(OPTIONS)[1::2], {}),
        pytest.param(Layout(tp=2, pp=2), list(OPTIONS), {}, marks=pytest.mark.slow),
        (Layout(pp=2, dp=2), WITH_REPLICAS, {}),
        (Layout(pp=2, dp=2), ["no clipping", "checkpointing"], {"data_parallel": "fully_shard"}),
        (Layout(tp=2, dp=2), ["label smoothing", "no clipping"], {"patch": False, "trainer_class": TPPTrainer}),
    ],
    ids=["tp2", "pp2", "tp2-pp2", "pp2-dp2", "pp2-dp2 sharded", "tp2-dp2 unpatched"],
)
def test_options(layout, names, options, single):
    for records in run_ranks(option_runs, layout.world_size, layout, names, timeout=600, **options):
        for name, record in records.items():
            assert_equal(name, record, single[name])
            assert record.notes["scales"] == single[name].notes["scales"]


def test_the_overflow_is_one(single):
    scales, norms = single["fp16"].notes["scales"], single["fp16"].norms
    assert scales[OVERFLOWS_AT] == scales[OVERFLOWS_AT - 1] / 2
    assert norms[OVERFLOWS_AT] == float("inf")
