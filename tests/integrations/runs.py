"""Training runs under a stock Trainer and under a plain Accelerator, in one process and in parallel."""

import gc
import os
import tempfile
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset

import hf_tpp
from tests.parity.models import make_batch, tiny_model

STEPS = 20
ROWS = 160
GLOBAL_ROWS = 4  # in one forward pass, of all replicas together
ACCUMULATION = 2
MAX_NORM = 0.5


@dataclass(frozen=True)
class Layout:
    """Sizes of the axes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"tp{self.tp}-pp{self.pp}-dp{self.dp}"


@dataclass
class Record:
    """What a run reports at every step, and what it says of its evaluation."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Sequences of one length, with padding and with labels that are ignored."""

    def __init__(self, rows: int = ROWS, seq: int = 12, seed: int = 0) -> None:
        self._batch = make_batch(rows, seq, seed)

    def __len__(self) -> int:
        return len(self._batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: value[index] for name, value in self._batch.items()}


def as_launched() -> None:
    """Add to the environment of a rank what launchers set and accelerate asks for."""
    os.environ |= {"LOCAL_WORLD_SIZE": os.environ["WORLD_SIZE"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def model_for(name: str, layout: Layout, **options: Any) -> Any:
    model = tiny_model(name, num_layers=3)
    if layout.world_size > 1:
        model = hf_tpp.parallelize(model, tp=layout.tp, pp=layout.pp, verbose=False, **options)
    return model


def arguments(layout: Layout, folder: str, **changes: Any) -> Any:
    from transformers import TrainingArguments

    chosen: dict[str, Any] = {
        "output_dir": folder,
        "use_cpu": True,
        "per_device_train_batch_size": GLOBAL_ROWS // layout.dp,
        "per_device_eval_batch_size": GLOBAL_ROWS // layout.dp,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_grad_norm": MAX_NORM,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,
        "weight_decay": 0.1,
        "warmup_steps": 5,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 3,
    }
    return TrainingArguments(**{**chosen, **changes})


def trainer_run(name: str, layout: Layout, **changes: Any) -> Record:
    """Train for `STEPS` steps with a stock Trainer."""
    from transformers import Trainer

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model_for(name, layout), args=arguments(layout, folder, **changes), train_dataset=Rows()
        )
        trainer.train()
    return record_of(trainer)


def record_of(trainer: Any) -> Record:
    record = Record()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            record.losses.append(entry["loss"])
            record.norms.append(entry["grad_norm"])
            record.rates.append(entry["learning_rate"])
    return record


def trainer_runs(cases: list[tuple[str, Layout]], **changes: Any) -> list[Record]:
    """Body of a rank: one run after the other."""
    as_launched()
    records = []
    for name, layout in cases:
        records.append(trainer_run(name, layout, **changes))
        gc.collect()
    return records
