"""Laying out Megatron's legacy format: the inverse of `megatron_legacy.py`."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from hf_tpp_conversion.files.dtypes import ITEM_SIZES, TORCH_NAMES, Array
from hf_tpp_conversion.files.pickle_writing import write_pickle
from hf_tpp_conversion.files.torch_tensors import storage_call
from hf_tpp_conversion.files.torch_zip_writing import ZipPlan
from hf_tpp_conversion.formats.checkpoint import Checkpoint, Piece, Plan
from hf_tpp_conversion.formats.megatron_common import MegatronOptions, iteration_of, output_args, plan_common
from hf_tpp_conversion.formats.megatron_folder import to_namespace
from hf_tpp_conversion.formats.megatron_legacy_files import RANK_FILES, rank_folder
from hf_tpp_conversion.formats.megatron_names import LINEARS, to_rank_name
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition, cut, local_shape, padded_vocabulary, place
from hf_tpp_conversion.model.tensors import HEAD, POSITIONS, WORDS, TensorSpec

__all__ = ["plan_legacy"]

_VERSION = 3.0


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor on a rank; `is_head`: the copy of a tied embedding on the last stage."""

    spec: TensorSpec
    is_head: bool = False


def plan_legacy(source: Checkpoint, options: MegatronOptions, given: Mapping[str, Any]) -> Plan:
    """Lay out the rank files for the model of `source`.

    Args:
        source: Where the tensors come from.
        options: How it is to be cut.
        given: Args of the command line.

    Raises:
        ConfigurationError: Sizes that do not fit the model.
    """
    partition, model = options.partition, source.model
    partition.check(model)
    plan = Plan(dtypes={name: options.dtype or tensor.dtype for name, tensor in source.tensors.items()})
    args = to_namespace(output_args(source, options, given), TORCH_NAMES[plan.dtypes[WORDS]])
    iteration = iteration_of(source)
    held = _held(source, partition)
    for stage, tp_rank, ep_rank in product(range(partition.pp), range(partition.tp), range(partition.ep)):
        file = f"{iteration}/{rank_folder(tp_rank, stage, ep_rank, partition)}/{RANK_FILES[0]}"
        chunks = [[entry for entry in chunk if _is_on(entry.spec, ep_rank, model, partition)] for chunk in held[stage]]
        _plan_rank(plan, file, chunks, (tp_rank, ep_rank), model, options, args)
    plan_common(plan, source, iteration)
    return plan


def _held(source: Checkpoint, partition: Partition) -> list[list[list[_Entry]]]:
    """For each stage, for each of its chunks, the tensors that it holds."""
    model = source.model
    places = place(partition, model.num_layers)
    held: list[list[list[_Entry]]] = [[[] for _ in range(partition.vpp)] for _ in range(partition.pp)]
    for tensor in source.tensors.values():
        spec = tensor.spec
        if spec.layer is not None:
            held[places[spec.layer].stage][places[spec.layer].chunk].append(_Entry(spec))
        elif spec.name in (WORDS, POSITIONS):
            held[0][0].append(_Entry(spec))
        else:
            held[-1][-1].append(_Entry(spec))
    if model.tied and partition.pp > 1:
        held[-1][-1].append(_Entry(source.tensors[WORDS].spec, is_head=True))
    return held


def _is_on(spec: TensorSpec, ep_rank: int, model: Architecture, partition: Partition) -> bool:
    if spec.expert is None or model.experts is None:
        return True
    return spec.expert * partition.ep // model.experts.num_experts == ep_rank


def _plan_rank(
    plan: Plan,
    file: str,
    chunks: list[list[_Entry]],
    rank: tuple[int, int],
    model: Architecture,
    options: MegatronOptions,
    args: Any,
) -> None:
    """Lay out one rank's file."""
    tp_rank, ep_rank = rank
    partition = options.partition
    padded = padded_vocabulary(model.vocab_size, partition)
    places = place(partition, model.num_layers)
    first_expert = ep_rank * (model.experts.num_experts // partition.ep) if model.experts else 0
    content: dict[str, Any] = {"args": args, "checkpoint_version": _VERSION, "iteration": 0}
    sizes: list[int] = []
    stored: list[tuple[str, Callable[[Array], Iterator[Array]]]] = []
    for index, entries in enumerate(chunks):
        state: OrderedDict[str, Any] = OrderedDict()
        for entry in entries:
            spec = entry.spec
            local_layer = places[spec.layer].local if spec.layer is not None else 0
            name = to_rank_name(spec, model, options.layer_spec, local_layer, first_expert, options.grouped)
            name = HEAD if entry.is_head else name
            shape = local_shape(spec, partition.tp, padded)
            dtype = plan.dtypes[spec.name]
            state[name] = storage_call(shape, dtype, str(len(sizes)))
            sizes.append(math.prod(shape) * ITEM_SIZES[dtype])
            stored.append((spec.name, _cutter(spec, tp_rank, partition.tp, padded)))
            for extra in _extra_states(name, options.layer_spec):
                state[extra] = None
        content["model" if len(chunks) == 1 else f"model{index}"] = state
    archive = ZipPlan("model_optim_rng", write_pickle(content), sizes)
    for index, (whole, cutter) in enumerate(stored):
        piece = Piece(file, archive.storage_position(index), sizes[index], cutter, len(plan.archives), index)
        plan.add(whole, piece)
    plan.archives.append((file, archive))
    plan.sizes[file] = archive.length


def _cutter(spec: TensorSpec, rank: int, tp: int, padded: int) -> Callable[[Array], Iterator[Array]]:
    return lambda whole: cut(whole, spec, rank, tp, padded)


def _extra_states(name: str, layer_spec: str) -> list[str]:
    """Entries without a value that Megatron's strict loading asks for behind a linear's weight."""
    if not name.endswith(".weight") or not any(f".{linear.split('.')[-1]}." in name for linear in LINEARS):
        return [f"{HEAD.removesuffix('weight')}_extra_state"] if name == HEAD else []
    extra = [name.removesuffix("weight") + "_extra_state"]
    if layer_spec == "te" and name.endswith("self_attention.linear_qkv.weight"):
        extra.append(name.replace("linear_qkv.weight", "core_attention._extra_state"))
    return extra
