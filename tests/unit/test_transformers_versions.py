"""What differs between versions of transformers, on the installed one."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, masking_utils
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.cache import cache_argument, new_cache, takes_cache
from hf_tpp.transformers_versions import (
    CACHE_OUTPUT,
    PackedSequences,
    check_family,
    fewest_padded_rows,
    stores_experts_transposed,
    tie_on_meta,
    unlike_tracing,
)

HOME = "model_of_another_version"


@pytest.mark.parametrize(("version", "refused"), [("5.0.0", True), ("5.22.9", True), ("5.23.0", False), ("6.1", False)])
def test_a_family_that_was_wrong_is_refused_where_it_is(monkeypatch, version, refused):
    monkeypatch.setattr("hf_tpp.transformers_versions.VERSION", Version(version))
    check_family("LlamaForCausalLM", "llama")
    if not refused:
        check_family("DogeForCausalLM", "doge")
        return
    with pytest.raises(UnsupportedModelError, match=f"transformers {version} gives a row .* use 5.23 or newer"):
        check_family("DogeForCausalLM", "doge")


def mask_of_old(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    alone = mask is None or mask.shape[0] == 1
    return states if alone else states * mask[:, :, None]


def mask_of_new(states: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    return states if mask is None else states * mask[:, :, None]


@pytest.fixture
def home(monkeypatch):
    module = ModuleType(HOME)
    monkeypatch.setitem(sys.modules, HOME, module)
    return module


@pytest.mark.parametrize(
    ("version", "mask", "rows"),
    [("5.0.0", mask_of_old, 2), ("5.0.0", mask_of_new, 1), ("5.0.0", None, 1), ("5.17.0", mask_of_old, 1)],
)
def test_rows_that_are_masked_together_only(monkeypatch, home, version, mask, rows):
    monkeypatch.setattr("hf_tpp.transformers_versions.VERSION", Version(version))
    if mask is not None:
        home.apply_mask_to_padding_states = mask
    inner = type("Mixer", (nn.Linear,), {"__module__": HOME})(2, 2)
    with torch.device("meta"):  # as `parallelize` may be called
        assert fewest_padded_rows(nn.Sequential(inner)) == rows


@pytest.mark.parametrize(
    ("version", "device", "ties"), [("5.0.0", "meta", 1), ("5.0.0", "cpu", 0), ("5.17.0", "meta", 0)]
)
def test_weights_are_tied_where_building_on_meta_leaves_them(monkeypatch, version, device, ties):
    monkeypatch.setattr("hf_tpp.transformers_versions.VERSION", Version(version))
    calls = []
    model = nn.Linear(2, 2, device=device)
    model.tie_weights = lambda: calls.append(1)
    tie_on_meta(model)
    assert len(calls) == ties


def test_how_experts_are_stored():
    assert stores_experts_transposed(SimpleNamespace(is_transposed=True))
    assert not stores_experts_transposed(SimpleNamespace(is_transposed=False))
    assert stores_experts_transposed(type("GptOssExperts", (), {})())
    assert not stores_experts_transposed(type("MixtralExperts", (), {})())


def model_with(home, forward, *classes):
    for kind in classes:
        kind.__module__ = HOME
        setattr(home, kind.__name__, kind)
    return type("Model", (nn.Module,), {"__module__": HOME, "forward": forward})()


def take_new(self, input_ids, cache=None, use_cache=None): ...


def take_keys(self, input_ids, past_key_values=None, use_cache=None): ...


def take_states(self, input_ids, cache_params=None, use_cache=None): ...


def take_list(self, input_ids, state=None, use_cache=None): ...


def take_nothing(self, input_ids): ...


@pytest.mark.parametrize(
    ("forward", "name", "takes"),
    [
        (take_new, "cache", True),
        (take_keys, "past_key_values", True),
        (take_states, "cache_params", True),
        (take_list, None, False),
        (take_nothing, None, True),
    ],
)
def test_names_of_the_cache(home, forward, name, takes):
    model = model_with(home, forward)
    assert cache_argument(model) == name
    assert takes_cache(model) is takes


class StatePerLayer:
    """As xLSTM's: no layer asks another's state."""


class CountsForAll:
    """As Jamba's of transformers 5.0, which is no `Cache`."""

    def get_seq_length(self) -> int: ...


@pytest.mark.parametrize(
    ("kind", "takes"),
    [(StatePerLayer, True), (CountsForAll, False), (Cache, False), (CacheLayerMixin, True)],
)
def test_a_cache_of_the_models_own(home, kind, takes):
    own = type("Own", (kind,), {})
    model = model_with(home, take_keys, own)
    assert takes_cache(model) is takes
    if not takes:
        with pytest.raises(UnsupportedModelError, match=r"a form of its own.*leave use_cache out"):
            new_cache(model)


def test_the_output_has_the_cache():
    cache = object()
    output = CausalLMOutputWithPast(logits=torch.ones(1), **{CACHE_OUTPUT: cache})
    assert output.to_tuple()[1] is cache


@pytest.fixture
def searches(monkeypatch):
    """Positions in which transformers looked for several sequences."""
    seen: list[torch.Tensor] = []
    search = masking_utils.find_packed_sequence_indices

    def noted(position_ids: torch.Tensor) -> torch.Tensor | None:
        seen.append(position_ids)
        return search(position_ids)

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", noted)
    return seen


def forward(packed: PackedSequences, **batch: torch.Tensor) -> torch.Tensor:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, vocab_size=16))
    with packed.remembered([batch]):
        return model(**batch, use_cache=False).logits


def test_rows_without_positions_are_searched_once_for_each_shape(searches):
    packed = PackedSequences()
    for seq, count in ((8, 1), (8, 1), (6, 2), (8, 2)):
        forward(packed, input_ids=torch.ones(2, seq, dtype=torch.long))
        assert len(searches) == count
    forward(PackedSequences(), input_ids=torch.ones(2, 8, dtype=torch.long))
    assert len(searches) == 3


def test_rows_with_positions_are_searched_every_time(searches):
    packed = PackedSequences()
    ids = torch.arange(8)[None]
    forward(packed, input_ids=ids)
    whole = forward(packed, input_ids=ids, position_ids=torch.arange(8)[None])
    cut = forward(packed, input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    assert len(searches) == 3
    assert torch.equal(whole[:, :4], cut[:, :4])
    assert not torch.equal(whole[:, 4:], cut[:, 4:])


def test_positions_that_may_depend_on_tokens_are_searched_every_time(searches):
    packed, positions = PackedSequences(), torch.arange(8)[None]
    with packed.remembered([{"input_ids": positions}]):
        for given, count in ((positions.repeat(2, 1), 1), (positions.repeat(2, 1), 2), (positions, 3), (positions, 4)):
            assert masking_utils.find_packed_sequence_indices(given) is None
            assert len(searches) == count
        restarted = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]).repeat(2, 1)
        assert masking_utils.find_packed_sequence_indices(restarted) is not None


def test_masks_are_made_as_ever_while_recording(monkeypatch):
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
    ids = torch.arange(8)[None]
    config = LlamaConfig(hidden_size=16, num_attention_heads=2)
    config._attn_implementation = "sdpa"

    def mask() -> torch.Tensor | None:
        embeds = torch.zeros(1, 8, 16)
        return masking_utils.create_causal_mask(config, embeds, None, None, position_ids=ids)

    assert mask() is not None, "transformers no longer makes explicit masks in a trace: unlike_tracing can go"
    with unlike_tracing():
        assert mask() is None
    assert masking_utils.is_tracing()
