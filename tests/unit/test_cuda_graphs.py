"""Which passes are recorded, and for which of them a recording stands; the graphs themselves need a GPU."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp import parallelize
from hf_tpp.calls.training import training_call
from hf_tpp.cuda_graphs import check_recordable
from hf_tpp.cuda_graphs.state import shape_of
from hf_tpp.errors import ConfigurationError
from hf_tpp.parallel_model import parallel_state
from hf_tpp.pipeline_parallel.stage import Traffic
from tests.parity.recorded import Repeater

VOCABULARY = 64
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": VOCABULARY}


class Recorder(Repeater):
    """Notes what it does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, parallel_state(model).calls.runner)
        self.is_bad = self.has_replayed = False

    def train(self, *args):
        self.has_replayed = False
        return super().train(*args)

    def _slots_for(self, *args):
        slots = super()._slots_for(*args)
        self.has_replayed = slots is not None
        return slots

    def _capture(self, slot, function):
        if self.is_bad:
            raise RuntimeError("it looked at a value\nand more")
        return super()._capture(slot, function)


class Passes:
    """Passes of a tiny model beside those of its plain self."""

    def __init__(self) -> None:
        config = AutoConfig.for_model("llama", num_hidden_layers=1, **SIZES)
        self.plain = AutoModelForCausalLM.from_config(config).train()
        self.plain.given = {"default": [1.0, 2.0]}
        self.model = parallelize(copy.deepcopy(self.plain), num_microbatches=2, verbose=False, device="cpu")
        self.calls = parallel_state(self.model).calls
        self.recorder = self.calls.recorder = Recorder(self.model)

    def loss(self, tokens: torch.Tensor, **further: Any) -> torch.Tensor:
        """Of a pass, which several processes would run in a call of the model."""
        loss: torch.Tensor = training_call(self.calls, {"input_ids": tokens, "labels": tokens, **further}).loss
        return loss

    def run(self, first: int = 0, rows: int = 4, length: int = 8, **further: Any) -> bool:
        """Whether a pass was replayed; its loss and gradients are those of one process."""
        tokens = (torch.arange(first, first + rows * length) % VOCABULARY).reshape(rows, length)
        self.model.zero_grad()
        self.plain.zero_grad()
        losses = [self.loss(tokens, **further), self.plain(input_ids=tokens, labels=tokens, **further).loss]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            assert ours.requires_grad == theirs.requires_grad
            if ours.requires_grad:
                torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
        return self.recorder.has_replayed

    def change(self, name: str) -> None:
        """Change both models alike."""
        for model in (self.model, self.plain):
            norm = model.model.norm
            if name == "weight":
                norm.weight.data = torch.full((8,), 5.0)
            elif name == "stride":
                model.lm_head.weight.data = model.lm_head.weight.data.set_(
                    model.lm_head.weight.untyped_storage(), 0, (VOCABULARY, 8), (1, VOCABULARY)
                )
            elif name == "requires_grad":
                norm.weight.requires_grad_(False)
            elif name == "attribute":
                norm.variance_epsilon = 0.5
            elif name == "training":
                norm.eval()
            elif name == "config":
                model.set_attn_implementation("eager")
            elif name == "forward":
                norm.forward = lambda x: x * 2.0
            elif name == "module":
                model.model.norm = nn.Identity()
            elif name == "container":
                norm.scales = {"default": [1.0, 3.0]}
            elif name == "inside a container":
                model.given["default"][1] = 3.0
            elif name == "tensor":
                norm.shift = torch.zeros(1)
            elif name == "buffer":
                model.register_buffer("shift", torch.zeros(1))


@pytest.fixture
def passes():
    passes = Passes()
    assert [passes.run() for _ in range(4)] == [False, False, True, True]
    return passes


def test_other_values_are_replayed(passes):
    assert passes.run(first=7)


def test_a_result_is_the_callers(passes):
    """Losses and gradients of a replayed pass, kept while others are replayed."""
    tokens = torch.arange(32).reshape(4, 8)
    losses = [passes.loss(ids) for ids in (tokens, tokens + 9)]
    assert losses[0] != losses[1]
    passes.model.zero_grad()
    for loss in losses:
        loss.backward()
    passes.plain.zero_grad()
    for ids in (tokens, tokens + 9):
        passes.plain(input_ids=ids, labels=ids).loss.backward()
    for ours, theirs in zip(passes.model.parameters(), passes.plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("further", [{"output_attentions": False}, {"position_ids": torch.arange(8).expand(4, 8)}])
def test_other_arguments_are_another_pass(passes, further):
    assert [passes.run(**further) for _ in range(3)] == [False, False, True]
    assert passes.run()


def test_other_shapes_are_another_pass(passes):
    assert not passes.run(length=9)


def test_more_microbatches_of_the_same_shape_are_the_same(passes):
    passes.calls.num_microbatches = 4
    assert passes.run(rows=8)


def test_microbatches_of_different_shapes_run_as_ever(passes):
    assert not any(passes.run(rows=5) for _ in range(4))


def test_arguments_that_cannot_be_told_apart_run_as_ever(passes):
    """Two large tensors in a tuple print alike."""
    ids = torch.zeros(2, 8, dtype=torch.long)
    plain, hidden = {"input_ids": ids}, {"input_ids": ids, "further": (torch.zeros(2000),)}
    assert shape_of(plain) == shape_of({"input_ids": ids + 1})
    assert shape_of(hidden) is None
    for _ in range(4):
        assert passes.recorder._slots_for([hidden, hidden], [Traffic(), Traffic()], (None,), lambda *_: ()) is None


def test_only_so_many_are_recorded(passes):
    for length in range(5, 8):
        assert [passes.run(length=length) for _ in range(3)] == [False, False, True]
    assert not any(passes.run(length=9) for _ in range(4))
    assert passes.run()
    for length in range(10, 30):
        passes.run(length=length)
    assert len(passes.recorder._passes) == 16


@pytest.mark.parametrize(
    "name",
    [
        *("weight", "requires_grad", "attribute", "training", "config", "forward", "module", "buffer"),
        *("container", "inside a container", "tensor", "stride"),
    ],
)
def test_what_a_pass_depends_on_is_not_replayed_once_it_changes(passes, name):
    passes.change(name)
    assert not passes.run()


def test_modes_of_torch_are_another_pass(passes):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert not passes.run()
    finally:
        torch.set_float32_matmul_precision(before)
    assert passes.run()
    tokens = torch.zeros(4, 8, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        passes.loss(tokens)
    assert not passes.recorder.has_replayed


@pytest.mark.parametrize(
    "install",
    [
        lambda module: module.register_forward_hook(lambda *_: None),
        lambda module: module.register_forward_pre_hook(lambda *_: None),
        lambda module: module.register_full_backward_hook(lambda *_: None),
        lambda _: nn.modules.module.register_module_forward_hook(lambda *_: None),
    ],
)
def test_hooks_of_the_user_run_in_every_pass(passes, install):
    handle = install(passes.model.model.norm)
    try:
        assert not any(passes.run() for _ in range(4))
    finally:
        handle.remove()
    assert [passes.run() for _ in range(3)][-1]


def test_what_cannot_be_recorded_runs_as_ever_and_says_so():
    passes = Passes()
    passes.recorder.is_bad = True
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs: it looked at a value$"):
        assert not any(passes.run() for _ in range(5))


@pytest.mark.parametrize("draw", [random.random, lambda: torch.rand(())], ids=["python", "torch"])
def test_a_model_that_draws_on_the_host_is_not_recorded(draw):
    """What it decides with such a number would be decided once for all."""
    passes = Passes()
    for model in (passes.model, passes.plain):
        plain = model.model.norm.forward
        model.model.norm.forward = lambda x, plain=plain: (draw(), plain(x))[1]
    with pytest.warns(UserWarning, match="the model draws random numbers on the host"):
        assert not any(passes.run() for _ in range(5))


@pytest.mark.parametrize("where", [("cpu", "replicate"), ("cuda", "fully_shard")])
def test_where_there_are_no_recordings(where):
    with pytest.raises(ConfigurationError, match=rf"cuda_graphs=True on {where[0]} with data_parallel.*leave it out"):
        check_recordable(*where)
    check_recordable("cuda", "replicate")


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
