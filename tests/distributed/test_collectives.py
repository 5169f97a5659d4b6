"""How much is communicated, counted; and the public tensor-parallel modules alone, against plain torch."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import hf_tpp
from hf_tpp.collectives import autograd
from hf_tpp.errors import ConfigurationError, UnsupportedModelError
from hf_tpp.parallel_model import parallel_state
from hf_tpp.plan.layout import Block, Layout, padded_vocabulary
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks

# --- counts -----------------------------------------------------------------------------------------------------------

COUNTED = (
    (dist, "all_reduce"),
    (dist, "broadcast"),
    (dist, "send"),
    (dist, "recv"),
    (dist, "isend"),
    (dist, "irecv"),
    (autograd, "all_gather_flat"),
    (autograd, "reduce_scatter_flat"),
)


@contextmanager
def counting(group: dist.ProcessGroup | Sequence[dist.ProcessGroup] | None = None) -> Iterator[Counter[str]]:
    """Count calls by name; of the collectives, only those in `group`, if one is given."""
    counts: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += group is None or kwargs.get("group") is group
            return function(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, name in COUNTED:
            stack.enter_context(mock.patch.object(module, name, counted(name, getattr(module, name))))
        yield counts


def count_tensor_parallel(model: str, layers: Sequence[int], microbatches: Sequence[int], **options: Any) -> Any:
    """Body of a rank: counts in the tp group of one training pass, by number of layers and of microbatches."""
    found = {}
    for num_layers in layers:
        for num_microbatches in microbatches:
            local = tiny_model(model, num_layers).train()
            if options.pop("checkpointing", False):
                local.gradient_checkpointing_enable({"use_reentrant": False})
            arguments = {"num_microbatches": num_microbatches, "verbose": False, **options}
            local = hf_tpp.parallelize(local, tp=2, **arguments)
            batch = make_batch(4, 8)
            local(**batch).loss.backward()
            with counting(parallel_state(local).mesh.tp.group) as counts:
                local(**batch).loss.backward()
            found[num_layers, num_microbatches] = counts
    return found


def per_layer_and_microbatch(found: dict[tuple[int, int], Counter[str]], name: str) -> float:
    """The mixed difference: what one more layer costs in one more microbatch."""
    return found[3, 3][name] - found[2, 3][name] - found[3, 1][name] + found[2, 1][name]


@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama_gqa"])
def test_four_all_reduces_per_layer_and_microbatch(model):
    """Two in the forward pass (end of attention, end of MLP), two in the backward pass (their beginnings)."""
    for found in run_ranks(count_tensor_parallel, 2, model, [2, 3], [1, 3]):
        for num_microbatches in (1, 3):
            one_more_layer = found[3, num_microbatches] - found[2, num_microbatches]
            assert one_more_layer == {"all_reduce": 4 * num_microbatches}
            # Embedding; head's input; loss: maximum, then sum and target together.
            assert found[2, num_microbatches]["all_reduce"] == (2 * 4 + 4) * num_microbatches


def test_replicated_heads_cost_two_messages_per_layer_and_step():
    """Key and value weights of the one head that both ranks hold, whatever the number of microbatches."""
    for found in run_ranks(count_tensor_parallel, 2, "llama_one_kv", [2, 3], [1, 3]):
        for num_microbatches in (1, 3):
            one_more_layer = found[3, num_microbatches] - found[2, num_microbatches]
            assert one_more_layer == {"all_reduce": 4 * num_microbatches + 2}


@pytest.mark.parametrize("model", ["gpt2", "gpt_neox", "llama_gqa"])
def test_sequence_parallelism_gathers_and_scatters_instead(model):
    """Forward: gather, scatter per region; backward: their conjugates. Norms are summed once per step."""
    for found in run_ranks(count_tensor_parallel, 2, model, [2, 3], [1, 3], sequence_parallel=True):
        for num_microbatches in (1, 3):
            one_more_layer = found[3, num_microbatches] - found[2, num_microbatches]
            times = 4 * num_microbatches
            assert one_more_layer == {"all_gather_flat": times, "reduce_scatter_flat": times}
            assert found[2, num_microbatches]["all_reduce"] == 4 * num_microbatches + 1


def count_pipeline(model: str, num_layers: int, num_microbatches: int) -> dict[str, Counter[str]]:
    """Body of a rank: counts of a training pass and of an evaluation, after one of each."""
    local = hf_tpp.parallelize(
        tiny_model(model, num_layers), pp=4, num_microbatches=num_microbatches, verbose=False, eval_logits=False
    )
    found = {}
    for what in ("training", "evaluation"):
        local.train(what == "training")
        for _ in range(2):
            with counting() as counts:
                loss = local(**make_batch(6, 8)).loss
        if what == "training":
            loss.backward()
        found[what] = counts
    return found


@pytest.mark.parametrize(("model", "num_layers"), [("gpt_neox", 4), ("llama_gqa", 6)])
def test_one_message_per_microbatch_link_and_direction(model, num_layers):
    """And nothing else between stages: no header, whatever the number of layers."""
    m = 3
    for stage, found in enumerate(run_ranks(count_pipeline, 4, model, num_layers, m)):
        links = (stage > 0) + (stage < 3)
        training, evaluation = found["training"], found["evaluation"]
        assert training["isend"] == training["irecv"] == links * m
        assert evaluation["isend"] == (stage < 3) * m
        assert evaluation["irecv"] == (stage > 0) * m
        for counts in (training, evaluation):
            assert counts["send"] == counts["recv"] == counts["broadcast"] == 0
            assert counts["all_reduce"] == 1  # the loss


# --- modules alone ----------------------------------------------------------------------------------------------------

TOKENS = 6
FUSED = Layout((Block(4, 2), Block(4, 2), Block(4, 2)))
COPIED = Layout((Block(4, 2), Block(1, 2), Block(1, 2)))


def cut(full: torch.Tensor, dim: int, layout: Layout) -> torch.Tensor:
    """This rank's part, padded."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts = [full.narrow(dim, piece.start, piece.size) for piece in layout.segments(rank, size)]
    local = torch.cat([full.narrow(dim, 0, 0), *parts], dim)
    missing = layout.local_size(rank, size) - local.shape[dim]
    shape = [missing if d == dim else length for d, length in enumerate(full.shape)]
    return torch.cat([local, local.new_zeros(shape)], dim)


def assert_close(found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
    assert found is not None
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def linear_of(kind: str, in_features: int, out_features: int, bias: bool) -> nn.Module:
    torch.manual_seed(3)
    if kind == "Conv1D":
        conv = Conv1D(out_features, in_features)
        nn.init.normal_(conv.bias)
        return conv
    return nn.Linear(in_features, out_features, bias)


def inputs(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two equal leaves."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    return x.clone().requires_grad_(), x.clone().requires_grad_()


def column_parallel(kind: str, bias: bool, gather: bool, layout: Layout | None) -> None:
    """Body of a rank."""
    linear = linear_of(kind, 10, layout.size if layout else 24, bias)
    ours = hf_tpp.ColumnParallelLinear.from_linear(linear, group=dist.group.WORLD, layout=layout, gather_output=gather)
    x, plain_x = inputs(2, TOKENS, 10)
    y, plain_y = ours(x), linear(plain_x)
    expected = plain_y if gather else cut(plain_y, -1 % plain_y.dim(), ours.layout)
    assert_close(y, expected)
    upstream = torch.randn(plain_y.shape, generator=torch.Generator().manual_seed(5))
    plain_y.backward(upstream)
    y.backward(upstream if gather else cut(upstream, upstream.dim() - 1, ours.layout))
    assert_close(x.grad, plain_x.grad)
    dim = 1 if kind == "Conv1D" else 0
    assert_close(ours.weight, cut(linear.weight, dim, ours.layout))
    assert_close(ours.weight.grad, cut(linear.weight.grad, dim, ours.layout))
    if linear.bias is not None:
        assert_close(ours.bias.grad, cut(linear.bias.grad, 0, ours.layout))


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    ("kind", "bias", "layout"), [("Linear", True, None), ("Linear", False, FUSED), ("Conv1D", True, FUSED)]
)
def test_column_parallel_linear(kind, bias, gather, layout):
    run_ranks(column_parallel, 2, kind, bias, gather, layout)


def uneven_columns() -> None:
    """Body of a rank: seven outputs on two ranks."""
    column_parallel("Linear", True, False, Layout((Block(7),)))
    with pytest.raises(ConfigurationError, match="gather_output needs equal shards, but 7 outputs over tp=2"):
        hf_tpp.ColumnParallelLinear.from_linear(nn.Linear(3, 7), group=dist.group.WORLD, gather_output=True)


def test_uneven_columns():
    run_ranks(uneven_columns, 2)


def copied_columns() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Body of a rank: one key/value head that both ranks hold; each sees the gradient of its own use."""
    linear = linear_of("Linear", 10, COPIED.size, True)
    ours = hf_tpp.ColumnParallelLinear.from_linear(linear, group=dist.group.WORLD, layout=COPIED)
    x, plain_x = inputs(TOKENS, 10)
    y, plain_y = ours(x), linear(plain_x)
    assert_close(y, cut(plain_y, 1, COPIED))
    y.sum().backward()
    # Both ranks use the copied heads, so that in one process each of these outputs counts twice.
    weight = torch.ones(COPIED.size).index_fill(0, torch.arange(8, 12), 2.0)
    (plain_y * weight).sum().backward()
    assert_close(x.grad, plain_x.grad)
    return ours.weight.grad, linear.weight.grad


def test_copied_columns():
    (first, plain), (second, _) = run_ranks(copied_columns, 2)
    assert_close(torch.cat([first[:4], second[:4]]), plain[:8])
    assert_close(first[4:] + second[4:], plain[8:])


def row_parallel(kind: str, bias: bool, is_parallel: bool) -> None:
    """Body of a rank."""
    linear = linear_of(kind, 12, 10, bias)
    ours = hf_tpp.RowParallelLinear.from_linear(linear, group=dist.group.WORLD, input_is_parallel=is_parallel)
    x, plain_x = inputs(2, TOKENS, 12)
    plain_y = linear(plain_x)
    local = cut(x, 2, ours.layout) if is_parallel else x
    y = ours(local)
    assert_close(y, plain_y)
    upstream = torch.randn(plain_y.shape, generator=torch.Generator().manual_seed(5))
    plain_y.backward(upstream)
    y.backward(upstream)
    expected = cut(plain_x.grad, 2, ours.layout) if is_parallel else plain_x.grad
    assert_close(cut(x.grad, 2, ours.layout) if is_parallel else x.grad, expected)
    dim = 0 if kind == "Conv1D" else 1
    assert_close(ours.weight.grad, cut(linear.weight.grad, dim, ours.layout))
    if linear.bias is not None:
        assert_close(ours.bias.grad, linear.bias.grad)


@pytest.mark.parametrize("is_parallel", [False, True])
@pytest.mark.parametrize(("kind", "bias"), [("Linear", True), ("Linear", False), ("Conv1D", True)])
def test_row_parallel_linear(kind, bias, is_parallel):
    run_ranks(row_parallel, 2, kind, bias, is_parallel)


def a_pair_of_linears() -> None:
    """Body of a rank: f(X A) B with a nonlinearity between, the way that blocks use the pair."""
    first, second = linear_of("Linear", 10, 14, True), linear_of("Linear", 14, 10, True)
    column = hf_tpp.ColumnParallelLinear.from_linear(first, group=dist.group.WORLD)
    row = hf_tpp.RowParallelLinear.from_linear(second, group=dist.group.WORLD)
    x, plain_x = inputs(TOKENS, 10)
    y, plain_y = row(F.gelu(column(x))), second(F.gelu(first(plain_x)))
    assert_close(y, plain_y)
    (y**2).sum().backward()
    (plain_y**2).sum().backward()
    assert_close(x.grad, plain_x.grad)
    assert_close(column.weight.grad, cut(first.weight.grad, 0, column.layout))
    assert_close(row.weight.grad, cut(second.weight.grad, 1, row.layout))


class TwoRanks:
    """Looks like a process group."""

    def size(self) -> int:
        return 2


def test_what_entered_a_region_is_not_changed_in_place():
    """Its gradient would no longer be summed over the ranks."""
    entered = autograd.copy_to_tensor_parallel(torch.ones(3, requires_grad=True) * 1, TwoRanks())
    with pytest.raises(RuntimeError, match="modified inplace"):
        entered *= 2


def test_a_column_and_a_row_make_a_region():
    run_ranks(a_pair_of_linears, 2)


def vocab_embedding(num_embeddings: int, padding_idx: int | None) -> None:
    """Body of a rank."""
    torch.manual_seed(3)
    embedding = nn.Embedding(num_embeddings, 5, padding_idx)
    ours = hf_tpp.VocabParallelEmbedding.from_embedding(embedding, group=dist.group.WORLD)
    ids = torch.arange(num_embeddings).repeat(3)[torch.randperm(3 * num_embeddings)].view(3, -1)
    y, plain_y = ours(ids), embedding(ids)
    assert_close(y, plain_y)
    upstream = torch.randn(plain_y.shape)
    y.backward(upstream)
    plain_y.backward(upstream)
    assert_close(ours.weight, cut(embedding.weight, 0, ours.layout))
    assert_close(ours.weight.grad, cut(embedding.weight.grad, 0, ours.layout))
    for wrong in (-1, num_embeddings, num_embeddings + 1, 10**6):
        with pytest.raises(IndexError):
            ours(torch.tensor([[0, wrong]]))
    embedding.max_norm = 1.0
    with pytest.raises(UnsupportedModelError, match="max_norm"):
        hf_tpp.VocabParallelEmbedding.from_embedding(embedding, group=dist.group.WORLD)


@pytest.mark.parametrize(("num_embeddings", "padding_idx"), [(12, None), (11, 0), (11, 10), (5, 4), (3, None)])
def test_vocab_parallel_embedding(num_embeddings, padding_idx):
    """On four ranks: five entries leave rank 2 with one row and rank 3 with padding alone."""
    run_ranks(vocab_embedding, 2, num_embeddings, padding_idx)
    if num_embeddings < 12:
        run_ranks(vocab_embedding, 4, num_embeddings, padding_idx)


def cross_entropy(num_classes: int, dtype: torch.dtype, scale: float) -> None:
    """Body of a rank."""
    group = dist.group.WORLD
    layout = padded_vocabulary(num_classes, group.size())
    generator = torch.Generator().manual_seed(6)
    full = (torch.randn(20, num_classes, generator=generator) * scale).to(dtype).requires_grad_()
    targets = torch.randint(num_classes, (20,), generator=generator)
    targets[3:6] = -100
    # What stands in the padding must not matter.
    local = cut(full.detach(), 1, layout)
    local[:, layout.valid_size(group.rank(), group.size()) :] = 1e4
    local.requires_grad_()
    losses = hf_tpp.vocab_parallel_cross_entropy(local, targets, layout, group)
    expected = F.cross_entropy(full.float(), targets, reduction="none")
    assert losses.dtype == torch.float32
    assert_close(losses, expected)
    assert (losses[3:6] == 0).all()
    upstream = torch.randn(20, generator=generator)
    losses.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(
        local.grad, cut(full.grad, 1, layout), rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-6
    )
    other = targets.where(targets != -100, num_classes - 1)
    again = hf_tpp.vocab_parallel_cross_entropy(local, other, layout, group, ignore_index=num_classes - 1)
    assert_close(again, F.cross_entropy(full.float(), other, reduction="none", ignore_index=num_classes - 1))
    for wrong in (-1, num_classes, 10**6):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            hf_tpp.vocab_parallel_cross_entropy(local.detach(), targets.where(targets != -100, wrong), layout, group)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(
    ("num_classes", "dtype", "scale"),
    [(12, torch.float32, 1.0), (11, torch.float32, 300.0), (5, torch.bfloat16, 3.0)],
)
def test_vocab_parallel_cross_entropy(world_size, num_classes, dtype, scale):
    run_ranks(cross_entropy, world_size, num_classes, dtype, scale)


def test_a_group_of_one():
    """Without a group the modules are plain ones."""
    x, plain_x = inputs(TOKENS, 10)
    linear = linear_of("Linear", 10, 12, True)
    for kind in (hf_tpp.ColumnParallelLinear, hf_tpp.RowParallelLinear):
        assert_close(kind.from_linear(linear, group=None)(x), linear(plain_x))
    embedding = nn.Embedding(7, 3, padding_idx=1)
    ids = torch.arange(7)
    assert_close(hf_tpp.VocabParallelEmbedding.from_embedding(embedding, group=None)(ids), embedding(ids))
    logits = torch.randn(4, 7)
    losses = hf_tpp.vocab_parallel_cross_entropy(logits, ids[:4], padded_vocabulary(7, 1), None)
    assert_close(losses, F.cross_entropy(logits, ids[:4], reduction="none"))
