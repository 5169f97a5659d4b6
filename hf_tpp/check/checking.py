"""Check one model after the other: plain once, then parallel on every layout, in local processes.

    with Checker() as checker:
        outcome = checker.check("llama", Recipe("llama"), [Layout(tp=2), Layout(pp=2)])

The plain run, the parallel runs and the reloading of what they saved all happen in processes of their own: a model that
crashes or hangs is an outcome of its check and nothing else.
"""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

import hf_tpp
from hf_tpp.check.compare import Difference, RankRecord, compare_records, compare_tensors
from hf_tpp.check.joining import Place
from hf_tpp.check.outcome import Layout, LayoutOutcome, Outcome, PartOutcome, Status
from hf_tpp.check.passes import PARTS, Record, Trouble, read_checkpoint, record_run, record_twin, reload_checkpoint
from hf_tpp.check.plan_table import PlanRow, merge_rows, plan_rows, sharded_share
from hf_tpp.check.ranks import RankError, World
from hf_tpp.check.shrink import num_layers
from hf_tpp.check.tiny_model import Recipe, build_config, build_model, quiet
from hf_tpp.parallel_model import parallel_state
from hf_tpp.parts import ModelParts

__all__ = ["Checker"]

TIMEOUT_S = 60.0
MAX_DIFFERENCES = 5


@dataclass
class PlainRun:
    """What the plain model left behind.

    Attributes:
        record: Its record.
        model_class: Class name.
        num_parameters: All of them.
        num_layers: Blocks.
    """

    record: Record
    model_class: str
    num_parameters: int
    num_layers: int


@dataclass
class Saved:
    """A saved checkpoint: the tensors in its files, and the parameters that plain transformers loads from them."""

    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    reloaded: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class ParallelRun:
    """What one rank leaves behind.

    Attributes:
        rank: Its record.
        plan: How the modules of its stage were cut.
        blocks: Name of the list of blocks.
    """

    rank: RankRecord
    plan: list[PlanRow] = field(default_factory=list)
    blocks: str = ""


def run_plain(recipe: Recipe, folder: Path) -> PlainRun:
    """Body of the process of the plain model."""
    with quiet():
        model = build_model(recipe)
        size = sum(parameter.numel() for parameter in model.parameters())
        layers = num_layers(model.config)  # type: ignore[arg-type]
        record = record_run(model, folder)
        if "train" not in record.troubles:
            record.twin = record_twin(build_model(recipe), evaluates=record.logits is not None)
        return PlainRun(record, type(model).__name__, size, layers)


def run_parallel(recipe: Recipe, layout: Layout, folder: Path, parts: tuple[str, ...]) -> ParallelRun:
    """Body of a rank."""
    with quiet():
        model = build_model(recipe)
        try:
            blocks = ModelParts.find(model).blocks
            model = hf_tpp.parallelize(model, tp=layout.tp, pp=layout.pp, verbose=False)
        except Exception as error:
            return ParallelRun(RankRecord(Place(), Record(troubles={"parallelize": Trouble.of(error)}), {}))
        state = parallel_state(model)
        assert state is not None
        place = Place(state.mesh.pp.rank, state.mesh.dp.rank, state.mesh.tp.rank)
        plan = plan_rows(model, state.specs)
        record = record_run(model, folder, parts, (state.mesh.dp.rank, state.mesh.dp.size))
        return ParallelRun(RankRecord(place, record, dict(state.specs)), plan, blocks)


def load_saved(recipe: Recipe, folder: Path) -> Saved:
    """Body of the process that looks at a saved checkpoint."""
    with quiet():
        reloaded = reload_checkpoint(build_config(recipe), folder, recipe.trust_remote_code)
        return Saved(read_checkpoint(folder), reloaded)


class Checker:
    """Runs checks; keeps the processes of every world size for the next one.

    Args:
        timeout: Seconds for one run of one model.
        run_parallel: What each rank runs; the tests of the checks put faults around it.
    """

    def __init__(self, timeout: float = TIMEOUT_S, run_parallel: Callable[..., ParallelRun] = run_parallel) -> None:
        self._timeout = timeout
        self.run_parallel = run_parallel
        self._plain = World(1, init=False)
        self._worlds: dict[int, World] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop all processes; a further check would start new ones."""
        for world in (self._plain, *self._worlds.values()):
            world.close()

    def check(self, name: str, recipe: Recipe, layouts: Sequence[Layout]) -> Outcome:
        """Check one model.

        Args:
            name: For the outcome.
            recipe: What to build.
            layouts: Where to run it; each needs tp x pp local processes.

        Returns:
            The outcome. Whatever goes wrong with the model is in it, not raised.
        """
        with tempfile.TemporaryDirectory(prefix="check-") as name_of_folder:
            folder = Path(name_of_folder)
            try:
                (plain,) = self._plain.run(run_plain, recipe, folder / "plain", timeout=self._timeout)
            except RankError as error:
                return Outcome(name, problem=f"the plain model: {error.summary}")
            outcome = Outcome(name, plain.model_class, plain.num_parameters, plain.num_layers)
            if "train" in plain.record.troubles:  # so there is nothing to compare, but it may be refused
                plain.record.troubles = dict.fromkeys(PARTS, plain.record.troubles["train"])
            expected = self._load(recipe, folder / "plain", plain.record)
            for layout in layouts:
                begin = time.monotonic()
                result = self._check_layout(recipe, layout, plain.record, expected, folder / str(layout))
                result.seconds = round(time.monotonic() - begin, 2)
                outcome.layouts.append(result)
            return outcome

    def _load(self, recipe: Recipe, folder: Path, record: Record) -> Saved:
        """What was saved; if plain transformers cannot reload it, that is a trouble of `record`."""
        if "save" in record.troubles:
            return Saved()
        try:
            (saved,) = self._plain.run(load_saved, recipe, folder, timeout=self._timeout)
        except RankError as error:
            record.troubles["save"] = Trouble(False, "RankError", f"reloading: {error.summary}")
            return Saved()
        return saved  # type: ignore[no-any-return]

    def _check_layout(
        self, recipe: Recipe, layout: Layout, plain: Record, expected: Saved, folder: Path
    ) -> LayoutOutcome:
        result = LayoutOutcome(layout.tp, layout.pp, layout.dp)
        parts = tuple(part for part in PARTS if part not in plain.troubles)
        result.parts = {part: _of_plain(plain.troubles[part]) for part in PARTS if part in plain.troubles}
        world = self._worlds.setdefault(layout.world_size, World(layout.world_size))
        try:
            runs = world.run(self.run_parallel, recipe, layout, folder, parts, timeout=self._timeout)
        except RankError as error:
            kind = next(iter(error.types.values()), "RankError")
            result.parts = {"train": PartOutcome(Status.ERROR, kind, error.summary)}
            return result
        ranks = [run.rank for run in runs]
        result.plan = merge_rows(run.plan for run in runs)
        if layout.tp > 1 and any(rank.specs for rank in ranks):
            result.sharded = round(sharded_share((s for r in ranks for s in r.specs.values()), runs[0].blocks), 4)
        differences = compare_records(plain, ranks)
        troubles = _first_causes(ranks)
        reached = [part for part in parts if part in troubles or all(part in rank.record.finished for rank in ranks)]
        if "save" in reached and not troubles.keys() & {"parallelize", "train", "save"}:
            found = Record()
            differences += _compare_saved(self._load(recipe, folder, found), expected)
            troubles |= found.troubles
        if ended := {"parallelize", "train"} & troubles.keys():
            trouble = troubles[ended.pop()]
            result.parts = {"train": PartOutcome(_status(trouble), trouble.kind, trouble.message)}
            return result
        for part in reached:
            result.parts[part] = _part_outcome(part, troubles.get(part), differences)
        return result


def _first_causes(ranks: Sequence[RankRecord]) -> dict[str, Trouble]:
    """Part -> trouble; of the ranks' troubles the one that is not just another rank's absence."""
    found: dict[str, Trouble] = {}
    for rank in ranks:
        for part, trouble in rank.record.troubles.items():
            if part not in found or found[part].follows:
                found[part] = trouble
    return found


def _compare_saved(ours: Saved, theirs: Saved) -> list[Difference]:
    if not ours.stored:
        return [Difference("save", "the checkpoint", math.nan, 0.0, "it holds no tensors")]
    found = compare_tensors("save", "reloaded", ours.reloaded, theirs.reloaded)
    return found + compare_tensors("save", "stored", ours.stored, theirs.stored)


def _part_outcome(part: str, trouble: Trouble | None, differences: list[Difference]) -> PartOutcome:
    """A difference outweighs a trouble."""
    own = [difference for difference in differences if difference.part == part]
    if own:
        more = f"; and {len(own) - MAX_DIFFERENCES} more" if len(own) > MAX_DIFFERENCES else ""
        return PartOutcome(Status.WRONG, "", "; ".join(map(str, own[:MAX_DIFFERENCES])) + more)
    if trouble is None:
        return PartOutcome(Status.EXACT)
    return PartOutcome(_status(trouble), trouble.kind, trouble.message)


def _status(trouble: Trouble) -> Status:
    return Status.REFUSED if trouble.refused else Status.ERROR


def _of_plain(trouble: Trouble) -> PartOutcome:
    return PartOutcome(Status.NONE, trouble.kind, f"the plain model: {trouble.message}")
