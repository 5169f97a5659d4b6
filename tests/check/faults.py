"""Faults to put into a run: each replaces a real piece of the package by one that is wrong in the way of a likely bug.

A fault is a context manager that holds on one rank for one run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import hf_tpp.data_parallel.replicas
from hf_tpp.assembly import Assembly
from hf_tpp.check.checking import ParallelRun, run_parallel
from hf_tpp.check.outcome import Layout as Sizes
from hf_tpp.check.tiny_model import Recipe
from hf_tpp.checkpoint.source import LoadedWeights
from hf_tpp.dropout import DropoutStreams
from hf_tpp.gradients.norm import ParallelNorm
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.pipeline_parallel.runner import _Execution
from hf_tpp.pipeline_parallel.stage_pass import KeptGradients
from hf_tpp.plan.layout import Block, Layout
from hf_tpp.plan.resolve import channel_layout
from hf_tpp.sharding import ShardSpec, unshard
from hf_tpp.tensor_parallel.linear import RowParallelLinear, join_channels
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.region import RegionState

TP2, TP4, PP2, DP2 = Sizes(tp=2), Sizes(tp=4), Sizes(pp=2), Sizes(dp=2)


@dataclass(frozen=True)
class Fault:
    """A fault, and the model that it is put into.

    Attributes:
        make: Context manager that puts it in.
        recipe: The model.
        sizes: The layout.
        part: The part of the check that must find it.
    """

    make: Callable[[], Any]
    recipe: Recipe
    sizes: Sizes
    part: str = "train"


FAULTS: dict[str, Fault] = {}


def fault(model_type: str, sizes: Sizes, part: str = "train", **config: Any) -> Callable[..., Any]:
    """Register a generator function as the fault of its name."""

    def register(function: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
        recipe = Recipe(model_type, config={**SMALL[model_type], **config})
        FAULTS[function.__name__] = Fault(contextmanager(function), recipe, sizes, part)
        return function

    return register


COMMON = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = COMMON | dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
LLAMA = COMMON | {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
SMALL: dict[str, dict[str, Any]] = {
    "gpt2": GPT2 | {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64},
    "llama": LLAMA | {"num_key_value_heads": 2},
    "qwen3": LLAMA | {"num_key_value_heads": 2, "head_dim": 8},
    "phi3": LLAMA | {"num_key_value_heads": 2, "rope_parameters": None, "original_max_position_embeddings": 64},
}


def run_with_fault(name: str, recipe: Recipe, sizes: Sizes, folder: Path, parts: tuple[str, ...]) -> ParallelRun:
    """Body of a rank."""
    with FAULTS[name].make():
        return run_parallel(recipe, sizes, folder, parts)


# --- plans and layouts ------------------------------------------------------------------------------------------------


@fault("llama", TP2)
def column_and_row_swapped() -> Iterator[None]:
    """The weights of an MLP are cut in each other's direction; they are square, so shapes alone do not say so."""
    plain = Assembly.spec

    def spec(self: Assembly, name: str, mesh: Any) -> ShardSpec:
        found = plain(self, name, mesh)
        return replace(found, dim=1 - found.dim) if ".mlp." in name and found.dim is not None else found

    with patch.object(Assembly, "spec", spec):
        yield


@fault("llama", TP2)
def row_shards_of_the_other_rank() -> Iterator[None]:
    plain = Assembly.spec

    def spec(self: Assembly, name: str, mesh: Any) -> ShardSpec:
        found = plain(self, name, mesh)
        return found.at_rank(1 - found.tp_rank) if name.endswith("o_proj.weight") else found

    with patch.object(Assembly, "spec", spec):
        yield


def one_block(kind: Any, heads: Any, size: int, tp_size: int) -> Layout | None:
    found = channel_layout(kind, heads, size, tp_size)
    return Layout((Block(size),)) if found is not None and len(found.blocks) > 1 else found


@fault("gpt2", TP2)
def qkv_cut_without_regard_to_heads() -> Iterator[None]:
    with patch("hf_tpp.tensor_parallel.matching.match.channel_layout", one_block):
        yield


@fault("phi3", TP2)
def gate_and_up_cut_as_one_run() -> Iterator[None]:
    def layout(kind: Any, heads: Any, size: int, tp_size: int) -> Layout | None:
        return channel_layout(kind, heads, size, tp_size) if heads else one_block(kind, heads, size, tp_size)

    with patch("hf_tpp.tensor_parallel.matching.match.channel_layout", layout):
        yield


@fault("llama", TP4)
def key_value_heads_replicated_in_the_wrong_order() -> Iterator[None]:
    """Heads 0 1 0 1 on ranks 0 1 2 3, where 0 0 1 1 belong to the query heads there."""
    from hf_tpp.plan import layout

    plain = layout._deal

    def deal(num_units: int, tp_rank: int, tp_size: int) -> tuple[int, int, int]:
        first, last, copies = plain(num_units, tp_rank, tp_size)
        unit = tp_rank % num_units
        return (unit, unit + 1, copies) if copies > 1 else (first, last, copies)

    with patch.object(layout, "_deal", deal):
        yield


@fault("llama", TP2, num_key_value_heads=1)
def gradient_of_a_replicated_head_not_summed() -> Iterator[None]:
    with patch("hf_tpp.gradients.synchronize._sum_replicated_heads", lambda *_: None):
        yield


# --- regions ----------------------------------------------------------------------------------------------------------


@fault("llama", TP2)
def all_reduce_dropped_at_the_exit() -> Iterator[None]:
    with patch.object(RegionState, "leave", lambda self, partial: partial):
        yield


@fault("llama", TP2)
def all_reduce_dropped_in_the_backward() -> Iterator[None]:
    with patch.object(RegionState, "enter", lambda self, x: x):
        yield


@fault("llama", TP2)
def all_reduce_dropped_in_the_embedding() -> Iterator[None]:
    with patch("hf_tpp.tensor_parallel.embedding.reduce_from_tensor_parallel", lambda x, group: x):
        yield


@fault("gpt2", TP2)
def bias_added_on_every_rank() -> Iterator[None]:
    def forward(self: RowParallelLinear, x: torch.Tensor) -> torch.Tensor:
        return self.region.leave(F.linear(x, self.weight.t() if self.transposed else self.weight, self.bias))

    with patch.object(RowParallelLinear, "forward", forward):
        yield


@fault("qwen3", TP2)
def gradient_of_a_parameter_inside_a_region_not_summed() -> Iterator[None]:
    with patch("hf_tpp.gradients.synchronize._sum_partial", lambda *_: None):
        yield


# --- vocabulary and loss ----------------------------------------------------------------------------------------------


@fault("llama", TP2)
def padding_counted_in_the_vocabulary() -> Iterator[None]:
    plain = Layout.valid_size

    def valid_size(self: Layout, tp_rank: int, tp_size: int) -> int:
        return self.padded_local_size or plain(self, tp_rank, tp_size)

    with patch.object(Layout, "valid_size", valid_size):
        yield


@fault("llama", TP2)
def ignored_labels_counted() -> Iterator[None]:
    plain = VocabParallelCausalLMLoss.__call__

    def loss(self: Any, logits: Any, labels: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(self, logits, labels.clamp(min=0), *args, **kwargs)

    with patch.object(VocabParallelCausalLMLoss, "__call__", loss):
        yield


@fault("llama", PP2)
def loss_scaled_by_microbatches_instead_of_tokens() -> Iterator[None]:
    def count(microbatches: Any) -> int:
        return len(microbatches) * int((microbatches[0]["labels"][:, 1:] != -100).sum())

    with patch("hf_tpp.calls.preparation.count_label_tokens", count):
        yield


@fault("llama", TP2, part="evaluate")
def logits_of_the_ranks_in_the_wrong_order() -> Iterator[None]:
    def join(local: torch.Tensor, layout: Layout, group: Any) -> torch.Tensor:
        return join_channels(local, layout, group).roll(layout.local_size(0, 2), -1)

    with patch("hf_tpp.calls.sharing.join_channels", join):
        yield


# --- stages -----------------------------------------------------------------------------------------------------------


@fault("llama", PP2)
def stage_boundary_off_by_one() -> Iterator[None]:
    """The last block of the first stage is the first one of the second stage, too."""
    plain = Assembly.blocks

    def blocks(self: Assembly, stage: int) -> range:
        found = plain(self, stage)
        return range(found.start - (stage > 0), found.stop)

    with patch.object(Assembly, "blocks", blocks):
        yield


@fault("gpt2", PP2)
def tie_not_summed() -> Iterator[None]:
    def summed(gradients: Any, parameters: Any, specs: Any, mesh: Any) -> Any:
        return sum_shared_gradients(
            gradients, parameters, [replace(spec, stages=spec.stages[:1]) for spec in specs], mesh
        )

    with patch("hf_tpp.calls.training.sum_shared_gradients", summed):
        yield


@fault("llama", PP2)
def gradients_of_one_microbatch_lost() -> Iterator[None]:
    def keep_last(self: KeptGradients, gradients: Any) -> None:
        self.tensors = list(gradients)

    with patch.object(KeptGradients, "add", keep_last):
        yield


@fault("llama", PP2)
def hidden_states_rounded_on_the_way() -> Iterator[None]:
    plain = _Execution._send_forward  # not that of the links: the rehearsal sends by them too, and would refuse

    def send(self: _Execution, index: int) -> None:
        self.to_send[index] = tuple(tensor.bfloat16().to(tensor.dtype) for tensor in self.to_send[index])
        plain(self, index)

    with patch.object(_Execution, "_send_forward", send):
        yield


@fault("gpt2", PP2)
def dropout_in_one_microbatch() -> Iterator[None]:
    plain, current = DropoutStreams.start_microbatch, [0]

    def start(self: DropoutStreams, seed: int, replica: int, index: int, stage: int) -> None:
        current[0] = index
        plain(self, seed, replica, index, stage)

    def forward(self: nn.Dropout, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.2 if current[0] == 1 else self.p, self.training)

    with patch.object(DropoutStreams, "start_microbatch", start), patch.object(nn.Dropout, "forward", forward):
        yield


# --- norm, replicas, checkpoints --------------------------------------------------------------------------------------


@fault("llama", TP2)
def replicated_parameters_counted_twice_in_the_norm() -> Iterator[None]:
    with patch.object(ShardSpec, "copies", lambda self, segment: 1):
        yield


@fault("llama", TP2)
def norm_of_the_local_shards() -> Iterator[None]:
    def no_residual(self: ParallelNorm) -> None:
        if self._residual is not None:
            self._residual.grad = torch.zeros_like(self._residual)

    with patch.object(ParallelNorm, "update_residual", no_residual):
        yield


@fault("llama", DP2)
def gradients_of_replicas_summed_instead_of_averaged() -> Iterator[None]:
    plain = hf_tpp.data_parallel.replicas.average_over_replicas

    def summed(parameters: Any, mesh: Any) -> None:
        parameters = list(parameters)
        plain(parameters, mesh)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= mesh.dp.size

    with patch.object(hf_tpp.data_parallel.replicas, "average_over_replicas", summed):
        yield


@fault("llama", TP2, part="save")
def shards_saved_in_the_wrong_order() -> Iterator[None]:
    def swapped(shards: Any, spec: ShardSpec) -> torch.Tensor:
        same = len({shard.shape for shard in shards}) == 1 and not spec.layout.padded_local_size
        return unshard(list(reversed(shards)) if same else shards, spec)

    with patch(
        "hf_tpp.checkpoint.huggingface.gather.unshard",
        lambda s, spec: unshard(s, spec) if spec.dim is None else swapped(s, spec),
    ):
        yield


@fault("llama", TP2)
def one_rank_starts_from_other_weights() -> Iterator[None]:
    plain = LoadedWeights.shard

    def shard(self: LoadedWeights, spec: ShardSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        found = plain(self, spec, device, dtype)
        is_other = dist.get_rank() == 1 and spec.name.endswith("layers.1.input_layernorm.weight")
        return found * 1.001 if is_other else found

    with patch.object(LoadedWeights, "shard", shard):
        yield
