"""A script with a plain Accelerator, in one process and in parallel: bodies of ranks."""

import gc
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, IterableDataset
from transformers import get_cosine_schedule_with_warmup

from tests.integrations.runs import (
    ACCUMULATION,
    GLOBAL_ROWS,
    MAX_NORM,
    STEPS,
    Layout,
    Record,
    Rows,
    as_launched,
    model_for,
)

SAVED_AT = 6
EVALUATION_ROWS = 11
ORDER = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=3)


class Script:
    """The lines of a training script; nothing in it knows of hf_tpp but `model_for`."""

    def __init__(self, name: str, layout: Layout, *, accelerator_first: bool = False, accelerator_class: Any = None):
        make = accelerator_class or Accelerator
        options = {"patch": False} if accelerator_class else {}
        settings: dict[str, Any] = {"gradient_accumulation_steps": ACCUMULATION, "dataloader_config": ORDER}
        if accelerator_first:
            self.accelerator = make(**settings)
        model = model_for(name, layout, **options)
        if not accelerator_first:
            self.accelerator = make(**settings)
        decayed = [p for n, p in model.named_parameters() if p.dim() > 1]
        others = [p for n, p in model.named_parameters() if p.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-4)
        loader = DataLoader(Rows(), batch_size=GLOBAL_ROWS // layout.dp, shuffle=True)
        evaluation = DataLoader(Rows(EVALUATION_ROWS, seed=7), batch_size=GLOBAL_ROWS // layout.dp)
        batches = self.accelerator.num_processes  # of one step, as scripts have it
        scheduler = get_cosine_schedule_with_warmup(optimizer, 5 * batches, STEPS * batches)
        prepared = self.accelerator.prepare(model, optimizer, loader, evaluation, scheduler)
        self.model, self.optimizer, self.loader, self.evaluation, self.scheduler = prepared
        self.record = Record()

    def train(self, skip: int = 0, saved_at: int | None = None, folder: str = "", stops: bool = False) -> None:
        self.model.train()
        loader = self.accelerator.skip_first_batches(self.loader, skip) if skip else self.loader
        total = 0.0
        for batch in loader:
            with self.accelerator.accumulate(self.model):
                loss = self.model(**batch).loss
                self.accelerator.backward(loss)
                total += loss.item() / ACCUMULATION
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), MAX_NORM)
                    self.record.losses.append(total)
                    self.record.norms.append(float(norm))
                    total = 0.0
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.record.rates.append(self.scheduler.get_last_lr()[0])
                if len(self.record.losses) == saved_at:
                    self.accelerator.save_state(folder)
                    if stops:
                        return

    def evaluate(self) -> None:
        self.model.eval()
        logits, labels, names = [], [], []
        for batch in self.evaluation:
            with torch.no_grad():
                output = self.model(**batch)
            found = self.accelerator.gather_for_metrics({"logits": output.logits, "labels": [batch["labels"]]})
            logits.append(found["logits"])
            labels.append(found["labels"][0])
            names += self.accelerator.gather_for_metrics([str(row.tolist()) for row in batch["labels"]])
        self.record.evaluation = {"logits": torch.cat(logits), "labels": torch.cat(labels), "names": names}


def script_runs(cases: list[tuple[str, Layout]], folder: str, accelerator_class: Any = None) -> list[list[Record]]:
    """Body of a rank: train with a save on the way, evaluate, save the model; then resume in a new script."""
    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    records = []
    for index, (name, layout) in enumerate(cases):
        place = f"{folder}/{name}-{layout}"
        options = {"accelerator_first": index % 2 == 0, "accelerator_class": accelerator_class}
        whole = Script(name, layout, **options)
        whole.train(saved_at=SAVED_AT, folder=place)
        whole.evaluate()
        whole.accelerator.save_model(whole.model, f"{place}-final")
        whole.record.notes["is_same"] = whole.accelerator.unwrap_model(whole.model) is whole.model
        whole.record.notes["files"] = sorted(path.name for path in Path(f"{place}-final").iterdir())
        resumed = Script(name, layout, **options)
        resumed.accelerator.load_state(place)
        resumed.train(skip=SAVED_AT * ACCUMULATION)
        records.append([whole.record, resumed.record])
        del whole, resumed
        gc.collect()
    return records


def saved_run(name: str, layout: Layout, folder: str) -> None:
    """Body of a rank: a script that is not heard of again after it has saved its state."""
    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    Script(name, layout).train(saved_at=SAVED_AT, folder=folder, stops=True)


def resumed_run(name: str, layout: Layout, folder: str) -> Record:
    """Body of a rank: what follows after `saved_run`."""
    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    script = Script(name, layout)
    script.accelerator.load_state(folder)
    script.train(skip=SAVED_AT * ACCUMULATION)
    return script.record


def counts(layout: Layout, accelerator_class: Any = None) -> dict[str, Any]:
    """Body of a rank: what accelerate counts, gathers and reduces, with a model and after it is gone."""
    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    rank = int(os.environ["RANK"])
    model = model_for("gpt2", layout, **({"patch": False} if accelerator_class else {}))
    accelerator = (accelerator_class or Accelerator)()
    numbers = torch.tensor([rank, 10 * rank])
    found = {
        "processes": accelerator.num_processes,
        "is_last": accelerator.is_last_process,
        "gathered": accelerator.gather({"a": [numbers], "b": torch.tensor(rank)}),
        **{kind: accelerator.reduce(numbers.float(), kind) for kind in ("sum", "mean", "max")},
    }
    if rank == layout.world_size - 1:
        accelerator.set_trigger()
    found["triggers"] = [accelerator.check_trigger(), accelerator.check_trigger()]
    del model
    gc.collect()
    found["afterwards"] = accelerator.num_processes, accelerator.gather(numbers)
    return found


class Drawn(Rows):
    """Numbered rows, with a random number that is drawn when a row is read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"id": torch.tensor(index), "drawn": torch.rand(())}


class Stream(IterableDataset[dict[str, torch.Tensor]]):
    """Numbered rows one after the other."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __iter__(self) -> Any:
        for index in range(self.rows):
            yield {"id": torch.tensor(index)}


def batches(layout: Layout, cases: list[dict[str, Any]], rows: int) -> list[list[list[list[float]]]]:
    """Body of a rank: what it gets of some data loaders in two epochs, with generators that differ between ranks."""
    import datasets

    as_launched()
    os.environ["ACCELERATE_USE_CPU"] = "true"
    model = model_for("gpt2", layout)
    torch.manual_seed(int(os.environ["RANK"]))
    results = []
    for case in cases:
        case = dict(case)
        kind, settings = case.pop("kind"), case.pop("settings", {})
        dataset: Any = {
            "map": lambda: Drawn(rows),
            "stream": lambda: Stream(rows),
            "datasets": lambda: (
                datasets.Dataset.from_dict({"id": list(range(rows))})
                .with_format("torch")
                .to_iterable_dataset(num_shards=4)
            ),
        }[kind]()
        if "num_workers" in case:
            case["multiprocessing_context"] = "fork"  # a rank of these tests would start a server to fork from
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**settings))
        loader = accelerator.prepare(DataLoader(dataset, batch_size=2, **case))
        epochs = [
            [
                value
                for batch in loader
                for value in (*batch["id"].tolist(), *batch.get("drawn", torch.zeros(0)).tolist())
            ]
            for _ in range(2)
        ]
        results.append(epochs)
    del model
    return results
