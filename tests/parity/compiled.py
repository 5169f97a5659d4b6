"""Training with compiled blocks on the ranks, and what torch made of them."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import hf_tpp
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import Case, Record, run_parallel

EAGER = {"backend": "aot_eager"}
"""Everything of torch.compile but the generation of code, which takes most of the time."""


@dataclass
class Counts:
    """What was compiled on one rank."""

    graphs: int
    breaks: int


def counted(function: Callable[..., Any], *args: Any) -> tuple[Any, Counts]:
    """Call a function, and count what torch compiles meanwhile."""
    torch._dynamo.reset()
    counters.clear()
    result = function(*args)
    return result, Counts(counters["stats"].get("unique_graphs", 0), sum(counters["graph_break"].values()))


def run_cases(cases: Sequence[Case]) -> list[tuple[tuple[int, int, int, Record], Counts]]:
    """Body of a rank."""
    return [counted(run_parallel, case) for case in cases]


@dataclass
class Way:
    """One way to train a tiny model of two blocks for one pass after another."""

    model: str
    tp: int = 1
    pp: int = 1
    sequence_parallel: bool = False
    checkpointing: bool = False
    dropout: float = 0.0
    autocast: bool = False
    with_mask: bool = True
    rows: int = 4
    lengths: Sequence[int] = (12,)
    prepare: str = ""
    """Name of a function of this module that changes the plain model."""
    limit: int = 8
    """Graphs that torch keeps of one piece of code."""

    def build(self, compile: Any) -> nn.Module:
        model = tiny_model(self.model, 2, dropout=self.dropout).train()
        if self.prepare:
            globals()[self.prepare](model)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sizes = {"tp": self.tp, "pp": self.pp, "num_microbatches": 2, "sequence_parallel": self.sequence_parallel}
        return hf_tpp.parallelize(model, **sizes, compile=compile, verbose=False)


@dataclass
class Trained:
    """What some passes leave behind on one rank."""

    losses: list[float]
    gradients: dict[str, torch.Tensor]
    masks: list[torch.Tensor | None]
    warnings: list[str]
    counts: Counts


def both(way: Way, compile: Any) -> tuple[Trained, Trained]:
    """Body of a rank: the same passes with plain and with compiled blocks."""
    return train(way, None), train(way, compile)


def train(way: Way, compile: Any) -> Trained:
    model = way.build(compile)
    masks: list[torch.Tensor | None] = []

    def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("attention_mask"))

    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    own = [block for block in blocks if any(parameter.numel() for parameter in block.parameters())]
    own[0].register_forward_pre_hook(see, with_kwargs=True)
    losses: list[float] = []

    def passes() -> None:
        for index, length in enumerate(way.lengths):
            batch = make_batch(way.rows, length, seed=index)
            if not way.with_mask:
                del batch["attention_mask"]
            torch.manual_seed(index)
            with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
                loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())

    with warnings.catch_warnings(record=True) as caught, torch._dynamo.config.patch(recompile_limit=way.limit):
        warnings.simplefilter("always")
        _, counts = counted(passes)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Trained(losses, gradients, masks, [str(warning.message) for warning in caught], counts)


def evaluate_only(way: Way) -> Counts:
    """Body of a rank: everything but training."""
    model = way.build(EAGER)

    def calls() -> None:
        with torch.no_grad():
            model(**make_batch(2, 8))
        model.eval()
        model(**make_batch(2, 8))
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)

    return counted(calls)[1]


def scale_one_norm(model: nn.Module) -> None:
    """A hook inside one block and not inside the other, which share a graph otherwise."""
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda _, args, output: output * 1.5)
