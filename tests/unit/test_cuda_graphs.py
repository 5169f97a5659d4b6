"""Which passes are recorded, and for which of them a recording stands; the graphs themselves need a GPU."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp import parallelize
from hf_tpp.cuda_graphs import PassRecorder, check_recordable
from hf_tpp.errors import ConfigurationError
from hf_tpp.parallel_model import parallel_state
from hf_tpp.pipeline_parallel.runner import KeptGradients


@dataclass
class Repeated:
    """In place of a graph: does the arithmetic that was recorded."""

    weight: float

    def replay(self, inputs: Sequence[torch.Tensor]) -> tuple[Any, Any]:
        kept = KeptGradients(1)
        kept.tensors = [inputs[0] * self.weight]
        return [(inputs[0].sum() * self.weight,)], kept


class Recorder(PassRecorder):
    """Without a GPU."""

    def _on_stream(self, train, microbatches, gradients):
        return train(microbatches, gradients)

    def _record(self, train, microbatches, gradients):
        if self.model.is_bad:
            raise RuntimeError("it looked at a value\nand more")
        return Repeated(self.model.weight.item())


class Toy(nn.Module):
    """A model as far as a recorder looks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(3.0))
        self.child = nn.Dropout(0.0)
        self.is_bad = False
        self.config = AutoConfig.for_model("llama")


class Passes:
    """Runs passes, and counts those that ran as ever."""

    def __init__(self) -> None:
        self.model = Toy()
        self.recorder = Recorder(self.model, torch.device("cpu"))
        self.count = 0

    def train(self, microbatches, gradients):
        self.count += 1
        return Repeated(self.model.weight.item()).replay([microbatches[0]["input_ids"]])

    def run(self, ids: torch.Tensor | None = None, **further: Any) -> bool:
        """Whether a pass was replayed."""
        before = self.count
        ids = torch.arange(4.0) if ids is None else ids
        (output,), kept = self.recorder.train(self.train, [{"input_ids": ids, **further}], [torch.ones(()), None])
        assert torch.equal(kept.tensors[0], ids * self.model.weight)
        assert output[0] == (ids * self.model.weight).sum()
        return self.count == before


@pytest.fixture
def passes():
    passes = Passes()
    assert [passes.run() for _ in range(4)] == [False, False, True, True]
    return passes


def test_other_values_are_replayed(passes):
    assert passes.run(torch.arange(4.0) + 1)


@pytest.mark.parametrize("further", [{"use_cache": False}, {"attention_mask": torch.ones(4)}])
def test_other_arguments_are_another_pass(passes, further):
    assert [passes.run(**further) for _ in range(3)] == [False, False, True]
    assert passes.run()


def test_other_shapes_are_another_pass(passes):
    assert not passes.run(torch.arange(5.0))
    assert not passes.run(torch.arange(8.0)[::2])


def test_only_so_many_are_recorded(passes):
    for size in range(5, 8):
        assert [passes.run(torch.arange(float(size))) for _ in range(3)] == [False, False, True]
    assert not any(passes.run(torch.arange(9.0)) for _ in range(4))
    assert passes.run()


def change(name: str) -> Any:
    def to(model: Toy) -> None:
        if name == "weight":
            model.weight.data = torch.tensor(5.0)
        elif name == "requires_grad":
            model.weight.requires_grad_(False)
        elif name == "attribute":
            model.child.p = 0.5
        elif name == "training":
            model.child.eval()
        elif name == "config":
            model.config._attn_implementation = "eager"
        elif name == "forward":
            model.child.forward = lambda x: x
        elif name == "module":
            model.child = nn.Identity()
        elif name == "buffer":
            model.register_buffer("shift", torch.zeros(1))

    return to


@pytest.mark.parametrize(
    "name", ["weight", "requires_grad", "attribute", "training", "config", "forward", "module", "buffer"]
)
def test_what_a_pass_depends_on_is_not_replayed_once_it_changes(passes, name):
    change(name)(passes.model)
    assert not passes.run()


def test_autocast_is_another_pass(passes):
    with torch.autocast("cpu", torch.bfloat16):
        assert not passes.run()


@pytest.mark.parametrize(
    "install",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
    ],
)
def test_hooks_of_the_user_run_in_every_pass(passes, install):
    handle = install(passes.model.child)
    assert not any(passes.run() for _ in range(4))
    handle.remove()
    assert [passes.run() for _ in range(3)][-1]


def test_what_cannot_be_recorded_runs_as_ever_and_says_so():
    passes = Passes()
    passes.model.is_bad = True
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs: it looked at a value$"):
        assert not any(passes.run() for _ in range(5))


@pytest.mark.parametrize("sizes", [("cpu", 1, "replicate"), ("cuda", 2, "replicate"), ("cuda", 1, "fully_shard")])
def test_where_there_are_no_recordings(sizes):
    with pytest.raises(ConfigurationError, match=rf"cuda_graphs=True on {sizes[0]} with pp={sizes[1]}.*leave it out"):
        check_recordable(*sizes)
    check_recordable("cuda", 1, "replicate")


@pytest.mark.parametrize(
    ("option", "message"),
    [("cuda_graphs", "cuda_graphs=True on cpu"), ("overlap_microbatches", "overlap_microbatches=True with tp=1, pp=1")],
)
def test_a_model_that_cannot_is_left_as_it_was(option, message):
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=9)
    model = AutoModelForCausalLM.from_config(config)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigurationError, match=message):
        parallelize(model, verbose=False, device="cpu", **{option: True})
    assert parallel_state(model) is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
