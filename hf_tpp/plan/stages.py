"""How many layers each pipeline stage gets.

The slowest stage sets the pace of a pipeline, and the ends are heavier than the middle: the first stage
also holds the embedding, the last one the head. Twelve equal layers and a head that costs about five of them,
on two stages:

    even split (6, 6)    stage 0  ######             6
                         stage 1  ######HHHHH       11   <- everyone waits for this stage

    balanced   (8, 4)    stage 0  ########           8
                         stage 1  ####HHHHH          9   <- the slowest, and barely so

The balance of a split is mean stage cost / largest stage cost: 8.5 / 11 = 0.77 above, then 8.5 / 9 = 0.94.

``balance_stages`` finds the contiguous split with the smallest largest stage and, among those, the smallest sum
of squares (so that the other stages are even too). The first of two dynamic programs finds the limit, the second
the split within it:

    best(s, i) = min over count of  combine(stage s holding layers i .. i + count - 1, best(s + 1, i + count))

Two programs, because a part that is best on its own in (largest, sum of squares) need not belong to the best whole.

Source: Narayanan et al. 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training"
(partitioning by dynamic programming over layer costs).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

from hf_tpp.errors import ConfigurationError

_StageValue = Callable[[int, int, int], int]  # (stage, its first layer, the layer after its last) -> value


def balance_stages(
    layer_costs: Sequence[float], num_stages: int, first_cost: float = 0.0, last_cost: float = 0.0
) -> tuple[int, ...]:
    """Split the layers into contiguous stages of nearly equal cost.

    Args:
        layer_costs: One positive cost per layer, in any unit (parameters, FLOPs, seconds).
        num_stages: p, at most the number of layers.
        first_cost: Extra cost of the first stage (embedding), same unit.
        last_cost: Extra cost of the last stage (head), same unit.

    Returns:
        Number of layers of each stage, each at least 1. Equally good splits give the earlier stages fewer layers,
        because those keep more microbatches in flight.

    Raises:
        ConfigurationError: If there are more stages than layers, or a cost is negative or not finite.

    Source: Narayanan et al. 2019, PipeDream.
    """
    _check_sizes(len(layer_costs), num_stages)
    _check_costs(layer_costs, first_cost, last_cost)
    stage_cost = _exact_stage_cost(layer_costs, num_stages, first_cost, last_cost)

    limit, _ = _best_split(len(layer_costs), num_stages, stage_cost, max)
    over_limit = num_stages * limit**2 + 1  # more than the sum of squares of any split within the limit

    def square_within_limit(stage: int, start: int, end: int) -> int:
        cost = stage_cost(stage, start, end)
        return cost**2 if cost <= limit else over_limit

    _, stages = _best_split(len(layer_costs), num_stages, square_within_limit, operator.add)
    return stages


def check_stages(stages: Sequence[int], num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Validate a split written by the user.

    Args:
        stages: Number of layers of each stage.
        num_layers: Layers of the model.
        num_stages: p.

    Returns:
        The split as a tuple.

    Raises:
        ConfigurationError: If the length is not p, a stage is empty, or the sum is not the number of layers.
    """
    _check_sizes(num_layers, num_stages)
    stages = tuple(stages)
    if len(stages) != num_stages:
        raise ConfigurationError(
            f"stages must list one layer count per stage: got {len(stages)} counts {stages} for pp={num_stages}: "
            f"pass {num_stages} counts"
        )
    if any(isinstance(count, bool) or not isinstance(count, int) or count < 1 for count in stages):
        raise ConfigurationError(f"every stage needs at least one whole layer: got stages={stages}: use counts >= 1")
    if sum(stages) != num_layers:
        raise ConfigurationError(
            f"stages must add up to the model's {num_layers} layers: got {stages}, which adds up to {sum(stages)}: "
            f"{'add' if sum(stages) < num_layers else 'remove'} {abs(num_layers - sum(stages))}"
        )
    return stages


def balance(
    stages: Sequence[int], layer_costs: Sequence[float], first_cost: float = 0.0, last_cost: float = 0.0
) -> float:
    """Mean stage cost / largest stage cost of a split, in (0, 1]; 1.0 is perfect.

    Args:
        stages: Number of layers of each stage.
        layer_costs: One positive cost per layer, in any unit.
        first_cost: Extra cost of the first stage, same unit.
        last_cost: Extra cost of the last stage, same unit.

    Raises:
        ConfigurationError: If the split does not fit the layers.
    """
    check_stages(stages, len(layer_costs), len(stages))
    _check_costs(layer_costs, first_cost, last_cost)
    bounds = [0, *itertools.accumulate(stages)]
    costs = [math.fsum(layer_costs[start:end]) for start, end in itertools.pairwise(bounds)]
    costs[0] += first_cost
    costs[-1] += last_cost
    return math.fsum(costs) / len(costs) / max(costs)


def _check_sizes(num_layers: int, num_stages: int) -> None:
    if num_stages < 1:
        raise ConfigurationError(f"pp must be at least 1, got pp={num_stages}: use 1 <= pp <= {num_layers}")
    if num_stages > num_layers:
        raise ConfigurationError(
            f"pp={num_stages} is more than the model's {num_layers} layers: use pp <= {num_layers}"
        )


def _check_costs(layer_costs: Sequence[float], first_cost: float, last_cost: float) -> None:
    for layer, cost in enumerate(layer_costs):
        if not (math.isfinite(cost) and cost > 0):
            raise ConfigurationError(f"the cost of layer {layer} is {cost}: pass a positive, finite number")
    for name, cost in (("first_cost", first_cost), ("last_cost", last_cost)):
        if not (math.isfinite(cost) and cost >= 0):
            raise ConfigurationError(f"{name} is {cost}: pass a finite number >= 0")


def _exact_stage_cost(
    layer_costs: Sequence[float], num_stages: int, first_cost: float, last_cost: float
) -> _StageValue:
    """Cost of a stage as an integer: all costs times their common denominator.

    Integers make equal splits compare equal; in floats, rounding would break ties at random.
    """
    fractions = [Fraction(cost) for cost in (first_cost, last_cost, *layer_costs)]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    first, last, *layers = [int(fraction * denominator) for fraction in fractions]
    cost_before = [0, *itertools.accumulate(layers)]

    def stage_cost(stage: int, start: int, end: int) -> int:
        ends = (first if stage == 0 else 0) + (last if stage == num_stages - 1 else 0)
        return cost_before[end] - cost_before[start] + ends

    return stage_cost


def _best_split(
    num_layers: int,
    num_stages: int,
    stage_value: _StageValue,
    combine: Callable[[int, int], int],
) -> tuple[int, tuple[int, ...]]:
    """Minimise combine(value of stage 0, combine(value of stage 1, ...)) over all contiguous splits.

    Returns:
        The smallest value, and its split; ties go to the lexicographically smallest split.
    """

    @functools.cache
    def best(stage: int, start: int) -> tuple[int, tuple[int, ...]]:
        if stage == num_stages - 1:
            return stage_value(stage, start, num_layers), (num_layers - start,)
        last_end = num_layers - (num_stages - 1 - stage)  # leaves one layer for each later stage
        candidates = []
        for end in range(start + 1, last_end + 1):
            rest, split = best(stage + 1, end)
            candidates.append((combine(stage_value(stage, start, end), rest), (end - start, *split)))
        return min(candidates)

    return best(0, 0)
