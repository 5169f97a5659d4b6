"""Methods of PEFT that must know of shards. They are wrapped once, and do for other models what they always did.

PEFT puts its layers into a model from several places (get_peft_model, PeftModel.from_pretrained, load_adapter, TRL's
trainers), and its PEFT model is made by itself: there is no object of ours that could have methods of its own.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn

from hf_tpp.adapters.adoption import adopt_adapters, release_adapters, ties_known, whole_sizes
from hf_tpp.adapters.checks import check_config, find_tied_additions
from hf_tpp.adapters.saving import save_adapters
from hf_tpp.collectives.agreement import agree_on
from hf_tpp.errors import ConfigurationError, UnsupportedModelError
from hf_tpp.parallel_model import ParallelState, parallel_state

__all__ = ["install_methods", "model_of"]

Method = Callable[..., Any]

METHODS = (
    ("peft.PeftModel", "save_pretrained"),
    ("peft.PeftModel", "delete_adapter"),
    ("peft.tuners.tuners_utils.BaseTuner", "inject_adapter"),
    ("peft.tuners.tuners_utils.BaseTuner", "merge_adapter"),
    ("peft.tuners.tuners_utils.BaseTuner", "merge_and_unload"),
    ("peft.tuners.tuners_utils.BaseTuner", "unload"),
    ("peft.tuners.lora.LoraModel", "add_weighted_adapter"),
)
"""All that is wrapped; a test fails by the name of what has moved."""


def model_of(model: Any) -> Any:
    """The transformers model in a PEFT model, or `model` itself; from now on PEFT's methods know of parallel models.

    Raises:
        UnsupportedModelError: An adapter that trains the inputs of the model.
        ConfigurationError: A model with adapters on the meta device.
    """
    install_methods()
    if not hasattr(model, "get_base_model"):
        return model
    inputs = [name for name, config in model.peft_config.items() if config.is_prompt_learning]
    if inputs:
        kind = model.peft_config[inputs[0]].peft_type
        raise UnsupportedModelError(
            f"the adapter {inputs[0]!r} ({getattr(kind, 'value', kind)}) trains what is put ahead of the embeddings or "
            f"into the cache, which gets no gradient from a pipeline pass: use LoRA"
        )
    inner = model.get_base_model()
    if any(parameter.is_meta for parameter in inner.parameters()):
        raise ConfigurationError(
            "this PEFT model is on the meta device: call parallelize on the model alone, then get_peft_model"
        )
    return inner


def install_methods() -> None:
    """Wrap PEFT's methods, if PEFT is installed; a second call changes nothing."""
    if importlib.util.find_spec("peft") is None:
        return
    replacements: tuple[Method, ...] = (_save, _take_off, _inject, _merge, _merge, _take_off, _refuse)
    for (owner, name), replacement in zip(METHODS, replacements, strict=True):
        module, _, kind = owner.rpartition(".")
        _wrap(getattr(importlib.import_module(module), kind), name, replacement)


def _wrap(kind: type, name: str, replacement: Callable[..., Any]) -> None:
    original: Method = getattr(kind, name)
    if hasattr(original, "_hf_tpp"):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = parallel_state(self)
        if state is None or state.mesh.world_size == 1:
            return original(self, *args, **kwargs)
        return replacement(functools.partial(original, self), state, self, *args, **kwargs)

    vars(method)["_hf_tpp"] = True
    setattr(kind, name, method)


def _inject(
    original: Method, state: ParallelState, tuner: Any, model: nn.Module, adapter: str, *args: Any, **kwargs: Any
) -> None:
    check_config(tuner.peft_config[adapter], state.mesh)
    if state.calls.replicas.shares_weights:
        raise ConfigurationError(
            "adapters cannot be added to a model whose replicas share its weights (data_parallel='fully_shard'): call "
            "get_peft_model before parallelize"
        )
    with whole_sizes(model):
        original(model, adapter, *args, **kwargs)
    adopt_adapters(state)


def _save(original: Method, state: ParallelState, peft_model: Any, *args: Any, **kwargs: Any) -> None:
    save_adapters(peft_model, state, *args, **kwargs)


def _merge(original: Method, state: ParallelState, owner: Any, *args: Any, **kwargs: Any) -> Any:
    agree_on({}, find_tied_additions(state), state.mesh.control)
    return _take_off(original, state, owner, *args, **kwargs)


def _take_off(original: Method, state: ParallelState, owner: Any, *args: Any, **kwargs: Any) -> Any:
    with ties_known(state):
        result = original(*args, **kwargs)
    release_adapters(state)
    return result


def _refuse(original: Method, *_: Any, **__: Any) -> None:
    raise ConfigurationError(
        "add_weighted_adapter computes an adapter from whole ones, of which a rank has a part: combine saved adapters "
        "in one process, then load the result"
    )
