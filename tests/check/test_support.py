"""docs/support.md says what the code does: the page is that of the committed results, and these are of this code."""

import tomllib
from functools import cache
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

from hf_tpp.check.checking import Checker
from hf_tpp.check.families import FamilyKind, causal_families, kind_of
from hf_tpp.check.outcome import LayoutOutcome, Outcome, Status
from hf_tpp.check.results import SweepResults
from hf_tpp.check.support_table import render
from hf_tpp.check.sweep import LAYOUTS
from hf_tpp.check.tiny_model import Recipe
from hf_tpp.check.versions_table import render_versions

ROOT = Path(__file__).parents[2]
TESTED = next(
    line.split("==")[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if line.startswith("transformers==")
)
FILE = f"docs/support/transformers-{TESTED}.json"
REPRESENTATIVE = {
    "gpt2": "Conv1D, fused [q|k|v], tied head",
    "gpt_neox": "per-head [q k v]",
    "bloom": "ALiBi, per-head [q k v]",
    "falcon": "one key/value head, fused",
    "gpt_bigcode": "one key/value head, fused",
    "mpt": "ALiBi, fused",
    "codegen": "four blocks of [q v k]",
    "phi3": "fused [q|k|v] and [gate|up]",
    "opt": "learned positions, biases",
    "llama": "the plain case",
    "gemma3_text": "sliding window, norms on both sides",
    "olmo2": "full-width query and key norms",
    "diffllama": "paired heads",
    "deepseek_v3": "latent attention, experts",
    "qwen3_moe": "experts, per-head norms",
    "gpt_oss": "sinks, experts with biases",
    "qwen3_next": "linear attention",
    "mamba2": "no attention",
    "jamba": "mamba and attention",
    "bart": "encoder-decoder",
    "bert": "encoder",
}
"""Families that are checked in every test run, and what they are there for."""
LAYOUTS_HERE = (LAYOUTS[0], LAYOUTS[2])


@cache
def results() -> SweepResults:
    return SweepResults.read(ROOT / FILE)


@cache
def of_all_versions() -> dict[str, SweepResults]:
    every = [SweepResults.read(file) for file in sorted((ROOT / "docs" / "support").glob("*.json"))]
    return {results.versions["transformers"]: results for results in every}


def decoders() -> dict[str, Outcome]:
    return {k: v.outcome for k, v in results().families.items() if v.kind is FamilyKind.DECODER_ONLY}


def test_the_page_is_that_of_the_results():
    assert (ROOT / "docs" / "support.md").read_text() == render(results(), FILE)


def test_the_page_of_the_versions_is_that_of_the_results():
    others = [of_version for version, of_version in of_all_versions().items() if version != TESTED]
    assert (ROOT / "docs" / "support" / "versions.md").read_text() == render_versions(results(), others)


def test_the_lowest_version_was_checked():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (floor,) = (entry.partition(">=")[2] for entry in project["dependencies"] if entry.startswith("transformers"))
    lowest = min(of_all_versions(), key=Version)
    assert Version(lowest) == Version(floor)


@pytest.mark.parametrize("version", of_all_versions())
def test_no_decoder_of_any_version_is_wrong(version):
    """Or fails by an error that is not hf_tpp's; what the plain model of a version cannot do is no fault."""
    bad = (Status.WRONG, Status.ERROR)
    results = of_all_versions()[version].families.items()
    assert {
        k: v.outcome.status
        for k, v in results
        if v.kind is FamilyKind.DECODER_ONLY and v.outcome.layouts and v.outcome.status in bad
    } == {}


@pytest.mark.skipif(transformers.__version__ != TESTED, reason=f"the families of transformers {TESTED} are recorded")
def test_every_family_of_transformers_has_a_row():
    assert {name: result.kind for name, result in results().families.items()} == {
        name: kind_of(name) for name in causal_families()
    }


def test_every_row_was_measured_or_says_why_not():
    for name, result in results().families.items():
        outcome = result.outcome
        assert outcome.problem or [layout.layout for layout in outcome.layouts] == list(LAYOUTS), name
        for layout in outcome.layouts:
            for part, ended in layout.parts.items():
                assert ended.status is Status.EXACT or ended.reason, f"{name} {layout.layout} {part} has no reason"
    assert not [name for name, outcome in decoders().items() if outcome.problem]


def test_nothing_is_wrong():
    bad = (Status.WRONG, Status.ERROR)
    assert {
        k: v.outcome.status for k, v in results().families.items() if v.outcome.layouts and v.outcome.status in bad
    } == {}


def test_encoders_and_encoder_decoders_are_refused():
    for name, result in results().families.items():
        if result.kind in (FamilyKind.ENCODER, FamilyKind.ENCODER_DECODER) and result.outcome.layouts:
            parts = [layout.parts["train"] for layout in result.outcome.layouts]
            assert {part.status for part in parts} == {Status.REFUSED}, name
            assert {part.kind for part in parts} == {"UnsupportedModelError"}, name


def training(outcome: Outcome, tp: int, pp: int) -> Status:
    return next(layout.parts["train"].status for layout in outcome.layouts if (layout.tp, layout.pp) == (tp, pp))


def test_as_many_are_exact_as_promised():
    """134 of 136 under the pipeline; all exact or refused under tp, 121 of them cut to 70%, 100 to 90%."""
    every = decoders().values()
    for pp in (2, 4):
        assert sum(training(outcome, 1, pp) is Status.EXACT for outcome in every) >= 134
    assert {training(outcome, 2, 1) for outcome in every} <= {Status.EXACT, Status.REFUSED}
    shares = [next(layout.sharded or 0.0 for layout in outcome.layouts if layout.tp == 2) for outcome in every]
    assert sum(share >= 0.7 for share in shares) >= 121
    assert sum(share >= 0.9 for share in shares) >= 100


@pytest.fixture(scope="module")
def checker():
    with Checker() as checker:
        yield checker


def facts(layout: LayoutOutcome) -> tuple[dict[str, Status], float | None]:
    return {part: ended.status for part, ended in layout.parts.items()}, layout.sharded


@pytest.mark.skipif(transformers.__version__ != TESTED, reason=f"the families of transformers {TESTED} are recorded")
@pytest.mark.parametrize("model_type", REPRESENTATIVE)
def test_a_representative_family_does_what_the_page_says(checker, model_type):
    recorded = {layout.layout: facts(layout) for layout in results().families[model_type].outcome.layouts}
    outcome = checker.check(model_type, Recipe(model_type), LAYOUTS_HERE)
    assert not outcome.problem
    for layout in outcome.layouts:
        assert facts(layout) == recorded[layout.layout], str(layout)
