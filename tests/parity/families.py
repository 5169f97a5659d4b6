"""Every decoder-only family of transformers in tiny: the model as it is, and split over the stages of a pipeline.

`families.json`: family, or family.variant -> configuration.
"""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, logging

import hf_tpp
from hf_tpp.errors import HfTppError
from hf_tpp.parallel_model import parallel_state

CONFIGS: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("families.json").read_text())
LOSS_TOLERANCE, TOLERANCE = 1e-5, 1e-4
NOISE_FLOOR = 1e-5
"""Tensors with a smaller share of the norm of all are compared relative to that share: they are rounding noise."""
ROWS, SEQ, FIRST_TOKEN, LAST_TOKEN = 2, 16, 4, 100
NEW_TOKENS = 5


@dataclass(frozen=True)
class FamilyCase:
    """One family on one pipeline.

    Attributes:
        name: Of `families.json`.
        pp: Stages.
        routers: With the losses that balance experts.
        checkpointing: With gradient checkpointing.
        decodes: Compare logits and greedy tokens as well.
    """

    name: str
    pp: int = 2
    routers: bool = False
    checkpointing: bool = False
    decodes: bool = True

    @property
    def world_size(self) -> int:
        return self.pp

    @property
    def is_known(self) -> bool:
        """The installed transformers has the family, and can do this with it."""
        family = self.name.partition(".")[0]
        if family not in CONFIG_MAPPING:
            return False
        model = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
        return not self.checkpointing or model.supports_gradient_checkpointing

    def __str__(self) -> str:
        flags = ["routers"] * self.routers + ["ckpt"] * self.checkpointing
        return "-".join([self.name, f"pp{self.pp}", *flags])


def build(case: FamilyCase) -> Any:
    """The same weights in every process; none of them is at a special value."""
    logging.set_verbosity_error()
    config = AutoConfig.for_model(case.name.partition(".")[0], **CONFIGS[case.name])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.nan_to_num(parameter) + 0.02 * torch.randn(parameter.shape, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def make_batch(model: nn.Module, case: FamilyCase) -> dict[str, Any]:
    """Two rows, the second shorter than the first; labels ignored there and at its start."""
    input_ids = torch.randint(FIRST_TOKEN, LAST_TOKEN, (ROWS, SEQ), generator=torch.Generator().manual_seed(3))
    attention_mask = torch.ones_like(input_ids)
    attention_mask[1, SEQ - 3 :] = 0
    labels = input_ids.where(attention_mask.bool(), -100)
    labels[1, :3] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    if case.routers:
        batch["output_router_logits"] = True
    accepted = inspect.signature(type(model).forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {name: value for name, value in batch.items() if takes_all or name in accepted}


@dataclass
class Trained:
    """What one step leaves: tensors by name, those that this process holds."""

    loss: float
    norm: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def train(model: nn.Module, batch: dict[str, Any]) -> Trained:
    """One step of SGD."""
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    state = parallel_state(model)
    # Of a tied weight, a later stage has another name than the plain model.
    names = {name: spec.name for name, spec in state.specs.items()} if state else {}
    named = {names.get(name, name): p for name, p in model.named_parameters() if not name.startswith("hf_tpp_residual")}
    gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return Trained(
        float(loss.detach()), float(norm), gradients, {name: p.detach().clone() for name, p in named.items()}
    )


def decode(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Logits of a batch, and what the model says next; None for what it cannot do."""
    model.eval()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    with torch.no_grad():
        found: dict[str, torch.Tensor | None] = {"logits": model(**inputs).logits}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    try:
        found["tokens"] = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    except HfTppError:
        raise
    except Exception:  # a plain model that cannot generate with a tiny configuration
        if parallel_state(model) is not None:
            raise
        found["tokens"] = None
    return found


def compare(case: FamilyCase) -> tuple[list[str], set[str], str]:
    """Body of a rank: what differs here, which parameters are here, and what was refused."""
    single = build(case)
    batch = make_batch(single, case)
    expected = train(_as_pipelined(single, case), batch)
    said = decode(single, batch) if case.decodes else {}
    try:
        model = hf_tpp.parallelize(build(case), pp=case.pp, verbose=False)
        found = train(model, batch)
    except HfTppError as error:
        return [], set(), f"{type(error).__name__}: {error}"
    problems = _differences(found, expected)
    if case.decodes and said["tokens"] is not None:
        try:
            ours = decode(model, batch)
        except HfTppError as error:
            return problems, set(found.weights), f"generate: {type(error).__name__}: {error}"
        if not torch.allclose(ours["logits"], said["logits"], rtol=1e-4, atol=1e-4 * float(said["logits"].abs().max())):
            problems.append("logits")
        if not torch.equal(ours["tokens"], said["tokens"]):
            problems.append(f"tokens {ours['tokens'].tolist()}, plain {said['tokens'].tolist()}")
    return problems, set(found.weights), ""


def compare_all(cases: list[FamilyCase]) -> list[tuple[list[str], set[str], str]]:
    """Body of a rank: one case after the other."""
    results = []
    for case in cases:
        try:
            results.append(compare(case))
        except Exception as error:
            error.add_note(f"in case {case}")
            raise
    return results


def parameter_names(case: FamilyCase) -> set[str]:
    """Names of all parameters of the plain model."""
    return {name for name, _ in build(case).named_parameters()}


class _RowByRow:
    """A plain model that takes the rows one by one, as microbatches do: losses of experts are means over each."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **batch: Any) -> Any:
        tokens = (batch["labels"][:, 1:] != -100).sum()
        total: Any = 0.0
        for row in range(ROWS):
            part = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            part["num_items_in_batch"] = tokens
            whole = self.model(**part)
            added = getattr(whole, "aux_loss", None)
            total = total + whole.loss
            if isinstance(added, torch.Tensor):
                with torch.no_grad():
                    bare = self.model(**{**part, "output_router_logits": False}).loss
                # One backward pass, as in the pipeline: delta rules lose digits in the difference of two.
                weight = ((whole.loss - bare) / added).detach()
                total = total - weight * added * (1 - 1 / ROWS)
        whole.loss = total
        return whole


def _as_pipelined(model: Any, case: FamilyCase) -> Any:
    return _RowByRow(model) if case.routers else model


def _differences(ours: Trained, theirs: Trained) -> list[str]:
    problems = []
    if not abs(ours.loss - theirs.loss) <= LOSS_TOLERANCE * abs(theirs.loss):
        problems.append(f"loss {ours.loss}, plain {theirs.loss}")
    if not abs(ours.norm - theirs.norm) <= TOLERANCE * abs(theirs.norm):
        problems.append(f"norm {ours.norm}, plain {theirs.norm}")
    for what in ("gradients", "weights"):
        expected: dict[str, torch.Tensor] = getattr(theirs, what)
        floor = NOISE_FLOOR * float(sum(t.norm() ** 2 for t in expected.values()) ** 0.5)
        found: dict[str, torch.Tensor] = getattr(ours, what)
        for name in ours.weights:
            a, b = found.get(name), expected.get(name)
            if a is None and b is None:
                continue
            a = torch.zeros_like(ours.weights[name]) if a is None else a
            b = torch.zeros_like(a) if b is None else b
            error = float((a - b).norm()) / max(float(b.norm()), floor)
            if not error <= TOLERANCE:
                problems.append(f"{what} of {name} by {error:.1e}")
    return problems
