"""The file that a sweep leaves behind: versions, and one outcome per family.

{"versions": {"transformers": "5.23.0", ...}, "families": {"llama": {"kind": ..., "code": ..., "outcome": {...}}, ...}}
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_tpp.check.families import FamilyKind
from hf_tpp.check.outcome import Layout, Outcome

__all__ = ["FamilyResult", "SweepResults", "code_digest", "versions"]

PACKAGE = Path(__file__).parents[1]
_NOT_MEASURED = ("check", "cli.py")


@dataclass
class FamilyResult:
    """What a sweep found out about one family.

    Attributes:
        kind: What the family is.
        outcome: How the checks ended.
        code: `code_digest()` of the package that was checked.
        date: Day of the check, as 2026-01-31.
    """

    kind: FamilyKind
    outcome: Outcome
    code: str
    date: str

    def covers(self, layouts: Iterable[Layout]) -> bool:
        """Whether the family was checked on all of `layouts`, or cannot be checked at all."""
        return bool(self.outcome.problem) or set(layouts) <= {layout.layout for layout in self.outcome.layouts}


@dataclass
class SweepResults:
    """All results for one set of versions.

    Attributes:
        versions: Package -> version.
        families: model_type -> result.
    """

    versions: dict[str, str]
    families: dict[str, FamilyResult] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "SweepResults":
        """Read a file that `write` wrote."""
        values = json.loads(file.read_text())
        families = {
            name: FamilyResult(
                FamilyKind(entry["kind"]), Outcome.from_json(entry["outcome"]), entry["code"], entry["date"]
            )
            for name, entry in values["families"].items()
        }
        return cls(values["versions"], families)

    def write(self, file: Path) -> None:
        """Write the results, families in order of their names; a reader never sees half a file."""
        families = {name: self._entry(self.families[name]) for name in sorted(self.families)}
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".partial")
        beside.write_text(json.dumps({"versions": self.versions, "families": families}, indent=1) + "\n")
        os.replace(beside, file)  # noqa: PTH105

    @staticmethod
    def _entry(result: FamilyResult) -> dict[str, Any]:
        outcome = result.outcome.to_json()
        for layout in outcome["layouts"]:
            layout["plan"] = []  # `hf-tpp check` prints it; here it would be most of the file
        return {"kind": result.kind, "code": result.code, "date": result.date, "outcome": outcome}


def versions() -> dict[str, str]:
    """What the results of a sweep depend on, besides the code of this package."""
    packages = {name: metadata.version(name) for name in ("torch", "transformers")}
    return {**packages, "python": platform.python_version()}


def code_digest(package: Path = PACKAGE) -> str:
    """A digest of the modules that are checked; the checks themselves are left out."""
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        if file.relative_to(package).parts[0] not in _NOT_MEASURED:
            digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
