"""`parallelize`: reads as the table of contents of the package."""

import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from hf_tpp.adapters import model_of
from hf_tpp.assembly import Assembly
from hf_tpp.calls.context import CallContext
from hf_tpp.checkpoint.huggingface import SafetensorsCheckpoint, resolve_checkpoint
from hf_tpp.checkpoint.source import InitialWeights, LoadedWeights, WeightSource
from hf_tpp.collectives.agreement import agree_on, checksum, text_hash
from hf_tpp.collectives.p2p import StageLinks
from hf_tpp.compilation import CompiledBlocks, CompileOptions
from hf_tpp.cuda_graphs import StageRecorder
from hf_tpp.data_parallel import replicas_of
from hf_tpp.dropout import DropoutStreams
from hf_tpp.errors import ConfigurationError, HfTppError
from hf_tpp.integrations import activate
from hf_tpp.mesh import ParallelMesh, control_group, default_device_type, initialize_distributed, local_device
from hf_tpp.options import World, check_options, with_defaults
from hf_tpp.parallel_model import ParallelState, install, parallel_state
from hf_tpp.pipeline_parallel.flow import StageFlow
from hf_tpp.pipeline_parallel.lanes import Lanes
from hf_tpp.pipeline_parallel.loss_note import LossNote, counts_tokens
from hf_tpp.pipeline_parallel.rehearsal import Rehearsal
from hf_tpp.pipeline_parallel.runner import PipelineRunner
from hf_tpp.pipeline_parallel.stage import Stage
from hf_tpp.report import describe, describe_probe
from hf_tpp.sharding import ShardSpec, local_part
from hf_tpp.tensor_parallel.matching import UserPlan
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.transformers_versions import fewest_padded_rows, tie_on_meta
from hf_tpp.verification import BlockVerification

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
    compile: bool | CompileOptions | None = None,
    align_vocabulary: bool = True,
    overlap_microbatches: bool = False,
    cuda_graphs: bool = False,
    data_parallel: str = "replicate",
    plan: UserPlan | None = None,
    checkpoint: Any = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    eval_logits: bool = True,
    train_logits: bool = False,
    verify: bool | None = None,
    patch: bool = True,
    verbose: bool = True,
    timeout: timedelta | None = None,
) -> ModelT:
    """Turn a Hugging Face causal language model into its tensor- and pipeline-parallel self, in place.

    Args:
        model: Loaded, the same on every rank; or on the meta device, then its weights come from `checkpoint` or are
            initialised by the model's own rules, the same values whatever tp and pp are. Or a loaded PEFT model; LoRA
            may also be given to a parallel model.
        tp: Ranks that share every layer.
        pp: Stages that share the layers.
        num_microbatches: Microbatches a batch is cut into; default: one row each, at most 4 x pp.
        stages: Layers per stage; default: balanced by cost, the head included.
        sequence_parallel: Cut hidden states along the sequence between the tensor-parallel regions.
        compile: Train the blocks, one by one, through `torch.compile`: True, or its options in a dictionary, such as
            {"backend": "aot_eager"} or {"dynamic": True} (for sequences of many lengths). Default: on GPUs.
        align_vocabulary: With tp=1, compute the products of a head over a large vocabulary of an odd size (50257) as if
            it were a multiple of 64, for which GPUs are faster. (Shards of a vocabulary always are.)
        overlap_microbatches: With tp > 1 and pp=1, run the forward of a microbatch beside the backward of the one
            before: one computes while the other communicates. Two microbatches are in memory.
        cuda_graphs: On GPUs, record forwards and backwards as CUDA graphs, and replay those; see `cuda_graphs/`.
        data_parallel: What replicas hold: "replicate", each everything; "fully_shard", each a part of the weights,
            gradients and optimizer state, gathered while a pass runs (FSDP2 over the dp axis).
        plan: How to cut modules that are not cut right by themselves: pattern of module names -> `Region`, or None for
            modules that are to stay whole. It goes before what is found by names.
        checkpoint: For a model on meta: folder or hub name of a safetensors checkpoint, or folder of a Megatron one.
        device: This rank's device; default: its own GPU, else the CPU.
        seed: Of the initial values of a model on meta without a checkpoint.
        eval_logits: Give logits to every rank when the model is not training.
        train_logits: Give logits, without a graph, to every rank beside the loss of a training call with labels. (A
            training call without labels always gives logits, and these carry gradients.)
        verify: Before anything is trained, compare one block of each kind with the plain block, on these ranks; the
            model must be loaded. Default: with a plan, and for models with modules that transformers does
            not ship.
        patch: Let accelerate's `Accelerator` and transformers' `Trainer` serve parallel models, by changing some of
            their methods; they treat other models as before. Without it, use `TPPAccelerator` and `TPPTrainer`.
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
        ParityError: `verify` found a block that differs; the model is of no use any more.
    """
    whole, model = model, model_of(model)
    device_type = None if device is None else torch.device(device).type
    world_size = initialize_distributed(device_type, timeout)
    control = control_group()
    options: dict[str, Any] = {
        "tp": tp,
        "pp": pp,
        "num_microbatches": num_microbatches,
        "stages": stages,
        "sequence_parallel": sequence_parallel,
        "compile": compile,
        "align_vocabulary": align_vocabulary,
        "overlap_microbatches": overlap_microbatches,
        "cuda_graphs": cuda_graphs,
        "data_parallel": data_parallel,
        "plan": plan,
        "seed": seed,
        "eval_logits": eval_logits,
        "train_logits": train_logits,
        "verify": verify,
        "patch": patch,
    }
    world = World(device_type or default_device_type(), tp, pp, world_size)
    options = with_defaults(options, world)
    assembly, source, verify = _decide(model, world, options, checkpoint, control)
    mesh = ParallelMesh.create(tp, pp, torch.device(device) if device else local_device(), control)
    verification = BlockVerification.capture(assembly) if verify else None
    weights: WeightSource = source or _weights_of(model, assembly, seed)
    calls, specs = _build(assembly, mesh, weights, data_parallel)
    calls.num_microbatches, calls.eval_logits, calls.train_logits = num_microbatches, eval_logits, train_logits
    if overlap_microbatches:
        calls.runner.lanes = Lanes(mesh)
    if cuda_graphs:
        calls.recorder = StageRecorder(model, calls.runner)
    num_bytes = sum(local_part(parameter.detach()).nbytes for parameter in model.parameters())
    report = describe(type(model).__name__, assembly.stages, mesh, specs, num_bytes)
    report += describe_probe(assembly.cuts.regions, assembly.cuts.declined)
    install(model, ParallelState(mesh, specs, calls, assembly, report))
    if verification is not None:
        with calls.replicas.gathered():
            verification.run(calls, specs)
    calls.compiled_blocks.compile(options["compile"])  # the verified blocks are plain: generated code rounds otherwise
    activate(model, patch)
    if verbose and mesh.global_rank == 0:
        print(report, file=sys.stderr)
    return whole


def _decide(
    model: nn.Module, world: World, options: Mapping[str, Any], checkpoint: Any, control: Any
) -> tuple[Assembly, WeightSource | None, bool]:
    """Take all decisions together with the other ranks, before anything is changed; `options` are the user's."""
    plan: UserPlan | None = options["plan"]
    assembly: Assembly | None = None
    source: WeightSource | None = None
    problem: HfTppError | None = None
    verify = bool(options["verify"])
    try:
        check_options(model, options, world)
        tie_on_meta(model)
        chosen = {name: options[name] for name in ("stages", "sequence_parallel", "plan", "align_vocabulary")}
        assembly = Assembly.check(model, world.tp, world.pp, **chosen, is_alone=world.size == 1)
        if options["verify"] is None:
            verify = world.tp * world.pp > 1 and _should_verify(assembly, plan)
        if verify:
            BlockVerification.check(model)
        if checkpoint is not None:
            source = _open_checkpoint(model, assembly, checkpoint)
    except HfTppError as error:
        problem = error
    facts = {
        **options,
        "plan": str(plan),
        "compile": str(options["compile"]),
        "stages": assembly.stages if assembly else None,
        "cuts": f"{text_hash(assembly.cuts.decisions):08x}" if assembly else None,
        "verify": verify,
        "model": type(model).__name__,
        "weights": _fingerprint(model) if problem is None else None,
    }
    agree_on(facts, problem, control)
    assert assembly is not None
    return assembly, source, verify


def _build(
    assembly: Assembly, mesh: ParallelMesh, weights: WeightSource, data_parallel: str
) -> tuple[CallContext, dict[str, ShardSpec]]:
    """Change the model: swap, hollow, fill, share out. Nothing here fails that could have been foreseen."""
    model = assembly.model
    streams = DropoutStreams.of_model(model, mesh.device, mesh.tp.rank, mesh.tp.size)
    regions = RegionState(mesh.tp.group, streams)
    flow = StageFlow()
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    hidden_size, dtype = embedding.embedding_dim, embedding.weight.dtype
    plain_forward = type(model).forward.__get__(model)
    fewest_rows = fewest_padded_rows(model)
    assembly.apply(mesh, regions, flow)
    specs = assembly.fill(weights, mesh, dtypes)
    for spec in assembly.all_specs(mesh):
        mesh.stage_group(spec.stages)
        for segment in spec.segments if spec.dim is not None else ():
            mesh.neighbours(segment.num_copies)
    note = LossNote.install(model) if mesh.world_size > 1 else LossNote()
    stage, links = Stage(plain_forward, flow, loss_note=note), StageLinks(mesh)
    own = assembly.blocks(mesh.pp.rank)
    replicas = replicas_of(model, assembly.parts, mesh, data_parallel)
    flow.own = tuple(model.get_submodule(assembly.parts.block_name(index)) for index in own)
    calls = CallContext(
        model=model,
        mesh=mesh,
        runner=PipelineRunner(stage, mesh, links, Rehearsal(stage, mesh, links)),
        regions=regions,
        streams=streams,
        specs={model.get_parameter(name): spec for name, spec in specs.items()},
        named_specs=specs,
        replicas=replicas,
        vocabulary=assembly.logits,
        hidden_size=hidden_size,
        dtype=dtype,
        sequence_parallel=assembly.sequence_parallel,
        counts_tokens=counts_tokens(model),
        compiled_blocks=CompiledBlocks(flow.own, regions, note.function or model.loss_function),
        fewest_padded_rows=fewest_rows,
    )
    return calls, specs


def _should_verify(assembly: Assembly, plan: UserPlan | None) -> bool:
    """What transformers does not ship, or the user planned, is verified: no check of all families has seen it."""
    model = assembly.model
    if assembly.parts.is_shipped(model) and not plan:
        return False
    if _is_on_meta(model):
        warnings.warn(
            f"{type(model).__name__} has modules that transformers does not ship, or a plan, and cannot be verified on "
            f"the meta device: run `hf-tpp check` on it, or verify a small model of its kind once",
            stacklevel=3,
        )
        return False
    return True


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


def _open_checkpoint(model: nn.Module, assembly: Assembly, checkpoint: Any) -> WeightSource:
    if not _is_on_meta(model):
        raise ConfigurationError(
            "checkpoint= reads the weights of a model on the meta device, this one is loaded already: build it with "
            "torch.device('meta'), or leave checkpoint out"
        )
    from hf_tpp.checkpoint.megatron import MegatronCheckpoint, is_megatron  # the conversion, only where it is asked for

    if is_megatron(checkpoint):
        return MegatronCheckpoint(model, assembly.shapes, checkpoint)
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
