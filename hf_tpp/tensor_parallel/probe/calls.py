"""With which arguments the modules of a block are called: the skeleton of a model runs once, and they are noted.

A module may return more than its result (attention probabilities). Only the result is summed over the ranks, so nothing
else may be used: the rest is given out as nan, and the hidden states show whether it was.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from hf_tpp.parts import ModelParts
from hf_tpp.tensor_parallel.probe.skeleton import SEED

__all__ = ["Call", "Calls", "NoRegionError", "observe_calls"]

_ROWS, _SEQ = 2, 8
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


class NoRegionError(Exception):
    """The module is none that can be probed, or cut; it stays whole."""


@dataclass(frozen=True)
class Call:
    """How a module was called.

    Attributes:
        arguments: Name of a parameter of its forward -> value, in the order of the call; tensors are detached.
        num_positional: How many of them, the first ones, were given by position.
        hidden: Name of the hidden states.
        with_gradient: Names of the other arguments that need a gradient.
    """

    arguments: dict[str, Any]
    num_positional: int
    hidden: str
    with_gradient: frozenset[str]


@dataclass(frozen=True)
class Calls:
    """What was seen of some modules: a call by name, or why there is none."""

    seen: dict[str, Call]
    problems: dict[str, str]


def observe_calls(model: nn.Module, parts: ModelParts, names: Iterable[str]) -> Calls:
    """Run the skeleton of a model and note the first call of each module.

    Args:
        model: A copy of a skeleton's model; it is of no further use.
        parts: Its parts.
        names: Of modules in its blocks.
    """
    run = _Run(model, parts, list(names))
    error = ""
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model(**_tokens(model, parts))
    except _AllSeen:
        pass
    except Exception as caught:  # a model that does not run without its weights keeps what was not seen whole
        error = f"the model does not run without its weights ({type(caught).__name__}: {caught})"
    for name in run.names:
        if name not in run.calls:
            run.problems.setdefault(name, error or "it is not called")
    return Calls({name: call for name, call in run.calls.items() if name not in run.problems}, run.problems)


class _AllSeen(BaseException):
    """Raised in place of the head: all blocks have run."""


class _Run:
    """Hooks of one run, and what they noted."""

    def __init__(self, model: nn.Module, parts: ModelParts, names: list[str]) -> None:
        self.names = names
        self.calls: dict[str, Call] = {}
        self.problems: dict[str, str] = {}
        self._poisoned: set[str] = set()
        self._escaped: set[str] = set()
        model.get_submodule(parts.head).register_forward_pre_hook(self._stop)
        for name in names:
            module = model.get_submodule(name)
            module.register_forward_pre_hook(self._note(name, module), with_kwargs=True)
            module.register_forward_hook(self._poison(name))
        for index in range(parts.num_blocks):
            block = parts.block_name(index)
            model.get_submodule(block).register_forward_hook(self._look(block))

    def _stop(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        if args and bool(args[0].isnan().any()):
            self._blame(self._escaped)
        raise _AllSeen

    def _note(self, name: str, module: nn.Module) -> Any:
        names = [*inspect.signature(module.forward).parameters]

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name in self.calls:
                return
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            first = names[0] if args else next((key for key in names if key in kwargs), "")
            others = {key: value for key, value in given.items() if value is not given.get(first)}
            needing = {key for key, value in others.items() if _needs_gradient(value)}
            problem = _problem(given, first, needing) if len(args) <= len(names) else "its forward takes *args"
            if problem:
                self.problems[name] = problem
            else:
                self.calls[name] = Call(_detached(given), len(args), first, frozenset(needing))

        return note

    def _poison(self, name: str) -> Any:
        def poison(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            leaves, structure = tree_flatten(output)
            for index in [index for index, leaf in enumerate(leaves) if _is_floating(leaf)][1:]:
                leaves[index] = torch.full_like(leaves[index], torch.nan)
                self._poisoned.add(name)
            return tree_unflatten(leaves, structure)

        return poison

    def _look(self, block: str) -> Any:
        def look(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            leaves, structure = tree_flatten(output)
            floating = [index for index, leaf in enumerate(leaves) if _is_floating(leaf)]
            if not floating:
                return output
            inside = {name for name in self._poisoned if name.startswith(f"{block}.")}
            # Of what a block returns beside its hidden states, most is for the user: nan stays nan in it, and shows
            # itself when a later block uses it.
            if any(bool(leaves[index].isnan().any()) for index in floating[1:]):
                self._escaped |= inside
            if bool(leaves[floating[0]].isnan().any()):
                self._blame(inside | self._escaped)
                leaves[floating[0]] = torch.randn_like(leaves[floating[0]]).requires_grad_()
            return tree_unflatten(leaves, structure)

        return look

    def _blame(self, names: set[str]) -> None:
        self.problems |= dict.fromkeys(names, "more than its first output is used")


def _tokens(model: nn.Module, parts: ModelParts) -> dict[str, Any]:
    vocabulary: Any = model.get_submodule(parts.embedding).num_embeddings
    generator = torch.Generator().manual_seed(SEED)
    arguments: dict[str, Any] = {"input_ids": torch.randint(vocabulary, (_ROWS, _SEQ), generator=generator)}
    accepted = inspect.signature(type(model).forward).parameters.values()
    if any(argument.name == "use_cache" or argument.kind is argument.VAR_KEYWORD for argument in accepted):
        arguments["use_cache"] = False
    return arguments


def _problem(given: dict[str, Any], first: str, needing: set[str]) -> str:
    """Why nothing can be said about a module that was called with these arguments; "" if something can."""
    hidden = given.get(first)
    if not isinstance(hidden, torch.Tensor) or not _is_floating(hidden) or not hidden.numel():
        return "its first argument is no tensor of hidden states"
    for leaf in tree_flatten(given)[0]:
        if not isinstance(leaf, (torch.Tensor, *_PLAIN)):
            return f"it is given a {type(leaf).__name__}, which may carry tensors along"
    if any(not isinstance(given[key], torch.Tensor) for key in needing):
        return "it is given tensors with a gradient inside another argument"
    return ""


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _needs_gradient(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in tree_flatten(value)[0])


def _detached(given: dict[str, Any]) -> dict[str, Any]:
    """Tensors of their own; arguments that are one object stay one object."""
    made: dict[int, torch.Tensor] = {}

    def detach(leaf: Any) -> Any:
        return made.setdefault(id(leaf), leaf.detach().clone()) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(detach, given)  # type: ignore[no-any-return]
