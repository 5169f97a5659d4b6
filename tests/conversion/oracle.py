"""The real megatron-core on CPU: builds GPTModel, loads what we wrote, saves what we read. One process per rank.

python -m tests.conversion.oracle RANK TP PP STORE JOBS.json
"""

import json
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch


def stub_cuda() -> None:
    """megatron-core asks for the current device and saves random states, even where there is no GPU."""
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *_, **__: None


def sliding_window_mask(rows: int, columns: int, window: tuple[int, int]) -> torch.Tensor:
    """What megatron-core builds on a GPU, by the same bounds: True is masked."""
    ones = torch.ones(rows, columns, dtype=torch.bool)
    shift = columns - rows
    return ~torch.tril(torch.triu(ones, diagonal=shift - window[0]), diagonal=shift + window[1])


def build(settings: dict[str, Any], tp: int, pp: int, stage: int) -> torch.nn.Module:
    """GPTModel with the local layer spec; parameters are NaN, so that what is not loaded shows."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = dict(settings["config"])
    if config.get("window_size"):
        config["window_size"] = tuple(config["window_size"])
    activation = config.pop("activation")
    config["activation_func"] = torch.nn.functional.silu if activation == "silu" else torch.nn.functional.gelu
    transformer = TransformerConfig(
        **config,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=config.get("num_moe_experts"),
        qk_layernorm=config.get("qk_layernorm", False),
        normalization=config["normalization"],
    )
    model = GPTModel(
        transformer,
        spec,
        pre_process=stage == 0,
        post_process=stage == pp - 1,
        parallel_output=False,
        **settings["model"],
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    return model.eval()


def initialise(model: torch.nn.Module, tp_rank: int, stage: int) -> None:
    """Random values; what tensor-parallel ranks share is the same on all of them, and so is a tied head."""
    for index, (name, parameter) in enumerate(model.named_parameters()):
        is_cut = getattr(parameter, "tensor_model_parallel", False)
        is_embedding = "word_embeddings" in name or (
            name == "output_layer.weight" and model.share_embeddings_and_output_weights
        )
        seed = tp_rank + 1 if is_embedding else 1000 * (stage + 1) + 10 * index + (tp_rank + 1 if is_cut else 0)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        with torch.no_grad():
            parameter.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)


def load(model: torch.nn.Module, job: dict[str, Any], tp_rank: int, stage: int, pp: int) -> None:
    """Load as strictly as Megatron can."""
    folder = Path(job["path"]) / "release"
    if job["format"] == "legacy":
        name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
        with torch.serialization.safe_globals([Namespace]):
            content = torch.load(folder / name / "model_optim_rng.pt", weights_only=True)
        model.load_state_dict(content["model"], strict=True)
        return
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    state = {"model": model.sharded_state_dict()}
    with torch.serialization.safe_globals([Namespace]):  # on Megatron's own list too
        loaded = dist_checkpointing.load(state, str(folder), strict=StrictHandling.RAISE_ALL)
    assert loaded["args"].num_layers == model.config.num_layers
    model.load_state_dict(loaded["model"], strict=True)


def save(model: torch.nn.Module, job: dict[str, Any], tp_rank: int, stage: int, pp: int) -> None:
    """Save as Megatron-LM does: args, version, iteration, model."""
    folder = Path(job["path"]) / "iter_0000010"
    common = {"args": Namespace(**job["args"]), "checkpoint_version": 3.0, "iteration": 10}
    if job["format"] == "legacy":
        name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
        (folder / name).mkdir(parents=True, exist_ok=True)
        torch.save(common | {"model": model.state_dict_for_save_checkpoint()}, folder / name / "model_optim_rng.pt")
    else:
        from megatron.core import dist_checkpointing

        folder.mkdir(parents=True, exist_ok=True)
        torch.distributed.barrier()
        dist_checkpointing.save(common | {"model": model.sharded_state_dict()}, str(folder))
    (Path(job["path"]) / "latest_checkpointed_iteration.txt").write_text("10")


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: torch.Tensor, pp: int, stage: int) -> torch.Tensor | None:
    """A forward through the stages; the last one returns [batch, seq, vocabulary]."""
    length = tokens.shape[1]
    mask = torch.triu(torch.ones(1, 1, length, length), diagonal=1).bool()
    hidden = torch.zeros(length, tokens.shape[0], model.config.hidden_size)
    if stage:
        torch.distributed.recv(hidden, torch.distributed.get_rank() - model.config.tensor_model_parallel_size)
        model.set_input_tensor(hidden)
    output = model(tokens, torch.arange(length).expand_as(tokens), mask)
    if stage < pp - 1:
        torch.distributed.send(
            output.contiguous(), torch.distributed.get_rank() + model.config.tensor_model_parallel_size
        )
        return None
    return output


def main(rank: int, tp: int, pp: int, store: str, jobs_file: str) -> None:
    stub_cuda()
    from megatron.core import parallel_state
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import random as tensor_parallel_random
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 asks for the name where Transformer Engine is not installed
    fused_softmax.get_sliding_window_causal_mask = sliding_window_mask
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=tp * pp)
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    tensor_parallel_random._set_cuda_rng_state = lambda *_, **__: None
    tensor_parallel_random.initialize_rng_tracker()
    tracker = tensor_parallel_random.get_cuda_rng_tracker()
    for name in ("model-parallel-rng", "expert-parallel-rng", "data-parallel-rng"):
        tracker.states_[name] = torch.get_rng_state()
    tp_rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    for job in json.loads(Path(jobs_file).read_text()):
        model = build(job, tp, pp, stage)
        if job["action"] == "save":
            initialise(model, tp_rank, stage)
            save(model, job, tp_rank, stage, pp)
        else:
            load(model, job, tp_rank, stage, pp)
        torch.manual_seed(3)
        tokens = torch.randint(job["vocab"], (2, 12))
        result = logits(model, tokens, pp, stage)
        if result is not None and tp_rank == 0:
            torch.save(result[..., : job["vocab"]].clone(), job["logits"])
        torch.distributed.barrier()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5])
