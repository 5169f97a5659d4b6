"""Run a module whose graph is cut at every linear: what goes into each is noted, what comes out is given.

    hidden states -> [q] : [q] -> attention -> [o] : [o] -> result        [x] is a linear, ":" a cut

What comes out of a linear are numbers drawn once, so that two runs see the same, and leaves of autograd's graph, so
that the gradient of what goes into a later linear says which of them it depends on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from hf_tpp.tensor_parallel.plain_linear import linear_sizes
from hf_tpp.tensor_parallel.probe.calls import Call, NoRegionError
from hf_tpp.tensor_parallel.probe.skeleton import linears_of, replace_forward

__all__ = ["CutRun", "Draws", "reached", "run_cut"]

_OF_MODULES = frozenset(vars(nn.Module())) | {"forward"}
Change = Callable[[str, torch.Tensor], torch.Tensor]


class Draws:
    """What comes out of each linear, drawn when it is first asked for.

    Args:
        seed: Of the numbers.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._values: dict[str, torch.Tensor] = {}

    def of(self, name: str, leading: tuple[int, ...], size: int) -> torch.Tensor:
        """The full numbers of `name`: [*leading, size], where the size is that of the first time.

        Raises:
            NoRegionError: They were asked for in another shape before.
        """
        if name not in self._values:
            self._values[name] = torch.randn((*leading, size), generator=self._generator, device="cpu")
        if self._values[name].shape[:-1] != leading:
            raise NoRegionError(
                f"{name} is given {list(leading)} tokens instead of {list(self._values[name].shape[:-1])}"
            )
        return self._values[name]


@dataclass
class CutRun:
    """What one run left.

    Attributes:
        inputs: Linear -> what went in, [..., in_features].
        outputs: Linear -> the leaf that came out, [..., out_features].
        arguments: Hidden states, and other arguments that need a gradient -> the leaf that was given.
        parameters: Parameter that is no linear's -> itself, a leaf as well.
        weights: Parameters of linears: leaves that nothing may depend on.
        result: The module's first floating-point output.
    """

    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    arguments: dict[str, torch.Tensor] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: list[torch.Tensor] = field(default_factory=list)
    result: torch.Tensor = field(default_factory=lambda: torch.empty(0))


def run_cut(
    module: nn.Module,
    call: Call,
    draws: Draws,
    change_output: Change | None = None,
    change_argument: Change | None = None,
) -> CutRun:
    """Run `module` with the arguments of `call`, cut at its linears.

    Args:
        module: A copy from a skeleton; its linears lose their forward for good.
        call: With which arguments.
        draws: What comes out of the linears.
        change_output: Applied to that, by the name of the linear.
        change_argument: Applied to each argument that is a tensor, by its name.

    Raises:
        NoRegionError: It does not run so, a linear is called twice or not at all, or the module keeps what it computed.
    """
    run = CutRun()
    linears = linears_of(module)
    for name, linear in linears.items():
        replace_forward(linear, _tap(run, name, linear_sizes(linear)[1], draws, change_output))
    run.weights = [weight for linear in linears.values() for weight in linear.parameters()]
    run.parameters = {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and name.rpartition(".")[0] not in linears
    }
    args, kwargs = _prepare(call, run, change_argument)
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            output = module(*args, **kwargs)
    except NoRegionError:
        raise
    except Exception as error:  # whatever the module stumbles over
        raise NoRegionError(f"{type(error).__name__}: {error}") from error
    floating = [leaf for leaf in tree_flatten(output)[0] if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    if not floating or not floating[0].requires_grad:
        raise NoRegionError("it returns no tensor that depends on its linears")
    run.result = floating[0]
    _check(module, run, linears)
    return run


def reached(end: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of the leaves that `end` was computed from."""
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    if not names or not end.requires_grad:
        return set()
    found = torch.autograd.grad(end.sum(), [leaves[name] for name in names], retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(names, found, strict=True) if gradient is not None}


def _tap(run: CutRun, name: str, size: int, draws: Draws, change: Change | None) -> Callable[..., torch.Tensor]:
    def forward(x: torch.Tensor) -> torch.Tensor:
        if name in run.inputs:
            raise NoRegionError(f"{name} is called twice")
        run.inputs[name] = x
        given = draws.of(name, tuple(x.shape[:-1]), size)
        given = given if change is None else change(name, given)
        run.outputs[name] = given.to(x.dtype, copy=True).requires_grad_()
        return run.outputs[name].clone()  # into which the module may write in place; a leaf does not allow that

    return forward


def _prepare(call: Call, run: CutRun, change: Change | None) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, those with a gradient as leaves; arguments that are one object stay one object."""
    made: dict[int, Any] = {}

    def given(name: str, value: Any) -> Any:
        if id(value) in made:
            return made[id(value)]
        if not isinstance(value, torch.Tensor):
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, torch.Tensor) else leaf, value)
        ours = (value if change is None else change(name, value)).clone()
        if name == call.hidden or name in call.with_gradient:
            run.arguments[name] = ours.requires_grad_()
        made[id(value)] = ours
        return ours

    first = given(call.hidden, call.arguments[call.hidden])
    values = {name: first if name == call.hidden else given(name, value) for name, value in call.arguments.items()}
    positional = list(values)[: call.num_positional]
    return [values[name] for name in positional], {name: values[name] for name in values if name not in positional}


def _check(module: nn.Module, run: CutRun, linears: dict[str, nn.Module]) -> None:
    silent = linears.keys() - run.inputs.keys()
    if silent:
        raise NoRegionError(f"{', '.join(sorted(silent))} is not called")
    weights = {str(index): weight for index, weight in enumerate(run.weights)}
    if any(reached(end, weights) for end in (run.result, *run.inputs.values())):
        raise NoRegionError("the weight of a linear is used beside the linear")
    for child in module.modules():
        own = {name: value for name, value in vars(child).items() if name not in _OF_MODULES}
        for name, value in {**own, **child._buffers}.items():
            if any(isinstance(leaf, torch.Tensor) and leaf.grad_fn is not None for leaf in tree_flatten(value)[0]):
                raise NoRegionError(f"it keeps what it computed as {name}")
