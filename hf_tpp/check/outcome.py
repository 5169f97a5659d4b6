"""What a check found, as plain data that goes into JSON files and tables.

Outcome                one model
  LayoutOutcome        one (tp, pp)
    PartOutcome        train, evaluate, generate, save: exact, refused, wrong, error or none
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from hf_tpp.check.plan_table import PlanRow

__all__ = ["Layout", "LayoutOutcome", "Outcome", "PartOutcome", "Status", "worst"]


class Status(StrEnum):
    """How a part of a check ended, best first."""

    EXACT = "exact"
    NONE = "none"
    """The plain model cannot do it either."""
    REFUSED = "refused"
    """hf_tpp says by an error of its own that it cannot do it."""
    ERROR = "error"
    """An exception that is not hf_tpp's, a crash or a hang."""
    WRONG = "wrong"
    """It ran, and the numbers differ."""


def worst(statuses: Iterable[Status]) -> Status:
    """The worst of some statuses; NONE of none."""
    order = list(Status)
    return max(statuses, key=order.index, default=Status.NONE)


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        """Ranks that it takes."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        sizes = {"tp": self.tp, "pp": self.pp, "dp": self.dp}
        return " x ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "tp1"


@dataclass
class PartOutcome:
    """How one part ended.

    Attributes:
        status: How.
        kind: Class name of the exception, if there was one.
        reason: Its message, or what differs and by how much.
    """

    status: Status
    kind: str = ""
    reason: str = ""


@dataclass
class LayoutOutcome:
    """One model on one layout.

    Attributes:
        tp: Tensor-parallel ranks.
        pp: Stages.
        dp: Replicas.
        parts: Part -> how it ended; training alone if that did not come to an end.
        sharded: Share of the block parameters that is cut over tp; None if it did not get that far.
        plan: How modules were cut.
        seconds: Wall clock.
    """

    tp: int
    pp: int
    dp: int = 1
    parts: dict[str, PartOutcome] = field(default_factory=dict)
    sharded: float | None = None
    plan: list[PlanRow] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def layout(self) -> Layout:
        """The sizes."""
        return Layout(self.tp, self.pp, self.dp)

    @property
    def status(self) -> Status:
        """The worst status of all parts."""
        return worst(part.status for part in self.parts.values())


@dataclass
class Outcome:
    """One model.

    Attributes:
        name: What was checked.
        model_class: Class of the model; "" if it could not be built.
        num_parameters: Of the small model.
        num_layers: Of the small model.
        layouts: One per (tp, pp, dp).
        problem: Why nothing could be checked: the plain model cannot be built or trained.
    """

    name: str
    model_class: str = ""
    num_parameters: int = 0
    num_layers: int = 0
    layouts: list[LayoutOutcome] = field(default_factory=list)
    problem: str = ""

    @property
    def status(self) -> Status:
        """The worst status of all layouts."""
        return Status.ERROR if self.problem else worst(layout.status for layout in self.layouts)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Outcome":
        """The inverse of `to_json`."""
        layouts = [
            LayoutOutcome(
                **{
                    **entry,
                    "parts": {
                        k: PartOutcome(**{**v, "status": Status(v["status"])}) for k, v in entry["parts"].items()
                    },
                    "plan": [PlanRow(**row) for row in entry["plan"]],
                }
            )
            for entry in values["layouts"]
        ]
        return cls(**{**values, "layouts": layouts})
