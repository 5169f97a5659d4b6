"""What other versions of transformers do differently from the one of the support table, as a page for readers.

python -m hf_tpp.check.versions_table MAIN.json RESULTS.json ... > docs/support/versions.md
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from hf_tpp.check.families import FamilyKind
from hf_tpp.check.outcome import Outcome, Status
from hf_tpp.check.results import SweepResults
from hf_tpp.check.summary import SIZES, cell, note, part_status, run_status, sharded

__all__ = ["render_versions"]

SPLIT_KINDS = (FamilyKind.DECODER_ONLY, FamilyKind.COMPOSITE)
"""Kinds that can be split; the others are refused with every version."""
MIN_DIFFERENCE = 0.01
"""Of the share that is cut."""
HEADER = """# Versions of transformers

<!-- Written by `make support` from docs/support/*.json. Do not edit: `make sweep` measures, `make support` writes. -->

The same sweep as in [Supported models](../support.md), which is of transformers {main}, with other versions. Families
that are not named here are the same with all of them. The share of the block parameters that tp=2 cuts stands behind
the status; **–** is what the plain model of that version cannot do.
"""


def render_versions(main: SweepResults, others: Sequence[SweepResults]) -> str:
    """The page.

    Args:
        main: Of the version of the support table.
        others: Of further versions.

    Returns:
        Markdown.
    """
    every = sorted([main, *others], key=lambda results: Version(results.versions["transformers"]))
    outcomes = {results.versions["transformers"]: _of_splittable(results, main) for results in every}
    version = main.versions["transformers"]
    page = [HEADER.format(main=version), *_counts(every, outcomes), ""]
    page += [*_differences(outcomes, version), ""]
    for other in (name for name in outcomes if name != version):
        lacking = sorted(outcomes[version].keys() - outcomes[other].keys())
        further = sorted(outcomes[other].keys() - outcomes[version].keys())
        page += [f"## transformers {other}", ""]
        page += [f"Does not have {_names(lacking)}.", ""] if lacking else []
        page += [f"Has besides: {_names(further)}.", ""] if further else []
        page += [*_notes(outcomes[other], outcomes[version]), ""]
    return "\n".join(page)


def _of_splittable(results: SweepResults, main: SweepResults) -> dict[str, Outcome]:
    """Outcomes of the families that can be split; what a family is, the main version says best."""
    kinds = {name: result.kind for name, result in (results.families | main.families).items()}
    return {name: result.outcome for name, result in results.families.items() if kinds[name] in SPLIT_KINDS}


def _counts(every: Iterable[SweepResults], outcomes: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    header = (
        "transformers",
        "torch",
        "families",
        *(f"exact at {label}" for label in SIZES),
        "refused",
        "wrong",
        "error",
    )
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    for results in every:
        version = results.versions["transformers"]
        mine = outcomes[version].values()
        exact = [_count_exact(mine, *size) for size in SIZES.values()]
        bad = [
            sum(outcome.status is status and not outcome.problem for outcome in mine)
            for status in (Status.REFUSED, Status.WRONG, Status.ERROR)
        ]
        cells = [version, results.versions["torch"], len(mine), *exact, *bad]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, "", "Refused, wrong, error: in some part of the check."]


def _count_exact(outcomes: Iterable[Outcome], tp: int, pp: int) -> str:
    statuses = [run_status(outcome, tp, pp) for outcome in outcomes]
    return str(sum(status is Status.EXACT for status in statuses)) if any(statuses) else "not checked"


def _differences(outcomes: Mapping[str, Mapping[str, Outcome]], main: str) -> list[str]:
    names = sorted(
        name
        for name, outcome in outcomes[main].items()
        if any(_differ(outcome, of_version[name]) for of_version in outcomes.values() if name in of_version)
    )
    if not names:
        return ["All families that they share are the same with all versions."]
    lines = ["| family | " + " | ".join(outcomes) + " |", "|" + " --- |" * (len(outcomes) + 1)]
    for name in names:
        cells = [_summary(mine[name]) if name in mine else "does not exist" for mine in outcomes.values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return lines


def _differ(first: Outcome, second: Outcome) -> bool:
    """Whether they do on what was checked of both."""
    shares = [sharded(outcome) for outcome in (first, second)]
    if first.layouts and second.layouts:
        common = {layout.layout for layout in first.layouts} & {layout.layout for layout in second.layouts}
        first, second = (
            replace(outcome, layouts=[layout for layout in outcome.layouts if layout.layout in common])
            for outcome in (first, second)
        )
    if _statuses(first) != _statuses(second) or (shares[0] is None) is not (shares[1] is None):
        return True
    return abs((shares[0] or 0.0) - (shares[1] or 0.0)) >= MIN_DIFFERENCE


def _statuses(outcome: Outcome) -> str:
    """What is not exact."""
    every = {label: run_status(outcome, *size) for label, size in SIZES.items()}
    runs = {label: status for label, status in every.items() if status is not None}
    if outcome.problem or set(runs.values()) <= {Status.NONE}:
        return "–"
    if len(set(runs.values())) == 1:
        (status,) = set(runs.values())
        bad = [] if status is Status.EXACT else [cell(status)]
    else:
        bad = [f"{label} {cell(status)}" for label, status in runs.items() if status is not Status.EXACT]
    parts = {part: part_status(outcome.layouts, part) for part in ("generate", "save")}
    bad += [f"{part} {cell(status)}" for part, status in parts.items() if status not in (None, Status.EXACT)]
    return ", ".join(bad) or "exact"


def _summary(outcome: Outcome) -> str:
    share = sharded(outcome)
    return _statuses(outcome) if share is None else f"{_statuses(outcome)}, {share:.0%}"


def _notes(outcomes: Mapping[str, Outcome], main: Mapping[str, Outcome]) -> list[str]:
    """Why something is not exact that is so with the main version, or does not exist there."""
    lines = []
    for name in sorted(outcomes):
        mine, known = outcomes[name], main.get(name)
        is_exact = mine.status is Status.EXACT and not mine.problem
        if not is_exact and (known is None or _differ(mine, known)):
            lines.append(f"- `{name}`: {note(mine)}")
    return lines


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    first, *further = [SweepResults.read(Path(name)) for name in sys.argv[1:]]
    sys.stdout.write(render_versions(first, [r for r in further if r.versions != first.versions]))
