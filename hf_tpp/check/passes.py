"""What a model is made to do, plain or parallel, and the record that it leaves: everything that must be equal.

step 1: loss, gradients, their norm, clipping, SGD          train
step 2: the same on another batch, then the weights         train
logits in eval mode                                         evaluate
the tensors of a saved checkpoint, and of its reload        save
tokens of a greedy generation with a cache                  generate
"""

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_tpp.check.tiny_model import make_batch, make_prompt
from hf_tpp.errors import HfTppError
from hf_tpp.parallel_model import parallel_state

__all__ = ["PARTS", "Record", "Trouble", "read_checkpoint", "record_run", "record_twin", "reload_checkpoint"]

PARTS = ("train", "evaluate", "save", "generate")
LEARNING_RATE = 0.1
MAX_NORM = 1.0
NEW_TOKENS = 4


@dataclass
class Trouble:
    """Why one part of a run did not come to an end.

    Attributes:
        refused: True if hf_tpp refused it by one of its errors.
        kind: Class name of the exception.
        message: Its message, and where it came from if it is not one of hf_tpp's own.
        follows: True if it only says that another rank is gone.
    """

    refused: bool
    kind: str
    message: str
    follows: bool = False

    @classmethod
    def of(cls, error: Exception) -> "Trouble":
        """The trouble that an exception is."""
        refused = isinstance(error, HfTppError)
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if refused else f" (in {where.name} of {Path(where.filename).name})"
        return cls(refused, type(error).__name__, f"{error}{place}", "Connection closed by peer" in str(error))


@dataclass
class Record:
    """What a run leaves behind. Tensors go by parameter name, and are shards if the model is parallel.

    Attributes:
        losses: Of each step.
        norms: Gradient norm of each step, before clipping.
        gradients: Of the first step, before clipping.
        weights: After the last step.
        logits: [rows, seq, vocabulary] in eval mode, or None.
        tokens: [rows, prompt + new], or None.
        troubles: Part -> why it failed.
        finished: Parts after which the run went on.
        twin: Of a plain run: training and logits of the same run from weights that are off by their last bit.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: torch.Tensor | None = None
    tokens: torch.Tensor | None = None
    troubles: dict[str, Trouble] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    twin: "Record | None" = None


def record_twin(model: nn.Module, evaluates: bool) -> Record:
    """Train, and evaluate, with weights that are moved by one unit in the last place: what does rounding do to a model?

    Args:
        model: A plain one, as the run began.
        evaluates: It can.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                away = torch.randint(0, 2, parameter.shape, generator=generator) * 2.0 - 1.0
                parameter.copy_(torch.nextafter(parameter, away.to(parameter.dtype) * torch.inf))
    record = Record()
    _train((0, 1), model, record, Path())
    if evaluates:
        _evaluate(model, record, Path())
    return record


def record_run(
    model: nn.Module, folder: Path, parts: tuple[str, ...] = PARTS, replica: tuple[int, int] = (0, 1)
) -> Record:
    """Put a model through `parts`, in order.

    An error of hf_tpp is raised on all ranks alike and ends its part; any other one may have put the ranks out of step,
    so it ends the run, and the ranks that wait for this one are told by their broken connections.

    Args:
        model: Plain or parallel, in training mode.
        folder: Where to save it to; must not exist.
        parts: Of `PARTS`.
        replica: Which one of how many trains here; each takes its share of the rows.

    Collective: every rank of a parallel model.

    Returns:
        The record of this process.
    """
    record, is_parallel = Record(), parallel_state(model) is not None
    bodies: dict[str, Callable[[nn.Module, Record, Path], None]] = {
        "train": partial(_train, replica),
        "evaluate": _evaluate,
        "generate": _generate,
        "save": _save,
    }
    for part in parts:
        try:
            bodies[part](model, record, folder)
        except Exception as error:
            record.troubles[part] = trouble = Trouble.of(error)
            if part == "train" or (is_parallel and not trouble.refused):
                break
        record.finished.append(part)
    return record


def _train(replica: tuple[int, int], model: nn.Module, record: Record, _: Path) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for step in range(2):
        loss = model(**_share(make_batch(model, seed=step), *replica)).loss
        loss.backward()
        if step == 0:
            named = model.named_parameters()
            record.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        norm = nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(float(loss.detach()))
        record.norms.append(float(norm))
    record.weights = {name: p.detach().clone() for name, p in model.named_parameters()}


def _share(batch: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    """The rows of replica `index` of `count`."""
    return {k: v.chunk(count)[index] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def _evaluate(model: nn.Module, record: Record, _: Path) -> None:
    batch = make_batch(model, seed=2)
    batch = {name: value for name, value in batch.items() if name not in ("labels", "use_cache")}
    with torch.no_grad():
        record.logits = model.eval()(**batch).logits.clone()


def _generate(model: nn.Module, record: Record, _: Path) -> None:
    prompt = make_prompt(model)
    mask = {"attention_mask": torch.ones_like(prompt)} if "attention_mask" in make_batch(model) else {}
    tokens: Any = model.eval().generate(prompt, **mask, max_new_tokens=NEW_TOKENS, do_sample=False)  # type: ignore[operator]
    record.tokens = tokens.clone()


def _save(model: nn.Module, _: Record, folder: Path) -> None:
    model.save_pretrained(folder)  # type: ignore[operator]


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def reload_checkpoint(config: Any, folder: Path, trust_remote_code: bool = False) -> dict[str, torch.Tensor]:
    """What plain transformers loads from a folder.

    Args:
        config: Configuration of the model that was saved.
        folder: Its checkpoint.
        trust_remote_code: Run model code that the configuration names.

    Returns:
        The parameters, by name. A parameter that was not in the files is left out.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=copy.deepcopy(config),
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        dtype=torch.float32,
    )
    model, report = loaded
    missing = set(report["missing_keys"]) | {str(entry) for entry in report["mismatched_keys"]}
    named = model.named_parameters()
    return {name: parameter.detach() for name, parameter in named if name not in missing}
