"""Checkpoints of other Megatrons: names from before Megatron-Core, old QKV orders, grouped experts, uneven stages."""

from argparse import Namespace

import numpy as np
import pytest
import torch

from hf_tpp_conversion import Conversion, Partition, convert, inspect, verify
from hf_tpp_conversion.files.manifest import MANIFEST_NAME
from hf_tpp_conversion.layouts import qkv_from_version, qkv_to_version
from tests.conversion.models import architecture, bits, write_hf

OLD = {
    "decoder.": "language_model.encoder.",
    "embedding.": "language_model.embedding.",
    "linear_qkv": "query_key_value",
    "linear_proj": "dense",
    "linear_fc1": "dense_h_to_4h",
    "linear_fc2": "dense_4h_to_h",
    "pre_mlp_layernorm": "post_attention_layernorm",
}


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
def test_old_names_and_qkv_orders(tmp_path, version):
    source = write_hf(tmp_path / "hf", "gpt2", architecture("gpt2"))
    convert(Conversion(source, tmp_path / "m", "megatron", "legacy", "local", Partition(tp=2)))
    (tmp_path / "m" / MANIFEST_NAME).unlink()  # others write none
    for path in tmp_path.glob("m/release/*/*.pt"):
        content = torch.load(path, weights_only=False)
        state = {}
        for name, tensor in content["model"].items():
            if tensor is not None and ".linear_qkv." in name:
                tensor = torch.from_numpy(qkv_to_version(tensor.numpy(), version, 8))
            for new, old in OLD.items():
                name = name.replace(new, old)
            state[name] = tensor
        content["model"] = state
        content["checkpoint_version"] = version
        if not version:
            del content["checkpoint_version"]  # that means 0
        torch.save(content, path)
    convert(Conversion(tmp_path / "m", tmp_path / "back", "hf"))
    assert bits(tmp_path / "back") == bits(source)


def test_qkv_orders_by_hand():
    """2 heads of 2 channels: the rows are numbered as today's [heads, 3, channels] has them."""
    today = np.arange(12, dtype=np.uint32).reshape(12, 1)
    assert qkv_to_version(today, 0, 2).ravel().tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]
    assert qkv_to_version(today, 1, 2).ravel().tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    for version in (0, 1, 2, 3):
        assert np.array_equal(qkv_from_version(qkv_to_version(today, version, 2), version, 2), today)


def test_experts_in_two_matrices(tmp_path):
    """Grouped-GEMM experts of older Megatrons: weight1 and weight2, transposed, all experts of a rank in one."""
    source = write_hf(tmp_path / "hf", "mixtral", architecture("mixtral"))
    convert(Conversion(source, tmp_path / "m", "megatron", "legacy", "local", Partition(tp=2, ep=2)))
    (tmp_path / "m" / MANIFEST_NAME).unlink()  # others write none
    for path in tmp_path.glob("m/release/*/*.pt"):
        content = torch.load(path, weights_only=False)
        state = content["model"]
        for layer in range(4):
            prefix = f"decoder.layers.{layer}.mlp.experts."
            for number in (1, 2):
                names = [f"{prefix}local_experts.{expert}.linear_fc{number}.weight" for expert in range(2)]
                stacked = torch.stack([state.pop(name).view(torch.int32).T.contiguous() for name in names])
                hidden = architecture("mixtral").hidden_size
                shape = (hidden, -1) if number == 1 else (-1, hidden)
                state[f"{prefix}weight{number}"] = stacked.reshape(shape).view(torch.float32)
        torch.save(content, path)
    convert(Conversion(tmp_path / "m", tmp_path / "back", "hf"))
    assert bits(tmp_path / "back") == bits(source)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_the_chunks(tmp_path):
    """Plain torch.distributed.checkpoint loads what was written."""
    import torch.distributed.checkpoint as dcp

    source = write_hf(tmp_path / "hf", "llama", architecture("llama"))
    convert(Conversion(source, tmp_path / "m", "megatron", partition=Partition(tp=2)))
    state = {
        "decoder.layers.mlp.linear_fc2.weight": torch.zeros(4, 32, 64),
        "decoder.final_layernorm.weight": torch.zeros(32),
    }
    dcp.load(state, checkpoint_id=tmp_path / "m" / "release", no_dist=True)
    expected = bits(source)
    down = [expected[f"model.layers.{layer}.mlp.down_proj.weight"][2] for layer in range(4)]
    assert state["decoder.layers.mlp.linear_fc2.weight"].view(torch.uint8).numpy().tobytes() == b"".join(down)


@pytest.mark.parametrize(
    ("args", "stages"),
    [
        ({"decoder_first_pipeline_num_layers": 1, "decoder_last_pipeline_num_layers": 3}, (1, 3)),
        ({"pipeline_model_parallel_layout": "Et|(t|)*1ttL"}, None),
        ({"pipeline_model_parallel_layout": "Et|tttL"}, (1, 3)),
    ],
)
def test_uneven_stages_by_every_flag(tmp_path, args, stages):
    source = write_hf(tmp_path / "hf", "llama", architecture("llama"))
    counts = stages or (1, 1, 2)
    pp = len(counts)
    convert(Conversion(source, tmp_path / "m", "megatron", "legacy", partition=Partition(pp=pp, stages=counts)))
    (tmp_path / "m" / MANIFEST_NAME).unlink()  # others write none
    for path in tmp_path.glob("m/release/*/*.pt"):
        content = torch.load(path, weights_only=False)
        values = vars(content["args"]) | {"pipeline_model_parallel_layout": None} | args
        content["args"] = Namespace(**values)
        torch.save(content, path)
    assert verify(tmp_path / "m", source)["same"]
    assert tuple(inspect(tmp_path / "m")["layout"]["stages"]) == counts
