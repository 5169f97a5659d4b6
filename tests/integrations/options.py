"""Short runs under Trainer with one option each: bodies of ranks."""

import gc
import tempfile
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tests.integrations.runs import Layout, Record, Rows, arguments, as_launched, model_for, record_of

STEPS = 4
OVERFLOWS_AT = 2


def soft_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A loss of the caller's: cross entropy with a penalty on large logits."""
    logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    entropy = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
    penalty = (torch.logsumexp(logits, -1) ** 2 * (targets != -100)).sum()
    total = entropy + 0.01 * penalty
    return total / num_items_in_batch if num_items_in_batch is not None else total / (targets != -100).sum()


def ragged() -> list[dict[str, list[int]]]:
    """Rows of many lengths."""
    rows = [[(index * 7 + position) % 120 + 3 for position in range(4 + index * 5 % 13)] for index in range(40)]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    size = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (size - len(row[name])) for row in rows])

    ids = padded("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", -100)}


class Overflow(TrainerCallback):
    """float16 as on a GPU, which accelerate asks for; in one step a gradient of the first stage alone overflows."""

    def __init__(self, trainer: Trainer) -> None:
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
        accelerator = trainer.accelerator
        accelerator.state._mixed_precision = "fp16"
        accelerator.native_amp, accelerator.scaler = True, self.scaler
        self._overflows = False
        self.scales: list[float] = []
        for name, parameter in trainer.model.named_parameters():
            if "embed_tokens" in name and parameter.numel():
                parameter.register_post_accumulate_grad_hook(self._spoil)

    def _spoil(self, parameter: torch.nn.Parameter) -> None:
        if self._overflows:
            assert parameter.grad is not None
            parameter.grad.fill_(torch.inf)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._overflows = state.global_step == OVERFLOWS_AT

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.scales.append(self.scaler.get_scale())


def half_precision(trainer: Trainer) -> Overflow:
    callback = Overflow(trainer)
    trainer.add_callback(callback)
    return callback


def order(name: str) -> dict[str, Any]:
    """Which rows are together; transformers 5.0 has `group_by_length=True` for that, and no other choice."""
    has_strategies = "train_sampling_strategy" in {field.name for field in fields(TrainingArguments)}
    chosen = {"train_sampling_strategy": name} if has_strategies else {"group_by_length": name == "group_by_length"}
    return {**chosen, "train_dataset": ragged(), "data_collator": pad}


OPTIONS: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.1},
    "loss function": {"compute_loss_func": soft_loss},
    "group by length": order("group_by_length"),
    "sequential": order("sequential"),
    "checkpointing": {"gradient_checkpointing": True},
    "tokens of a process": {"average_tokens_across_devices": False},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16": {"bf16": True},
    "fp16": {"prepare": half_precision},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "one of four": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
}
OF_TRAINER = ("compute_loss_func", "train_dataset", "data_collator")


def option_runs(layout: Layout, names: list[str], trainer_class: Any = None, **options: Any) -> dict[str, Record]:
    """Body of a rank."""
    as_launched()
    records = {}
    for name in names:
        chosen = dict(OPTIONS[name])
        prepare: Callable[[Trainer], Any] | None = chosen.pop("prepare", None)
        of_trainer = {"train_dataset": Rows(), **{key: chosen.pop(key) for key in OF_TRAINER if key in chosen}}
        with tempfile.TemporaryDirectory() as folder:
            trainer = (trainer_class or Trainer)(
                model=model_for("llama_gqa", layout, **options),
                args=arguments(layout, folder, max_steps=STEPS, warmup_steps=1, **chosen),
                **of_trainer,
            )
            callback = prepare(trainer) if prepare else None
            trainer.train()
            records[name] = record_of(trainer)
            records[name].notes["scales"] = callback.scales if callback else []
            del trainer, callback
            gc.collect()
    return records
