"""What cannot work under Trainer or accelerate is refused by name, on all ranks."""

import pytest

from hf_tpp.integrations.trainer_arguments import REFUSALS
from tests.integrations import refusals
from tests.integrations.runs import Layout
from tests.ranks import run_ranks


def test_arguments_of_trainer(tmp_path):
    for found in run_ranks(refusals.refused_arguments, 2, Layout(pp=2), str(tmp_path), timeout=200):
        assert set(found) == set(REFUSALS) == set(refusals.ARGUMENTS)
        for name, messages in found.items():
            for message in messages:
                assert message.startswith(f"ConfigurationError: {name}="), message
                assert message.endswith(f"with a parallel model: {REFUSALS[name].why}"), message


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(refusals.refused_calls, 2, Layout(pp=2), str(tmp_path_factory.mktemp("refused")), timeout=200)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "processes",
            "accelerate counts 1 processes, and the model is on 2: start with torchrun or `accelerate launch",
        ),
        ("dispatching", "dispatch_batches=True sends a different part of each batch to every process"),
        ("pickles", "save_model(safe_serialization=False) is not available for a parallel model"),
        ("optimizers", "2 prepared optimizers have parameters of one parallel GPT2LMHeadModel: use one optimizer"),
        ("layouts", "this process has parallel models with tp=1, pp=2 and tp=2, pp=1: accelerate and Trainer share"),
    ],
)
def test_calls(name, message, found):
    for of_rank in found:
        assert of_rank[name].startswith(f"ConfigurationError: {message}"), of_rank[name]
