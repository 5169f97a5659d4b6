"""The results of a run as bars, one panel a family: `python -m benchmarks.picture RESULT.json` draws RESULT.png."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = ["draw"]

OURS, OTHERS = "#1b6ca8", "#b0b0b0"
_OURS = ("tensor parallel", "tensor + sequence parallel", "pipeline parallel")


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Milliseconds of a step for every contestant, hf_tpp's coloured; one that failed is a name without a bar.

    Args:
        record: What a run wrote as JSON.
        path: The picture.
    """
    results: Sequence[dict[str, Any]] = record["results"]
    families = list(dict.fromkeys(result["model"] for result in results))
    rows = max(sum(result["model"] == family for result in results) for family in families)
    figure = Figure(figsize=(7 * len(families), 1.2 + 0.35 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for number, family in enumerate(families, start=1):
        mine = [result for result in results if result["model"] == family]
        axes = figure.add_subplot(1, len(families), number)
        times = [result.get("step_seconds", 0.0) * 1e3 for result in mine]
        colours = [OURS if result["contestant"].startswith(_OURS) else OTHERS for result in mine]
        bars = axes.barh(range(len(mine)), times, color=colours)
        labels = [f"{time:.1f}" if time else "failed or not supported" for time in times]
        axes.bar_label(bars, labels, padding=3, fontsize=8)
        axes.set_yticks(range(len(mine)), [result["contestant"] for result in mine], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.2 * max([*times, 1e-3]))
        axes.set_xlabel(f"ms a step, {record['device']}")
        axes.set_title(f"{family}, {mine[0]['workload']['num_microbatches']} microbatches")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Draw the picture of one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path)
    path = parser.parse_args().result
    draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
