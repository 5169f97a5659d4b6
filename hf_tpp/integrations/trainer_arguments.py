"""Arguments of Trainer that cannot work with a parallel model are refused by name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.replicas import find_parallel

__all__ = ["REFUSALS", "check_arguments"]


class _Refusal(NamedTuple):
    applies: Callable[[Any], Any]
    why: str


def _is(name: str, *values: Any) -> Callable[[Any], bool]:
    return lambda args: str(getattr(getattr(args, name, None), "value", getattr(args, name, None))) in values


def _given(name: str) -> Callable[[Any], Any]:
    return lambda args: getattr(args, name, None)


_PARALLEL_ALREADY = "the model is parallel already: leave it out"
_CASTS = (
    "it casts the model in place, and the ranks have agreed on the types of their messages: load the model in that type"
)

REFUSALS: dict[str, _Refusal] = {
    "deepspeed": _Refusal(_given("deepspeed"), _PARALLEL_ALREADY),
    "fsdp": _Refusal(_given("fsdp"), _PARALLEL_ALREADY),
    "parallelism_config": _Refusal(_given("parallelism_config"), _PARALLEL_ALREADY),
    "train_sampling_strategy": _Refusal(
        _is("train_sampling_strategy", "batch_rebalance"),
        "it gives every process its own batches, and the ranks of a replica need the same: use 'group_by_length'",
    ),
    "auto_find_batch_size": _Refusal(
        _given("auto_find_batch_size"),
        "a rank that runs out of memory alone would leave the others waiting: set per_device_train_batch_size",
    ),
    "use_liger_kernel": _Refusal(
        _given("use_liger_kernel"), "it replaces modules that are parallel by then: leave it out"
    ),
    "neftune_noise_alpha": _Refusal(
        lambda args: getattr(args, "neftune_noise_alpha", None) is not None,
        "every rank would draw its own noise for the same embeddings: leave it out",
    ),
    "optim": _Refusal(
        _is("optim", "lomo", "adalomo"),
        "it updates during the backward pass, which a pipeline runs in parts: use adamw_torch",
    ),
    "fp16_full_eval": _Refusal(_given("fp16_full_eval"), _CASTS),
    "bf16_full_eval": _Refusal(_given("bf16_full_eval"), _CASTS),
}


def check_arguments(model: Any, args: Any) -> None:
    """Check the arguments of a Trainer, if its model is parallel.

    Args:
        model: Any.
        args: TrainingArguments, or None for the default.

    Raises:
        ConfigurationError: An argument that cannot work, by name.
    """
    if args is None or find_parallel(model) is None:
        return
    for name, refusal in REFUSALS.items():
        if refusal.applies(args):
            value = getattr(args, name)
            raise ConfigurationError(f"{name}={getattr(value, 'value', value)!r} with a parallel model: {refusal.why}")
