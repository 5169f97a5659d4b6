"""Runs of TRL's trainers, in one process and in parallel, on texts and a tokenizer made here."""

import gc
import os
import random
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import hf_tpp
from tests.integrations.runs import Layout, Record, as_launched, record_of
from tests.parity.models import tiny_model

STEPS = 20
ROWS = 4  # in one forward pass, of all replicas together
WORDS = [f"w{index}" for index in range(120)]


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        kind: "sft" or "dpo".
        model: Name of a tiny model.
        lora: Train an adapter that the trainer makes.
        reference: For "dpo" without an adapter: "parallel" or "plain".
        settings: Further arguments of the trainer's configuration.
        options: Further arguments of parallelize().
        evaluates: Rows of an evaluation after training.
        loss_function: Train with a `compute_loss_func`.
    """

    kind: str
    model: str
    lora: bool = False
    reference: str = "parallel"
    settings: tuple[tuple[str, Any], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()
    evaluates: int = 0
    loss_function: bool = False

    def __hash__(self) -> int:
        return hash(repr(self))  # settings may hold dictionaries


def sft(model: str = "llama_gqa", **settings: Any) -> Way:
    """SFTTrainer with some settings."""
    return Way("sft", model, settings=tuple(settings.items()))


def dpo(model: str = "gpt2", **settings: Any) -> Way:
    """DPOTrainer with some settings."""
    return Way("dpo", model, settings=tuple(settings.items()))


@dataclass
class TRLRecord(Record):
    """And the metrics that TRL logs at each step, and sums of the tensors that it saved."""

    metrics: dict[str, list[float]] = field(default_factory=dict)
    saved: dict[str, float] = field(default_factory=dict)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


def texts(columns: Sequence[str], rows: int) -> Any:
    """Sentences of 3 to 9 words; all columns but the first continue it."""
    from datasets import Dataset

    draw = random.Random(5)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(3, 9)))

    return Dataset.from_dict(
        {column: [" " * (column != columns[0]) + text() for _ in range(rows)] for column in columns}
    )


def model_of(name: str, layout: Layout, seed: int = 0, **options: Any) -> Any:
    """Models of different seeds differ a little, as a reference model and one that was trained further."""
    model = tiny_model(name, num_layers=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    if layout.world_size > 1:
        model = hf_tpp.parallelize(model, tp=layout.tp, pp=layout.pp, verbose=False, **options)
    return model


def settings(layout: Layout, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": ROWS // layout.dp,
        "per_device_eval_batch_size": ROWS // layout.dp,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.5,
        "max_steps": STEPS,
        "learning_rate": 5e-3,
        "adam_epsilon": 1e-4,
        "weight_decay": 0.1,
        "warmup_steps": 5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "gradient_checkpointing": False,
        "max_length": 16,
        "seed": 3,
    }


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules="all-linear")


def squared_error(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A `compute_loss_func`: any loss of the logits, over the tokens of the whole step."""
    chosen = outputs.logits[:, :-1].gather(2, labels[:, 1:].clamp(min=0).unsqueeze(2)).squeeze(2)
    return ((chosen - 1).square() * (labels[:, 1:] != -100)).sum() / num_items_in_batch


def trainer_of(way: Way, layout: Layout, folder: str) -> Any:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    options = dict(way.options)
    mixin = (hf_tpp.TPPTrainerMixin,) if options.get("patch") is False else ()
    config: Any = {"sft": SFTConfig, "dpo": DPOConfig}[way.kind]
    trainer: Any = {"sft": SFTTrainer, "dpo": DPOTrainer}[way.kind]
    columns = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected")}[way.kind]
    more: dict[str, Any] = {"peft_config": adapter()} if way.lora else {}
    if way.kind == "dpo" and not way.lora:
        more["ref_model"] = model_of(way.model, layout if way.reference == "parallel" else Layout(), 1, **options)
    if way.loss_function:
        more["compute_loss_func"] = squared_error
    if way.evaluates:
        more["eval_dataset"] = texts(columns, way.evaluates)
    model = model_of(way.model, layout, **options)
    torch.manual_seed(7)  # of the adapter
    return type(trainer.__name__, (*mixin, trainer), {})(
        model=model,
        args=config(**settings(layout, folder) | dict(way.settings)),
        train_dataset=texts(columns, 2 * ROWS * STEPS),
        processing_class=tokenizer(),
        **more,
    )


def quiet() -> None:
    """No network and no progress bars; before anything of Hugging Face is imported that asks for it."""
    names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    os.environ |= dict.fromkeys(names, "1") | {"TOKENIZERS_PARALLELISM": "false"}


def trl_run(way: Way, layout: Layout) -> TRLRecord:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(way, layout, folder)
        trainer.train()
        record = TRLRecord(**vars(record_of(trainer)))
        known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
        for entry in trainer.state.log_history:
            if "loss" in entry:
                for name in entry.keys() - known:
                    record.metrics.setdefault(name, []).append(entry[name])
        if way.evaluates:
            found = trainer.evaluate()
            record.evaluation = {name: value for name, value in found.items() if not name.endswith(("second", "time"))}
        if way.lora:
            trainer.save_model(folder)
            if trainer.accelerator.process_index == 0:
                tensors = load_file(Path(folder, "adapter_model.safetensors"))
                record.saved = {name: float(tensor.double().square().sum()) for name, tensor in tensors.items()}
    return record


def trl_runs(cases: Sequence[tuple[Way, Layout]]) -> list[TRLRecord]:
    """Body of a rank: one run after the other."""
    as_launched()
    quiet()
    records = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # what TRL 2 will not have
        for way, layout in cases:
            records.append(trl_run(way, layout))
            gc.collect()
    return records
