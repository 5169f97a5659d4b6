"""Make a whole model into one stage: layers of other stages stay where they are, but hollow.

    model's own forward on stage 1 of 3, layers 2 and 3 local

    embedding     zeros of the right shape (masks, rotary tables and position ids are computed from the batch as ever)
    layer 0, 1    hand on what was received
    layer 2, 3    real
    layer 4       takes what layer 3 gave: the message to the next stage; stops the forward

A hollow layer is the same object with the same attributes, without parameters. Parameters outside the blocks are on the
stages whose blocks use them; elsewhere zeros stand in for them that take no memory.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_tpp.parts import ModelParts
from hf_tpp.pipeline_parallel.cache import cache_layers, hold_length
from hf_tpp.pipeline_parallel.flow import StageFlow
from hf_tpp.pipeline_parallel.routers import watch_routers

__all__ = ["hollow_out"]


def hollow_out(
    model: nn.Module,
    parts: ModelParts,
    blocks: range,
    needed: Collection[str],
    flow: StageFlow,
    device: torch.device,
) -> None:
    """Hollow every part of `model` that does not belong to the stage with `blocks`, in place.

    Args:
        model: The whole model.
        parts: Its parts.
        blocks: Indices of the stage's own blocks.
        needed: Names of the parameters outside the blocks that this stage uses.
        flow: What the hollow layers hand on and take; says which earlier blocks' outputs go along.
        device: Where stand-ins live.
    """
    block_list = model.get_submodule(parts.blocks)
    assert isinstance(block_list, nn.ModuleList)
    own = {module for index in blocks for module in block_list[index].modules()}
    for index, block in enumerate(block_list):
        if index not in blocks:
            is_ahead = index < blocks.start
            hollow = _receive(block, flow, index) if is_ahead else _complete(block, flow, block_list[index:], index)
            _drop_tensors(block, own)
            block.forward = hollow
    if blocks.stop < parts.num_blocks:
        _watch(block_list[0], block_list[blocks[-1]], flow)
        for index in (index for index in flow.history if index in blocks):
            block_list[index].register_forward_hook(_note_earlier(flow, index))
    if blocks.start:
        _watch_entry(block_list[blocks.start], flow)
    watch_routers(model, parts, blocks, flow.routers)
    embedding = model.get_submodule(parts.embedding)
    if f"{parts.embedding}.weight" not in needed:
        _hollow_embedding(embedding, flow)
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parts.is_in_block(name) and name not in needed:
            _stand_in(model, name, parameter, device)


def _watch(first: nn.Module, last: nn.Module, flow: StageFlow) -> None:
    names = _argument_names(first)

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.see_arguments(_named(names, args, kwargs))

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return flow.note_output(output)

    first.register_forward_pre_hook(see, with_kwargs=True)
    last.register_forward_hook(note)


def _watch_entry(block: nn.Module, flow: StageFlow) -> None:
    names = _argument_names(block)

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if flow.expected is not None or flow.stops_at_entry:
            flow.enter(_named(names, args, kwargs))

    block.register_forward_pre_hook(enter, with_kwargs=True)


def _note_earlier(flow: StageFlow, index: int) -> Callable[..., Any]:
    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return flow.note_earlier(index, output)

    return note


def _argument_names(block: nn.Module) -> list[str]:
    return [name for name in inspect.signature(block.forward).parameters if name != "self"]


def _named(names: list[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _receive(block: nn.Module, flow: StageFlow, layer_index: int) -> Callable[..., Any]:
    names, layers = _argument_names(block), cache_layers(block, layer_index)

    def forward(*args: Any, **kwargs: Any) -> Any:
        flow.check_running()
        hold_length((*args, *kwargs.values()), layers, flow)
        return flow.hand_on(_named(names, args, kwargs), layer_index)

    return forward


def _complete(block: nn.Module, flow: StageFlow, rest: Iterable[nn.Module], index: int) -> Callable[..., None]:
    names = _argument_names(block)
    layers = [layer for place, other in enumerate(rest, index) for layer in cache_layers(other, place)]

    def forward(*args: Any, **kwargs: Any) -> None:
        flow.check_running()
        hold_length((*args, *kwargs.values()), layers, flow)
        flow.complete(_named(names, args, kwargs))

    return forward


def _hollow_embedding(embedding: nn.Module, flow: StageFlow) -> None:
    """Zeros in place of the rows: [batch, seq] -> [batch, seq, hidden]."""
    weight = embedding.weight
    assert isinstance(weight, torch.Tensor)
    hidden_size, dtype = weight.shape[1], weight.dtype

    def forward(token_ids: torch.Tensor) -> torch.Tensor:
        flow.check_running()
        return torch.zeros((*token_ids.shape, hidden_size), dtype=dtype, device=token_ids.device)

    embedding.forward = forward


def _stand_in(model: nn.Module, name: str, parameter: torch.Tensor, device: torch.device) -> None:
    """An attribute in place of the parameter, so that code which reads it ahead of the blocks still runs."""
    owner, _, attribute = name.rpartition(".")
    module = model.get_submodule(owner)
    del module._parameters[attribute]
    zero = torch.zeros((), dtype=parameter.dtype, device=device)
    object.__setattr__(module, attribute, zero.expand(parameter.shape))


def _drop_tensors(module: nn.Module, own: Collection[nn.Module]) -> None:
    """Take the tensors out of `module`, but for what this stage's own blocks share with it.

    Empty tensors take their place: some models read the type of a weight in another block, or scale it.
    """
    for submodule in module.modules():
        if submodule in own:
            continue
        for tensors in (submodule._parameters, submodule._buffers):
            for name, tensor in list(tensors.items()):
                del tensors[name]
                object.__setattr__(submodule, name, None if tensor is None else _empty(submodule, tensor))


def _empty(owner: nn.Module, tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(owner, Conv1D):  # its sizes are written nowhere but in its weight, where peft reads them
        return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return torch.empty(0, dtype=tensor.dtype)
