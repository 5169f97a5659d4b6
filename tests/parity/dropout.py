"""Training with dropout on the ranks, and what each call of it dropped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import hf_tpp
from hf_tpp.parallel_model import parallel_state
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import Record

LAYERS = 3
SEQ = 8
HIDDEN = 32


@dataclass
class Job:
    model: str
    sizes: dict[str, int]
    checkpointing: bool = False
    sequence_parallel: bool = False
    dropout: float = 0.1
    rows: int = 4

    def __str__(self) -> str:
        sizes = "".join(f"{name}{size}" for name, size in self.sizes.items())
        return f"{self.model}-{sizes}" + "-ckpt" * self.checkpointing + "-sp" * self.sequence_parallel

    @property
    def world_size(self) -> int:
        return self.sizes.get("tp", 1) * self.sizes.get("pp", 1) * self.sizes.get("dp", 1)

    def build(self) -> nn.Module:
        model = tiny_model(self.model, LAYERS, "eager", self.dropout).train()
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        axes = {name: size for name, size in self.sizes.items() if name != "dp"}
        return hf_tpp.parallelize(model, **axes, sequence_parallel=self.sequence_parallel, verbose=False)


@dataclass
class Mask:
    """What one call of dropout dropped."""

    shape: tuple[int, ...]
    dropped: torch.Tensor
    in_backward: bool

    @property
    def is_attention(self) -> bool:
        return len(self.shape) == 4


def recording(masks: list[Mask]) -> Any:
    """Note what every dropout drops: the ones of a tensor of ones that become zero, drawn from the same state."""
    dropout = F.dropout

    def record(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if p and training:
            with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
                dropped = dropout(torch.ones_like(x), p) == 0
            masks.append(Mask(tuple(x.shape), dropped.cpu(), torch._C._current_graph_task_id() != -1))
        return dropout(x, p, training, inplace)

    return mock.patch.object(F, "dropout", record)


def train(jobs: Sequence[Job]) -> list[tuple[int, int, int, Record]]:
    """Body of a rank."""
    found = []
    for job in jobs:
        model = job.build()
        state = parallel_state(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for step in range(10):
            model(**make_batch(2, SEQ, seed=step)).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        weights = {name: p.detach().cpu().clone() for name, p in model.named_parameters()}
        found.append((state.mesh.tp.rank, state.mesh.pp.rank, 0, Record(weights=weights, specs=dict(state.specs))))
    return found


@dataclass
class Pass:
    """One training pass on one rank."""

    place: tuple[int, int, int]
    loss: float
    gradients: dict[str, torch.Tensor]
    masks: list[Mask] = field(default_factory=list)


def one_pass(jobs: Sequence[Job], seed: int = 5, own_seeds: bool = True) -> list[Pass]:
    """Body of a rank."""
    found = []
    for job in jobs:
        model = job.build()
        mesh = parallel_state(model).mesh
        batch = make_batch(job.rows, SEQ, seed=0)
        model(**batch)  # stages find out what they send: a forward of its own
        masks: list[Mask] = []
        torch.manual_seed(seed + 100 * mesh.global_rank * own_seeds)
        with recording(masks):
            loss = model(**batch).loss
        loss.backward()
        gradients = {name: p.grad.cpu().clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append(Pass((mesh.tp.rank, mesh.pp.rank, mesh.dp.rank), loss.item(), gradients, masks))
    return found


def jittered_pass(family: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of whole parameters of a mixture of experts with a jittered router, at tp=2."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    kind = AutoConfig.for_model(
        family, num_hidden_layers=2, num_local_experts=4, vocab_size=64, router_jitter_noise=0.3, **sizes
    )
    torch.manual_seed(0)
    model = hf_tpp.parallelize(AutoModelForCausalLM.from_config(kind), tp=2, verbose=False).train()
    torch.manual_seed(dist.get_rank())
    input_ids = torch.arange(64).view(4, 16)
    loss = model(input_ids=input_ids, labels=input_ids).loss
    loss.backward()
    return float(loss.detach()), norm_gradients(model)


def norm_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if "norm" in name and p.grad is not None}


def passes_with_noise(checkpointing: bool) -> tuple[list[float], dict[str, torch.Tensor], bool]:
    """Losses and gradients of whole parameters with noise that no name announces, at tp=2; is the generator left?"""
    model = tiny_model("llama_gqa", LAYERS, "eager").train()
    for layer in model.model.layers:
        layer.input_layernorm.register_forward_hook(lambda _, __, output: output + torch.rand_like(output))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    hf_tpp.parallelize(model, tp=2, verbose=False)
    torch.manual_seed(dist.get_rank())
    before = torch.get_rng_state()
    losses = []
    for _ in range(3):
        loss = model(**make_batch(4, SEQ, seed=0)).loss
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, norm_gradients(model), torch.equal(torch.get_rng_state(), before)


def passes_with_layerdrop(family: str, layerdrop: float, sizes: dict[str, Any]) -> tuple[list[float], Any]:
    """Losses and gradients of whole parameters of a model that skips blocks at random."""
    model = hf_tpp.parallelize(skipping_model(family, layerdrop), **sizes, verbose=False).train()
    torch.manual_seed(dist.get_rank())
    input_ids = torch.arange(64).view(4, 16)
    losses = []
    for _ in range(6):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        losses.append(float(loss.detach()))
    return losses, norm_gradients(model)


class Unannounced(float):
    """A rate that is not seen as one."""


def pass_with_skipped_blocks() -> None:
    """All blocks are called in the first pass, and none in the second."""
    model = skipping_model("opt", 0.0).train()
    model.model.decoder.layerdrop = Unannounced(0.0)
    hf_tpp.parallelize(model, pp=2, verbose=False)
    input_ids = torch.arange(64).view(4, 16)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    model.model.decoder.layerdrop = Unannounced(1.0)
    model(input_ids=input_ids, labels=input_ids)


def replicas_that_skip() -> dict[str, torch.Tensor]:
    """Gradients, where replica r uses no block but block r; blocks have equal sizes."""
    model = skipping_model("llama", 0.0).train()
    for index, layer in enumerate(model.model.layers):
        if index != dist.get_rank():
            layer.forward = lambda hidden_states, *_, **__: hidden_states
    hf_tpp.parallelize(model, verbose=False)
    input_ids = torch.arange(64).view(4, 16)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def noise_of_forwards(is_trained: bool) -> list[torch.Tensor]:
    """What a model draws in forwards alone, at tp=2 from generators of their own."""
    drawn: list[torch.Tensor] = []

    def add_noise(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        drawn.append(torch.rand_like(output))
        return output + drawn[-1]

    model = tiny_model("llama_gqa", LAYERS, "eager").train(is_trained)
    hf_tpp.parallelize(model, tp=2, num_microbatches=1, verbose=False)
    model.model.norm.register_forward_hook(add_noise)
    torch.manual_seed(dist.get_rank())
    batch = make_batch(4, SEQ, seed=0)
    with torch.no_grad():
        for _ in range(3):
            model(**batch)
    return drawn


def skipping_model(family: str, layerdrop: float) -> nn.Module:
    names = (
        "dropout",
        "attention_dropout",
        "activation_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
    )
    shape = {"hidden_size": 32, "d_model": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "attention_heads": 4, "num_hidden_layers": 4, "num_layers": 4}
    kind = AutoConfig.for_model(
        family, vocab_size=64, layerdrop=layerdrop, **shape, **heads, **dict.fromkeys(names, 0.0)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind)
    if family == "llama":  # stands for a model that skips blocks and may be cut along the sequence
        model.model.layerdrop = layerdrop
    return model
