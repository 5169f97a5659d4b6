"""The page that is written from the results of a sweep."""

import pytest

from hf_tpp.check.families import FamilyKind
from hf_tpp.check.outcome import LayoutOutcome, Outcome, PartOutcome, Status, worst
from hf_tpp.check.plan_table import PlanRow
from hf_tpp.check.results import FamilyResult, SweepResults, code_digest
from hf_tpp.check.support_table import render

EXACT = {part: PartOutcome(Status.EXACT) for part in ("train", "evaluate", "generate", "save")}
SIZES = ((2, 1), (1, 2), (2, 2), (1, 4))


def outcome(name, **parts):
    layouts = [LayoutOutcome(tp, pp, parts=EXACT | parts, sharded=0.876 if tp > 1 else None) for tp, pp in SIZES]
    return Outcome(name, "Model", 1000, 4, layouts)


def results():
    refused = PartOutcome(Status.REFUSED, "UnsupportedModelError", "odd | blocks:\nuse pp=1")
    wrong = PartOutcome(Status.WRONG, "", "loss of step 1 differs")
    late = outcome("late")
    late.layouts[3].parts = {"train": refused}
    outcomes = {
        "fine": outcome("fine"),
        "odd": Outcome("odd", layouts=[LayoutOutcome(tp, pp, parts={"train": refused}) for tp, pp in SIZES]),
        "late": late,
        "bad": outcome("bad", generate=wrong),
        "none": Outcome("none", problem="the plain model: no"),
    }
    families = {k: FamilyResult(FamilyKind.DECODER_ONLY, v, "c0de", "2026-01-31") for k, v in outcomes.items()}
    return SweepResults({"transformers": "5.23.0", "torch": "2.13.0", "python": "3.11.7"}, families)


def row(page, name):
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_rows():
    page = render(results(), "results.json")
    assert row(page, "fine") == ["exact"] * 4 + ["88%", "exact", "exact", ""]
    assert row(page, "odd") == ["refused"] * 4 + ["–", "–", "–", "train: odd / blocks: use pp=1"]
    late = ["exact", "exact", "refused", "exact", "88%", "exact", "exact", "pp4 train: odd / blocks: use pp=1"]
    assert row(page, "late") == late
    assert row(page, "bad")[5:] == ["**wrong**", "exact", "generate: loss of step 1 differs"]
    assert row(page, "none") == ["–"] * 7 + ["the plain model: no"]


def test_counts():
    page = render(results(), "results.json")
    assert "## Decoder-only (5)" in page
    assert "Exact: 3 at tp=2, 3 at pp=2, 2 at pp=4, 3 at tp=2 x pp=2." in page
    assert "0 shard at least 90%, 3 shard at least 70%. In some part 2 refused, 1 wrong, 1 error." in page
    assert "transformers 5.23.0 (torch 2.13.0)" in page


def test_results_survive_their_file(tmp_path):
    file = tmp_path / "deep" / "results.json"
    results().write(file)
    assert SweepResults.read(file) == results()
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]


def test_a_plan_survives_json():
    one = outcome("one")
    one.layouts[0].plan = [PlanRow("model.layers.*.mlp", "column", "[4 x 2]")]
    assert Outcome.from_json(one.to_json()) == one


@pytest.mark.parametrize(("statuses", "expected"), [([], Status.NONE), ([Status.EXACT, Status.NONE], Status.NONE)])
def test_worst(statuses, expected):
    assert worst(statuses) is expected
    assert worst([*statuses, Status.WRONG, Status.ERROR]) is Status.WRONG


def test_the_digest_sees_code_but_not_the_checks(tmp_path):
    (tmp_path / "check").mkdir()
    (tmp_path / "api.py").write_text("1")
    first = code_digest(tmp_path)
    (tmp_path / "check" / "sweep.py").write_text("1")
    assert code_digest(tmp_path) == first
    (tmp_path / "api.py").write_text("2")
    assert code_digest(tmp_path) != first
