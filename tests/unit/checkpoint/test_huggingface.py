import json
import resource

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp.checkpoint.huggingface import SafetensorsCheckpoint, resolve_checkpoint
from hf_tpp.checkpoint.huggingface.conversion import refuse_converted
from hf_tpp.checkpoint.huggingface.files import INDEX_NAME, WEIGHTS_NAME
from hf_tpp.errors import CheckpointError, UnsupportedModelError
from hf_tpp.plan.layout import Block, Layout, padded_vocabulary
from hf_tpp.sharding import ShardSpec, unshard
from hf_tpp.transformers_versions import tie_on_meta
from tests.ranks import run_ranks

CPU = torch.device("cpu")
MB = 2**20

TINY = {
    "gpt2": {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 11, "n_positions": 16},
    "gpt_neox": {
        "num_hidden_layers": 2,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 11,
    },
    **{
        family: {
            "num_hidden_layers": 2,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 4,
            "intermediate_size": 12,
            "vocab_size": 11,
        }
        for family in ("llama", "mistral", "qwen2")
    },
}


def spec_of(name, shape, dim=None, layout=None, tp_rank=0, tp_size=1):
    return ShardSpec(name, tuple(shape), dim, layout, tp_rank, tp_size)


def write_index(folder, weight_map):
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_header(path, header, num_bytes=0):
    encoded = header.encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + bytes(num_bytes))


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {"a": torch.randn(6, 10), "b": torch.randn(6), "c": torch.tensor(3.0), "mask": torch.tensor([1, 2])}


@pytest.fixture
def folder(tmp_path, tensors):
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    return tmp_path


# --- slices


@pytest.mark.parametrize("tp_size", [1, 2, 3])
@pytest.mark.parametrize(("dim", "blocks"), [(0, ((3, 2),)), (0, ((3, 1), (3, 1))), (1, ((10, 1),)), (1, ((5, 2),))])
def test_shards_of_all_ranks_are_the_whole_tensor(folder, tensors, dim, blocks, tp_size):
    layout = Layout(tuple(Block(*block) for block in blocks))
    specs = [spec_of("a", (6, 10), dim, layout, rank, tp_size) for rank in range(tp_size)]
    source = SafetensorsCheckpoint(folder)
    shards = [source.shard(spec, CPU, torch.float32) for spec in specs]
    assert torch.equal(unshard(shards, specs[0]), tensors["a"])


def test_padding_is_zero_and_whole_tensors_and_scalars_are_read(folder, tensors):
    source = SafetensorsCheckpoint(folder)
    last = source.shard(spec_of("b", (6,), 0, padded_vocabulary(6, 4), 3, 4), CPU, torch.float32)
    assert torch.equal(last, torch.zeros(2))
    assert torch.equal(source.shard(spec_of("b", (6,)), CPU, torch.float32), tensors["b"])
    assert torch.equal(source.shard(spec_of("c", ()), CPU, torch.float32), tensors["c"])
    assert torch.equal(source.buffer("mask", CPU), tensors["mask"])


def test_tensors_larger_than_a_band_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_tpp.checkpoint.huggingface.reader._BAND", 100)
    monkeypatch.setattr("hf_tpp.checkpoint.huggingface.reader.MAX_TOUCHED", 250)
    whole = torch.randn(23, 6)
    save_file({"w": whole}, tmp_path / WEIGHTS_NAME)
    source = SafetensorsCheckpoint(tmp_path)
    for dim in (0, 1):
        layout = Layout((Block(whole.shape[dim]),))
        specs = [spec_of("w", whole.shape, dim, layout, rank, 4) for rank in range(4)]
        assert torch.equal(unshard([source.shard(s, CPU, torch.float32) for s in specs], specs[0]), whole)


def test_floating_types_are_cast_and_others_are_not(folder, tensors):
    source = SafetensorsCheckpoint(folder)
    half = source.shard(spec_of("a", (6, 10)), CPU, torch.bfloat16)
    assert torch.equal(half, tensors["a"].bfloat16())
    with pytest.raises(CheckpointError, match=r"'mask' .* is torch\.int64, the model's torch\.float32"):
        source.shard(spec_of("mask", (2,)), CPU, torch.float32)


# --- names


@pytest.mark.parametrize(("stored", "wanted"), [("h.w", "transformer.h.w"), ("transformer.h.w", "h.w")])
def test_base_model_prefix_may_be_absent_or_present(tmp_path, stored, wanted):
    save_file({stored: torch.ones(3)}, tmp_path / WEIGHTS_NAME)
    source = SafetensorsCheckpoint(tmp_path, base_model_prefix="transformer")
    source.check({wanted: (3,)})
    assert torch.equal(source.shard(spec_of(wanted, (3,)), CPU, torch.float32), torch.ones(3))


@pytest.mark.parametrize("stored", [("wte",), ("head",), ("wte", "head")])
def test_a_tied_weight_is_found_under_either_name(tmp_path, stored):
    save_file({name: torch.ones(3) for name in stored}, tmp_path / WEIGHTS_NAME)
    source = SafetensorsCheckpoint(tmp_path, tied={"head": "wte"})
    source.check({"wte": (3,)})
    assert torch.equal(source.shard(spec_of("wte", (3,)), CPU, torch.float32), torch.ones(3))


def test_tied_weights_that_differ_are_refused(tmp_path):
    save_file({"wte": torch.ones(3), "head": torch.zeros(3)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        SafetensorsCheckpoint(tmp_path, tied={"head": "wte"}).check({"wte": (3,)})


def test_check_names_everything_that_is_wrong(folder):
    source = SafetensorsCheckpoint(folder)
    with pytest.raises(CheckpointError) as caught:
        source.check({"a": (10, 6), "x": (1,), "mask": (2,)}, {"mask": torch.float32}, ["^c$"])
    text = str(caught.value)
    assert "'x' is missing" in text
    assert "'a' in model.safetensors has shape [6, 10], the model's [10, 6]" in text
    assert "'mask' in model.safetensors is torch.int64" in text
    assert "'b' in model.safetensors belongs to no parameter" in text
    assert "'c'" not in text


def test_reading_what_is_missing_is_an_error(folder):
    source = SafetensorsCheckpoint(folder)
    with pytest.raises(CheckpointError, match="'x' is missing"):
        source.shard(spec_of("x", (1,)), CPU, torch.float32)
    with pytest.raises(CheckpointError, match="no buffer 'x'"):
        source.buffer("x", CPU)


# --- models


def on_meta(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tie_on_meta(model)
    return model


def canonical_names(model):
    first = {}
    return {name: first.setdefault(p, name) for name, p in model.named_parameters(remove_duplicate=False)}


def open_for(config, folder):
    model = on_meta(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return model, SafetensorsCheckpoint.open(model, shapes, canonical_names(model), folder)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("family", list(TINY))
def test_a_saved_model_is_read_with_the_values_that_transformers_loads(tmp_path, family, tie):
    config = AutoConfig.for_model(family, **TINY[family], tie_word_embeddings=tie)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path, max_shard_size="1KB")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    model, source = open_for(config, tmp_path)
    for name, parameter in model.named_parameters():
        values = source.shard(spec_of(name, parameter.shape), CPU, torch.float32)
        assert torch.equal(values, expected.get_parameter(name)), name
    for name, _ in model.named_buffers():
        values, other = source.buffer(name, CPU), expected.get_buffer(name)
        assert values.dtype == other.dtype
        assert torch.equal(values, other), name


def test_gpt2_of_the_hub_has_no_prefix_and_stores_masks(tmp_path):
    config = AutoConfig.for_model("gpt2", **TINY["gpt2"])
    plain = AutoModelForCausalLM.from_config(config)
    stored = {name: value.clone() for name, value in plain.transformer.state_dict().items()}
    stored["h.0.attn.bias"] = torch.ones(1, 1, 16, 16)
    save_file(stored, tmp_path / WEIGHTS_NAME)
    model, source = open_for(config, tmp_path)
    for name, parameter in model.named_parameters():
        values = source.shard(spec_of(name, parameter.shape), CPU, torch.float32)
        assert torch.equal(values, plain.get_parameter(name))


def test_a_model_whose_tensors_are_merged_while_loading_is_refused():
    config = AutoConfig.for_model("mixtral", **TINY["llama"], num_local_experts=2)
    with pytest.raises(UnsupportedModelError, match=r"MixtralForCausalLM stores .*experts"):
        refuse_converted(on_meta(config))


# --- hostile and broken folders


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..", "x.bin", ""]
)
def test_an_index_may_only_name_files_of_the_folder(tmp_path, name):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    save_file({"a": torch.ones(1)}, folder / "sub" / "x.safetensors")
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match="only plain names"):
        SafetensorsCheckpoint(folder)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_link_out_of_the_folder_is_refused(tmp_path, indexed):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "secret")
    name = "x.safetensors" if indexed else WEIGHTS_NAME
    (folder / name).symlink_to(tmp_path / "secret")
    if indexed:
        write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=f"{name} is a link to .*secret"):
        SafetensorsCheckpoint(folder)


def test_a_repository_in_the_hub_cache_is_found_and_its_links_are_followed(tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for path in (snapshot, repository / "blobs", repository / "refs"):
        path.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save_file({"a": torch.ones(1)}, repository / "blobs" / "f00")
    (snapshot / WEIGHTS_NAME).symlink_to("../../blobs/f00")
    folder = resolve_checkpoint("someone/tiny", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(SafetensorsCheckpoint(folder).buffer("a", CPU), torch.ones(1))


@pytest.mark.parametrize("name", ["./nowhere", "some one/x", "someone/not-downloaded"])
def test_a_name_that_is_nothing_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="neither a folder nor a repository"):
        resolve_checkpoint(name, cache_dir=tmp_path, local_files_only=True)


def test_a_file_is_no_checkpoint(folder):
    with pytest.raises(CheckpointError, match="is a file: pass the folder"):
        resolve_checkpoint(folder / WEIGHTS_NAME)
    assert resolve_checkpoint(str(folder)) == folder


def test_files_missing_tensors_missing_and_duplicates_are_named(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(CheckpointError, match=r"needs the file y\.safetensors"):
        SafetensorsCheckpoint(tmp_path)
    write_index(tmp_path, {"a": "x.safetensors", "b": "x.safetensors"})
    with pytest.raises(CheckpointError, match=r"places tensor 'b' in x\.safetensors"):
        SafetensorsCheckpoint(tmp_path)
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "y.safetensors")
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    with pytest.raises(CheckpointError, match=r"tensor 'a' is in x\.safetensors and in y\.safetensors"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{", '{"weight_map": {"a": 1}}', "{}", "[" * 100_000, "\xff"])
def test_a_broken_index_is_refused(tmp_path, index):
    (tmp_path / INDEX_NAME).write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError):
        SafetensorsCheckpoint(tmp_path)


def test_an_index_with_repeated_names_is_refused(tmp_path):
    (tmp_path / INDEX_NAME).write_text('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}')
    with pytest.raises(CheckpointError, match="names 'a' twice"):
        SafetensorsCheckpoint(tmp_path)


def test_a_header_with_repeated_names_is_refused(tmp_path):
    entry = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    write_header(tmp_path / WEIGHTS_NAME, "{" + entry + "," + entry + "}", 4)
    with pytest.raises(CheckpointError, match="twice"):
        SafetensorsCheckpoint(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"12345",
        (2**40).to_bytes(8, "little"),
        (100).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_broken_file_is_refused(tmp_path, content):
    (tmp_path / WEIGHTS_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=WEIGHTS_NAME):
        SafetensorsCheckpoint(tmp_path)


def test_a_truncated_file_is_refused(folder):
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="no readable safetensors file"):
        SafetensorsCheckpoint(folder)


def test_other_formats_are_named_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"it has only pytorch_model\.bin: convert other formats .* with transf"):
        SafetensorsCheckpoint(tmp_path)


def test_quantized_tensors_are_refused(tmp_path):
    save_file({"a": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="quantized or unknown type"):
        SafetensorsCheckpoint(tmp_path).check({"a": (2,)})


# --- memory


def peak_growth(folder, specs):
    source = SafetensorsCheckpoint(folder)
    source.shard(spec_of("small", (4,)), CPU, torch.bfloat16)
    before = peak_memory()
    shards = [source.shard(spec, CPU, torch.bfloat16) for spec in specs]
    return peak_memory() - before, sum(shard.nbytes for shard in shards)


def peak_memory():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def test_a_rank_needs_little_more_memory_than_its_shards(tmp_path):
    # A sparse file: 3 x 128 MiB, in a few milliseconds.
    shape, size = (8192, 8192), 8192 * 8192 * 2
    names = ("row", "column", "row2")
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header["small"] = {"dtype": "BF16", "shape": [4], "data_offsets": [3 * size, 3 * size + 8]}
    write_header(tmp_path / WEIGHTS_NAME, json.dumps(header))
    with (tmp_path / WEIGHTS_NAME).open("r+b") as file:
        start = file.seek(0, 2)
        file.truncate(start + 3 * size + 8)
    layout = Layout((Block(8192),))
    dims = {"row": 0, "column": 1, "row2": 0}
    specs = [spec_of(name, shape, dims[name], layout, 1, 4) for name in names]
    [(growth, shards)] = run_ranks(peak_growth, 1, tmp_path, specs, init=False)  # a process of its own
    assert shards == 3 * 32 * MB
    assert shards <= growth <= shards + 80 * MB
