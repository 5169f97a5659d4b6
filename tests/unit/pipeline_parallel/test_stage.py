"""A stage's graph does not hold the output that was sent."""

import weakref
from types import SimpleNamespace

import pytest
import torch

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.flow import StageComplete, StageFlow
from hf_tpp.pipeline_parallel.payload import plain_payload
from hf_tpp.pipeline_parallel.stage import Stage, Traffic

SHAPE = (2, 3, 4)
TOKENS = {"input_ids": torch.zeros(SHAPE[:2], dtype=torch.long)}
PLAIN = plain_payload(SHAPE, torch.float32)


def make_stage(flow: StageFlow, weight: torch.Tensor) -> Stage:
    def forward_model(input_ids: torch.Tensor) -> None:
        assert flow.received is not None
        hidden = flow.hand_on({"hidden_states": flow.received[0]}, block=0)
        flow.output = (hidden + hidden * weight,)
        raise StageComplete

    return Stage(forward_model, flow, [weight])


def read_loss(output: SimpleNamespace) -> tuple[torch.Tensor]:
    return (output.loss,)


def test_output_is_freed_once_it_is_sent_and_gradients_are_right() -> None:
    weight = torch.randn(4, requires_grad=True)
    received, upstream = torch.randn(SHAPE), torch.randn(SHAPE)
    flow = StageFlow()
    stage = make_stage(flow, weight)
    graph, output = stage.forward(TOKENS, (received,), Traffic(PLAIN, PLAIN), read_loss)
    storage = weakref.ref(output[0].untyped_storage())
    assert flow.output is None
    assert flow.received is None
    assert storage() is not None
    del output
    assert storage() is None, "something besides the message still holds the output"
    (to_stage_before,), gradients = stage.backward(graph, (upstream,))
    torch.testing.assert_close(to_stage_before, upstream * (1 + weight.detach()))
    torch.testing.assert_close(gradients[0], (upstream * received.detach()).sum((0, 1)))


def test_an_unexpected_message_is_refused() -> None:
    stage = make_stage(StageFlow(), torch.randn(4, requires_grad=True))
    other = Traffic(PLAIN, plain_payload(SHAPE, torch.bfloat16))
    with pytest.raises(UnsupportedModelError, match=r"float32 \[2, 3, 4\] where the next stage expects torch.bfloat16"):
        stage.forward(TOKENS, (torch.randn(SHAPE),), other, read_loss)


@pytest.mark.parametrize("skipped", ["hollow", "last", "behind"])
def test_skipped_blocks_are_refused(skipped: str) -> None:
    """The hollow ones hand on what was received, the last own one makes the message, the ones behind end the pass."""
    flow = StageFlow()

    def forward_model(input_ids: torch.Tensor) -> None:
        hidden = torch.zeros(SHAPE)
        if skipped != "hollow":
            hidden = flow.hand_on({"hidden_states": hidden}, block=0)
        if skipped != "last":
            hidden = flow.note_output(hidden * 2)
        if skipped != "behind":
            flow.complete({"hidden_states": hidden})

    stage = Stage(forward_model, flow)
    with pytest.raises(UnsupportedModelError, match="skipped blocks at the edge of a pipeline stage"):
        stage.forward(TOKENS, (torch.randn(SHAPE),), Traffic(PLAIN, PLAIN), read_loss)


def test_the_last_stage_hands_out_what_is_read() -> None:
    """The loss goes back by the gradient it is given; the logits, read without a graph, do not."""
    weight = torch.tensor(3.0, requires_grad=True)
    stage = Stage(lambda input_ids, x: SimpleNamespace(loss=x * weight, logits=x + weight), StageFlow(), [weight])
    batch = {**TOKENS, "x": torch.tensor(2.0)}
    graph, outputs = stage.forward(batch, None, Traffic(), lambda output: (output.loss, output.logits.detach()))
    assert not any(output.requires_grad for output in outputs)
    assert [float(output) for output in outputs] == [6.0, 5.0]
    assert stage.backward(graph, (torch.tensor(0.5), None)) == ((), [torch.tensor(1.0)])


def test_a_pass_keeps_its_parameters() -> None:
    """Others may be trained by the time of its backward."""
    weight, other = torch.tensor(3.0, requires_grad=True), torch.tensor(1.0, requires_grad=True)
    stage = Stage(lambda input_ids: SimpleNamespace(loss=weight * 2), StageFlow(), [weight])
    graph, _ = stage.forward(TOKENS, None, Traffic(), read_loss)
    stage.parameters = [other]
    assert stage.backward(graph, (torch.tensor(1.0),)) == ((), [torch.tensor(2.0)])
