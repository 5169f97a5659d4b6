"""What a fully sharded model costs and can do besides training: messages, memory, calls, checkpoints, refusals."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import hf_tpp
from hf_tpp.checkpoint.training import load_training_state, save_training_state
from hf_tpp.errors import BatchError, ConfigurationError, UnsupportedModelError
from hf_tpp.parallel_model import parallel_state
from tests.parity.models import make_batch, tiny_model
from tests.parity.training import whole
from tests.ranks import run_ranks


def build(data_parallel: str = "fully_shard", model: str = "llama_gqa", tp: int = 1, pp: int = 1) -> Any:
    plain = tiny_model(model, num_layers=4).train()
    return hf_tpp.parallelize(plain, tp, pp, data_parallel=data_parallel, num_microbatches=4, verbose=False)


def batch_of(model: nn.Module, index: int) -> dict[str, torch.Tensor]:
    dp = parallel_state(model).mesh.dp
    return {name: value.chunk(dp.size)[dp.rank] for name, value in make_batch(8, 12, seed=index).items()}


class Run:
    """A model that trains."""

    def __init__(self, optimizer: str, data_parallel: str, tp: int, pp: int) -> None:
        self.model = build(data_parallel, "gpt2", tp, pp)
        kinds: dict[str, Any] = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}
        more = {"momentum": 0.9} if optimizer == "SGD" else {"eps": 1e-4}
        self.optimizer = kinds[optimizer](self.model.parameters(), lr=1e-2, **more)
        state = parallel_state(self.model)
        self.place: dict[str, Any] = {"specs": state.specs, "mesh": state.mesh}

    def step(self, index: int) -> list[float]:
        loss = self.model(**batch_of(self.model, index)).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return [float(loss), float(norm)]

    def save(self, folder: Path) -> None:
        save_training_state(folder, self.model, self.optimizer, **self.place)

    def load(self, folder: Path) -> None:
        load_training_state(folder, self.model, self.optimizer, **self.place)


# --- messages and memory ----------------------------------------------------------------------------------------------


class Messages(TorchDispatchMode):
    """Collectives on floating-point tensors, by name: what ranks agree on are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d" and isinstance(args[0], torch.Tensor) and args[0].is_floating_point():
            self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return self.names.count(name)


def cost_body() -> dict[str, Any]:
    run = Run("AdamW", "fully_shard", 1, 2)
    run.step(0)
    with Messages() as messages:
        run.model(**batch_of(run.model, 1)).loss.backward()
    own = [p for name, p in run.model.named_parameters() if name in run.place["specs"]]
    stored = [value for p in own for value in run.optimizer.state[p].values() if isinstance(value, DTensor)]
    return {
        "gathers": messages.count("_allgather_base_"),
        "scatters": messages.count("_reduce_scatter_base_"),
        "stored": sum(value.to_local().numel() for value in stored),
        "whole": sum(2 * p.numel() for p in own),
        "shared": all(isinstance(p, DTensor) for p in own),
    }


def test_messages_of_a_step_and_memory() -> None:
    for cost in run_ranks(cost_body, 4):
        # Two blocks and what lies outside, although four microbatches ran.
        assert cost["gathers"] == 3
        assert cost["scatters"] == 3
        assert cost["shared"]
        assert cost["stored"] == pytest.approx(cost["whole"] / 2, rel=0.02)  # a vocabulary of 131 rows


# --- calls ------------------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def calls_body(folder: Path, data_parallel: str) -> dict[str, Any]:
    """Everything that a model is asked for; compared with what replicated models answer."""
    model = build(data_parallel, tp=2)
    found: dict[str, Any] = {}
    with model.no_sync():
        model(**batch_of(model, 0)).loss.backward()
    (model(**batch_of(model, 1)).loss * 0.5).backward()
    found["accumulated"] = gradients_of(model)
    for norm_type in (1.0, math.inf):
        found[f"norm {norm_type}"] = float(hf_tpp.clip_grad_norm_(model, 0.1, norm_type))
    found["clipped"] = gradients_of(model)
    some = list(model.parameters())[:3]
    found["norm of some"] = float(hf_tpp.clip_grad_norm_(model, 1.0, parameters=some))
    model.zero_grad()
    embeds = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3))
    model(inputs_embeds=embeds, labels=torch.ones(2, 6, dtype=torch.long)).loss.backward()
    found["without embedding"] = gradients_of(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.0." not in name)
    model.to("cpu")
    model(**batch_of(model, 2)).loss.backward()
    found["frozen later"] = gradients_of(model)
    model.zero_grad()
    logits_loss(model, 5).backward()
    found["loss outside"] = gradients_of(model)
    model.eval()
    result = model(**batch_of(model, 3))
    found["loss"], found["logits"] = float(result.loss), result.logits
    prompt = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        found["tokens"] = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.save_pretrained(folder / data_parallel)
    model.train()
    model(**batch_of(model, 4)).loss.backward()
    found["after evaluation"] = gradients_of(model)
    return found


def logits_loss(model: nn.Module, index: int) -> torch.Tensor:
    batch = batch_of(model, index)
    logits = model(batch["input_ids"]).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten())


def both_body(folder: Path) -> list[dict[str, Any]]:
    return [calls_body(folder, data_parallel) for data_parallel in ("replicate", "fully_shard")]


def test_calls_answer_as_replicated_ones_do(tmp_path: Path) -> None:
    for expected, found in run_ranks(both_body, 4, tmp_path, timeout=120):
        for name, value in expected.items():
            if isinstance(value, dict):
                value.pop("hf_tpp_residual.bias", None)
                found[name].pop("hf_tpp_residual.bias", None)
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=name)
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("replicate", "fully_shard"))
    for (name, one), other in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other), name


# --- checkpoints ------------------------------------------------------------------------------------------------------

LAYOUTS = {"fully_shard": [(2, 1), (1, 2)], "replicate": [(2, 2), (1, 4)]}


def save_body(folder: Path, optimizer: str, data_parallel: str, tp: int, pp: int) -> list[list[float]]:
    run = Run(optimizer, data_parallel, tp, pp)
    run.step(0)
    run.step(1)
    run.save(folder)
    return [run.step(index) for index in (2, 3)]


def resume_body(folder: Path, optimizer: str, layouts: dict[str, list[tuple[int, int]]]) -> list[list[list[float]]]:
    found = []
    for data_parallel, sizes in layouts.items():
        for tp, pp in sizes:
            run = Run(optimizer, data_parallel, tp, pp)
            run.step(7)  # state that is in the way
            run.load(folder)
            found.append([run.step(index) for index in (2, 3)])
    return found


@pytest.mark.parametrize(
    ("optimizer", "data_parallel", "tp", "pp"),
    [("AdamW", "fully_shard", 2, 1), ("SGD", "replicate", 2, 2)],
)
def test_training_continues_at_any_layout(tmp_path: Path, optimizer: str, data_parallel: str, tp: int, pp: int) -> None:
    expected = run_ranks(save_body, 4, tmp_path / "step-2", optimizer, data_parallel, tp, pp)[0]
    for rank in run_ranks(resume_body, 4, tmp_path / "step-2", optimizer, LAYOUTS, timeout=120):
        for steps in rank:
            torch.testing.assert_close(torch.tensor(steps), torch.tensor(expected), rtol=1e-5, atol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------


class WithScalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def refusal_body() -> None:
    with pytest.raises(ConfigurationError, match="data_parallel='zero': use 'replicate' or 'fully_shard'"):
        build("zero")
    plain = tiny_model("gpt2", num_layers=1)
    plain.transformer.extra = WithScalar()
    with pytest.raises(UnsupportedModelError, match=r"without a dimension \(transformer.extra.scale\)"):
        hf_tpp.parallelize(plain, data_parallel="fully_shard", verbose=False)
    model = build()
    with pytest.raises(ConfigurationError, match="on cpu: convert the model before parallelize"):
        model.to(torch.bfloat16)
    model(**batch_of(model, 0)).loss.backward()
    first, second = logits_loss(model, 6), logits_loss(model, 7)
    first.backward()
    torch.optim.AdamW(model.parameters()).step()
    with pytest.raises(BatchError, match="parameters were changed"):
        second.backward()
    with pytest.raises(ConfigurationError, match="Adafactor keeps statistics"):
        torch.optim.Adafactor(model.parameters()).step()


def test_refusals() -> None:
    run_ranks(refusal_body, 2)
