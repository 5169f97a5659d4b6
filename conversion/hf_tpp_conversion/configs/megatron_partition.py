"""How a checkpoint is cut: Megatron's args <-> `Partition`."""

import re
from collections.abc import Mapping
from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.megatron_args import WHERE, MegatronArgs
from hf_tpp_conversion.configs.settings import Settings
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition, padded_vocabulary

__all__ = ["partition_from_args", "partition_to_args"]


def partition_from_args(values: Mapping[str, Any], num_layers: int) -> Partition:
    """How the checkpoint was cut.

    Raises:
        UnsupportedModelError: In a way that is not understood.
    """
    args = MegatronArgs(values, WHERE)
    pp = args.integer("pipeline_model_parallel_size", 1)
    vpp = args.get("virtual_pipeline_model_parallel_size")
    return Partition(
        tp=args.integer("tensor_model_parallel_size", 1),
        pp=pp,
        vpp=1 if vpp is None else args.integer("virtual_pipeline_model_parallel_size"),
        ep=args.integer("expert_model_parallel_size", 1),
        divisible_by=args.integer("make_vocab_size_divisible_by", 128),
        stages=_stages(args, num_layers, pp, vpp or 1),
    )


def _stages(args: Settings, num_layers: int, pp: int, vpp: int) -> tuple[int, ...]:
    """Layers of each chunk where they are uneven, in virtual-major order; empty where they are even."""
    layout = args.get("pipeline_model_parallel_layout")
    if layout is not None:
        return _layout_counts(layout)
    first, last = args.get("decoder_first_pipeline_num_layers"), args.get("decoder_last_pipeline_num_layers")
    if first is not None or last is not None:
        ends = [value for value in (first, last) if value is not None]
        middle = pp - len(ends)
        rest = num_layers - sum(args.integer(f"decoder_{name}_pipeline_num_layers", 0) for name in ("first", "last"))
        if pp < 2 or rest < 0 or (middle and rest % middle) or (not middle and rest) or any(n % vpp for n in ends):
            raise UnsupportedModelError(f"{WHERE} have {num_layers} layers with {first} first and {last} last ones")
        stages = [rest // max(1, middle) // vpp] * middle
        stages = ([first // vpp] if first is not None else []) + stages + ([last // vpp] if last is not None else [])
        return tuple(stages * vpp)
    embedding = args.flag("account_for_embedding_in_pipeline_split")
    loss = args.flag("account_for_loss_in_pipeline_split")
    if not embedding and not loss:
        return ()
    total = num_layers + embedding + loss
    if total % (pp * vpp):
        raise UnsupportedModelError(f"{WHERE} have {total} layers, embedding and loss counted, for {pp * vpp} chunks")
    counts = [total // (pp * vpp)] * (pp * vpp)
    counts[0] -= embedding
    counts[-1] -= loss
    return tuple(counts)


def _layout_counts(layout: Any) -> tuple[int, ...]:
    """Transformer layers of each chunk of a layout such as "Ett|(ttt|)*2,tL" (commas are for the eye).

    Raises:
        UnsupportedModelError: Not such a text.
    """
    if not isinstance(layout, str) or len(layout) > 10_000:
        raise UnsupportedModelError(f"{WHERE} have pipeline_model_parallel_layout={ascii(layout)[:60]}")
    text = layout.replace(",", "").replace(" ", "")
    for pattern in (r"\(([^()]*)\)\*(\d{1,4})", r"([EtmL|])\*(\d{1,4})"):
        text = re.sub(pattern, lambda match: match[1] * int(match[2]), text)
        if len(text) > 1_000_000:
            raise UnsupportedModelError(f"{WHERE} have a layout of more than a million layers")
    if set(text) - set("EtL|"):
        raise UnsupportedModelError(f"{WHERE} have the layout {layout[:60]!r}: only E, t, L, |, ( )*n are understood")
    return tuple(chunk.count("t") for chunk in text.split("|"))


def partition_to_args(model: Architecture, partition: Partition) -> dict[str, Any]:
    """The inverse of `partition_from_args`."""
    chunks = partition.layers(model.num_layers)
    layout = None
    if partition.stages:
        texts = ["t" * len(chunks[p][v]) for v in range(partition.vpp) for p in range(partition.pp)]
        layout = "|".join(["E" + texts[0], *texts[1:]]) + "L"
    return {
        "tensor_model_parallel_size": partition.tp,
        "pipeline_model_parallel_size": partition.pp,
        "virtual_pipeline_model_parallel_size": partition.vpp if partition.vpp > 1 else None,
        "expert_model_parallel_size": partition.ep,
        "expert_tensor_parallel_size": partition.tp,
        "pipeline_model_parallel_layout": layout,
        "num_layers_per_virtual_pipeline_stage": None if layout or partition.vpp == 1 else len(chunks[0][0]),
        "make_vocab_size_divisible_by": max(1, partition.divisible_by),
        "padded_vocab_size": padded_vocabulary(model.vocab_size, partition),
        "world_size": partition.tp * partition.pp * partition.ep,
        "sequence_parallel": False,
        "context_parallel_size": 1,
    }
