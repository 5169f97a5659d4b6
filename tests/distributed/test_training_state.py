"""Training state saved at one (tp, pp, dp) and resumed at others, with specs made by hand."""

import os
import random
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from hf_tpp.checkpoint.training import latest_checkpoint, load_training_state, save_training_state
from hf_tpp.checkpoint.training import state as training
from hf_tpp.errors import CheckpointError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.plan.layout import Block, Layout, padded_vocabulary
from hf_tpp.sharding import ShardSpec, shard
from tests.ranks import RankError, run_ranks

CPU = torch.device("cpu")
# Query heads of 2 channels beside one key and one value head, which are copied at tp=2.
QKV = Layout((Block(4, 2), Block(1, 2), Block(1, 2)))
# Name -> shape, dimension that is cut, how it is cut, stages (of 2).
PARAMETERS: dict[str, tuple[tuple[int, ...], int | None, Callable[[int], Layout] | None, tuple[int, ...]]] = {
    "embed.weight": ((7, 4), 0, lambda tp: padded_vocabulary(7, tp), (0, 1)),
    "layers.0.qkv.weight": ((12, 4), 0, lambda tp: QKV, (0,)),
    "layers.0.norm.weight": ((4,), None, None, (0,)),
    "layers.1.down.weight": ((4, 6), 1, lambda tp: Layout((Block(6),)), (1,)),
    "layers.1.scale": ((), None, None, (1,)),
}
NEVER_TRAINED = "layers.0.norm.weight"


def full_values(salt: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(salt)
    return {name: torch.randn(shape, generator=generator) for name, (shape, *_) in PARAMETERS.items()}


def cut(full: torch.Tensor, spec: ShardSpec) -> torch.Tensor:
    def read(start: int, stop: int) -> torch.Tensor:
        return full if spec.dim is None else full.narrow(spec.dim, start, stop - start)

    return shard(read, spec, device=CPU, dtype=full.dtype)


class Job:
    """A model, its optimizer and specs on one rank."""

    def __init__(self, tp: int, pp: int, salt: int, mesh: ParallelMesh | None = None, lr: float = 1e-2) -> None:
        self.mesh = mesh or ParallelMesh.create(tp, pp, CPU)
        self.model = nn.Module()
        self.specs: dict[str, ShardSpec] = {}
        for name, full in full_values(salt).items():
            shape, dim, layout, stages = PARAMETERS[name]
            if pp == 1 or self.mesh.pp.rank in stages:
                local = name.replace(".", "_")
                spec = ShardSpec(
                    name, shape, dim, layout and layout(tp), self.mesh.tp.rank, tp, stages if pp > 1 else (0,)
                )
                self.model.register_parameter(local, nn.Parameter(cut(full, spec)))
                self.specs[local] = spec
        self.model.hf_tpp_residual = nn.Linear(1, 1)
        own, norms = [], []
        for name, parameter in self.model.named_parameters():
            (norms if parameter.dim() < 2 else own).append(parameter)
            if name.startswith("hf_tpp"):
                parameter.requires_grad_(False)
        groups = [{"params": own}, {"params": norms, "weight_decay": 0.0, "lr": lr / 2}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.1)

    def step(self, salt: int) -> None:
        gradients = full_values(100 + salt)
        for name, spec in self.specs.items():
            parameter = self.model.get_parameter(name)
            parameter.grad = None if spec.name == NEVER_TRAINED else cut(gradients[spec.name], spec)
        self.optimizer.step()

    def save(self, directory: Path, extra: dict | None = None) -> None:
        save_training_state(directory, self.model, self.optimizer, specs=self.specs, mesh=self.mesh, extra=extra)

    def load(self, directory: Path | None) -> dict:
        assert directory is not None
        return load_training_state(directory, self.model, self.optimizer, specs=self.specs, mesh=self.mesh)

    def check(self, expected: "Job") -> None:
        """Every local value is the slice of the expected full one, bit by bit."""
        for name, spec in self.specs.items():
            parameter, full = self.model.get_parameter(name), expected.model.get_parameter(name)
            assert torch.equal(parameter, cut(full.detach(), spec)), name
            state, full_state = self.optimizer.state[parameter], expected.optimizer.state[full]
            assert state.keys() == full_state.keys(), name
            for key, value in full_state.items():
                assert torch.equal(state[key], value if key == "step" else cut(value, spec)), (name, key)
        for group, full_group in zip(self.optimizer.param_groups, expected.optimizer.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in full_group.items() if k != "params"
            }


ALONE = ParallelMesh.create(1, 1, CPU)


def trained(steps: int) -> Job:
    job = Job(1, 1, salt=0, mesh=ALONE)
    for step in range(steps):
        job.step(step)
    return job


def save_body(tp: int, pp: int, directory: Path, steps: int = 2) -> None:
    job = Job(tp, pp, salt=0)
    for step in range(steps):
        job.step(step)
    job.save(directory, {"step": steps, "nested": {"betas": (0.9, 0.95)}})


def load_body(tp: int, pp: int, directory: Path) -> None:
    job = Job(tp, pp, salt=9, lr=0.5)
    assert job.load(directory) == {"step": 2, "nested": {"betas": (0.9, 0.95)}}
    job.check(trained(2))
    job.step(2)  # and it goes on as if nothing had happened
    job.check(trained(3))
    assert job.model.hf_tpp_residual.weight not in job.optimizer.state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("run") / "step-00000002"
    run_ranks(save_body, 2, 2, 1, directory)
    return directory


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 2, 1), (2, 1, 2), (2, 2, 1)])
def test_resumes_at_any_layout(saved: Path, tp: int, pp: int, dp: int) -> None:
    run_ranks(load_body, tp * pp * dp, tp, pp, saved)


def test_resumes_alone(saved: Path) -> None:
    load_body(1, 1, saved)


@pytest.mark.parametrize(("tp", "pp", "dp"), [(1, 1, 1), (2, 2, 1), (1, 2, 2)])
def test_saves_from_any_layout(tmp_path: Path, tp: int, pp: int, dp: int) -> None:
    run_ranks(save_body, tp * pp * dp, tp, pp, tmp_path / "step-2")
    load_body(1, 1, tmp_path / "step-2")
    assert latest_checkpoint(tmp_path) == tmp_path / "step-2"


def test_is_a_checkpoint_of_full_tensors(saved: Path) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(saved).read_metadata().state_dict_metadata
    expected = trained(2)
    for name, spec in expected.specs.items():
        parameter = expected.model.get_parameter(name)
        assert entries[f"model.{spec.name}"].size == parameter.shape
        stored = sum(chunk.sizes.numel() for chunk in entries[f"model.{spec.name}"].chunks)
        assert stored == parameter.numel(), "each value once, no padding"
        has_state = spec.name != NEVER_TRAINED
        assert (f"optimizer.state.{spec.name}.exp_avg" in entries) == has_state


def killed_body(directory: Path) -> None:
    job = Job(2, 1, salt=0)
    for step in range(3):
        job.step(step)
    if job.mesh.tp.rank == 1:
        mock.patch.object(FileSystemWriter, "write_data", mock.Mock(side_effect=lambda *_: os._exit(1))).start()
    job.save(directory)


def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    run_ranks(save_body, 2, 2, 1, tmp_path / "step-2")
    with pytest.raises(RankError):
        run_ranks(killed_body, 2, tmp_path / "step-3")
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-3.tmp-new", "latest"}
    assert latest_checkpoint(tmp_path) == tmp_path / "step-2"
    load_body(1, 1, tmp_path / "step-2")
    trained(3).save(tmp_path / "step-3")
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-3", "latest"}


def test_replaces_a_checkpoint_of_the_same_name(tmp_path: Path) -> None:
    trained(1).save(tmp_path / "step")
    trained(2).save(tmp_path / "step")
    job = Job(1, 1, salt=9, mesh=ALONE)
    job.load(latest_checkpoint(tmp_path))
    job.check(trained(2))
    assert {path.name for path in tmp_path.iterdir()} == {"step", "latest"}


def test_a_kill_while_replacing_loses_nothing(tmp_path: Path) -> None:
    trained(2).save(tmp_path / "step")
    (tmp_path / "step").rename(tmp_path / "step.tmp-old")
    assert latest_checkpoint(tmp_path) == tmp_path / "step.tmp-old"
    trained(1).save(tmp_path / "other")
    assert (tmp_path / "step" / ".metadata").is_file()


def test_latest(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    trained(1).save(tmp_path / "step-1")
    (tmp_path / "latest").write_text("step-7\n")
    with pytest.raises(CheckpointError, match="names 'step-7', which is not there or incomplete: pass one of step-1"):
        latest_checkpoint(tmp_path)


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def random_body(tp: int, pp: int, directory: Path, save: bool) -> tuple[float, float, float]:
    job = Job(tp, pp, salt=0)
    if save:
        for generator in (random.seed, np.random.seed, torch.manual_seed):
            generator(100 + job.mesh.global_rank)
        draw()
        job.save(directory)
    else:
        job.load(directory)
    return draw()


def test_random_generators_continue(tmp_path: Path) -> None:
    saved = run_ranks(random_body, 4, 2, 1, tmp_path / "step", save=True)
    assert run_ranks(random_body, 4, 2, 1, tmp_path / "step", save=False) == saved
    # Another layout: the generators of each replica's first rank.
    assert run_ranks(random_body, 4, 1, 2, tmp_path / "step", save=False) == [saved[0], saved[0], saved[2], saved[2]]
    more = run_ranks(random_body, 3, 1, 1, tmp_path / "step", save=False)
    assert more[:2] == [saved[0], saved[2]]
    assert not set(more[2]) & {value for rank in saved for value in rank}


def test_refuses_a_parameter_in_another_group(saved: Path) -> None:
    job = Job(1, 1, salt=0, mesh=ALONE)
    before = [p.detach().clone() for p in job.model.parameters()]
    norms = job.optimizer.param_groups[1]["params"]
    job.optimizer.param_groups[0]["params"].append(norms.pop(0))
    with pytest.raises(CheckpointError, match=r"1 in another group \(layers.0.norm.weight\)"):
        job.load(saved)
    assert all(torch.equal(*pair) for pair in zip(before, job.model.parameters(), strict=True))


def test_refuses_another_optimizer(saved: Path) -> None:
    job = Job(1, 1, salt=0, mesh=ALONE)
    job.optimizer = torch.optim.SGD(job.model.parameters(), lr=0.1)
    with pytest.raises(CheckpointError, match="saved with AdamW, the optimizer is SGD"):
        job.load(saved)


def test_refuses_another_type(saved: Path) -> None:
    job = Job(1, 1, salt=0, mesh=ALONE)
    job.model.to(torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"is torch.float32 in the checkpoint and torch.bfloat16 in the model"):
        job.load(saved)


def test_refuses_another_shape(saved: Path) -> None:
    job = Job(1, 1, salt=0, mesh=ALONE)
    job.model.layers_1_down_weight = nn.Parameter(torch.zeros(4, 8))
    job.specs["layers_1_down_weight"] = ShardSpec("layers.1.down.weight", (4, 8), None, None, 0, 1)
    job.optimizer.param_groups[0]["params"][2] = job.model.layers_1_down_weight
    with pytest.raises(CheckpointError, match=r"has shape \[4, 6\] in the checkpoint and \[4, 8\] in the model"):
        job.load(saved)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        Job(1, 1, salt=0, mesh=ALONE).load(tmp_path)


def test_refuses_objects_in_extra(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="extra cannot be saved"):
        trained(1).save(tmp_path / "step", {"scheduler": object()})
    assert not (tmp_path / "latest").exists()


def one_rank_fails_body(directory: Path) -> None:
    job = Job(2, 1, salt=0)
    if job.mesh.tp.rank == 1:
        failing = mock.Mock(side_effect=OSError("disk full"))
        mock.patch.object(FileSystemWriter, "write_data", failing).start()
    with pytest.raises(CheckpointError, match="disk full"):
        job.save(directory)
    if job.mesh.tp.rank == 0:
        mock.patch.object(training, "read_groups", mock.Mock(side_effect=RuntimeError("broken"))).start()
    with pytest.raises(CheckpointError, match="RuntimeError: broken"):
        job.save(directory)


def test_an_error_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_ranks(one_rank_fails_body, 2, tmp_path / "step")
    assert not (tmp_path / "step").exists()


def test_refuses_state_that_cannot_be_put_together(tmp_path: Path) -> None:
    mesh = ALONE
    job = Job(2, 1, salt=0, mesh=mesh)
    job.optimizer.state[job.model.layers_0_qkv_weight]["row"] = torch.zeros(8)
    with pytest.raises(CheckpointError, match=r"has shape \[8\], neither a number nor the parameter's"):
        job.save(tmp_path / "step")
