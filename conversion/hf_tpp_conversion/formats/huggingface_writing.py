"""Laying out a Hugging Face folder: the inverse of `huggingface.py`."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hf_tpp_conversion.families import Family
from hf_tpp_conversion.files.dtypes import ITEM_SIZES, TORCH_NAMES, Array
from hf_tpp_conversion.files.json_reading import read_json
from hf_tpp_conversion.files.safetensors import plan_safetensors
from hf_tpp_conversion.formats.checkpoint import Checkpoint, Piece, Plan
from hf_tpp_conversion.formats.huggingface_files import INDEX, MEGATRON_ARGS, SINGLE
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.tensors import WORDS
from hf_tpp_conversion.names import Row

__all__ = ["plan_huggingface"]


def plan_huggingface(
    source: Checkpoint, family: Family, dtype: str | None, max_shard_size: int, args: Mapping[str, Any]
) -> Plan:
    """Lay out a folder for the model of `source`.

    Args:
        source: Where the tensors come from.
        family: What it becomes.
        dtype: Type of the weights; None: as they are.
        max_shard_size: Bytes of a file of weights at most, unless one tensor is larger.
        args: Megatron's args to keep beside it, plain values.
    """
    plan = Plan()
    model = source.model
    entries: list[tuple[str, str, tuple[int, ...], str, Callable[[Array], Iterator[Array]]]] = []
    for name, tensor in source.tensors.items():
        target = dtype or tensor.dtype
        plan.dtypes[name] = target
        row = family.table.row(tensor.spec)
        for part, shape in enumerate(row.transform.part_shapes(tensor.spec.shape, model)):
            entries.append((row.hf[part], name, shape, target, _splitter(row, part, model)))
    files: list[list[Any]] = [[]]
    size = 0
    for entry in entries:
        num_bytes = math.prod(entry[2]) * ITEM_SIZES[entry[3]]
        if files[-1] and size + num_bytes > max_shard_size:
            files.append([])
            size = 0
        files[-1].append(entry)
        size += num_bytes
    weight_map, total = {}, 0
    for number, members in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        front, positions, plan.sizes[file] = plan_safetensors(
            {key: (shape, kind) for key, _, shape, kind, _ in members}
        )
        plan.parts.append((file, 0, front))
        for key, name, shape, kind, splitter in members:
            num_bytes = math.prod(shape) * ITEM_SIZES[kind]
            plan.add(name, Piece(file, positions[key], num_bytes, splitter))
            weight_map[key] = file
            total += num_bytes
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        plan.small[INDEX] = (json.dumps(index, indent=2) + "\n").encode()
    _plan_side_files(plan, source, family, args)
    return plan


def _splitter(row: Row, part: int, model: Architecture) -> Callable[[Array], Iterator[Array]]:
    return lambda whole: iter(row.transform.split(whole, part, model))


def _plan_side_files(plan: Plan, source: Checkpoint, family: Family, args: Mapping[str, Any]) -> None:
    """config.json (the original one where it is kept and of the same family), tokenizer files, Megatron's args."""
    plan.copies = {name: path for name, path in source.hf_files.items() if name != "config.json"}
    dtype = plan.dtypes[WORDS]
    config = family.config(source.model, TORCH_NAMES[dtype])
    if "config.json" in source.hf_files and source.family == family.model_type:
        kept = read_json(source.hf_files["config.json"])
        original = source.tensors[WORDS].dtype
        if dtype == original:
            plan.copies["config.json"] = source.hf_files["config.json"]
            config = {}
        else:
            config = kept | {key: TORCH_NAMES[dtype] for key in ("dtype", "torch_dtype") if key in kept}
    if config:
        plan.small["config.json"] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    if args:
        plan.small[MEGATRON_ARGS] = (json.dumps(dict(args), indent=1, sort_keys=True) + "\n").encode()
