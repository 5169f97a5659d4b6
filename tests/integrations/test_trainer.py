"""A stock Trainer on a parallel model does what it does on the plain one."""

import pytest
import torch

from tests.integrations.runs import Layout, Record, trainer_runs
from tests.ranks import run_ranks

MODELS = ["gpt2", "llama_gqa"]
LAYOUTS = [Layout(pp=2), Layout(tp=2), Layout(tp=2, pp=2), Layout(pp=2, dp=2), Layout(tp=2, pp=2, dp=2)]
SELECTED = [("gpt2", Layout(tp=2, pp=2)), ("llama_gqa", Layout(pp=2, dp=2))]


@pytest.fixture(scope="module")
def single() -> dict[str, Record]:
    (records,) = run_ranks(trainer_runs, 1, [(name, Layout()) for name in MODELS], timeout=300)
    return dict(zip(MODELS, records, strict=True))


def assert_equal(found: Record, expected: Record) -> None:
    assert len(expected.losses) == 20
    for what in ("losses", "norms", "rates"):
        values, wanted = torch.tensor(getattr(found, what)), torch.tensor(getattr(expected, what))
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=0, msg=lambda text, what=what: f"{what}: {text}")


def compare(cases: list[tuple[str, Layout]], single: dict[str, Record]) -> None:
    for records in run_ranks(trainer_runs, cases[0][1].world_size, cases, timeout=600):
        for (name, _), record in zip(cases, records, strict=True):
            assert_equal(record, single[name])


def test_loss_and_norm_at_every_step(single):
    compare(SELECTED, single)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_layouts(world_size, single):
    product = [(name, layout) for layout in LAYOUTS if layout.world_size == world_size for name in MODELS]
    compare([case for case in product if case not in SELECTED], single)
