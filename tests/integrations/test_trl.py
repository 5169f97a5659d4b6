"""SFTTrainer and DPOTrainer of TRL on a parallel model do what they do on the plain one, at every step."""

import pytest
import torch

from tests.integrations.runs import Layout
from tests.integrations.trl_runs import STEPS, TRLRecord, Way, sft, trl_runs
from tests.ranks import run_ranks

pytest.importorskip("trl", reason="needs trl, of the extra 'trl'")
pytest.importorskip("peft", reason="needs peft, of the extra 'trl'")

TP, PP, TP_PP, DP, DP_PP = Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(dp=2), Layout(dp=2, pp=2)
SFT, SFT_LORA = Way("sft", "llama_gqa"), Way("sft", "gpt2", lora=True)
DPO, DPO_LORA = Way("dpo", "gpt2"), Way("dpo", "llama_gqa", lora=True)
CASES = [
    *((way, TP) for way in (SFT, DPO_LORA)),
    *((way, PP) for way in (SFT_LORA, DPO)),
    (SFT, TP_PP),
    (DPO, DP_PP),
    (Way("sft", "llama_gqa", options=(("patch", False),), evaluates=7), DP),
    (Way("dpo", "gpt2", options=(("patch", False),), evaluates=8), DP),
    (Way("dpo", "llama_gqa", reference="plain"), TP),
    (Way("sft", "gpt2", lora=True, settings=(("gradient_checkpointing", True),)), PP),
    (sft(packing=True), PP),
]
OTHERS = [
    (way, layout)
    for way in (SFT, SFT_LORA, DPO, DPO_LORA)
    for layout in (TP, PP, TP_PP, DP_PP)
    if (way, layout) not in CASES
]


def alone(ways: list[Way]) -> dict[Way, TRLRecord]:
    """The same runs in one process."""
    (records,) = run_ranks(trl_runs, 1, [(way, Layout()) for way in ways], timeout=600)
    return dict(zip(ways, records, strict=True))


@pytest.fixture(scope="module")
def plain() -> dict[Way, TRLRecord]:
    return alone(list(dict.fromkeys(way for way, _ in CASES)))


def assert_equal(found: TRLRecord, expected: TRLRecord, is_first: bool) -> None:
    assert len(expected.losses) == STEPS
    assert max(expected.norms) > 0.01
    for what in ("losses", "norms", "rates"):
        values, wanted = torch.tensor(getattr(found, what)), torch.tensor(getattr(expected, what))
        torch.testing.assert_close(values, wanted, rtol=1e-5, atol=0, msg=lambda text, what=what: f"{what}: {text}")
    assert found.metrics.keys() == expected.metrics.keys() >= {"entropy", "mean_token_accuracy", "num_tokens"}
    for metric, wanted in expected.metrics.items():
        assert found.metrics[metric] == pytest.approx(wanted, rel=1e-4, abs=1e-5), metric
    assert found.evaluation == pytest.approx(expected.evaluation, rel=1e-4, abs=1e-5)
    if expected.evaluation:
        assert found.evaluation["eval_loss"] == pytest.approx(expected.evaluation["eval_loss"], rel=1e-5)
    if is_first:
        assert found.saved == pytest.approx(expected.saved, rel=1e-4, abs=1e-7)


def check(cases: list[tuple[Way, Layout]], expected: dict[Way, TRLRecord], subtests: pytest.Subtests) -> None:
    (world_size,) = {layout.world_size for _, layout in cases}
    for rank, records in enumerate(run_ranks(trl_runs, world_size, cases, timeout=900)):
        for (way, layout), record in zip(cases, records, strict=True):
            with subtests.test(f"{way} {layout} rank {rank}"):
                assert_equal(record, expected[way], is_first=rank == 0)


@pytest.mark.parametrize("world_size", [2, 4])
def test_equal_to_one_process(world_size, plain, subtests):
    check([case for case in CASES if case[1].world_size == world_size], plain, subtests)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_the_other_layouts(world_size, plain, subtests):
    check([case for case in OTHERS if case[1].world_size == world_size], plain, subtests)
