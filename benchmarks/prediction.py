"""What a step will take on more GPUs, from what was measured on two: `python -m benchmarks.prediction`.

    one microbatch on tp ranks    measured step at this tp and pp=1 / its microbatches
    slowest stage                 that, times the layers of the stage / all layers; the head counts by its weights
    step                          slowest stage x (microbatches + pp - 1)
    bubble                        (pp - 1) / (microbatches + pp - 1)
    after losses                  step / (formula / measured step of the pipelines that were run)

The last line takes in what no formula knows: messages, uneven stages, the optimizer, the host.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.workload import Workload
from hf_tpp.plan.stages import balance_stages

__all__ = ["Prediction", "efficiency_of_two_stages", "predict", "read"]

RESULTS = Path(__file__).parent / "results" / "training-h200x2-2026-11-24.json"


@dataclass(frozen=True)
class Prediction:
    """One step on tp x pp GPUs.

    Attributes:
        microbatch_ms: One microbatch on the ranks of one tp group, all layers.
        head_layers: What the head costs, in layers.
        stages: Layers per stage.
        slowest: Cost of the slowest stage, in layers.
        slowest_ms: Its time for one microbatch.
        step_ms: The step by the formula.
        bubble: Share of it that a stage waits.
    """

    microbatch_ms: float
    head_layers: float
    stages: tuple[int, ...]
    slowest: float
    slowest_ms: float
    step_ms: float
    bubble: float


def read(path: Path = RESULTS) -> dict[tuple[str, str], float]:
    """(family, contestant) -> measured milliseconds of a step."""
    results: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    return {(result["model"], result["contestant"]): result["step_seconds"] * 1e3 for result in results}


def predict(workload: Workload, microbatch_ms: float, pp: int, num_microbatches: int) -> Prediction:
    """A step of `num_microbatches` over `pp` stages, if one microbatch takes `microbatch_ms` through all of them."""
    hidden, kv = workload.hidden_size, workload.hidden_size // workload.num_heads * workload.num_kv_heads
    is_llama = workload.family == "llama"
    layer = 2 * hidden * (hidden + kv) + 3 * hidden * workload.mlp_size if is_llama else 12 * hidden * hidden
    head = hidden * workload.vocabulary
    stages = tuple(balance_stages([layer] * workload.num_layers, pp, last_cost=head))
    costs = [*map(float, stages[:-1]), stages[-1] + head / layer]
    slowest_ms = microbatch_ms * max(costs) / sum(costs)
    rounds = num_microbatches + pp - 1
    return Prediction(
        microbatch_ms, head / layer, stages, max(costs), slowest_ms, slowest_ms * rounds, (pp - 1) / rounds
    )


def efficiency_of_two_stages(measured: dict[tuple[str, str], float], family: str) -> float:
    """The formula over the measured step of PP 2 with 8 microbatches, from one GPU's time."""
    alone = measured[family, "one process, plain transformers"] / 8
    formula = predict(Workload(family=family), alone, 2, 8).step_ms
    return formula / measured[family, "pipeline parallel 2"]


def main() -> None:
    """TP 2 x PP 4 with 32 microbatches."""
    measured = read()
    efficiency = efficiency_of_two_stages(measured, "llama")
    for family in ("llama", "gpt2"):
        of_two = efficiency_of_two_stages(measured, family)
        found = predict(Workload(family=family), measured[family, "tensor parallel 2"] / 8, 4, 32)
        print(f"{family}: {found}")
        print(f"    PP 2 measured at {of_two:.3f} of the formula; expected {found.step_ms / efficiency:.0f} ms a step")


if __name__ == "__main__":
    main()
