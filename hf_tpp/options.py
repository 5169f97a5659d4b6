"""What the user asked of `parallelize`: the defaults of this machine, and what is refused before anything changes."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_tpp.compilation import AUTOMATIC, compile_options
from hf_tpp.cuda_graphs import check_recordable
from hf_tpp.data_parallel import DATA_PARALLEL, check_shardable
from hf_tpp.errors import AlreadyParallelError, ConfigurationError
from hf_tpp.integrations import check_classes
from hf_tpp.mesh import check_world
from hf_tpp.parallel_model import parallel_state
from hf_tpp.pipeline_parallel.lanes import check_overlap
from hf_tpp.pipeline_parallel.loss_note import counts_tokens

__all__ = ["World", "check_options", "with_defaults"]


@dataclass(frozen=True, slots=True)
class World:
    """Where the model will run.

    Attributes:
        device_type: Of every rank: "cuda" or "cpu".
        tp: Tensor-parallel ranks.
        pp: Stages.
        size: All processes.
    """

    device_type: str
    tp: int
    pp: int
    size: int


def with_defaults(options: Mapping[str, Any], world: World) -> dict[str, Any]:
    """`options` with what is known to be fastest in place of None.

    Blocks are compiled on GPUs; not on a CPU, where training is tried out, nor for a single process, whose model stays
    as it is.
    """
    compiles = world.device_type == "cuda" and world.size > 1 and importlib.util.find_spec("triton") is not None
    defaults = {"compile": AUTOMATIC if compiles else False}
    return {**options, **{name: default for name, default in defaults.items() if options[name] is None}}


def check_options(model: nn.Module, options: Mapping[str, Any], world: World) -> None:
    """Refuse what cannot work.

    Args:
        model: The model; nothing is changed.
        options: Of `parallelize`, with defaults.
        world: Where it will run.

    Raises:
        AlreadyParallelError: The model is parallel already.
        ConfigurationError: Sizes or switches that cannot work, alone or together.
    """
    num_microbatches, data_parallel = options["num_microbatches"], options["data_parallel"]
    if parallel_state(model) is not None:
        raise AlreadyParallelError(
            f"this {type(model).__name__} is parallel already: call parallelize() once, on a freshly loaded model"
        )
    if num_microbatches is not None and (not isinstance(num_microbatches, int) or num_microbatches < 1):
        raise ConfigurationError(f"num_microbatches={num_microbatches!r}: use a positive whole number, or None")
    if data_parallel not in DATA_PARALLEL:
        raise ConfigurationError(f"data_parallel={data_parallel!r}: use {' or '.join(map(repr, DATA_PARALLEL))}")
    compile_options(options["compile"])
    dp_size = check_world(world.size, world.tp, world.pp)
    if options["overlap_microbatches"]:
        check_overlap(world.tp, world.pp, data_parallel)
    if options["cuda_graphs"]:
        check_recordable(world.device_type, data_parallel)
    if dp_size > 1 and data_parallel == "fully_shard":
        check_shardable(model)
    if options["patch"]:
        check_classes()
    _check_loss(model, num_microbatches, dp_size)


def _check_loss(model: nn.Module, num_microbatches: int | None, dp_size: int) -> None:
    if counts_tokens(model):
        return
    takes = f"{type(model).__name__} takes the mean loss over what it is given"
    if num_microbatches not in (None, 1):
        raise ConfigurationError(
            f"{takes}, so that a batch cannot be cut into num_microbatches={num_microbatches}: use "
            f"num_microbatches=1, and accumulate gradients"
        )
    if dp_size > 1:
        raise ConfigurationError(
            f"{takes}, and {dp_size} replicas may have different numbers of tokens: use tp x pp processes, so that "
            f"there is one replica, and accumulate gradients"
        )
