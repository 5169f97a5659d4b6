"""Are two checkpoints the same model? Names, shapes and values, across formats, one tensor at a time."""

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from hf_tpp_conversion.convert import Conversion, convert
from hf_tpp_conversion.files.dtypes import ITEM_SIZES, cast
from hf_tpp_conversion.formats.checkpoint import Checkpoint
from hf_tpp_conversion.formats.detect import format_of, open_checkpoint

__all__ = ["compare", "compare_logits", "verify"]

_SHOWN = 20


def verify(a: Path, b: Path, progress: Callable[[int], object] | None = None, **options: Any) -> dict[str, Any]:
    """Compare two checkpoints.

    Tensors of different types are equal if the wider one, rounded to the narrower type, gives the same bits.

    Args:
        a: A folder of any format.
        b: Another.
        progress: Called with the number of bytes just compared.
        **options: Of `open_checkpoint`, for both.

    Returns:
        {"same": bool, "tensors": count, "bytes": count, "differences": first few, as text}.

    Raises:
        HfTppError: One of them cannot be read.
    """
    return compare(open_checkpoint(a, **options), open_checkpoint(b, **options), progress)


def compare(first: Checkpoint, second: Checkpoint, progress: Callable[[int], object] | None = None) -> dict[str, Any]:
    """The same of two checkpoints that are open."""
    differences = [f"the models differ in {text}" for text in first.model.differences(second.model)]
    names = [name for name in first.tensors if name in second.tensors]
    differences += [f"{name} is in one of them only" for name in first.tensors.keys() ^ second.tensors.keys()]
    num_bytes = 0
    for name in names:
        difference = _difference(name, first, second)
        differences += [difference] if difference else []
        size = int(np.prod(first.tensors[name].spec.shape)) * ITEM_SIZES[first.tensors[name].dtype]
        num_bytes += size
        if progress:
            progress(size)
    return {"same": not differences, "tensors": len(names), "bytes": num_bytes, "differences": differences[:_SHOWN]}


def _difference(name: str, a: Checkpoint, b: Checkpoint) -> str | None:
    left, right = a.tensors[name], b.tensors[name]
    if left.spec.shape != right.spec.shape:
        return f"{name} has shape {list(left.spec.shape)} and {list(right.spec.shape)}"
    narrow, wide = sorted((left, right), key=lambda tensor: ITEM_SIZES[tensor.dtype])
    values, others = narrow.read(), wide.read()
    same = np.array_equal(values, cast(others, wide.dtype, narrow.dtype)) if narrow.dtype != wide.dtype else None
    if same is None:
        same = np.array_equal(values, others)
    if same:
        return None
    if narrow.dtype != wide.dtype:
        return f"{name} has other values ({narrow.dtype} and {wide.dtype})"
    return f"{name} has other values in {int((values != others).sum())} of {values.size} places"


def compare_logits(a: Path, b: Path, tokens: int = 16, **options: Any) -> float:
    """Largest difference of the logits of both models on random tokens, computed by transformers in float32.

    Args:
        a: A folder of any format; a Megatron one is converted into a temporary folder first.
        b: Another.
        tokens: Length of the sequence.
        **options: Of `open_checkpoint`, for both.

    Returns:
        The difference; infinite if the vocabularies differ, or one has a NaN.

    Raises:
        HfTppError: One of them cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    results = []
    for path in (a, b):
        with tempfile.TemporaryDirectory() as temporary:
            folder = path
            if format_of(path) != "huggingface" or options.get("allow_bin"):
                folder = Path(temporary) / "hf"
                given, config = options.get("given") or {}, options.get("config")
                convert(
                    Conversion(path, folder, "hf", args=given, config=config, allow_bin=bool(options.get("allow_bin")))
                )
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(model.config.vocab_size, (1, tokens), generator=generator)
            with torch.no_grad():
                results.append(model(ids).logits)
    if results[0].shape != results[1].shape:
        return math.inf
    difference = float((results[0] - results[1]).abs().max())
    return math.inf if math.isnan(difference) else difference
