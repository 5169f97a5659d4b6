"""What a block is given must be the same on its stage as in one process, or the model is refused on every rank."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaModel

import hf_tpp
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.boundary import differing_argument, fingerprints
from tests.parity.models import make_batch, tiny_config
from tests.ranks import run_ranks


class Llama(LlamaModel):
    """Gives every block one more argument, computed from the embeddings."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = self.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embeds, seen=self.seen(embeds), **kwargs)

    def seen(self, embeds):
        return embeds * 2


class DetachedLlama(Llama):
    def seen(self, embeds):
        return embeds.detach() * 2


class CountingLlama(Llama):
    def seen(self, embeds):
        return (embeds > 0).sum()


class DroppingLlama(Llama):
    def seen(self, embeds):
        return nn.functional.dropout(embeds, 0.5, training=True)


def build(kind: type[LlamaModel]) -> nn.Module:
    torch.manual_seed(0)
    config = tiny_config("llama_gqa", 3)
    config.attention_dropout = 0.1 if kind is DroppingLlama else 0.0
    model = LlamaForCausalLM(config)
    weights = model.model.state_dict()
    model.model = kind(config)
    model.model.load_state_dict(weights)
    return model


def train(kinds: list[type[LlamaModel]]) -> list[str | float]:
    """Body of a rank: the error of each, or the difference of its loss."""
    found: list[str | float] = []
    for kind in kinds:
        batch = make_batch(2, 8)
        expected = build(kind)(**batch).loss
        model = hf_tpp.parallelize(build(kind), pp=3, verbose=False, verify=False)
        try:
            found.append(abs(float(model(**batch).loss - expected)))
        except UnsupportedModelError as error:
            found.append(str(error))
    return found


def test_what_does_not_travel_is_refused_on_every_rank():
    for exact, *refused in run_ranks(train, 3, [Llama, DetachedLlama, CountingLlama, DroppingLlama]):
        assert isinstance(exact, float), exact
        assert exact < 1e-5
        for message in refused:
            assert "a block is given another 'seen' than in one process" in message
            assert "use pp=1" in message


@pytest.mark.parametrize(
    ("before", "here", "name"),
    [
        ({"h": torch.ones(2)}, {"h": torch.ones(2)}, None),
        ({"h": torch.ones(2)}, {"h": torch.tensor([1.0, 2.0])}, "h"),
        (
            {"h": torch.ones(2), "mask": (torch.ones(1), None)},
            {"h": torch.ones(2), "mask": (torch.zeros(1), 3)},
            "mask",
        ),
        ({"h": torch.ones(2)}, {"h": torch.ones(2), "more": torch.ones(1)}, "more"),
        ({"h": torch.zeros(2)}, {"h": torch.ones(2, requires_grad=True)}, None),
        ({"h": torch.zeros(2, requires_grad=True)}, {"h": torch.ones(2, requires_grad=True)}, "h"),
        ({"h": torch.ones(1, dtype=torch.complex64)}, {"h": torch.ones(1, dtype=torch.complex64) * 1j}, "h"),
    ],
)
def test_arguments_are_compared_by_value(before, here, name):
    assert differing_argument(fingerprints(before), fingerprints(here)) == name
