"""The page that compares the sweeps of several versions of transformers."""

from hf_tpp.check.families import FamilyKind
from hf_tpp.check.outcome import Layout, LayoutOutcome, Outcome, PartOutcome, Status
from hf_tpp.check.results import FamilyResult, SweepResults
from hf_tpp.check.summary import SIZES, note
from hf_tpp.check.versions_table import render_versions

PARTS = ("train", "evaluate", "generate", "save")
REFUSED = PartOutcome(Status.REFUSED, "UnsupportedModelError", "too | old")
WRONG = PartOutcome(Status.WRONG, "", "logits differ")


def outcome(share=0.9, **parts):
    exact = {part: PartOutcome(Status.EXACT) for part in PARTS}
    layouts = [
        LayoutOutcome(tp, pp, parts=exact | parts, sharded=share if tp > 1 else None) for tp, pp in SIZES.values()
    ]
    return Outcome("model", "Model", 1000, 4, layouts)


def refused():
    return outcome(None, train=REFUSED, evaluate=REFUSED)


def results(version, kind=FamilyKind.DECODER_ONLY, **outcomes):
    families = {name: FamilyResult(kind, found, "c0de", "2026-01-31") for name, found in outcomes.items()}
    return SweepResults({"transformers": version, "torch": "2.13.0", "python": "3.11.7"}, families)


def rows(page):
    lines = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")]
    return {name.strip(" `"): [cell.strip() for cell in cells] for name, *cells in lines}


def test_what_differs_has_a_row_and_a_reason():
    late = outcome(generate=WRONG)
    late.layouts[3].parts["generate"] = PartOutcome(Status.EXACT)
    main = results("5.23.0", same=outcome(), close=outcome(0.9), less=outcome(), never=outcome(), late=outcome())
    old = results("5.9.0", same=outcome(), close=outcome(0.905), less=outcome(0.2), never=refused(), late=late)
    new = results("5.24.0", same=outcome(), close=outcome(), less=outcome(), never=outcome())
    page = render_versions(main, [new, old])
    table = rows(page)
    assert table["family"] == ["5.9.0", "5.23.0", "5.24.0"]  # as versions, not as words
    assert table["less"] == ["exact, 20%", "exact, 90%", "exact, 90%"]
    assert table["never"] == ["refused", "exact, 90%", "exact, 90%"]
    assert table["late"] == ["generate **wrong**, 90%", "exact, 90%", "does not exist"]
    assert not {"same", "close"} & table.keys()
    assert "- `never`: train, evaluate: too / old" in page
    assert "- `late`: tp2 generate, pp2 generate, pp4 generate: logits differ" in page
    assert "- `less`" not in page


def test_families_that_only_some_have():
    main = results("5.23.0", both=outcome(), gone=outcome(), new=outcome())
    page = render_versions(main, [results("5.0.0", both=outcome(), old=outcome(), odd=refused())])
    assert "Does not have `gone`, `new`." in page
    assert "Has besides: `odd`, `old`." in page
    assert "- `odd`: train, evaluate: too / old" in page
    assert "- `old`" not in page
    assert "All families that they share are the same with all versions." in page


def test_counts():
    main = results("5.23.0", one=outcome(), two=refused(), three=outcome(evaluate=WRONG))
    broken = Outcome("four", problem="the plain model: no")
    table = rows(render_versions(main, [results("5.0.0", one=outcome(), four=broken)]))
    assert table["5.23.0"] == ["2.13.0", "3", "1", "1", "1", "1", "1", "1", "0"]
    assert table["5.0.0"] == ["2.13.0", "2", "1", "1", "1", "1", "0", "0", "0"]


def test_what_cannot_be_split_is_left_out_by_what_the_main_version_calls_it():
    main = results("5.23.0", kind=FamilyKind.ENCODER, bert=refused())
    page = render_versions(main, [results("5.0.0", bert=outcome())])
    assert "bert" not in page


def test_layouts_that_were_not_checked_are_no_difference():
    part = outcome()
    part.layouts = [layout for layout in part.layouts if layout.layout.world_size == 2]
    bad = outcome(generate=WRONG)
    bad.layouts = bad.layouts[:1]
    main = results("5.23.0", part=outcome(), bad=outcome())
    table = rows(render_versions(main, [results("5.0.0", part=part, bad=bad)]))
    assert "part" not in table
    assert table["bad"] == ["generate **wrong**, 90%", "exact, 90%"]
    assert table["5.0.0"] == ["2.13.0", "2", "2", "1", "not checked", "not checked", "0", "1", "0"]
    assert FamilyResult(FamilyKind.DECODER_ONLY, part, "c0de", "").covers([Layout(2), Layout(pp=2)])
    assert not FamilyResult(FamilyKind.DECODER_ONLY, part, "c0de", "").covers([Layout(2), Layout(pp=4)])


def test_some_runs_only():
    mixed = outcome()
    mixed.layouts[0].parts["train"] = REFUSED
    mixed.layouts[2].parts["train"] = WRONG
    main = results("5.23.0", mixed=outcome())
    table = rows(render_versions(main, [results("5.0.0", mixed=mixed)]))
    assert table["mixed"][0] == "tp=2 refused, pp=4 **wrong**, 90%"
    assert note(mixed) == f"{Layout(2)} train: too / old; {Layout(pp=4)} train: logits differ"
