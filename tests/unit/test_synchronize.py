"""Gradients that stages share are summed in one order everywhere."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from hf_tpp.gradients.synchronize import sum_shared_gradients
from hf_tpp.sharding import ShardSpec


def spec(name: str, stages: tuple[int, ...]) -> ShardSpec:
    return ShardSpec(name, (2,), None, None, 0, 1, stages=stages)


@pytest.mark.parametrize(
    "names",
    [
        ["embedding", "body", "bias"],  # the first stage
        ["bias", "body", "embedding"],  # the last one, where the embedding is the head and comes behind
    ],
)
def test_stages_that_meet_a_tied_weight_at_different_times(monkeypatch, names):
    order = []

    def add(tensor: torch.Tensor, group: str) -> None:
        order.append(group)
        tensor += 1

    monkeypatch.setattr(dist, "all_reduce", add)
    mesh = SimpleNamespace(tp=SimpleNamespace(size=1), stage_group=lambda stages: f"group {stages}")
    stages = {"embedding": (0, 1), "body": (0,), "bias": (0, 1, 2)}
    gradients = {"embedding": torch.full((2,), 5.0), "body": torch.zeros(2), "bias": None}
    result = sum_shared_gradients(
        [gradients[name] for name in names],
        [torch.zeros(2) for _ in names],
        [spec(name, stages[name]) for name in names],
        mesh,
    )
    assert order == ["group (0, 1, 2)", "group (0, 1)"]
    found = dict(zip(names, result, strict=True))
    assert found["embedding"].tolist() == [6, 6]
    assert found["bias"].tolist() == [1, 1]
    assert found["body"] is gradients["body"]
    assert gradients["embedding"].tolist() == [5, 5]
