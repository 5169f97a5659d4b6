"""What a checkpoint is, from headers alone: no tensor is read, and torch is not imported."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_tpp_conversion.files.dtypes import ITEM_SIZES
from hf_tpp_conversion.formats.checkpoint import Checkpoint
from hf_tpp_conversion.formats.detect import open_checkpoint

__all__ = ["as_text", "inspect", "report"]


def inspect(path: Path, **options: Any) -> dict[str, Any]:
    """Format, model, sizes and layout of a checkpoint as plain data.

    Args:
        path: The folder.
        **options: Of `open_checkpoint`.

    Raises:
        HfTppError: It cannot be read.
    """
    return report(open_checkpoint(path, **options))


def report(checkpoint: Checkpoint) -> dict[str, Any]:
    """The same of a checkpoint that is open."""
    groups: dict[str, dict[str, Any]] = {}
    total = {"tensors": 0, "parameters": 0, "bytes": 0}
    dtypes: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        spec = tensor.spec
        count = math.prod(spec.shape)
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + count
        group = groups.setdefault(_group(spec.name, spec.layer), {"tensors": 0, "parameters": 0, "bytes": 0})
        for sums in (group, total):
            sums["tensors"] += 1
            sums["parameters"] += count
            sums["bytes"] += count * ITEM_SIZES[tensor.dtype]
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "family": checkpoint.family,
        **total,
        "dtypes": dtypes,
        "layout": asdict(checkpoint.partition) if checkpoint.partition else None,
        "layer_spec": checkpoint.layer_spec or None,
        "model": asdict(checkpoint.model),
        "tree": groups,
        "notes": list(checkpoint.notes),
    }


def _group(name: str, layer: int | None) -> str:
    """embedding, decoder.layers.*.mlp, ...: all layers in one line."""
    parts = name.split(".")
    return ".".join(parts[:2]) if layer is None else ".".join([*parts[:2], "*", parts[3]])


def as_text(found: dict[str, Any]) -> str:
    """The report for a reader."""
    layout = found["layout"]
    lines = [
        f"{ascii(found['path'])[1:-1]}",
        f"  format      {found['format']}" + (f", {found['layer_spec']} layer spec" if found["layer_spec"] else ""),
        f"  family      {found['family'] or 'not recorded'}",
        f"  parameters  {found['parameters']:,} in {found['tensors']:,} tensors, {found['bytes']:,} bytes",
        f"  types       {', '.join(f'{name} {count:,}' for name, count in found['dtypes'].items())}",
    ]
    if layout:
        sizes = ", ".join(f"{name} {layout[name]}" for name in ("tp", "pp", "vpp", "ep"))
        lines.append(f"  layout      {sizes}" + (f", layers per chunk {layout['stages']}" if layout["stages"] else ""))
    lines.append("  tree")
    for name, sums in found["tree"].items():
        lines.append(f"    {name:<40} {sums['tensors']:>7,} tensors {sums['parameters']:>18,} parameters")
    return "\n".join(lines)
