"""What `parallelize` does where the user leaves it the choice."""

import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from hf_tpp.compilation import AUTOMATIC, CompiledBlocks
from hf_tpp.options import World, with_defaults


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "triton")


@pytest.mark.parametrize("world", [World("cuda", 2, 1, 4), World("cuda", 1, 2, 2), World("cuda", 1, 1, 2)])
def test_blocks_are_compiled_on_gpus(world, triton):
    assert with_defaults({"compile": None, "tp": 2}, world) == {"compile": AUTOMATIC, "tp": 2}


def test_without_triton_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert with_defaults({"compile": None}, World("cuda", 2, 1, 2)) == {"compile": False}


@pytest.mark.parametrize("world", [World("cpu", 2, 2, 4), World("cuda", 1, 1, 1)], ids=["cpu", "one"])
def test_nothing_is_compiled_on_cpus_and_for_single_processes(world, triton):
    assert with_defaults({"compile": None}, world) == {"compile": False}


@pytest.mark.parametrize("value", [True, False, {"dynamic": True}])
def test_what_the_user_says_stands(value, triton):
    for world in (World("cuda", 2, 1, 2), World("cpu", 1, 2, 2)):
        assert with_defaults({"compile": value}, world) == {"compile": value}


class Failing:
    """A torch.compile that cannot generate code."""

    def __init__(self, monkeypatch: Any, error: type[Exception] = TorchDynamoException) -> None:
        monkeypatch.setattr(torch, "compile", lambda function, **_: self.fail)
        self.error, self.count = error, 0

    def fail(self, *_: Any) -> Any:
        self.count += 1
        raise self.error("no compiler\nat all")


def blocks_of(wanted: Any, draws: bool = False) -> nn.Module:
    block = nn.Linear(2, 2)
    regions: Any = SimpleNamespace(streams=SimpleNamespace(active=draws), group=object(), sequence_parallel=False)
    CompiledBlocks([block], regions).compile(wanted)
    return block


@pytest.mark.parametrize(("error", "count"), [(TorchDynamoException, 2), (FailOnRecompileLimitHit, 4)])
def test_what_cannot_be_compiled_runs_plain_unless_it_was_asked_for(error, count, monkeypatch):
    """A further shape is one of many: those that have a graph are still compiled."""
    failing = Failing(monkeypatch, error)
    with pytest.raises(error):
        blocks_of(True)(torch.ones(2))
    block = blocks_of(AUTOMATIC)
    with pytest.warns(UserWarning, match="blocks run uncompiled, since torch.compile failed: no compiler "):
        results = [block(torch.ones(2)) for _ in range(3)]
    assert failing.count == count
    assert torch.equal(results[0], nn.functional.linear(torch.ones(2), block.weight, block.bias))


class TwoParts(nn.Linear):
    """A block that torch.compile would cut in two."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        torch._dynamo.graph_break()
        return output.relu()


def test_a_block_is_compiled_as_a_whole_or_not_at_all():
    """The first part, with its collectives, must not have run where the second cannot."""
    block = TwoParts(2, 2)
    expected = block(torch.ones(2))
    regions: Any = SimpleNamespace(streams=SimpleNamespace(active=False), group=None, sequence_parallel=False)
    CompiledBlocks([block], regions).compile(AUTOMATIC)
    with pytest.warns(UserWarning, match="blocks run uncompiled, since torch.compile failed"):
        assert torch.equal(block(torch.ones(2)), expected)


def test_what_is_known_to_run_plain_says_so_only_where_it_was_asked_for(monkeypatch):
    Failing(monkeypatch)
    with pytest.warns(UserWarning, match="dropout is on"):
        blocks_of(True, draws=True)(torch.ones(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        blocks_of(AUTOMATIC, draws=True)(torch.ones(2))
