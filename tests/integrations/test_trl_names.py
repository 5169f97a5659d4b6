"""What is touched of TRL is there, and as it was when the trainers were compared; what moves fails by its name."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest

from hf_tpp.integrations.trl import _add_parallel_head
from hf_tpp.integrations.trl_trainers import FUSED_HEAD
from hf_tpp.tensor_parallel.token_statistics import STATISTICS

pytest.importorskip("trl", reason="needs trl, of the extra 'trl'")


@pytest.mark.parametrize("name", ["trl.trainer.sft_trainer.SFTTrainer", "trl.trainer.dpo_trainer.DPOTrainer"])
def test_trainers(name):
    module_name, _, class_name = name.rpartition(".")
    module = importlib.import_module(module_name)
    trainer = getattr(module, class_name)
    assert [kind.__module__ for kind in trainer.__mro__ if kind.__module__.startswith("trl")] == [
        module_name,
        "trl.trainer.base_trainer",
    ]
    assert "prediction_step" in vars(trainer)
    assert parameters_of(getattr(module, FUSED_HEAD)) == parameters_of(_add_parallel_head)


def parameters_of(function: Callable[..., None]) -> dict[str, Any]:
    return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}


def test_output_of_the_fused_head():
    output = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput
    assert set(output.__dataclass_fields__) == {"loss", "label_mask", "aux_loss", *STATISTICS}
