import json
import os
import resource
import stat
from collections import namedtuple
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

from hf_tpp.checkpoint.huggingface import save_checkpoint
from hf_tpp.errors import CheckpointError, ConfigurationError
from hf_tpp.mesh import Axis, ParallelMesh
from hf_tpp.plan.layout import Block, Layout, padded_vocabulary
from hf_tpp.sharding import ShardSpec, shard
from tests.ranks import RankError, run_ranks

CPU = torch.device("cpu")
VOCABULARY, NUM_LAYERS = 7, 4


def full_tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = {"embedding.weight": (VOCABULARY, 6), "norm.weight": (6,)}
    for layer in range(NUM_LAYERS):
        shapes |= {f"layers.{layer}.qkv": (20, 6), f"layers.{layer}.up": (5, 6), f"layers.{layer}.down": (6, 5)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.bfloat16() if "layers" in name else tensor for name, tensor in tensors.items()}


def cut(name, tp_size):
    if name == "embedding.weight":
        return 0, padded_vocabulary(VOCABULARY, tp_size)
    if name.endswith("qkv"):  # 4 query heads, one key and one value head that every rank holds
        return 0, Layout((Block(4, 3), Block(1, 4), Block(1, 4)))
    if name.endswith(("up", "down")):  # 5 neurons on 2 ranks: 3 and 2
        return (0 if name.endswith("up") else 1), Layout((Block(5),))
    return None, None


class Part(nn.Module):
    """One rank's parameters under any dotted name, with what save_pretrained asks of a transformers model."""

    def __init__(self, tensors, config=None):
        super().__init__()
        self.config = config or GPT2Config()
        for name, tensor in tensors.items():
            module = self
            *path, last = name.split(".")
            for step in path:
                if not hasattr(module, step):
                    module.add_module(step, nn.Module())
                module = getattr(module, step)
            module.register_parameter(last, nn.Parameter(tensor))

    @property
    def dtype(self):
        return next(self.parameters()).dtype

    def can_generate(self):
        return False


def part_of(mesh):
    """This rank's part: two layers a stage, the embedding on the first one and, tied, on the last."""
    layers = range(mesh.pp.rank * NUM_LAYERS // mesh.pp.size, (mesh.pp.rank + 1) * NUM_LAYERS // mesh.pp.size)
    tensors, specs = {}, {}
    for name, tensor in full_tensors().items():
        is_layer = name.startswith("layers")
        is_tied = name == "embedding.weight" and mesh.pp.size > 1
        local_names = [name]
        if is_layer and int(name.split(".")[1]) not in layers:
            continue
        if name == "norm.weight" and not mesh.pp.is_last:
            continue
        if is_tied:
            local_names = [name] * mesh.pp.is_first + ["head.weight"] * mesh.pp.is_last
        dim, layout = cut(name, mesh.tp.size)
        for local_name in local_names:
            stages = (0, mesh.pp.size - 1) if is_tied else (mesh.pp.rank,)
            spec = ShardSpec(name, tuple(tensor.shape), dim, layout, mesh.tp.rank, mesh.tp.size, stages)
            specs[local_name] = spec

            def read(start, stop, tensor=tensor, dim=dim):
                return tensor if dim is None else tensor.narrow(dim, start, stop - start)

            tensors[local_name] = shard(read, spec, device=CPU, dtype=tensor.dtype)
    part = Part(tensors)
    part.register_buffer("scale", torch.tensor([2.0]))
    part.register_buffer("mask", torch.ones(3), persistent=False)
    return part, specs


def save(tp_size, pp_size, folder, options):
    mesh = ParallelMesh.create(tp_size, pp_size, CPU)
    model, specs = part_of(mesh)
    save_checkpoint(model, specs, mesh, folder, **options)


def saved_tensors(folder):
    tensors, places = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            for name in file.keys():  # noqa: SIM118 - no mapping
                assert name not in tensors
                tensors[name], places[name] = file.get_tensor(name), path.name
    return tensors, places


@pytest.mark.parametrize(
    ("world_size", "tp_size", "pp_size", "limit", "num_files"),
    [(2, 2, 1, "5GB", 1), (2, 1, 2, "5GB", 2), (4, 2, 2, 500, 4), (4, 2, 1, "1KB", 2)],
)
def test_a_saved_folder_holds_the_full_tensors(tmp_path, world_size, tp_size, pp_size, limit, num_files):
    folder = tmp_path / "deep" / "folder"
    run_ranks(save, world_size, tp_size, pp_size, folder, {"max_shard_size": limit})
    tensors, places = saved_tensors(folder)
    expected = full_tensors() | {"scale": torch.tensor([2.0])}
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor), name
    names = {f"model-{i:05d}-of-{num_files:05d}.safetensors" for i in range(1, num_files + 1)}
    json_names = {"config.json"}
    if num_files == 1:
        names = {"model.safetensors"}
    else:
        json_names.add("model.safetensors.index.json")
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == places
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert {path.name for path in folder.iterdir()} == names | json_names
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["Part"], "float32")


def save_twice(folder):
    mesh = ParallelMesh.create(2, 1, CPU)
    model, specs = part_of(mesh)
    save_checkpoint(model, specs, mesh, folder, max_shard_size=500)
    before = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    save_checkpoint(model, specs, mesh, folder)
    return before


def test_an_earlier_save_is_replaced_and_other_files_are_kept(tmp_path):
    (tmp_path / "model_notes.safetensors").touch()
    before, _ = run_ranks(save_twice, 2, tmp_path)
    assert "model.safetensors.index.json" in before
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json",
        "model.safetensors",
        "model_notes.safetensors",
    ]


def save_without_room(folder):
    mesh = ParallelMesh.create(1, 4, CPU)
    model, specs = part_of(mesh)
    big = torch.zeros(200, 200)
    model.register_parameter("big", nn.Parameter(big + mesh.pp.rank))
    specs["big"] = ShardSpec(f"big{mesh.pp.rank}", (200, 200), None, None, 0, 1, (mesh.pp.rank,))
    if mesh.pp.is_last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))  # writing beyond it fails like a full disk
    save_checkpoint(model, specs, mesh, folder)


def test_a_rank_that_cannot_write_makes_all_raise_and_leaves_the_folder_alone(tmp_path):
    (tmp_path / "config.json").write_text("earlier")
    with pytest.raises(RankError) as caught:
        run_ranks(save_without_room, 4, tmp_path)
    assert caught.value.types == dict.fromkeys(range(4), "CheckpointError")
    assert "could not be saved" in caught.value.messages[3]
    assert caught.value.messages[0].startswith("rank 3: ")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "earlier"


def save_with_a_failing_gatherer(folder):
    with mock.patch(
        "hf_tpp.checkpoint.huggingface.saving.write_weights", side_effect=[None, OSError("broken disk"), None]
    ):
        save(2, 1, folder, {"max_shard_size": 300})


def test_tp_ranks_do_not_wait_for_one_that_failed(tmp_path):
    with pytest.raises(RankError) as caught:
        run_ranks(save_with_a_failing_gatherer, 2, tmp_path, timeout=20)
    assert caught.value.types == dict.fromkeys(range(2), "CheckpointError")
    assert "OSError: broken disk" in caught.value.messages[1]
    assert list(tmp_path.iterdir()) == []


def save_with_one_odd_rank(folder):
    options = {"push_to_hub": True} if dist.get_rank() == 1 else {}
    save(2, 1, folder, options)


def test_an_option_refused_on_one_rank_is_refused_on_all(tmp_path):
    with pytest.raises(RankError) as caught:
        run_ranks(save_with_one_odd_rank, 2, tmp_path / "new", timeout=20)
    assert caught.value.types == dict.fromkeys(range(2), "ConfigurationError")
    assert not (tmp_path / "new").exists()


# --- one process


def alone():
    axis = Axis(0, 1, None, (0,))
    return ParallelMesh(CPU, axis, axis, axis, axis)


def plain_specs(model):
    return {name: ShardSpec(name, tuple(p.shape), None, None, 0, 1) for name, p in model.named_parameters()}


@contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_transformers_loads_what_is_saved_and_would_name_it_the_same(tmp_path, family):
    sizes = {"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 11}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, intermediate_size=16)).bfloat16()
    options = {"is_main_process": False, "save_function": torch.save, "push_to_hub": False}
    save_checkpoint(model, plain_specs(model), alone(), tmp_path / "ours", **options)
    model.save_pretrained(tmp_path / "theirs")
    assert saved_tensors(tmp_path / "ours")[0].keys() == saved_tensors(tmp_path / "theirs")[0].keys()
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "ours" / name).read_text() == (tmp_path / "theirs" / name).read_text()
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert loaded.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, loaded.get_parameter(name)), name


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    model = Part({"a": torch.ones(3), "b": torch.ones(3)})
    with umask(0o027):
        save_checkpoint(model, plain_specs(model), alone(), tmp_path, max_shard_size=12)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 4
    assert set(modes.values()) == {0o640}


def test_views_of_one_storage_are_saved_whole(tmp_path):
    flat = torch.arange(6.0)
    model = Part({"a": flat[:3], "b": flat[3:]})
    save_checkpoint(model, plain_specs(model), alone(), tmp_path)
    assert torch.equal(saved_tensors(tmp_path)[0]["b"], flat[3:])


@pytest.mark.parametrize("name", ["variant", "state_dict", "token", "nonsense"])
def test_unsupported_options_are_refused_by_name(tmp_path, name):
    model = Part({"a": torch.ones(3)})
    with pytest.raises(ConfigurationError, match=name):
        save_checkpoint(model, plain_specs(model), alone(), tmp_path, **{name: "x"})


@pytest.mark.parametrize("size", ["big", "-1GB", 0, "", True, 1.5e-3])
def test_sizes_that_are_none_are_refused(tmp_path, size):
    model = Part({"a": torch.ones(3)})
    with pytest.raises(ConfigurationError, match="max_shard_size"):
        save_checkpoint(model, plain_specs(model), alone(), tmp_path, max_shard_size=size)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(100, 95, 5))
    model = Part({"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match="needs 12 bytes for the checkpoint, 5 are free"):
        save_checkpoint(model, plain_specs(model), alone(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    model = Part({"a": torch.ones(3)})
    with pytest.raises(CheckpointError, match="is a file"):
        save_checkpoint(model, plain_specs(model), alone(), tmp_path / "file")
