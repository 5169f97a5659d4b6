"""The results of a sweep as a page for readers.

python -m hf_tpp.check.support_table RESULTS.json > docs/support.md
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from hf_tpp.check.families import FamilyKind
from hf_tpp.check.outcome import Outcome, Status
from hf_tpp.check.results import FamilyResult, SweepResults
from hf_tpp.check.summary import SIZES, cell, note, part_status, run_status, sharded

__all__ = ["render"]

HEADER = """# Supported models

<!-- Written by `make support` from {file}. Do not edit: `make sweep` measures, `make support` writes. -->

Every causal language model of transformers {transformers} (torch {torch}), small, on CPU processes: two steps of
training on a padded batch (loss to 1e-5, every gradient, the gradient norm and the weights to 1e-4, relative), logits,
greedy generation with a cache, and `save_pretrained` reloaded by plain transformers, each against one process.

- **exact**: equal to one process.
- **refused**: `parallelize`, or the call, says so by an error of `hf_tpp.errors`, on every rank.
- **wrong**, **error**: a defect; see the note.
- **–**: not reached, or not possible with the plain model either.
- **sharded**: share of the parameters of the blocks that tp=2 cuts; the others are replicated, which is exact, too.

[What other versions of transformers do differently](support/versions.md).
"""
COLUMNS = ("family", *SIZES, "sharded", "generate", "save", "note")


def render(results: SweepResults, file: str) -> str:
    """The page.

    Args:
        results: Of a sweep.
        file: Where they are, for the reader.

    Returns:
        Markdown.
    """
    page = [HEADER.format(file=file, **results.versions)]
    for kind in FamilyKind:
        members = {name: result for name, result in results.families.items() if result.kind is kind}
        if members:
            page += [f"## {kind.capitalize()} ({len(members)})", "", *_counts(members.values()), ""]
            page += ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
            page += [_row(name, members[name].outcome) for name in sorted(members)] + [""]
    return "\n".join(page)


def _counts(results: Iterable[FamilyResult]) -> list[str]:
    outcomes = [result.outcome for result in results]
    exact = [
        f"{sum(run_status(outcome, *size) is Status.EXACT for outcome in outcomes)} at {label}"
        for label, size in SIZES.items()
    ]
    shares = [sharded(outcome) or 0.0 for outcome in outcomes]
    cut = [f"{sum(share >= least for share in shares)} shard at least {least:.0%}" for least in (0.9, 0.7)]
    bad = [
        f"{sum(outcome.status is status for outcome in outcomes)} {status}"
        for status in (Status.REFUSED, Status.WRONG, Status.ERROR)
    ]
    return [f"Exact: {', '.join(exact)}. Of the block parameters {', '.join(cut)}. In some part {', '.join(bad)}."]


def _row(name: str, outcome: Outcome) -> str:
    if outcome.problem:
        return "| " + " | ".join([f"`{name}`", *["–"] * 7, note(outcome)]) + " |"
    share = sharded(outcome)
    cells = [f"`{name}`", *(cell(run_status(outcome, *size)) for size in SIZES.values())]
    cells += ["–" if share is None else f"{share:.0%}"]
    cells += [cell(part_status(outcome.layouts, part)) for part in ("generate", "save")]
    return "| " + " | ".join([*cells, note(outcome)]) + " |"


if __name__ == "__main__":
    source = Path(sys.argv[1])
    sys.stdout.write(render(SweepResults.read(source), source.as_posix()))
