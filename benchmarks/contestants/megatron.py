"""Megatron-Core: GPTModel of the local layer spec (no Transformer Engine, no Apex), its schedules, our weights.

Its own attention forms all scores in memory; that of torch takes its place, as for everybody else here. Its loss counts
the padding of a vocabulary as tokens: with GPT-2's 50257 it is 0.001 above the others', from which training follows.
"""

import contextlib
import json
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer import TransformerConfig
from torch import nn

from benchmarks.contestants.contract import Contestant, Setting
from hf_tpp.plan.stages import balance_stages
from hf_tpp_conversion.configs.megatron import architecture_to_args
from hf_tpp_conversion.convert import Conversion, convert
from hf_tpp_conversion.families import family_of_config
from hf_tpp_conversion.model.partition import Partition, padded_vocabulary

__all__ = ["MegatronPipeline", "MegatronTensor"]

_SIZES = ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size", "normalization")
_SIZES += ("layernorm_epsilon", "add_bias_linear", "add_qkv_bias")
_POSITIONS = ("position_embedding_type", "rotary_base", "rotary_percent")


class _Megatron(Contestant):
    tp: ClassVar[int] = 1
    pp: ClassVar[int] = 1

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        _start(setting.device, self.tp, self.pp)
        with _files(setting, self.tp, self.pp) as (folder, partition):
            self.model = _build(setting, partition)
            _load(self.model, folder, self.tp, self.pp)
            dist.barrier()
        self.step_all = get_forward_backward_func()

    def parameters(self) -> list[nn.Parameter]:
        """This rank's."""
        return list(self.model.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Its schedule; it divides losses by the number of microbatches."""
        losses = self.step_all(
            forward_step_func=_forward_step,
            data_iterator=iter(tokens.split(self.workload.micro_batch)),
            model=[self.model],
            num_microbatches=self.workload.num_microbatches,
            seq_length=self.workload.seq_length,
            micro_batch_size=self.workload.micro_batch,
        )
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=tokens.device)
        if self.pp > 1:
            self._sum_tied_gradients()
            dist.broadcast(loss, parallel_state.get_pipeline_model_parallel_last_rank())
        return loss

    def _sum_tied_gradients(self) -> None:
        if self.model.share_embeddings_and_output_weights:
            dist.all_reduce(
                self.model.shared_embedding_or_output_weight().grad, group=parallel_state.get_embedding_group()
            )


class MegatronTensor(_Megatron):
    """Every layer over two ranks."""

    tp: ClassVar[int] = 2


class MegatronPipeline(_Megatron):
    """Two stages, balanced as ours are."""

    pp: ClassVar[int] = 2
    can_be_alone: ClassVar[bool] = False


class _TorchAttention(nn.Module):
    """In place of its core attention: [seq, rows, heads, channels] each -> [seq, rows, heads x channels]."""

    def __init__(self, config: Any, layer_number: int, attn_mask_type: Any, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> torch.Tensor:
        """Causal attention; fewer heads of keys than of queries are allowed."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] < q.shape[1])
        return mixed.permute(2, 0, 1, 3).flatten(2)


def _start(device: torch.device, tp: int, pp: int) -> None:
    parallel_state.initialize_model_parallel(tp, pp)
    if device.type == "cpu":
        from benchmarks.contestants.megatron_on_cpu import stand_in_for_cuda

        stand_in_for_cuda()
    else:
        megatron_random.model_parallel_cuda_manual_seed(0)


@contextlib.contextmanager
def _files(setting: Setting, tp: int, pp: int) -> Iterator[tuple[Path, Partition]]:
    """The weights of the workload in Megatron's files, written by rank 0."""
    workload = setting.workload
    model = setting.model()
    layers = [sum(p.numel() for n, p in model.named_parameters() if f".{i}." in n) for i in range(workload.num_layers)]
    stages = tuple(balance_stages(layers, pp, last_cost=workload.vocabulary * workload.hidden_size)) if pp > 1 else ()
    partition = Partition(tp=tp, pp=pp, stages=stages, divisible_by=64)
    with contextlib.ExitStack() as stack:
        folder: list[Any] = [None]
        if setting.rank == 0:
            root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            model.save_pretrained(root / "hf")
            convert(Conversion(root / "hf", root / "megatron", "megatron", "legacy", "local", partition))
            folder = [root / "megatron"]
        del model
        dist.broadcast_object_list(folder, 0)
        yield folder[0], partition


def _build(setting: Setting, partition: Partition) -> Any:
    workload, device = setting.workload, setting.device
    _, architecture = family_of_config(json.loads(workload.config().to_json_string()), workload.family)
    args = architecture_to_args(architecture)
    config = TransformerConfig(
        **{name: args[name] for name in _SIZES},
        num_query_groups=args["num_query_groups"] if args["group_query_attention"] else workload.num_heads,
        gated_linear_unit=args["swiglu"],
        activation_func=F.silu if args["swiglu"] else F.gelu,
        bias_activation_fusion=device.type == "cuda" or args["bias_gelu_fusion"],
        bias_dropout_fusion=device.type == "cuda",
        tensor_model_parallel_size=partition.tp,
        pipeline_model_parallel_size=partition.pp,
        num_layers_in_first_pipeline_stage=partition.stages[0] if partition.pp > 1 else None,
        pipeline_dtype=setting.dtype,
        params_dtype=setting.dtype,
        bf16=setting.dtype == torch.bfloat16,
        use_cpu_initialization=True,
        perform_initialization=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=args["normalization"])
    spec.submodules.self_attention.submodules.core_attention = _TorchAttention
    model = GPTModel(
        config,
        spec,
        vocab_size=padded_vocabulary(workload.vocabulary, partition),
        max_sequence_length=workload.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=True,
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        **{name: args[name] for name in _POSITIONS},
    )
    return model.to(device, setting.dtype).train()


def _load(model: Any, folder: Path, tp: int, pp: int) -> None:
    tp_rank, stage = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{tp_rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
    file = folder / "release" / name / "model_optim_rng.pt"
    with torch.serialization.safe_globals([Namespace]):
        model.load_state_dict(torch.load(file, weights_only=True)["model"], strict=True)


def _forward_step(rows: Iterator[torch.Tensor], model: Any) -> tuple[torch.Tensor, Any]:
    """One microbatch, as its schedules call it."""
    tokens = next(rows)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    labels = F.pad(tokens[:, 1:], (0, 1))
    return model(tokens, positions, None, labels=labels), _mean_loss


def _mean_loss(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Over all tokens but the last of each row, [rows, seq] -> []; what is kept of it second."""
    loss = losses[:, :-1].float().mean()
    return loss, loss.detach().clone()  # its schedules divide the first in place
