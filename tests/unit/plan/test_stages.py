"""Layer splits against brute force, a GPT-2-like model, and the user's own splits."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_tpp.errors import ConfigurationError
from hf_tpp.plan.stages import balance, balance_stages, check_stages

GPT2_LAYERS, GPT2_HEAD = [7.08] * 12, 38.6  # millions of parameters


def all_splits(num_layers: int, num_stages: int) -> list[tuple[int, ...]]:
    cuts = itertools.combinations(range(1, num_layers), num_stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise([0, *cut, num_layers])) for cut in cuts]


def objective(split, layer_costs, first_cost, last_cost):
    """The definition, on integer costs: (largest stage, sum of squares)."""
    ends = list(itertools.accumulate(split))
    costs = [sum(layer_costs[end - count : end]) for count, end in zip(split, ends, strict=True)]
    costs[0] += first_cost
    costs[-1] += last_cost
    return max(costs), sum(cost**2 for cost in costs)


@given(
    layer_costs=st.lists(st.integers(1, 20), min_size=1, max_size=9),
    data=st.data(),
    first_cost=st.integers(0, 30),
    last_cost=st.integers(0, 30),
)
def test_against_brute_force(layer_costs, data, first_cost, last_cost):
    p = data.draw(st.integers(1, len(layer_costs)))
    found = balance_stages(layer_costs, p, first_cost, last_cost)
    candidates = all_splits(len(layer_costs), p)
    assert found == min(candidates, key=lambda split: (objective(split, layer_costs, first_cost, last_cost), split))


def test_a_locally_best_part_is_not_taken():
    """1 5 3 2 alone is best as 1 | 5 | 3 2 (largest 5); next to a stage of 7, 1 5 | 3 | 2 is the more even one."""
    assert balance_stages([1, 5, 3, 2], 3) == (1, 1, 2)
    assert balance_stages([7, 1, 5, 3, 2], 4) == (1, 2, 1, 1)
    assert balance_stages([2, 3, 5, 1, 7], 4) == (1, 1, 2, 1)


def test_rounding_does_not_decide_ties():
    assert balance_stages([0.1] * 10, 4) == balance_stages([1] * 10, 4) == (2, 2, 3, 3)


def test_costs_of_very_different_size():
    assert balance_stages([1e-300, 1e300, 1e-300], 2) == (1, 2)


@pytest.mark.parametrize(
    ("pp", "stages", "best", "even"),
    [(2, (9, 3), 0.97, 0.76), (3, (5, 6, 1), 0.90, 0.62), (4, (3, 4, 4, 1), 0.68, 0.52)],
)
def test_gpt2(pp, stages, best, even):
    """With pp=4 the head and its one layer alone exceed the mean: no split can do better than 0.68."""
    assert balance_stages(GPT2_LAYERS, pp, last_cost=GPT2_HEAD) == stages
    assert balance(stages, GPT2_LAYERS, last_cost=GPT2_HEAD) == pytest.approx(best, abs=0.005)
    assert balance([12 // pp] * pp, GPT2_LAYERS, last_cost=GPT2_HEAD) == pytest.approx(even, abs=0.005)


def test_balance_in_the_module_docstring():
    assert balance([6, 6], [1] * 12, last_cost=5) == pytest.approx(8.5 / 11)
    assert balance([8, 4], [1] * 12, last_cost=5) == pytest.approx(8.5 / 9)
    assert balance_stages([1] * 12, 2, last_cost=5) == (8, 4)


def test_check_stages_accepts():
    assert check_stages([3, 1], 4, 2) == (3, 1)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([4], r"one layer count per stage: got 1 counts \(4,\) for pp=2: pass 2 counts"),
        ([4, 0], r"at least one whole layer: got stages=\(4, 0\): use counts >= 1"),
        ([1.5, 2.5], "at least one whole layer"),
        ([1, 2], r"add up to the model's 4 layers: got \(1, 2\), which adds up to 3: add 1"),
        ([3, 3], r"add up to the model's 4 layers: got \(3, 3\), which adds up to 6: remove 2"),
    ],
)
def test_check_stages_rejects(stages, message):
    with pytest.raises(ConfigurationError, match=message):
        check_stages(stages, num_layers=4, num_stages=2)


def test_more_stages_than_layers():
    message = "pp=8 is more than the model's 4 layers: use pp <= 4"
    with pytest.raises(ConfigurationError, match=message):
        balance_stages([1.0] * 4, 8)
    with pytest.raises(ConfigurationError, match=message):
        check_stages([1] * 8, 4, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], 0), "pp must be at least 1, got pp=0"),
        (([1.0, 0.0], 1), "the cost of layer 1 is 0.0: pass a positive"),
        (([1.0], 1, -1.0), "first_cost is -1.0: pass a finite number >= 0"),
        (([1.0], 1, 0.0, float("nan")), "last_cost is nan"),
    ],
)
def test_wrong_costs(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        balance_stages(*arguments)
