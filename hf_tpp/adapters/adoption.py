"""Adapters that a parallel model was given: PEFT made them for the unsplit model, here they are cut to a rank's part.

PEFT wraps every linear that it finds, on this stage or hollow, in the order of the model; so the adapters of all ranks
start from the values that a single process would have drawn. Then

    on a hollow module         the wrapper goes
    on a parallel linear       the additions are cut as the linear is
    on a whole module          they stay whole
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from hf_tpp.adapters.checks import check_wrapper
from hf_tpp.collectives.agreement import agree_on, checksum
from hf_tpp.errors import HfTppError
from hf_tpp.gradients.optimizers import refuse_whole_tensor_optimizers
from hf_tpp.parallel_model import ParallelState
from hf_tpp.sharding import ShardSpec
from hf_tpp.tensor_parallel.linear import ParallelLinear
from hf_tpp.tensor_parallel.low_rank import LinearCuts, cut_additions
from hf_tpp.wrappers import LowRankSum, copies_of, is_wrapper, unwrap_hollow, unwrapped, wrappers_of

__all__ = ["adopt_adapters", "release_adapters", "ties_known", "whole_sizes"]


def adopt_adapters(state: ParallelState) -> None:
    """Cut the adapters that PEFT has put into a parallel model, and make them a part of it.

    Args:
        state: What parallelize() left at the model.

    Collective: every rank of the job.

    Raises:
        UnsupportedModelError: They cannot be cut exactly; they are in the model by now, which is of no use any more.
        RankMismatchError: The ranks' adapters differ.
    """
    assembly, calls = state.assembly, state.calls
    wrappers = dict(wrappers_of(assembly.model))
    adapters = [module for module in wrappers.values() if is_wrapper(module)]
    new = [p for module in adapters for p in module.parameters() if p not in calls.specs]
    problem: HfTppError | None = None
    try:
        for name, module in wrappers.items():
            names = [_name_then(state, f"{name}.{key}") for key, _ in unwrapped(module).named_parameters()]
            holders = {stage for key in names for stage in assembly.holders(key)}
            check_wrapper(name, module, len(holders), assembly.sequence_parallel)
    except HfTppError as error:
        problem = error
    facts = {
        "shapes of the adapters": [tuple(parameter.shape) for parameter in new],
        "weights of the adapters": int(checksum(p for p in new if not p.is_meta)),
    }
    agree_on(facts, problem, state.mesh.control)
    unwrap_hollow(assembly.model)
    for total in filter(None, map(LowRankSum.of, wrappers.values())):
        if isinstance(total.base, ParallelLinear):
            cut_additions(total, calls.streams)
    _register(state)


@contextmanager
def whole_sizes(model: nn.Module) -> Iterator[None]:
    """While PEFT sizes the adapters: of a Conv1D it reads the weight's shape, or `ds_shape` where that is a shard's."""
    weights = [part for part in model.modules() if isinstance(part, ParallelLinear) and part.transposed]
    for part in weights:
        vars(part.weight)["ds_shape"] = (part.in_features, part.out_features)
    try:
        yield
    finally:
        for part in weights:
            del vars(part.weight)["ds_shape"]


@contextmanager
def ties_known(state: ParallelState) -> Iterator[None]:
    """While PEFT merges: it would take embedding and head for untied where they are on different stages."""
    config: Any = state.assembly.model.config
    tied = getattr(config, "tie_word_embeddings", False) and state.mesh.pp.size > 1
    if tied:
        config.tie_word_embeddings = False
    try:
        yield
    finally:
        if tied:
            config.tie_word_embeddings = True


def release_adapters(state: ParallelState) -> None:
    """After PEFT has taken adapters off: linears have their ends back, and the model's parameters are what is left."""
    model, calls = state.assembly.model, state.calls
    terms = {module for _, wrapper in wrappers_of(model) for module in wrapper.modules()}
    for module in model.modules():
        if isinstance(module, ParallelLinear) and module not in terms:
            module.bare = False
    plain = state.assembly.plain_names
    for name, parameter in model.named_parameters():
        spec = calls.specs.get(parameter)
        if spec is not None:  # a trained copy has the place of the original now
            calls.specs[parameter] = replace(spec, name=plain.get(spec.name, name))
    _register(state)


def _name_then(state: ParallelState, plain: str) -> str:
    """The name at parallelize() of a parameter that is called `plain` without adapters."""
    names = state.assembly.plain_names
    return plain if plain in names else next(name for name, other in names.items() if other == plain)


def _register(state: ParallelState) -> None:
    """Note which parameters the model has now, under which names, and how they lie."""
    assembly, calls = state.assembly, state.calls
    lies = dict(_adapter_specs(state))
    specs: dict[str, ShardSpec] = {}
    for name, parameter in assembly.model.named_parameters():
        spec = calls.specs.get(parameter) or lies.get(name)
        if spec is not None:
            specs[name] = spec
    known = set(calls.specs)
    calls.named_specs.clear()
    calls.named_specs.update(specs)
    calls.find_parameters()
    calls.streams.find_sources(assembly.model)
    if calls.residual is not None:
        calls.residual.requires_grad_()  # PEFT freezes everything but its own
    refuse_whole_tensor_optimizers(p for p, spec in calls.specs.items() if spec.dim is not None and p not in known)


def _adapter_specs(state: ParallelState) -> Iterator[tuple[str, ShardSpec]]:
    """How the parameters of wrappers lie: as those of what they wrap, with the cuts of additions."""
    model = state.assembly.model
    for name, module in wrappers_of(model):
        inner, total = unwrapped(module), LowRankSum.of(module)
        of_inner = {key: state.calls.specs[parameter] for key, parameter in inner.named_parameters()}
        if copies_of(module) is not None:
            for key, _ in module.named_parameters():
                _, _, inner_key = key.removeprefix("modules_to_save.").partition(".")
                if key.startswith("modules_to_save.") and inner_key in of_inner:
                    spec = of_inner[inner_key]
                    yield f"{name}.{key}", replace(spec, name=f"{name}.{key}")
            continue
        first = next(iter(of_inner.values()))
        stages = state.assembly.stages_with(_name_then(state, f"{name}.weight"))
        cuts = LinearCuts()
        if total is not None and isinstance(total.base, ParallelLinear):
            cuts = LinearCuts.of_additions(total, total.base.cuts_outputs, total.base.layout)
        for key, parameter in module.named_parameters():
            if parameter in state.calls.specs:
                continue
            cut = cuts.cuts.get(key)
            dim, layout = cut or (None, None)
            shape = list(parameter.shape)
            if cut is not None:
                shape[cut[0]] = cut[1].size
            spec = replace(
                first,
                name=f"{name}.{key}",
                full_shape=tuple(shape),
                dim=dim,
                layout=layout,
                stages=stages,
                is_partial=key in cuts.summed or (dim is None and first.is_partial),
            )
            yield spec.name, spec
