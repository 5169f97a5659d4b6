"""The streaming core: read one tensor of the whole model, write every piece of it, forget it."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_tpp.errors import ConfigurationError
from hf_tpp_conversion.families import FAMILIES, family_of_model
from hf_tpp_conversion.files.bands import bands
from hf_tpp_conversion.files.destination import Destination, check_target
from hf_tpp_conversion.files.dtypes import Array, carrier, cast, parse_dtype
from hf_tpp_conversion.formats.checkpoint import Checkpoint, Plan, WholeTensor
from hf_tpp_conversion.formats.detect import open_checkpoint
from hf_tpp_conversion.formats.huggingface_writing import plan_huggingface
from hf_tpp_conversion.formats.megatron_common import MegatronOptions
from hf_tpp_conversion.formats.megatron_legacy_writing import plan_legacy
from hf_tpp_conversion.formats.torch_dist_writing import plan_torch_dist
from hf_tpp_conversion.model.partition import Partition

__all__ = ["Conversion", "convert", "execute", "plan_conversion"]

Progress = Callable[[int], object]
_PAGE = 4096
_ASIDE = 0.5  # of a tensor: what some formats hold beside it while they put its parts into place


@dataclass(frozen=True, slots=True)
class Conversion:
    """What is to be done.

    Attributes:
        source: Folder of the checkpoint to read.
        target: Folder to be written; it must not exist.
        to: "hf" or "megatron".
        format: "torch_dist" or "legacy", for Megatron.
        layer_spec: "te" or "local"; None: as in the source, else "te".
        partition: How Megatron's checkpoint is cut.
        dtype: Type of the weights, such as "bf16"; None: as they are.
        family: `model_type` of the Hugging Face model; None: as recorded, else the first that fits.
        config: Folder of a config.json that describes a Megatron source.
        args: Megatron's args that the source lacks, or additional ones for the target.
        allow_bin: Read pytorch_model.bin.
        overwrite: Replace the target.
        max_shard_size: Bytes of a safetensors file at most.
    """

    source: Path
    target: Path
    to: str
    format: str = "torch_dist"
    layer_spec: str | None = None
    partition: Partition = field(default_factory=Partition)
    dtype: str | None = None
    family: str | None = None
    config: Path | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    allow_bin: bool = False
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000


def plan_conversion(job: Conversion) -> tuple[Checkpoint, Plan]:
    """Open the source, check everything that can be known, and lay out the target; nothing is written.

    Raises:
        HfTppError: What cannot be done, why, and what to do; a `ConfigurationError` among them.
        ConfigurationError: Options that contradict one another.
    """
    if job.to not in ("hf", "megatron"):
        raise ConfigurationError(f"--to {job.to!r}: use hf or megatron")
    _refuse_ignored(job)
    check_target(job.target, job.overwrite)
    if job.source.resolve() in (job.target.resolve(), *job.target.resolve().parents):
        raise ConfigurationError(f"{job.target} lies inside the source {job.source}: choose a destination beside it")
    dtype = parse_dtype(job.dtype) if job.dtype else None
    source = open_checkpoint(job.source, job.args, job.config, job.allow_bin)
    if job.to == "hf":
        family = FAMILIES.get(job.family or source.family or "")
        if family is None or job.family or source.family is None:
            family = family_of_model(source.model, job.family)
        return source, plan_huggingface(source, family, dtype, job.max_shard_size, source.args)
    layer_spec = job.layer_spec or source.layer_spec or "te"
    if layer_spec not in ("te", "local"):
        raise ConfigurationError(f"--layer-spec {layer_spec!r}: use te (Transformer Engine) or local")
    options = MegatronOptions(job.partition, layer_spec, dtype, grouped=layer_spec == "te")
    if job.format == "legacy":
        return source, plan_legacy(source, options, job.args)
    if job.format == "torch_dist":
        return source, plan_torch_dist(source, options, job.args)
    raise ConfigurationError(f"--format {job.format!r}: use torch_dist or legacy")


def _refuse_ignored(job: Conversion) -> None:
    """Refuse options that the wanted format has no use for: who passes them expects another result.

    Raises:
        ConfigurationError: There are such.
    """
    if job.to == "megatron" and job.family is not None:
        raise ConfigurationError(f"--family {job.family} is for --to hf: Megatron's checkpoints have no family")
    if job.to == "hf" and (job.partition != Partition() or job.layer_spec is not None or job.format != "torch_dist"):
        raise ConfigurationError(
            "--tp, --pp, --vpp, --ep, --stages, --divisible-by, --format and --layer-spec say how Megatron's files are "
            "to be cut, --to hf writes none (a source that does not describe its own layout is helped with --arg): "
            "leave them out"
        )


def execute(job: Conversion, source: Checkpoint, plan: Plan, progress: Progress | None = None) -> None:
    """Write what was planned. The target appears whole, or not at all.

    Args:
        job: What is to be done.
        source: The opened source.
        plan: The layout of the target.
        progress: Called with the number of bytes just written.

    Raises:
        CheckpointError: The source is damaged, or the disk is full or fails.
    """
    destination = Destination(job.target, plan.num_bytes, progress)
    with destination.open():
        for file, content in plan.small.items():
            destination.write_small(file, content)
        for file, path in plan.copies.items():
            destination.copy(file, path)
        for file, position, content in plan.parts:
            destination.write_part(file, position, content, with_sum=True)
        checksums: list[dict[int, int]] = [{} for _ in plan.archives]
        for name, tensor, whole in _read_ahead(source):
            for piece in plan.pieces[name]:
                arrays = _typed(piece.cut, whole, tensor.dtype, plan.dtypes[name], name)
                checksum = destination.write_arrays(piece.file, piece.position, arrays, piece.num_bytes)
                if piece.archive is not None:
                    checksums[piece.archive][piece.storage] = checksum
        for (file, archive), sums in zip(plan.archives, checksums, strict=True):
            for position, content in archive.frame(sums):
                destination.write_part(file, position, content)


def _read_ahead(source: Checkpoint) -> Iterator[tuple[str, WholeTensor, Array]]:
    """Tensors in order, each valid until the next; that one is being read meanwhile, where there is room for both.

    The room is twice the largest tensor, and used over and over: the kernel clears every page that it hands out, and
    with memory of its own for each tensor that would take as long as all the reading.
    """
    tensors = list(source.tensors.items())
    room = np.empty(2 * (max(tensor.num_bytes for _, tensor in tensors) + _PAGE), np.uint8)
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        held = range(0)
        reading: Future[Array] | None = None
        for index, (name, tensor) in enumerate(tensors):
            if reading is None:
                held = range(tensor.num_bytes)
                reading = pool.submit(_read, tensor, room, held)
            whole = reading.result()
            reading, before = None, held
            if index + 1 < len(tensors):
                following = tensors[index + 1][1]
                first = 0 if following.num_bytes <= before.start else -(-before.stop // _PAGE) * _PAGE
                held = range(first, first + following.num_bytes)
                if held.stop + int(_ASIDE * following.num_bytes) <= len(room):
                    reading = pool.submit(_read, following, room, held)
            yield name, tensor, whole


def _read(tensor: WholeTensor, room: Array, place: range) -> Array:
    whole = room[place.start : place.stop].view(carrier(tensor.dtype)).reshape(tensor.spec.shape)
    tensor.read_into(whole)
    return whole


def _typed(cut: Callable[[Array], Any], whole: Array, source: str, target: str, name: str) -> Any:
    """The views of a piece, cast a band at a time."""
    if source == target:
        return cut(whole)
    return (cast(band, source, target, name) for band in bands(cut(whole)))


def convert(job: Conversion, progress: Progress | None = None) -> Checkpoint:
    """Convert a checkpoint.

    Args:
        job: What is to be done.
        progress: Called with the number of bytes just written.

    Returns:
        The source, as it was opened.

    Raises:
        HfTppError: What cannot be done; nothing is left behind.
    """
    source, plan = plan_conversion(job)
    execute(job, source, plan, progress)
    return source
