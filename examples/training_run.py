"""One training run of `pretrain_gpt.py`: what an iteration changes, and how it is saved, resumed and logged."""

import argparse
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from text_data import Samples
from tqdm import tqdm

from hf_tpp.checkpoint.training import load_training_state, save_training_state
from hf_tpp.errors import ConfigurationError
from hf_tpp.parallel_model import parallel_state

__all__ = ["Run"]


@dataclass
class Run:
    """Everything that training changes."""

    args: argparse.Namespace
    model: Any
    tokenizer: Any
    train: Samples
    valid: Samples | None
    iteration: int = 0
    consumed_samples: int = 0
    saving: Any = None
    optimizer: torch.optim.Optimizer = field(init=False)
    scheduler: torch.optim.lr_scheduler.LambdaLR = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = build_optimizer(self.args, self.model)
        self.scheduler = build_scheduler(self.args, self.optimizer)
        self.state = parallel_state(self.model)
        self.mesh = self.state.mesh
        self.is_main = self.mesh.global_rank == 0

    def my_rows(self, samples: Samples, first: int) -> tuple[torch.Tensor, ...]:
        """This replica's rows of a global batch, as the batches that one call of the model takes."""
        count = self.args.global_batch_size // self.mesh.dp.size
        rows = samples.batch(first + self.mesh.dp.rank * count, count).to(self.mesh.device)
        # On several ranks one call runs all microbatches; a single one has no schedule, so they are looped over here.
        return rows.split(count if self.mesh.world_size > 1 else self.args.micro_batch_size)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One iteration; returns the mean loss and the gradient norm of the whole model."""
        self.model.train()
        calls = self.my_rows(self.train, self.consumed_samples)
        total = torch.zeros((), device=self.mesh.device)
        for rows in calls:
            loss = self.model(input_ids=rows, labels=rows).loss / len(calls)
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.iteration += 1
        self.consumed_samples += self.args.global_batch_size
        return total, norm

    @torch.no_grad()
    def evaluate(self) -> float:
        """The mean loss over the first rows of the validation text."""
        self.model.eval()
        losses = [
            self.model(input_ids=rows, labels=rows).loss
            for index in range(self.args.eval_iters)
            for rows in self.my_rows(self.valid, index * self.args.global_batch_size)
        ]
        loss = torch.stack(losses).float().mean()
        if self.mesh.dp.size > 1:
            dist.all_reduce(loss, group=self.mesh.dp.group)
        return loss.item() / self.mesh.dp.size

    def save(self) -> None:
        """Write a checkpoint from which any layout resumes."""
        extra = {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            "scheduler": self.scheduler.state_dict(),
            "data": self.data_facts(),
        }
        folder = self.args.save / f"step-{self.iteration:08d}"
        self.saving = save_training_state(
            folder,
            self.model,
            self.optimizer,
            specs=self.state.specs,
            mesh=self.mesh,
            extra=extra,
            asynchronous=self.args.async_save,
        )

    def finish(self) -> None:
        """Wait for a checkpoint that is still being written, and say if it could not be."""
        if self.saving is not None:
            self.saving.wait()

    def load(self, folder: Path) -> None:
        """Continue from a checkpoint.

        Raises:
            ConfigurationError: The data are not those of the checkpoint.
        """
        extra = load_training_state(folder, self.model, self.optimizer, specs=self.state.specs, mesh=self.mesh)
        if extra["data"] != self.data_facts():
            raise ConfigurationError(
                f"{folder} was trained on {extra['data']}, this run has {self.data_facts()}: pass the same"
            )
        self.iteration, self.consumed_samples = extra["iteration"], extra["consumed_samples"]
        self.scheduler.load_state_dict(extra["scheduler"])

    def data_facts(self) -> dict[str, int]:
        """What makes the position in the data mean the same."""
        return {"rows": len(self.train), "seq_length": self.args.seq_length, "seed": self.args.seed}

    def log(self, bar: tqdm, **numbers: float) -> None:
        """One line on the screen and in the log file."""
        if self.is_main:
            bar.write(" | ".join([f"iteration {self.iteration}", *(f"{k} {v:.6g}" for k, v in numbers.items())]))
            if self.args.save:
                self.args.save.mkdir(parents=True, exist_ok=True)
                with (self.args.save / "log.jsonl").open("a") as file:
                    record = {"iteration": self.iteration, "consumed_samples": self.consumed_samples, **numbers}
                    file.write(json.dumps(record) + "\n")


def build_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """No weight decay for biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=args.learning_rate)


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then the decay, which ends at 0 with the last iteration."""

    def factor(iteration: int) -> float:
        if iteration < args.lr_warmup_iters:
            return (iteration + 1) / (args.lr_warmup_iters + 1)
        done = (iteration - args.lr_warmup_iters) / max(1, args.train_iters - args.lr_warmup_iters)
        decay = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}
        return decay[args.lr_decay_style]

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
