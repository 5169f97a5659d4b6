"""Which parameters outside the blocks each block needs, found by running the model around its blocks.

The model's own forward runs once on a few tokens, with weights that take no memory and blocks that only note what they
are given. Whatever reaches a block beside the hidden states (per-layer inputs, the embeddings once more, a learned
position bias, scales between the blocks) is found in autograd's graph, by the parameters that it was computed from.

    embedding --> norm --> [block 0] --> scale --> [block 1] --> ... --> norm --> head
        '---------- per-layer inputs ----'----------'

    inputs of block 0: embedding, norm     of block 1: scale, per-layer table     behind the blocks: norm, head
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.parts import ModelParts
from hf_tpp.pipeline_parallel.payload import leaves_of

__all__ = ["BlockInputs", "reachable", "trace_block_inputs"]

_TOKENS = 16
_CONVENTIONS = (0, 1, 2, 3, 4, 5)
"""What a block may return: the hidden states alone, or a tuple of n with the hidden states first."""


@dataclass(frozen=True, slots=True)
class BlockInputs:
    """Names of parameters outside the blocks.

    Attributes:
        of_block: For each block, what its arguments are computed from (hidden states of the block before left out).
        behind: What is used behind the last block, or nowhere.
        earlier: For each block, and at last for the head: of which blocks, other than the one before, the outputs reach
            it by way of the model's own code.
    """

    of_block: tuple[frozenset[str], ...]
    behind: frozenset[str]
    earlier: tuple[frozenset[int], ...] = ()

    def history(self, boundary: int) -> tuple[int, ...]:
        """Blocks whose outputs are sent along between block `boundary` - 1, whose output always is, and `boundary`."""
        needed = frozenset().union(*self.earlier[boundary:])
        return tuple(sorted(index for index in needed if index < boundary - 1))


class _HeadReached(BaseException):
    """Raised in place of the head: all blocks have been seen."""


def trace_block_inputs(model: nn.Module, parts: ModelParts) -> BlockInputs:
    """Trace a model, loaded or on the meta device; it is left as it was.

    Args:
        model: The whole model.
        parts: Its parts.

    Raises:
        UnsupportedModelError: The blocks are not called once each and in order, or the model does not run around them.
    """
    problems = []
    for length in _CONVENTIONS:
        trace = _Trace(parts, length)
        try:
            trace.run(model)
        except UnsupportedModelError:
            raise
        except Exception as error:  # not this convention: whatever the model stumbles over
            problems.append(f"{type(error).__name__}: {error}")
            continue
        return trace.result(model)
    raise UnsupportedModelError(
        f"{type(model).__name__} does not run around its blocks {parts.blocks} ({problems[0]}): use pp=1 for this model"
    )


class _Trace:
    """One run with blocks that return tuples of a given length."""

    def __init__(self, parts: ModelParts, length: int) -> None:
        self.parts, self.length = parts, length
        self.calls: list[int] = []
        self.inputs: list[set[torch.Tensor]] = []
        self.behind: set[torch.Tensor] = set()
        self.names: dict[torch.Tensor, list[str]] = {}
        self.returned: torch.Tensor | None = None
        self.outputs: dict[torch.Tensor, int] = {}
        self.earlier: list[frozenset[int]] = []

    def run(self, model: nn.Module) -> None:
        """Run `model` around its blocks."""
        tensors = self._stand_ins(model)
        arguments: dict[str, Any] = {"input_ids": torch.ones((1, _TOKENS), dtype=torch.long)}
        if "use_cache" in inspect.signature(type(model).forward).parameters:
            arguments["use_cache"] = False
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(_evaluating(model))
            for index in range(self.parts.num_blocks):
                block = model.get_submodule(self.parts.block_name(index))
                stack.enter_context(_forward_replaced(block, self._block(index)))
            stack.enter_context(_forward_replaced(model.get_submodule(self.parts.head), self._head))
            try:
                functional_call(model, tensors, (), arguments)
            except _HeadReached:
                return
        raise ValueError("the model does not call its output head")

    def _stand_ins(self, model: nn.Module) -> dict[str, torch.Tensor]:
        """Zeros without memory for parameters, zeros for buffers, all on the CPU, as the originals are tied."""
        blocks = self.parts.blocks + "."
        made: dict[torch.Tensor, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name.startswith(blocks):
                continue
            if parameter not in made:
                zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
                made[parameter] = zero.detach().requires_grad_(parameter.is_floating_point())
            tensors[name] = made[parameter]
            self.names.setdefault(made[parameter], []).append(name)
        for name, buffer in model.named_buffers():
            if not name.startswith(blocks):
                tensors[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
        return tensors

    def _block(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(index)
            given = [tensor for _, tensor in leaves_of((args, kwargs))]
            hidden = args[0] if args else next(iter(kwargs.values()))
            if self.returned is not None and hidden.shape != self.returned.shape:
                raise ValueError("the blocks return something else")
            self._see(given)
            self.returned = hidden.detach().requires_grad_()
            self.outputs[self.returned] = index
            return (self.returned, *[None] * (self.length - 1)) if self.length else self.returned

        return forward

    def _see(self, given: Iterable[torch.Tensor]) -> None:
        """Note what the arguments of a block, or of the head, were computed from."""
        found = set().union(*(reachable(tensor) for tensor in given))
        self.inputs.append(found)
        self.earlier.append(frozenset(self.outputs[t] for t in found & self.outputs.keys() if t is not self.returned))

    def _head(self, *args: Any, **kwargs: Any) -> Any:
        self._see(tensor for _, tensor in leaves_of((args, kwargs)))
        self.behind = self.inputs.pop()
        raise _HeadReached

    def result(self, model: nn.Module) -> BlockInputs:
        """What was found, by names."""
        if self.calls != list(range(self.parts.num_blocks)):
            order = ", ".join(map(str, self.calls[:8]))
            raise UnsupportedModelError(
                f"{type(model).__name__} does not call its {self.parts.num_blocks} blocks once each and in order "
                f"(it called {order}{', ...' if len(self.calls) > 8 else ''}), so they cannot be spread over stages: "
                f"use pp=1"
            )
        of_block = tuple(frozenset(self._named(found)) for found in self.inputs)
        everything = {name for names in self.names.values() for name in names}
        behind = set(self._named(self.behind)) | (everything - set().union(*of_block))
        heads = {name for name in everything if name.startswith(self.parts.head + ".")}
        return BlockInputs(of_block, frozenset(behind | heads), tuple(self.earlier))

    def _named(self, tensors: set[torch.Tensor]) -> Iterator[str]:
        for tensor in tensors:
            names = self.names.get(tensor, [])
            # Of a tied weight, the name that is not the head's: the head is behind the blocks.
            own = [name for name in names if not name.startswith(self.parts.head + ".")]
            yield from own or names


def reachable(tensor: torch.Tensor) -> set[torch.Tensor]:
    """The leaves of autograd's graph that `tensor` was computed from; itself if it is one."""
    if tensor.grad_fn is None:
        return {tensor} if tensor.requires_grad else set()
    found: set[torch.Tensor] = set()
    seen: set[Any] = set()
    nodes: list[Any] = [tensor.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(node.variable)
        nodes.extend(following for following, _ in node.next_functions)
    return found


@contextmanager
def _forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradient checkpointing."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
