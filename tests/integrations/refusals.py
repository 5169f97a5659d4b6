"""What Trainer and accelerate are refused with a parallel model: bodies of ranks."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, ParallelismConfig
from torch.utils.data import DataLoader
from transformers import Trainer

from hf_tpp.errors import HfTppError
from hf_tpp.integrations.trainer_arguments import REFUSALS
from tests.integrations.runs import Layout, Rows, arguments, as_launched, model_for

ARGUMENTS: dict[str, Any] = {
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "parallelism_config": ParallelismConfig(),
    "train_sampling_strategy": "batch_rebalance",
    "auto_find_batch_size": True,
    "use_liger_kernel": True,
    "neftune_noise_alpha": 5.0,
    "optim": "adalomo",
    "fp16_full_eval": True,
    "bf16_full_eval": True,
}


def message(call: Callable[[], object]) -> str:
    try:
        call()
    except HfTppError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def refused_arguments(layout: Layout, folder: str) -> dict[str, list[str]]:
    """Body of a rank: messages for an argument that is there from the start, and for one that is changed later."""
    as_launched()
    model = model_for("gpt2", layout)
    found = {}
    for name in REFUSALS:
        args = arguments(layout, folder)
        trainer = Trainer(model=model, args=args, train_dataset=Rows(8))
        setattr(args, name, ARGUMENTS[name])
        found[name] = [message(lambda args=args: Trainer(model=model, args=args)), message(trainer.train)]
    return found


def refused_calls(layout: Layout, folder: str) -> dict[str, str]:
    """Body of a rank."""
    as_launched()
    alone = Accelerator()  # before there is a parallel model this process counts as the only one
    model = model_for("gpt2", layout)
    rows = DataLoader(Rows(8), batch_size=2)
    found = {"processes": message(lambda: alone.prepare(model))}
    alone.free_memory()
    alone.state._reset_state(reset_partial_state=True)
    dispatching = Accelerator(dataloader_config=DataLoaderConfiguration(dispatch_batches=True))
    found["dispatching"] = message(lambda: dispatching.prepare(rows))
    accelerator = Accelerator()
    accelerator.prepare(model)
    found["pickles"] = message(lambda: accelerator.save_model(model, folder, safe_serialization=False))
    parameters = list(model.parameters())
    accelerator.prepare(*(torch.optim.SGD(part, lr=0.1) for part in (parameters[:1], parameters[1:])))
    found["optimizers"] = message(lambda: accelerator.save_state(folder))
    other = model_for("gpt2", Layout(tp=layout.pp, pp=layout.tp))
    found["layouts"] = message(lambda: accelerator.prepare(rows))
    del other
    return found
