"""`parallelize(..., verify=True)`: one block of each kind, parallel against plain, on the real ranks before training.

    plain model     forward of a few random tokens -> the arguments of one block of each kind, and a copy of it
    parallelize     cuts the model
    each kind       plain copy and parallel block, same arguments, same gradient of the output:
                    output, gradient of the hidden states and of every parameter must agree

Blocks are of one kind if their class, their shapes and their cuts are the same. What lies between the blocks
(embedding, head, loss, messages between stages) is not compared; `hf-tpp check` runs whole models, small.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from hf_tpp.assembly import Assembly
from hf_tpp.calls.context import CallContext
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import ConfigurationError, ParityError
from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.mesh import ParallelMesh
from hf_tpp.sharding import ShardSpec, shard_tensor

__all__ = ["BlockVerification"]

ROWS, SEQ = 2, 8
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_NOISE_FLOOR = 1e-5  # share of the norm of all gradients below which one has no digits to compare


@dataclass(frozen=True)
class BlockCase:
    """One block of a kind, as it was before the model was cut.

    Attributes:
        index: Of the block.
        plain: A copy of it.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
    """

    index: int
    plain: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class BlockVerification:
    """Compares the blocks of a parallel model with what they were.

    Args:
        assembly: The decisions about the model.
        cases: One block of each kind.
    """

    def __init__(self, assembly: Assembly, cases: list[BlockCase]) -> None:
        self._assembly, self._cases = assembly, cases

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Raise ConfigurationError unless `model` can be verified."""
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ConfigurationError(
                "verify=True compares with the plain blocks, and this model is on the meta device: load it, or run "
                "`hf-tpp check` on its configuration instead"
            )

    @classmethod
    @torch.no_grad()
    def capture(cls, assembly: Assembly) -> "BlockVerification":
        """Copy one block of each kind, and run the plain model to see with which arguments it is called."""
        model, parts = assembly.model, assembly.parts
        chosen: dict[str, int] = {}
        for index in range(parts.num_blocks):
            chosen.setdefault(_kind(assembly, index), index)
        seen: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        handles = []
        for index in chosen.values():

            def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                seen.setdefault(index, (_cloned(args), _cloned(kwargs)))

            block = model.get_submodule(parts.block_name(index))
            handles.append(block.register_forward_pre_hook(see, with_kwargs=True))
        try:
            with _evaluating(model):
                model(input_ids=_tokens(model), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        copies = {index: copy.deepcopy(model.get_submodule(parts.block_name(index))) for index in seen}
        return cls(assembly, [BlockCase(index, copies[index], *seen[index]) for index in sorted(seen)])

    def run(self, calls: CallContext, specs: Mapping[str, ShardSpec]) -> None:
        """Compare all cases.

        Args:
            calls: Of the parallel model.
            specs: Local parameter name -> how it lies.

        Collective: every rank of the job.

        Raises:
            ParityError: A block differs; on every rank, if on any.
        """
        problem: ParityError | None = None
        with _evaluating(self._assembly.model), _untouched(calls.runner.stage.flow):
            for case in self._cases:
                if case.index in self._assembly.blocks(calls.mesh.pp.rank):
                    found = self._compare(case, calls.mesh, specs)
                    problem = problem or found
        self._cases.clear()
        agree_on({}, problem, calls.mesh.control)

    def _compare(self, case: BlockCase, mesh: ParallelMesh, specs: Mapping[str, ShardSpec]) -> ParityError | None:
        name = self._assembly.parts.block_name(case.index)
        block = self._assembly.model.get_submodule(name)
        with torch.enable_grad():
            plain = _run(case.plain.to(mesh.device).eval(), case, mesh.device)
            ours = _run(block, case, mesh.device)
        tolerance = TOLERANCES[plain.output.dtype]
        named = dict(block.named_parameters())
        own = {key: self._spec(f"{name}.{key}", specs) for key in named if f"{name}.{key}" in specs}
        summed = sum_shared_gradients([ours.gradients[k] for k in own], [named[k] for k in own], [*own.values()], mesh)
        pairs = {"output": (ours.output, plain.output), "gradient of its input": (ours.of_input, plain.of_input)}
        for (key, spec), gradient in zip(own.items(), summed, strict=True):
            full = plain.gradients[key]
            expected = None if full is None else shard_tensor(full, spec, full.device, full.dtype)
            pairs[f"gradient of {key}"] = (gradient, expected)
        whole = sum(float(g.double().square().sum()) for g in plain.gradients.values() if g is not None) ** 0.5
        for what, (a, b) in pairs.items():
            floor = _NOISE_FLOOR * whole if what.startswith("gradient of ") else 0.0
            amount = _difference(a, b, floor)
            if not amount <= tolerance:
                return ParityError(
                    f"{name} ({type(case.plain).__name__}): the {what} on tp rank {mesh.tp.rank} differs from the "
                    f"plain block's by {amount:.1e} relative (allowed: {tolerance:.0e}): this block is not cut right; "
                    f"leave the module whole (plan={{pattern: None}}) or use tp=1, and please report the model"
                )
        return None

    def _spec(self, name: str, specs: Mapping[str, ShardSpec]) -> ShardSpec:
        """As in a pass of this stage alone, without sequence shards."""
        spec = specs[name]
        return dataclasses.replace(spec, stages=spec.stages[:1], is_partial=name in self._assembly.cuts.summed)


@dataclass(frozen=True)
class _BlockRun:
    output: torch.Tensor
    of_input: torch.Tensor | None
    gradients: dict[str, torch.Tensor | None]


def _run(block: nn.Module, case: BlockCase, device: torch.device) -> _BlockRun:
    """Forward and backward with the arguments of a case; `p.grad` stays as it is."""
    args, kwargs = _cloned(case.args, device), _cloned(case.kwargs, device)
    leaves = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
    hidden = next(leaf for leaf in leaves if leaf.is_floating_point())
    hidden.requires_grad_()
    outputs = tree_flatten(block(*args, **kwargs))[0]
    output = next(leaf for leaf in outputs if isinstance(leaf, torch.Tensor) and leaf.is_floating_point())
    generator = torch.Generator().manual_seed(case.index)
    upstream = torch.randn(output.shape, generator=generator).to(output)
    named = {name: parameter for name, parameter in block.named_parameters() if parameter.requires_grad}
    of_input, *gradients = torch.autograd.grad(output, [hidden, *named.values()], upstream, allow_unused=True)
    found = dict(zip(named, gradients, strict=True))
    return _BlockRun(output.detach(), of_input, {name: found.get(name) for name, _ in block.named_parameters()})


def _difference(ours: torch.Tensor | None, theirs: torch.Tensor | None, floor: float) -> float:
    if ours is None or theirs is None:
        present = ours if ours is not None else theirs
        return 0.0 if present is None or not present.any() else float("inf")
    return float((ours.double() - theirs.double()).norm()) / max(float(theirs.double().norm()), floor, 1e-30)


def _kind(assembly: Assembly, index: int) -> str:
    name = assembly.parts.block_name(index)
    block = assembly.model.get_submodule(name)
    facts = [(key, tuple(p.shape), assembly.cuts.cuts.get(f"{name}.{key}")) for key, p in block.named_parameters()]
    return str((type(block), facts))


def _tokens(model: nn.Module) -> torch.Tensor:
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(embedding.num_embeddings, (ROWS, SEQ), generator=generator)
    return tokens.to(embedding.weight.device)


def _cloned(values: Any, device: torch.device | None = None) -> Any:
    """The same structure with tensors of its own."""

    def clone(leaf: Any) -> Any:
        return leaf.detach().clone().to(device or leaf.device) if isinstance(leaf, torch.Tensor) else leaf

    return tree_map(clone, values)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, so that nothing drops out; afterwards each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def _untouched(flow: Any) -> Iterator[None]:
    """What a stage notes while its blocks run is forgotten again: no pass has begun."""
    before = {field.name: copy.copy(getattr(flow, field.name)) for field in dataclasses.fields(flow)}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(flow, name, value)
