"""Training state of a model that went through parallelize: saved at tp=2, resumed at other layouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp import parallelize
from hf_tpp.checkpoint.training import load_training_state, save_training_state
from hf_tpp.parallel_model import parallel_state
from tests.ranks import run_ranks

# An odd vocabulary (padding), a tied head, two key and value heads (copied at tp=4).
SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "vocab_size": 131, "max_position_embeddings": 16}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True}


class Job:
    """A model and its optimizer on one rank."""

    def __init__(self, tp: int, pp: int, seed: int) -> None:
        config = AutoConfig.for_model("llama", **SIZES, **HEADS, bos_token_id=0, eos_token_id=0)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        self.model = parallelize(model, tp, pp, num_microbatches=2, device="cpu", seed=seed, verbose=False).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        state = parallel_state(self.model)
        assert state is not None
        self.place: dict[str, Any] = {"specs": state.specs, "mesh": state.mesh}

    def step(self, index: int) -> float:
        rows = torch.randint(0, 131, (8, 16), generator=torch.Generator().manual_seed(index))
        dp = self.place["mesh"].dp
        mine = rows.chunk(dp.size)[dp.rank]
        loss = self.model(input_ids=mine, labels=mine).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


def first_body(root: Path) -> float:
    job = Job(2, 1, seed=0)
    job.step(0)
    job.step(1)
    save_training_state(root / "first", job.model, job.optimizer, **job.place, extra={"step": 2})
    job.model.save_pretrained(root / "huggingface")
    return job.step(2)


def resume_body(root: Path, tp: int, pp: int, name: str) -> float:
    job = Job(tp, pp, seed=1)
    assert load_training_state(root / "first", job.model, job.optimizer, **job.place) == {"step": 2}
    save_training_state(root / name, job.model, job.optimizer, **job.place)
    return job.step(2)


def full_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """What an unsplit job resumes."""
    job = Job(1, 1, seed=2)
    load_training_state(directory, job.model, job.optimizer, **job.place)
    found = {name: parameter.detach() for name, parameter in job.model.named_parameters()}
    for name, parameter in job.model.named_parameters():
        found |= {f"{name}.{key}": value for key, value in job.optimizer.state[parameter].items()}
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    root = tmp_path_factory.mktemp("run")
    return root, run_ranks(first_body, 2, root)[0]


def test_an_unsplit_job_resumes_what_save_pretrained_wrote(first: tuple[Path, float]) -> None:
    tensors = full_tensors(first[0] / "first")
    plain = AutoModelForCausalLM.from_pretrained(first[0] / "huggingface")
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, tensors[name]), name
        assert tensors[f"{name}.exp_avg"].shape == parameter.shape
        assert tensors[f"{name}.exp_avg"].abs().sum() > 0
        assert tensors[f"{name}.step"] == 2


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 2, 1), (2, 1, 2), (4, 1, 1), (2, 2, 1)])
def test_resumes_at_any_layout(first: tuple[Path, float], tp: int, pp: int, dp: int) -> None:
    root, expected_loss = first
    name = f"tp{tp}-pp{pp}-dp{dp}"
    losses = run_ranks(resume_body, tp * pp * dp, root, tp, pp, name)
    assert losses == pytest.approx([expected_loss] * len(losses), rel=1e-5)
    before, after = full_tensors(root / "first"), full_tensors(root / name)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
