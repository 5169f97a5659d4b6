"""What a table says about the outcome of one model: statuses of runs and parts, the share that is cut, and why not."""

import re
from collections.abc import Iterable

from hf_tpp.check.outcome import LayoutOutcome, Outcome, Status, worst

__all__ = ["SIZES", "cell", "note", "part_status", "plain_text", "run_status", "sharded"]

SIZES = {"tp=2": (2, 1), "pp=2": (1, 2), "pp=4": (1, 4), "tp=2 x pp=2": (2, 2)}
"""Column -> (tp, pp)."""
_MAX_NOTE = 220


def cell(status: Status | None) -> str:
    """A status as readers see it."""
    if status in (None, Status.NONE):
        return "–"
    return f"**{status}**" if status in (Status.WRONG, Status.ERROR) else str(status)


def run_status(outcome: Outcome, tp: int, pp: int) -> Status | None:
    """Training and evaluation on one layout."""
    chosen = [layout for layout in outcome.layouts if (layout.tp, layout.pp) == (tp, pp)]
    parts = [layout.parts[part].status for layout in chosen for part in ("train", "evaluate") if part in layout.parts]
    return worst(parts) if parts else None


def part_status(layouts: Iterable[LayoutOutcome], part: str) -> Status | None:
    """The worst of one part on the layouts that got there."""
    statuses = [layout.parts[part].status for layout in layouts if part in layout.parts]
    return worst(statuses) if statuses else None


def sharded(outcome: Outcome) -> float | None:
    """Share of the block parameters that tp=2 cuts."""
    return next((layout.sharded for layout in outcome.layouts if (layout.tp, layout.pp) == (2, 1)), None)


def note(outcome: Outcome) -> str:
    """Each distinct reason once, with the layouts and parts that it holds for."""
    if outcome.problem:
        return plain_text(outcome.problem)
    reasons: dict[str, dict[str, list[str]]] = {}
    for layout in outcome.layouts:
        for part, result in layout.parts.items():
            if result.status is not Status.EXACT:
                parts = reasons.setdefault(plain_text(result.reason), {})
                parts.setdefault(part, []).append(f"{layout.layout} {part}")
    every = len(outcome.layouts)
    return "; ".join(
        ", ".join(part if len(where) == every > 1 else ", ".join(where) for part, where in parts.items())
        + f": {reason}"
        for reason, parts in reasons.items()
    )


def plain_text(text: str) -> str:
    """One line without markup, addresses and process numbers, shortened at a word."""
    text = re.sub(r"\s+", " ", text).replace("|", "/").replace("<", "&lt;").replace(">", "&gt;")
    return text if len(text) <= _MAX_NOTE else text[:_MAX_NOTE].rsplit(" ", 1)[0] + " ..."
