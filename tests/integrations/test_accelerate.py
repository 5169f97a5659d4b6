"""A script with a plain Accelerator does on a parallel model what it does on the plain one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tpp import TPPAccelerator
from tests.integrations import scripts
from tests.integrations.runs import Layout, Record
from tests.integrations.scripts import SAVED_AT
from tests.ranks import RankError, run_ranks

MODELS = ["gpt2", "llama_gqa"]
LAYOUTS = [Layout(pp=2), Layout(tp=2), Layout(tp=2, pp=2), Layout(pp=2, dp=2), Layout(tp=2, pp=2, dp=2)]
SELECTED = [("gpt2", Layout(pp=2, dp=2)), ("llama_gqa", Layout(tp=2, pp=2))]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("single"))
    (records,) = run_ranks(scripts.script_runs, 1, [(name, Layout()) for name in MODELS], folder, timeout=300)
    return {name: whole for name, (whole, _) in zip(MODELS, records, strict=True)}


def assert_equal(found: Record, expected: Record, start: int = 0) -> None:
    for what, rtol in (("losses", 1e-5), ("norms", 1e-5), ("rates", 1e-7)):
        values, wanted = torch.tensor(getattr(found, what)), torch.tensor(getattr(expected, what)[start:])
        torch.testing.assert_close(values, wanted, rtol=rtol, atol=1e-12, msg=lambda text, what=what: f"{what}: {text}")


def compare(cases: list[tuple[str, Layout]], single: dict[str, Record], folder: Path, **options: Any) -> None:
    world_size = cases[0][1].world_size
    for records in run_ranks(scripts.script_runs, world_size, cases, str(folder), timeout=600, **options):
        for (name, _), (whole, resumed) in zip(cases, records, strict=True):
            expected = single[name]
            assert len(whole.losses) == 20
            assert_equal(whole, expected)
            assert_equal(resumed, expected, SAVED_AT)
            torch.testing.assert_close(whole.evaluation["logits"], expected.evaluation["logits"], rtol=1e-3, atol=1e-4)
            assert torch.equal(whole.evaluation["labels"], expected.evaluation["labels"])
            assert whole.evaluation["names"] == expected.evaluation["names"]
            assert whole.notes["is_same"]
            assert "config.json" in whole.notes["files"]
    for name, layout in cases:
        AutoModelForCausalLM.from_pretrained(folder / f"{name}-{layout}-final")


def test_script(single, tmp_path):
    compare(SELECTED, single, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_all_layouts(world_size, single, tmp_path):
    product = [(name, layout) for layout in LAYOUTS if layout.world_size == world_size for name in MODELS]
    compare([case for case in product if case not in SELECTED], single, tmp_path)


@pytest.mark.slow
def test_script_without_patching(single, tmp_path):
    compare([("gpt2", Layout(tp=2, pp=2))], single, tmp_path, accelerator_class=TPPAccelerator)


def test_state_is_resumed_at_another_layout(single, tmp_path):
    """Saved by the ranks of one layout, continued by those of another."""
    run_ranks(scripts.saved_run, 4, "llama_gqa", Layout(tp=2, pp=2), str(tmp_path), timeout=300)
    for record in run_ranks(scripts.resumed_run, 2, "llama_gqa", Layout(pp=2), str(tmp_path), timeout=300):
        assert_equal(record, single["llama_gqa"], SAVED_AT)
    with pytest.raises(RankError) as caught:
        run_ranks(scripts.resumed_run, 4, "llama_gqa", Layout(pp=2, dp=2), str(tmp_path), timeout=300)
    assert set(caught.value.types.values()) == {"ConfigurationError"}
    assert "was saved by dp=1 replicas, and there are dp=2: a schedule" in caught.value.messages[0]


@pytest.mark.parametrize(
    ("layout", "accelerator_class"),
    [(Layout(tp=2, pp=2), None), (Layout(pp=2, dp=2), None), (Layout(tp=2, dp=2), TPPAccelerator)],
    ids=["tp2-pp2", "pp2-dp2", "tp2-dp2 unpatched"],
)
def test_replicas_are_counted_as_processes(layout, accelerator_class):
    size = 4 // layout.dp
    for rank, found in enumerate(run_ranks(scripts.counts, 4, layout, accelerator_class)):
        line = torch.tensor([rank % size + size * replica for replica in range(layout.dp)])  # one rank of each replica
        both = torch.stack([line, 10 * line], 1)
        assert found["processes"] == layout.dp
        assert found["is_last"] == (rank == 3)
        assert torch.equal(found["gathered"]["a"][0], both.flatten())
        assert torch.equal(found["gathered"]["b"], line)
        for kind, expected in (("sum", both.sum(0)), ("mean", both.float().mean(0)), ("max", both.amax(0))):
            assert torch.equal(found[kind], expected.float()), kind
        assert found["triggers"] == [True, False]
        assert found["afterwards"][0] == 4
        assert torch.equal(found["afterwards"][1], torch.tensor([0, 0, 1, 10, 2, 20, 3, 30]))


CASES = [
    {"kind": "map", "shuffle": True},
    {"kind": "map", "shuffle": True, "settings": {"use_seedable_sampler": True}},
    {"kind": "map", "shuffle": True, "num_workers": 1},
    {"kind": "map", "shuffle": False, "settings": {"split_batches": True}},
    {"kind": "stream"},
    {"kind": "stream", "num_workers": 1},
    {"kind": "datasets"},
]


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(pp=2, dp=2)], ids=str)
def test_batches_are_alike_in_a_replica_and_differ_between_replicas(layout, tmp_path):
    rows, size = 16, layout.tp * layout.pp
    ranks = run_ranks(scripts.batches, 4, layout, CASES, rows, timeout=300)
    for number, case in enumerate(CASES):
        for epoch in range(2):
            replicas = [ranks[rank][number][epoch] for rank in range(0, 4, size)]
            for rank in range(4):
                assert ranks[rank][number][epoch] == replicas[rank // size], case
            ids = [value for values in replicas for value in values if isinstance(value, int)]
            assert sorted(ids) == list(range(rows)), case
            assert case.get("shuffle", False) == (replicas[0] != sorted(replicas[0])) or case["kind"] == "map"
