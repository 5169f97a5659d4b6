"""When the changes are put into Accelerator and Trainer: with the first parallel model, and as soon as they are loaded.

Trainer takes a second to import, and a loop of one's own needs none. Whoever makes a Trainer makes an Accelerator, so
that the first Accelerator after a late import is early enough.
"""

import sys
from typing import Any

from accelerate import Accelerator
from torch import nn

from hf_tpp.integrations.accelerator import ACCELERATOR_CHANGES, concerns_accelerator, stay_on_cpu
from hf_tpp.integrations.changes import check_names, patch
from hf_tpp.integrations.replicas import register, state_of
from hf_tpp.integrations.trainer import TRAINER_CHANGES, TRAINER_CREATION, concerns_trainer

__all__ = ["activate", "check_classes"]


def check_classes() -> None:
    """Raise unless the classes that are loaded can be changed.

    Raises:
        ConfigurationError: A method has gone, by name.
    """
    check_names(Accelerator, ACCELERATOR_CHANGES)
    trainer = _loaded_trainer()
    if trainer is not None:
        check_names(trainer, TRAINER_CHANGES)


def activate(model: nn.Module, patch_classes: bool) -> None:
    """Let accelerate and Trainer know of a parallel model.

    Args:
        model: What has just been parallelized.
        patch_classes: Put the changes into their classes; else only `TPPAccelerator` and `TPPTrainer` have them.
    """
    register(model)
    stay_on_cpu(state_of(model).mesh)
    if patch_classes:
        patch(Accelerator, {"__init__": _load_trainer_changes, **ACCELERATOR_CHANGES}, concerns_accelerator)
        _patch_trainer()


def _load_trainer_changes(original: Any, _: Accelerator, *args: Any, **kwargs: Any) -> None:
    _patch_trainer()
    original(*args, **kwargs)


def _patch_trainer() -> None:
    trainer = _loaded_trainer()
    if trainer is not None:
        check_names(trainer, TRAINER_CHANGES)
        patch(trainer, TRAINER_CREATION, lambda _: True)
        patch(trainer, TRAINER_CHANGES, concerns_trainer)


def _loaded_trainer() -> Any:
    return getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
