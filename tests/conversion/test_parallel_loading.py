"""`parallelize(model_on_meta, checkpoint="megatron folder")`: the same logits as the Hugging Face model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_tpp
from hf_tpp.errors import CheckpointError
from hf_tpp_conversion import Conversion, Partition, convert
from tests.conversion.configs import ALL
from tests.parity.models import make_batch, tiny_model
from tests.ranks import run_ranks


def load(sources: list[str], checkpoints: list[str], tp: int, pp: int) -> list[torch.Tensor]:
    logits = []
    for source, checkpoint in zip(sources, checkpoints, strict=True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        model = hf_tpp.parallelize(model.eval(), tp, pp, checkpoint=checkpoint, verbose=False)
        logits.append(model(input_ids=make_batch(3, 8)["input_ids"]).logits)
    return logits


def test_megatron_checkpoints_are_loaded_into_parallel_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = {name: AutoModelForCausalLM.from_config(config).eval() for name, config in ALL.items()}
    for parameter in (parameter for model in models.values() for parameter in model.parameters()):
        parameter.data += 0.05 * torch.randn_like(parameter)  # norms and biases are not at their neutral values
    sources, targets = [], []
    for index, (name, model) in enumerate(models.items()):
        sources.append(str(tmp_path / name))
        targets.append(str(tmp_path / f"{name}-megatron"))
        model.save_pretrained(sources[-1])
        kind = "legacy" if index % 2 else "torch_dist"
        convert(Conversion(Path(sources[-1]), Path(targets[-1]), "megatron", kind, partition=Partition(tp=2)))
    for logits in run_ranks(load, 4, sources, targets, 2, 2):
        for found, model in zip(logits, models.values(), strict=True):
            expected = model(input_ids=make_batch(3, 8)["input_ids"]).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_another_model_is_refused(tmp_path: Path) -> None:
    for name in ("mistral", "qwen2"):
        tiny_model(name).save_pretrained(tmp_path / name)
    convert(Conversion(tmp_path / "qwen2", tmp_path / "megatron", "megatron"))
    with pytest.raises(CheckpointError, match="does not hold this model"):
        load([str(tmp_path / "mistral")], [str(tmp_path / "megatron")], 1, 1)
