"""What users do to an ordinary model, done to a parallel one: it works, or is refused by name, and breaks nothing."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import hf_tpp
from hf_tpp.errors import HfTppError
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks


def resize(model: Any) -> None:
    model.resize_token_embeddings(140)


def deepcopy(model: Any) -> None:
    copy.deepcopy(model)


def pickled(model: Any) -> None:
    pickle.dumps(model)


def push(model: Any) -> None:
    model.push_to_hub("name")


def ddp(model: Any) -> None:
    nn.parallel.DistributedDataParallel(model)


def later_parameter(model: Any) -> None:
    model.lm_head.added = nn.Parameter(torch.zeros(3))
    try:
        train(model)
    finally:
        del model.lm_head.added


def decoder_alone(model: Any) -> None:
    with torch.no_grad():
        model.model(**without_labels())


def other_dtype(model: Any) -> None:
    model.double()
    try:
        train(model)
    finally:
        model.float()


def without_labels() -> dict[str, torch.Tensor]:
    return {name: value for name, value in make_batch(4, 8).items() if name != "labels"}


def train(model: Any) -> float:
    loss = model(**make_batch(4, 8)).loss
    loss.backward()
    model.zero_grad()
    return loss.item()


REFUSED: dict[Callable[[Any], None], str] = {
    resize: "call it before parallelize",
    deepcopy: "load the model again and parallelize that one too",
    pickled: "use save_pretrained",
    push: "then huggingface_hub.upload_folder on one",
    ddp: "leave it out, gradients are averaged over the replicas already",
    later_parameter: r"lm_head.added was added after parallelize\(\)",
    decoder_alone: "call the model as a whole",
    other_dtype: "convert it before parallelize",
}
WORK_UNDER_TP: dict[Callable[[Any], None], str] = {decoder_alone: "every layer is here", other_dtype: "nothing is sent"}


def abuse(tp: int, pp: int) -> tuple[dict[str, str], list[float]]:
    model = hf_tpp.parallelize(tiny_model("llama_gqa", 2), tp=tp, pp=pp, verbose=False).train()
    said: dict[str, str] = {}
    losses = [train(model)]
    for act in REFUSED:
        try:
            act(model)
            said[act.__name__] = ""
        except HfTppError as error:
            said[act.__name__] = str(error)
        losses.append(train(model))
    return said, losses


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_what_would_break_a_parallel_model_is_refused_and_changes_nothing(tp, pp):
    model = tiny_model("llama_gqa", 2).train()
    expected = train(model)
    for said, losses in run_ranks(abuse, 2, tp, pp, timeout=120):
        assert losses == pytest.approx([expected] * len(losses), rel=1e-5)
        for act, pattern in REFUSED.items():
            if tp > 1 and act in WORK_UNDER_TP:
                assert said[act.__name__] == ""
            else:
                assert pattern.replace("\\", "") in said[act.__name__]


def test_transformers_may_ask_for_the_embedding_through_resizing():
    assert all(run_ranks(ask, 2))


def ask() -> bool:
    model: Any = hf_tpp.parallelize(tiny_model("gpt2", 2), tp=2, verbose=False)
    return model.resize_token_embeddings() is model.get_input_embeddings()
