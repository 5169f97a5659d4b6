"""Evaluation, checkpoints and resuming under Trainer: bodies of ranks."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from tests.integrations.runs import Layout, Record, Rows, arguments, as_launched, model_for, record_of

STEPS = 8
KILLED_AT = 5
EVALUATION_ROWS = 11
SAVING = {"save_strategy": "steps", "save_steps": 2}


class KilledError(Exception):
    """Stands for a process that ends in the middle of a step."""


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AT:
            raise KilledError


def metrics(prediction: Any) -> dict[str, float]:
    """Numbers that change with any logit, any label and the order of the samples."""
    logits, labels = prediction.predictions, prediction.label_ids
    weights = np.arange(1, len(logits) + 1)
    return {
        "samples": float(len(logits)),
        "logits": float((np.abs(logits).mean((1, 2)) * weights).sum()),
        "labels": float((labels.sum(1) * weights).sum()),
    }


def trainer_for(name: str, layout: Layout, folder: str, trainer_class: Any = Trainer, **changes: Any) -> Any:
    options = changes.pop("options", {})
    callbacks = changes.pop("callbacks", None)
    return trainer_class(
        model=model_for(name, layout, **options),
        args=arguments(layout, folder, max_steps=STEPS, **changes),
        train_dataset=Rows(44),  # 5.5 updates: the run ends in its second epoch, which another permutation begins
        eval_dataset=Rows(EVALUATION_ROWS, seed=7),
        compute_metrics=metrics,
        callbacks=callbacks,
    )


def evaluations(name: str, layout: Layout, folder: str) -> Record:
    """Body of a rank: evaluate every other step, keep the best model, predict with it, save it."""
    as_launched()
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 2}
    tokens = {"include_num_input_tokens_seen": "all"}
    trainer = trainer_for(name, layout, folder, **evaluated, **best, **tokens)
    trainer.train()
    record = record_of(trainer)
    record.evaluation["history"] = [
        {
            key: value
            for key, value in entry.items()
            if key in ("eval_loss", "eval_logits", "eval_labels", "eval_samples")
        }
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]
    prediction = trainer.predict(Rows(EVALUATION_ROWS, seed=7))
    record.evaluation |= {"predictions": prediction.predictions, "labels": prediction.label_ids}
    record.notes = {
        "best": Path(trainer.state.best_model_checkpoint).name,
        "best_loss": trainer.state.best_metric,
        "loss": trainer.evaluate()["eval_loss"],
        "tokens": trainer.state.num_input_tokens_seen,
        "rows": trainer.get_total_train_batch_size(trainer.args),
        "checkpoints": sorted(path.name for path in Path(folder).glob("checkpoint-*")),
    }
    trainer.create_model_card()
    trainer.accelerator.wait_for_everyone()
    record.notes["card"] = re.findall(r"total_train_batch_size: \d+", (Path(folder) / "README.md").read_text())
    trainer.save_model(f"{folder}/final")
    config = json.loads((Path(folder) / "final" / "config.json").read_text())
    record.notes["config"] = {key: value for key, value in config.items() if key != "transformers_version"}
    return record


def killed(name: str, layout: Layout, folder: str, **changes: Any) -> None:
    """Body of a rank: train and save, and end in the middle of a step."""
    as_launched()
    trainer = trainer_for(name, layout, folder, callbacks=[Kill()], **{**SAVING, **changes})
    with contextlib.suppress(KilledError):
        trainer.train()
    assert trainer.state.global_step == KILLED_AT


def resumed(name: str, layout: Layout, folder: str, **changes: Any) -> Record:
    """Body of a rank: what a new process makes of the folder that `killed` left."""
    as_launched()
    torch.manual_seed(99)
    trainer = trainer_for(name, layout, folder, **{**SAVING, **changes})
    trainer.train(resume_from_checkpoint=True)
    return record_of(trainer)
