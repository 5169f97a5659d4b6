"""Accelerator and Trainer for parallel models, for those who want no class of others to be patched.

The changes are those that `parallelize` would put into the classes themselves.
"""

import functools
from typing import Any

from accelerate import Accelerator
from transformers import Trainer

from hf_tpp.integrations.accelerator import ACCELERATOR_CHANGES, concerns_accelerator
from hf_tpp.integrations.changes import mixin
from hf_tpp.integrations.trainer import TRAINER_CHANGES, concerns_trainer, initialize
from hf_tpp.integrations.trl import serving_trl

__all__ = ["TPPAccelerator", "TPPTrainer", "TPPTrainerMixin"]

_AcceleratorChanges: Any = mixin(Accelerator, ACCELERATOR_CHANGES, concerns_accelerator)
_TrainerChanges: Any = mixin(Trainer, TRAINER_CHANGES, concerns_trainer)


class TPPAccelerator(_AcceleratorChanges, Accelerator):  # type: ignore[misc]
    """accelerate's Accelerator, for scripts whose models come from `parallelize(patch=False)`."""


class TPPTrainerMixin(_TrainerChanges):  # type: ignore[misc]
    """Makes any Trainer one for parallel models: `class MyTrainer(TPPTrainerMixin, SFTTrainer)`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with serving_trl(self):
            initialize(super().__init__, self, *args, **kwargs)

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, and make a `TPPAccelerator` of it."""
        super().create_accelerator_and_postprocess()
        self.accelerator.__class__ = TPPAccelerator
        self.gather_function = functools.partial(
            self.accelerator.gather_for_metrics, use_gather_object=self.args.eval_use_gather_object
        )


class TPPTrainer(TPPTrainerMixin, Trainer):
    """transformers' Trainer, for models that come from `parallelize(patch=False)`."""
