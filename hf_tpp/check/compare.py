"""Is the parallel run the plain run? Every difference that is larger than rounding, with its size.

What rounding does to a quantity is measured: the plain model runs twice, the second time from weights that are off by
their last bit. Most gradients then differ by 1e-6 of their norm; some have few digits (a decay rate, whose gradient is
a sum of terms that cancel) or none (a key bias without rotary positions has no gradient but rounding). A difference is
allowed up to 1e-4, or up to ten times what rounding did in the plain model.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hf_tpp.check.joining import Place, RankTensors, join
from hf_tpp.check.passes import Record
from hf_tpp.sharding import ShardSpec

__all__ = ["Difference", "RankRecord", "compare_records", "compare_tensors"]

LOSS_TOLERANCE = 1e-5
TENSOR_TOLERANCE = 1e-4
ROUNDINGS = 10.0
"""How many times the rounding of the plain model: a parallel run rounds in other places, and in more."""


@dataclass(frozen=True)
class Difference:
    """Something that is not equal.

    Attributes:
        part: Of `passes.PARTS`.
        what: Loss, gradient, weight, ... and its name.
        amount: Relative difference; nan if it has no size (a missing tensor).
        tolerance: What would have been allowed.
        detail: A sentence, if the numbers do not say it.
    """

    part: str
    what: str
    amount: float
    tolerance: float
    detail: str = ""

    def __str__(self) -> str:
        size = "" if math.isnan(self.amount) else f" by {self.amount:.1e} (allowed: {self.tolerance:.0e})"
        return f"{self.what} differs{size}" + (f": {self.detail}" if self.detail else "")


@dataclass
class RankRecord:
    """What one rank leaves behind.

    Attributes:
        place: The rank.
        record: Its record.
        specs: Local parameter name -> how it lies in the unsplit model.
    """

    place: Place
    record: Record
    specs: Mapping[str, ShardSpec]


def compare_records(plain: Record, ranks: Sequence[RankRecord]) -> list[Difference]:
    """Everything in which a parallel run differs from the plain one; parts with trouble are left out."""
    found: list[Difference] = []
    twin = plain.twin or plain
    for rank in ranks:
        known = {(difference.part, difference.what) for difference in found}
        differences = _of_every_rank(plain, rank)
        found += [difference for difference in differences if (difference.part, difference.what) not in known]
    for what in ("gradients", "weights"):
        tensors = [RankTensors(rank.place, getattr(rank.record, what), rank.specs) for rank in ranks]
        if getattr(plain, what) and any(rank.tensors for rank in tensors):
            joined, problems = join(tensors)
            found += [Difference("train", what, math.nan, 0.0, problem) for problem in problems]
            found += compare_tensors("train", what, joined, getattr(plain, what), getattr(twin, what))
    return found


def _of_every_rank(plain: Record, rank: RankRecord) -> list[Difference]:
    """Differences in what every rank has whole."""
    ours, found, where = rank.record, list[Difference](), f"on {rank.place}"
    if not {"parallelize", "train"} & {*plain.troubles, *ours.troubles}:
        twin = plain.twin or plain
        found += _scalars("loss", (ours.losses, plain.losses, twin.losses), LOSS_TOLERANCE, where)
        found += _scalars("gradient norm", (ours.norms, plain.norms, twin.norms), TENSOR_TOLERANCE, where)
    if ours.logits is not None and plain.logits is not None:
        twin_logits = None if plain.twin is None else plain.twin.logits  # trained before, and rounded with the weights
        found += _tensor("evaluate", "logits", ours.logits, plain.logits, twin_logits, where)
    if ours.tokens is not None and plain.tokens is not None:
        found += _tensor("generate", "tokens", ours.tokens, plain.tokens, where=where)
    return found


def _scalars(what: str, ours_plain_twin: tuple[Sequence[float], ...], tolerance: float, where: str) -> list[Difference]:
    found = []
    for step, (ours, plain, twin) in enumerate(zip(*ours_plain_twin, strict=True)):
        size = max(abs(plain), 1e-30)
        amount, allowed = abs(ours - plain) / size, max(tolerance, ROUNDINGS * abs(twin - plain) / size)
        if not amount <= allowed:  # nan is a difference, too
            found.append(Difference("train", f"{what} of step {step + 1}", amount, allowed, where))
    return found


def compare_tensors(
    part: str,
    what: str,
    ours: Mapping[str, torch.Tensor],
    theirs: Mapping[str, torch.Tensor],
    twins: Mapping[str, torch.Tensor] | None = None,
) -> list[Difference]:
    """Differences between two sets of tensors; one that is all zeros may be missing on either side.

    Args:
        part: Of `passes.PARTS`.
        what: What they are: gradients, weights.
        ours: Of the parallel model, full size.
        theirs: Of the plain model.
        twins: Of the plain model with other rounding.

    Returns:
        One difference per tensor that differs.
    """
    found = []
    for name in sorted({*ours, *theirs}):
        a, b = ours.get(name), theirs.get(name)
        if a is None or b is None:
            present = a if a is not None else b
            if present is not None and (what != "gradients" or bool(present.any())):
                side = "parallel" if a is None else "plain"
                found.append(Difference(part, f"{what} {name}", math.nan, 0.0, f"the {side} model has none"))
        else:
            found += _tensor(part, f"{what} {name}", a, b, (twins or {}).get(name, b))
    return found


def _tensor(
    part: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, twin: torch.Tensor | None = None, where: str = ""
) -> list[Difference]:
    if ours.shape != theirs.shape:
        detail = f"shape {list(ours.shape)}, plain {list(theirs.shape)} {where}".rstrip()
        return [Difference(part, what, math.nan, 0.0, detail)]
    if not theirs.is_floating_point():
        equal = torch.equal(ours, theirs)
        return [] if equal else [Difference(part, what, math.nan, 0.0, f"not the same integers {where}".rstrip())]
    size = max(float(theirs.double().norm()), 1e-30)
    amount = float((ours.double() - theirs.double()).norm()) / size
    rounding = 0.0 if twin is None else float((twin.double() - theirs.double()).norm()) / size
    allowed = max(TENSOR_TOLERANCE, ROUNDINGS * rounding)
    return [] if amount <= allowed else [Difference(part, what, amount, allowed, where)]
