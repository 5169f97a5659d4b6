"""Rows of the name tables: one line per tensor, read in both directions.

A row gives Megatron's name, Hugging Face's names, and how the bits lie: `{layer}` and `{expert}` stand for numbers.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.layouts import SAME, Transform
from hf_tpp_conversion.model.tensors import TensorSpec

__all__ = ["NameTable", "Row", "fused_expert_names", "linear", "norm"]

_LAYER = re.compile(r"^decoder\.layers\.\d+\.")
_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of Megatron and the tensors of Hugging Face that it is made of.

    Attributes:
        megatron: Its name.
        hf: Their names.
        transform: How it is made of them.
    """

    megatron: str
    hf: tuple[str, ...]
    transform: Transform = SAME


def linear(
    megatron: str, hf: str | Sequence[str], transform: Transform = SAME, bias: Transform | None = None
) -> list[Row]:
    """The rows of a linear: its weight, and its bias where the model has one."""
    names = (hf,) if isinstance(hf, str) else tuple(hf)
    return [
        Row(f"{megatron}.weight", tuple(f"{name}.weight" for name in names), transform),
        Row(f"{megatron}.bias", tuple(f"{name}.bias" for name in names), bias or transform),
    ]


def norm(megatron: str, hf: str) -> list[Row]:
    """The rows of a norm: its weight, and its bias where the model has one."""
    return linear(megatron, hf)


def fused_expert_names(spec: TensorSpec) -> tuple[str, ...]:
    """What the tensor that holds this one of every expert may be called: transformers 5 keeps them so in memory.

    `gate_up_proj` [experts, 2 neurons, hidden] and `down_proj` [experts, hidden, neurons] are Megatron's linear_fc1 and
    linear_fc2, stacked.

    Args:
        spec: A tensor of the whole model.

    Returns:
        The names; none for a tensor of no expert.
    """
    if spec.expert is None:
        return ()
    kind = "gate_up_proj" if ".linear_fc1." in spec.name else "down_proj"
    return tuple(f"model.layers.{spec.layer}.{block}.experts.{kind}" for block in ("mlp", "block_sparse_moe"))


class NameTable:
    """All rows of a family.

    Args:
        rows: The rows.
        base: Prefix of the decoder in Hugging Face's names, which some files leave out ("transformer.").
        ignored: Regular expressions of tensors in files that hold no weights (masks, rotary tables).
    """

    def __init__(self, rows: Sequence[Row], base: str = "", ignored: Sequence[str] = ()) -> None:
        self.base, self.ignored = base, tuple(ignored)
        self._rows = {row.megatron: row for row in rows}
        assert len(self._rows) == len(rows), "a tensor of Megatron has two rows"

    def row(self, spec: TensorSpec) -> Row:
        """The row of a tensor, its numbers filled in.

        Raises:
            UnsupportedModelError: The family has no such tensor.
        """
        pattern = _EXPERT.sub(".experts.{expert}.", _LAYER.sub("decoder.layers.{layer}.", spec.name))
        row = self._rows.get(pattern)
        if row is None:
            raise UnsupportedModelError(f"this family of models has no place for Megatron's {spec.name}")
        names = tuple(name.format(layer=spec.layer, expert=spec.expert) for name in row.hf)
        return Row(spec.name, names, row.transform)

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor of a file holds no weights."""
        return any(re.search(pattern, name) for pattern in self.ignored)
