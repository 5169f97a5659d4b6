"""A stage's graph does not hold the output that was sent."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.split import StageComplete, StageFlow
from hf_tpp.pipeline_parallel.stage import Stage

SHAPE = (2, 3, 4)


def make_stage(flow: StageFlow, weight: torch.Tensor) -> Stage:
    def forward_model() -> None:
        assert flow.received is not None
        flow.output = flow.received + flow.received * weight
        raise StageComplete

    return Stage(forward_model, flow, [weight])


def test_output_is_freed_once_it_is_sent_and_gradients_are_right() -> None:
    weight = torch.randn(4, requires_grad=True)
    received, upstream = torch.randn(SHAPE), torch.randn(SHAPE)
    flow = StageFlow()
    stage = make_stage(flow, weight)
    graph, output = stage.forward({}, received, (SHAPE, torch.float32))
    storage = weakref.ref(output.untyped_storage())
    assert flow.output is None
    assert flow.received is None
    assert storage() is not None
    del output
    assert storage() is None, "something besides the message still holds the output"
    to_stage_before, gradients = stage.backward(graph, upstream)
    torch.testing.assert_close(to_stage_before, upstream * (1 + weight.detach()))
    torch.testing.assert_close(gradients[0], (upstream * received.detach()).sum((0, 1)))


def test_an_unexpected_message_is_refused() -> None:
    stage = make_stage(StageFlow(), torch.randn(4, requires_grad=True))
    with pytest.raises(UnsupportedModelError, match=r"float32 \[2, 3, 4\] where the next stage expects torch.bfloat16"):
        stage.forward({}, torch.randn(SHAPE), (SHAPE, torch.bfloat16))


def test_the_last_stage_hands_out_its_loss() -> None:
    weight = torch.tensor(3.0, requires_grad=True)
    stage = Stage(lambda x: SimpleNamespace(loss=x * weight), StageFlow(), [weight])
    graph, loss = stage.forward({"x": torch.tensor(2.0)}, None, (SHAPE, torch.float32))
    assert not loss.requires_grad
    assert float(loss) == 6.0
    assert stage.backward(graph, None) == (None, [torch.tensor(2.0)])
