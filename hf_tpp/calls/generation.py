"""What `generate` does before transformers' own: refusals, an agreement between the ranks, one random state for them.

After that every rank runs the same loop: each step is an evaluation call, which gives all of them the same logits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers.generation.stopping_criteria import MaxTimeCriteria

from hf_tpp.calls.context import CallContext
from hf_tpp.collectives.agreement import agree_on, checksum
from hf_tpp.errors import ConfigurationError, HfTppError, UnsupportedModelError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.cache import takes_cache

__all__ = ["generation_options"]

_REFUSED = {
    "max_time": "ranks reach it at different steps, and would wait for each other: use max_new_tokens",
    "assistant_early_exit": "it takes layers away from the model while it runs: use an assistant_model",
    "use_mtp": "its drafts start from hidden states, which lie on one stage: use an assistant_model",
    "speculation_type": "its drafts start from hidden states, which lie on one stage: use an assistant_model",
    "compile_config": "a call of the model runs messages between ranks, which cannot be compiled: leave it out",
}
_REFUSED_CACHES = {
    "quantized": "a rank rounds its own heads alone, and not as all heads together are rounded: use 'dynamic'",
    "paged": "continuous batching calls the layers by itself: use 'dynamic'",
}


def generation_options(context: CallContext, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments for the plain `generate`.

    Args:
        context: The model's.
        args: Arguments of the call without a name.
        kwargs: The others.

    Collective: every rank of the replica.

    Returns:
        `kwargs`, with what has to be different for a parallel model.

    Raises:
        UnsupportedModelError: The model keeps the state of a generation where other stages do not find it.
        ConfigurationError: An option that would not give the plain model's tokens on every rank.
        RankMismatchError: Ranks were given different prompts or options.
    """
    model: Any = context.model
    problem: HfTppError | None = None
    try:
        _check_model(model)
        _check_options(model, args, kwargs)
    except HfTppError as error:
        problem = error
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    facts = {
        "prompts": f"{[list(t.shape) for t in tensors]} checksum {int(checksum(tensors))}",
        "options": {name: value for name, value in kwargs.items() if _is_plain(value)},
        "generation_config": str(_configuration(model, args, kwargs)),
    }
    agree_on(facts, problem, context.mesh.replica_control)
    _share_random_state(context.mesh)
    # transformers compiles the call of a model with a static cache on a GPU; this one runs messages between ranks.
    return {**kwargs, "disable_compile": True}


def _check_model(model: Any) -> None:
    if not takes_cache(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps the state of a generation in a form of its own, which a parallel model "
            f"does not hand on: save_pretrained() and generate with plain transformers"
        )


def _check_options(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        value = _option(name, model, args, kwargs)
        if value not in (None, False):
            raise ConfigurationError(f"generate({name}={value!r}) with a parallel model: {why}")
    cache = _option("cache_implementation", model, args, kwargs)
    if cache in _REFUSED_CACHES:
        raise ConfigurationError(
            f"generate(cache_implementation={cache!r}) with a parallel model: {_REFUSED_CACHES[cache]}"
        )
    if isinstance(kwargs.get("custom_generate"), str) or kwargs.get("trust_remote_code"):
        raise ConfigurationError(
            f"generate(custom_generate={kwargs.get('custom_generate')!r}) with a parallel model: code from the hub (so "
            f"are contrastive, DoLa, constrained and group beam search) may call parts of it; use greedy, sampled, "
            f"beam or assisted generation, or a function of your own that calls the model as a whole"
        )
    assistant = type(kwargs.get("assistant_model")).__name__
    if assistant.startswith(("Gemma4Assistant", "Gemma4UnifiedAssistant")):
        raise ConfigurationError(
            f"generate(assistant_model={assistant}) with a parallel model: it reads keys and values of the model's "
            f"last layers, which lie on one stage; use an assistant that takes tokens"
        )
    if any(isinstance(criterion, MaxTimeCriteria) for criterion in kwargs.get("stopping_criteria") or ()):
        raise ConfigurationError(f"a MaxTimeCriteria with a parallel model: {_REFUSED['max_time']}")


def _option(name: str, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """An option of generate, wherever it was given."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    given = getattr(_configuration(model, args, kwargs), name, None)
    return getattr(model.generation_config, name, None) if given is None else given


def _configuration(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return args[1] if len(args) > 1 else kwargs.get("generation_config", model.generation_config)


def _is_plain(value: Any) -> bool:
    """Whether a value can be compared between ranks: numbers, texts, and lists and dictionaries of these."""
    if isinstance(value, dict):
        return all(_is_plain(part) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_is_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _share_random_state(mesh: ParallelMesh) -> None:
    """Sampling must draw the same tokens on every rank of a replica: continue from its first rank's generators."""
    if mesh.replica.size == 1:
        return
    state = [torch.get_rng_state(), torch.cuda.get_rng_state(mesh.device) if mesh.device.type == "cuda" else None]
    dist.broadcast_object_list(state, src=mesh.replica.global_ranks[0], group=mesh.replica_control)
    assert state[0] is not None
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], mesh.device)
