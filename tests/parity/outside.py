"""Losses that a caller computes from logits, and passes that train with them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.trainer_pt_utils import LabelSmoother

from hf_tpp.parallel_model import parallel_state
from tests.parity.models import VOCABULARY, make_batch

Batch = dict[str, torch.Tensor]


def split(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """What the model gets, and the labels."""
    return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def log_probabilities(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[rows]: the log-probability of each row's labels."""
    targets = labels[:, 1:].clamp(min=0)
    per_token = logits[:, :-1].log_softmax(-1).gather(2, targets[..., None])[..., 0]
    return (per_token * (labels[:, 1:] != -100)).sum(1)


def plain(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    loss = cross_entropy(model(**inputs).logits, labels)
    loss.backward()
    return loss


def as_tuple(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    loss = cross_entropy(model(**inputs, return_dict=False)[0], labels)
    (loss * 3).backward()
    return loss


def label_smoothing(model: nn.Module, batch: Batch) -> torch.Tensor:
    """As Trainer computes it."""
    inputs, labels = split(batch)
    loss = LabelSmoother(epsilon=0.2)(model(**inputs), labels, shift_labels=True)
    loss.backward()
    return loss


def preference(model: nn.Module, batch: Batch) -> torch.Tensor:
    """As DPO computes it: the first half of the rows is preferred to the second, row by row."""
    inputs, labels = split(batch)
    chosen, rejected = log_probabilities(model(**inputs).logits, labels).chunk(2)
    loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
    loss.backward()
    return loss


def preference_of_two_calls(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Two calls are open at a time, and one that does not train comes in between."""
    inputs, labels = split(batch)
    halves = [{name: value.chunk(2)[part] for name, value in inputs.items()} for part in (0, 1)]
    chosen = log_probabilities(model(**halves[0]).logits, labels.chunk(2)[0])
    with torch.no_grad():
        reference = log_probabilities(model(**halves[0]).logits, labels.chunk(2)[0])
    rejected = log_probabilities(model(**halves[1]).logits, labels.chunk(2)[1])
    loss = -F.logsigmoid(0.1 * (chosen - reference - rejected)).mean()
    loss.backward()
    return loss


def sum_of_both_kinds(model: nn.Module, batch: Batch) -> torch.Tensor:
    """A loss inside and one outside, with one backward."""
    inputs, labels = split(batch)
    outside = cross_entropy(model(**inputs).logits, labels)
    loss = model(**inputs, labels=batch["input_ids"], num_items_in_batch=30).loss + 0.3 * outside
    loss.backward()
    return loss


def backwards_in_another_order(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    first, second = (cross_entropy(model(**inputs).logits, other) for other in (labels, batch["input_ids"]))
    second.backward()
    first.backward()
    return first + second


def some_positions(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, _ = split(batch)
    logits = model(**inputs, logits_to_keep=3).logits
    assert logits.shape[1] == 3
    loss = logits.logsumexp(-1).mean() - logits[..., 5].mean()
    loss.backward()
    return loss


def chosen_positions(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    keep = torch.tensor([1, 4, 5, 10])
    logits = model(**inputs, logits_to_keep=keep).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, keep + 1].flatten())
    loss.backward()
    return loss


def one_row(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Most microbatches get a gradient of zeros."""
    inputs, labels = split(batch)
    loss = cross_entropy(model(**inputs).logits[:1], labels[:1])
    loss.backward()
    return loss


def accumulated(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Three losses of which only the last is synchronised between replicas, and hooks that see the sums."""
    inputs, labels = split(batch)
    hooked = [parameter for name, parameter in model.named_parameters() if ".1." in name]
    handles = [parameter.register_hook(lambda gradient: gradient * 2) for parameter in hooked]
    total = torch.zeros(())
    for part in range(3):
        loss = cross_entropy(model(**inputs).logits, labels.roll(part, 1)) / 3
        if part < 2 and hasattr(model, "no_sync"):
            with model.no_sync():
                loss.backward()
        else:
            loss.backward()
        total = total + loss.detach()
    for handle in handles:
        handle.remove()
    return total


def forgotten_forward(model: nn.Module, batch: Batch) -> torch.Tensor:
    model(**split(make_batch(3, 8, seed=9))[0])
    return plain(model, batch)


def frozen_in_between(model: nn.Module, batch: Batch) -> torch.Tensor:
    """What was trained when the forward ran is what gets gradients."""
    inputs, labels = split(batch)
    loss = cross_entropy(model(**inputs).logits, labels)
    model.requires_grad_(False)
    model(**inputs)
    model.requires_grad_(True)
    loss.backward()
    return loss


def token_count(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Trainer passes the number of tokens also where it computes the loss itself."""
    inputs, labels = split(batch)
    loss = cross_entropy(model(**inputs, num_items_in_batch=torch.tensor(7)).logits, labels)
    loss.backward()
    return loss


def separate_microbatches(model: nn.Module, batch: Batch) -> torch.Tensor:
    parts = [batch, make_batch(1, 8, seed=6)]
    if parallel_state(model) is not None:
        pieces = model(**{name: [part[name] for part in parts] for name in ("input_ids", "attention_mask")}).logits
    else:
        pieces = [model(**split(part)[0]).logits for part in parts]
    loss = sum(cross_entropy(logits, part["labels"]) for logits, part in zip(pieces, parts, strict=True))
    loss.backward()
    return loss


def autocast(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(**inputs).logits
    loss = cross_entropy(logits, labels)
    loss.backward()
    return loss


def logits_beside_the_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """With train_logits=True: a loss that trains, and logits that do not."""
    output = model(**batch)
    output.loss.backward()
    if parallel_state(model) is not None:
        assert not output.logits.requires_grad
    accuracy = (output.logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).float().mean()
    return output.loss + accuracy + output.logits.detach()[..., :VOCABULARY].mean()


def router_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    inputs, labels = split(batch)
    output = model(**inputs, output_router_logits=True)
    loss = cross_entropy(output.logits, labels) + 0.5 * output.aux_loss
    loss.backward()
    return loss


def trained_by(how: str) -> Callable[[Any, Batch], torch.Tensor]:
    function: Callable[[Any, Batch], torch.Tensor] = globals()[how]
    return function
