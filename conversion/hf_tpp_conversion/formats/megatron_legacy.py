"""Megatron's legacy format: one model_optim_rng.pt per (tensor, pipeline, expert) rank.

    release/mp_rank_00/                tp rank 0                        pp = ep = 1
    release/mp_rank_00_001/            tp rank 0, pipeline stage 1      pp > 1
    release/mp_rank_00_001_003/        ... expert-parallel rank 3       ep > 1
    release/mp_rank_00_003/            tp rank 0, expert-parallel rank 3: only the args tell it from a stage

Each file holds {"args", "checkpoint_version", "iteration", "model": {name: tensor}}; with virtual pipeline stages there
are "model0", "model1", ... Optimizer and random state are left behind: they cannot be re-cut without Megatron.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_tpp.errors import UnsupportedModelError
from hf_tpp_conversion.configs.megatron_partition import partition_from_args
from hf_tpp_conversion.formats.checkpoint import Checkpoint
from hf_tpp_conversion.formats.megatron_common import describe
from hf_tpp_conversion.formats.megatron_folder import find_iteration
from hf_tpp_conversion.formats.megatron_legacy_files import RANK_FOLDER, list_ranks, read_rank_args
from hf_tpp_conversion.formats.megatron_legacy_ranks import Ranks
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition
from hf_tpp_conversion.model.tensors import tensor_specs

__all__ = ["open_legacy"]


def open_legacy(
    path: Path, given: Mapping[str, Any] | None = None, config: Path | None = None, layout: Partition | None = None
) -> Checkpoint:
    """Open a checkpoint: everything is checked but the values.

    Args:
        path: The folder, or its iteration.
        given: Args of the command line, for those that the checkpoint lacks.
        config: A config.json for a checkpoint that does not describe itself.
        layout: How it is cut, if the args do not say.

    Raises:
        CheckpointError: Files that are damaged, missing, hostile, or do not hold what the args say.
        UnsupportedModelError: No model that can be converted.
    """
    folder = find_iteration(path)
    root = path if folder != path else folder.parent
    files = list_ranks(folder)
    args, first = read_rank_args(files[0])
    found = describe(root, args, given or {}, config)
    partition = layout or _partition(found.args, found.model, files, first)
    version = first.get("checkpoint_version", 0)
    ranks = Ranks(folder, found.model, partition, float(version) if isinstance(version, (int, float)) else 0.0, root)
    specs = tensor_specs(found.model)
    tensors = {name: ranks.whole(spec) for name, spec in specs.items()}
    ranks.refuse_leftovers(specs)
    return Checkpoint(
        "legacy", folder, found.model, tensors, partition, ranks.layer_spec, found.family, found.args, found.hf_files
    )


def _partition(args: dict[str, Any], model: Architecture, files: list[Path], first: dict[str, Any]) -> Partition:
    """How the checkpoint is cut: by its args; sizes that they lack follow from the names of the folders."""
    matches = [match for file in files if (match := RANK_FOLDER.fullmatch(file.parent.name))]
    seen = {
        "tensor_model_parallel_size": 1 + max(int(match[1]) for match in matches),
        "pipeline_model_parallel_size": 1 + max(int(match[2] or 0) for match in matches),
    }
    if "model0" in first:
        seen["virtual_pipeline_model_parallel_size"] = sum(
            re.fullmatch(r"model\d+", str(key)) is not None for key in first
        )
    partition = partition_from_args(seen | {k: v for k, v in args.items() if v is not None}, model.num_layers)
    experts_tp = args.get("expert_tensor_parallel_size")
    if model.experts is not None and experts_tp not in (None, partition.tp):
        raise UnsupportedModelError(
            f"{files[0]}: experts are cut over {experts_tp} tensor-parallel ranks, layers over {partition.tp}: the "
            f"legacy format is converted where both are cut alike; save it as torch_dist, which is read at any layout"
        )
    return partition
