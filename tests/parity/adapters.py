"""Models with adapters of PEFT: a case, how it is built in one process and in parallel, and how it is trained."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

import hf_tpp
from hf_tpp.check import joining
from hf_tpp.check.joining import Place, RankTensors
from hf_tpp.parallel_model import parallel_state
from hf_tpp.sharding import ShardSpec
from tests.parity.models import make_batch, tiny_model

PREFIX = "base_model.model."
MAX_NORM = 0.3


@dataclass
class AdapterCase:
    """One model with adapters on one layout; `first` says which of get_peft_model and parallelize is called first."""

    model: str
    first: str = "peft"
    tp: int = 1
    pp: int = 1
    dp: int = 1
    config: dict[str, Any] = field(default_factory=dict)
    kind: type[PeftConfig] = LoraConfig
    second: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    steps: int = 6
    checkpointing: bool = False

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        config = [f"{name}-{value}" for name, value in self.config.items()]
        parts = [self.model, f"{self.first}first", f"tp{self.tp}pp{self.pp}dp{self.dp}", *config, *self.options]
        parts += ["two"] * bool(self.second) + ["ckpt"] * self.checkpointing
        return "-".join(parts).replace(" ", "").replace("'", "")


@dataclass
class AdapterRecord:
    """Per step losses and norms, the first step's gradients, the last weights of what was trained."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    specs: dict[str, ShardSpec] = field(default_factory=dict)


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def with_adapters(model: nn.Module, case: AdapterCase) -> nn.Module:
    """The same adapters in every process; none of them starts at zero."""
    torch.manual_seed(5)
    if "lm_head" in str(case.config):
        # PEFT warns of what nothing here does (merging at a tied head), and of Conv1D beside Linear.
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`|fan_in_fan_out is set")
    options = {"fan_in_fan_out": case.model == "gpt2", **case.config}
    config = lora_config(**options) if case.kind is LoraConfig else case.kind(task_type="CAUSAL_LM", **case.config)
    peft_model = get_peft_model(model, config)
    if case.second:
        peft_model.add_adapter("second", lora_config(**{**options, **case.second}))
    return peft_model


def start_values(peft_model: nn.Module) -> None:
    """Values other than zero for what PEFT starts at zero, as a slice of the same whole tensor on every rank."""
    state = parallel_state(peft_model)
    from hf_tpp.sharding import shard_tensor

    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                key = name.removeprefix(PREFIX)
                spec = None if state is None else state.specs[key]
                shape = parameter.shape if spec is None else spec.full_shape
                generator = torch.Generator().manual_seed(sum(map(ord, key)))
                full = torch.randn(shape, generator=generator).mul_(0.05)
                parameter.copy_(full if spec is None else shard_tensor(full, spec, torch.device("cpu"), full.dtype))


def build_plain(case: AdapterCase) -> nn.Module:
    model = tiny_model(case.model, 4).to(case.dtype)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model = with_adapters(model, case)
    start_values(peft_model)
    return peft_model.train()


def build_parallel(case: AdapterCase) -> nn.Module:
    model = tiny_model(case.model, 4).to(case.dtype)
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    options = {"tp": case.tp, "pp": case.pp, "verbose": False, **case.options}
    if case.first == "peft":
        peft_model = with_adapters(model, case)
        assert hf_tpp.parallelize(peft_model, **options) is peft_model
    else:
        peft_model = with_adapters(hf_tpp.parallelize(model, **options), case)
    start_values(peft_model)
    return peft_model.train()


def train(peft_model: nn.Module, case: AdapterCase, dp_rank: int, dp_size: int) -> AdapterRecord:
    """SGD for the first half of the steps, AdamW for the second, with clipping; prompts without labels."""
    record = AdapterRecord()
    trained = [parameter for parameter in peft_model.parameters() if parameter.requires_grad]
    sgd = torch.optim.SGD(trained, lr=0.5)
    adamw = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-4)
    for step in range(case.steps):
        if case.second and step == case.steps // 3:
            peft_model.set_adapter("second")
        optimizer = sgd if step < case.steps // 2 else adamw
        batch = make_batch(4 * case.dp, 12, seed=step)
        rows = slice(dp_rank * 4 * case.dp // dp_size, (dp_rank + 1) * 4 * case.dp // dp_size)
        loss = peft_model(**{name: value[rows] for name, value in batch.items()}).loss
        loss.backward()
        if step == 0:
            named = _named(peft_model)
            record.gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
        record.norms.append(float(torch.nn.utils.clip_grad_norm_(peft_model.parameters(), MAX_NORM)))
        record.losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    record.weights = {name: p.detach().clone() for name, p in _named(peft_model)}
    return record


def _named(peft_model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.removeprefix(PREFIX), parameter) for name, parameter in peft_model.named_parameters()]


def train_parallel(case: AdapterCase) -> tuple[int, int, int, AdapterRecord]:
    peft_model = build_parallel(case)
    state = parallel_state(peft_model)
    assert state is not None
    record = train(peft_model, case, state.mesh.dp.rank, state.mesh.dp.size)
    # In the other order of calls the specs of base weights carry their names without adapters.
    record.specs = {name: _named_spec(name, spec) for name, spec in state.specs.items()}
    return state.mesh.tp.rank, state.mesh.pp.rank, state.mesh.dp.rank, record


def _named_spec(name: str, spec: ShardSpec) -> ShardSpec:
    from dataclasses import replace

    return replace(spec, name=name) if len(spec.stages) == 1 else spec


def join(ranks: list[tuple[int, int, int, AdapterRecord]], field_name: str) -> dict[str, torch.Tensor]:
    full, problems = joining.join(
        [
            RankTensors(Place(pp_rank, dp_rank, tp_rank), getattr(record, field_name), record.specs)
            for tp_rank, pp_rank, dp_rank, record in ranks
        ]
    )
    assert not problems
    return full


def assert_equal(case: AdapterCase, single: AdapterRecord, ranks: list[tuple[int, int, int, AdapterRecord]]) -> None:
    """Loss 1e-5, norms, every adapter's gradients and weights 1e-4 relative."""
    for _, _, _, record in ranks:
        torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(single.losses), rtol=1e-5, atol=0)
        torch.testing.assert_close(torch.tensor(record.norms), torch.tensor(single.norms), rtol=1e-4, atol=0)
    for what in ("gradients", "weights"):
        joined, expected = join(ranks, what), getattr(single, what)
        trained = {name for name in expected if "lora_" in name or name in single.gradients}
        assert trained <= joined.keys(), f"{case}: {trained - joined.keys()} are missing"
        assert what == "weights" or joined.keys() == expected.keys()
        for name in trained:
            value = expected[name]
            error = (joined[name] - value).norm() / value.norm().clamp(min=1e-8)
            assert error < 1e-4, f"{case}: {what} of {name} differ by {error:.2e} relative"
