"""Checkpoints through the public API: plain transformers -> parallel -> plain transformers, and the memory it takes."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_tpp
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks

FAMILIES = ["gpt2", "gpt_neox", "llama_one_kv", "llama_tied", "mistral", "qwen2"]
MIB = 2**20


def convert(sources: list[str], targets: list[str], tp: int, pp: int) -> list[torch.Tensor]:
    """Load each source in parallel, save it again; the logits of the parallel models."""
    logits = []
    for source, target in zip(sources, targets, strict=True):
        model = hf_tpp.from_pretrained(source, tp=tp, pp=pp, verbose=False)
        assert not model.training
        logits.append(model(input_ids=make_batch(3, 8)["input_ids"]).logits)
        model.save_pretrained(target)
    return logits


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_round_trip_is_bit_identical(tmp_path: Path, tp: int, pp: int) -> None:
    models = {name: tiny_model(name).eval() for name in FAMILIES}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "source" / name)
    folders = [[str(tmp_path / kind / name) for name in FAMILIES] for kind in ("source", "target")]
    ranks = run_ranks(convert, tp * pp, *folders, tp, pp)
    for index, (name, model) in enumerate(models.items()):
        expected = model(input_ids=make_batch(3, 8)["input_ids"]).logits
        for logits in ranks:
            torch.testing.assert_close(logits[index], expected, rtol=1e-5, atol=1e-5)
        reloaded, info = AutoModelForCausalLM.from_pretrained(folders[1][index], output_loading_info=True)
        assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), name
        assert type(reloaded) is type(model)
        assert reloaded.config.tie_word_embeddings == model.config.tie_word_embeddings
        for key, value in model.state_dict().items():
            assert torch.equal(reloaded.state_dict()[key], value), f"{name} {key}"
        num_files = len(list(Path(folders[1][index]).glob("model*.safetensors")))
        assert num_files == pp, "each stage writes a file of its own"


def load_and_measure(folder: str) -> tuple[int, int]:
    """(bytes of this rank's parameters, growth of the peak resident memory while loading)."""
    hf_tpp.from_pretrained(WARM_UP_FOLDER.format(folder), tp=2, pp=2, verbose=False)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = hf_tpp.from_pretrained(folder, tp=2, pp=2, verbose=False)
    peak = resident("VmHWM")
    return sum(p.numel() * p.element_size() for p in model.parameters()), peak - before


WARM_UP_FOLDER = "{}-tiny"


def resident(field: str) -> int:
    """Bytes, from the kernel's own count of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def test_loading_takes_no_more_than_the_shard(tmp_path: Path) -> None:
    """A model of 0.9 GiB on four ranks: whoever holds it whole needs 690 MiB more than a shard."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32000,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if shutil.disk_usage(tmp_path).free < 4 * size:
        pytest.skip("needs 4 GiB of free disk")
    model.save_pretrained(tmp_path / "big")
    tiny_model("llama_gqa").save_pretrained(tmp_path / "big-tiny")
    del model
    for shard, growth in run_ranks(load_and_measure, 4, str(tmp_path / "big"), timeout=120.0):
        print(f"shard {shard / MIB:.0f} MiB of {size / MIB:.0f}, peak growth {growth / MIB:.0f} MiB")
        assert shard < 0.35 * size
        assert growth <= shard + 300 * MIB
