"""What the command `hf-tpp check` does: one model on a few layouts, and tables or JSON of the outcome."""

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table
from transformers import CONFIG_MAPPING

from hf_tpp.check.checking import Checker
from hf_tpp.check.outcome import Layout, Outcome, Status
from hf_tpp.check.passes import PARTS
from hf_tpp.check.ranks import preload
from hf_tpp.check.tiny_model import Recipe, build_config, quiet

__all__ = ["run_check"]

BAD_INPUT = 2


def run_check(
    model: str, tp: int, pp: int, tiny_config: Path | None, trust_remote_code: bool, as_json: bool, timeout: float
) -> None:
    """Check one model and print the outcome; the arguments are those of the command.

    Raises:
        typer.Exit: With 0 if the model is exact, 1 if it is refused or wrong, 2 if it cannot be read or run.
        typer.BadParameter: Nothing to split.
    """
    recipe = _recipe(model, tiny_config, trust_remote_code)
    layouts = list(dict.fromkeys([Layout(tp, 1), Layout(1, pp), Layout(tp, pp)]))
    layouts = [layout for layout in layouts if layout.world_size > 1]
    if not layouts:
        raise typer.BadParameter("tp=1 and pp=1 split nothing: use --tp 2, --pp 2 or both")
    preload("hf_tpp.check.checking")
    with Checker(timeout) as checker:
        outcome = checker.check(model, recipe, layouts)
    if as_json:
        typer.echo(json.dumps(outcome.to_json(), indent=2))
    else:
        _print_outcome(outcome)
    if outcome.problem:
        raise typer.Exit(BAD_INPUT)
    raise typer.Exit(int(outcome.status not in (Status.EXACT, Status.NONE)))


def _recipe(model: str, tiny_config: Path | None, trust_remote_code: bool) -> Recipe:
    """What to build; exits with 2 if it cannot be read."""
    try:
        values = None if tiny_config is None else json.loads(tiny_config.read_text())
        is_family = model in CONFIG_MAPPING and not Path(model).exists()
        source = "" if is_family else model
        recipe = Recipe(model if is_family else "", source, values, trust_remote_code)
        with quiet():
            build_config(recipe)
    except Exception as error:  # transformers raises whatever its configurations raise
        first = str(error).strip().split("\n", maxsplit=1)[0]
        typer.echo(
            f"hf-tpp check: cannot read {model!r} ({type(error).__name__}: {first}). "
            "Give a model_type of transformers, a folder or file with a configuration, or a hub name; "
            "--trust-remote-code if the model brings code of its own",
            err=True,
        )
        raise typer.Exit(BAD_INPUT) from error
    return recipe


def _print_outcome(outcome: Outcome) -> None:
    console = Console()
    if outcome.problem:
        console.print(f"{outcome.name}: {outcome.problem}", style="red", markup=False)
        return
    size = f"{outcome.num_parameters:,} parameters, {outcome.num_layers} layers"
    table = Table(title=f"{outcome.model_class}, shrunk to {size}")
    for column in ("layout", *PARTS, "sharded"):
        table.add_column(column)
    for layout in outcome.layouts:
        parts = [layout.parts.get(part) for part in PARTS]
        share = "" if layout.sharded is None else f"{layout.sharded:.0%}"
        table.add_row(str(layout.layout), *(str(part.status) if part else "" for part in parts), share)
    console.print(table)
    for layout in outcome.layouts:
        for name, part in layout.parts.items():
            if part.reason:
                console.print(f"{layout.layout} {name}: {part.kind} {part.reason}", markup=False)
    plan = max((layout.plan for layout in outcome.layouts), key=len, default=[])
    if plan:
        rows = Table(title="plan")
        for column in ("module", "cut", "layout"):
            rows.add_column(column)
        for row in plan:
            cut = f"{row.cut} (by {row.found_by})" if row.found_by in ("plan", "probe") else row.cut
            rows.add_row(row.module, cut, row.layout.replace("[", r"\["))
        console.print(rows)
