"""Models that nobody knows, trained in parallel by what the probe found: the same as in one process."""

import pytest
import torch

import hf_tpp
from hf_tpp.parallel_model import parallel_state
from hf_tpp.sharding import shard_tensor
from tests.parity.models import make_batch
from tests.probe.models import EXTRAS, ODD
from tests.ranks import run_ranks

STEPS, LEARNING_RATE = 2, 0.3
MODELS = {**ODD, "extras": EXTRAS}


def step(model, index):
    """Loss and gradients of a step of SGD."""
    loss = model(**make_batch(4, 12, seed=index)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= LEARNING_RATE * parameter.grad
                parameter.grad = None
    return float(loss), norm, gradients


def train(names, tp, pp, folder):
    """Body of a rank: for each model what differs from the same steps in one process, and the report."""
    found = {}
    for name in names:
        plain, model = MODELS[name].build(), MODELS[name].build()
        model = hf_tpp.parallelize(model, tp=tp, pp=pp, verbose=False).train()
        state = parallel_state(model)
        differing = []
        for index in range(STEPS):
            (loss, norm, gradients), (expected, whole, theirs) = step(model, index), step(plain, index)
            differing += ["loss"] * (abs(loss - expected) > 1e-5) + ["norm"] * (abs(norm - whole) > 1e-4 * whole)
            for key, spec in state.specs.items():
                own = shard_tensor(theirs[spec.name], spec, torch.device("cpu"), torch.float32)
                if (gradients[key] - own).norm() > 1e-4 * theirs[spec.name].norm():
                    differing.append(key)
        model.eval()
        plain.eval()
        prompt = make_batch(2, 5)["input_ids"]
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        if not torch.equal(model.generate(prompt, **options), plain.generate(prompt, **options)):
            differing.append("what it generates")
        model.save_pretrained(folder / name)
        if state.mesh.global_rank == 0:
            plain.save_pretrained(folder / f"{name}-plain")
        found[name] = differing, state.report
    return found


def assert_saved_alike(folder, name):
    ours = MODELS[name].kind.from_pretrained(folder / name).state_dict()
    plain = MODELS[name].kind.from_pretrained(folder / f"{name}-plain").state_dict()
    assert ours.keys() == plain.keys()
    for key, value in plain.items():
        assert (ours[key] - value).norm() <= 1e-5 * value.norm(), key


@pytest.mark.parametrize(
    ("names", "tp", "pp"),
    [(["gpt2", "llama_gqa", "llama_one_kv", "gpt_neox", "extras"], 2, 1), (["llama_gqa"], 4, 1), (["gpt2"], 2, 2)],
    ids=["tp2", "tp4", "tp2 x pp2"],
)
def test_training(tmp_path, names, tp, pp):
    for found in run_ranks(train, tp * pp, names, tp, pp, tmp_path, timeout=200.0):
        for _, report in found.values():
            assert "Found by probe: " in report
            assert "Whole on each rank" not in report
        assert {name: differing for name, (differing, _) in found.items()} == {name: [] for name in names}
    for name in names:
        assert_saved_alike(tmp_path, name)
