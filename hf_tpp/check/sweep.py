"""Check every causal language model of the installed transformers, as `python -m hf_tpp.check.sweep`.

Each family is run at tp=2, pp=2, tp=2 x pp=2 and pp=4, as far as its layers allow. Results are written after every
family; a further call continues, and checks again what was checked with other code or other versions.
"""

import datetime
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

import typer

from hf_tpp.check.checking import Checker
from hf_tpp.check.families import FamilyKind, causal_families, kind_of
from hf_tpp.check.outcome import Layout, Outcome, Status
from hf_tpp.check.ranks import preload
from hf_tpp.check.results import FamilyResult, SweepResults, code_digest, versions
from hf_tpp.check.tiny_model import Recipe

__all__ = ["LAYOUTS", "check_family", "sweep"]

LAYOUTS = (Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(pp=4))
_NAMES = {str(layout).replace(" ", ""): layout for layout in LAYOUTS}
TIMEOUT_S = 30.0


def check_family(checker: Checker, model_type: str, layouts: Sequence[Layout] = LAYOUTS) -> FamilyResult:
    """Check one family on some layouts."""
    outcome = checker.check(model_type, Recipe(model_type), layouts)
    return FamilyResult(kind_of(model_type), outcome, code_digest(), datetime.date.today().isoformat())


def sweep(
    families: Sequence[str], jobs: int = 1, timeout: float = TIMEOUT_S, layouts: Sequence[Layout] = LAYOUTS
) -> Iterator[tuple[str, FamilyResult, float]]:
    """Check families side by side.

    Args:
        families: Their `model_type`.
        jobs: How many at a time; each takes up to 4 processes, of which about 2 compute.
        timeout: Seconds for one run of one model.
        layouts: Where to run them.

    Yields:
        Family, result and seconds, as they come in.
    """
    checkers: SimpleQueue[Checker] = SimpleQueue()

    def check(model_type: str) -> tuple[str, FamilyResult, float]:
        begin = time.monotonic()
        checker = checkers.get()
        try:
            return model_type, check_family(checker, model_type, layouts), time.monotonic() - begin
        finally:
            checkers.put(checker)

    preload("hf_tpp.check.checking")
    every = [Checker(timeout) for _ in range(jobs)]
    for checker in every:
        checkers.put(checker)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(check, model_type) for model_type in families]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for checker in every:
                checker.close()


def main(
    output: Annotated[
        Path | None, typer.Option(help="Results file; default: docs/support/transformers-VERSION.json")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Families at a time.")] = max(1, (os.cpu_count() or 1) // 2),
    again: Annotated[bool, typer.Option(help="Check again what is up to date.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds for one run of one model.")] = TIMEOUT_S,
    layouts: Annotated[str, typer.Option(help="Where to run them.")] = ",".join(_NAMES),
) -> None:
    """Check every causal language model of the installed transformers; exits with 1 if a result is wrong."""
    current = versions()
    file = output or Path(f"docs/support/transformers-{current['transformers']}.json")
    known = causal_families()
    if unknown := sorted(set(only or ()) - set(known)):
        raise typer.BadParameter(f"transformers {current['transformers']} has no causal families {', '.join(unknown)}")
    if unknown := sorted(set(layouts.split(",")) - _NAMES.keys()):
        raise typer.BadParameter(f"layouts {', '.join(unknown)}: use some of {','.join(_NAMES)}")
    chosen = [layout for name, layout in _NAMES.items() if name in layouts.split(",")]
    results = SweepResults.read(file) if file.exists() else SweepResults(current)
    if results.versions != current:
        results = SweepResults(current)
    code = code_digest()
    done = {
        name for name, result in results.families.items() if result.code == code and result.covers(chosen) and not again
    }
    todo = [name for name in (only or known) if name not in done]
    typer.echo(f"{len(todo)} families to check, {len(done)} up to date in {file}")
    for number, (name, result, seconds) in enumerate(sweep(todo, jobs, timeout, chosen), start=1):
        results.families[name] = result
        results.write(file)
        typer.echo(f"[{number}/{len(todo)}] {name:24} {seconds:6.1f} s  {_line(result.kind, result.outcome)}")
    wrong = [name for name, result in results.families.items() if result.outcome.status is Status.WRONG]
    typer.echo(f"{len(results.families)} families in {file}; wrong: {', '.join(wrong) or 'none'}")
    raise typer.Exit(bool(wrong))


def _line(kind: FamilyKind, outcome: Outcome) -> str:
    if outcome.problem:
        return f"{kind}: {outcome.problem}"
    return f"{kind}: " + ", ".join(f"{layout.layout} {layout.status}" for layout in outcome.layouts)


if __name__ == "__main__":
    typer.run(main)
