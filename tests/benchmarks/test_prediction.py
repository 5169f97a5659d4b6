"""The prediction for more GPUs: its arithmetic, and that docs/performance.md says what it gives."""

from pathlib import Path

import pytest

from benchmarks.prediction import efficiency_of_two_stages, predict, read
from benchmarks.workload import Workload

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "performance.md").read_text()


def rows() -> dict[str, list[str]]:
    """First cell -> the others, of all tables of the page."""
    lines = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("|")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_pipeline_of_equal_stages_without_a_head():
    """4 stages of 6 layers, 32 microbatches: 35 rounds of a quarter of a microbatch."""
    found = predict(Workload(vocab_size=1), 100.0, 4, 32)
    assert found.stages == (6, 6, 6, 6)
    assert found.step_ms == pytest.approx(35 * 25.0, rel=1e-4)
    assert found.bubble == 3 / 35


@pytest.mark.parametrize(("column", "family"), [(0, "llama"), (1, "gpt2")])
def test_the_page_has_these_figures(column, family):
    measured, table = read(), {name: cells[column] for name, cells in rows().items() if len(cells) > column}
    tensor = measured[family, "tensor parallel 2"]
    found = predict(Workload(family=family), tensor / 8, 4, 32)
    efficiency = efficiency_of_two_stages(measured, "llama")
    total = sum(found.stages) + found.head_layers
    expected = found.step_ms / efficiency
    assert table["one microbatch on two tensor-parallel ranks"] == f"{tensor:.0f} / 8 = {tensor / 8:.1f} ms"
    assert table["the head, in layers"].endswith(f"= {found.head_layers:.2f}")
    assert table["layers per stage"] == f"{', '.join(map(str, found.stages))} + head"
    assert table["slowest stage"] == f"{found.slowest:.0f} of {total:.2f}: {found.slowest_ms:.1f} ms"
    assert table["step: slowest x (32 + 3)"] == f"{found.step_ms:.0f} ms"
    assert table["bubble: 3 / 35"] == f"{found.bubble:.1%}"
    assert table[f"step with the losses of two stages of Llama (/ {efficiency:.3f})"] == f"{expected:.0f} ms"
    tokens = Workload(num_microbatches=32).num_tokens / expected * 1e3
    assert table["tokens per second at that"] == f"{round(tokens, -3):,.0f}"
    assert f"{efficiency_of_two_stages(measured, family):.3f}" in PAGE


def test_the_measured_steps_are_those_of_the_record():
    table = rows()
    for (family, name), milliseconds in read().items():
        row = table[name.replace("one process", "one GPU")]
        assert row[family == "gpt2"] == f"{milliseconds:.0f}"
