"""The real library agrees: megatron-core and transformers compute the same logits from either side's files."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_tpp_conversion.configs.megatron import architecture_to_args
from hf_tpp_conversion.configs.megatron_partition import partition_to_args
from hf_tpp_conversion.convert import Conversion, convert
from hf_tpp_conversion.families import family_of_config
from hf_tpp_conversion.model.partition import Partition, padded_vocabulary
from tests.conversion.configs import ALL, CONFIGS, OTHERS

pytestmark = [
    pytest.mark.megatron,
    pytest.mark.skipif(
        importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None,
        reason="megatron-core is not installed: pip install -e '.[megatron]'",
    ),
]

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-4
LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Small models with norms and biases that are not at their neutral values."""
    root = tmp_path_factory.mktemp("hf")
    for name, config in ALL.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
    return root


def settings(name, partition):
    """What megatron-core needs to know, from our own args: so that these are tested too."""
    _, model = family_of_config(json.loads(ALL[name].to_json_string()), name)
    args = architecture_to_args(model) | partition_to_args(model, partition)
    config = {
        key: args[key]
        for key in ("num_layers", "hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size",
                    "normalization", "layernorm_epsilon", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
                    "window_size")
    }  # fmt: skip
    config["num_query_groups"] = (
        args["num_query_groups"] if args["group_query_attention"] else model.num_attention_heads
    )
    config |= {"gated_linear_unit": args["swiglu"], "bias_activation_fusion": args["bias_gelu_fusion"]}
    config["activation"] = "silu" if args["swiglu"] else "gelu"
    if model.experts:
        config |= {key: value for key, value in args.items() if key.startswith("moe_")}
        config["num_moe_experts"] = args["num_experts"]
    model_arguments = {
        "vocab_size": padded_vocabulary(model.vocab_size, partition),
        "max_sequence_length": args["seq_length"],
        "share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"],
        "position_embedding_type": args["position_embedding_type"],
        "rotary_base": args["rotary_base"],
        "rotary_percent": args["rotary_percent"],
        "rope_scaling": args["use_rope_scaling"],
        "rope_scaling_factor": args["rope_scaling_factor"],
        "seq_len_interpolation_factor": args["rotary_seq_len_interpolation_factor"],
    }
    return {"config": config, "model": model_arguments, "vocab": model.vocab_size, "args": args}


def run_oracle(tp, pp, jobs, folder):
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    arguments = [str(tp), str(pp), str(folder / "store"), str(folder / "jobs.json")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.conversion.oracle", str(rank), *arguments],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(tp * pp)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    failed = [output[-3000:] for rank, output in zip(ranks, outputs, strict=True) if rank.returncode]
    assert not failed, "\n".join(failed)


@torch.no_grad()
def hf_logits(folder, vocab):
    torch.manual_seed(3)
    tokens = torch.randint(vocab, (2, 12))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return model(tokens).logits


def largest_differences(models, tmp_path, names, partition):
    """By name, format and direction: of the logits of megatron-core and transformers."""
    jobs = []
    for name in names:
        for kind in ("legacy", "torch_dist"):
            ours, theirs = tmp_path / f"{name}-{kind}-ours", tmp_path / f"{name}-{kind}-theirs"
            convert(Conversion(models / name, ours, "megatron", kind, "local", partition))
            base = settings(name, partition) | {"format": kind}
            jobs.append(base | {"action": "load", "path": str(ours), "logits": f"{ours}.pt"})
            jobs.append(base | {"action": "save", "path": str(theirs), "logits": f"{theirs}.pt"})
    run_oracle(partition.tp, partition.pp, jobs, tmp_path)
    differences = {}
    for job in jobs:
        path = Path(job["path"])
        hf = models / path.name.split("-")[0]
        if job["action"] == "save":
            hf = path.with_name(f"{path.name}-hf")
            convert(Conversion(path, hf, "hf", family=ALL[path.name.split("-")[0]].model_type))
        megatron = torch.load(job["logits"], weights_only=True)
        difference = (hf_logits(hf, job["vocab"]) - megatron).abs().max().item()
        differences[path.name] = difference
    print(partition, {name: f"{value:.1e}" for name, value in differences.items()})
    assert len(differences) == 4 * len(names)
    return differences


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_megatron_core_agrees_in_both_directions(models, tmp_path, tp, pp):
    differences = largest_differences(models, tmp_path, CONFIGS, Partition(tp=tp, pp=pp))
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), pytest.param(2, 2, marks=pytest.mark.slow)])
def test_megatron_core_agrees_on_the_other_families(models, tmp_path, tp, pp):
    differences = largest_differences(models, tmp_path, OTHERS, Partition(tp=tp, pp=pp))
    assert {name: value for name, value in differences.items() if not value < TOLERANCE} == {}
