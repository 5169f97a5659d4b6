"""Which of TRL's trainers serve parallel models, and with which arguments; the others are refused by name.

TRL is not imported here: a trainer of TRL comes with the modules that it is defined in.
"""

import sys
import types
from typing import Any

from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.replicas import find_parallel

__all__ = ["FUSED_HEAD", "check_trl", "counts_own_tokens", "repeats_rows", "trl_trainers"]

FUSED_HEAD = "add_fused_lm_head"
"""TRL's function that gives a model a head for log-probabilities."""
_SFT, _DPO = "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer"
_NAMES = {_SFT: "SFTTrainer", _DPO: "DPOTrainer"}
_BASES = ("trl.trainer.base_trainer",)
_REFUSED = {
    "activation_offloading": "it moves tensors that the passes of a pipeline still need: leave it out",
    "sync_ref_model": "it mixes the weights of two models parameter by parameter: leave it out",
    "precompute_ref_log_probs": (
        "its cache goes by a hash of the first rank's weights, which say nothing of the others': leave it out, and "
        "give a ref_model"
    ),
}


def trl_trainers(trainer: Any) -> dict[types.ModuleType, type]:
    """The modules and classes of TRL that a trainer is made of."""
    kinds = reversed(type(trainer).__mro__)
    found = {kind.__module__: kind for kind in kinds if kind.__module__.partition(".")[0] == "trl"}
    return {sys.modules[name]: kind for name, kind in found.items() if name not in _BASES}


def check_trl(trainer: Any, model: Any, args: Any) -> None:
    """Check a trainer with a parallel model, if it is one of TRL's.

    Args:
        trainer: It, not yet initialized.
        model: Its model; of any kind.
        args: Its arguments, or None for the default.

    Raises:
        ConfigurationError: A trainer or an argument that cannot work, by name; a TRL that is too old.
    """
    if find_parallel(model) is None:
        return
    for module, kind in trl_trainers(trainer).items():
        if _NAMES.get(module.__name__) != kind.__name__:
            raise ConfigurationError(
                f"{kind.__name__} of TRL with a parallel model: it is not known to be exact there. "
                f"{' and '.join(_NAMES.values())} are"
            )
        if not hasattr(module, FUSED_HEAD):
            raise ConfigurationError(
                f"{kind.__name__} of this TRL calls parts of a model by themselves, which a parallel one has on "
                f"several ranks: update to trl>=1.16"
            )
        for name, why in _REFUSED.items():
            if getattr(args, name, False):
                raise ConfigurationError(f"{name}=True with a parallel model: {why}")


def counts_own_tokens(trainer: Any) -> bool:
    """Whether the loss of an evaluation is the mean over the tokens of a process, whatever the others have."""
    return any(module.__name__ == _SFT for module in trl_trainers(trainer))


def repeats_rows(trainer: Any) -> bool:
    """Whether rows that fill up the last batch of an evaluation cannot be left out of its loss: DPO has no labels."""
    return any(module.__name__ == _DPO for module in trl_trainers(trainer))
