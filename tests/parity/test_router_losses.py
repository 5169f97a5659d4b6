"""Losses that balance experts need the router logits of all stages, and are means over microbatches."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import hf_tpp
from hf_tpp.check.tiny_model import Recipe, build_model, make_batch, quiet
from hf_tpp.parallel_model import parallel_state
from hf_tpp.sharding import shard_tensor
from tests.ranks import run_ranks

FAMILIES = ["mixtral", "jetmoe", "jamba", "gpt_oss"]


def model_with_router_loss(family: str) -> nn.Module:
    model = build_model(Recipe(family))
    model.config.output_router_logits = True
    model.router_aux_loss_coef = 0.1
    return model


def plain_step(family: str, num_microbatches: int) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, what the routers add to it, and gradients: token losses add up, router losses are averaged."""
    model = model_with_router_loss(family)
    batch = make_batch(model)
    tokens = (batch["labels"][:, 1:] != -100).sum()
    total = added = 0.0
    for index in range(num_microbatches):
        part = {k: v.chunk(num_microbatches)[index] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        whole = model(**part, num_items_in_batch=tokens).loss
        alone = model(**part, num_items_in_batch=tokens, output_router_logits=False).loss
        loss = alone + (whole - alone) / num_microbatches
        loss.backward()
        total, added = total + float(loss), added + float(whole - alone) / num_microbatches
    return total, added, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(
    tp: int, pp: int, num_microbatches: int, families: Sequence[str] = FAMILIES, compile: Any = None
) -> list[tuple[str, float, float, list[str]]]:
    """Body of a rank: family, difference of the loss, what the routers added, gradients that differ."""
    found = []
    for family in families:
        with quiet():
            expected, added, gradients = plain_step(family, num_microbatches)
            model = hf_tpp.parallelize(
                model_with_router_loss(family),
                tp,
                pp,
                num_microbatches=num_microbatches,
                compile=compile,
                verbose=False,
            )
            loss = model(**make_batch(model)).loss
            loss.backward()
            specs = parallel_state(model).specs
            differing = []
            for name, spec in specs.items():
                full = gradients.get(spec.name)
                if full is None:
                    continue
                ours = model.get_parameter(name).grad
                theirs = shard_tensor(full, spec, full.device, full.dtype)
                difference = (torch.zeros_like(theirs) if ours is None else ours) - theirs
                if difference.norm() > 1e-4 * full.norm() + 1e-8:
                    differing.append(name)
            found.append((family, abs(float(loss) - expected) / expected, added, differing))
    return found


@pytest.mark.parametrize(("tp", "pp", "num_microbatches"), [(1, 2, 1), (1, 2, 2), (2, 1, 2), (2, 2, 2)])
def test_router_losses_of_all_stages(tp, pp, num_microbatches):
    check(run_ranks(compare, tp * pp, tp, pp, num_microbatches, timeout=120.0))


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_router_losses_of_compiled_blocks(family, tp, pp):
    """Logits are collected by hooks inside the blocks."""
    check(run_ranks(compare, tp * pp, tp, pp, 2, [family], {"backend": "aot_eager"}, timeout=280.0))


def check(ranks: list[list[tuple[str, float, float, list[str]]]]) -> None:
    for rank in ranks:
        for family, difference, added, differing in rank:
            assert added > 1e-3, family
            assert difference < 1e-5, family
            assert not differing, (family, differing)
