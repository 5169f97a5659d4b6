"""Make a whole model into one stage: layers of other stages stay where they are, but hollow.

    model's own forward on stage 1 of 3, layers 2 and 3 local

    embedding     zeros of the right shape (masks, rotary tables and position ids are computed from the batch as ever)
    layer 0, 1    hand on what was received
    layer 2, 3    real
    layer 4       takes what layer 3 gave: the message to the next stage; stops the forward

A hollow layer is the same object with the same attributes, without parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts
from hf_tpp.pipeline_parallel.cache import hold_length

__all__ = ["StageComplete", "StageFlow", "hollow_out"]


class StageComplete(BaseException):
    """Raised by the first layer behind this stage: the forward of this stage is done.

    It is no error, and no `except Exception` in a model may swallow it.
    """


@dataclass(slots=True)
class StageFlow:
    """What flows through a stage's hollow layers in the forward pass of one microbatch.

    Attributes:
        received: Hidden states from the stage before, [batch, seq, hidden]; None on the first stage.
        output: Hidden states for the next stage; None on the last stage.
        tuple_length: What the model's blocks return: 0 is the hidden states alone, n a tuple of n with the hidden
            states first. Hollow layers must do the same; a stage learns it from the stage before it, once.
    """

    received: torch.Tensor | None = field(default=None, repr=False)
    output: torch.Tensor | None = field(default=None, repr=False)
    tuple_length: int | None = None


def hollow_out(model: nn.Module, parts: ModelParts, blocks: range, flow: StageFlow) -> None:
    """Hollow every part of `model` that does not belong to the stage with `blocks`, in place.

    Args:
        model: The whole model.
        parts: Its parts.
        blocks: Indices of the stage's own blocks.
        flow: What the hollow layers hand on and take.
    """
    is_first, is_last = blocks.start == 0, blocks.stop == parts.num_blocks
    block_list = model.get_submodule(parts.blocks)
    assert isinstance(block_list, nn.ModuleList)
    for index, block in enumerate(block_list):
        if index not in blocks:
            _drop_tensors(block)
            hand_on = index < blocks.start
            block.forward = _receive(flow, index) if hand_on else _complete(flow)
    block_list[blocks[-1]].register_forward_hook(_note_convention(flow))
    if not is_first:
        _hollow_embedding(model.get_submodule(parts.embedding))
        for name in parts.before:
            _hollow_before(model.get_submodule(name))
    if not is_last:
        for name in (*parts.after, parts.head):
            module = model.get_submodule(name)
            if any(True for _ in module.parameters()):
                _drop_tensors(module)


def _receive(flow: StageFlow, layer_index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        assert flow.received is not None
        hold_length((*args, *kwargs.values()), layer_index, flow.received)
        if not flow.tuple_length:
            return flow.received
        return flow.received, *[None] * (flow.tuple_length - 1)

    return forward


def _note_convention(flow: StageFlow) -> Callable[..., None]:
    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, tuple):
            unknown = [type(extra).__name__ for extra in output[1:] if not (extra is None or isinstance(extra, Cache))]
            if unknown:
                raise UnsupportedModelError(
                    f"{type(module).__name__} returns {', '.join(unknown)} beside the hidden states, which would be "
                    f"lost between stages: use pp=1 for this model"
                )
        flow.tuple_length = len(output) if isinstance(output, tuple) else 0

    return note


def _complete(flow: StageFlow) -> Callable[..., torch.Tensor]:
    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        output = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, torch.Tensor):
            raise UnsupportedModelError(
                f"a block hands a {type(output).__name__} to the next one where a stage can only send one tensor: "
                f"use pp=1 for this model"
            )
        flow.output = output
        raise StageComplete

    return forward


def _hollow_embedding(embedding: nn.Module) -> None:
    """Zeros in place of the rows: [batch, seq] -> [batch, seq, hidden]."""
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    hidden_size, dtype = weight.shape[1], weight.dtype

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((*token_ids.shape, hidden_size), dtype=dtype, device=token_ids.device)

    _drop_tensors(embedding)
    embedding.forward = forward


def _hollow_before(module: nn.Module) -> None:
    """A part that runs ahead of the first block: its result is never used on a later stage."""
    if isinstance(module, nn.Embedding):
        _hollow_embedding(module)
    elif any(True for _ in module.parameters()):
        _drop_tensors(module)
        module.forward = lambda x, *_, **__: x


def _drop_tensors(module: nn.Module) -> None:
    for submodule in module.modules():
        for name in list(submodule._parameters):
            submodule.register_parameter(name, None)
        for name in list(submodule._buffers):
            submodule.register_buffer(name, None)
