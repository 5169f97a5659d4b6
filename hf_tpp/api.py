"""`parallelize`: reads as the table of contents of the package."""

import sys
from collections.abc import Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from hf_tpp.assembly import Assembly
from hf_tpp.calls.context import CallContext
from hf_tpp.checkpoint.huggingface import SafetensorsCheckpoint, resolve_checkpoint
from hf_tpp.checkpoint.source import InitialWeights, LoadedWeights, WeightSource
from hf_tpp.collectives.agreement import agree_on, checksum, text_hash
from hf_tpp.collectives.p2p import StageLinks
from hf_tpp.dropout import DropoutStreams
from hf_tpp.errors import AlreadyParallelError, ConfigurationError, HfTppError
from hf_tpp.mesh import ParallelMesh, check_world, control_group, initialize_distributed, local_device
from hf_tpp.parallel_model import ParallelState, install, parallel_state
from hf_tpp.pipeline_parallel.runner import PipelineRunner
from hf_tpp.pipeline_parallel.split import StageFlow
from hf_tpp.pipeline_parallel.stage import Stage
from hf_tpp.report import describe
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["clip_grad_norm_", "from_pretrained", "parallelize"]

_SAMPLES = 64
ModelT = TypeVar("ModelT", bound=nn.Module)


def parallelize(
    model: ModelT,
    tp: int = 1,
    pp: int = 1,
    *,
    num_microbatches: int | None = None,
    stages: Sequence[int] | None = None,
    sequence_parallel: bool = False,
    checkpoint: Any = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    eval_logits: bool = True,
    verbose: bool = True,
    timeout: timedelta | None = None,
) -> ModelT:
    """Turn a Hugging Face causal language model into its tensor- and pipeline-parallel self, in place.

    Args:
        model: Loaded, the same on every rank; or on the meta device, then its weights come from `checkpoint` or are
            initialised by the model's own rules, the same values whatever tp and pp are.
        tp: Ranks that share every layer.
        pp: Stages that share the layers.
        num_microbatches: Microbatches a batch is cut into; default: one row each, at most 4 x pp.
        stages: Layers per stage; default: balanced by cost, the head included.
        sequence_parallel: Cut hidden states along the sequence between the tensor-parallel regions.
        checkpoint: Folder or hub name of a safetensors checkpoint for a model on meta.
        device: This rank's device; default: its own GPU, else the CPU.
        seed: Of the initial values of a model on meta without a checkpoint.
        eval_logits: Give logits to every rank when the model is not training.
        verbose: Print a report on rank 0.
        timeout: Of a collective, if torch.distributed is started here.

    Collective: every process of the job, with the same arguments; dp = world size / (tp x pp).

    Returns:
        `model`, the same object.

    Raises:
        ConfigurationError: Sizes that cannot work.
        AlreadyParallelError: The model is parallel already.
        UnsupportedModelError: A model that cannot be split exactly.
        RankMismatchError: Ranks were given different models or sizes.
        CheckpointError: The checkpoint does not hold the model.
    """
    device_type = None if device is None else torch.device(device).type
    world_size = initialize_distributed(device_type, timeout)
    control = control_group()
    assembly: Assembly | None = None
    problem: HfTppError | None = None
    source: SafetensorsCheckpoint | None = None
    try:
        _check_arguments(model, num_microbatches)
        check_world(world_size, tp, pp)
        assembly = Assembly.check(model, tp, pp, stages, sequence_parallel)
        if checkpoint is not None:
            source = _open_checkpoint(model, assembly, checkpoint)
    except HfTppError as error:
        problem = error
    facts = {
        "tp": tp,
        "pp": pp,
        "num_microbatches": num_microbatches,
        "stages": assembly.stages if assembly else None,
        "sequence_parallel": sequence_parallel,
        "seed": seed,
        "eval_logits": eval_logits,
        "model": type(model).__name__,
        "weights": _fingerprint(model) if problem is None else None,
    }
    agree_on(facts, problem, control)
    assert assembly is not None

    mesh = ParallelMesh.create(tp, pp, torch.device(device) if device else local_device(), control)
    weights: WeightSource = source or _weights_of(model, assembly, seed)
    calls, specs = _build(assembly, mesh, weights)
    calls.num_microbatches, calls.eval_logits = num_microbatches, eval_logits
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    report = describe(type(model).__name__, assembly.stages, mesh, specs, num_bytes)
    install(model, ParallelState(mesh, assembly.stages, specs, calls, report))
    if verbose and mesh.global_rank == 0:
        print(report, file=sys.stderr)
    return model


def _build(assembly: Assembly, mesh: ParallelMesh, weights: WeightSource) -> tuple[CallContext, dict[str, ShardSpec]]:
    """Change the model: swap, hollow, fill. Nothing here fails for a reason that could have been known before."""
    model = assembly.model
    streams = DropoutStreams.of_model(model, mesh.device, mesh.tp.rank)
    regions = RegionState(mesh.tp.group, streams)
    flow = StageFlow()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    hidden_size: int = model.get_submodule(assembly.parts.embedding).embedding_dim  # type: ignore[assignment]
    plain_forward = type(model).forward.__get__(model)
    assembly.apply(mesh, regions, flow)
    specs = assembly.fill(weights, mesh, dtypes)
    for spec in assembly.all_specs(mesh):
        for segment in spec.segments if spec.dim is not None else ():
            mesh.neighbours(segment.num_copies)
    calls = CallContext(
        model=model,
        mesh=mesh,
        runner=PipelineRunner(Stage(plain_forward, flow), mesh, StageLinks(mesh)),
        regions=regions,
        streams=streams,
        specs={model.get_parameter(name): spec for name, spec in specs.items()},
        vocabulary=assembly.cuts.vocabulary,
        hidden_size=hidden_size,
        sequence_parallel=assembly.sequence_parallel,
    )
    return calls, specs


def _check_arguments(model: nn.Module, num_microbatches: int | None) -> None:
    if parallel_state(model) is not None:
        raise AlreadyParallelError(
            f"this {type(model).__name__} is parallel already: call parallelize() once, on a freshly loaded model"
        )
    if num_microbatches is not None and (not isinstance(num_microbatches, int) or num_microbatches < 1):
        raise ConfigurationError(f"num_microbatches={num_microbatches!r}: use a positive whole number, or None")


def _is_on_meta(model: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in model.parameters())


def _weights_of(model: nn.Module, assembly: Assembly, seed: int) -> WeightSource:
    return InitialWeights(model, assembly.parts, seed) if _is_on_meta(model) else LoadedWeights(model)


@torch.no_grad()
def _fingerprint(model: nn.Module) -> str:
    """Shapes, types and a hash of the values of every parameter, so that no two ranks start from different weights."""
    parameters = dict(model.named_parameters())
    text = str([(name, list(p.shape), str(p.dtype), p.requires_grad) for name, p in parameters.items()])
    loaded = [p for p in parameters.values() if not p.is_meta and p.numel()]
    # The hash sees all values but not their order; the samples see order.
    hashes = str([int(torch.hash_tensor(p).view(torch.int64)) for p in loaded])
    samples = [p.reshape(-1)[:: max(1, p.numel() // _SAMPLES)] for p in loaded]
    return f"{text_hash(text + hashes):08x}-{int(checksum(samples)) & (2**64 - 1):016x}"


def _open_checkpoint(model: nn.Module, assembly: Assembly, checkpoint: Any) -> SafetensorsCheckpoint:
    if not _is_on_meta(model):
        raise ConfigurationError(
            "checkpoint= reads the weights of a model on the meta device, this one is loaded already: build it with "
            "torch.device('meta'), or leave checkpoint out"
        )
    return SafetensorsCheckpoint.open(model, assembly.shapes, assembly.canonical, checkpoint)


def from_pretrained(
    name_or_path: str | Path,
    tp: int = 1,
    pp: int = 1,
    *,
    dtype: torch.dtype | str = "auto",
    config: Any = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Any:
    """Load a checkpoint straight into a parallel model: each rank reads its own slices and nothing else.

    Args:
        name_or_path: Folder or hub name of a safetensors checkpoint.
        tp: Ranks that share every layer.
        pp: Stages that share the layers.
        dtype: Type of the parameters; "auto": that of the checkpoint's configuration.
        config: A configuration in place of the checkpoint's.
        trust_remote_code: Run model code from the checkpoint; only for code that you have read.
        **options: Of `parallelize`, and `attn_implementation`.

    Collective: every process of the job.

    Returns:
        The parallel model in eval mode, like transformers' `from_pretrained`.

    Raises:
        CheckpointError: The checkpoint does not hold the model.
    """
    attention = {key: options.pop(key) for key in ("attn_implementation",) if key in options}
    folder = resolve_checkpoint(str(name_or_path))
    config = config or AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or torch.get_default_dtype()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **attention)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return parallelize(model.eval(), tp, pp, checkpoint=folder, **options)


def clip_grad_norm_(
    model: nn.Module,
    max_norm: float,
    norm_type: float = 2.0,
    parameters: Iterable[nn.Parameter] | None = None,
) -> torch.Tensor:
    """Clip the gradients of a parallel model by the norm that the unsplit model would have.

    Args:
        model: What `parallelize` returned.
        max_norm: Largest norm allowed.
        norm_type: Of the p-norm; may be `math.inf`.
        parameters: Only these; default: all.

    Collective: every rank of the replica.

    Returns:
        The norm before clipping, the same on every rank.

    Raises:
        ConfigurationError: `model` is not parallel, or a parameter is not one of its own.
    """
    state = parallel_state(model)
    if state is None:
        raise ConfigurationError(f"{type(model).__name__} is not parallel: use torch.nn.utils.clip_grad_norm_")
    return state.norm.clip(model.parameters() if parameters is None else parameters, max_norm, norm_type)
