"""The checks are tested themselves: 25 faults, each of which must be found where it lies.

Every fault runs beside the same run without it, which must be exact, so that it is the fault that is found.
"""

from functools import partial

import pytest

from hf_tpp.check.checking import Checker, run_parallel
from hf_tpp.check.outcome import LayoutOutcome, Status
from hf_tpp.check.tiny_model import Recipe
from tests.check.faults import FAULTS, Sizes, run_with_fault

ALWAYS = {
    "qkv_cut_without_regard_to_heads",
    "all_reduce_dropped_in_the_backward",
    "tie_not_summed",
    "padding_counted_in_the_vocabulary",
    "loss_scaled_by_microbatches_instead_of_tokens",
}
"""Those that every test run tries; the others are left to `make slow`."""
LOUD = {"column_and_row_swapped"}
"""Those that fail by themselves, here by shapes that do not fit; all others would go unnoticed without a comparison."""


@pytest.fixture(scope="module")
def checker():
    with Checker(timeout=60.0) as checker:
        checker.exact = {}
        yield checker


def run(checker: Checker, recipe: Recipe, sizes: Sizes, fault: str | None) -> LayoutOutcome:
    checker.run_parallel = run_parallel if fault is None else partial(run_with_fault, fault)
    outcome = checker.check(fault or "no fault", recipe, [sizes])
    assert not outcome.problem
    return outcome.layouts[0]


def without_fault(checker: Checker, recipe: Recipe, sizes: Sizes) -> LayoutOutcome:
    key = str((recipe, sizes))
    if key not in checker.exact:
        checker.exact[key] = run(checker, recipe, sizes, None)
    return checker.exact[key]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else [pytest.mark.slow]) for name in FAULTS]
)
def test_fault_is_found(checker, name):
    fault = FAULTS[name]
    exact = without_fault(checker, fault.recipe, fault.sizes)
    assert {part: ended.status for part, ended in exact.parts.items()} == dict.fromkeys(
        ("train", "evaluate", "generate", "save"), Status.EXACT
    )
    found = run(checker, fault.recipe, fault.sizes, name).parts[fault.part]
    assert found.status is (Status.ERROR if name in LOUD else Status.WRONG), found
    assert found.reason


def test_there_are_enough_faults():
    assert len(FAULTS) >= 20
    assert set(FAULTS) >= ALWAYS
