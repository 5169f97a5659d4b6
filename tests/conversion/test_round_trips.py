"""HF -> Megatron -> HF and Megatron -> HF -> Megatron give the same bits, for every family, type and layout."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_tpp_conversion import Conversion, Partition, convert, verify
from hf_tpp_conversion.families import FAMILIES
from tests.conversion.models import SETTINGS, architecture, bits, files, write_hf


@st.composite
def cases(draw):
    family = draw(st.sampled_from(sorted(SETTINGS)))
    groups = draw(st.sampled_from([1, 2, 4]))
    heads = groups * draw(st.sampled_from([1, 2]))
    model = architecture(
        family, draw(st.integers(4, 6)), heads, groups, draw(st.sampled_from([4, 8])), draw(st.integers(5, 300))
    )
    tp = draw(st.sampled_from([size for size in (1, 2, 4, 8) if heads % size == 0]))
    pp = draw(st.sampled_from([1, 2, 3]))
    vpp = draw(st.sampled_from([1, 2])) if pp == 2 else 1
    chunks = pp * vpp
    stages = ()
    if chunks > 1 and (model.num_layers % chunks or draw(st.booleans())):
        cuts = sorted(draw(st.lists(st.integers(0, model.num_layers), min_size=chunks - 1, max_size=chunks - 1)))
        stages = tuple(b - a for a, b in zip([0, *cuts], [*cuts, model.num_layers], strict=True))
    ep = draw(st.sampled_from([1, 2, 4])) if model.experts else 1
    partition = Partition(
        tp, pp, vpp, ep, stages, draw(st.sampled_from([0 if model.vocab_size % tp == 0 else 1, 4, 128]))
    )
    options = {
        "format": draw(st.sampled_from(["legacy", "torch_dist"])),
        "layer_spec": draw(st.sampled_from(["te", "local"])),
    }
    return family, model, partition, options, draw(st.sampled_from(["F32", "BF16", "F16"]))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_both_round_trips_keep_every_bit(case):
    family, model, partition, options, dtype = case
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = write_hf(root / "hf", family, model, dtype)
        convert(Conversion(source, root / "megatron", "megatron", partition=partition, **options))
        convert(Conversion(root / "megatron", root / "back", "hf"))
        assert bits(root / "back") == bits(source)
        assert (root / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert (root / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
        convert(Conversion(root / "back", root / "again", "megatron", partition=partition, **options))
        assert files(root / "again") == files(root / "megatron")


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_a_new_layout_of_a_megatron_checkpoint_is_the_same_model(tmp_path, family):
    source = write_hf(tmp_path / "hf", family, architecture(family))
    convert(Conversion(source, tmp_path / "a", "megatron", "legacy", "local", Partition(tp=2, pp=4)))
    convert(Conversion(tmp_path / "a", tmp_path / "b", "megatron", "torch_dist", "te", Partition(tp=4)))
    convert(Conversion(tmp_path / "b", tmp_path / "c", "megatron", "legacy", "local", Partition(tp=2, pp=4)))
    convert(Conversion(tmp_path / "b", tmp_path / "hf2", "hf"))
    found = verify(tmp_path / "a", tmp_path / "b")
    assert found["same"], found
    assert found["tensors"] > 10
    assert verify(tmp_path / "b", tmp_path / "c")["same"]
    assert bits(tmp_path / "hf2") == bits(source)


def test_a_checkpoint_that_does_not_say_its_family_is_matched(tmp_path):
    for family in SETTINGS:
        source = write_hf(tmp_path / family, family, architecture(family))
        megatron = tmp_path / f"{family}-megatron"
        convert(Conversion(source, megatron, "megatron", "legacy", partition=Partition(tp=2)))
        for path in (megatron / "huggingface").iterdir():
            path.unlink()
        convert(Conversion(megatron, tmp_path / f"{family}-named", "hf", family=family))
        assert bits(tmp_path / f"{family}-named") == bits(source)
        convert(Conversion(megatron, tmp_path / f"{family}-matched", "hf"))
        config = json.loads((tmp_path / f"{family}-matched" / "config.json").read_text())
        assert config["model_type"] == (family if family != "phi3" else "llama")  # Phi-3 is Llama, stored otherwise


@pytest.mark.parametrize("family", sorted(SETTINGS))
def test_transformers_loads_what_was_written_from_args_alone(tmp_path, family):
    """The config.json that is made from Megatron's args describes the same model to transformers."""
    model = architecture(family)
    source = write_hf(tmp_path / "hf", family, model)
    config = AutoConfig.from_pretrained(source)
    loaded = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in loaded.named_parameters()}
    assert sum(p.numel() for p in loaded.parameters()) == sum(v[2].__len__() // 4 for v in bits(source).values())
    assert names
    saved = json.loads(config.to_json_string())
    assert FAMILIES[family].from_config(_settings(saved)) == model


def _settings(values):
    from hf_tpp_conversion.configs.settings import Settings

    return Settings(values, "saved by transformers")


def write_ordinary(folder, scale=1.0):
    """A Llama with values that are ordinary numbers, so that they can be rounded to any type."""
    source = write_hf(folder, "llama", architecture("llama"))
    tensors = {name: torch.randn(shape) * scale for name, (shape, _, _) in bits(source).items()}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def test_types_are_rounded_as_torch_rounds(tmp_path):
    source = write_ordinary(tmp_path / "hf")
    convert(Conversion(source, tmp_path / "m", "megatron", dtype="bf16", partition=Partition(tp=2)))
    convert(Conversion(tmp_path / "m", tmp_path / "back", "hf"))
    for name, (shape, dtype, content) in bits(tmp_path / "back").items():
        original = torch.frombuffer(bytearray(bits(source)[name][2]), dtype=torch.float32).reshape(shape)
        assert dtype == torch.bfloat16
        assert original.to(torch.bfloat16).view(torch.uint8).numpy().tobytes() == content


def test_values_that_do_not_fit_the_type_are_refused(tmp_path):
    source = write_ordinary(tmp_path / "hf", scale=1e6)
    with pytest.raises(CheckpointError, match=r"values of 'embedding.word_embeddings.weight' are too large for F16"):
        convert(Conversion(source, tmp_path / "m", "megatron", dtype="fp16"))
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
    convert(Conversion(source, tmp_path / "m", "megatron", dtype="bf16"))


def test_sharded_safetensors(tmp_path):
    source = write_hf(tmp_path / "hf", "qwen2", architecture("qwen2"))
    convert(Conversion(source, tmp_path / "m", "megatron"))
    convert(Conversion(tmp_path / "m", tmp_path / "back", "hf", max_shard_size=20_000))
    assert len(list((tmp_path / "back").glob("model-*.safetensors"))) > 2
    assert bits(tmp_path / "back") == bits(source)
    convert(Conversion(tmp_path / "back", tmp_path / "again", "megatron"))
    assert verify(tmp_path / "again", source)["same"]


def test_sizes_that_megatron_cannot_build_are_refused_before_a_byte_is_written(tmp_path):
    source = write_hf(tmp_path / "hf", "llama", architecture("llama"))
    for partition, words in [
        (Partition(tp=3), "tp=3 does not divide the 4 attention heads: use one of [1, 2, 4]"),
        (Partition(pp=3), "4 layers do not form 3 equal chunks"),
        (Partition(vpp=2), "vpp=2 needs pp > 1"),
        (Partition(ep=2), "ep=2, but the model has no experts"),
        (Partition(pp=2, stages=(1, 2)), "must be 2 counts"),
    ]:
        with pytest.raises(ConfigurationError) as caught:
            convert(Conversion(source, tmp_path / "out", "megatron", partition=partition))
        assert words in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("gpt2", {"activation": "relu"}, "activation: relu, they would mean gelu"),
        ("llama", {"activation": "gelu_tanh"}, "activation: gelu_tanh, they would mean silu"),
        ("starcoder2", {"linear_bias": False, "qkv_bias": False}, "activation: gelu_tanh, they would mean gelu"),
    ],
)
@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_what_megatrons_args_cannot_say_is_refused(tmp_path, family, changes, words, kind):
    """It would be another model to Megatron, without a word."""
    source = write_hf(tmp_path / "hf", family, architecture(family, **changes))
    with pytest.raises(UnsupportedModelError) as caught:
        convert(Conversion(source, tmp_path / "m", "megatron", kind))
    assert words in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
